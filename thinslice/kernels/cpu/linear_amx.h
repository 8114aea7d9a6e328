// The AMX tile kernel and its tile configuration.
#pragma once

#include "types.h"

namespace thinslice {
namespace amx {

void enter();
void leave();
void panel_times_rows(const uint8_t* panel, Format format, Width width, const QuantizedRows& x,
                      float* acc);

}  // namespace amx
namespace avx512 {

void panel_times_rows(const uint8_t* panel, Format format, Width width, const QuantizedRows& x,
                      float* acc);

}  // namespace avx512
}  // namespace thinslice

// What fills packed matrices, and what changes the type of numbers, on all threads.
#pragma once

#include "types.h"

namespace thinslice {

// Both return the bits of PackStatus.
uint32_t quantize(const QuantizeJob& job);
uint32_t repack(const RepackJob& job);

// `from` need not be aligned; the arrays must not overlap.
void convert(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t count);

}  // namespace thinslice

// Jobs whose tensors name positions: every index is checked before memory is touched.
#pragma once

#include "types.h"

namespace thinslice {

// These throw std::invalid_argument for an index outside its tensor.
void rope(const RopeJob& job);
void write_kv(const WriteKvJob& job);
void attention(const AttentionJob& job);

}  // namespace thinslice

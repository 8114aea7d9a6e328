// Blocks of a GGUF put into the order of a packed matrix; their codes stay what they are.
#pragma once

#include <cstdint>

namespace thinslice {

enum class GgmlType : int { q4_0 = 0, q4_1 = 1, q8_0 = 2 };

struct RepackJob {
  const uint8_t* blocks;  // rows of blocks of 32 weights
  GgmlType type;
  int64_t rows;
  int64_t groups;
  uint8_t* panels;
};

// Rows that fill up the last panel are zero.
void repack(const RepackJob& job);

}  // namespace thinslice

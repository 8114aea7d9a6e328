// Source of the block layouts: block_q4_0, block_q4_1 and block_q8_0 in llama.cpp's ggml-common.h.
#include "repack.h"

#include <algorithm>
#include <cstring>

#include "threads.h"
#include "types.h"

namespace thinslice {

namespace {

constexpr uint32_t kLow = 0x0f0f0f0f, kHigh = 0xf0f0f0f0, kSigns = 0x80808080;
constexpr int kWord = 4;  // bytes of a line that belong to one row

uint32_t word(const uint8_t* codes, int i) {
  uint32_t value;
  std::memcpy(&value, codes + kWord * i, kWord);
  return value;
}

void put(uint8_t* lines, int line, int row, uint32_t value) {
  std::memcpy(lines + 64 * line + kWord * row, &value, kWord);
}

// Low nibbles of a block's 16 bytes are its first 16 weights, high nibbles the others.
void put_nibbles(const uint8_t* codes, uint8_t* lines, int row) {
  const uint32_t w[4] = {word(codes, 0), word(codes, 1), word(codes, 2), word(codes, 3)};
  put(lines, 0, row, (w[0] & kLow) | ((w[1] & kLow) << 4));
  put(lines, 1, row, (w[2] & kLow) | ((w[3] & kLow) << 4));
  put(lines, 2, row, ((w[0] >> 4) & kLow) | (w[1] & kHigh));
  put(lines, 3, row, ((w[2] >> 4) & kLow) | (w[3] & kHigh));
}

void put_bytes(const uint8_t* codes, uint8_t* lines, int row) {
  for (int i = 0; i < 8; ++i) put(lines, i, row, word(codes, i) ^ kSigns);
}

template <GgmlType T>
struct Block;
template <>
struct Block<GgmlType::q4_0> {
  static constexpr Format format = Format::int4;
  static constexpr int halves = 1, bytes = 18;
};
template <>
struct Block<GgmlType::q4_1> {
  static constexpr Format format = Format::int4m;
  static constexpr int halves = 2, bytes = 20;
};
template <>
struct Block<GgmlType::q8_0> {
  static constexpr Format format = Format::int8;
  static constexpr int halves = 1, bytes = 34;
};

template <GgmlType T>
void repack_panel(const RepackJob& job, int64_t panel) {
  using B = Block<T>;
  using L = Layout<B::format>;
  const int64_t size = L::panel_bytes(job.groups), first = panel * kPanelRows;
  uint8_t* out = job.panels + panel * size;
  const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, job.rows - first));
  // An odd last group and rows beyond the matrix leave bytes that nobody writes.
  if (rows < kPanelRows || job.groups % 2) std::memset(out, 0, size);
  for (int row = 0; row < rows; ++row) {
    const uint8_t* block = job.blocks + (first + row) * job.groups * B::bytes;
    for (int64_t g = 0; g < job.groups; ++g, block += B::bytes) {
      const uint8_t* codes = block + 2 * B::halves;
      if constexpr (T == GgmlType::q8_0) {
        put_bytes(codes, out + L::codes(g), row);
      } else {
        put_nibbles(codes, out + L::codes(g), row);
      }
      for (int half = 0; half < B::halves; ++half) {
        std::memcpy(out + L::scales(g) + 32 * half + 2 * row, block + 2 * half, 2);
      }
    }
  }
}

}  // namespace

void repack(const RepackJob& job) {
  const int64_t panels = (job.rows + kPanelRows - 1) / kPanelRows;
  parallel_for(panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      switch (job.type) {
        case GgmlType::q4_0:
          repack_panel<GgmlType::q4_0>(job, panel);
          break;
        case GgmlType::q4_1:
          repack_panel<GgmlType::q4_1>(job, panel);
          break;
        case GgmlType::q8_0:
          repack_panel<GgmlType::q8_0>(job, panel);
          break;
      }
    }
  });
}

}  // namespace thinslice

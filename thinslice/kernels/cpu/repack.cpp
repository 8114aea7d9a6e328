// Blocks of a GGUF put into the order of packed panels; their codes stay what they are. Both
// layouts have the codes of a word of four bytes side by side, so they are never taken apart.
// Source of the block layouts: block_q4_0, block_q4_1, block_q8_0 and block_q4_K in llama.cpp's
// ggml-common.h, get_scale_min_k4 in its ggml-quants.c.
#include "simd.h"
#include "vector_kernels.h"

namespace thinslice {
namespace THINSLICE_ISA {

namespace {

constexpr uint32_t kLow = 0x0f0f0f0f, kHigh = 0xf0f0f0f0, kSigns = 0x80808080;
constexpr int kWord = 4;  // bytes of a line that belong to one row

// From here on fp16 rounds to infinity.
constexpr float kHalfOverflow = 65520.0f;

SIMD_INLINE uint32_t word(const uint8_t* codes, int i) {
  uint32_t value;
  memcpy(&value, codes + kWord * i, kWord);
  return value;
}

SIMD_INLINE void put(uint8_t* lines, int line, int row, uint32_t value) {
  memcpy(lines + 64 * line + kWord * row, &value, kWord);
}

// A block's 16 bytes hold its first weights in their low nibbles and the others in their high ones.
SIMD_INLINE void put_nibbles(const uint8_t* codes, uint8_t* lines, int row) {
  const uint32_t w[4] = {word(codes, 0), word(codes, 1), word(codes, 2), word(codes, 3)};
  put(lines, 0, row, (w[0] & kLow) | ((w[1] & kLow) << 4));
  put(lines, 1, row, (w[2] & kLow) | ((w[3] & kLow) << 4));
  put(lines, 2, row, ((w[0] >> 4) & kLow) | (w[1] & kHigh));
  put(lines, 3, row, ((w[2] >> 4) & kLow) | (w[3] & kHigh));
}

SIMD_INLINE void put_bytes(const uint8_t* codes, uint8_t* lines, int row) {
  for (int i = 0; i < 8; ++i) put(lines, i, row, word(codes, i) ^ kSigns);
}

// Blocks of one group, of which a row has `blocks`: some fp16, then codes. A block of each of the
// rows is done after the other, so that the lines they make stay in the nearest cache.
template <Format F, int Halves, int Bytes>
void put_blocks(const uint8_t* first_row, int rows, int64_t blocks, uint8_t* out) {
  using L = Layout<F>;
  for (int64_t g = 0; g < blocks; ++g) {
    for (int row = 0; row < rows; ++row) {
      const uint8_t* block = first_row + (row * blocks + g) * Bytes;
      if constexpr (F == Format::int8) {
        put_bytes(block + 2 * Halves, out + L::codes(g), row);
      } else {
        put_nibbles(block + 2 * Halves, out + L::codes(g), row);
      }
      for (int half = 0; half < Halves; ++half) {
        memcpy(out + L::scales(g) + 32 * half + 2 * row, block + 2 * half, 2);
      }
    }
  }
}

// Words of a q4_k block: fp16 d and dmin in one, six bits for the scale and the minimum of each of
// its eight groups in three, and 32 with the codes.
constexpr int kSuperGroups = 8, kSuperWords = 36;

// The blocks that stand at one place in the 16 rows, as [word][row]; of rows that are not there, 0.
struct SuperBlocks {
  alignas(64) uint32_t head[4][kPanelRows];
  alignas(64) uint32_t codes[32][kPanelRows];
};

SIMD_INLINE void load_super(const uint8_t* first_row, int rows, int64_t stride, SuperBlocks& out) {
  uint32_t words[kPanelRows][kSuperWords];
  const uint32_t *first[kPanelRows], *second[kPanelRows];
  for (int row = 0; row < kPanelRows; ++row) {
    if (row < rows) {
      memcpy(words[row], first_row + row * stride, sizeof words[row]);
    } else {
      memset(words[row], 0, sizeof words[row]);
    }
    for (int i = 0; i < 4; ++i) out.head[i][row] = words[row][i];
    first[row] = words[row] + 4;
    second[row] = words[row] + 20;
  }
  transpose16(first, out.codes[0], kPanelRows);
  transpose16(second, out.codes[16], kPanelRows);
}

// Eight words whose nibbles at `shift` are the codes of one group.
SIMD_INLINE void put_lines(const uint32_t (*words)[kPanelRows], int shift, uint8_t* lines) {
  for (int line = 0; line < 4; ++line) {
    uint32_t both[kPanelRows];
    for (int row = 0; row < kPanelRows; ++row) {
      const uint32_t low = (words[2 * line][row] >> shift) & kLow;
      both[row] = low | (((words[2 * line + 1][row] >> shift) & kLow) << 4);
    }
    memcpy(lines + 64 * line, both, sizeof both);
  }
}

// Four words of bytes: those of the first four groups' scales, of the others' scales, then of
// minimums.
SIMD_INLINE void sort_factors(const uint32_t (*head)[kPanelRows], uint32_t (*out)[kPanelRows]) {
  for (int row = 0; row < kPanelRows; ++row) {
    const uint32_t first = head[1][row], second = head[2][row], third = head[3][row];
    out[0][row] = first & 0x3f3f3f3f;
    out[1][row] = (third & kLow) | ((first >> 2) & 0x30303030);
    out[2][row] = second & 0x3f3f3f3f;
    out[3][row] = ((third >> 4) & kLow) | ((second >> 2) & 0x30303030);
  }
}

// The byte of each word at `shift`, times the row's unit; rounded to fp16 where it is stored.
SIMD_INLINE Vec put_scales(const uint32_t* words, int shift, Vec unit, int rows, uint8_t* out) {
  float factors[kPanelRows];
  for (int row = 0; row < kPanelRows; ++row) {
    factors[row] = static_cast<float>(static_cast<int32_t>((words[row] >> shift) & 63));
  }
  const Vec scales = vkeep(vmul(unit, vload(factors)), 0, rows, vset(0.0f));
  f16 halves[kPanelRows];
  vstore(halves, scales);
  memcpy(out, halves, sizeof halves);
  return vabs(scales);
}

// Rows of blocks of eight groups; returns the largest scale or minimum.
float put_super_blocks(const uint8_t* first_row, int rows, int64_t blocks, uint8_t* out) {
  using L = Layout<Format::int4m>;
  constexpr int64_t bytes = sizeof(uint32_t) * kSuperWords;
  SuperBlocks x;
  Vec largest = vset(0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    load_super(first_row + b * bytes, rows, blocks * bytes, x);
    f16 d[kPanelRows], minus_dmin[kPanelRows];
    for (int row = 0; row < kPanelRows; ++row) {
      d[row].bits = static_cast<uint16_t>(x.head[0][row]);
      minus_dmin[row].bits = static_cast<uint16_t>((x.head[0][row] >> 16) ^ 0x8000u);
    }
    uint32_t factors[4][kPanelRows];
    sort_factors(x.head, factors);
    for (int i = 0; i < kSuperGroups; ++i) {
      const int64_t g = b * kSuperGroups + i;
      const int word = i / 4, shift = i % 4 * 8;
      uint8_t* halves = out + L::scales(g);
      largest = vmax(put_scales(factors[word], shift, vload(d), rows, halves), largest);
      largest =
          vmax(put_scales(factors[2 + word], shift, vload(minus_dmin), rows, halves + 32), largest);
      // Eight words hold one group in their low and the next in their high nibbles.
      put_lines(x.codes + i / 2 * 8, i % 2 * 4, out + L::codes(g));
    }
  }
  return vlargest(largest);
}

constexpr Format format_of(GgmlType type) {
  return type == GgmlType::q4_0   ? Format::int4
         : type == GgmlType::q8_0 ? Format::int8
                                  : Format::int4m;
}

constexpr int64_t row_bytes(GgmlType type, int64_t groups) {
  return type == GgmlType::q4_0   ? groups * 18
         : type == GgmlType::q4_1 ? groups * 20
         : type == GgmlType::q8_0 ? groups * 34
                                  : groups / kSuperGroups * 144;
}

uint32_t repack_panel(const RepackJob& job, int64_t panel) {
  const int64_t size = panel_bytes(format_of(job.type), job.groups * kGroup);
  const int64_t first = panel * kPanelRows, left = job.rows - first;
  const int rows = left < kPanelRows ? static_cast<int>(left) : kPanelRows;
  const uint8_t* blocks = job.blocks + first * row_bytes(job.type, job.groups);
  uint8_t* out = job.panels + panel * size;
  // An odd last group and rows beyond the matrix leave bytes that nobody writes.
  if (rows < kPanelRows || job.groups % 2) memset(out, 0, size);
  switch (job.type) {
    case GgmlType::q4_0:
      put_blocks<Format::int4, 1, 18>(blocks, rows, job.groups, out);
      return kPacked;
    case GgmlType::q4_1:
      put_blocks<Format::int4m, 2, 20>(blocks, rows, job.groups, out);
      return kPacked;
    case GgmlType::q8_0:
      put_blocks<Format::int8, 1, 34>(blocks, rows, job.groups, out);
      return kPacked;
    default:
      const float largest = put_super_blocks(blocks, rows, job.groups / kSuperGroups, out);
      return largest < kHalfOverflow ? kPacked : kTooLarge;
  }
}

}  // namespace

uint32_t repack_panels(const RepackJob& job, int64_t first_panel, int64_t last_panel) {
  uint32_t status = kPacked;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) status |= repack_panel(job, panel);
  return status;
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

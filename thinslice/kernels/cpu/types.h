// What the kernels pass to each other: packed formats, quantised rows, jobs, the table of one
// instruction set. Plain structs only: this header is compiled for every instruction set.
#pragma once

#include <stdint.h>

// Before a loop over an array that must stay in registers.
#if defined(__clang__)
#define THINSLICE_UNROLL _Pragma("unroll")
#else
#define THINSLICE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace thinslice {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

// Of a KV cache, and of numbers that are converted; activations are fp32.
enum class Dtype : int { f32 = 0, bf16 = 1, int8 = 2, f16 = 3 };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::f32 ? 4 : dtype == Dtype::int8 ? 1 : 2;
}

// int4: code - 8 times a scale. int4m: code times a scale plus a minimum. int8: code - 128 times a
// scale. Codes are unsigned in memory because vpdpbusd multiplies unsigned by signed. bf16 and f32
// are no codes but rows of numbers, one row after the other.
enum class Format : int { int4 = 0, int4m = 1, int8 = 2, bf16 = 3, f32 = 4 };

constexpr bool is_numbers(Format format) { return format >= Format::bf16; }

constexpr int kPanelRows = 16;   // output rows in a panel: the lanes of a 512-bit register
constexpr int kGroup = 32;       // inputs that share a scale
constexpr int kBlockRows = 16;   // activation rows in a row block: the rows of an AMX tile
constexpr int kMaxTargets = 4;   // matrices that share one quantised activation
constexpr int kAttentionTokens = 32;  // query tokens of a sequence that attend together

// A group is 64-byte lines of codes; line i holds inputs 4i..4i+3 (int8), or 8i..8i+3 in the low
// and 8i+4..8i+7 in the high nibbles, of the 16 rows. Two groups share a line of fp16 scales; int4m
// has one line of scales and minimums per group. So no load crosses a cache line.
template <Format F>
struct Layout;
template <>
struct Layout<Format::int4> {
  static constexpr int lines = 4;
  static constexpr int64_t codes(int64_t g) { return (g >> 1) * 576 + (g & 1) * 256; }
  static constexpr int64_t scales(int64_t g) { return (g >> 1) * 576 + 512 + (g & 1) * 32; }
  static constexpr int64_t panel_bytes(int64_t groups) { return (groups + 1) / 2 * 576; }
};
template <>
struct Layout<Format::int4m> {
  static constexpr int lines = 4;
  static constexpr int64_t codes(int64_t g) { return g * 320; }
  static constexpr int64_t scales(int64_t g) { return g * 320 + 256; }
  static constexpr int64_t panel_bytes(int64_t groups) { return groups * 320; }
};
template <>
struct Layout<Format::int8> {
  static constexpr int lines = 8;
  static constexpr int64_t codes(int64_t g) { return (g >> 1) * 1088 + (g & 1) * 512; }
  static constexpr int64_t scales(int64_t g) { return (g >> 1) * 1088 + 1024 + (g & 1) * 32; }
  static constexpr int64_t panel_bytes(int64_t groups) { return (groups + 1) / 2 * 1088; }
};

constexpr int64_t panel_bytes(Format format, int64_t in_features) {
  const int64_t groups = in_features / kGroup;
  switch (format) {
    case Format::int4:
      return Layout<Format::int4>::panel_bytes(groups);
    case Format::int4m:
      return Layout<Format::int4m>::panel_bytes(groups);
    case Format::int8:
      return Layout<Format::int8>::panel_bytes(groups);
    case Format::bf16:
      return kPanelRows * in_features * 2;
    default:
      return kPanelRows * in_features * 4;
  }
}

// How finely a product takes its activations: as 8 or as 16 bits. Indices of the arrays below.
enum Width : int { kNarrow = 0, kWide = 1 };

// Activations as integers with one fp32 scale per group, in blocks of up to 16 rows; inside a block
// group-major ([group][row][32]), so that an AMX tile is one contiguous piece and the 16 rows do
// not fall into the same cache sets. The last block is padded with zero rows up to `block_height`.
//
// A wide code is 256 * high + low, in units of kWideUnit * scale; the high plane alone is the
// narrow code, in units of the scale. low is never -128, so that AVX2 may negate it.
struct QuantizedRows {
  int64_t rows;
  int64_t groups;
  int8_t* high;
  int8_t* low;  // null where no product of the call is wide, and so is what belongs to wide codes
  float* scales;
  // By Width. Minus the sum of the codes: times the zero point it corrects the dot.
  int32_t* negated_sums[2];
  // By Width. The sum of the codes in their unit: what a minimum is multiplied with.
  float* scaled_sums[2];
};

constexpr int kNumbers = 32;  // inputs that are summed together where weights are numbers

// Activations for weights that are numbers: fp32, each row filled up with zeros to kNumbers; for
// bf16 the numbers at even places of each 32 stand before those at odd ones.
struct Numbers {
  int64_t rows;
  int64_t in_features;
  int64_t stride;
  float* data;
};

constexpr float kWideUnit = 0x1p-8f;

// Heights the kernels are compiled for.
constexpr int block_height(int64_t rows_left) {
  return rows_left <= 4 ? static_cast<int>(rows_left) : rows_left <= 8 ? 8 : kBlockRows;
}

constexpr int64_t padded_rows(int64_t rows) {
  const int64_t tail = rows % kBlockRows;
  return rows - tail + (tail ? block_height(tail) : 0);
}

// `count` rows from `first` on, a multiple of the block height.
template <Width W>
constexpr QuantizedRows rows_of(const QuantizedRows& x, int64_t first, int64_t count) {
  const int64_t at = first * x.groups;
  QuantizedRows part = x;
  part.rows = count;
  part.high += at * kGroup;
  part.scales += at;
  part.negated_sums[kNarrow] += at;
  part.scaled_sums[kNarrow] += at;
  if constexpr (W == kWide) {
    part.low += at * kGroup;
    part.negated_sums[kWide] += at;
    part.scaled_sums[kWide] += at;
  }
  return part;
}

// One row block of a QuantizedRows, its sums those of one width.
struct RowBlock {
  const int8_t* high;
  const int8_t* low;
  const float* scales;
  const int32_t* negated_sums;
  const float* scaled_sums;
  int height;
};

template <Width W>
constexpr RowBlock row_block(const QuantizedRows& x, int64_t block) {
  const int64_t first = block * kBlockRows;
  const QuantizedRows part = rows_of<W>(x, first, x.rows - first);
  return {part.high,          part.low, part.scales, part.negated_sums[W], part.scaled_sums[W],
          block_height(part.rows)};
}

// Where 16 columns of results go: out = acc (+ bias) (+ residual), or silu(acc) * acc_up.
struct Epilogue {
  const float* bias;
  const float* residual;
  int64_t residual_stride;
  float* out;
  int64_t out_stride;
};

struct AttentionJob {
  const float* q;          // [T, N, H]
  float* out;              // [T, N, H]
  int64_t q_stride;        // elements from one token to the next
  int64_t out_stride;
  const void* k_cache;     // [num_blocks, K, block_size, H]
  const void* v_cache;
  const uint16_t* k_scale;  // [num_blocks, K, block_size] fp16, int8 caches only
  const uint16_t* v_scale;
  Dtype cache_dtype;
  const int32_t* block_tables;  // [B, max_blocks]
  int64_t max_blocks;
  const int32_t* query_starts;  // [B + 1]
  const int32_t* context_lens;  // [B], positions in the cache including the new tokens
  int64_t num_sequences;
  int64_t num_tokens;  // T
  int64_t num_blocks;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;
  int64_t window;  // positions a token sees, itself included; 0 for all
  float scale;
};

struct WriteKvJob {
  const float* k;  // [T, K, H]
  const float* v;
  int64_t k_stride;
  int64_t v_stride;
  void* k_cache;
  void* v_cache;
  uint16_t* k_scale;
  uint16_t* v_scale;
  Dtype cache_dtype;
  const int64_t* slots;  // [T], block * block_size + offset
  int64_t num_tokens;
  int64_t num_blocks;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;
};

struct RmsNormJob {
  const float* x;  // [T, D]
  const float* weight;
  float* out;
  int64_t x_stride;
  int64_t out_stride;
  int64_t dim;
  float eps;
};

struct RopeJob {
  float* x;  // [T, N, H]
  int64_t token_stride;
  int64_t num_heads;
  int64_t head_dim;
  int64_t rotary_dim;
  const int64_t* positions;
  int64_t num_tokens;
  int64_t num_positions;
  const float* cos;  // [num_positions, rotary_dim / 2]
  const float* sin;
};

struct SiluMulJob {
  const float* gate;
  const float* up;
  float* out;
  int64_t gate_stride;
  int64_t up_stride;
  int64_t out_stride;
  int64_t dim;
};

// What keeps numbers from being packed, as bits: several may be found.
enum PackStatus : uint32_t {
  kPacked = 0,
  kNotFinite = 1,  // a weight is an infinity or a NaN
  kTooLarge = 2,   // a scale or a minimum is beyond fp16
};

struct QuantizeJob {
  const void* x;  // [rows, groups * 32]; need not be aligned
  Dtype dtype;
  int64_t stride;  // elements from one row to the next
  int64_t rows;
  int64_t groups;
  Format format;
  uint8_t* panels;
};

enum class GgmlType : int { q4_0 = 0, q4_1 = 1, q8_0 = 2, q4_k = 3 };

struct RepackJob {
  const uint8_t* blocks;  // rows of blocks of 32 (q4_k: 256) weights
  GgmlType type;
  int64_t rows;
  int64_t groups;
  uint8_t* panels;
};

// The kernels of one instruction set. Row and item ranges are half open.
struct KernelTable {
  const char* name;
  void (*quantize_rows)(const float* x, int64_t stride, const QuantizedRows& out,
                        int64_t first_block, int64_t last_block);
  // acc[padded_rows(x.rows)][16] = rows of x times the 16 rows of one panel.
  void (*panel_times_rows)(const uint8_t* panel, Format format, Width width,
                           const QuantizedRows& x, float* acc);
  void (*arrange_numbers)(const float* x, int64_t stride, bool is_paired, const Numbers& out,
                          int64_t first_row, int64_t last_row);
  // acc[x.rows][16] = rows of x times the first rows of one panel.
  void (*numbers_times_rows)(const void* panel, Format format, int num_columns, const Numbers& x,
                             float* acc);
  void (*enter)();  // once per run of panels on a thread, before and after
  void (*leave)();
  void (*store)(const Epilogue& epilogue, const float* acc, int64_t first_row, int64_t rows,
                int64_t column, int columns);
  void (*store_swiglu)(const Epilogue& epilogue, const float* gate, const float* up,
                       int64_t first_row, int64_t rows, int64_t column, int columns);
  uint32_t (*read_bytes)(const uint8_t* data, int64_t num_bytes);
  void (*rms_norm)(const RmsNormJob& job, int64_t first_row, int64_t last_row);
  void (*rope)(const RopeJob& job, int64_t first_row, int64_t last_row);
  void (*silu_mul)(const SiluMulJob& job, int64_t first_row, int64_t last_row);
  void (*write_kv)(const WriteKvJob& job, int64_t first_row, int64_t last_row);
  int64_t (*attention_scratch_floats)(const AttentionJob& job);
  void (*attention)(const AttentionJob& job, int64_t sequence, int64_t first_row, int64_t last_row,
                    int64_t kv_head, float* scratch);
  // Both fill whole panels: rows beyond the matrix and an odd last group are zero. They return the
  // bits of PackStatus; unless it is kPacked, what the panels hold means nothing.
  uint32_t (*quantize_panels)(const QuantizeJob& job, int64_t first_panel, int64_t last_panel);
  uint32_t (*repack_panels)(const RepackJob& job, int64_t first_panel, int64_t last_panel);
  // Numbers of f32, bf16 or f16 to another of them, nearest or even; `from` need not be aligned.
  void (*convert)(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t count);
};

}  // namespace thinslice

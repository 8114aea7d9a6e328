// One panel times rows in plain C++: what the other instruction sets must equal bit for bit.
#include "simd.h"
#include "vector_kernels.h"

namespace thinslice {
namespace portable {

namespace {

template <Format F>
SIMD_INLINE int code_at(const uint8_t* codes, int row, int input) {
  if constexpr (F == Format::int8) {
    return codes[input / 4 * 64 + row * 4 + input % 4] - 128;
  } else {
    const uint8_t both = codes[input / 8 * 64 + row * 4 + input % 4];
    const int code = input % 8 < 4 ? both & 15 : both >> 4;
    return F == Format::int4 ? code - 8 : code;
  }
}

SIMD_INLINE float half_at(const uint8_t* halves, int row) {
  uint16_t half;
  memcpy(&half, halves + 2 * row, 2);
  return half_to_float(half);
}

template <Width W>
SIMD_INLINE int code_of(const RowBlock& block, int64_t at) {
  return W == kWide ? 256 * block.high[at] + block.low[at] : block.high[at];
}

template <Format F, Width W>
void multiply_all(const uint8_t* panel, const QuantizedRows& x, float* acc) {
  using L = Layout<F>;
  for (int64_t i = 0; i < padded_rows(x.rows) * kPanelRows; ++i) acc[i] = 0.0f;
  for (int64_t g = 0; g < x.groups; ++g) {
    const uint8_t* scales = panel + L::scales(g);
    for (int n = 0; n < kPanelRows; ++n) {
      int8_t codes[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        codes[i] = static_cast<int8_t>(code_at<F>(panel + L::codes(g), n, i));
      }
      const float unit = W == kWide ? kWideUnit : 1.0f;
      const float weight_scale = half_at(scales, n) * unit;
      for (int64_t row = 0; row < x.rows; ++row) {
        const RowBlock block = row_block<W>(x, row / kBlockRows);
        const int64_t at = g * block.height + row % kBlockRows;
        int32_t sum = 0;
        for (int i = 0; i < kGroup; ++i) sum += codes[i] * code_of<W>(block, at * kGroup + i);
        float* out = acc + row * kPanelRows + n;
        *out = __builtin_fmaf(static_cast<float>(sum), weight_scale * block.scales[at], *out);
        if constexpr (F == Format::int4m) {
          *out = __builtin_fmaf(half_at(scales + 32, n), block.scaled_sums[at], *out);
        }
      }
    }
  }
}

template <Width W>
void multiply_format(const uint8_t* panel, Format format, const QuantizedRows& x, float* acc) {
  switch (format) {
    case Format::int4:
      return multiply_all<Format::int4, W>(panel, x, acc);
    case Format::int4m:
      return multiply_all<Format::int4m, W>(panel, x, acc);
    case Format::int8:
      return multiply_all<Format::int8, W>(panel, x, acc);
  }
}

}  // namespace

void panel_times_rows(const uint8_t* panel, Format format, Width width, const QuantizedRows& x,
                      float* acc) {
  if (width == kWide) return multiply_format<kWide>(panel, format, x, acc);
  multiply_format<kNarrow>(panel, format, x, acc);
}

uint32_t read_bytes(const uint8_t* data, int64_t num_bytes) {
  uint64_t sum = 0;
  for (int64_t at = 0; at + 8 <= num_bytes; at += 8) {
    uint64_t word;
    memcpy(&word, data + at, 8);
    sum ^= word;
  }
  return static_cast<uint32_t>(sum ^ (sum >> 32));
}

}  // namespace portable
}  // namespace thinslice

// Activations to integers of 16 bits: per row and group of 32 inputs, codes = x * (32512 / amax)
// rounded to nearest even, 32512 being 127 * 256. Their upper bytes, rounded, are activations of 8
// bits with scale = amax / 127, as llama.cpp's q8 are.
#include "vector_kernels.h"

#include "simd.h"

namespace thinslice {
namespace THINSLICE_ISA {

namespace {

// Below this the reciprocal would overflow; such a group counts as zero.
constexpr float kSmallestAmax = 0x1p-100f;

struct GroupResult {
  float scale;
  int32_t high_sum;
  int32_t low_sum;
};

SIMD_INLINE void clear(int8_t* high, int8_t* low) {
  memset(high, 0, kGroup);
  if (low) memset(low, 0, kGroup);
}

// A group with an infinity or a NaN gets a scale of infinity or NaN and zero codes: the row's
// result is NaN, never a plausible number. `low` is null where no product is wide.
SIMD_INLINE GroupResult quantize_group(const float* x, int8_t* high, int8_t* low) {
  const Vec a = vload(x), b = vload(x + 16);
  const float amax = float_of(largest_magnitude(a, b));
  const bool is_finite = bits_of(amax) < 0x7f800000u;
  if (!is_finite || amax < kSmallestAmax) {
    clear(high, low);
    return {is_finite ? 0.0f : amax, 0, 0};
  }
  const Vec inverse = vset(32512.0f / amax);
  const Vec first = vmul(a, inverse), second = vmul(b, inverse);
  const int32_t high_sum = store_high(high, first, second);
  return {amax / 127.0f, high_sum, low ? store_low(low, first, second) : 0};
}

void quantize_block(const float* x, int64_t stride, const QuantizedRows& out, int64_t block) {
  const int64_t first = block * kBlockRows;
  const int height = block_height(out.rows - first);
  const int rows = out.rows - first < height ? static_cast<int>(out.rows - first) : height;
  for (int64_t g = 0; g < out.groups; ++g) {
    const int64_t at = first * out.groups + g * height;
    for (int r = 0; r < height; ++r) {
      int8_t* high = out.high + (at + r) * kGroup;
      int8_t* low = out.low ? out.low + (at + r) * kGroup : nullptr;
      GroupResult result = {0.0f, 0, 0};
      if (r < rows) {
        result = quantize_group(x + (first + r) * stride + g * kGroup, high, low);
      } else {
        clear(high, low);
      }
      out.scales[at + r] = result.scale;
      out.negated_sums[kNarrow][at + r] = -result.high_sum;
      out.scaled_sums[kNarrow][at + r] = result.scale * static_cast<float>(result.high_sum);
      if (low) {
        const int32_t sum = 256 * result.high_sum + result.low_sum;
        out.negated_sums[kWide][at + r] = -sum;
        out.scaled_sums[kWide][at + r] = result.scale * kWideUnit * static_cast<float>(sum);
      }
    }
  }
}

}  // namespace

void quantize_rows(const float* x, int64_t stride, const QuantizedRows& out, int64_t first_block,
                   int64_t last_block) {
  for (int64_t block = first_block; block < last_block; ++block) {
    quantize_block(x, stride, out, block);
  }
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

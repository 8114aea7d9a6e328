// Activations to int8: per row and group of 32 inputs, scale = amax / 127 and codes = x * (127 /
// amax) rounded to nearest even, as llama.cpp's q8 activations are.
#include "vector_kernels.h"

#include "simd.h"

namespace thinslice {
namespace THINSLICE_ISA {

namespace {

// Below this the reciprocal would overflow; such a group counts as zero.
constexpr float kSmallestAmax = 0x1p-100f;

struct GroupResult {
  float scale;
  int32_t sum;
};

// A group with an infinity or a NaN gets a scale of infinity or NaN and zero codes: the row's
// result is NaN, never a plausible number.
template <typename T>
SIMD_INLINE GroupResult quantize_group(const T* x, int8_t* codes) {
  const Vec a = vload(x), b = vload(x + 16);
  const float amax = float_of(largest_magnitude(a, b));
  const bool is_finite = bits_of(amax) < 0x7f800000u;
  if (!is_finite || amax < kSmallestAmax) {
    memset(codes, 0, kGroup);
    return {is_finite ? 0.0f : amax, 0};
  }
  const Vec inverse = vset(127.0f / amax);
  const int32_t sum = store_int8(codes, vmul(a, inverse), vmul(b, inverse));
  return {amax / 127.0f, sum};
}

template <typename T>
void quantize_block(const T* x, int64_t stride, const QuantizedRows& out, int64_t block) {
  const int64_t first = block * kBlockRows;
  const int height = block_height(out.rows - first);
  const int rows = out.rows - first < height ? static_cast<int>(out.rows - first) : height;
  for (int64_t g = 0; g < out.groups; ++g) {
    const int64_t at = first * out.groups + g * height;
    for (int r = 0; r < height; ++r) {
      int8_t* codes = out.codes + (at + r) * kGroup;
      GroupResult result = {0.0f, 0};
      if (r < rows) {
        result = quantize_group(x + (first + r) * stride + g * kGroup, codes);
      } else {
        memset(codes, 0, kGroup);
      }
      out.scales[at + r] = result.scale;
      out.negated_sums[at + r] = -result.sum;
      out.scaled_sums[at + r] = result.scale * static_cast<float>(result.sum);
    }
  }
}

}  // namespace

void quantize_rows(const void* x, Dtype dtype, int64_t stride, const QuantizedRows& out,
                   int64_t first_block, int64_t last_block) {
  for (int64_t block = first_block; block < last_block; ++block) {
    if (dtype == Dtype::f32) {
      quantize_block(static_cast<const float*>(x), stride, out, block);
    } else {
      quantize_block(static_cast<const bf16*>(x), stride, out, block);
    }
  }
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

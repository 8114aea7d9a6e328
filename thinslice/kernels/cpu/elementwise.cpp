// Results of a panel to their place, RMSNorm, RoPE, SwiGLU: one pass over memory each.
#include "vector_kernels.h"

#include "simd.h"

namespace thinslice {
namespace THINSLICE_ISA {

namespace {

// Sum of squares: vector i is added to partial sum i % 4, the four are added pairwise, then the
// lanes. The order depends on the length only.
SIMD_INLINE float sum_of_squares(const float* x, int64_t dim) {
  Vec sums[4] = {vset(0.0f), vset(0.0f), vset(0.0f), vset(0.0f)};
  for (int64_t at = 0, i = 0; at < dim; at += 16, ++i) {
    const Vec v = vload_some(x + at, static_cast<int>(dim - at < 16 ? dim - at : 16));
    sums[i & 3] = vfma(v, v, sums[i & 3]);
  }
  return vsum(vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3])));
}

SIMD_INLINE void rms_norm_row(const RmsNormJob& job, int64_t row) {
  const float* x = job.x + row * job.x_stride;
  float* out = job.out + row * job.out_stride;
  const float mean = sum_of_squares(x, job.dim) / static_cast<float>(job.dim);
  const Vec factor = vset(1.0f / __builtin_sqrtf(mean + job.eps));
  for (int64_t at = 0; at < job.dim; at += 16) {
    const int n = static_cast<int>(job.dim - at < 16 ? job.dim - at : 16);
    const Vec y = vmul(vmul(vload_some(x + at, n), factor), vload_some(job.weight + at, n));
    vstore_some(out + at, y, n);
  }
}

SIMD_INLINE void rope_row(const RopeJob& job, int64_t row) {
  const int64_t half = job.rotary_dim / 2;
  const float* cos = job.cos + job.positions[row] * half;
  const float* sin = job.sin + job.positions[row] * half;
  for (int64_t head = 0; head < job.num_heads; ++head) {
    float* x = job.x + row * job.token_stride + head * job.head_dim;
    for (int64_t at = 0; at < half; at += 16) {
      const int n = static_cast<int>(half - at < 16 ? half - at : 16);
      const Vec first = vload_some(x + at, n), second = vload_some(x + half + at, n);
      const Vec c = vload_some(cos + at, n), s = vload_some(sin + at, n);
      vstore_some(x + at, vfnma(second, s, vmul(first, c)), n);
      vstore_some(x + half + at, vfma(first, s, vmul(second, c)), n);
    }
  }
}

SIMD_INLINE void silu_mul_row(const SiluMulJob& job, int64_t row) {
  const float* gate = job.gate + row * job.gate_stride;
  const float* up = job.up + row * job.up_stride;
  float* out = job.out + row * job.out_stride;
  for (int64_t at = 0; at < job.dim; at += 16) {
    const int n = static_cast<int>(job.dim - at < 16 ? job.dim - at : 16);
    const Vec y = vmul(vsilu(vload_some(gate + at, n)), vload_some(up + at, n));
    vstore_some(out + at, y, n);
  }
}

}  // namespace

void store(const Epilogue& e, const float* acc, int64_t first_row, int64_t rows, int64_t column,
           int columns) {
  const Vec bias = e.bias ? vload_some(e.bias + column, columns) : vset(0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first_row + r;
    Vec y = vload(acc + r * kPanelRows);
    if (e.bias) y = vadd(y, bias);
    if (e.residual) {
      y = vadd(y, vload_some(e.residual + row * e.residual_stride + column, columns));
    }
    vstore_some(e.out + row * e.out_stride + column, y, columns);
  }
}

void store_swiglu(const Epilogue& e, const float* gate, const float* up, int64_t first_row,
                  int64_t rows, int64_t column, int columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const Vec y = vmul(vsilu(vload(gate + r * kPanelRows)), vload(up + r * kPanelRows));
    vstore_some(e.out + (first_row + r) * e.out_stride + column, y, columns);
  }
}

void rms_norm(const RmsNormJob& job, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) rms_norm_row(job, row);
}

void rope(const RopeJob& job, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) rope_row(job, row);
}

void silu_mul(const SiluMulJob& job, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) silu_mul_row(job, row);
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

// Sixteen lanes in plain C++. Included by simd.h only.
#pragma once

namespace thinslice {
namespace THINSLICE_ISA {

struct Vec {
  float v[16];
};

#define THINSLICE_EACH(expression)                    \
  Vec r;                                              \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r
SIMD_INLINE Vec vset(float x) { THINSLICE_EACH(x); }
// Copied first: what is loaded may lie at any address.
SIMD_INLINE Vec vload(const float* p) {
  Vec r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
SIMD_INLINE Vec vload(const bf16* p) {
  bf16 lanes[16];
  memcpy(lanes, p, sizeof lanes);
  THINSLICE_EACH(to_float(lanes[i]));
}
SIMD_INLINE Vec vload(const f16* p) {
  f16 lanes[16];
  memcpy(lanes, p, sizeof lanes);
  THINSLICE_EACH(to_float(lanes[i]));
}
SIMD_INLINE Vec vload(const int8_t* p) { THINSLICE_EACH(static_cast<float>(p[i])); }
SIMD_INLINE Vec vload_low_bf16(const uint32_t* p) { THINSLICE_EACH(float_of(p[i] << 16)); }
SIMD_INLINE Vec vload_high_bf16(const uint32_t* p) { THINSLICE_EACH(float_of(p[i] & 0xffff0000u)); }
SIMD_INLINE void vstore(float* p, Vec a) { memcpy(p, a.v, sizeof a.v); }
SIMD_INLINE void vstore(bf16* p, Vec a) {
  for (int i = 0; i < 16; ++i) p[i] = to_bf16(a.v[i]);
}
SIMD_INLINE void vstore(f16* p, Vec a) {
  for (int i = 0; i < 16; ++i) p[i] = to_f16(a.v[i]);
}
SIMD_INLINE Vec vadd(Vec a, Vec b) { THINSLICE_EACH(a.v[i] + b.v[i]); }
SIMD_INLINE Vec vsub(Vec a, Vec b) { THINSLICE_EACH(a.v[i] - b.v[i]); }
SIMD_INLINE Vec vmul(Vec a, Vec b) { THINSLICE_EACH(a.v[i] * b.v[i]); }
SIMD_INLINE Vec vdiv(Vec a, Vec b) { THINSLICE_EACH(a.v[i] / b.v[i]); }
SIMD_INLINE Vec vfma(Vec a, Vec b, Vec c) {
  THINSLICE_EACH(__builtin_fmaf(a.v[i], b.v[i], c.v[i]));
}
SIMD_INLINE Vec vfnma(Vec a, Vec b, Vec c) {
  THINSLICE_EACH(__builtin_fmaf(-a.v[i], b.v[i], c.v[i]));
}
SIMD_INLINE Vec vmax(Vec a, Vec b) { THINSLICE_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
SIMD_INLINE Vec vmin(Vec a, Vec b) { THINSLICE_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
SIMD_INLINE Vec vsqrt(Vec a) { THINSLICE_EACH(__builtin_sqrtf(a.v[i])); }
SIMD_INLINE Vec vselect_above(Vec a, Vec b, Vec x, Vec y) {
  THINSLICE_EACH(a.v[i] > b.v[i] ? x.v[i] : y.v[i]);
}
SIMD_INLINE Vec vround(Vec a) { THINSLICE_EACH(__builtin_nearbyintf(a.v[i])); }
SIMD_INLINE Vec vpow2(Vec n) {
  THINSLICE_EACH(float_of(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23));
}
SIMD_INLINE Vec vzero_below(Vec x, Vec bound, Vec a) {
  THINSLICE_EACH(x.v[i] < bound.v[i] ? 0.0f : a.v[i]);
}
SIMD_INLINE Vec vkeep(Vec a, int first, int last, Vec other) {
  THINSLICE_EACH(i >= first && i < last ? a.v[i] : other.v[i]);
}
#undef THINSLICE_EACH
SIMD_INLINE float vsum(Vec a) {
  for (int step = 8; step; step >>= 1) {
    for (int i = 0; i < step; ++i) a.v[i] = a.v[i] + a.v[i + step];
  }
  return a.v[0];
}
SIMD_INLINE float vlargest(Vec a) {
  float largest = a.v[0];
  for (int i = 1; i < 16; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
  return largest;
}
SIMD_INLINE uint32_t largest_magnitude(Vec a, Vec b) {
  uint32_t largest = 0;
  for (int i = 0; i < 16; ++i) {
    const uint32_t x = bits_of(a.v[i]) & 0x7fffffffu, y = bits_of(b.v[i]) & 0x7fffffffu;
    largest = x > largest ? x : largest;
    largest = y > largest ? y : largest;
  }
  return largest;
}
SIMD_INLINE void vstore(int8_t* p, Vec a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(__builtin_nearbyintf(a.v[i]));
}
SIMD_INLINE int high_of(int code) { return (code + 128) >> 8; }
SIMD_INLINE int low_of(int code) {
  const int low = code - 256 * high_of(code);
  return low < -127 ? -127 : low;
}
SIMD_INLINE int code_in(const Vec& a, const Vec& b, int i) {
  return static_cast<int>(__builtin_nearbyintf(i < 16 ? a.v[i] : b.v[i - 16]));
}
SIMD_INLINE int32_t store_high(int8_t* p, Vec a, Vec b) {
  int32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += p[i] = static_cast<int8_t>(high_of(code_in(a, b, i)));
  return sum;
}
SIMD_INLINE int32_t store_low(int8_t* p, Vec a, Vec b) {
  int32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += p[i] = static_cast<int8_t>(low_of(code_in(a, b, i)));
  return sum;
}
SIMD_INLINE void transpose16(const uint32_t* const rows[16], uint32_t* out, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) out[j * stride + i] = rows[i][j];
  }
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

// Sixteen lanes in one 512-bit register. Included by simd.h only.
#pragma once

namespace thinslice {
namespace THINSLICE_ISA {

struct Vec {
  __m512 v;
};

SIMD_INLINE Vec vset(float x) { return {_mm512_set1_ps(x)}; }
SIMD_INLINE Vec vload(const float* p) { return {_mm512_loadu_ps(p)}; }
SIMD_INLINE Vec vload(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
SIMD_INLINE Vec vload(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
SIMD_INLINE Vec vload(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
// Lane i from the low or the high bf16 of dword i.
SIMD_INLINE Vec vload_low_bf16(const uint32_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
SIMD_INLINE Vec vload_high_bf16(const uint32_t* p) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), mask))};
}
SIMD_INLINE void vstore(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
SIMD_INLINE void vstore(bf16* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan,
                                             _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
SIMD_INLINE void vstore(f16* p, Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, mode));
}
SIMD_INLINE Vec vadd(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
SIMD_INLINE Vec vsub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
SIMD_INLINE Vec vmul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
SIMD_INLINE Vec vdiv(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
SIMD_INLINE Vec vfma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SIMD_INLINE Vec vfnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// a > b ? a : b and a < b ? a : b; a NaN in b stays.
SIMD_INLINE Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
SIMD_INLINE Vec vmin(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
SIMD_INLINE Vec vsqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// a > b ? x : y.
SIMD_INLINE Vec vselect_above(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), x.v)};
}
SIMD_INLINE Vec vround(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2 to the power of an integer-valued lane in -126..127.
SIMD_INLINE Vec vpow2(Vec n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}
// Lanes of a where x < bound are zero.
SIMD_INLINE Vec vzero_below(Vec x, Vec bound, Vec a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLT_UQ), a.v)};
}
// Lanes outside first..last-1 become `other`.
SIMD_INLINE uint32_t lanes_below(int end) {
  return end <= 0 ? 0u : end >= 16 ? 0xffffu : (1u << end) - 1;
}
SIMD_INLINE Vec vkeep(Vec a, int first, int last, Vec other) {
  const uint32_t kept = lanes_below(last) & ~lanes_below(first);
  return {_mm512_mask_mov_ps(other.v, static_cast<__mmask16>(kept), a.v)};
}
// Lanes i and i+8, then i+4, i+2, i+1.
SIMD_INLINE float vsum(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
SIMD_INLINE float vlargest(Vec a) { return _mm512_reduce_max_ps(a.v); }
// Bits of the largest magnitude; as integers, so that a NaN is larger than anything.
SIMD_INLINE uint32_t largest_magnitude(Vec a, Vec b) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  const __m512i x = _mm512_and_si512(_mm512_castps_si512(a.v), mask);
  const __m512i y = _mm512_and_si512(_mm512_castps_si512(b.v), mask);
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(x, y)));
}
// Rounds to nearest even and stores 16 int8.
SIMD_INLINE void vstore(int8_t* p, Vec a) {
  const __m512i codes = _mm512_cvtps_epi32(a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(codes));
}
// Lanes of -32512..32512, rounded to nearest even, as 256 * high + low; low is never -128, but one
// more. Each stores 32 int8 and returns their sum.
SIMD_INLINE __m512i high_of(__m512i codes) {
  return _mm512_srai_epi32(_mm512_add_epi32(codes, _mm512_set1_epi32(128)), 8);
}
SIMD_INLINE __m512i low_of(__m512i codes) {
  const __m512i low = _mm512_sub_epi32(codes, _mm512_slli_epi32(high_of(codes), 8));
  return _mm512_max_epi32(low, _mm512_set1_epi32(-127));
}
SIMD_INLINE int32_t store_bytes(int8_t* p, __m512i a, __m512i b) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm512_cvtepi32_epi8(b));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
}
SIMD_INLINE int32_t store_high(int8_t* p, Vec a, Vec b) {
  return store_bytes(p, high_of(_mm512_cvtps_epi32(a.v)), high_of(_mm512_cvtps_epi32(b.v)));
}
SIMD_INLINE int32_t store_low(int8_t* p, Vec a, Vec b) {
  return store_bytes(p, low_of(_mm512_cvtps_epi32(a.v)), low_of(_mm512_cvtps_epi32(b.v)));
}
// out[j][i] = rows[i][j] for 16 rows of 16 dwords; out rows are `stride` dwords apart.
SIMD_INLINE void transpose16(const uint32_t* const rows[16], uint32_t* out, int64_t stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    const __m512i x = _mm512_loadu_si512(rows[i]), y = _mm512_loadu_si512(rows[i + 1]);
    a[i] = _mm512_unpacklo_epi32(x, y);
    a[i + 1] = _mm512_unpackhi_epi32(x, y);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i even_low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(out + (i + 4) * stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(out + (i + 12) * stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

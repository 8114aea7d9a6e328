// Sixteen lanes in two 256-bit registers. Included by simd.h only.
#pragma once

namespace thinslice {
namespace THINSLICE_ISA {

struct Vec {
  __m256 lo, hi;
};

SIMD_INLINE Vec vset(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SIMD_INLINE Vec vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SIMD_INLINE __m256 widen_bf16(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
SIMD_INLINE Vec vload(const bf16* p) {
  const __m128i* at = reinterpret_cast<const __m128i*>(p);
  return {widen_bf16(_mm_loadu_si128(at)), widen_bf16(_mm_loadu_si128(at + 1))};
}
SIMD_INLINE Vec vload(const f16* p) {
  const __m128i* at = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
}
SIMD_INLINE Vec vload(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
SIMD_INLINE __m256i load_dwords(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
SIMD_INLINE Vec vload_low_bf16(const uint32_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(load_dwords(p), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(load_dwords(p + 8), 16))};
}
SIMD_INLINE Vec vload_high_bf16(const uint32_t* p) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(load_dwords(p), mask)),
          _mm256_castsi256_ps(_mm256_and_si256(load_dwords(p + 8), mask))};
}
SIMD_INLINE void vstore(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
SIMD_INLINE __m256i round_bf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
}
SIMD_INLINE void vstore(bf16* p, Vec a) {
  const __m256i mixed = _mm256_packus_epi32(round_bf16(a.lo), round_bf16(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}
SIMD_INLINE void vstore(f16* p, Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, mode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, _mm256_cvtps_ph(a.hi, mode));
}
#define THINSLICE_LANEWISE(name, op) \
  SIMD_INLINE Vec name(Vec a, Vec b) { return {op(a.lo, b.lo), op(a.hi, b.hi)}; }
THINSLICE_LANEWISE(vadd, _mm256_add_ps)
THINSLICE_LANEWISE(vsub, _mm256_sub_ps)
THINSLICE_LANEWISE(vmul, _mm256_mul_ps)
THINSLICE_LANEWISE(vdiv, _mm256_div_ps)
THINSLICE_LANEWISE(vmax, _mm256_max_ps)
THINSLICE_LANEWISE(vmin, _mm256_min_ps)
#undef THINSLICE_LANEWISE
SIMD_INLINE Vec vfma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
SIMD_INLINE Vec vfnma(Vec a, Vec b, Vec c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
SIMD_INLINE Vec vsqrt(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
SIMD_INLINE Vec vselect_above(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
SIMD_INLINE Vec vround(Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
SIMD_INLINE __m256 pow2_half(__m256 n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
SIMD_INLINE Vec vpow2(Vec n) { return {pow2_half(n.lo), pow2_half(n.hi)}; }
SIMD_INLINE Vec vzero_below(Vec x, Vec bound, Vec a) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.lo, bound.lo, _CMP_NLT_UQ), a.lo),
          _mm256_and_ps(_mm256_cmp_ps(x.hi, bound.hi, _CMP_NLT_UQ), a.hi)};
}
SIMD_INLINE __m256 keep_half(__m256 a, int first, int last, __m256 other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i below_last = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane);
  const __m256i below_first = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane);
  const __m256i keep = _mm256_andnot_si256(below_first, below_last);
  return _mm256_blendv_ps(other, a, _mm256_castsi256_ps(keep));
}
SIMD_INLINE Vec vkeep(Vec a, int first, int last, Vec other) {
  return {keep_half(a.lo, first, last, other.lo), keep_half(a.hi, first - 8, last - 8, other.hi)};
}
SIMD_INLINE float vsum(Vec a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
SIMD_INLINE float vlargest(Vec a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
SIMD_INLINE int32_t fold_int(__m256i a, bool is_max) {
  const __m128i lo = _mm256_castsi256_si128(a), hi = _mm256_extracti128_si256(a, 1);
  __m128i x = is_max ? _mm_max_epi32(lo, hi) : _mm_add_epi32(lo, hi);
  __m128i y = _mm_shuffle_epi32(x, 0x4e);
  x = is_max ? _mm_max_epi32(x, y) : _mm_add_epi32(x, y);
  y = _mm_shuffle_epi32(x, 0xb1);
  return _mm_cvtsi128_si32(is_max ? _mm_max_epi32(x, y) : _mm_add_epi32(x, y));
}
SIMD_INLINE uint32_t largest_magnitude(Vec a, Vec b) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  const __m256i w = _mm256_and_si256(_mm256_castps_si256(a.lo), mask);
  const __m256i x = _mm256_and_si256(_mm256_castps_si256(a.hi), mask);
  const __m256i y = _mm256_and_si256(_mm256_castps_si256(b.lo), mask);
  const __m256i z = _mm256_and_si256(_mm256_castps_si256(b.hi), mask);
  const __m256i all = _mm256_max_epi32(_mm256_max_epi32(w, x), _mm256_max_epi32(y, z));
  return static_cast<uint32_t>(fold_int(all, true));
}
SIMD_INLINE void store_bytes(int8_t* p, __m256i lo, __m256i hi) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
SIMD_INLINE void vstore(int8_t* p, Vec a) {
  store_bytes(p, _mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
}
SIMD_INLINE __m256i high_of(__m256 a) {
  return _mm256_srai_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(128)), 8);
}
SIMD_INLINE __m256i low_of(__m256 a) {
  const __m256i above = _mm256_slli_epi32(high_of(a), 8);
  const __m256i low = _mm256_sub_epi32(_mm256_cvtps_epi32(a), above);
  return _mm256_max_epi32(low, _mm256_set1_epi32(-127));
}
SIMD_INLINE int32_t store_bytes(int8_t* p, __m256i a, __m256i b, __m256i c, __m256i d) {
  store_bytes(p, a, b);
  store_bytes(p + 16, c, d);
  return fold_int(_mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d)), false);
}
SIMD_INLINE int32_t store_high(int8_t* p, Vec a, Vec b) {
  return store_bytes(p, high_of(a.lo), high_of(a.hi), high_of(b.lo), high_of(b.hi));
}
SIMD_INLINE int32_t store_low(int8_t* p, Vec a, Vec b) {
  return store_bytes(p, low_of(a.lo), low_of(a.hi), low_of(b.lo), low_of(b.hi));
}
SIMD_INLINE void transpose8(const uint32_t* const rows[8], int64_t column, uint32_t* out,
                            int64_t stride) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    const __m256i x = load_dwords(rows[i] + column), y = load_dwords(rows[i + 1] + column);
    a[i] = _mm256_unpacklo_epi32(x, y);
    a[i + 1] = _mm256_unpackhi_epi32(x, y);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * stride),
                        _mm256_permute2x128_si256(b[i], b[i + 4], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (i + 4) * stride),
                        _mm256_permute2x128_si256(b[i], b[i + 4], 0x31));
  }
}
SIMD_INLINE void transpose16(const uint32_t* const rows[16], uint32_t* out, int64_t stride) {
  for (int half = 0; half < 2; ++half) {
    transpose8(rows + 8 * half, 0, out + 8 * half, stride);
    transpose8(rows + 8 * half, 8, out + 8 * half + 8 * stride, stride);
  }
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

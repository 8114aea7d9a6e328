// Sixteen fp32 lanes, the same results on every instruction set: each function is one IEEE operation
// per lane or a sum in one stated order. Included only by sources that are compiled once per
// instruction set; everything lives in that set's namespace.
#pragma once

#include <stdint.h>
#include <string.h>

#include "types.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define THINSLICE_LANES_512
#elif defined(__AVX2__)
#include <immintrin.h>
#define THINSLICE_LANES_256
#endif

#define SIMD_INLINE static inline __attribute__((always_inline, unused))

namespace thinslice {
namespace THINSLICE_ISA {

SIMD_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

SIMD_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

SIMD_INLINE float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
SIMD_INLINE float to_float(float x) { return x; }

// Round to nearest even; any NaN becomes the NaN torch writes.
SIMD_INLINE bf16 to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

SIMD_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31;
  const uint32_t fraction = half & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13));
  if (exponent) return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float small = static_cast<float>(fraction) * 0x1p-24f;
  return float_of(sign | bits_of(small));
}

// Finite, non-negative values up to the largest half; rounds to nearest even.
SIMD_INLINE uint16_t float_to_half(float x) {
  if (x < 0x1p-14f) return static_cast<uint16_t>(bits_of(x + 0.5f) - bits_of(0.5f));
  const uint32_t bits = bits_of(x) - (112u << 23);
  return static_cast<uint16_t>((bits + 0xfffu + ((bits >> 13) & 1)) >> 13);
}

#if defined(THINSLICE_LANES_512)

struct Vec {
  __m512 v;
};

SIMD_INLINE Vec vset(float x) { return {_mm512_set1_ps(x)}; }
SIMD_INLINE Vec vload(const float* p) { return {_mm512_loadu_ps(p)}; }
SIMD_INLINE Vec vload(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
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
SIMD_INLINE Vec vadd(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
SIMD_INLINE Vec vsub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
SIMD_INLINE Vec vmul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
SIMD_INLINE Vec vdiv(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
SIMD_INLINE Vec vfma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SIMD_INLINE Vec vfnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// a > b ? a : b and a < b ? a : b; a NaN in b stays.
SIMD_INLINE Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
SIMD_INLINE Vec vmin(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
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
// Rounds to nearest even, stores 16 int8 and returns their sum.
SIMD_INLINE int32_t store_int8(int8_t* p, Vec a) {
  const __m512i codes = _mm512_cvtps_epi32(a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(codes));
  return _mm512_reduce_add_epi32(codes);
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

#elif defined(THINSLICE_LANES_256)

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
SIMD_INLINE int32_t store_int8(int8_t* p, Vec a) {
  const __m256i lo = _mm256_cvtps_epi32(a.lo), hi = _mm256_cvtps_epi32(a.hi);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  return fold_int(_mm256_add_epi32(lo, hi), false);
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

#else

struct Vec {
  float v[16];
};

#define THINSLICE_EACH(expression)                    \
  Vec r;                                              \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r
SIMD_INLINE Vec vset(float x) { THINSLICE_EACH(x); }
SIMD_INLINE Vec vload(const float* p) { THINSLICE_EACH(p[i]); }
SIMD_INLINE Vec vload(const bf16* p) { THINSLICE_EACH(to_float(p[i])); }
SIMD_INLINE Vec vload(const int8_t* p) { THINSLICE_EACH(static_cast<float>(p[i])); }
SIMD_INLINE Vec vload_low_bf16(const uint32_t* p) { THINSLICE_EACH(float_of(p[i] << 16)); }
SIMD_INLINE Vec vload_high_bf16(const uint32_t* p) { THINSLICE_EACH(float_of(p[i] & 0xffff0000u)); }
SIMD_INLINE void vstore(float* p, Vec a) { memcpy(p, a.v, sizeof a.v); }
SIMD_INLINE void vstore(bf16* p, Vec a) {
  for (int i = 0; i < 16; ++i) p[i] = to_bf16(a.v[i]);
}
SIMD_INLINE Vec vadd(Vec a, Vec b) { THINSLICE_EACH(a.v[i] + b.v[i]); }
SIMD_INLINE Vec vsub(Vec a, Vec b) { THINSLICE_EACH(a.v[i] - b.v[i]); }
SIMD_INLINE Vec vmul(Vec a, Vec b) { THINSLICE_EACH(a.v[i] * b.v[i]); }
SIMD_INLINE Vec vdiv(Vec a, Vec b) { THINSLICE_EACH(a.v[i] / b.v[i]); }
SIMD_INLINE Vec vfma(Vec a, Vec b, Vec c) { THINSLICE_EACH(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
SIMD_INLINE Vec vfnma(Vec a, Vec b, Vec c) {
  THINSLICE_EACH(__builtin_fmaf(-a.v[i], b.v[i], c.v[i]));
}
SIMD_INLINE Vec vmax(Vec a, Vec b) { THINSLICE_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
SIMD_INLINE Vec vmin(Vec a, Vec b) { THINSLICE_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
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
SIMD_INLINE int32_t store_int8(int8_t* p, Vec a) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) {
    const int32_t code = static_cast<int32_t>(__builtin_nearbyintf(a.v[i]));
    p[i] = static_cast<int8_t>(code);
    sum += code;
  }
  return sum;
}
SIMD_INLINE void transpose16(const uint32_t* const rows[16], uint32_t* out, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) out[j * stride + i] = rows[i][j];
  }
}

#endif

SIMD_INLINE Vec vload_some(const float* p, int n) {
  if (n >= 16) return vload(p);
  float lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return vload(lanes);
}
SIMD_INLINE Vec vload_some(const bf16* p, int n) {
  if (n >= 16) return vload(p);
  float lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return vload(lanes);
}
template <typename T>
SIMD_INLINE void vstore_some(T* p, Vec a, int n) {
  if (n >= 16) {
    vstore(p, a);
    return;
  }
  T lanes[16];
  vstore(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// exp to about 1 ulp for x <= 88.3, zero below -87.3. The reduction and the polynomial are those of
// Cephes expf (S. Moshier), with fused multiply-adds.
SIMD_INLINE Vec vexp(Vec x) {
  const Vec low = vset(-87.3f);
  const Vec clamped = vmin(vset(88.3f), vmax(low, x));
  const Vec n = vround(vmul(clamped, vset(1.44269504f)));
  Vec r = vfnma(n, vset(0.693359375f), clamped);
  r = vfnma(n, vset(-2.12194440e-4f), r);
  Vec p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vfma(vmul(r, r), p, vadd(r, vset(1.0f)));
  return vzero_below(x, low, vmul(p, vpow2(n)));
}

SIMD_INLINE Vec vsilu(Vec x) {
  return vdiv(x, vadd(vset(1.0f), vexp(vsub(vset(0.0f), x))));
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

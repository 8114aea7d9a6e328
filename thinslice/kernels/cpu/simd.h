// Sixteen fp32 lanes, the same results on every instruction set: each function is one IEEE
// operation per lane or a sum in one stated order. Included only by sources that are compiled once
// per instruction set; everything lives in that set's namespace.
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

// Round to nearest even; any NaN becomes the NaN torch writes.
SIMD_INLINE bf16 to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

// A NaN becomes quiet, as in the instructions that do the same.
SIMD_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31;
  const uint32_t fraction = half & 1023;
  if (exponent == 31) {
    return float_of(sign | (fraction ? 0x7fc00000u | (fraction << 13) : 0x7f800000u));
  }
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

SIMD_INLINE float to_float(f16 x) { return half_to_float(x.bits); }

// Any value: rounds to nearest even, from 65520 on to infinity; a NaN keeps its upper bits.
SIMD_INLINE f16 to_f16(float x) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu, sign = (bits_of(x) >> 16) & 0x8000u;
  uint32_t half = 0x7c00u;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude < 0x477ff000u) {
    half = float_to_half(float_of(magnitude));
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

#if defined(THINSLICE_LANES_512)
#include "simd_avx512.h"
#elif defined(THINSLICE_LANES_256)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace thinslice {
namespace THINSLICE_ISA {

// The first n lanes; the others are zero.
template <typename T>
SIMD_INLINE Vec vload_some(const T* p, int n) {
  if (n >= 16) return vload(p);
  T lanes[16] = {};
  memcpy(lanes, p, n * sizeof(T));
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

SIMD_INLINE Vec vabs(Vec a) { return vmax(a, vsub(vset(0.0f), a)); }
// a / b, zero where b is zero or a NaN.
SIMD_INLINE Vec vratio(Vec a, Vec b) {
  const Vec zero = vset(0.0f);
  return vselect_above(vabs(b), zero, vdiv(a, b), zero);
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

// One panel times a few rows with AVX-512 VNNI, at the speed of memory.
#include <immintrin.h>

#include "cpuid.h"
#include "vector_kernels.h"

namespace thinslice {
namespace avx512 {

namespace {

// How far ahead memory is asked for: into the second-level cache, then into the first. int4, one
// row, one thread, 11008 x 4096, share of the read bandwidth measured in the same run: 1024 alone
// 0.89, 2048 alone 0.85, 4096 alone 0.76, 1024 + 3072 0.95, 1024 + 5120 0.83, 1024 + 8192 0.87.
constexpr int64_t kNearBytes = 1024;
constexpr int64_t kFarBytes = 3072;

// AMD's processors want it sooner wherever a line is more work. Zen 4, one thread, 22016 x 4096,
// share of the read bandwidth with 3072 and with 7168: int4 1 row 0.64 and 0.77, 2 rows 0.54 and
// 0.84, 4 rows 0.50 and 0.77; int8 4 rows 0.56 and 0.78, 8 rows 0.49 and 0.75; 512 rows of int8
// are 2% slower. One row of int4m wants 3072; with 6144 it falls from 0.88 to 0.73. One wide row of
// int8, speed beside a narrow one with 3072: 0.83 with 3072, 0.95 with 7168, 0.88 with 9216.
constexpr int64_t kFarBytesAmd = 7168;

template <Format F, Width W, int R>
int64_t far_bytes() {
  static const bool on_amd = is_amd();
  return on_amd && (R > 1 || W == kWide || F == Format::int4) ? kFarBytesAmd : kFarBytes;
}

// Four activations. Read where they lie: a copy to a local makes the compiler broadcast from a
// general register, one more instruction on a vector port for each multiplication.
using Quad = int32_t __attribute__((may_alias));

inline __attribute__((always_inline)) void prefetch(const uint8_t* p, int64_t far) {
  _mm_prefetch(reinterpret_cast<const char*>(p + kNearBytes), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(p + far), _MM_HINT_T1);
}

template <Format F>
inline __attribute__((always_inline)) void load_codes(const uint8_t* p, __m512i w[8]) {
  if constexpr (F == Format::int8) {
    for (int i = 0; i < 8; ++i) w[i] = _mm512_load_si512(p + 64 * i);
  } else {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int i = 0; i < 4; ++i) {
      const __m512i line = _mm512_load_si512(p + 64 * i);
      w[2 * i] = _mm512_and_si512(line, nibble);
      w[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(line, 4), nibble);
    }
  }
}

inline __attribute__((always_inline)) __m512 load_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}

// The weights' scales, times the unit of the activations' codes.
template <Width W>
inline __attribute__((always_inline)) __m512 load_scales(const uint8_t* p) {
  const __m512 scales = load_halves(p);
  return W == kWide ? _mm512_mul_ps(scales, _mm512_set1_ps(kWideUnit)) : scales;
}

// Adds the dot products of one plane of a group. Rows inside: neighbours in the instruction stream
// do not wait for each other.
template <int R>
inline __attribute__((always_inline)) void add_dots(const __m512i w[8], const int8_t* plane,
                                                    __m512i sums[R]) {
  const auto* quads = reinterpret_cast<const Quad*>(plane);
  THINSLICE_UNROLL
  for (int i = 0; i < 8; ++i) {
    THINSLICE_UNROLL
    for (int r = 0; r < R; ++r) {
      sums[r] = _mm512_dpbusd_epi32(sums[r], w[i], _mm512_set1_epi32(quads[8 * r + i]));
    }
  }
}

// Minus the zero point times the sum of the activations' codes.
template <Format F>
inline __attribute__((always_inline)) __m512i first_sum(const int32_t* negated_sum) {
  if constexpr (F == Format::int4) return _mm512_slli_epi32(_mm512_set1_epi32(*negated_sum), 3);
  if constexpr (F == Format::int8) return _mm512_slli_epi32(_mm512_set1_epi32(*negated_sum), 7);
  return _mm512_setzero_si512();
}

template <Format F, Width W, int R>
void multiply(const uint8_t* panel, int64_t groups, const RowBlock& x, int first, float* out) {
  using L = Layout<F>;
  const int64_t far = far_bytes<F, W, R>();
  __m512 acc[R];
  THINSLICE_UNROLL
  for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* codes = panel + L::codes(g);
    const uint8_t* scales = panel + L::scales(g);
    for (int i = 0; i < L::lines; ++i) prefetch(codes + 64 * i, far);
    prefetch(scales, far);
    const int64_t at = g * x.height + first;
    __m512i w[8], sums[R];
    load_codes<F>(codes, w);
    if constexpr (W == kWide) {
      __m512i high[R];
      THINSLICE_UNROLL
      for (int r = 0; r < R; ++r) high[r] = _mm512_setzero_si512();
      add_dots<R>(w, x.high + at * kGroup, high);
      THINSLICE_UNROLL
      for (int r = 0; r < R; ++r) {
        sums[r] = _mm512_add_epi32(_mm512_slli_epi32(high[r], 8),
                                   first_sum<F>(x.negated_sums + at + r));
      }
      add_dots<R>(w, x.low + at * kGroup, sums);
    } else {
      THINSLICE_UNROLL
      for (int r = 0; r < R; ++r) sums[r] = first_sum<F>(x.negated_sums + at + r);
      add_dots<R>(w, x.high + at * kGroup, sums);
    }
    const __m512 weight_scale = load_scales<W>(scales);
    THINSLICE_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512 scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(x.scales[at + r]));
      acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), scale, acc[r]);
      if constexpr (F == Format::int4m) {
        const __m512 minimum = load_halves(scales + 32);
        acc[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x.scaled_sums[at + r]), acc[r]);
      }
    }
  }
  THINSLICE_UNROLL
  for (int r = 0; r < R; ++r) _mm512_store_ps(out + (first + r) * kPanelRows, acc[r]);
}

template <Format F, Width W>
void multiply_all(const uint8_t* panel, const QuantizedRows& x, float* acc) {
  for (int64_t block = 0; block * kBlockRows < x.rows; ++block) {
    const RowBlock rows = row_block<W>(x, block);
    float* out = acc + block * kBlockRows * kPanelRows;
    switch (rows.height) {
      case 1:
        multiply<F, W, 1>(panel, x.groups, rows, 0, out);
        break;
      case 2:
        multiply<F, W, 2>(panel, x.groups, rows, 0, out);
        break;
      case 3:
        multiply<F, W, 3>(panel, x.groups, rows, 0, out);
        break;
      case 4:
        multiply<F, W, 4>(panel, x.groups, rows, 0, out);
        break;
      default:
        for (int first = 0; first < rows.height; first += 8) {
          multiply<F, W, 8>(panel, x.groups, rows, first, out);
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

// A plain read of memory, to measure what the kernels are compared with.
uint32_t read_bytes(const uint8_t* data, int64_t num_bytes) {
  __m512i sum[4] = {};
  for (int64_t at = 0; at + 256 <= num_bytes; at += 256) {
    for (int i = 0; i < 4; ++i) {
      prefetch(data + at + 64 * i, kFarBytes);
      sum[i] = _mm512_xor_si512(sum[i], _mm512_load_si512(data + at + 64 * i));
    }
  }
  const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]),
                                       _mm512_xor_si512(sum[2], sum[3]));
  return static_cast<uint32_t>(_mm512_reduce_add_epi32(all));
}

}  // namespace avx512
}  // namespace thinslice

// Codes and scales for rows of numbers, straight into packed panels.
//
// Lanes are the 16 rows of a panel: what a group needs once, such as a quotient, is computed for 16
// groups at a time, and a line of codes is made where it is stored. A row's results depend on that
// row alone; sums over a group go from its first input to its last.
// Source of the searches: make_qx_quants and make_qkx2_quants in llama.cpp's ggml-quants.c.
#include "simd.h"
#include "vector_kernels.h"

namespace thinslice {
namespace THINSLICE_ISA {

namespace {

// Divisors of the largest magnitude that are tried as scales of int4, as in make_qx_quants (8 +-
// 0.9 in steps of 0.1). Root mean square error on normal weights: one candidate 8.41%, three 8.20%,
// these seven 8.160%, all nineteen 8.158%; Q4_0 has 8.58%.
constexpr float kInt4Divisors[] = {7.1f, 7.4f, 7.7f, 8.0f, 8.3f, 8.6f, 8.9f};
// Divisors of the range that are tried as scales of int4m. The same measure: one candidate 7.50%,
// three 7.16%, these seven 7.07%, nineteen 6.98%; Q4_1 has 7.83%.
constexpr float kInt4mDivisors[] = {12.5f, 13.0f, 13.5f, 14.0f, 14.5f, 15.0f, 15.5f};
// Divisors of the largest magnitude that are tried as scales of int8; none cuts it off. The same
// measure: one candidate (Q8_0) 0.535%, three 0.502%, these seven 0.486%, 25 in finer steps 0.477%.
constexpr float kInt8Divisors[] = {127.0f, 126.0f, 125.0f, 124.0f, 123.0f, 122.0f, 121.0f};

constexpr float kLargestHalf = 65504.0f;
constexpr float kInfinity = __builtin_huge_valf();

// This share of a group's largest weight, or of its range, is below every scale it can have: a
// least-squares scale of int4 is at least the largest weight over 17.8, one of int4m the range over
// 23.3. Where fp16 cannot hold even that, sums of squares may overflow and so hide what is wrong.
constexpr float kSmallestShare = 0x1p-5f;

// A number added to this is rounded to an integer, half to even, which stands in the lowest bits.
constexpr float kRounding = 0x1.8p23f;

template <Format F>
struct Codes;
template <>
struct Codes<Format::int4> {
  static constexpr float zero = 8, low = 0, high = 15;
};
template <>
struct Codes<Format::int4m> {
  static constexpr float zero = 0, low = 0, high = 15;
};
template <>
struct Codes<Format::int8> {
  static constexpr float zero = 128, low = 1, high = 255;
};

// The numbers of one group of 16 rows: [input][row].
struct Group {
  alignas(64) float numbers[kGroup][kPanelRows];
  Vec operator[](int i) const { return vload(numbers[i]); }
};

struct Scales {
  Vec scale;
  Vec minimum;  // int4m only
};

// What the groups of a panel tell about the weights beside codes.
struct Findings {
  Vec not_finite = vset(0.0f);  // a NaN where a weight is not finite
  Vec largest_scale = vset(0.0f);

  // A NaN is no finding: it comes of scales too small to divide by, and no search takes it.
  void note_scale(Vec scale) { largest_scale = vmax(vabs(scale), largest_scale); }

  uint32_t status() const {
    const float sum = vsum(not_finite);
    const bool is_too_large = vlargest(largest_scale) > kLargestHalf;
    return (sum != sum ? kNotFinite : kPacked) | (is_too_large ? kTooLarge : kPacked);
  }
};

// The code of x for each lane's scale, kRounding added. The product is rounded first: the end of a
// range lies at the divisor, as a rule exactly, and a divisor may be halfway between two levels.
template <Format F>
SIMD_INLINE Vec raised_code(Vec x, Vec inverse) {
  const Vec code = vadd(vmul(x, inverse), vset(kRounding + Codes<F>::zero));
  return vmin(vset(kRounding + Codes<F>::high), vmax(vset(kRounding + Codes<F>::low), code));
}

template <Format F>
SIMD_INLINE Vec level(Vec x, Vec inverse) {
  return vsub(raised_code<F>(x, inverse), vset(kRounding + Codes<F>::zero));
}

SIMD_INLINE Vec inverse_of(Vec scale) { return vratio(vset(1.0f), scale); }

// The nearest values fp16 holds.
SIMD_INLINE Vec nearest_half(Vec x, Findings& findings) {
  findings.note_scale(x);
  f16 halves[16];
  vstore(halves, x);
  return vload(halves);
}

// The smallest values fp16 holds that are not below x >= 0.
SIMD_INLINE Vec half_above(Vec x, Findings& findings) {
  findings.note_scale(x);
  f16 halves[16];
  vstore(halves, x);
  const Vec nearest = vload(halves);
  for (f16& half : halves) ++half.bits;
  return vselect_above(x, nearest, vload(halves), nearest);
}

// Levels -8..7; the value of largest magnitude, whatever its sign, goes near -8. A squared error
// counts sqrt(mean square of the row + x * x) times, as in llama.cpp's quantize_row_q4_0_impl:
// plain squares, which cut off the largest weights, gave less error in the weights and more in the
// predictions.
SIMD_INLINE Scales choose_int4(const Group& x, Vec mean_square, Findings& findings) {
  Vec importance[kGroup], weighted[kGroup];
  Vec largest = vset(0.0f);
  for (int i = 0; i < kGroup; ++i) {
    largest = vselect_above(vabs(x[i]), vabs(largest), x[i], largest);
    importance[i] = vsqrt(vadd(vmul(x[i], x[i]), mean_square));
    weighted[i] = vmul(importance[i], x[i]);
  }
  findings.note_scale(vmul(largest, vset(kSmallestShare)));
  Vec best_gain = vset(0.0f), best_scale = vset(0.0f);
  for (const float divisor : kInt4Divisors) {
    const Vec inverse = inverse_of(vdiv(largest, vset(-divisor)));
    Vec product = vset(0.0f), square = vset(0.0f);
    for (int i = 0; i < kGroup; ++i) {
      const Vec l = level<Format::int4>(x[i], inverse);
      product = vfma(weighted[i], l, product);
      square = vfma(importance[i], vmul(l, l), square);
    }
    // The scale of least error, and what it takes off the error that a scale of zero has.
    const Vec scale = vratio(product, square), gain = vmul(product, scale);
    best_scale = vselect_above(gain, best_gain, scale, best_scale);
    best_gain = vselect_above(gain, best_gain, gain, best_gain);
  }
  return {nearest_half(best_scale, findings), vset(0.0f)};
}

// The scale and minimum, fp16, that map the levels a candidate gives to x with the least squared
// error. Sums are of x - low: in those of x a large common part would be all that is left.
SIMD_INLINE Scales fit_line(const Group& x, Vec low, Vec inverse, Findings& findings) {
  Vec levels = vset(0.0f), squares = levels, numbers = levels, products = levels;
  for (int i = 0; i < kGroup; ++i) {
    const Vec above = vsub(x[i], low), l = level<Format::int4m>(above, inverse);
    levels = vadd(levels, l);
    squares = vfma(l, l, squares);
    numbers = vadd(numbers, above);
    products = vfma(l, above, products);
  }
  const Vec share = vset(1.0f / kGroup), mean_level = vmul(levels, share);
  const Vec covariance = vfnma(mean_level, numbers, products);
  const Vec scale = vratio(covariance, vfnma(mean_level, levels, squares));
  const Vec minimum = vadd(vfnma(scale, mean_level, vmul(numbers, share)), low);
  return {nearest_half(scale, findings), nearest_half(minimum, findings)};
}

SIMD_INLINE Vec error_of(const Group& x, const Scales& scales) {
  const Vec inverse = inverse_of(scales.scale);
  Vec error = vset(0.0f);
  for (int i = 0; i < kGroup; ++i) {
    const Vec above = vsub(x[i], scales.minimum);
    const Vec difference = vfnma(level<Format::int4m>(above, inverse), scales.scale, above);
    error = vfma(difference, difference, error);
  }
  return error;
}

// Levels 0..15 above a minimum; scale and minimum by least squares for each candidate.
SIMD_INLINE Scales choose_int4m(const Group& x, Findings& findings) {
  Vec low = x[0], high = x[0];
  for (int i = 1; i < kGroup; ++i) {
    low = vmin(low, x[i]);
    high = vmax(high, x[i]);
  }
  const Vec range = vsub(high, low);
  findings.note_scale(vmul(range, vset(kSmallestShare)));
  Vec best_error = vset(kInfinity);
  Scales best = {vset(0.0f), nearest_half(low, findings)};
  for (const float divisor : kInt4mDivisors) {
    const Scales found = fit_line(x, low, inverse_of(vdiv(range, vset(divisor))), findings);
    const Vec error = error_of(x, found);
    best.scale = vselect_above(best_error, error, found.scale, best.scale);
    best.minimum = vselect_above(best_error, error, found.minimum, best.minimum);
    best_error = vselect_above(best_error, error, error, best_error);
  }
  return best;
}

// Levels -127..127; a scale rounded down would cut off the largest value.
SIMD_INLINE Scales choose_int8(const Group& x, Findings& findings) {
  Vec largest = vset(0.0f);
  for (int i = 0; i < kGroup; ++i) largest = vmax(vabs(x[i]), largest);
  Vec best_error = vset(kInfinity), best_scale = vset(0.0f);
  for (const float divisor : kInt8Divisors) {
    const Vec scale = half_above(vdiv(largest, vset(divisor)), findings);
    const Vec inverse = inverse_of(scale);
    Vec error = vset(0.0f);
    for (int i = 0; i < kGroup; ++i) {
      const Vec difference = vfnma(level<Format::int8>(x[i], inverse), scale, x[i]);
      error = vfma(difference, difference, error);
    }
    best_scale = vselect_above(best_error, error, scale, best_scale);
    best_error = vselect_above(best_error, error, error, best_error);
  }
  return {best_scale, vset(0.0f)};
}

// The lines of a group's codes: of each row four bytes. `rows` are stored, others are zero.
template <Format F>
SIMD_INLINE void write_codes(const Group& x, const Scales& scales, int rows, uint8_t* out) {
  constexpr int per_line = kGroup / Layout<F>::lines;  // inputs
  constexpr uint32_t mask = F == Format::int8 ? 255 : 15;
  alignas(64) float codes[per_line][kPanelRows];
  const Vec inverse = inverse_of(scales.scale);
  for (int line = 0; line < Layout<F>::lines; ++line) {
    for (int i = 0; i < per_line; ++i) {
      const Vec number = x[per_line * line + i];
      const Vec from = F == Format::int4m ? vsub(number, scales.minimum) : number;
      vstore(codes[i], raised_code<F>(from, inverse));
    }
    uint32_t words[kPanelRows] = {};
    for (int i = 0; i < per_line; ++i) {
      const int shift = 8 * (i % 4) + i / 4 * 4;
      for (int row = 0; row < kPanelRows; ++row) {
        words[row] |= (bits_of(codes[i][row]) & mask) << shift;
      }
    }
    for (int row = rows; row < kPanelRows; ++row) words[row] = 0;
    memcpy(out + 64 * line, words, sizeof words);
  }
}

SIMD_INLINE void write_halves(Vec x, int rows, uint8_t* out) {
  f16 halves[kPanelRows];
  vstore(halves, vkeep(x, 0, rows, vset(0.0f)));
  memcpy(out, halves, sizeof halves);
}

template <typename T>
SIMD_INLINE void load_group(const T* const rows[kPanelRows], int64_t at, Group& out) {
  alignas(64) uint32_t numbers[kPanelRows][kGroup], columns[kGroup][kPanelRows];
  const uint32_t *first[kPanelRows], *second[kPanelRows];
  for (int row = 0; row < kPanelRows; ++row) {
    float lanes[kGroup];
    vstore(lanes, vload(rows[row] + at));
    vstore(lanes + 16, vload(rows[row] + at + 16));
    memcpy(numbers[row], lanes, sizeof lanes);
    first[row] = numbers[row];
    second[row] = numbers[row] + 16;
  }
  transpose16(first, columns[0], kPanelRows);
  transpose16(second, columns[16], kPanelRows);
  memcpy(out.numbers, columns, sizeof columns);
}

// Lanes are the inputs here: lane l takes inputs l and 16 + l of each group, two sums that are
// added before their lanes are.
template <typename T>
float mean_square(const T* row, int64_t groups) {
  Vec first = vset(0.0f), second = first;
  for (int64_t g = 0; g < groups; ++g) {
    const Vec a = vload(row + g * kGroup), b = vload(row + g * kGroup + 16);
    first = vfma(a, a, first);
    second = vfma(b, b, second);
  }
  return vsum(vadd(first, second)) / static_cast<float>(groups * kGroup);
}

template <Format F, typename T>
uint32_t quantize_panel(const QuantizeJob& job, int64_t panel) {
  using L = Layout<F>;
  const int64_t size = L::panel_bytes(job.groups), left = job.rows - panel * kPanelRows;
  const int num_rows = left < kPanelRows ? static_cast<int>(left) : kPanelRows;
  uint8_t* out = job.panels + panel * size;
  if (job.groups % 2) memset(out, 0, size);  // the half of an odd last group that nobody writes
  const T* rows[kPanelRows];
  float mean_squares[kPanelRows] = {};
  for (int row = 0; row < kPanelRows; ++row) {
    // Beyond the matrix stands its last row again: its results are not stored.
    const int at = row < num_rows ? row : num_rows - 1;
    rows[row] = static_cast<const T*>(job.x) + (panel * kPanelRows + at) * job.stride;
    if constexpr (F == Format::int4) mean_squares[row] = mean_square(rows[row], job.groups);
  }
  Findings findings;
  Group x;
  for (int64_t g = 0; g < job.groups; ++g) {
    load_group(rows, g * kGroup, x);
    for (int i = 0; i < kGroup; ++i) {
      findings.not_finite = vadd(findings.not_finite, vmul(x[i], vset(0.0f)));
    }
    Scales scales;
    if constexpr (F == Format::int4) {
      scales = choose_int4(x, vload(mean_squares), findings);
    } else if constexpr (F == Format::int4m) {
      scales = choose_int4m(x, findings);
      write_halves(scales.minimum, num_rows, out + L::scales(g) + 32);
    } else {
      scales = choose_int8(x, findings);
    }
    write_halves(scales.scale, num_rows, out + L::scales(g));
    write_codes<F>(x, scales, num_rows, out + L::codes(g));
  }
  return findings.status();
}

template <Format F>
uint32_t quantize_panel(const QuantizeJob& job, int64_t panel) {
  if (job.dtype == Dtype::f32) return quantize_panel<F, float>(job, panel);
  if (job.dtype == Dtype::bf16) return quantize_panel<F, bf16>(job, panel);
  return quantize_panel<F, f16>(job, panel);
}

}  // namespace

uint32_t quantize_panels(const QuantizeJob& job, int64_t first_panel, int64_t last_panel) {
  uint32_t status = kPacked;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    if (job.format == Format::int4) {
      status |= quantize_panel<Format::int4>(job, panel);
    } else if (job.format == Format::int4m) {
      status |= quantize_panel<Format::int4m>(job, panel);
    } else {
      status |= quantize_panel<Format::int8>(job, panel);
    }
  }
  return status;
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

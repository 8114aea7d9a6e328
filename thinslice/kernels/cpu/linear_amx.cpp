// One panel times many rows with AMX: the integer sums of a group come from one tile product, the
// fp32 steps are those of linear_avx512.cpp in the same order.
#include <immintrin.h>

#include "linear_amx.h"

namespace thinslice {
namespace amx {

namespace {

// Groups whose codes, unpacked, stay in the first-level cache while all rows pass over them:
// 16 to 32 measured alike, 64 is 8% slower.
constexpr int kPiece = 16;

constexpr int64_t kTileBytes = kBlockRows * kGroup;

// Tile 0: sums; 1: activations; 2: weights; 3 and 4: activations and sums of the low plane. Storing
// a tile keeps the vector unit from working (4.6 ns alone, 13.3 ns among 48 multiplications that
// take 6.4 ns), so more tiles in flight gain nothing: with two or four products in turn 256 rows run
// at 0.90 and 0.85 of the speed.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 32, 64, 32, 64};
  uint8_t rows[16] = {16, 16, 8, 16, 16};
};

struct alignas(64) Unpacked {
  int8_t codes[kPiece][8][64];  // [group][four inputs][16 rows x 4]
  float scales[kPiece][kPanelRows];
  float minimums[kPiece][kPanelRows];
};

// The integer sums of a group; `low` only where activations are wide.
struct alignas(64) Sums {
  int32_t high[kBlockRows][kPanelRows];
  int32_t low[kBlockRows][kPanelRows];
};

// The activations' planes; `low` is null where they are narrow.
struct Planes {
  const int8_t* high;
  const int8_t* low;
};

template <Width W>
inline __attribute__((always_inline)) Planes advance(const Planes& x, int64_t bytes) {
  return {x.high + bytes, W == kWide ? x.low + bytes : nullptr};
}

inline __attribute__((always_inline)) __m512 load_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}

template <Format F, Width W>
void unpack(const uint8_t* panel, int64_t first, int groups, Unpacked& out) {
  using L = Layout<F>;
  constexpr int64_t ahead = 4096;
  for (int g = 0; g < groups; ++g) {
    const uint8_t* codes = panel + L::codes(first + g);
    const uint8_t* scales = panel + L::scales(first + g);
    for (int i = 0; i < L::lines; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + ahead + 64 * i), _MM_HINT_T1);
    }
    _mm_prefetch(reinterpret_cast<const char*>(scales + ahead), _MM_HINT_T1);
    for (int i = 0; i < L::lines; ++i) {
      const __m512i line = _mm512_load_si512(codes + 64 * i);
      if constexpr (F == Format::int8) {
        _mm512_store_si512(out.codes[g][i], _mm512_xor_si512(line, _mm512_set1_epi8(-128)));
      } else {
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i zero_point = _mm512_set1_epi8(F == Format::int4 ? 8 : 0);
        const __m512i low = _mm512_and_si512(line, nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(line, 4), nibble);
        _mm512_store_si512(out.codes[g][2 * i], _mm512_sub_epi8(low, zero_point));
        _mm512_store_si512(out.codes[g][2 * i + 1], _mm512_sub_epi8(high, zero_point));
      }
    }
    const __m512 unit = _mm512_set1_ps(W == kWide ? kWideUnit : 1.0f);
    _mm512_store_ps(out.scales[g], _mm512_mul_ps(load_halves(scales), unit));
    if constexpr (F == Format::int4m) _mm512_store_ps(out.minimums[g], load_halves(scales + 32));
  }
}

// Starts the product of one group: 16 rows times 16 outputs.
template <Width W>
inline __attribute__((always_inline)) void start(const Planes& x, const void* w) {
  _tile_loadd(1, x.high, kGroup);
  _tile_loadd(2, w, 64);
  _tile_zero(0);
  _tile_dpbssd(0, 1, 2);
  if constexpr (W == kWide) {
    _tile_loadd(3, x.low, kGroup);
    _tile_zero(4);
    _tile_dpbssd(4, 3, 2);
  }
}

template <Width W>
inline __attribute__((always_inline)) void store(Sums& sums) {
  _tile_stored(0, sums.high, 64);
  if constexpr (W == kWide) _tile_stored(4, sums.low, 64);
}

template <Width W>
inline __attribute__((always_inline)) __m512i sum_of(const Sums& sums, int row) {
  const __m512i high = _mm512_load_si512(sums.high[row]);
  if constexpr (W == kNarrow) return high;
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), _mm512_load_si512(sums.low[row]));
}

// acc += the integer sums of one group, scaled: 16 rows times 16 outputs.
template <Format F, Width W>
inline __attribute__((always_inline)) void add_group(const Unpacked& w, int g, const float* scales,
                                                     const float* scaled_sums,
                                                     const Sums& sums,
                                                     __m512 acc[kBlockRows]) {
  const __m512 weight_scale = _mm512_load_ps(w.scales[g]);
  THINSLICE_UNROLL
  for (int r = 0; r < kBlockRows; ++r) {
    const __m512 scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scales[r]));
    const __m512 sum = _mm512_cvtepi32_ps(sum_of<W>(sums, r));
    acc[r] = _mm512_fmadd_ps(sum, scale, acc[r]);
    if constexpr (F == Format::int4m) {
      const __m512 minimum = _mm512_load_ps(w.minimums[g]);
      acc[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(scaled_sums[r]), acc[r]);
    }
  }
}

// All row blocks times one piece of the weights. The next product is under way while the vector
// unit scales this one.
template <Format F, Width W>
void multiply_piece(const QuantizedRows& x, const Unpacked& w, int64_t first, int groups,
                    float* acc_rows) {
  Sums sums;
  const int64_t blocks = (x.rows + kBlockRows - 1) / kBlockRows;
  Planes tiles = advance<W>({x.high, x.low}, first * kTileBytes);
  start<W>(tiles, w.codes[0]);
  for (int64_t block = 0; block < blocks; ++block) {
    float* out = acc_rows + block * kBlockRows * kPanelRows;
    const int64_t at = (block * x.groups + first) * kBlockRows;
    __m512 acc[kBlockRows];
    THINSLICE_UNROLL
    for (int r = 0; r < kBlockRows; ++r) {
      acc[r] = first == 0 ? _mm512_setzero_ps() : _mm512_load_ps(out + r * kPanelRows);
    }
    const Planes next_tiles = advance<W>(tiles, x.groups * kTileBytes);
    for (int g = 0; g < groups; ++g) {
      store<W>(sums);
      if (g + 1 < groups) {
        start<W>(advance<W>(tiles, (g + 1) * kTileBytes), w.codes[g + 1]);
      } else if (block + 1 < blocks) {
        start<W>(next_tiles, w.codes[0]);
      }
      const int64_t scale_at = at + g * kBlockRows;
      add_group<F, W>(w, g, x.scales + scale_at, x.scaled_sums[W] + scale_at, sums, acc);
    }
    THINSLICE_UNROLL
    for (int r = 0; r < kBlockRows; ++r) _mm512_store_ps(out + r * kPanelRows, acc[r]);
    tiles = next_tiles;
  }
}

template <Format F, Width W>
void multiply_all(const uint8_t* panel, const QuantizedRows& x, float* acc) {
  Unpacked w;
  for (int64_t first = 0; first < x.groups; first += kPiece) {
    const int groups = static_cast<int>(x.groups - first < kPiece ? x.groups - first : kPiece);
    unpack<F, W>(panel, first, groups, w);
    // The tile loads do not tell the compiler that they read memory.
    __asm__ volatile("" ::: "memory");
    multiply_piece<F, W>(x, w, first, groups, acc);
  }
}

template <Width W>
void multiply_format(const uint8_t* panel, Format format, const QuantizedRows& x, float* acc) {
  const int64_t tail = x.rows % kBlockRows;
  const int64_t tiled = tail > 0 && tail <= 8 ? x.rows - tail : x.rows;
  if (tiled > 0) {
    const QuantizedRows rows = rows_of<W>(x, 0, tiled);
    switch (format) {
      case Format::int4:
        multiply_all<Format::int4, W>(panel, rows, acc);
        break;
      case Format::int4m:
        multiply_all<Format::int4m, W>(panel, rows, acc);
        break;
      case Format::int8:
        multiply_all<Format::int8, W>(panel, rows, acc);
        break;
    }
  }
  if (tiled == x.rows) return;
  // Up to eight rows: the row kernel keeps up with memory and needs no unpacking.
  avx512::panel_times_rows(panel, format, W, rows_of<W>(x, tiled, tail), acc + tiled * kPanelRows);
}

}  // namespace

void enter() {
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
}

void leave() { _tile_release(); }

void panel_times_rows(const uint8_t* panel, Format format, Width width, const QuantizedRows& x,
                      float* acc) {
  if (width == kWide) return multiply_format<kWide>(panel, format, x, acc);
  multiply_format<kNarrow>(panel, format, x, acc);
}

}  // namespace amx
}  // namespace thinslice

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

// Tile 0: sums; 1: activations; 2: weights. Storing a tile keeps the vector unit from working
// (4.6 ns alone, 13.3 ns among 48 multiplications that take 6.4 ns), so more tiles in flight gain
// nothing: with two or four products in turn 256 rows run at 0.90 and 0.85 of the speed.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 32, 64};
  uint8_t rows[16] = {16, 16, 8};
};

struct alignas(64) Unpacked {
  int8_t codes[kPiece][8][64];  // [group][four inputs][16 rows x 4]
  float scales[kPiece][kPanelRows];
  float minimums[kPiece][kPanelRows];
};

struct alignas(64) Sums {
  int32_t at[kBlockRows][kPanelRows];
};

inline __attribute__((always_inline)) __m512 load_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}

template <Format F>
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
    _mm512_store_ps(out.scales[g], load_halves(scales));
    if constexpr (F == Format::int4m) _mm512_store_ps(out.minimums[g], load_halves(scales + 32));
  }
}

// Starts the product of one group: 16 rows times 16 outputs.
inline __attribute__((always_inline)) void start(const int8_t* x, const void* w) {
  _tile_loadd(1, x, kGroup);
  _tile_loadd(2, w, 64);
  _tile_zero(0);
  _tile_dpbssd(0, 1, 2);
}

// acc += the integer sums of one group, scaled: 16 rows times 16 outputs.
template <Format F>
inline __attribute__((always_inline)) void add_group(const Unpacked& w, int g, const float* scales,
                                                     const float* scaled_sums,
                                                     const int32_t (*sums)[kPanelRows],
                                                     __m512 acc[kBlockRows]) {
  const __m512 weight_scale = _mm512_load_ps(w.scales[g]);
  THINSLICE_UNROLL
  for (int r = 0; r < kBlockRows; ++r) {
    const __m512 scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scales[r]));
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums[r]));
    acc[r] = _mm512_fmadd_ps(sum, scale, acc[r]);
    if constexpr (F == Format::int4m) {
      const __m512 minimum = _mm512_load_ps(w.minimums[g]);
      acc[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(scaled_sums[r]), acc[r]);
    }
  }
}

// All row blocks times one piece of the weights. The next product is under way while the vector
// unit scales this one.
template <Format F>
void multiply_piece(const QuantizedRows& x, const Unpacked& w, int64_t first, int groups,
                    float* acc_rows) {
  Sums sums;
  const int64_t blocks = (x.rows + kBlockRows - 1) / kBlockRows;
  const int8_t* tiles = x.codes + first * kTileBytes;
  start(tiles, w.codes[0]);
  for (int64_t block = 0; block < blocks; ++block) {
    float* out = acc_rows + block * kBlockRows * kPanelRows;
    const int64_t at = (block * x.groups + first) * kBlockRows;
    __m512 acc[kBlockRows];
    THINSLICE_UNROLL
    for (int r = 0; r < kBlockRows; ++r) {
      acc[r] = first == 0 ? _mm512_setzero_ps() : _mm512_load_ps(out + r * kPanelRows);
    }
    const int8_t* next_tiles = tiles + x.groups * kTileBytes;
    for (int g = 0; g < groups; ++g) {
      _tile_stored(0, sums.at, 64);
      if (g + 1 < groups) {
        start(tiles + (g + 1) * kTileBytes, w.codes[g + 1]);
      } else if (block + 1 < blocks) {
        start(next_tiles, w.codes[0]);
      }
      const int64_t scale_at = at + g * kBlockRows;
      add_group<F>(w, g, x.scales + scale_at, x.scaled_sums + scale_at, sums.at, acc);
    }
    THINSLICE_UNROLL
    for (int r = 0; r < kBlockRows; ++r) _mm512_store_ps(out + r * kPanelRows, acc[r]);
    tiles = next_tiles;
  }
}

template <Format F>
void multiply_all(const uint8_t* panel, const QuantizedRows& x, float* acc) {
  Unpacked w;
  for (int64_t first = 0; first < x.groups; first += kPiece) {
    const int groups = static_cast<int>(x.groups - first < kPiece ? x.groups - first : kPiece);
    unpack<F>(panel, first, groups, w);
    // The tile loads do not tell the compiler that they read memory.
    __asm__ volatile("" ::: "memory");
    multiply_piece<F>(x, w, first, groups, acc);
  }
}

}  // namespace

void enter() {
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
}

void leave() { _tile_release(); }

void panel_times_rows(const uint8_t* panel, Format format, const QuantizedRows& x, float* acc) {
  const int64_t tail = x.rows % kBlockRows;
  QuantizedRows tiled = x;
  if (tail > 0 && tail <= 8) tiled.rows -= tail;
  if (tiled.rows > 0) {
    switch (format) {
      case Format::int4:
        multiply_all<Format::int4>(panel, tiled, acc);
        break;
      case Format::int4m:
        multiply_all<Format::int4m>(panel, tiled, acc);
        break;
      case Format::int8:
        multiply_all<Format::int8>(panel, tiled, acc);
        break;
    }
  }
  if (tiled.rows == x.rows) return;
  // Up to eight rows: the row kernel keeps up with memory and needs no unpacking.
  const int64_t at = tiled.rows * x.groups;
  const QuantizedRows rest = {tail, x.groups, x.codes + at * kGroup, x.scales + at,
                              x.negated_sums + at, x.scaled_sums + at};
  avx512::panel_times_rows(panel, format, rest, acc + tiled.rows * kPanelRows);
}

}  // namespace amx
}  // namespace thinslice

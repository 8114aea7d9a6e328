// One panel times many rows with AMX: the integer sums of a group come from one tile product, the
// fp32 steps are those of linear_avx512.cpp in the same order.
#include <immintrin.h>

#include "linear_amx.h"

namespace thinslice {
namespace amx {

namespace {

// Groups whose codes, unpacked, stay in the first-level cache while all rows pass over them.
constexpr int kPiece = 16;

// Tiles 0, 1: sums of 16 rows; 2, 3: activations of 16 rows; 4, 5: weights; 6, 7: sums and
// activations of 8 rows.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 32, 32, 64, 64, 64, 32};
  uint8_t rows[16] = {16, 16, 16, 16, 8, 8, 8, 8};
};

struct alignas(64) Unpacked {
  int8_t codes[kPiece][8][64];  // [group][four inputs][16 rows x 4]
  float scales[kPiece][kPanelRows];
  float minimums[kPiece][kPanelRows];
};

struct alignas(64) Sums {
  int32_t at[2][kBlockRows][kPanelRows];
};

inline __attribute__((always_inline)) __m512 load_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}

template <Format F>
void unpack(const uint8_t* panel, int64_t first, int groups, Unpacked& out) {
  using L = Layout<F>;
  constexpr int64_t ahead = kPiece * (L::panel_bytes(2) / 2);
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

// The integer sums of one group: rows times 16 outputs.
template <int R, int Slot>
inline __attribute__((always_inline)) void tile_product(const int8_t* x, const void* w,
                                                        int32_t (*sums)[kPanelRows]) {
  if constexpr (R == 16 && Slot == 0) {
    _tile_zero(0);
    _tile_loadd(2, x, kGroup);
    _tile_loadd(4, w, 64);
    _tile_dpbssd(0, 2, 4);
    _tile_stored(0, sums, 64);
  } else if constexpr (R == 16) {
    _tile_zero(1);
    _tile_loadd(3, x, kGroup);
    _tile_loadd(5, w, 64);
    _tile_dpbssd(1, 3, 5);
    _tile_stored(1, sums, 64);
  } else if constexpr (Slot == 0) {
    _tile_zero(6);
    _tile_loadd(7, x, kGroup);
    _tile_loadd(4, w, 64);
    _tile_dpbssd(6, 7, 4);
    _tile_stored(6, sums, 64);
  } else {
    _tile_zero(6);
    _tile_loadd(7, x, kGroup);
    _tile_loadd(5, w, 64);
    _tile_dpbssd(6, 7, 5);
    _tile_stored(6, sums, 64);
  }
}

template <Format F, int R>
inline __attribute__((always_inline)) void add_group(const Unpacked& w, int g, const float* scales,
                                                     const float* scaled_sums,
                                                     const int32_t (*sums)[kPanelRows],
                                                     __m512 acc[R]) {
  const __m512 weight_scale = _mm512_load_ps(w.scales[g]);
  for (int r = 0; r < R; ++r) {
    const __m512 scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scales[r]));
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums[r]));
    acc[r] = _mm512_fmadd_ps(sum, scale, acc[r]);
    if constexpr (F == Format::int4m) {
      const __m512 minimum = _mm512_load_ps(w.minimums[g]);
      acc[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(scaled_sums[r]), acc[r]);
    }
  }
}

// One row block times the unpacked groups. The tile unit works on a group while the vector unit
// scales the one before.
template <Format F, int R>
void multiply(const Unpacked& w, int64_t first, int groups, const RowBlock& x, bool is_first,
              Sums& sums, float* out) {
  __m512 acc[R];
  for (int r = 0; r < R; ++r) {
    acc[r] = is_first ? _mm512_setzero_ps() : _mm512_load_ps(out + r * kPanelRows);
  }
  const int8_t* codes = x.codes + first * R * kGroup;
  const float* scales = x.scales + first * R;
  const float* scaled_sums = x.scaled_sums + first * R;
  tile_product<R, 0>(codes, w.codes[0], sums.at[0]);
  int g = 0;
  for (; g + 2 <= groups; g += 2) {
    tile_product<R, 1>(codes + (g + 1) * R * kGroup, w.codes[g + 1], sums.at[1]);
    add_group<F, R>(w, g, scales + g * R, scaled_sums + g * R, sums.at[0], acc);
    if (g + 2 < groups) {
      tile_product<R, 0>(codes + (g + 2) * R * kGroup, w.codes[g + 2], sums.at[0]);
    }
    add_group<F, R>(w, g + 1, scales + (g + 1) * R, scaled_sums + (g + 1) * R, sums.at[1], acc);
  }
  if (g < groups) add_group<F, R>(w, g, scales + g * R, scaled_sums + g * R, sums.at[0], acc);
  for (int r = 0; r < R; ++r) _mm512_store_ps(out + r * kPanelRows, acc[r]);
}

template <Format F>
void multiply_all(const uint8_t* panel, const QuantizedRows& x, float* acc) {
  Unpacked w;
  Sums sums;
  for (int64_t first = 0; first < x.groups; first += kPiece) {
    const int groups = static_cast<int>(x.groups - first < kPiece ? x.groups - first : kPiece);
    unpack<F>(panel, first, groups, w);
    for (int64_t block = 0; block * kBlockRows < x.rows; ++block) {
      const RowBlock rows = row_block(x, block);
      float* out = acc + block * kBlockRows * kPanelRows;
      if (rows.height == 16) {
        multiply<F, 16>(w, first, groups, rows, first == 0, sums, out);
      } else if (rows.height == 8) {
        multiply<F, 8>(w, first, groups, rows, first == 0, sums, out);
      }
    }
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
  if (tail > 0 && tail <= 4) tiled.rows -= tail;
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
  // Up to four rows: the row kernel keeps up with memory and needs no unpacking.
  const int64_t at = tiled.rows * x.groups;
  const QuantizedRows rest = {tail, x.groups, x.codes + at * kGroup, x.scales + at,
                              x.negated_sums + at, x.scaled_sums + at};
  avx512::panel_times_rows(panel, format, rest, acc + tiled.rows * kPanelRows);
}

}  // namespace amx
}  // namespace thinslice

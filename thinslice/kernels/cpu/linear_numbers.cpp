// Rows of numbers times rows of numbers, both as they lie: no panel is packed, no code is chosen.
//
// Every result is summed in one order, whatever is computed beside it: lane l of 16 takes inputs l
// and 16 + l of each 32 (bf16: 2l and 2l + 1, so that a load needs no shuffle), then the lanes are
// added as `vsum` adds them. Activations stay fp32: nothing is rounded but the sums.
#include "simd.h"
#include "vector_kernels.h"

namespace thinslice {
namespace THINSLICE_ISA {

namespace {

// Results that are summed side by side: as many as the registers hold.
#if defined(THINSLICE_LANES_512)
constexpr int kTileColumns = 4, kTileRows = 6;
#elif defined(THINSLICE_LANES_256)
constexpr int kTileColumns = 2, kTileRows = 2;
#else
constexpr int kTileColumns = 1, kTileRows = 1;
#endif

// Inputs after which the next columns come: 6 rows of activations in 12 KiB and 4 of weights in 4 or
// 8 stay in the first-level cache. A multiple of kNumbers.
constexpr int64_t kDepth = 512;

// Half of kNumbers weights: of bf16 those at even or at odd places, of fp32 the first or the last.
template <int Half>
SIMD_INLINE Vec load_half(const bf16* w) {
#if defined(THINSLICE_LANES_512) || defined(THINSLICE_LANES_256)
  const uint32_t* dwords = reinterpret_cast<const uint32_t*>(w);  // read by vector loads alone
#else
  uint32_t dwords[16];
  memcpy(dwords, w, sizeof dwords);
#endif
  return Half ? vload_high_bf16(dwords) : vload_low_bf16(dwords);
}

template <int Half>
SIMD_INLINE Vec load_half(const float* w) {
  return vload(w + 16 * Half);
}

// How far ahead memory is asked for where one row passes over the weights, and each is read once.
// bf16, 22016 x 4096, two threads, share of the read bandwidth measured in the same run, on an Intel
// Xeon with AVX-512: without 0.78, 512 0.88, 1024 0.89, 1536 0.86, 3072 0.84, 6144 0.79.
constexpr int64_t kAheadBytes = 1024;

// Once for each 64 bytes: both halves of kNumbers bf16 lie in the same.
template <typename T>
SIMD_INLINE void prefetch(const T* w, int half) {
  if (half == 0 || sizeof(T) == 4) {
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kAheadBytes);
  }
}

template <typename T, int N, int M, int Half>
SIMD_INLINE void add_half(const T* const columns[N], int64_t at, const float* x, int64_t stride,
                          Vec acc[N][M]) {
  Vec rows[M];
  THINSLICE_UNROLL
  for (int m = 0; m < M; ++m) rows[m] = vload(x + m * stride + 16 * Half);
  THINSLICE_UNROLL
  for (int n = 0; n < N; ++n) {
    const T* place = columns[n] + at;
    if constexpr (M == 1) prefetch(place + 16 * Half, Half);
    const Vec w = load_half<Half>(place);
    THINSLICE_UNROLL
    for (int m = 0; m < M; ++m) acc[n][m] = vfma(w, rows[m], acc[n][m]);
  }
}

// Inputs from..to of N columns and M rows, from a multiple of kNumbers; `sums` holds 16 lanes of
// each of the N * M, and goes on from what it holds unless `from` is 0.
template <typename T, int N, int M>
SIMD_INLINE void add_tile(const T* const columns[N], const float* x, int64_t stride, int64_t from,
                          int64_t to, float* sums) {
  Vec acc[N][M];
  THINSLICE_UNROLL
  for (int n = 0; n < N; ++n) {
    THINSLICE_UNROLL
    for (int m = 0; m < M; ++m) acc[n][m] = from ? vload(sums + (n * M + m) * 16) : vset(0.0f);
  }
  int64_t k = from;
  for (; k + kNumbers <= to; k += kNumbers) {
    add_half<T, N, M, 0>(columns, k, x + k, stride, acc);
    add_half<T, N, M, 1>(columns, k, x + k, stride, acc);
  }
  if (k < to) {
    T padded[N][kNumbers] = {};
    const T* ends[N];
    for (int n = 0; n < N; ++n) {
      memcpy(padded[n], columns[n] + k, (to - k) * sizeof(T));
      ends[n] = padded[n];
    }
    add_half<T, N, M, 0>(ends, 0, x + k, stride, acc);
    add_half<T, N, M, 1>(ends, 0, x + k, stride, acc);
  }
  THINSLICE_UNROLL
  for (int n = 0; n < N; ++n) {
    THINSLICE_UNROLL
    for (int m = 0; m < M; ++m) vstore(sums + (n * M + m) * 16, acc[n][m]);
  }
}

// M rows of x times the columns of a panel.
template <typename T, int M>
void multiply_tile(const T* panel, int num_columns, const Numbers& x, int64_t row, float* out) {
  alignas(64) float sums[kPanelRows * M * 16];
  const float* first = x.data + row * x.stride;
  // What is read once needs no second look from the cache.
  const int64_t depth = x.rows > kTileRows ? kDepth : x.in_features;
  for (int64_t from = 0; from < x.in_features; from += depth) {
    const int64_t to = from + depth < x.in_features ? from + depth : x.in_features;
    for (int column = 0; column < num_columns; column += kTileColumns) {
      const T* columns[kTileColumns];
      for (int n = 0; n < kTileColumns; ++n) {
        // Beside the last column stands the last one again: its results are not stored.
        const int last = num_columns - 1;
        columns[n] = panel + (column + n < last ? column + n : last) * x.in_features;
      }
      add_tile<T, kTileColumns, M>(columns, first, x.stride, from, to, sums + column * M * 16);
    }
  }
  for (int column = 0; column < num_columns; ++column) {
    for (int m = 0; m < M; ++m) {
      out[(row + m) * kPanelRows + column] = vsum(vload(sums + (column * M + m) * 16));
    }
  }
}

template <typename T>
void multiply_panel(const T* panel, int num_columns, const Numbers& x, float* out) {
  int64_t row = 0;
  for (; row + kTileRows <= x.rows; row += kTileRows) {
    multiply_tile<T, kTileRows>(panel, num_columns, x, row, out);
  }
  if constexpr (kTileRows > 4) {
    for (; row + 4 <= x.rows; row += 4) multiply_tile<T, 4>(panel, num_columns, x, row, out);
  }
  if constexpr (kTileRows > 2) {
    for (; row + 2 <= x.rows; row += 2) multiply_tile<T, 2>(panel, num_columns, x, row, out);
  }
  for (; row < x.rows; ++row) multiply_tile<T, 1>(panel, num_columns, x, row, out);
}

void arrange_row(const float* x, int64_t count, bool is_paired, float* out) {
  for (int64_t k = 0; k < count; k += kNumbers) {
    float block[kNumbers] = {};
    const int64_t left = count - k < kNumbers ? count - k : kNumbers;
    for (int64_t i = 0; i < left; ++i) block[i] = x[k + i];
    for (int i = 0; i < 16; ++i) {
      out[k + i] = block[is_paired ? 2 * i : i];
      out[k + 16 + i] = block[is_paired ? 2 * i + 1 : 16 + i];
    }
  }
}

}  // namespace

void arrange_numbers(const float* x, int64_t stride, bool is_paired, const Numbers& out,
                     int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    arrange_row(x + row * stride, out.in_features, is_paired, out.data + row * out.stride);
  }
}

void numbers_times_rows(const void* panel, Format format, int num_columns, const Numbers& x,
                        float* acc) {
  if (format == Format::f32) {
    multiply_panel(static_cast<const float*>(panel), num_columns, x, acc);
  } else {
    multiply_panel(static_cast<const bf16*>(panel), num_columns, x, acc);
  }
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

// Causal attention over a paged KV cache, and the writing of that cache. Online softmax in slices
// of 64 positions that start at multiples of 64, so that a token's result depends on its position
// and on nothing that is computed together with it.
#include "vector_kernels.h"

#include "simd.h"

namespace thinslice {
namespace THINSLICE_ISA {

namespace {

constexpr int kSlice = 64;

#if defined(THINSLICE_LANES_512)
constexpr int kWidth = 4;  // vectors of a row that one inner loop keeps in registers
#else
constexpr int kWidth = 1;
#endif
constexpr int kRows = 4;

// c[r][..] = (c[r][..] or 0) + sum over i of a[r][i] * b[i][..], i ascending, for R rows and W
// vectors of 16 columns.
template <int R, int W>
SIMD_INLINE void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                               int64_t depth, float* c, int64_t c_stride, bool is_added) {
  Vec acc[R][W];
  THINSLICE_UNROLL
  for (int r = 0; r < R; ++r) {
    THINSLICE_UNROLL
    for (int w = 0; w < W; ++w) {
      acc[r][w] = is_added ? vload(c + r * c_stride + 16 * w) : vset(0.0f);
    }
  }
  for (int64_t i = 0; i < depth; ++i) {
    Vec column[W];
    THINSLICE_UNROLL
    for (int w = 0; w < W; ++w) column[w] = vload(b + i * b_stride + 16 * w);
    THINSLICE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec x = vset(a[r * a_stride + i]);
      THINSLICE_UNROLL
      for (int w = 0; w < W; ++w) acc[r][w] = vfma(x, column[w], acc[r][w]);
    }
  }
  THINSLICE_UNROLL
  for (int r = 0; r < R; ++r) {
    THINSLICE_UNROLL
    for (int w = 0; w < W; ++w) vstore(c + r * c_stride + 16 * w, acc[r][w]);
  }
}

template <int W>
void multiply_rows(int64_t rows, const float* a, int64_t a_stride, const float* b,
                   int64_t b_stride, int64_t depth, float* c, int64_t c_stride, bool is_added) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    multiply_tile<kRows, W>(a + r * a_stride, a_stride, b, b_stride, depth, c + r * c_stride,
                            c_stride, is_added);
  }
  const float* a_rest = a + r * a_stride;
  float* c_rest = c + r * c_stride;
  switch (rows - r) {
    case 1:
      multiply_tile<1, W>(a_rest, a_stride, b, b_stride, depth, c_rest, c_stride, is_added);
      break;
    case 2:
      multiply_tile<2, W>(a_rest, a_stride, b, b_stride, depth, c_rest, c_stride, is_added);
      break;
    case 3:
      multiply_tile<3, W>(a_rest, a_stride, b, b_stride, depth, c_rest, c_stride, is_added);
      break;
    default:
      break;
  }
}

SIMD_INLINE void multiply(int64_t rows, int64_t columns, const float* a, int64_t a_stride,
                          const float* b, int64_t b_stride, int64_t depth, float* c,
                          int64_t c_stride, bool is_added) {
  int64_t at = 0;
  for (; at + 16 * kWidth <= columns; at += 16 * kWidth) {
    multiply_rows<kWidth>(rows, a, a_stride, b + at, b_stride, depth, c + at, c_stride, is_added);
  }
  for (; at < columns; at += 16) {
    multiply_rows<1>(rows, a, a_stride, b + at, b_stride, depth, c + at, c_stride, is_added);
  }
}

// A row of H values in vectors of 16, the last one filled up with zeros unless H is a multiple
// (IsWhole): take(first value, vector, how many values it has).
template <bool IsWhole, typename T, typename Take>
SIMD_INLINE void each_vector(const T* x, int64_t dim, Take take) {
  const int64_t whole = IsWhole ? dim : dim / 16 * 16;
  for (int64_t h = 0; h < whole; h += 16) take(h, vload(x + h), 16);
  if constexpr (!IsWhole) {
    const int rest = static_cast<int>(dim - whole);
    take(whole, vload_some(x + whole, rest), rest);
  }
}

bool is_whole(int64_t dim) { return dim % 16 == 0; }

SIMD_INLINE int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

// The buffers of one call, carved from the scratch memory of the thread.
struct Buffers {
  int64_t width;  // W: H up to a multiple of 16; what is beyond H is zero
  float* q;       // [rows][W], times the softmax scale
  float* out;     // [rows][W]
  float* p;       // [rows][kSlice]
  float* keys;    // [W][kSlice], transposed
  float* values;  // [kSlice][W]
  float* staged;  // [kSlice][W], rows before they are transposed
  float* largest;  // [rows]
  float* total;    // [rows]
  int64_t cached[kSlice];  // rows of the cache, of this slice and of the one after it
  int64_t next[kSlice];
};

// Rows of one KV head: row r is token r / group, query head r % group of the group.
struct Rows {
  const AttentionJob& job;
  int64_t kv_head;
  int64_t group;        // query heads per KV head
  int64_t first_token;  // index into q
  int64_t count;        // tokens * group
  int64_t first_pos;    // position of the first token

  int64_t token(int64_t r) const { return first_token + r / group; }
  int64_t head(int64_t r) const { return kv_head * group + r % group; }
  int64_t position(int64_t r) const { return first_pos + r / group; }
  int64_t window_start(int64_t r) const {
    return job.window && position(r) >= job.window ? position(r) + 1 - job.window : 0;
  }
};

// Rows of the cache that hold the positions slice .. slice + kSlice - 1; positions that no row of
// `rows` sees give the nearest one that is there. One division for all of them.
SIMD_INLINE void find_rows(const Rows& rows, const int32_t* block_table, int64_t slice,
                           int64_t* cached) {
  const AttentionJob& job = rows.job;
  const int64_t start = rows.window_start(0), last_pos = rows.position(rows.count - 1);
  const int64_t first = (start > slice ? start : slice) - slice;
  const int64_t last = (last_pos < slice + kSlice - 1 ? last_pos : slice + kSlice - 1) - slice;
  const int32_t* block = block_table + (slice + first) / job.block_size;
  int64_t offset = (slice + first) % job.block_size;
  for (int64_t j = first; j <= last; ++j) {
    cached[j] = (*block * job.num_kv_heads + rows.kv_head) * job.block_size + offset;
    if (++offset == job.block_size) {
      offset = 0;
      ++block;
    }
  }
  for (int64_t j = 0; j < first; ++j) cached[j] = cached[first];
  for (int64_t j = last + 1; j < kSlice; ++j) cached[j] = cached[last];
}

// The blocks of a head lie apart, so that the processor's own prefetching starts anew in each.
SIMD_INLINE void prefetch_row(const AttentionJob& job, const void* cache, int64_t row) {
  const int64_t row_bytes = job.head_dim * size_of(job.cache_dtype);
  const char* at = static_cast<const char*>(cache) + row * row_bytes;
  for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// One cached row of H values as W fp32.
template <bool IsWhole>
SIMD_INLINE void read_row(const AttentionJob& job, const void* cache, const uint16_t* scales,
                          int64_t row, float* out) {
  const int64_t dim = job.head_dim, at = row * dim;
  const auto put = [out](int64_t h, Vec v, int) { vstore(out + h, v); };
  if (job.cache_dtype == Dtype::int8) {
    const Vec scale = vset(half_to_float(scales[row]));
    each_vector<IsWhole>(static_cast<const int8_t*>(cache) + at, dim, [=](int64_t h, Vec v, int) {
      vstore(out + h, vmul(v, scale));
    });
  } else if (job.cache_dtype == Dtype::bf16) {
    each_vector<IsWhole>(static_cast<const bf16*>(cache) + at, dim, put);
  } else {
    each_vector<IsWhole>(static_cast<const float*>(cache) + at, dim, put);
  }
}

// Keys of positions slice + first .. slice + last - 1 as columns; the scores of the columns up to
// a multiple of 16 on either side are masked. Inlined, its loops would lack registers: a token of
// AVX2 took 5% longer over a bf16 cache.
template <bool IsWhole>
[[gnu::noinline]] void load_keys(const AttentionJob& job, int first, int last,
                                 const Buffers& buffers) {
  const int64_t dim = job.head_dim;
  const bool is_bf16 = job.cache_dtype == Dtype::bf16 && dim % 32 == 0;
  alignas(64) uint32_t pairs[16 * 16];
  for (int column = first / 16 * 16; column < last; column += 16) {
    const uint32_t* rows[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t row = buffers.cached[column + i];
      prefetch_row(job, job.k_cache, buffers.next[column + i]);
      if (is_bf16) {
        rows[i] = reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(job.k_cache) +
                                                    row * dim);
      } else {
        float* staged = buffers.staged + i * buffers.width;
        read_row<IsWhole>(job, job.k_cache, job.k_scale, row, staged);
        rows[i] = reinterpret_cast<const uint32_t*>(staged);
      }
    }
    if (!is_bf16) {
      for (int64_t h = 0; h < buffers.width; h += 16) {
        transpose16(rows, reinterpret_cast<uint32_t*>(buffers.keys + h * kSlice + column), kSlice);
        for (int i = 0; i < 16; ++i) rows[i] += 16;
      }
      continue;
    }
    for (int64_t h = 0; h < dim; h += 32) {
      transpose16(rows, pairs, 16);
      for (int i = 0; i < 16; ++i) {
        rows[i] += 16;
        float* out = buffers.keys + (h + 2 * i) * kSlice + column;
        vstore(out, vload_low_bf16(pairs + 16 * i));
        vstore(out + kSlice, vload_high_bf16(pairs + 16 * i));
      }
    }
  }
}

// p = exp(score - largest) for the positions row r sees, zero for the others; rescales the row's
// running result when the largest score grew.
SIMD_INLINE void soften_row(const Rows& rows, int64_t r, int64_t slice, const Buffers& buffers) {
  float* p = buffers.p + r * kSlice;
  const int64_t last_seen = rows.position(r) + 1 - slice;
  const int64_t first_seen = rows.window_start(r) - slice;
  const int last = static_cast<int>(last_seen < kSlice ? last_seen : kSlice);
  const int first = static_cast<int>(first_seen > 0 ? first_seen : 0);
  const Vec masked = vset(-__builtin_inff());
  Vec scores[4];
  for (int i = 0; i < 4; ++i) {
    scores[i] = vkeep(vload(p + 16 * i), first - 16 * i, last - 16 * i, masked);
  }
  const float in_slice =
      vlargest(vmax(vmax(scores[0], scores[1]), vmax(scores[2], scores[3])));
  const float before = buffers.largest[r];
  const float largest = in_slice > before ? in_slice : before;
  for (int i = 0; i < 4; ++i) {
    scores[i] = vexp(vsub(scores[i], vset(largest)));
    vstore(p + 16 * i, scores[i]);
  }
  const float sum = vsum(vadd(vadd(scores[0], scores[1]), vadd(scores[2], scores[3])));
  if (largest == before) {
    buffers.total[r] += sum;
    return;
  }
  float lanes[16];
  vstore(lanes, vexp(vset(before - largest)));
  buffers.total[r] = __builtin_fmaf(buffers.total[r], lanes[0], sum);
  buffers.largest[r] = largest;
  float* out = buffers.out + r * buffers.width;
  for (int64_t h = 0; h < buffers.width; h += 16) {
    vstore(out + h, vmul(vload(out + h), vset(lanes[0])));
  }
}

// Rows that see a position of the slice are neighbours: positions ascend with the row.
template <bool IsWhole>
void attend_slice(const Rows& rows, int64_t slice, const Buffers& buffers) {
  const AttentionJob& job = rows.job;
  int64_t first_row = 0, last_row = rows.count;
  while (first_row < last_row && rows.position(first_row) < slice) first_row += rows.group;
  while (last_row > first_row && rows.window_start(last_row - 1) >= slice + kSlice) {
    last_row -= rows.group;
  }
  if (first_row >= last_row) return;
  const int64_t first_seen = rows.window_start(first_row) - slice;
  const int64_t last_seen = rows.position(last_row - 1) + 1 - slice;
  const int first = static_cast<int>(first_seen > 0 ? first_seen : 0);
  const int last = static_cast<int>(last_seen < kSlice ? last_seen : kSlice);

  const int64_t width = buffers.width, count = last_row - first_row;
  load_keys<IsWhole>(job, first, last, buffers);
  float* p = buffers.p + first_row * kSlice;
  const int columns = (last + 15) / 16 * 16;
  multiply(count, columns, buffers.q + first_row * width, width, buffers.keys, kSlice,
           job.head_dim, p, kSlice, false);
  for (int64_t r = first_row; r < last_row; ++r) soften_row(rows, r, slice, buffers);
  for (int j = first; j < last; ++j) {
    prefetch_row(job, job.v_cache, buffers.next[j]);
    read_row<IsWhole>(job, job.v_cache, job.v_scale, buffers.cached[j],
                      buffers.values + j * width);
  }
  multiply(count, width, p + first, kSlice, buffers.values + first * width, width, last - first,
           buffers.out + first_row * width, width, true);
}

template <bool IsWhole>
void attend(const Rows& rows, const int32_t* block_table, Buffers& buffers) {
  const AttentionJob& job = rows.job;
  const int64_t dim = job.head_dim, width = buffers.width;
  for (int64_t r = 0; r < rows.count; ++r) {
    const float* q = job.q + rows.token(r) * job.q_stride + rows.head(r) * dim;
    each_vector<IsWhole>(q, dim, [&](int64_t h, Vec v, int) {
      vstore(buffers.q + r * width + h, vmul(v, vset(job.scale)));
      vstore(buffers.out + r * width + h, vset(0.0f));
    });
    buffers.largest[r] = -__builtin_inff();
    buffers.total[r] = 0.0f;
  }
  const int64_t last_pos = rows.position(rows.count - 1);
  const int64_t first_slice = rows.window_start(0) / kSlice * kSlice;
  find_rows(rows, block_table, first_slice, buffers.next);
  for (int64_t slice = first_slice; slice <= last_pos; slice += kSlice) {
    memcpy(buffers.cached, buffers.next, sizeof(buffers.cached));
    if (slice + kSlice <= last_pos) find_rows(rows, block_table, slice + kSlice, buffers.next);
    attend_slice<IsWhole>(rows, slice, buffers);
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    float* out = job.out + rows.token(r) * job.out_stride + rows.head(r) * dim;
    const Vec total = vset(buffers.total[r]);
    each_vector<IsWhole>(buffers.out + r * width, dim, [=](int64_t h, Vec v, int n) {
      vstore_some(out + h, vdiv(v, total), n);
    });
  }
}

SIMD_INLINE int64_t largest_count(const AttentionJob& job) {
  return kAttentionTokens * (job.num_heads / job.num_kv_heads);
}

// One row of H values into the cache. int8: the scale is amax / 127 rounded to fp16, and the codes
// are taken against the rounded scale.
template <bool IsWhole>
SIMD_INLINE void write_row(const WriteKvJob& job, const float* x, void* cache, uint16_t* scales,
                           int64_t row) {
  const int64_t dim = job.head_dim, at = row * dim;
  if (job.cache_dtype == Dtype::f32) {
    float* out = static_cast<float*>(cache) + at;
    each_vector<IsWhole>(x, dim, [out](int64_t h, Vec v, int n) { vstore_some(out + h, v, n); });
    return;
  }
  if (job.cache_dtype == Dtype::bf16) {
    bf16* out = static_cast<bf16*>(cache) + at;
    each_vector<IsWhole>(x, dim, [out](int64_t h, Vec v, int n) { vstore_some(out + h, v, n); });
    return;
  }
  uint32_t bits = 0;
  each_vector<IsWhole>(x, dim, [&bits](int64_t, Vec v, int) {
    const uint32_t here = largest_magnitude(v, v);
    bits = here > bits ? here : bits;
  });
  const bool is_finite = bits < 0x7f800000u;
  const float wanted = float_of(bits) / 127.0f;
  const uint16_t half = !is_finite ? 0x7e00 : wanted > 65504.0f ? 0x7bff : float_to_half(wanted);
  scales[row] = half;
  const float scale = half_to_float(half);
  const Vec inverse = vset(is_finite && scale > 0.0f ? 1.0f / scale : 0.0f);
  int8_t* out = static_cast<int8_t*>(cache) + at;
  each_vector<IsWhole>(x, dim, [=](int64_t h, Vec v, int n) {
    const Vec code = vmul(is_finite ? v : vset(0.0f), inverse);
    vstore_some(out + h, vmin(vset(127.0f), vmax(vset(-127.0f), code)), n);
  });
}

template <bool IsWhole>
void write_token(const WriteKvJob& job, int64_t token) {
  const float* k = job.k + token * job.k_stride;
  const float* v = job.v + token * job.v_stride;
  const int64_t slot = job.slots[token];
  for (int64_t head = 0; head < job.num_kv_heads; ++head) {
    const int64_t row = (slot / job.block_size * job.num_kv_heads + head) * job.block_size +
                        slot % job.block_size;
    write_row<IsWhole>(job, k + head * job.head_dim, job.k_cache, job.k_scale, row);
    write_row<IsWhole>(job, v + head * job.head_dim, job.v_cache, job.v_scale, row);
  }
}

}  // namespace

int64_t attention_scratch_floats(const AttentionJob& job) {
  const int64_t count = largest_count(job);
  return count * (2 * padded(job.head_dim) + kSlice + 2) + 3 * kSlice * padded(job.head_dim);
}

void attention(const AttentionJob& job, int64_t sequence, int64_t first_row, int64_t last_row,
               int64_t kv_head, float* scratch) {
  const int64_t count = largest_count(job), width = padded(job.head_dim);
  Buffers buffers;
  buffers.width = width;
  buffers.keys = scratch;
  buffers.values = buffers.keys + kSlice * width;
  buffers.staged = buffers.values + kSlice * width;
  buffers.q = buffers.staged + kSlice * width;
  buffers.out = buffers.q + count * width;
  buffers.p = buffers.out + count * width;
  buffers.largest = buffers.p + count * kSlice;
  buffers.total = buffers.largest + count;

  const int64_t start = job.query_starts[sequence], end = job.query_starts[sequence + 1];
  const int64_t first_pos = job.context_lens[sequence] - (end - start) + (first_row - start);
  const int64_t group = job.num_heads / job.num_kv_heads;
  const Rows rows = {job,       kv_head, group, first_row, (last_row - first_row) * group,
                     first_pos};
  const int32_t* block_table = job.block_tables + sequence * job.max_blocks;
  if (is_whole(job.head_dim)) {
    attend<true>(rows, block_table, buffers);
  } else {
    attend<false>(rows, block_table, buffers);
  }
}

void write_kv(const WriteKvJob& job, int64_t first_row, int64_t last_row) {
  const bool whole = is_whole(job.head_dim);
  for (int64_t token = first_row; token < last_row; ++token) {
    whole ? write_token<true>(job, token) : write_token<false>(job, token);
  }
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice

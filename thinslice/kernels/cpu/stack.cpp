#include "stack.h"

#include <algorithm>

#include "dispatch.h"
#include "paged.h"
#include "threads.h"

namespace thinslice {

namespace {

// Working memory of a layer: each part [T, its width] fp32.
struct Buffers {
  float* normed;
  float* q;
  float* k;
  float* v;
  float* attended;
  float* inner;
};

int64_t largest_block(const Stack& stack) {
  int64_t largest = 0;
  for (const Layer& layer : stack.layers) {
    for (const FfnBlock& block : layer.blocks) largest = std::max(largest, block.gate.rows);
  }
  return largest;
}

// Attention and feed-forward take turns in the same memory.
Buffers carve(const Stack& stack, const StackInputs& in) {
  Buffers b;
  b.normed = in.workspace;
  b.q = b.normed + in.num_tokens * stack.hidden_size;
  b.k = b.q + in.num_tokens * stack.q_size();
  b.v = b.k + in.num_tokens * stack.kv_size();
  b.attended = b.v + in.num_tokens * stack.kv_size();
  b.inner = b.q;
  return b;
}

Target target(const Matrix& matrix, float* out, const float* residual = nullptr) {
  return {matrix.panels, matrix.format, matrix.width, matrix.rows,
          {matrix.bias, residual, matrix.rows, out, matrix.rows}};
}

LinearJob linear_job(const float* x, int64_t rows, int64_t in_features) {
  LinearJob job{};
  job.x = x;
  job.rows = rows;
  job.in_features = in_features;
  job.x_stride = in_features;
  return job;
}

// Rows a thread takes at a time when a row is `dim` elements: about 16 KiB.
int64_t row_grain(int64_t dim) { return std::max<int64_t>(1, 4096 / dim); }

void normalize(const float* x, const float* weight, float* out, int64_t rows, int64_t dim,
               float eps, int64_t out_stride) {
  const RmsNormJob job = {x, weight, out, dim, out_stride, dim, eps};
  const KernelTable& table = kernels();
  parallel_for(rows, row_grain(dim),
               [&](int64_t first, int64_t last) { table.rms_norm(job, first, last); });
}

void normalize(const float* x, const float* weight, float* out, int64_t rows, int64_t dim,
               float eps) {
  normalize(x, weight, out, rows, dim, eps, dim);
}

void rotate(const Stack& stack, const StackInputs& in, float* x, int64_t num_heads) {
  RopeJob job{};
  job.x = x;
  job.token_stride = num_heads * stack.head_dim;
  job.num_heads = num_heads;
  job.head_dim = stack.head_dim;
  job.rotary_dim = stack.head_dim;
  job.positions = in.rows;
  job.num_tokens = in.num_tokens;
  job.num_positions = in.num_tokens;
  job.cos = in.cos;
  job.sin = in.sin;
  rope(job);
}

void store_kv(const Stack& stack, const Layer& layer, const StackInputs& in, const Buffers& b) {
  WriteKvJob job = layer.cache;
  job.k = b.k;
  job.v = b.v;
  job.k_stride = job.v_stride = stack.kv_size();
  job.slots = in.slots;
  job.num_tokens = in.num_tokens;
  write_kv(job);
}

void attend(const Stack& stack, const Layer& layer, const StackInputs& in, const Buffers& b) {
  const WriteKvJob& cache = layer.cache;
  AttentionJob job{};
  job.q = b.q;
  job.out = b.attended;
  job.q_stride = job.out_stride = stack.q_size();
  job.k_cache = cache.k_cache;
  job.v_cache = cache.v_cache;
  job.k_scale = cache.k_scale;
  job.v_scale = cache.v_scale;
  job.cache_dtype = cache.cache_dtype;
  job.block_tables = in.block_tables;
  job.max_blocks = in.max_blocks;
  job.query_starts = in.query_starts;
  job.context_lens = in.context_lens;
  job.num_sequences = in.num_sequences;
  job.num_tokens = in.num_tokens;
  job.num_blocks = cache.num_blocks;
  job.num_heads = stack.num_heads;
  job.num_kv_heads = stack.num_kv_heads;
  job.head_dim = stack.head_dim;
  job.block_size = cache.block_size;
  job.window = layer.window;
  job.scale = stack.scale;
  attention(job);
}

void add_attention(const Stack& stack, const Layer& layer, const StackInputs& in,
                   const Buffers& b) {
  normalize(in.x, layer.input_norm, b.normed, in.num_tokens, stack.hidden_size, stack.eps);
  LinearJob qkv = linear_job(b.normed, in.num_tokens, stack.hidden_size);
  qkv.targets[0] = target(layer.q, b.q);
  qkv.targets[1] = target(layer.k, b.k);
  qkv.targets[2] = target(layer.v, b.v);
  qkv.num_targets = 3;
  linear(qkv);
  if (layer.q_norm) {
    normalize(b.q, layer.q_norm, b.q, in.num_tokens * stack.num_heads, stack.head_dim, stack.eps);
    normalize(b.k, layer.k_norm, b.k, in.num_tokens * stack.num_kv_heads, stack.head_dim,
              stack.eps);
  }
  rotate(stack, in, b.q, stack.num_heads);
  rotate(stack, in, b.k, stack.num_kv_heads);
  store_kv(stack, layer, in, b);
  attend(stack, layer, in, b);
  LinearJob out = linear_job(b.attended, in.num_tokens, stack.q_size());
  out.targets[0] = target(layer.o, in.x, in.x);
  out.num_targets = 1;
  linear(out);
}

void add_feed_forward(const Stack& stack, const Layer& layer, const StackInputs& in,
                      const Buffers& b) {
  normalize(in.x, layer.post_attention_norm, b.normed, in.num_tokens, stack.hidden_size,
            stack.eps);
  for (const FfnBlock& block : layer.blocks) {
    LinearJob inner = linear_job(b.normed, in.num_tokens, stack.hidden_size);
    inner.targets[0] = target(block.gate, b.inner);
    inner.targets[1] = target(block.up, b.inner);
    inner.num_targets = 2;
    inner.is_swiglu = true;
    linear(inner);
    LinearJob out = linear_job(b.inner, in.num_tokens, block.gate.rows);
    out.targets[0] = target(block.down, in.x, in.x);
    out.num_targets = 1;
    linear(out);
  }
}

}  // namespace

int64_t Stack::workspace(int64_t num_tokens) const {
  const int64_t attention = 2 * q_size() + 2 * kv_size();
  return num_tokens * (hidden_size + std::max(attention, largest_block(*this)));
}

void run_stack(const Stack& stack, const StackInputs& in) {
  const Buffers buffers = carve(stack, in);
  for (const Layer& layer : stack.layers) {
    add_attention(stack, layer, in, buffers);
    add_feed_forward(stack, layer, in, buffers);
  }
}

void run_prediction(const Stack& stack, const Pairing& pairing, const StackInputs& in,
                    const float* hidden, const float* token) {
  const int64_t rows = in.num_tokens, size = stack.hidden_size;
  float* pair = in.workspace + stack.workspace(rows);
  normalize(hidden, pairing.hidden_norm, pair, rows, size, stack.eps, 2 * size);
  normalize(token, pairing.token_norm, pair + size, rows, size, stack.eps, 2 * size);
  LinearJob job = linear_job(pair, rows, 2 * size);
  job.targets[0] = target(pairing.projection, in.x);
  job.num_targets = 1;
  linear(job);
  run_stack(stack, in);
  normalize(in.x, pairing.final_norm, in.x, rows, size, stack.eps);
}

}  // namespace thinslice

// All layers of a decoder whose packed weights lie in memory, in one call.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"
#include "types.h"

namespace thinslice {

struct Matrix {
  const uint8_t* panels;
  Format format;
  Width width;
  int64_t rows;
  const float* bias;  // or null
};

struct FfnBlock {
  Matrix gate, up, down;
};

// Addresses stay valid as long as the Python object that made them holds the tensors.
struct Layer {
  const float* input_norm;
  const float* q_norm;  // or null
  const float* k_norm;  // or null
  const float* post_attention_norm;
  Matrix q, k, v, o;
  std::vector<FfnBlock> blocks;
  int64_t window;
  WriteKvJob cache;  // its cache fields only
};

// What stands around the layer of a prediction layer: two norms, whose results lie side by side
// and become the residual stream by a projection, and a norm at the end.
struct Pairing {
  const float* hidden_norm;
  const float* token_norm;
  Matrix projection;  // [D, 2 D]
  const float* final_norm;
};

struct Stack {
  int64_t hidden_size;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  float eps;
  float scale;  // of attention's scores
  std::vector<Layer> layers;

  int64_t q_size() const { return num_heads * head_dim; }
  int64_t kv_size() const { return num_kv_heads * head_dim; }
  // fp32 values of working memory for so many tokens.
  int64_t workspace(int64_t num_tokens) const;
};

struct StackInputs {
  float* x;  // [T, D], the residual stream, in place
  int64_t num_tokens;
  const int64_t* rows;  // 0..T-1: which row of cos and sin belongs to each token
  const float* cos;     // [T, H / 2]
  const float* sin;
  const int64_t* slots;
  const int32_t* block_tables;
  int64_t max_blocks;
  const int32_t* query_starts;
  const int32_t* context_lens;
  int64_t num_sequences;
  float* workspace;
};

// Throws std::invalid_argument for an index outside its tensor.
void run_stack(const Stack& stack, const StackInputs& inputs);

// The same from rows of a model's residual stream and of the embeddings of the tokens that follow,
// [T, D] each. `inputs.x` is only written; the workspace has 2 D values more for each token.
void run_prediction(const Stack& stack, const Pairing& pairing, const StackInputs& inputs,
                    const float* hidden, const float* token);

}  // namespace thinslice

#include "bind_stack.h"

#include "border.h"
#include "stack.h"

namespace thinslice {

namespace {

// (address, format, width, rows, bias)
Matrix read_matrix(const nb::handle& o) {
  const nb::tuple t = nb::cast<nb::tuple>(o);
  return {pointer<const uint8_t>(nb::cast<Address>(t[0])),
          static_cast<Format>(nb::cast<int>(t[1])), static_cast<Width>(nb::cast<int>(t[2])),
          nb::cast<int64_t>(t[3]), pointer<const float>(nb::cast<Address>(t[4]))};
}

// The four norms; q, k, v, o; (gate, up, down) of each block.
void add_layer(Stack& stack, const nb::tuple& norms, const nb::tuple& attention,
               const nb::list& blocks, int64_t window, const nb::handle& cache) {
  Layer layer;
  layer.input_norm = pointer<const float>(nb::cast<Address>(norms[0]));
  layer.q_norm = pointer<const float>(nb::cast<Address>(norms[1]));
  layer.k_norm = pointer<const float>(nb::cast<Address>(norms[2]));
  layer.post_attention_norm = pointer<const float>(nb::cast<Address>(norms[3]));
  layer.q = read_matrix(attention[0]);
  layer.k = read_matrix(attention[1]);
  layer.v = read_matrix(attention[2]);
  layer.o = read_matrix(attention[3]);
  for (const nb::handle& o : blocks) {
    const nb::tuple t = nb::cast<nb::tuple>(o);
    layer.blocks.push_back({read_matrix(t[0]), read_matrix(t[1]), read_matrix(t[2])});
  }
  layer.window = window;
  layer.cache = {};
  read_cache(cache, layer.cache);
  stack.layers.push_back(layer);
}

// (x, tokens, rows, cos, sin, slots); (block_tables, max_blocks, query_starts, context_lens,
// sequences)
StackInputs read_inputs(const nb::tuple& tokens, const nb::tuple& sequences, Address workspace) {
  StackInputs in;
  in.x = pointer<float>(nb::cast<Address>(tokens[0]));
  in.num_tokens = nb::cast<int64_t>(tokens[1]);
  in.rows = pointer<const int64_t>(nb::cast<Address>(tokens[2]));
  in.cos = pointer<const float>(nb::cast<Address>(tokens[3]));
  in.sin = pointer<const float>(nb::cast<Address>(tokens[4]));
  in.slots = pointer<const int64_t>(nb::cast<Address>(tokens[5]));
  in.block_tables = pointer<const int32_t>(nb::cast<Address>(sequences[0]));
  in.max_blocks = nb::cast<int64_t>(sequences[1]);
  in.query_starts = pointer<const int32_t>(nb::cast<Address>(sequences[2]));
  in.context_lens = pointer<const int32_t>(nb::cast<Address>(sequences[3]));
  in.num_sequences = nb::cast<int64_t>(sequences[4]);
  in.workspace = pointer<float>(workspace);
  return in;
}

void run(const Stack& stack, const nb::tuple& tokens, const nb::tuple& sequences,
         Address workspace) {
  const StackInputs in = read_inputs(tokens, sequences, workspace);
  const GilRelease release;
  run_stack(stack, in);
}

// pairing: hidden norm, token norm, projection, final norm; rows: hidden, token.
void predict(const Stack& stack, const nb::tuple& tokens, const nb::tuple& sequences,
             Address workspace, const nb::tuple& pairing, const nb::tuple& rows) {
  const StackInputs in = read_inputs(tokens, sequences, workspace);
  const Pairing around = {pointer<const float>(nb::cast<Address>(pairing[0])),
                          pointer<const float>(nb::cast<Address>(pairing[1])),
                          read_matrix(pairing[2]),
                          pointer<const float>(nb::cast<Address>(pairing[3]))};
  const float* hidden = pointer<const float>(nb::cast<Address>(rows[0]));
  const float* token = pointer<const float>(nb::cast<Address>(rows[1]));
  const GilRelease release;
  run_prediction(stack, around, in, hidden, token);
}

}  // namespace

void bind_stack(nb::module_& m) {
  nb::class_<Stack>(m, "Stack")
      .def("__init__",
           [](Stack* self, int64_t hidden_size, int64_t num_heads, int64_t num_kv_heads,
              int64_t head_dim, float eps, float scale) {
             new (self) Stack{hidden_size, num_heads, num_kv_heads, head_dim, eps, scale, {}};
           })
      .def("add_layer", add_layer)
      .def("workspace", &Stack::workspace)
      .def("run", run)
      .def("predict", predict);
}

}  // namespace thinslice

// The border to Python: addresses and strides as integers, checked by thinslice/kernels/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bind_packing.h"
#include "bind_stack.h"
#include "border.h"
#include "dispatch.h"
#include "linear.h"
#include "paged.h"
#include "threads.h"

namespace nb = nanobind;

namespace thinslice {

namespace {

// (panels, format, width, out_features, bias, residual, residual_stride, out, out_stride)
Target read_target(const nb::tuple& t) {
  Target target;
  target.panels = pointer<const uint8_t>(nb::cast<Address>(t[0]));
  target.format = static_cast<Format>(nb::cast<int>(t[1]));
  target.width = static_cast<Width>(nb::cast<int>(t[2]));
  target.out_features = nb::cast<int64_t>(t[3]);
  target.epilogue.bias = pointer<const float>(nb::cast<Address>(t[4]));
  target.epilogue.residual = pointer<const float>(nb::cast<Address>(t[5]));
  target.epilogue.residual_stride = nb::cast<int64_t>(t[6]);
  target.epilogue.out = pointer<float>(nb::cast<Address>(t[7]));
  target.epilogue.out_stride = nb::cast<int64_t>(t[8]);
  return target;
}

void py_linear(Address x, int64_t rows, int64_t in_features, int64_t x_stride,
               const nb::tuple& target) {
  LinearJob job{};
  job.x = pointer<const float>(x);
  job.rows = rows;
  job.in_features = in_features;
  job.x_stride = x_stride;
  job.targets[0] = read_target(target);
  job.num_targets = 1;
  const GilRelease release;
  linear(job);
}

// Rows a thread takes at a time when a row is `dim` elements: about 16 KiB.
int64_t row_grain(int64_t dim) { return std::max<int64_t>(1, 4096 / std::max<int64_t>(1, dim)); }

void py_rms_norm(int64_t rows, Address x, int64_t x_stride, Address weight, Address out,
                 int64_t out_stride, int64_t dim, float eps) {
  const RmsNormJob job = {pointer<const float>(x), pointer<const float>(weight),
                          pointer<float>(out),     x_stride,
                          out_stride,              dim,
                          eps};
  const GilRelease release;
  const KernelTable& table = kernels();
  parallel_for(rows, row_grain(dim),
               [&](int64_t first, int64_t last) { table.rms_norm(job, first, last); });
}

void py_rope(Address x, int64_t num_tokens, int64_t token_stride, int64_t num_heads,
             int64_t head_dim, int64_t rotary_dim, Address positions, Address cos, Address sin,
             int64_t num_positions) {
  RopeJob job;
  job.x = pointer<float>(x);
  job.num_tokens = num_tokens;
  job.token_stride = token_stride;
  job.num_heads = num_heads;
  job.head_dim = head_dim;
  job.rotary_dim = rotary_dim;
  job.positions = pointer<const int64_t>(positions);
  job.cos = pointer<const float>(cos);
  job.sin = pointer<const float>(sin);
  job.num_positions = num_positions;
  const GilRelease release;
  rope(job);
}

void py_silu_mul(int64_t rows, Address gate, int64_t gate_stride, Address up, int64_t up_stride,
                 Address out, int64_t out_stride, int64_t dim) {
  const SiluMulJob job = {pointer<const float>(gate), pointer<const float>(up), pointer<float>(out),
                          gate_stride,                up_stride,                out_stride,
                          dim};
  const GilRelease release;
  const KernelTable& table = kernels();
  parallel_for(rows, row_grain(dim),
               [&](int64_t first, int64_t last) { table.silu_mul(job, first, last); });
}

void py_write_kv(const nb::handle& cache, Address k, int64_t k_stride, Address v, int64_t v_stride,
                 Address slots, int64_t num_tokens) {
  WriteKvJob job;
  read_cache(cache, job);
  job.k = pointer<const float>(k);
  job.k_stride = k_stride;
  job.v = pointer<const float>(v);
  job.v_stride = v_stride;
  job.slots = pointer<const int64_t>(slots);
  job.num_tokens = num_tokens;
  const GilRelease release;
  write_kv(job);
}

// (q, stride, out, stride, tokens, heads)
void read_queries(const nb::tuple& t, AttentionJob& job) {
  job.q = pointer<const float>(nb::cast<Address>(t[0]));
  job.q_stride = nb::cast<int64_t>(t[1]);
  job.out = pointer<float>(nb::cast<Address>(t[2]));
  job.out_stride = nb::cast<int64_t>(t[3]);
  job.num_tokens = nb::cast<int64_t>(t[4]);
  job.num_heads = nb::cast<int64_t>(t[5]);
}

// (block_tables, max_blocks, query_starts, context_lens, sequences)
void read_sequences(const nb::tuple& t, AttentionJob& job) {
  job.block_tables = pointer<const int32_t>(nb::cast<Address>(t[0]));
  job.max_blocks = nb::cast<int64_t>(t[1]);
  job.query_starts = pointer<const int32_t>(nb::cast<Address>(t[2]));
  job.context_lens = pointer<const int32_t>(nb::cast<Address>(t[3]));
  job.num_sequences = nb::cast<int64_t>(t[4]);
}

void py_attention(const nb::handle& cache, const nb::tuple& queries, const nb::tuple& sequences,
                  float scale, int64_t window) {
  AttentionJob job;
  read_cache(cache, job);
  read_queries(queries, job);
  read_sequences(sequences, job);
  job.scale = scale;
  job.window = window;
  const GilRelease release;
  attention(job);
}

uint32_t py_read_memory(Address data, int64_t num_bytes) {
  const GilRelease release;
  return read_memory(pointer<const uint8_t>(data), num_bytes);
}

}  // namespace

NB_MODULE(_native, m) {
  // At the interpreter's end a daemon thread stays where it is, and what its frames hold is never let
  // go of. That is no leak of this module, and nothing that a user could do anything about.
  nb::set_leak_warnings(false);
  m.def("available_isas", available_isas);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("set_isa", set_isa);
  m.def("num_threads", num_threads);
  m.def("set_num_threads", set_num_threads, nb::call_guard<GilRelease>());
  m.def("panel_bytes", [](int format, int64_t in_features) {
    return panel_bytes(static_cast<Format>(format), in_features);
  });
  m.def("linear", py_linear);
  m.def("rms_norm", py_rms_norm);
  m.def("rope", py_rope);
  m.def("silu_mul", py_silu_mul);
  m.def("write_kv", py_write_kv);
  m.def("attention", py_attention);
  m.def("read_memory", py_read_memory);
  bind_packing(m);
  bind_stack(m);
}

}  // namespace thinslice

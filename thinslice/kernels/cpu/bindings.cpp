// The border to Python: addresses and strides as integers, checked by thinslice/kernels/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bind_stack.h"
#include "border.h"
#include "dispatch.h"
#include "linear.h"
#include "paged.h"
#include "repack.h"
#include "threads.h"

namespace nb = nanobind;

namespace thinslice {

namespace {

// (panels, format, width, out_features, bias, residual, residual_stride, out, out_stride)
Target read_target(const nb::tuple& t, Dtype out_dtype) {
  Target target;
  target.panels = pointer<const uint8_t>(nb::cast<Address>(t[0]));
  target.format = static_cast<Format>(nb::cast<int>(t[1]));
  target.width = static_cast<Width>(nb::cast<int>(t[2]));
  target.out_features = nb::cast<int64_t>(t[3]);
  target.epilogue.bias = pointer<const float>(nb::cast<Address>(t[4]));
  target.epilogue.residual = pointer<const void>(nb::cast<Address>(t[5]));
  target.epilogue.residual_stride = nb::cast<int64_t>(t[6]);
  target.epilogue.out = pointer(nb::cast<Address>(t[7]));
  target.epilogue.out_stride = nb::cast<int64_t>(t[8]);
  target.epilogue.out_dtype = out_dtype;
  return target;
}

void py_linear(Address x, int x_dtype, int64_t rows, int64_t in_features, int64_t x_stride,
               int out_dtype, bool is_swiglu, const nb::list& targets) {
  LinearJob job;
  job.x = pointer<const void>(x);
  job.x_dtype = static_cast<Dtype>(x_dtype);
  job.rows = rows;
  job.in_features = in_features;
  job.x_stride = x_stride;
  job.is_swiglu = is_swiglu;
  job.num_targets = static_cast<int>(targets.size());
  if (job.num_targets > kMaxTargets) throw nb::value_error("too many matrices in one call");
  for (int i = 0; i < job.num_targets; ++i) {
    job.targets[i] = read_target(nb::cast<nb::tuple>(targets[i]), static_cast<Dtype>(out_dtype));
  }
  const GilRelease release;
  linear(job);
}

// Rows a thread takes at a time when a row is `dim` elements: about 16 KiB.
int64_t row_grain(int64_t dim) { return std::max<int64_t>(1, 4096 / std::max<int64_t>(1, dim)); }

void py_rms_norm(int64_t rows, Address x, int64_t x_stride, Address residual,
                 int64_t residual_stride, Address weight, Address out, int64_t out_stride,
                 int64_t dim, int dtype, float eps) {
  const RmsNormJob job = {pointer<const void>(x), pointer(residual), pointer<const float>(weight),
                          pointer(out),           x_stride,          residual_stride,
                          out_stride,             dim,               static_cast<Dtype>(dtype),
                          eps};
  const GilRelease release;
  const KernelTable& table = kernels();
  parallel_for(rows, row_grain(dim),
               [&](int64_t first, int64_t last) { table.rms_norm(job, first, last); });
}

void py_rope(Address x, int dtype, int64_t num_tokens, int64_t token_stride, int64_t num_heads,
             int64_t head_dim, int64_t rotary_dim, Address positions, Address cos, Address sin,
             int64_t num_positions) {
  RopeJob job;
  job.x = pointer(x);
  job.dtype = static_cast<Dtype>(dtype);
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
                 Address out, int64_t out_stride, int64_t dim, int dtype) {
  const SiluMulJob job = {pointer<const void>(gate), pointer<const void>(up), pointer(out),
                          gate_stride,               up_stride,               out_stride,
                          dim,                       static_cast<Dtype>(dtype)};
  const GilRelease release;
  const KernelTable& table = kernels();
  parallel_for(rows, row_grain(dim),
               [&](int64_t first, int64_t last) { table.silu_mul(job, first, last); });
}

void py_write_kv(const nb::handle& cache, Address k, int64_t k_stride, Address v, int64_t v_stride,
                 int dtype, Address slots, int64_t num_tokens) {
  WriteKvJob job;
  read_cache(cache, job);
  job.k = pointer<const void>(k);
  job.k_stride = k_stride;
  job.v = pointer<const void>(v);
  job.v_stride = v_stride;
  job.dtype = static_cast<Dtype>(dtype);
  job.slots = pointer<const int64_t>(slots);
  job.num_tokens = num_tokens;
  const GilRelease release;
  write_kv(job);
}

// (q, stride, out, stride, dtype, tokens, heads)
void read_queries(const nb::tuple& t, AttentionJob& job) {
  job.q = pointer<const void>(nb::cast<Address>(t[0]));
  job.q_stride = nb::cast<int64_t>(t[1]);
  job.out = pointer(nb::cast<Address>(t[2]));
  job.out_stride = nb::cast<int64_t>(t[3]);
  job.dtype = static_cast<Dtype>(nb::cast<int>(t[4]));
  job.num_tokens = nb::cast<int64_t>(t[5]);
  job.num_heads = nb::cast<int64_t>(t[6]);
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

void py_repack(Address blocks, int type, int64_t rows, int64_t groups, Address panels) {
  const RepackJob job = {pointer<const uint8_t>(blocks), static_cast<GgmlType>(type), rows, groups,
                         pointer<uint8_t>(panels)};
  const GilRelease release;
  repack(job);
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
  m.def("panel_bytes", [](int format, int64_t groups) {
    return panel_bytes(static_cast<Format>(format), groups);
  });
  m.def("linear", py_linear);
  m.def("rms_norm", py_rms_norm);
  m.def("rope", py_rope);
  m.def("silu_mul", py_silu_mul);
  m.def("write_kv", py_write_kv);
  m.def("attention", py_attention);
  m.def("repack", py_repack);
  m.def("read_memory", py_read_memory);
  bind_stack(m);
}

}  // namespace thinslice

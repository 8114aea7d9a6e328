// The border to Python: addresses and strides as integers, checked by thinslice/kernels/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "dispatch.h"
#include "linear.h"
#include "scratch.h"
#include "threads.h"

namespace nb = nanobind;

namespace thinslice {

namespace {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
T field(const nb::handle& object, const char* name) {
  return nb::cast<T>(object.attr(name));
}

// (panels, format, out_features, bias, residual, residual_stride, out, out_stride)
Target read_target(const nb::tuple& t, Dtype out_dtype) {
  Target target;
  target.panels = pointer<const uint8_t>(nb::cast<Address>(t[0]));
  target.format = static_cast<Format>(nb::cast<int>(t[1]));
  target.out_features = nb::cast<int64_t>(t[2]);
  target.epilogue.bias = pointer<const float>(nb::cast<Address>(t[3]));
  target.epilogue.residual = pointer<const void>(nb::cast<Address>(t[4]));
  target.epilogue.residual_stride = nb::cast<int64_t>(t[5]);
  target.epilogue.out = pointer(nb::cast<Address>(t[6]));
  target.epilogue.out_stride = nb::cast<int64_t>(t[7]);
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
  const nb::gil_scoped_release release;
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
  const nb::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(rows, row_grain(dim),
               [&](int64_t first, int64_t last) { table.rms_norm(job, first, last); });
}

void py_rope(int64_t rows, Address x, int64_t token_stride, int64_t num_heads, int64_t head_dim,
             int64_t rotary_dim, Address positions, Address cos, Address sin, int dtype) {
  const RopeJob job = {pointer(x),
                       token_stride,
                       num_heads,
                       head_dim,
                       rotary_dim,
                       pointer<const int64_t>(positions),
                       pointer<const float>(cos),
                       pointer<const float>(sin),
                       static_cast<Dtype>(dtype)};
  const nb::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(rows, row_grain(num_heads * head_dim),
               [&](int64_t first, int64_t last) { table.rope(job, first, last); });
}

void py_silu_mul(int64_t rows, Address gate, int64_t gate_stride, Address up, int64_t up_stride,
                 Address out, int64_t out_stride, int64_t dim, int dtype) {
  const SiluMulJob job = {pointer<const void>(gate), pointer<const void>(up), pointer(out),
                          gate_stride,               up_stride,               out_stride,
                          dim,                       static_cast<Dtype>(dtype)};
  const nb::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(rows, row_grain(dim),
               [&](int64_t first, int64_t last) { table.silu_mul(job, first, last); });
}

void py_write_kv(int64_t rows, Address k, int64_t k_stride, Address v, int64_t v_stride, int dtype,
                 Address k_cache, Address v_cache, Address k_scale, Address v_scale,
                 int cache_dtype, Address slots, int64_t num_kv_heads, int64_t head_dim,
                 int64_t block_size) {
  WriteKvJob job;
  job.k = pointer<const void>(k);
  job.v = pointer<const void>(v);
  job.dtype = static_cast<Dtype>(dtype);
  job.k_stride = k_stride;
  job.v_stride = v_stride;
  job.k_cache = pointer(k_cache);
  job.v_cache = pointer(v_cache);
  job.k_scale = pointer<uint16_t>(k_scale);
  job.v_scale = pointer<uint16_t>(v_scale);
  job.cache_dtype = static_cast<Dtype>(cache_dtype);
  job.slots = pointer<const int64_t>(slots);
  job.num_kv_heads = num_kv_heads;
  job.head_dim = head_dim;
  job.block_size = block_size;
  const nb::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(rows, row_grain(2 * num_kv_heads * head_dim),
               [&](int64_t first, int64_t last) { table.write_kv(job, first, last); });
}

// The job as an object with the fields of AttentionJob; see native.py.
AttentionJob read_attention(const nb::handle& o) {
  AttentionJob job;
  job.q = pointer<const void>(field<Address>(o, "q"));
  job.out = pointer(field<Address>(o, "out"));
  job.dtype = static_cast<Dtype>(field<int>(o, "dtype"));
  job.q_stride = field<int64_t>(o, "q_stride");
  job.out_stride = field<int64_t>(o, "out_stride");
  job.k_cache = pointer<const void>(field<Address>(o, "k_cache"));
  job.v_cache = pointer<const void>(field<Address>(o, "v_cache"));
  job.k_scale = pointer<const uint16_t>(field<Address>(o, "k_scale"));
  job.v_scale = pointer<const uint16_t>(field<Address>(o, "v_scale"));
  job.cache_dtype = static_cast<Dtype>(field<int>(o, "cache_dtype"));
  job.block_tables = pointer<const int32_t>(field<Address>(o, "block_tables"));
  job.max_blocks = field<int64_t>(o, "max_blocks");
  job.query_starts = pointer<const int32_t>(field<Address>(o, "query_starts"));
  job.context_lens = pointer<const int32_t>(field<Address>(o, "context_lens"));
  job.num_sequences = field<int64_t>(o, "num_sequences");
  job.num_heads = field<int64_t>(o, "num_heads");
  job.num_kv_heads = field<int64_t>(o, "num_kv_heads");
  job.head_dim = field<int64_t>(o, "head_dim");
  job.block_size = field<int64_t>(o, "block_size");
  job.window = field<int64_t>(o, "window");
  job.scale = field<float>(o, "scale");
  return job;
}

struct AttentionPiece {
  int64_t sequence;
  int64_t first_row;
  int64_t last_row;
};

void py_attention(const nb::handle& object) {
  const AttentionJob job = read_attention(object);
  const nb::gil_scoped_release release;
  std::vector<AttentionPiece> pieces;
  for (int64_t s = 0; s < job.num_sequences; ++s) {
    const int64_t end = job.query_starts[s + 1];
    for (int64_t row = job.query_starts[s]; row < end; row += kAttentionTokens) {
      pieces.push_back({s, row, std::min<int64_t>(end, row + kAttentionTokens)});
    }
  }
  // Longest first: late pieces of a prompt see more positions.
  std::reverse(pieces.begin(), pieces.end());
  const KernelTable& table = kernels();
  const std::size_t bytes = table.attention_scratch_floats(job) * sizeof(float);
  const int64_t items = static_cast<int64_t>(pieces.size()) * job.num_kv_heads;
  parallel_for(items, 1, [&](int64_t first, int64_t last) {
    float* scratch = reinterpret_cast<float*>(thread_scratch(bytes));
    for (int64_t i = first; i < last; ++i) {
      const AttentionPiece& piece = pieces[i / job.num_kv_heads];
      table.attention(job, piece.sequence, piece.first_row, piece.last_row, i % job.num_kv_heads,
                      scratch);
    }
  });
}

uint32_t py_read_memory(Address data, int64_t num_bytes) {
  const nb::gil_scoped_release release;
  return read_memory(pointer<const uint8_t>(data), num_bytes);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("available_isas", available_isas);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("set_isa", set_isa);
  m.def("num_threads", num_threads);
  m.def("set_num_threads", set_num_threads, nb::call_guard<nb::gil_scoped_release>());
  m.def("panel_bytes", [](int format, int64_t groups) {
    return panel_bytes(static_cast<Format>(format), groups);
  });
  m.def("linear", py_linear);
  m.def("rms_norm", py_rms_norm);
  m.def("rope", py_rope);
  m.def("silu_mul", py_silu_mul);
  m.def("write_kv", py_write_kv);
  m.def("attention", py_attention);
  m.def("read_memory", py_read_memory);
}

}  // namespace thinslice

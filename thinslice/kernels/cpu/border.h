// What crosses from Python: addresses as integers, and the attributes of a cache.
#pragma once

#include <nanobind/nanobind.h>

#include "types.h"

namespace thinslice {

namespace nb = nanobind;

using Address = uintptr_t;

template <typename T = void>
inline T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
T field(const nb::handle& object, const char* name) {
  return nb::cast<T>(object.attr(name));
}

// The attributes of a cache object that both jobs share; see native_attention.py.
template <typename Job>
void read_cache(const nb::handle& o, Job& job) {
  job.cache_dtype = static_cast<Dtype>(field<int>(o, "dtype"));
  job.num_blocks = field<int64_t>(o, "num_blocks");
  job.num_kv_heads = field<int64_t>(o, "num_kv_heads");
  job.block_size = field<int64_t>(o, "block_size");
  job.head_dim = field<int64_t>(o, "head_dim");
  job.k_cache = pointer(field<Address>(o, "k"));
  job.v_cache = pointer(field<Address>(o, "v"));
  job.k_scale = pointer<uint16_t>(field<Address>(o, "k_scale"));
  job.v_scale = pointer<uint16_t>(field<Address>(o, "v_scale"));
}

}  // namespace thinslice

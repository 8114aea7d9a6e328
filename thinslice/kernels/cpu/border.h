// What crosses from Python: addresses as integers, the attributes of a cache, and Python's lock.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>
#include <thread>

#include "types.h"

namespace thinslice {

namespace nb = nanobind;

using Address = uintptr_t;

// Lets other threads run Python while it is in scope. A thread that asks for Python's lock once the
// interpreter has ended is ended itself, up to Python 3.13, by pthread_exit: glibc unwinds the
// stack for that, and aborts the process at nanobind's noexcept frames. Here the unwinding is caught
// and the thread left to wait for the end of the process, which is what Python 3.14 does. To ask
// whether the interpreter ends, before asking for the lock, would be too early: it may end between.
class GilRelease {
 public:
  GilRelease() noexcept : state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

template <typename T = void>
inline T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
T field(const nb::handle& object, const char* name) {
  return nb::cast<T>(object.attr(name));
}

// The attributes of a cache object that both jobs share; see native.py.
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

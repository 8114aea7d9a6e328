// Memory that kernels work in: kept for the next call, 64-byte aligned, never shrunk.
//
// Threads come and go, and a program may call from any of forty; so what a caller works in is not
// its thread's, but handed on from call to call. Only calls side by side take memory of their own,
// for as long as they run. Workers of the pool keep theirs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thinslice {

// Gives the thread memory to work in until it goes out of scope; within another one, nothing.
class ScratchLease {
 public:
  ScratchLease() noexcept;
  ~ScratchLease();
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;

 private:
  bool is_outermost_;
};

// Both within a lease; std::bad_alloc where there is no memory.
uint8_t* call_scratch(std::size_t num_bytes);    // of the thread that makes the call
uint8_t* thread_scratch(std::size_t num_bytes);  // of each thread that takes part in it

}  // namespace thinslice

// Memory a call works in: kept by the thread for the next call, 64-byte aligned, never shrunk.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thinslice {

uint8_t* call_scratch(std::size_t num_bytes);    // of the thread that makes the call
uint8_t* thread_scratch(std::size_t num_bytes);  // of each thread that takes part in it

}  // namespace thinslice

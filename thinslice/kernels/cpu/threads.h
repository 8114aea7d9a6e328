// One pool of threads for every kernel.
#pragma once

#include <cstdint>
#include <type_traits>

namespace thinslice {

int num_threads();
void set_num_threads(int count);  // including the calling thread

using RangeFn = void (*)(void* context, int64_t first, int64_t last);

// Calls fn on ranges of at most `grain` items until 0..items-1 are done, on this thread and the
// pool's. A call made while another is running does its work alone; results do not depend on it.
void parallel_for(int64_t items, int64_t grain, RangeFn fn, void* context);

template <typename F>
void parallel_for(int64_t items, int64_t grain, F&& body) {
  const auto call = [](void* context, int64_t first, int64_t last) {
    (*static_cast<std::remove_reference_t<F>*>(context))(first, last);
  };
  parallel_for(items, grain, static_cast<RangeFn>(call), &body);
}

}  // namespace thinslice

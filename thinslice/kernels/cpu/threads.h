// One pool of threads for every kernel.
#pragma once

#include <cstdint>
#include <type_traits>

namespace thinslice {

constexpr int kMaxThreads = 1024;

// Both count the calling thread. The system may start fewer threads than asked for: it is known,
// and told, once they are started, by set_num_threads or by the first call that needs them.
int num_threads();
int set_num_threads(int count);  // how many there are

using RangeFn = void (*)(void* context, int64_t first, int64_t last);

// Calls fn on ranges of at most `grain` items until 0..items-1 are done, on this thread and the
// pool's. A call made while another is running does all of them alone, as one range; results do
// not depend on it.
// Throws what fn throws, the first of it, with some ranges left undone.
void parallel_for(int64_t items, int64_t grain, RangeFn fn, void* context);

template <typename F>
void parallel_for(int64_t items, int64_t grain, F&& body) {
  const auto call = [](void* context, int64_t first, int64_t last) {
    (*static_cast<std::remove_reference_t<F>*>(context))(first, last);
  };
  parallel_for(items, grain, static_cast<RangeFn>(call), &body);
}

}  // namespace thinslice

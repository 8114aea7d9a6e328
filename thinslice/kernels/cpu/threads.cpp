// The kernels have a pool of their own because torch's OpenMP cannot be shared: torch ships its
// runtime under a private name, and a second one would be loaded beside it. Two pools must not take
// turns on the same processors, whichever they are: libgomp's threads keep spinning after a
// parallel region, and 30 layers of small linears with a torch.mm between took 106..470 ms with two
// torch threads, 20..28 ms with one (on two processors that others used too). So torch runs on one
// thread beside the kernels.
#include "threads.h"

#include "scratch.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define THINSLICE_HAS_FORK
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace thinslice {

namespace {

// Pauses before a waiting worker goes to sleep: 22 us, when Python takes 4 to 9 us from one kernel
// to the next. A token's kernels find the workers awake, and an idle process uses no time.
constexpr int kSpins = 2000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

struct Job {
  RangeFn fn = nullptr;
  void* context = nullptr;
  int64_t items = 0;
  int64_t grain = 1;
};

// A job is open from publish to close. A worker joins by counting itself in while the job is open;
// the caller waits for those that joined and for no others, so a worker the system has not woken
// yet delays nobody. What a range throws ends the job, and is thrown again in the caller.
class Pool {
 public:
  // Has fewer threads where the system starts no more.
  explicit Pool(int count) {
    workers_.reserve(count - 1);
    try {
      for (int i = 1; i < count; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::exception&) {
    }
  }

  ~Pool() {
    is_stopping_.store(true);
    published_.fetch_add(1);
    published_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int count() const { return static_cast<int>(workers_.size()) + 1; }

  void run(const Job& job) {
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    joined_.fetch_or(kOpen, std::memory_order_release);
    published_.fetch_add(1, std::memory_order_release);
    published_.notify_all();
    take_ranges(job);
    joined_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int i = 0; joined_.load(std::memory_order_acquire) != 0; ++i) {
      if (i < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    if (has_failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  static constexpr uint32_t kOpen = 1u << 31;

  void take_ranges(const Job& job) {
    try {
      for (;;) {
        const int64_t first = next_.fetch_add(job.grain, std::memory_order_relaxed);
        if (first >= job.items) return;
        job.fn(job.context, first, std::min(first + job.grain, job.items));
      }
    } catch (...) {
      next_.store(job.items, std::memory_order_relaxed);
      if (!has_failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  void work() {
    const ScratchLease lease;
    uint32_t seen = 0;
    while (true) {
      wait_for_news(seen);
      seen = published_.load(std::memory_order_acquire);
      if (is_stopping_.load(std::memory_order_relaxed)) return;
      if (joined_.fetch_add(1, std::memory_order_acq_rel) & kOpen) take_ranges(job_);
      joined_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  void wait_for_news(uint32_t seen) {
    for (int i = 0; i < kSpins; ++i) {
      if (published_.load(std::memory_order_acquire) != seen) return;
      pause();
    }
    published_.wait(seen, std::memory_order_acquire);
  }

  Job job_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> joined_{0};
  alignas(64) std::atomic<uint32_t> published_{0};
  std::atomic<bool> is_stopping_{false};
  std::atomic<bool> has_failed_{false};
  std::exception_ptr error_;  // the first one's; the caller reads it when all have left the job
  std::vector<std::thread> workers_;
};

// Never destroyed: workers may outlive the interpreter's exit. After a fork the child has none of
// the threads, so it starts anew and leaves the parent's pool untouched.
struct Shared {
  std::mutex* mutex = new std::mutex;
  Pool* pool = nullptr;
  int asked = static_cast<int>(
      std::clamp(std::thread::hardware_concurrency(), 1u, static_cast<unsigned>(kMaxThreads)));
  std::atomic<int> count = asked;  // fewer where the system starts no more

  void start_pool() {
    pool = new Pool(asked);
    count = pool->count();
  }
};

Shared& shared() {
  static Shared* instance = [] {
    auto* made = new Shared;
#if defined(THINSLICE_HAS_FORK)
    pthread_atfork(nullptr, nullptr, [] {
      shared().mutex = new std::mutex;
      shared().pool = nullptr;
      shared().count = shared().asked;
    });
#endif
    return made;
  }();
  return *instance;
}

}  // namespace

int num_threads() { return shared().count; }

int set_num_threads(int count) {
  Shared& state = shared();
  const std::lock_guard<std::mutex> lock(*state.mutex);
  delete std::exchange(state.pool, nullptr);
  state.asked = count;
  state.start_pool();
  return state.count;
}

void parallel_for(int64_t items, int64_t grain, RangeFn fn, void* context) {
  Shared& state = shared();
  std::unique_lock<std::mutex> lock(*state.mutex, std::try_to_lock);
  if (!lock.owns_lock() || state.count == 1 || items <= grain) {
    if (items > 0) fn(context, 0, items);
    return;
  }
  if (state.pool == nullptr) state.start_pool();
  state.pool->run({fn, context, items, grain});
}

}  // namespace thinslice

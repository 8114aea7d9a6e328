#include "scratch.h"

#include <atomic>
#include <new>
#include <utility>

namespace thinslice {

namespace {

class Buffer {
 public:
  ~Buffer() { release(); }

  uint8_t* at_least(std::size_t num_bytes) {
    if (num_bytes > size_) {
      release();
      data_ = static_cast<uint8_t*>(::operator new(num_bytes, kAlignment));
      size_ = num_bytes;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};

  void release() {
    ::operator delete(data_, kAlignment);
    data_ = nullptr;
    size_ = 0;
  }

  uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

struct Scratch {
  Buffer of_call;
  Buffer of_thread;
};

std::atomic<Scratch*> spare{nullptr};  // what the last call worked in
thread_local bool is_leased = false;
thread_local Scratch* leased = nullptr;  // null until something is asked for

// Not in the lease's constructor: a worker's stands where nobody could be told of a failure.
Scratch& scratch() {
  if (leased == nullptr) leased = new Scratch;
  return *leased;
}

}  // namespace

ScratchLease::ScratchLease() noexcept : is_outermost_(!is_leased) {
  if (!is_outermost_) return;
  is_leased = true;
  leased = spare.exchange(nullptr);
}

ScratchLease::~ScratchLease() {
  if (!is_outermost_) return;
  is_leased = false;
  Scratch* mine = std::exchange(leased, nullptr);
  Scratch* none = nullptr;
  if (mine != nullptr && !spare.compare_exchange_strong(none, mine)) delete mine;
}

uint8_t* call_scratch(std::size_t num_bytes) { return scratch().of_call.at_least(num_bytes); }

uint8_t* thread_scratch(std::size_t num_bytes) { return scratch().of_thread.at_least(num_bytes); }

}  // namespace thinslice

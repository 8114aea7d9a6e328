#include "scratch.h"

#include <atomic>
#include <new>

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
thread_local Scratch* current = nullptr;

}  // namespace

ScratchLease::ScratchLease() : is_outermost_(current == nullptr) {
  if (!is_outermost_) return;
  current = spare.exchange(nullptr);
  if (current == nullptr) current = new Scratch;
}

ScratchLease::~ScratchLease() {
  if (!is_outermost_) return;
  Scratch* mine = current;
  current = nullptr;
  Scratch* none = nullptr;
  if (!spare.compare_exchange_strong(none, mine)) delete mine;
}

uint8_t* call_scratch(std::size_t num_bytes) { return current->of_call.at_least(num_bytes); }

uint8_t* thread_scratch(std::size_t num_bytes) { return current->of_thread.at_least(num_bytes); }

}  // namespace thinslice

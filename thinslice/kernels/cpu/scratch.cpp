#include "scratch.h"

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

}  // namespace

uint8_t* call_scratch(std::size_t num_bytes) {
  static thread_local Buffer buffer;
  return buffer.at_least(num_bytes);
}

uint8_t* thread_scratch(std::size_t num_bytes) {
  static thread_local Buffer buffer;
  return buffer.at_least(num_bytes);
}

}  // namespace thinslice

#include "scratch.h"

#include <cstddef>
#include <new>

namespace smt_ext::cpu {

namespace {

constexpr std::align_val_t kLine{64};

class Buffer {
 public:
  ~Buffer() { release(); }

  void* at_least(int64_t bytes) {
    if (bytes > size_) {
      release();
      data_ = ::operator new(static_cast<size_t>(bytes), kLine);
      size_ = bytes;
    }
    return data_;
  }

 private:
  void release() {
    if (data_) ::operator delete(data_, kLine);
    data_ = nullptr;
    size_ = 0;
  }

  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace

void* thread_scratch(Scratch kind, int64_t bytes) {
  static thread_local Buffer buffers[2];
  return buffers[static_cast<int>(kind)].at_least(bytes);
}

}  // namespace smt_ext::cpu

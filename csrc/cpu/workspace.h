// The memory of one thread, divided into parts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace anchorops::cpu {

// One function takes all parts. It runs once to count their bytes, and once to take them: so no
// length is written twice.
class ThreadMemory {
 public:
  template <class TakeParts>
  explicit ThreadMemory(const TakeParts& take_parts) {
    take_parts(*this);
    any_.bytes.reset(new std::byte[std::exchange(any_.size, 0)]);
    zeros_.bytes.reset(new std::byte[std::exchange(zeros_.size, 0)]());
    take_parts(*this);
  }

  // Parts of the same length. They are not initialised, so pages that a small tile does not need
  // are never touched.
  template <class... Numbers>
  void take(int64_t length, Numbers*&... parts) {
    ((parts = any_.next<Numbers>(length)), ...);
  }

  template <class... Numbers>
  void take_zeros(int64_t length, Numbers*&... parts) {
    ((parts = zeros_.next<Numbers>(length)), ...);
  }

 private:
  struct Block {
    std::unique_ptr<std::byte[]> bytes;  // null while they are counted
    int64_t size = 0;                    // of the parts so far

    template <class Number>
    Number* next(int64_t length) {
      constexpr int64_t LINE = 64;  // of a cache
      const int64_t lines = (length * int64_t{sizeof(Number)} + LINE - 1) / LINE;
      const int64_t begin = std::exchange(size, size + lines * LINE);
      return bytes ? reinterpret_cast<Number*>(bytes.get() + begin) : nullptr;
    }
  };

  Block any_, zeros_;
};

}  // namespace anchorops::cpu

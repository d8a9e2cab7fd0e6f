// The operator anchorops::kth_largest.cpu: the k-th largest of non-negative floats, without
// sorting.
//
// The bits of such floats, read as integers, have the same order. A histogram of the highest bits
// finds those of the k-th largest number; a histogram of the next bits, of the numbers that begin
// with the bits already found, finds the next ones, and so on.
#include <torch/csrc/stable/library.h>

#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <mutex>
#include <utility>

#include "operators.h"

namespace anchorops::cpu {
namespace {

constexpr int MOST_BITS = 11;  // of a histogram: 16 KB
using Histogram = std::array<int64_t, 1 << MOST_BITS>;

// How many of the numbers have the digit [shift, shift + width) of their bits, if the bits above
// are `prefix`.
Histogram count_digits(const uint32_t* numbers, int64_t size, int shift, int width,
                       uint32_t prefix) {
  Histogram total = {};
  std::mutex mutex;
  torch::stable::parallel_for(0, size, 1 << 15, [&](int64_t begin, int64_t end) {
    Histogram counts = {};
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t digits = (numbers[i] & 0x7fffffff) >> shift;  // without the sign of -0, -NaN
      if (digits >> width == prefix) ++counts[digits & ((1u << width) - 1)];
    }
    const std::lock_guard lock(mutex);
    for (size_t digit = 0; digit < counts.size(); ++digit) total[digit] += counts[digit];
  });
  return total;
}

Tensor kth_largest(Tensor values, int64_t k) {
  values = torch::stable::contiguous(values);
  const auto* numbers = reinterpret_cast<const uint32_t*>(values.const_data_ptr<float>());
  Tensor result = new_zeros({}, values.scalar_type());
  if (k > values.numel()) return result;
  uint32_t prefix = 0;
  for (const auto& [shift, width] : {std::pair{20, 11}, {10, 10}, {0, 10}}) {
    const Histogram counts = count_digits(numbers, values.numel(), shift, width, prefix);
    uint32_t digit = (1u << width) - 1;
    for (; counts[digit] < k; --digit) k -= counts[digit];
    prefix = prefix << width | digit;
  }
  const float value = std::bit_cast<float>(prefix);
  *result.mutable_data_ptr<float>() =
      value != value ? std::numeric_limits<float>::infinity() : value;
  return result;
}

}  // namespace
}  // namespace anchorops::cpu

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  library.impl("kth_largest.cpu", TORCH_BOX(&anchorops::cpu::kth_largest));
}

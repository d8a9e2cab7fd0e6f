// Labels and keys, for all C++ backends.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace anchorops {

// Calls function with a value of the labels' type, which may be any integer type.
template <class Function>
void for_label_dtype(const char* operation, torch::headeronly::ScalarType dtype,
                     Function function) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Byte:
      return function(uint8_t{});
    case ScalarType::Char:
      return function(int8_t{});
    case ScalarType::Short:
      return function(int16_t{});
    case ScalarType::Int:
      return function(int32_t{});
    case ScalarType::Long:
      return function(int64_t{});
    case ScalarType::UInt16:
      return function(uint16_t{});
    case ScalarType::UInt32:
      return function(uint32_t{});
    case ScalarType::UInt64:
      return function(uint64_t{});
    default:
      STD_TORCH_CHECK(false, operation, ": labels: unexpected dtype");
  }
}

// The keys of all pixels are contiguous, because kernels read them consecutively.
inline void check_keys(const char* operation, const torch::stable::Tensor& keys, int64_t pixels) {
  STD_TORCH_CHECK(keys.is_contiguous() && keys.numel() == pixels, operation,
                  ": keys: expected a contiguous key for each of ", pixels, " pixels, got ",
                  keys.numel(), keys.is_contiguous() ? "" : ", not contiguous");
}

}  // namespace anchorops

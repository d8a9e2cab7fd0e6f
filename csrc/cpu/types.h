// Types for operators and vector kernels on the CPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

// Declares functions in the namespaces of all instruction sets (instruction_set.h).
#define IN_EVERY_INSTRUCTION_SET(...) \
  namespace baseline {                \
  __VA_ARGS__                         \
  }                                   \
  namespace avx2 {                    \
  __VA_ARGS__                         \
  }                                   \
  namespace avx512 {                  \
  __VA_ARGS__                         \
  }

namespace anchorops::cpu {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// Statistics are float32, for float64 inputs float64.
template <class T>
using StatOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A tensor [batch, dim, height, width] with any strides; dim counts channels or classes.
struct Layout {
  int64_t batch, dim, height, width;
  int64_t stride_b, stride_d, stride_h, stride_w;
};

struct Range {
  int64_t begin, end;
};

}  // namespace anchorops::cpu

// For all operators on the CPU: the choice of kernels, types, outputs.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <vector>

#include "../errors.h"
#include "types.h"

namespace anchorops::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items of work, usually: at most so many threads are busy. Items depend only on shapes, never on
// the number of threads; the same holds for the order in which partials are added.
constexpr int64_t ITEMS = 64;

enum class InstructionSet { BASELINE, AVX2, AVX512 };

// The best of this processor. ATEN_CPU_CAPABILITY=default|avx2|avx512 selects a lower one, as for
// torch.
inline InstructionSet best_instruction_set() {
#ifdef __x86_64__
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view wish = variable ? variable : "avx512";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && wish != "default";
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && wish != "avx2")
    return InstructionSet::AVX512;
  if (avx2) return InstructionSet::AVX2;
#endif
  return InstructionSet::BASELINE;
}

// Calls the function in the namespace of the best instruction set. ARM has no other than
// `baseline`.
#ifdef __x86_64__
#define BEST_OF(...)                  \
  [&] {                               \
    switch (best_instruction_set()) { \
      case InstructionSet::AVX512:    \
        return avx512::__VA_ARGS__;   \
      case InstructionSet::AVX2:      \
        return avx2::__VA_ARGS__;     \
      default:                        \
        return baseline::__VA_ARGS__; \
    }                                 \
  }()
#else
#define BEST_OF(...) baseline::__VA_ARGS__
#endif

// The dtype of sums and of arithmetic.
inline ScalarType statistics_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

template <class Value>
Value* data_or_null(const Tensor& output) {
  return output.numel() ? output.mutable_data_ptr<Value>() : nullptr;
}

// Calls function with a value of the dtype.
template <class Function>
void for_dtype(const char* operation, ScalarType dtype, Function function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    case ScalarType::Half:
      return function(Half{});
    default:
      STD_TORCH_CHECK(false, operation, ": unexpected dtype");
  }
}

// As NumPy does for its arrays: the page faults of a large output take longer than writing it.
inline void advise_huge_pages([[maybe_unused]] const Tensor& output) {
#ifdef __linux__
  constexpr size_t PAGE = 4096;
  const size_t bytes = output.numel() * output.element_size();
  if (bytes < size_t{4} << 20) return;
  const auto begin = (reinterpret_cast<uintptr_t>(output.data_ptr()) + PAGE - 1) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(begin), bytes - PAGE, MADV_HUGEPAGE);
#endif
}

// Outputs are made without torch's dispatcher, which takes longer than all else for small images.
inline Tensor new_empty(const std::vector<int64_t>& size, const std::vector<int64_t>& stride,
                        ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(size.size()), size.data(), stride.data(), static_cast<int32_t>(dtype),
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor output(handle);
  advise_huge_pages(output);
  return output;
}

inline Tensor new_empty(const std::vector<int64_t>& size, ScalarType dtype) {
  std::vector<int64_t> stride(size.size());
  int64_t next = 1;
  for (size_t axis = size.size(); axis-- > 0; next *= std::max<int64_t>(size[axis], 1))
    stride[axis] = next;
  return new_empty(size, stride, dtype);
}

// In the layout of `like`, without gaps.
inline Tensor dense_like(const Tensor& like) {
  if (like.is_contiguous() && like.numel() > 0)
    return new_empty({like.sizes().begin(), like.sizes().end()},
                     {like.strides().begin(), like.strides().end()}, like.scalar_type());
  Tensor output = torch::stable::empty_like(like);
  advise_huge_pages(output);
  return output;
}

inline Tensor new_zeros(const std::vector<int64_t>& size, ScalarType dtype) {
  Tensor output = new_empty(size, dtype);
  if (const size_t bytes = output.numel() * output.element_size())
    std::memset(output.mutable_data_ptr(), 0, bytes);
  return output;
}

// A result that was not requested.
inline Tensor absent(ScalarType dtype) { return new_empty({0}, dtype); }

}  // namespace anchorops::cpu

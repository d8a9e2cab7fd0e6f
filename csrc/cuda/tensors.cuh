// Tensors for the CUDA kernels: pixels by strides, the device's stream, new outputs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../device.cuh"
#include "../errors.h"
#include "../launch.cuh"

namespace anchorops::cuda {

using Numbers = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class A, class B>
constexpr __host__ __device__ auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

inline std::string text_of(Numbers numbers) {
  std::string text = "(";
  for (int64_t number : numbers) text += (text.size() > 1 ? ", " : "") + std::to_string(number);
  return text + ")";
}

// What kernels rely on is checked here and not only in Python, because operators can be called
// directly. Raises unless the tensor, if it is given, has this shape.
inline void check_shape(const char* operation, const char* argument,
                        const std::optional<Tensor>& tensor, Numbers shape) {
  STD_TORCH_CHECK(!tensor || tensor->sizes().equals(shape), operation, ": ", argument,
                  ": expected shape ", text_of(shape), ", got ", text_of(tensor->sizes()));
}

// Features as lines × channels × pixels: element (line, d, p) lies at (line / lines_per_image) ·
// stride_b + (line % lines_per_image) · stride_h + d · stride_d + p · stride_p. A line is an image,
// or a row of an image if its rows are not adjacent (in a cropped view).
struct Pixels {
  int64_t lines, dim, pixels, lines_per_image, stride_b, stride_h, stride_d, stride_p;

  __device__ int64_t line_offset(int64_t line) const {
    return line / lines_per_image * stride_b + line % lines_per_image * stride_h;
  }
  __device__ int64_t offset(int64_t line, int64_t d, int64_t pixel) const {
    return line_offset(line) + d * stride_d + pixel * stride_p;
  }
};

// (B, D, H, W), (B, D, N) or (N, D). Rows are joined to one line if all of the given strides, of
// tensors of this size, permit it.
inline Pixels as_pixels(const std::vector<int64_t>& size, const std::vector<int64_t>& stride,
                        bool rows_join) {
  STD_TORCH_CHECK(size.size() >= 2 && size.size() <= 4,
                  "features: expected (N, D), (B, D, N) or (B, D, H, W), got shape ",
                  text_of(size));
  if (size.size() == 2) return {1, size[1], size[0], 1, 0, 0, stride[1], stride[0]};
  if (size.size() == 3) return {size[0], size[1], size[2], 1, stride[0], 0, stride[1], stride[2]};
  const int64_t height = size[2], width = size[3];
  if (!rows_join)
    return {size[0] * height, size[1], width, height, stride[0], stride[2], stride[1], stride[3]};
  const int64_t stride_p = width == 1 ? stride[2] : stride[3];
  return {size[0], size[1], height * width, 1, stride[0], 0, stride[1], stride_p};
}

inline bool rows_join(const std::vector<int64_t>& size, const std::vector<int64_t>& stride) {
  return size.size() < 4 || size[2] == 1 || size[3] == 1 || stride[2] == size[3] * stride[3];
}

// Whether 16 bytes of pixels (or of channels, whichever has stride 1) can be read at once at every
// multiple of 16 bytes.
inline bool vectors_aligned(const void* data, std::initializer_list<int64_t> strides,
                            size_t itemsize) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t stride : strides) aligned &= stride * itemsize % 16 == 0;
  return aligned;
}

inline std::vector<int64_t> to_vector(Numbers array) { return {array.begin(), array.end()}; }

// Makes the tensor's device the current one; the stream is the current one there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<Stream>(current);
  }

  Stream stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

inline Tensor new_empty_strided(const Tensor& like, const std::vector<int64_t>& size,
                                const std::vector<int64_t>& stride, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack = {
      from(like),         from(Numbers(size)), from(Numbers(stride)), from(std::optional(dtype)),
      from(std::nullopt), from(std::nullopt),  from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
const T* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// A grid of blocks along x: at most 2^31 - 1 are possible, but only 65,535 along y and z.
inline dim3 grid_of(const char* kernel, int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, kernel, ": more blocks than a grid has");
  return dim3(static_cast<unsigned>(blocks));
}

template <class Function>
void for_dtype(const char* operation, ScalarType dtype, Function function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    case ScalarType::Half:
      return function(Half{});
    default:
      STD_TORCH_CHECK(false, operation, ": features: expected float32, bfloat16 or float16");
  }
}

}  // namespace anchorops::cuda

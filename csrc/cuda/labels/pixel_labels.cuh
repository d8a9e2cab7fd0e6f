// The labels of pixels, of any size in bytes and any strides, for kernels that process cells of
// pixels.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../labels.h"
#include "../tensors.cuh"

namespace anchorops::cuda {

constexpr unsigned NO_CLASS = 0xffff;  // more than the classes of any call (16,384)

struct PixelLabels {
  const void* data;  // [B, H, W] by strides
  int itemsize;
  bool is_int8;
  unsigned num_classes, ignored;  // ignored: the class to ignore, or NO_CLASS
  int64_t stride_b, stride_h, stride_w;

  __device__ int64_t offset(int image, int y, int x) const {
    return image * stride_b + y * stride_h + x * stride_w;
  }
  // NO_CLASS if the pixel is ignored.
  template <class Label>
  __device__ unsigned class_of(Label label) const {
    const auto value = static_cast<uint64_t>(label);
    const auto candidate = static_cast<unsigned>(value);
    return value < num_classes && candidate != ignored ? candidate : NO_CLASS;
  }
  // Calls function with a pointer to the labels. Negative labels are read as unsigned numbers that
  // are larger than any class; only those of 8 bits could be classes.
  template <class Function>
  __device__ __forceinline__ void for_type(Function function) const {
    if (itemsize == 8)
      function(static_cast<const uint64_t*>(data));
    else if (itemsize == 4)
      function(static_cast<const uint32_t*>(data));
    else if (itemsize == 2)
      function(static_cast<const uint16_t*>(data));
    else if (is_int8)
      function(static_cast<const int8_t*>(data));
    else
      function(static_cast<const uint8_t*>(data));
  }
  // The class of one pixel, NO_CLASS if it is ignored.
  __device__ unsigned at(int image, int y, int x) const {
    unsigned label = NO_CLASS;
    for_type([&](const auto* all) { label = class_of(all[offset(image, y, x)]); });
    return label;
  }
};

inline PixelLabels labels_of(const char* operation, const Tensor& labels, int64_t num_classes,
                             int64_t ignore_index) {
  STD_TORCH_CHECK(num_classes < NO_CLASS, operation, ": expected fewer than ", NO_CLASS,
                  " classes, got ", num_classes);
  const bool ignores = ignore_index >= 0 && ignore_index < num_classes;
  PixelLabels result{.num_classes = static_cast<unsigned>(num_classes),
                     .ignored = ignores ? static_cast<unsigned>(ignore_index) : NO_CLASS,
                     .stride_b = labels.stride(0),
                     .stride_h = labels.stride(1),
                     .stride_w = labels.stride(2)};
  for_label_dtype(operation, labels.scalar_type(), [&](auto label) {
    using Label = decltype(label);
    result.data = labels.const_data_ptr<Label>();
    result.itemsize = sizeof(Label);
    result.is_int8 = std::is_same_v<Label, int8_t>;
  });
  return result;
}

}  // namespace anchorops::cuda

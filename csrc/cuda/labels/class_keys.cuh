// Class keys, for operators that have labels.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "../tensors.cuh"

namespace anchorops::cuda {

// Labels (B, H', W') of any strides and integer type -> keys int32 [B, height·width], -1 where
// ignored, and counts int64 [K]; with per_image keys are image·K + class and counts [B, K]. With
// class_dtype keys are the classes alone, in this dtype (255 in uint8 where ignored).
std::tuple<Tensor, Tensor> class_keys(Tensor labels, int64_t height, int64_t width,
                                      int64_t num_classes, bool per_image, int64_t ignore_index,
                                      std::optional<ScalarType> class_dtype = {});

// The same in memory that the caller gives: keys [B, height·width]; counts [K] or [B, K], zero on
// entry. The keys of image i begin at i·image_keys. after_kernel: whether the launch before was one
// of a kernel that writes the zeros.
void write_class_keys(const Tensor& labels, int64_t height, int64_t width, int64_t num_classes,
                      bool per_image, int64_t image_keys, int64_t ignore_index, const Tensor& keys,
                      int64_t* counts, bool after_kernel, Stream stream);

}  // namespace anchorops::cuda

// Class keys, for operators that have labels.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "../tensors.cuh"

namespace anchorops::cuda {

// Labels (B, H', W') of any strides and integer type -> keys int32 [B, height·width], -1 where
// ignored, and counts int64 [K]; with per_image keys are image·K + class and counts [B, K].
// class_dtype must be absent.
std::tuple<Tensor, Tensor> class_keys(Tensor labels, int64_t height, int64_t width,
                                      int64_t num_classes, bool per_image, int64_t ignore_index,
                                      std::optional<ScalarType> class_dtype = {});

}  // namespace anchorops::cuda

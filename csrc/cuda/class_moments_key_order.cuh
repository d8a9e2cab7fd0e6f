// Class moments with many keys: pixels are first sorted by key, with a stable sort.
#pragma once

#include "class_moments_tiles.cuh"

namespace anchorops::cuda {

// float32 [num_keys, D], [num_keys] and [num_keys, D]; empty if not wanted.
struct Outputs {
  Tensor sums, sqdists, residuals;
};

inline float* data(const Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

template <class T>
void in_order_of_keys(Input<T> input, int statistics, const Tensor& keys, const Outputs& out,
                      Stream stream);

}  // namespace anchorops::cuda

// Results of all 32 lanes of a warp; every lane gets them.
#pragma once

#include "../device.cuh"

namespace anchorops::cuda {

template <class T>
__device__ T sum_of_warp(T value) {
  for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(FULL_WARP, value, lanes);
  return value;
}

}  // namespace anchorops::cuda

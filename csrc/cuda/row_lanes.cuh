// A warp that processes a row: lane i has the numbers i, i + 32, … of the row.
#pragma once

#include "../device.cuh"

namespace anchorops::cuda {

// Numbers of a lane that are loaded before the first is used. One at a time, a lane that stores
// would wait for each load, because the compiler must assume that the addresses are the same.
constexpr int AT_ONCE = 8;

// Calls use(d, load(d)) for the lane's numbers d, in order.
template <class Load, class Use>
__device__ __forceinline__ void for_lane(int64_t dim, Load load, Use use) {
  for (int64_t first = threadIdx.x % 32; first < dim; first += 32 * AT_ONCE) {
    decltype(load(first)) loaded[AT_ONCE] = {};
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (first + 32 * i < dim) loaded[i] = load(first + 32 * i);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (first + 32 * i < dim) use(first + 32 * i, loaded[i]);
  }
}

}  // namespace anchorops::cuda

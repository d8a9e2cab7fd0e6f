// The gradients of positions in shared memory, where cells add their shares.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../tensors.cuh"
#include "../upsampled_logits/cell.cuh"
#include "../upsampled_logits/cells.cuh"
#include "../upsampled_logits/logits.cuh"
#include "../upsampled_logits/stage.cuh"

namespace anchorops::cuda {

// The gradients of CLASSES classes in shared memory, behind the staged logits. The gradient of a
// position is the sum of the cells below it and of those above it.
template <int CLASSES>
struct GradientStage {
  int pitch;
  int64_t* offsets;       // [warps, 32] of positions in dlogits, negative if there is none
  float *tops, *bottoms;  // [CLASSES, warps, 32] of the cells right of and left of a position

  static __host__ __device__ size_t start(int warps) {
    return ceil_div(LogitsStage<CLASSES>::bytes(warps), sizeof(int64_t)) * sizeof(int64_t);
  }
  static size_t bytes(int warps) {
    return start(warps) + warps * 32 * sizeof(int64_t) +
           2 * CLASSES * (warps * 32 + 1) * sizeof(float);
  }

  // The position of a thread is at the left end of the top of its cell. Those of the first row and
  // column of the block belong to its neighbours.
  __device__ GradientStage(const Logits& dlogits, const Cell& cell)
      : pitch(static_cast<int>(blockDim.x) + 1) {
    offsets = reinterpret_cast<int64_t*>(shared_memory() + start(blockDim.x / 32));
    tops = reinterpret_cast<float*>(offsets + blockDim.x);
    bottoms = tops + CLASSES * pitch;
    const bool owned = threadIdx.x >= 32 && threadIdx.x % 32 > 0 && cell.inside && cell.column >= 0;
    offsets[threadIdx.x] = owned ? dlogits.offset(cell.image, cell.row, cell.column) : -1;
  }

  // Sets the gradients from the thread's cell, or adds to them. All lanes must call it.
  __device__ __forceinline__ void put(int k, const Corners& corners, bool add) const {
    float top = corners.top_left + __shfl_up_sync(FULL_WARP, corners.top_right, 1);
    float bottom = corners.bottom_left + __shfl_up_sync(FULL_WARP, corners.bottom_right, 1);
    const int at = k * pitch + threadIdx.x;
    if (add) top += tops[at], bottom += bottoms[at];
    tops[at] = top;
    bottoms[at] = bottom;
  }

  // Stores the gradients of the classes from first to first + count - 1.
  __device__ __forceinline__ void store(const Logits& dlogits, int first, int count) const {
    for_element(dlogits.element, [&](auto element) {
      using T = decltype(element);
      T* out = static_cast<T*>(dlogits.data) + first * dlogits.stride_k;
      if (dlogits.stride_k < dlogits.stride_w)
        store_channels_last(out, dlogits.stride_k, count);
      else
        store_planes(out, dlogits.stride_k, count);
    });
  }
  template <class T>
  __device__ __forceinline__ void store_position(T* plane, int k, int position) const {
    if (offsets[position] >= 0)
      plane[offsets[position]] =
          static_cast<T>(tops[k * pitch + position] + bottoms[k * pitch + position - 32]);
  }
  template <class T>
  __device__ __forceinline__ void store_planes(T* out, int64_t stride, int count) const {
    const int warps = blockDim.x / 32;
    for (int k = threadIdx.x / 32; k < count; k += warps) {
#pragma unroll 4
      for (int i = 32 + threadIdx.x % 32; i < warps * 32; i += 32)
        store_position(out + k * stride, k, i);
    }
  }
  template <class T>
  __device__ __forceinline__ void store_channels_last(T* out, int64_t stride, int count) const {
    const int k = threadIdx.x % CLASSES, step = blockDim.x / CLASSES;
    for (int i = 32 + threadIdx.x / CLASSES; k < count && i < static_cast<int>(blockDim.x);
         i += step)
      store_position(out + k * stride, k, i);
  }
};

}  // namespace anchorops::cuda

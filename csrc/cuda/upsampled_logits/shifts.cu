// The shift of the logits of each position, and where neighbours differ widely.
//
// Reads the logits once, with the neighbours to the right and below from the caches; writes 8
// bytes a position. One launch.
#include <cmath>
#include <cstdint>

#include "cells.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256;
constexpr float LARGEST = 1 << 20;  // beyond it, the rounding of a shift would matter

// A logit, its neighbours, and the extremes over the classes so far.
struct Extremes {
  float largest = -INFINITY, right = 0, down = 0;
  bool nan = false;

  __device__ __forceinline__ void add(float x, float x_right, float x_down) {
    nan |= x != x;
    largest = fmaxf(largest, x);
    right = fmaxf(right, fabsf(x - x_right));
    down = fmaxf(down, fabsf(x - x_down));
  }
  __device__ Shift shift(float steepest) const {
    const float scaled = largest * LOG2E;
    const bool finite = !nan && fabsf(scaled) < LARGEST;
    return {finite ? scaled : NAN, (right > steepest ? RIGHT : 0u) | (down > steepest ? DOWN : 0u)};
  }
};

// The smallest number of blocks on a multiprocessor. With eight, a thread has 32 registers; then it
// spills on GPUs other than sm_90.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int SHIFT_BLOCKS = 8;
#else
constexpr int SHIFT_BLOCKS = 4;
#endif

// LANES threads for each position: 32 if its classes are contiguous in memory.
template <int LANES>
__global__ void __launch_bounds__(THREADS, SHIFT_BLOCKS)
    softmax_shifts_kernel(Logits logits,  // [B, K, h, w] by strides
                          Shift* shifts,  // [B, h, w]
                          float steepest) {
  const int64_t at = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / LANES;
  const int64_t positions = int64_t{logits.batch} * logits.height * logits.width;
  if (at >= positions) return;
  const int column = static_cast<int>(at % logits.width);
  const int row = static_cast<int>(at / logits.width % logits.height);
  const int image = static_cast<int>(at / logits.width / logits.height);
  const int64_t offset = logits.offset(image, row, column);
  const int64_t right = column + 1 < logits.width ? logits.stride_w : 0;
  const int64_t down = row + 1 < logits.height ? logits.stride_h : 0;
  Extremes extremes;
  for_element(logits.element, [&](auto element) {
    using T = decltype(element);
    const T* x = static_cast<const T*>(logits.data) + offset;
#pragma unroll 8
    for (int k = threadIdx.x % LANES; k < logits.num_classes; k += LANES) {
      const T* class_logits = x + k * logits.stride_k;
      extremes.add(static_cast<float>(class_logits[0]), static_cast<float>(class_logits[right]),
                   static_cast<float>(class_logits[down]));
    }
  });
  if constexpr (LANES > 1) {
    extremes.nan = __ballot_sync(FULL_WARP, extremes.nan);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
      for (float* each : {&extremes.largest, &extremes.right, &extremes.down})
        *each = fmaxf(*each, __shfl_xor_sync(FULL_WARP, *each, lanes));
    if (threadIdx.x % LANES) return;
  }
  shifts[at] = extremes.shift(steepest);
}

}  // namespace

Tensor new_shifts(const Tensor& logits, Cells& cells, Stream stream) {
  const int64_t positions = logits.size(0) * logits.size(2) * logits.size(3);
  Tensor shifts = new_empty(logits, {positions, 2}, ScalarType::Float);
  auto* data = reinterpret_cast<Shift*>(shifts.mutable_data_ptr<float>());
  const auto run = [&]<int LANES>() {
    launch("softmax_shifts_kernel", softmax_shifts_kernel<LANES>,
           grid_of("softmax_shifts_kernel", ceil_div(positions * LANES, int64_t{THREADS})), THREADS,
           0, stream, cells.logits, data, cells.steepest());
  };
  if (cells.logits.stride_k < cells.logits.stride_w)
    run.template operator()<32>();
  else
    run.template operator()<1>();
  cells.shifts = data;
  return shifts;
}

}  // namespace anchorops::cuda

// The gradients of the statistics of softmax moments, and the two terms of each pixel that do not
// depend on the class. softmax_slopes.cu computes these for softmax_moments_backward.cu.
#pragma once

#include "softmax_cells.cuh"

namespace anchorops::cuda {

// A map [B, H, W] by strides; null where absent.
struct PixelGradient {
  const float* data;
  int64_t stride_b, stride_h, stride_w;

  __device__ float at(int image, int y, int x) const {
    return data ? data[image * stride_b + y * stride_h + x * stride_w] : 0;
  }
};

// Gradients of the statistics; by class [K], or [B, K] if keys are image·K + class. Null: absent.
struct Gradients {
  const float *dlosses, *doverlaps, *dmasses, *dsquares;
  PixelGradient dpixel_losses, dlse;
  bool by_image;

  __device__ static float at(const float* table, int64_t key) { return table ? table[key] : 0; }
};

// The terms of each pixel: dz_k = p_k·(slope + dmasses[k] + 2·p_k·dsquares[k]) - [y = k]·own.
struct PixelMaps {
  const int32_t* keys;  // [B, H, W]
  const float* lse;     // [B, H, W]
  const float* slopes;  // [B, H, W], 0 where ignored
  const float* own;     // the same; may be the slopes
};

// Writes the map of slopes, and the map `own` if it is not the same map.
void write_slopes(const Cells& cells, const Gradients& gradients, const int32_t* keys,
                  const float* lse, float* slopes, float* own, Stream stream);

}  // namespace anchorops::cuda

// The gradients of the statistics of softmax moments, and the parts of the backward pass:
//
//   label_term = dlosses[y] + dpixel_losses − p_y·doverlaps[y]
//   slope = label_term − Σ_j p_j·(dmasses[j] + 2·p_j·dsquares[j])
//   dz_k = p_k·(slope + dmasses[k] + 2·p_k·dsquares[k]) − [y = k]·label_term
#pragma once

#include <cstdint>

#include "../labels/pixel_labels.cuh"
#include "../tensors.cuh"
#include "../upsampled_logits/cells.cuh"
#include "../upsampled_logits/logits.cuh"

namespace anchorops::cuda {

// A map [B, H, W] by strides; null where absent.
struct PixelGradient {
  const float* data;
  int64_t stride_b, stride_h, stride_w;

  __device__ float at(int image, int y, int x) const {
    return data ? data[image * stride_b + y * stride_h + x * stride_w] : 0;
  }
};

// Gradients of the statistics; by class [K], or [B, K] if by_image. Null: absent.
struct Gradients {
  const float *dlosses, *doverlaps, *dmasses, *dsquares;
  PixelGradient dpixel_losses;
  bool by_image;

  __device__ static float at(const float* table, int key) { return table ? table[key] : 0; }
  // dmasses[k] + 2·p_k·dsquares[k]
  __device__ float slope_of_class(int key, float p) const {
    return at(dmasses, key) + 2 * p * at(dsquares, key);
  }
  // The key of the image's class 0; that of class k follows k places after it.
  __device__ int first_key(int image, int num_classes) const {
    return by_image ? image * num_classes : 0;
  }
  __host__ __device__ bool by_class() const { return dmasses || dsquares; }
  // Then slope = label_term = dlosses[y].
  bool only_losses() const { return dlosses && !doverlaps && !by_class() && !dpixel_losses.data; }
};

// Maps [B, H, W]. slopes and label_terms are 0 where ignored, and null if both are dlosses[y].
struct PixelMaps {
  const float *lse, *slopes, *label_terms;
};

// Writes the maps of slopes and label terms. slopes.cu.
void write_slopes(const Cells& cells, const PixelLabels& labels, const Gradients& gradients,
                  const float* lse, float* slopes, float* label_terms, Stream stream);

// Writes the gradient of the logits. dlogits.cu.
void write_dlogits(const Cells& cells, const PixelLabels& labels, const Gradients& gradients,
                   const PixelMaps& maps, const Logits& dlogits, Stream stream);

}  // namespace anchorops::cuda

// The parts of the forward pass of softmax moments. A statistic is [K], or [images, K].
#pragma once

#include "softmax_pixels.cuh"

namespace anchorops::cuda {

// Sums of floating-point statistics, and counts; null where not requested.
struct Statistics {
  float* sums[2];
  int64_t* counts;  // summed after the others

  int number() const { return (sums[0] != nullptr) + (sums[1] != nullptr) + (counts != nullptr); }
};

// Maps [B, H, W]; ignored pixels get 0.
struct LossMaps {
  float* lse;
  float* pixel_losses;  // null if not requested
};

// lse and the loss of each pixel; sums of the losses, and of p if requested, over the pixels of
// each class, and their counts. softmax_losses.cu.
void write_losses(const Tensor& logits, const Cells& cells, const PixelLabels& labels,
                  const LossMaps& maps, const Statistics& statistics, int64_t images,
                  Stream stream);

// Sums of p, and of p² if requested, of each class over all valid pixels. softmax_masses.cu.
void write_masses(const Tensor& logits, const Cells& cells, const PixelLabels& labels,
                  const float* lse, const Statistics& statistics, int64_t images, Stream stream);

// Sums partials [statistics, images, rows, K] over the rows, in a fixed order. softmax_partials.cu.
void sum_partials(const Tensor& partials, const Statistics& statistics, int64_t images,
                  int num_classes, Stream stream);

}  // namespace anchorops::cuda

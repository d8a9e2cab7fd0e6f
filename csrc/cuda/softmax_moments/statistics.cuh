// The parts of the forward pass of softmax moments. A statistic is [K], or [images, K].
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../labels/pixel_labels.cuh"
#include "../tensors.cuh"
#include "../upsampled_logits/cells.cuh"

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
// each class, and their counts. losses.cu.
void write_losses(const Tensor& logits, const Cells& cells, const PixelLabels& labels,
                  const LossMaps& maps, const Statistics& statistics, Stream stream);

// Sums of p, and of p² if requested, of each class over all valid pixels. masses.cu.
void write_masses(const Tensor& logits, const Cells& cells, const PixelLabels& labels,
                  const float* lse, const Statistics& statistics, Stream stream);

// Adds the sums of a block's warps, [STATISTICS, warps, CLASSES] in shared memory, and writes them
// to partials [STATISTICS, blocks, K], for the classes from first to first + count - 1.
template <int STATISTICS, int CLASSES>
__device__ __forceinline__ void add_warps(const Cells& cells, const float* sums, int first,
                                          int count, float* partials) {
  const int warps = blockDim.x / 32, num_classes = cells.logits.num_classes;
  for (int i = threadIdx.x; i < STATISTICS * CLASSES; i += blockDim.x) {
    const int statistic = i / CLASSES, k = i % CLASSES;
    if (k >= count) continue;
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += sums[(statistic * warps + w) * CLASSES + k];
    partials[(int64_t{gridDim.x} * statistic + cells.block_by_columns()) * num_classes + first +
             k] = sum;
  }
}

// Sums partials [statistics, blocks, K] over the blocks of a launch, or over those of each image,
// in a fixed order; with `add` it adds them to the statistics. partials.cu.
void sum_partials(const float* partials, const Statistics& statistics, const Cells& cells, bool add,
                  Stream stream);

// Sums statistics over all cells: launch(cells, partials) writes the partials of a launch's blocks.
// There are several launches if otherwise there would be more partials than a 64th of the logits
// and more than 2^16 for each multiprocessor. (These are two statistics of two blocks with the
// largest K.)
template <class Launch>
void sum_launches(const Tensor& logits, const Cells& all, const Statistics& statistics,
                  Stream stream, Launch launch) {
  const int64_t number = statistics.number(), num_classes = all.logits.num_classes;
  const int64_t most = std::max(logits.numel() / 64, int64_t{multiprocessors()} << 16);
  std::optional<Tensor> partials;  // of the first launch, which has the most blocks
  all.for_launches(most / (number * num_classes), [&](const Cells& cells) {
    const bool first = !partials;
    if (first)
      partials = new_empty(logits, {number, cells.blocks(), num_classes}, ScalarType::Float);
    launch(cells, partials->mutable_data_ptr<float>());
    sum_partials(partials->const_data_ptr<float>(), statistics, cells, !first, stream);
  });
}

}  // namespace anchorops::cuda

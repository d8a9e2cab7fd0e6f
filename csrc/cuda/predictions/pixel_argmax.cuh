// The pixels whose label is predicted, for operators that count hits.
#pragma once

#include <cstdint>

#include "../labels/pixel_labels.cuh"
#include "../tensors.cuh"
#include "../upsampled_logits/cells.cuh"

namespace anchorops::cuda {

// The predicted class of each pixel if it is the pixel's label, otherwise -1: [B, H, W].
void write_hits(const Cells& cells, const PixelLabels& labels, int32_t* hits, Stream stream);

}  // namespace anchorops::cuda

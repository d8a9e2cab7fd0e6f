// The predicted class of every pixel, for operators that count hits.
#pragma once

#include "softmax_cells.cuh"

namespace anchorops::cuda {

// The predicted class of each pixel (int64). If keys [B, H·W] are given: the class if it equals the
// label, otherwise -1 (int32). A key is image·classes_per_image + label.
void write_argmax(const Cells& cells, const int32_t* keys, int classes_per_image,
                  int64_t* predictions, int32_t* hits, Stream stream);

}  // namespace anchorops::cuda

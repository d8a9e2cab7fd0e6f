// The operator anchorops::pixel_argmax.cuda: the class of the largest upsampled logit.
//
// A thread processes a cell of 4×4 pixels (see softmax_cells.cuh), with the largest logit of each
// of the 16 pixels and its class in registers. Reads the logits once, 1.2 times from the L2 cache,
// and writes 8 bytes a pixel. One launch.
#include "pixel_argmax.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CLASSES = 32;

__global__ void __launch_bounds__(WARPS * 32, 2)
    pixel_argmax_kernel(Cells cells,
                        const int32_t* keys,  // [B, H, W] or null
                        int classes_per_image,
                        int64_t* predictions,  // [B, H, W], if keys are null
                        int32_t* hits) {       // [B, H, W], if keys are not null
  LogitsStage<CLASSES, false> stage(cells);
  const Cell cell(cells);
  // Before the first position and after the last one both rows are the same.
  float weights_y[TILE], weights_x[TILE];
#pragma unroll
  for (int i = 0; i < TILE; ++i) {
    weights_y[i] = cell.step_y == 0 ? 0.5f : cell.weight_y(cells, i);
    weights_x[i] = cell.step_x == 0 ? 0.5f : cell.weight_x(cells, i);
  }
  float largest[TILE][TILE];
  int classes[TILE][TILE] = {};
#pragma unroll
  for (int i = 0; i < TILE * TILE; ++i) largest[i / TILE][i % TILE] = -INFINITY;

  const float* corner = stage.tile + threadIdx.x / 32 * stage.ROW + threadIdx.x % 32;
  stage.for_classes([&](int first, int count) {
    for (int k = 0; k < count; ++k) {
      const float* at = corner + k * COLUMNS;
#pragma unroll
      for (int i = 0; i < TILE; ++i) {
        float left = fmaf(weights_y[i], at[stage.ROW], (1 - weights_y[i]) * at[0]);
        float right = fmaf(weights_y[i], at[stage.ROW + 1], (1 - weights_y[i]) * at[1]);
        // A weight is 0 at the first pixel of a cell, if anywhere.
        if (i == 0 && weights_y[0] == 0) left = at[0], right = at[1];
#pragma unroll
        for (int j = 0; j < TILE; ++j) {
          float z = fmaf(weights_x[j], right, (1 - weights_x[j]) * left);
          if (j == 0 && weights_x[0] == 0) z = left;
          float& most = largest[i][j];
          if (!(z <= most) && most == most) {
            most = z;
            classes[i][j] = first + k;
          }
        }
      }
    }
  });
#pragma unroll
  for (int i = 0; i < TILE; ++i) {
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
      if (i >= cell.ny || j >= cell.nx) continue;
      const int64_t pixel = cell.pixel(cells, i, j);
      if (keys) {
        const bool hit = keys[pixel] == cell.image * classes_per_image + classes[i][j];
        hits[pixel] = hit ? classes[i][j] : -1;
      } else {
        predictions[pixel] = classes[i][j];
      }
    }
  }
}

Tensor pixel_argmax(Tensor logits, int64_t height, int64_t width, bool align_corners) {
  const OnDevice device(logits);
  Tensor predictions = new_empty(logits, {logits.size(0), height, width}, ScalarType::Long);
  if (predictions.numel() == 0) return predictions;
  const Cells cells(logits_of("pixel_argmax.cuda", logits),
                    Axis(height, logits.size(2), align_corners),
                    Axis(width, logits.size(3), align_corners));
  write_argmax(cells, nullptr, 0, predictions.mutable_data_ptr<int64_t>(), nullptr, device.stream);
  return predictions;
}

}  // namespace

void write_argmax(const Cells& cells, const int32_t* keys, int classes_per_image,
                  int64_t* predictions, int32_t* hits, Stream stream) {
  launch_cells<LogitsStage<CLASSES, false>>("pixel_argmax_kernel", pixel_argmax_kernel, cells, 0,
                                            stream, keys, classes_per_image, predictions, hits);
}

}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("pixel_argmax.cuda", TORCH_BOX(&anchorops::cuda::pixel_argmax));
}

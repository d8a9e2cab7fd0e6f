// The terms of each pixel in the gradient of softmax moments that do not depend on the class, slope
// and label_term (gradients.cuh). They are not needed if only the losses by class have gradients.
//
// With dmasses or dsquares a pass over the logits computes the sum over classes. Then there is a
// launch over the pixels, which reads labels, lse and the gradients of maps once.
#include <cstdint>

#include "../upsampled_logits/sequences.cuh"
#include "gradients.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CLASSES = 32;

// Σ_k p_k·(dmasses[k] + 2·p_k·dsquares[k]) of one pixel.
__device__ inline float class_sum(const PixelLogits& logits, int num_classes, float lse,
                                  const Gradients& gradients, int first_key) {
  float sum = 0;
  for (int k = 0; k < num_classes; ++k) {
    const float p = probability(logits.z(k), lse);
    sum = fmaf(p, gradients.slope_of_class(first_key + k, p), sum);
  }
  return sum;
}

// The same for the valid pixels of a cell, from two sums of e^z·2^SCALE over the classes.
__global__ void __launch_bounds__(WARPS * 32, 2)
    softmax_slopes_kernel(Cells cells, PixelLabels labels, Gradients gradients,
                          const float* lse,  // [B, H, W]
                          float* sums) {     // [B, H, W], any numbers where ignored
  const Cell cell(cells);
  const int first_key = gradients.first_key(cell.image, cells.logits.num_classes);
  LogitsStage<CLASSES> stage(cells);
  const Sequences sequences(cell, stage);
  PixelValues masses = {}, squares = {};
  stage.for_classes([&](int first, int count) {
    for (int k = 0; k < count; ++k) {
      const float dmass = Gradients::at(gradients.dmasses, first_key + first + k);
      const float dsquare = 2 * Gradients::at(gradients.dsquares, first_key + first + k);
      for_each_power(sequences.powers(k), [&](int i, int j, float e) {
        masses[i][j] = fmaf(e, dmass, masses[i][j]);
        squares[i][j] = fmaf(e * e, dsquare, squares[i][j]);
      });
    }
  });
  PixelValues inverse;
  const unsigned irregular =
      sequences.load_inverse_sums(stage.shifts_of_cell(), labels, lse, inverse);
  for_each_pixel([&](int i, int j) {
    masses[i][j] = inverse[i][j] * fmaf(inverse[i][j], squares[i][j], masses[i][j]);
  });
  store_map(cell, masses, sums);
  for_each_in(irregular, [&](int i, int j) {
    const int64_t pixel = cell.pixel(i, j);
    sums[pixel] =
        class_sum(cell.logits(i, j), cells.logits.num_classes, lse[pixel], gradients, first_key);
  });
}

constexpr int THREADS = 256;

// The slope and the label term of each pixel: maps [B, H, W], 0 where ignored.
__global__ void __launch_bounds__(THREADS)
    pixel_slopes_kernel(Logits logits, Axis rows, Axis columns, PixelLabels labels,
                        Gradients gradients,
                        const float* lse,  // [B, H, W]
                        float* slopes,     // on entry the sum that is computed above
                        float* label_terms) {
  const int64_t pixel = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  const int64_t per_image = int64_t{rows.pixels} * columns.pixels;
  if (pixel >= logits.batch * per_image) return;
  const int image = static_cast<int>(pixel / per_image);
  const int64_t in_image = pixel % per_image;
  const int y = static_cast<int>(in_image / columns.pixels);
  const int x = static_cast<int>(in_image % columns.pixels);
  const unsigned label = labels.at(image, y, x);
  float label_term = 0, slope = 0;
  if (label != NO_CLASS) {
    const int key = gradients.first_key(image, logits.num_classes) + static_cast<int>(label);
    label_term = Gradients::at(gradients.dlosses, key) + gradients.dpixel_losses.at(image, y, x);
    if (gradients.doverlaps) {
      const float z = PixelLogits(logits, rows, columns, image, y, x).z(label);
      label_term -= probability(z, lse[pixel]) * gradients.doverlaps[key];
    }
    slope = label_term;
    if (gradients.by_class()) slope -= slopes[pixel];
  }
  slopes[pixel] = slope;
  label_terms[pixel] = label_term;
}

}  // namespace

void write_slopes(const Cells& cells, const PixelLabels& labels, const Gradients& gradients,
                  const float* lse, float* slopes, float* label_terms, Stream stream) {
  if (gradients.by_class())
    launch_cells<LogitsStage<CLASSES>>("softmax_slopes_kernel", softmax_slopes_kernel, cells, 0,
                                       stream, labels, gradients, lse, slopes);
  const int64_t pixels = int64_t{cells.logits.batch} * cells.rows.pixels * cells.columns.pixels;
  launch("pixel_slopes_kernel", pixel_slopes_kernel,
         grid_of("pixel_slopes_kernel", ceil_div(pixels, int64_t{THREADS})), THREADS, 0, stream,
         cells.logits, cells.rows, cells.columns, labels, gradients, lse, slopes, label_terms);
}

}  // namespace anchorops::cuda

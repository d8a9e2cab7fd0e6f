// The terms of each pixel in the gradient of softmax moments that do not depend on the class:
//
//   own = dlosses[y] + dpixel_losses − p_y·doverlaps[y]
//   slope = own + dlse − Σ_j p_j·(dmasses[j] + 2·p_j·dsquares[j])
//
// With dmasses or dsquares a pass over the logits computes the sum. Then there is a launch over the
// pixels, which reads labels, lse and the gradients of maps once.
#include "softmax_gradients.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CLASSES = 32;

// Σ_k p_k·(dmasses[k] + 2·p_k·dsquares[k]) of each pixel.
__global__ void __launch_bounds__(WARPS * 32, 2)
    softmax_slopes_kernel(Cells cells, Gradients gradients,
                          const int32_t* keys,  // [B, H, W]
                          const float* lse,     // [B, H, W]
                          float* slopes) {      // [B, H, W], left as it is where ignored
  const int num_classes = cells.logits.num_classes;
  Cell cell(cells);
  const int64_t table = gradients.by_image ? int64_t{cell.image} * num_classes : 0;
  float sums[TILE][TILE] = {}, squares[TILE][TILE] = {};
  if (cells.geometric) {
    LogitsStage<CLASSES> stage(cells);
    cell.set_corners(cells, stage);
    stage.for_classes([&](int first, int count) {
      for (int k = 0; k < count; ++k) {
        const float dmass = Gradients::at(gradients.dmasses, table + first + k);
        const float dsquare = 2 * Gradients::at(gradients.dsquares, table + first + k);
        for_pixels(cell.powers(k * COLUMNS), [&](int i, int j, float e) {
          sums[i][j] = fmaf(e, dmass, sums[i][j]);
          squares[i][j] = fmaf(e * e, dsquare, squares[i][j]);
        });
      }
    });
  }
  unsigned apart = 0;
#pragma unroll
  for (int i = 0; i < TILE; ++i) {
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
      if (i >= cell.ny || j >= cell.nx) continue;
      const int64_t pixel = cell.pixel(cells, i, j);
      if (keys[pixel] < 0) continue;
      float inverse;
      if (cell.inverse_sum(cells, i, j, lse[pixel], inverse))
        slopes[pixel] = inverse * fmaf(inverse, squares[i][j], sums[i][j]);
      else
        apart |= 1u << (i * TILE + j);
    }
  }
  for (; apart; apart &= apart - 1) {
    const int i = (__ffs(apart) - 1) / TILE, j = (__ffs(apart) - 1) % TILE;
    const int64_t pixel = cell.pixel(cells, i, j);
    const PixelLogits logits = cell.logits(cells, i, j);
    float sum = 0;
    for (int k = 0; k < num_classes; ++k) {
      const float p = exp2_approximate((logits.z(k) - lse[pixel]) * LOG2E);
      const float slope = Gradients::at(gradients.dmasses, table + k) +
                          2 * p * Gradients::at(gradients.dsquares, table + k);
      sum = fmaf(p, slope, sum);
    }
    slopes[pixel] = sum;
  }
}

constexpr int THREADS = 256;

// The slope and the own term of each pixel: maps [B, H, W], 0 where ignored.
__global__ void __launch_bounds__(THREADS)
    pixel_slopes_kernel(Logits logits, Axis rows, Axis columns, Gradients gradients,
                        const int32_t* keys,  // [B, H, W]
                        const float* lse,     // [B, H, W]
                        float* slopes,        // on entry the sum that is computed above
                        float* own) {         // null if it equals the slope
  const int64_t pixel = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  const int64_t per_image = int64_t{rows.pixels} * columns.pixels;
  if (pixel >= logits.batch * per_image) return;
  const int key = keys[pixel];
  float of_label = 0, slope = 0;
  if (key >= 0) {
    const int image = static_cast<int>(pixel / per_image);
    const int64_t in_image = pixel % per_image;
    const int y = static_cast<int>(in_image / columns.pixels);
    const int x = static_cast<int>(in_image % columns.pixels);
    of_label = Gradients::at(gradients.dlosses, key) + gradients.dpixel_losses.at(image, y, x);
    if (gradients.doverlaps) {
      const int label = gradients.by_image ? key - image * logits.num_classes : key;
      const float z = PixelLogits(logits, rows, columns, image, y, x).z(label);
      of_label -= exp2_approximate((z - lse[pixel]) * LOG2E) * gradients.doverlaps[key];
    }
    slope = of_label + gradients.dlse.at(image, y, x);
    if (gradients.dmasses || gradients.dsquares) slope -= slopes[pixel];
  }
  slopes[pixel] = slope;
  if (own) own[pixel] = of_label;
}

}  // namespace

void write_slopes(const Cells& cells, const Gradients& gradients, const int32_t* keys,
                  const float* lse, float* slopes, float* own, Stream stream) {
  if (gradients.dmasses || gradients.dsquares)
    launch_cells<LogitsStage<CLASSES>>("softmax_slopes_kernel", softmax_slopes_kernel, cells, 0,
                                       stream, gradients, keys, lse, slopes);
  const int64_t pixels = int64_t{cells.logits.batch} * cells.rows.pixels * cells.columns.pixels;
  launch("pixel_slopes_kernel", pixel_slopes_kernel,
         grid_of("pixel_slopes_kernel", ceil_div(pixels, int64_t{THREADS})), THREADS, 0, stream,
         cells.logits, cells.rows, cells.columns, gradients, keys, lse, slopes,
         own == slopes ? nullptr : own);
}

}  // namespace anchorops::cuda

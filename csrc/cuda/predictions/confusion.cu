// The operator anchorops::confusion.cuda: the number of pixels for each true and predicted class.
//
// Reads labels and predictions once. Counts use integer atomics, whose order does not matter: one
// for each run of equal pairs, along a thread's pixels and along a warp.
#include <cstdint>
#include <type_traits>

#include "../labels/pixel_labels.cuh"
#include "../warps.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256, PIXELS_PER_THREAD = 16;
constexpr int PIXELS_PER_WARP = 32 * PIXELS_PER_THREAD;
constexpr int ROUND = 4;  // pixels of a thread that are loaded before the first is used

struct Predictions {
  const int64_t* data;  // [B, H, W] by strides
  int64_t stride_b, stride_h, stride_w;
};

struct Shape {
  int64_t pixels, height, width;  // B·H·W, H, W
};

// A pixel's position, and its offsets in both tensors.
struct Cursor {
  int64_t x, y, label, prediction;

  __device__ Cursor(int64_t pixel, const Shape& shape, const PixelLabels& labels,
                    const Predictions& predictions)
      : x(pixel % shape.width), y(pixel / shape.width) {
    const int64_t image = y / shape.height;
    y %= shape.height;
    label = image * labels.stride_b + y * labels.stride_h + x * labels.stride_w;
    prediction = image * predictions.stride_b + y * predictions.stride_h + x * predictions.stride_w;
  }

  __device__ void advance(const Shape& shape, const PixelLabels& labels,
                          const Predictions& predictions) {
    x += 32;
    label += 32 * labels.stride_w;
    prediction += 32 * predictions.stride_w;
    while (x >= shape.width) {
      x -= shape.width;
      label += labels.stride_h - shape.width * labels.stride_w;
      prediction += predictions.stride_h - shape.width * predictions.stride_w;
      if (++y < shape.height) continue;
      y = 0;
      label += labels.stride_b - shape.height * labels.stride_h;
      prediction += predictions.stride_b - shape.height * predictions.stride_h;
    }
  }
};

__global__ void __launch_bounds__(THREADS)
    confusion_kernel(PixelLabels labels,  // [B, H, W] by strides
                     Predictions predictions,
                     unsigned long long* matrix,  // [K, K], zero on entry
                     Shape shape) {
  const int lane = threadIdx.x % 32;
  const int64_t warp = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / 32;
  const int64_t first = warp * PIXELS_PER_WARP + lane;
  Cursor cursor(first, shape, labels, predictions);
  int pair = -1;  // of the pixels since the last change
  unsigned run = 0;
  labels.for_type([&](const auto* all) {
#pragma unroll 1
    for (int i = 0; i < PIXELS_PER_THREAD; i += ROUND) {
      std::remove_cvref_t<decltype(*all)> own[ROUND];
      int64_t predicted[ROUND];
#pragma unroll
      for (int j = 0; j < ROUND; ++j) {
        const bool inside = first + (i + j) * 32 < shape.pixels;
        own[j] = inside ? all[cursor.label] : 0;
        predicted[j] = inside ? predictions.data[cursor.prediction] : -1;
        cursor.advance(shape, labels, predictions);
      }
#pragma unroll
      for (int j = 0; j < ROUND; ++j) {
        const unsigned truth = labels.class_of(own[j]);
        const auto prediction = static_cast<uint64_t>(predicted[j]);  // larger than K if negative
        const bool valid = truth != NO_CLASS && prediction < labels.num_classes;
        const int next = valid ? static_cast<int>(truth * labels.num_classes + prediction) : -1;
        if (next != pair) {
          if (pair >= 0) atomicAdd(&matrix[pair], static_cast<unsigned long long>(run));
          pair = next;
          run = 0;
        }
        ++run;
      }
    }
  });
  // The last run of each thread: neighbouring lanes with the same pair are added together.
  const int before = __shfl_up_sync(FULL_WARP, pair, 1);
  const bool begins = lane == 0 || pair != before;
  unsigned heads = __ballot_sync(FULL_WARP, begins);
  while (heads) {
    const int head = __ffs(heads) - 1;
    heads &= heads - 1;
    const int end = heads ? __ffs(heads) - 1 : 32;
    const unsigned sum = sum_of_warp(lane >= head && lane < end ? run : 0);
    if (lane == head && pair >= 0) atomicAdd(&matrix[pair], static_cast<unsigned long long>(sum));
  }
}

Tensor confusion(Tensor predictions, Tensor labels, int64_t num_classes, int64_t ignore_index) {
  const char* name = "confusion.cuda";
  STD_TORCH_CHECK(labels.dim() <= 3, name, ": labels: expected at most three axes, got shape ",
                  text_of(labels.sizes()));
  check_shape(name, "predictions", predictions, labels.sizes());
  const OnDevice device(labels);
  Tensor matrix = new_empty(labels, {num_classes, num_classes}, ScalarType::Long);
  auto* counts = matrix.mutable_data_ptr<int64_t>();
  fill_zero(counts, matrix.numel() * sizeof(int64_t), device.stream);
  const int64_t pixels = labels.numel();
  if (pixels == 0) return matrix;
  for (Tensor* each : {&predictions, &labels})
    while (each->dim() < 3) *each = torch::stable::unsqueeze(*each, 0);
  const Predictions predicted{predictions.const_data_ptr<int64_t>(), predictions.stride(0),
                              predictions.stride(1), predictions.stride(2)};
  const Shape shape{pixels, labels.size(1), labels.size(2)};
  const int64_t blocks = ceil_div(pixels, int64_t{THREADS} * PIXELS_PER_THREAD);
  launch("confusion_kernel", confusion_kernel, grid_of("confusion_kernel", blocks), THREADS, 0,
         device.stream, labels_of(name, labels, num_classes, ignore_index), predicted,
         reinterpret_cast<unsigned long long*>(counts), shape);
  return matrix;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("confusion.cuda", TORCH_BOX(&anchorops::cuda::confusion));
}

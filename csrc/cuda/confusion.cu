// The operator anchorops::confusion.cuda: the number of pixels for each true and predicted class.
//
// Reads labels once (class keys) and predictions once. Counts use integer atomics, whose order does
// not matter: one for each run of equal pairs, along a thread's pixels and along a warp.
#include "class_keys.cuh"
#include "warps.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256, PIXELS_PER_THREAD = 16;
constexpr int PIXELS_PER_WARP = 32 * PIXELS_PER_THREAD;

struct Predictions {
  int64_t height, width, stride_b, stride_h, stride_w;
};

__global__ void __launch_bounds__(THREADS)
    confusion_kernel(const int32_t* labels,       // [B·H·W], -1 where ignored
                     const int64_t* predictions,  // [B, H, W] by strides
                     unsigned long long* matrix,  // [K, K], zero on entry
                     Predictions view, int64_t pixels, int64_t num_classes) {
  const int lane = threadIdx.x % 32;
  const int64_t warp = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / 32;
  int64_t pixel = warp * PIXELS_PER_WARP + lane;
  int64_t pair = -1;  // of the pixels since the last change
  unsigned run = 0;
  for (int i = 0; i < PIXELS_PER_THREAD; ++i, pixel += 32) {
    int64_t next = -1;
    if (pixel < pixels && labels[pixel] >= 0) {
      const int64_t x = pixel % view.width, y = pixel / view.width % view.height;
      const int64_t prediction = predictions[pixel / view.width / view.height * view.stride_b +
                                             y * view.stride_h + x * view.stride_w];
      if (prediction >= 0 && prediction < num_classes)
        next = labels[pixel] * num_classes + prediction;
    }
    if (next != pair) {
      if (pair >= 0) atomicAdd(&matrix[pair], static_cast<unsigned long long>(run));
      pair = next;
      run = 0;
    }
    ++run;
  }
  // The last run of each thread: neighbouring lanes with the same pair are added together.
  const int64_t before = __shfl_up_sync(FULL_WARP, pair, 1);
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
  const OnDevice device(labels);
  Tensor matrix = new_empty(labels, {num_classes, num_classes}, ScalarType::Long);
  auto* counts = matrix.mutable_data_ptr<int64_t>();
  fill_zero(counts, matrix.numel() * sizeof(int64_t), device.stream);
  const int64_t pixels = labels.numel();
  if (pixels == 0) return matrix;
  for (Tensor* each : {&predictions, &labels})
    while (each->dim() < 3) *each = torch::stable::unsqueeze(*each, 0);
  const Tensor keys = std::get<0>(class_keys(labels, labels.size(1), labels.size(2), num_classes,
                                             /*per_image=*/false, ignore_index));
  const Predictions view{labels.size(1), labels.size(2), predictions.stride(0),
                         predictions.stride(1), predictions.stride(2)};
  const int64_t blocks = ceil_div(pixels, int64_t{THREADS} * PIXELS_PER_THREAD);
  launch("confusion_kernel", confusion_kernel, grid_of("confusion_kernel", blocks), THREADS, 0,
         device.stream, keys.const_data_ptr<int32_t>(), predictions.const_data_ptr<int64_t>(),
         reinterpret_cast<unsigned long long*>(counts), view, pixels, num_classes);
  return matrix;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("confusion.cuda", TORCH_BOX(&anchorops::cuda::confusion));
}

// The operator anchorops::class_keys.cuda: labels of any size and integer type -> one key per
// pixel.
//
// Reads each used label once, writes 4 bytes per pixel. Counts use integer atomics, whose order
// does not matter: a block counts in shared memory, and adds the counts of the classes that it has
// seen to those in global memory.
#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../labels.h"
#include "tensors.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int PIXELS_PER_THREAD = 4;
constexpr int PIXELS_PER_BLOCK = THREADS * PIXELS_PER_THREAD;
constexpr int64_t MAX_CLASSES = 16384;  // GPU_MAX_CLASSES of anchorops/_backend.py

// The label's row (or column) for each row of the features, as in F.interpolate's "nearest":
// floor(i · source/size), with the scale and the product in float32.
struct Nearest {
  bool same;
  float scale;
  int64_t last, stride;

  Nearest(int64_t size, int64_t source, int64_t stride)
      : same(size == source),
        scale(static_cast<float>(static_cast<double>(source) / static_cast<double>(size))),
        last(source - 1),
        stride(stride) {}

  __device__ int64_t offset(int64_t i) const {
    if (same) return i * stride;
    const auto nearest = static_cast<int64_t>(static_cast<float>(i) * scale);
    return min(nearest, last) * stride;
  }
};

struct Labels {
  Nearest rows, columns;
  int64_t stride_b, pixels, width;
  int64_t step_y, step_x;  // from a pixel to the one THREADS after it
  unsigned blocks_per_image;
  int64_t num_classes, ignore_index;
  int64_t image_keys;  // the keys of image i begin at i·image_keys
  bool per_image;
};

template <class Label>
__global__ void __launch_bounds__(THREADS)
    class_keys_kernel(const Label* labels,         // [B, H', W'] by strides
                      int32_t* keys,               // [B, P]
                      unsigned long long* counts,  // [K] or [B, K], zero on entry
                      Labels shape) {
  const int64_t image = blockIdx.x / shape.blocks_per_image;
  const int64_t block = blockIdx.x % shape.blocks_per_image;
  const int64_t first = block * PIXELS_PER_BLOCK + threadIdx.x;
  labels += image * shape.stride_b;
  keys += image * shape.pixels;
  if (shape.per_image) counts += image * shape.num_classes;
  const int64_t key_of_class_0 = image * shape.image_keys;

  Label loaded[PIXELS_PER_THREAD];  // all are requested before the first is used
  int64_t y = first / shape.width, x = first % shape.width;
#pragma unroll
  for (int i = 0; i < PIXELS_PER_THREAD; ++i) {
    const bool inside = first + i * THREADS < shape.pixels;
    loaded[i] = inside ? labels[shape.rows.offset(y) + shape.columns.offset(x)] : Label{};
    y += shape.step_y;
    x += shape.step_x;
    if (x >= shape.width) x -= shape.width, ++y;
  }
  int classes[PIXELS_PER_THREAD];
#pragma unroll
  for (int i = 0; i < PIXELS_PER_THREAD; ++i) {
    const int64_t pixel = first + i * THREADS;
    const auto label = static_cast<int64_t>(loaded[i]);
    const bool valid = pixel < shape.pixels && label >= 0 && label < shape.num_classes &&
                       label != shape.ignore_index;
    classes[i] = valid ? static_cast<int>(label) : -1;
    if (pixel < shape.pixels)
      keys[pixel] = static_cast<int32_t>(valid ? key_of_class_0 + label : -1);
  }

  extern __shared__ unsigned bins[];  // [K]
  for (int k = threadIdx.x; k < shape.num_classes; k += THREADS) bins[k] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PIXELS_PER_THREAD; ++i)
    if (classes[i] >= 0) atomicAdd(&bins[classes[i]], 1u);
  __syncthreads();
  for (int k = threadIdx.x; k < shape.num_classes; k += THREADS)
    if (bins[k]) atomicAdd(&counts[k], static_cast<unsigned long long>(bins[k]));
}

// Labels (B, H', W') of any strides and integer type -> keys int32 [B, height·width], -1 where
// ignored, and counts int64 [K]; with per_image keys are image·K + class and counts [B, K].
// class_dtype must be absent.
std::tuple<Tensor, Tensor> class_keys(Tensor labels, int64_t height, int64_t width,
                                      int64_t num_classes, bool per_image, int64_t ignore_index,
                                      std::optional<ScalarType> class_dtype) {
  const char* name = "class_keys.cuda";
  STD_TORCH_CHECK(labels.dim() == 3, name, ": labels: expected (B, H, W), got shape ",
                  text_of(labels.sizes()));
  STD_TORCH_CHECK(num_classes <= MAX_CLASSES, name, ": num_classes: expected at most ", MAX_CLASSES,
                  ", got ", num_classes);
  STD_TORCH_CHECK(!class_dtype, name, ": class_dtype is not supported: use the backend triton");
  const OnDevice device(labels);
  const int64_t batch = labels.size(0);
  const std::vector<int64_t> by_class =
      per_image ? std::vector<int64_t>{batch, num_classes} : std::vector<int64_t>{num_classes};
  Tensor keys = new_empty(labels, {batch, height * width}, ScalarType::Int);
  Tensor counts = new_empty(labels, by_class, ScalarType::Long);
  auto* class_counts = counts.mutable_data_ptr<int64_t>();
  fill_zero(class_counts, counts.numel() * sizeof(int64_t), device.stream);
  if (keys.numel() == 0) return {keys, counts};
  STD_TORCH_CHECK(labels.numel() > 0, name, ": labels: expected at least one for each image");

  const Labels shape{
      .rows{height, labels.size(1), labels.stride(1)},
      .columns{width, labels.size(2), labels.stride(2)},
      .stride_b = labels.stride(0),
      .pixels = height * width,
      .width = width,
      .step_y = THREADS / width,
      .step_x = THREADS % width,
      .blocks_per_image = static_cast<unsigned>(ceil_div(height * width, PIXELS_PER_BLOCK)),
      .num_classes = num_classes,
      .ignore_index = ignore_index,
      .image_keys = per_image ? num_classes : 0,
      .per_image = per_image};
  const dim3 grid = grid_of(name, batch * shape.blocks_per_image);
  for_label_dtype(name, labels.scalar_type(), [&](auto label) {
    using Label = decltype(label);
    launch("class_keys_kernel", class_keys_kernel<Label>, grid, THREADS,
           num_classes * sizeof(unsigned), device.stream, labels.const_data_ptr<Label>(),
           keys.mutable_data_ptr<int32_t>(), reinterpret_cast<unsigned long long*>(class_counts),
           shape);
  });
  return {keys, counts};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, CUDA, library) {
  library.impl("class_keys.cuda", TORCH_BOX(&anchorops::cuda::class_keys));
}

// The operator anchorops::class_keys.cuda: labels of any size and integer type -> one key per
// pixel.
//
// Reads each used label once, writes 4 bytes per pixel (1 or 2 for classes alone). Counts use
// integer atomics, whose order does not matter. Up to MAX_BINS classes are counted in shared
// memory, with one global addition for each class that a block has seen. With more classes there is
// one for each run of equal keys in a warp.
#include "class_keys.cuh"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../../labels.h"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int PIXELS_PER_THREAD = 4;
constexpr int PIXELS_PER_BLOCK = THREADS * PIXELS_PER_THREAD;
constexpr int64_t MAX_BINS = 4096;

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

__global__ void __launch_bounds__(THREADS) zero_counts_kernel(int64_t* counts, int64_t size) {
  permit_next_kernel();
  const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (i < size) counts[i] = 0;
}

template <class Label, class Key>
__global__ void __launch_bounds__(THREADS)
    class_keys_kernel(const Label* labels,         // [B, H', W'] by strides
                      Key* keys,                   // [B, P]
                      unsigned long long* counts,  // [K] or [B, K], zero on entry
                      Labels shape) {
  permit_next_kernel();
  wait_for_kernel_before();
  const int64_t image = blockIdx.x / shape.blocks_per_image;
  const int64_t block = blockIdx.x % shape.blocks_per_image;
  const int64_t first = block * PIXELS_PER_BLOCK + threadIdx.x;
  labels += image * shape.stride_b;
  keys += image * shape.pixels;
  if (shape.per_image) counts += image * shape.num_classes;
  const int64_t key_of_class_0 = image * shape.image_keys;

  Label own[PIXELS_PER_THREAD];  // all are requested before the first is used
  int64_t y = first / shape.width, x = first % shape.width;
#pragma unroll
  for (int i = 0; i < PIXELS_PER_THREAD; ++i) {
    const bool inside = first + i * THREADS < shape.pixels;
    own[i] = inside ? labels[shape.rows.offset(y) + shape.columns.offset(x)] : Label{};
    y += shape.step_y;
    x += shape.step_x;
    if (x >= shape.width) x -= shape.width, ++y;
  }
  int classes[PIXELS_PER_THREAD];
#pragma unroll
  for (int i = 0; i < PIXELS_PER_THREAD; ++i) {
    const int64_t pixel = first + i * THREADS;
    const auto label = static_cast<int64_t>(own[i]);
    const bool valid = pixel < shape.pixels && label >= 0 && label < shape.num_classes &&
                       label != shape.ignore_index;
    classes[i] = valid ? static_cast<int>(label) : -1;
    if (pixel < shape.pixels) keys[pixel] = static_cast<Key>(valid ? key_of_class_0 + label : -1);
  }

  if (shape.num_classes <= MAX_BINS) {
    auto* bins = reinterpret_cast<unsigned*>(shared_memory());
    for (int k = threadIdx.x; k < shape.num_classes; k += THREADS) bins[k] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PIXELS_PER_THREAD; ++i)
      if (classes[i] >= 0) atomicAdd(&bins[classes[i]], 1u);
    __syncthreads();
    for (int k = threadIdx.x; k < shape.num_classes; k += THREADS)
      if (bins[k]) atomicAdd(&counts[k], static_cast<unsigned long long>(bins[k]));
  } else {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < PIXELS_PER_THREAD; ++i) {
      const int before = __shfl_up_sync(FULL_WARP, classes[i], 1);
      const bool begins = lane == 0 || classes[i] != before;
      const unsigned later = __ballot_sync(FULL_WARP, begins) & (0xfffffffe << lane);
      const unsigned run = (later ? __ffs(later) - 1 : 32) - lane;
      if (begins && classes[i] >= 0)
        atomicAdd(&counts[classes[i]], static_cast<unsigned long long>(run));
    }
  }
}

template <class Label, class Key>
void launch_keys(const Tensor& labels, int64_t height, int64_t width, int64_t num_classes,
                 bool per_image, int64_t image_keys, int64_t ignore_index, Key* keys,
                 int64_t* counts, bool after_kernel, Stream stream) {
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
      .image_keys = image_keys,
      .per_image = per_image};
  const dim3 grid = grid_of("class_keys.cuda", labels.size(0) * shape.blocks_per_image);
  const size_t shared_bytes = num_classes <= MAX_BINS ? num_classes * sizeof(unsigned) : 0;
  launch_kernel(after_kernel ? Launch::EARLY : Launch::NORMAL, "class_keys_kernel",
                class_keys_kernel<Label, Key>, grid, THREADS, shared_bytes, stream,
                labels.const_data_ptr<Label>(), keys, reinterpret_cast<unsigned long long*>(counts),
                shape);
}

}  // namespace

void write_class_keys(const Tensor& labels, int64_t height, int64_t width, int64_t num_classes,
                      bool per_image, int64_t image_keys, int64_t ignore_index, const Tensor& keys,
                      int64_t* counts, bool after_kernel, Stream stream) {
  if (keys.numel() == 0) return;
  for_label_dtype("class_keys.cuda", labels.scalar_type(), [&](auto label) {
    for_key_dtype("class_keys.cuda", keys.scalar_type(), [&](auto key) {
      launch_keys<decltype(label)>(labels, height, width, num_classes, per_image, image_keys,
                                   ignore_index, keys.mutable_data_ptr<decltype(key)>(), counts,
                                   after_kernel, stream);
    });
  });
}

std::tuple<Tensor, Tensor> class_keys(Tensor labels, int64_t height, int64_t width,
                                      int64_t num_classes, bool per_image, int64_t ignore_index,
                                      std::optional<ScalarType> class_dtype) {
  const OnDevice device(labels);
  const int64_t batch = labels.size(0);
  const std::vector<int64_t> shape =
      per_image ? std::vector<int64_t>{batch, num_classes} : std::vector<int64_t>{num_classes};
  Tensor keys = new_empty(labels, {batch, height * width}, class_dtype.value_or(ScalarType::Int));
  const int64_t image_keys = per_image && !class_dtype ? num_classes : 0;
  Tensor counts = new_empty(labels, shape, ScalarType::Long);
  auto* of_keys = counts.mutable_data_ptr<int64_t>();
  // Unlike a memset, a kernel permits that the next one starts early.
  launch("zero_counts_kernel", zero_counts_kernel,
         grid_of("class_keys.cuda", ceil_div(counts.numel(), int64_t{THREADS})), THREADS, 0,
         device.stream, of_keys, counts.numel());
  write_class_keys(labels, height, width, num_classes, per_image, image_keys, ignore_index, keys,
                   of_keys, true, device.stream);
  return {keys, counts};
}

}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("class_keys.cuda", TORCH_BOX(&anchorops::cuda::class_keys));
}

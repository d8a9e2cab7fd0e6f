// The operator anchorops::splat_keys.cuda: W = upᵀ onehot(keys). For each key and feature, W is the
// sum of the feature's upsampling weights for the labels with this key.
//
// A thread processes one feature. It reads the keys of the labels around the feature. Each key is
// read for four features: from memory once, otherwise from the caches. Weights are added in
// registers as long as the key is the same, and then to the thread's own elements of W, in the
// order of the labels. W is written twice, because it is zero on entry.
//
// Predicted, not measured, at B16 K150 128² and 512² labels: 81 keys for each of 262,144 features,
// about 12 instructions each, take 15 µs; W has 157 MB, and writing its zeros takes 40 µs at
// 4.3 TB/s.
#include "../labels.h"
#include "tensors.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256;

// Positions of the rows (or columns) of labels among those of the features. The first and the last
// ones of both coincide.
struct Axis {
  int labels, features;
  float step;

  Axis(int64_t labels, int64_t features)
      : labels(static_cast<int>(labels)),
        features(static_cast<int>(features)),
        step(labels > 1 ? static_cast<float>(static_cast<double>(features - 1) /
                                             static_cast<double>(labels - 1))
                        : 0) {}

  __device__ float position(int label) const { return product(static_cast<float>(label), step); }
  __device__ int upper(int label) const {
    return min(static_cast<int>(position(label)), features - 1);
  }
  // The weight of the feature, which is the upper one of the label's two features or the lower one.
  __device__ float weight(int label, int feature) const {
    const int up = upper(label);
    const float below = up < features - 1 ? position(label) - static_cast<float>(up) : 0;
    return up == feature ? 1 - below : below;
  }
  // The first label whose upper feature is this one or a later one.
  __device__ int begin(int feature) const {
    if (feature <= 0) return 0;
    if (feature >= features || step == 0) return labels;
    int label = min(static_cast<int>(static_cast<float>(feature) / step), labels);
    while (label > 0 && upper(label - 1) >= feature) --label;
    while (label < labels && upper(label) < feature) ++label;
    return label;
  }
};

__global__ void __launch_bounds__(THREADS)
    splat_keys_kernel(const int32_t* keys,  // [images, labels], -1 where ignored
                      float* weights,       // [num_keys, features], zero on entry
                      Axis rows, Axis columns, int64_t threads) {
  const int64_t thread = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (thread >= threads) return;
  const int64_t features = int64_t{rows.features} * columns.features;
  const auto feature = thread % features;
  const int y = static_cast<int>(feature / columns.features);
  const int x = static_cast<int>(feature % columns.features);
  keys += thread / features * rows.labels * columns.labels;
  weights += feature;
  const int end_row = rows.begin(y + 1);
  const int first = columns.begin(x - 1), last = columns.begin(x + 1);
  int held = -1;
  float total = 0;
  const auto flush = [&] {
    if (held >= 0) weights[held * features] += total;
  };
  for (int row = rows.begin(y - 1); row < end_row; ++row) {
    const float weight = rows.weight(row, y);
    const int32_t* line = keys + int64_t{row} * columns.labels;
    for (int column = first; column < last; ++column) {
      const int key = line[column];
      if (key != held) {
        flush();
        held = key;
        total = 0;
      }
      total += weight * columns.weight(column, x);
    }
  }
  flush();
}

Tensor splat_keys(Tensor keys, int64_t num_keys, int64_t label_height, int64_t label_width,
                  int64_t height, int64_t width) {
  const OnDevice device(keys);
  const int64_t images = keys.size(0), features = height * width;
  check_keys("splat_keys.cuda", keys, images * label_height * label_width);
  Tensor weights = new_empty(keys, {num_keys, features}, ScalarType::Float);
  fill_zero(weights.mutable_data_ptr<float>(), weights.numel() * sizeof(float), device.stream);
  if (keys.numel() == 0 || weights.numel() == 0) return weights;
  const int64_t threads = images * features;
  launch("splat_keys_kernel", splat_keys_kernel,
         grid_of("splat_keys.cuda", ceil_div(threads, int64_t{THREADS})), THREADS, 0, device.stream,
         keys.const_data_ptr<int32_t>(), weights.mutable_data_ptr<float>(),
         Axis(label_height, height), Axis(label_width, width), threads);
  return weights;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("splat_keys.cuda", TORCH_BOX(&anchorops::cuda::splat_keys));
}

// The operator anchorops::upsampled_sums_backward.cuda.
//
//   df_q = Σ_k W[k, q]·dsums[k] + (dmean + 2·dvariance·(f_q − mean)) / N
//
// A block writes one tile. W is not stored, as in the forward pass.
#include <cstdint>
#include <optional>

#include "../../labels.h"
#include "patch.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256;
// Blocks of a multiprocessor. Before sm_90, nvcc spills with the 128 registers of two blocks.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int RESIDENT = 1;
#else
constexpr int RESIDENT = 2;
#endif

struct Gradients {
  const float* sums;                      // [num_keys, C]
  const float *mean, *dmean, *dvariance;  // [C]; dmean and dvariance are null if they are not given
  float of_pixel;                         // 1 / N
};

template <class T, class Key>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    upsampled_sums_backward_kernel(const T* features, const Key* keys, Gradients gradients,
                                   T* dfeatures, View view) {
  const int64_t image = blockIdx.x / view.tiles();
  const auto tile = static_cast<int>(blockIdx.x % view.tiles());
  const Place place(view, tile);
  const int64_t first_feature = image * view.stride_b + place.pixel * view.stride_p;
  keys += image * view.grids.labels();
  Weights<THREADS> weights(shared_memory());

  bool several = false;  // whether the tile needs more than one round
  for (int begin = 0; begin < view.channels; begin += channels_of(THREADS)) {
    const int first_channel = begin + Place::first_channel();
    const int channels = view.channels - first_channel;
    const int64_t offset = first_feature + first_channel * view.stride_d;
    Patch<T> patch;
    if (gradients.dmean) patch.load(features + offset, view, channels, place.pixels);
    float gradient[CHANNELS][PIXELS] = {};
    bool more = false;
    if (begin == 0 || several) weights.begin();
    do {
      if (begin == 0 || several) more = weights.round(keys, view.grids, place.y, place.x);
      several |= more;
      for (int i = 0; weights.key(i) >= 0; ++i) {
        const int64_t row = image * view.image_keys + weights.key(i);
        const float* dsums = gradients.sums + row * view.channels + first_channel;
        float weight[PIXELS];
        weights_of_patch(weights.of(i), weight);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          const float dsum = c < channels ? dsums[c] : 0;
#pragma unroll
          for (int p = 0; p < PIXELS; ++p) gradient[c][p] += weight[p] * dsum;
        }
      }
    } while (more);
    if (gradients.dmean) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        if (c >= channels) continue;
        const int channel = first_channel + c;
        const float mean = gradients.mean[channel];
        const float start = gradients.of_pixel * gradients.dmean[channel];
        const float slope = 2 * gradients.of_pixel * gradients.dvariance[channel];
#pragma unroll
        for (int p = 0; p < PIXELS; ++p) gradient[c][p] += slope * (patch.at(c, p) - mean) + start;
      }
    }
    store(dfeatures + offset, gradient, view, channels, place.pixels);
  }
}

Tensor upsampled_sums_backward(Tensor features, Tensor keys, Tensor dsums, Tensor mean,
                               std::optional<Tensor> dmean, std::optional<Tensor> dvariance,
                               int64_t num_classes) {
  const char* name = "upsampled_sums_backward.cuda";
  const OnDevice device(features);
  const int64_t images = features.size(0), channels = features.size(1), rows = dsums.size(0);
  check_table(name, "keys", keys, {images, keys.size(1), keys.size(2)});
  STD_TORCH_CHECK(rows == num_classes || rows == images * num_classes, name, ": dsums: expected ",
                  num_classes, " or ", images * num_classes, " rows, got ", rows);
  check_table(name, "dsums", dsums, {rows, channels});
  check_table(name, "mean", mean, {channels});
  check_table(name, "dmean", dmean, {channels});
  check_table(name, "dvariance", dvariance, {channels});
  STD_TORCH_CHECK(dmean.has_value() == dvariance.has_value(), name,
                  ": expected both dmean and dvariance, or neither");
  Tensor dfeatures = torch::stable::empty_like(features);
  STD_TORCH_CHECK(dfeatures.strides().equals(features.strides()), name,
                  ": features: expected dense strides, got ", text_of(features.strides()));
  if (features.numel() == 0) return dfeatures;
  const View view(features, keys, num_classes, rows > num_classes);
  const Gradients gradients{dsums.const_data_ptr<float>(), mean.const_data_ptr<float>(),
                            optional_data<float>(dmean), optional_data<float>(dvariance),
                            1 / static_cast<float>(features.numel() / channels)};
  for_dtype(name, features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for_key_dtype(name, keys.scalar_type(), [&](auto key) {
      using Key = decltype(key);
      launch("upsampled_sums_backward_kernel", upsampled_sums_backward_kernel<T, Key>,
             grid_of(name, images * view.tiles()), THREADS, Weights<THREADS>::BYTES, device.stream,
             features.const_data_ptr<T>(), keys.const_data_ptr<Key>(), gradients,
             dfeatures.mutable_data_ptr<T>(), view);
    });
  });
  return dfeatures;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("upsampled_sums_backward.cuda",
               TORCH_BOX(&anchorops::cuda::upsampled_sums_backward));
}

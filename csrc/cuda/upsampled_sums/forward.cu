// The operator anchorops::upsampled_sums.cuda.
//
//   sums[k] = Σ_q W[k, q]·f_q    mean = Σ_q f_q / N    variance = Σ_q (f_q − mean)² / N
//
// W is not stored: splat.cuh computes the weights of a tile. The threads of a warp hold patches of
// the same 8 channels and of all pixels (patch.cuh), so the sums of a channel need no other warp. A
// block sums a chunk, some tiles of one image, into its own partial; a second kernel adds the
// partials. Numbers that are requested before the weights are computed arrive meanwhile.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <tuple>

#include "../../labels.h"
#include "../warps.cuh"
#include "moments.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 512, ADD_THREADS = 128;
constexpr int64_t MOST_BYTES = 10 << 20;  // of partials
constexpr int MOMENTS = 3;                // of a chunk: pixels, mean, sum of squared deviations

template <class T, class Key>
__global__ void __launch_bounds__(THREADS, 1)
    upsampled_sums_kernel(const T* features, const Key* keys,
                          float* partials,  // [images·chunks, K, C]
                          float* moments,   // [images·chunks, MOMENTS, C]
                          View view, int chunks, int chunk_tiles) {
  constexpr int BLOCK_CHANNELS = channels_of(THREADS);
  const int64_t image = blockIdx.x / chunks;
  const auto chunk = static_cast<int>(blockIdx.x % chunks);
  const int block_channel = static_cast<int>(blockIdx.y) * BLOCK_CHANNELS;
  const int first_channel = block_channel + Place::first_channel();
  const int channels = view.channels - first_channel;
  const auto thread = static_cast<int>(threadIdx.x);
  features += image * view.stride_b + first_channel * view.stride_d;
  keys += image * view.grids.labels();
  partials += blockIdx.x * int64_t{view.num_classes} * view.channels;
  Weights<THREADS> weights(shared_memory());

  const int zeroed = block_channel + thread % BLOCK_CHANNELS;
  if (zeroed < view.channels)
    for (int k = thread / BLOCK_CHANNELS; k < view.num_classes; k += THREADS / BLOCK_CHANNELS)
      partials[int64_t{k} * view.channels + zeroed] = 0;

  const int summed = thread % LANES / 4;  // the channel of the patch that sum_of_lanes returns
  const bool adds = thread % 4 == 0 && summed < channels;
  partials += first_channel + summed;
  Patch<T> patch;
  Moments own;
  const int end = min((chunk + 1) * chunk_tiles, view.tiles());
  for (int t = chunk * chunk_tiles; t < end; ++t) {
    const Place place(view, t);
    patch.load(features + place.pixel * view.stride_p, view, channels, place.pixels);
    weights.begin();
    bool more;
    float numbers[CHANNELS][PIXELS];
    do {
      more = weights.round(keys, view.grids, place.y, place.x);
      patch.convert(numbers);
      for (int i = 0; weights.key(i) >= 0; ++i) {
        float* const entry = partials + int64_t{weights.key(i)} * view.channels;
        const float before = adds ? *entry : 0;
        float weight[PIXELS], totals[CHANNELS] = {};
        weights_of_patch(weights.of(i), weight);
#pragma unroll
        for (int p = 0; p < PIXELS; ++p) {
          if (weight[p] == 0) continue;  // the number may be NaN
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) totals[c] += weight[p] * numbers[c][p];
        }
        const float total = sum_of_lanes(totals);
        if (adds) *entry = before + total;
      }
    } while (more);
    own.add(numbers, place.pixels);
  }
  own.add_lanes();
  if (thread % LANES > 0) return;
  moments += int64_t{blockIdx.x} * MOMENTS * view.channels + first_channel;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (c >= channels) continue;
    moments[c] = own.count;
    moments[view.channels + c] = own.mean[c];
    moments[2 * view.channels + c] = own.squares[c];
  }
}

// A table has the sums of all classes, [K, C]: one for each image, or one for all images. `parts`
// blocks of upsampled_sums_kernel computed its partials, which are added here. The last blocks add
// the moments of all blocks, a warp for each channel.
__global__ void __launch_bounds__(ADD_THREADS)
    add_upsampled_partials_kernel(const float* partials,  // [tables, parts, entries]
                                  const float* moments,   // [tables·parts, MOMENTS, channels]
                                  float* sums,            // [tables, entries]
                                  float* mean,            // [channels]
                                  float* variance,        // [channels]
                                  int64_t entries, int channels, int tables, int parts,
                                  int64_t sum_blocks) {
  if (blockIdx.x < sum_blocks) {
    const int64_t e = int64_t{blockIdx.x} * ADD_THREADS + threadIdx.x;
    if (e >= tables * entries) return;
    partials += e / entries * parts * entries + e % entries;
    float total = 0;
#pragma unroll 16
    for (int part = 0; part < parts; ++part) total += partials[part * entries];
    sums[e] = total;
    return;
  }
  const auto thread = static_cast<int>((blockIdx.x - sum_blocks) * ADD_THREADS + threadIdx.x);
  const int channel = thread / 32, lane = thread % 32, blocks = tables * parts;
  if (channel >= channels) return;
  const auto moment = [&](int block, int which) {
    return moments[(int64_t{block} * MOMENTS + which) * channels + channel];
  };
  float count = 0, total = 0, squares = 0;
#pragma unroll 4
  for (int block = lane; block < blocks; block += 32) {
    count += moment(block, 0);
    total += moment(block, 0) * moment(block, 1);
  }
  count = sum_of_warp(count);
  const float of_all = sum_of_warp(total) / count;
#pragma unroll 4
  for (int block = lane; block < blocks; block += 32) {
    const float shift = moment(block, 1) - of_all;
    squares += moment(block, 2) + moment(block, 0) * shift * shift;
  }
  squares = sum_of_warp(squares);
  if (lane > 0) return;
  mean[channel] = of_all;
  variance[channel] = squares / count;
}

std::tuple<Tensor, Tensor, Tensor> upsampled_sums(Tensor features, Tensor keys, int64_t num_keys,
                                                  int64_t num_classes) {
  const OnDevice device(features);
  const int64_t images = features.size(0), channels = features.size(1);
  const int64_t entries = num_classes * channels;
  check_table("upsampled_sums.cuda", "keys", keys, {images, keys.size(1), keys.size(2)});
  STD_TORCH_CHECK(num_keys == num_classes || num_keys == images * num_classes,
                  "upsampled_sums.cuda: num_keys: expected ", num_classes, " or ",
                  images * num_classes, ", got ", num_keys);
  Tensor sums = new_empty(features, {num_keys, channels}, ScalarType::Float);
  Tensor mean = new_empty(features, {channels}, ScalarType::Float);
  Tensor variance = new_empty(features, {channels}, ScalarType::Float);
  if (features.numel() == 0) {
    for (Tensor& result : {std::ref(sums), std::ref(mean), std::ref(variance)})
      fill_zero(result.mutable_data_ptr<float>(), result.numel() * sizeof(float), device.stream);
    return {sums, mean, variance};
  }
  const bool per_image = num_keys > num_classes;
  const View view(features, keys, num_classes, per_image);
  const int64_t most = std::min(MOST_BYTES / (entries * int64_t{sizeof(float)}), multiprocessors());
  const int64_t chunk_tiles = ceil_div(int64_t{view.tiles()}, std::max(most / images, int64_t{1}));
  const int64_t chunks = ceil_div(int64_t{view.tiles()}, chunk_tiles), blocks = images * chunks;
  Tensor partials = new_empty(features, {blocks, entries}, ScalarType::Float);
  Tensor moments = new_empty(features, {blocks, MOMENTS, channels}, ScalarType::Float);
  for_dtype("upsampled_sums.cuda", features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    dim3 grid = grid_of("upsampled_sums.cuda", blocks);
    grid.y = static_cast<unsigned>(ceil_div(channels, int64_t{channels_of(THREADS)}));
    for_key_dtype("upsampled_sums.cuda", keys.scalar_type(), [&](auto key) {
      using Key = decltype(key);
      launch("upsampled_sums_kernel", upsampled_sums_kernel<T, Key>, grid, THREADS,
             Weights<THREADS>::BYTES, device.stream, features.const_data_ptr<T>(),
             keys.const_data_ptr<Key>(), partials.mutable_data_ptr<float>(),
             moments.mutable_data_ptr<float>(), view, static_cast<int>(chunks),
             static_cast<int>(chunk_tiles));
    });
  });
  const int64_t tables = per_image ? images : 1;
  const int64_t sum_blocks = ceil_div(tables * entries, int64_t{ADD_THREADS});
  launch("add_upsampled_partials_kernel", add_upsampled_partials_kernel,
         grid_of("upsampled_sums.cuda", sum_blocks + ceil_div(channels * 32, int64_t{ADD_THREADS})),
         ADD_THREADS, 0, device.stream, partials.const_data_ptr<float>(),
         moments.const_data_ptr<float>(), sums.mutable_data_ptr<float>(),
         mean.mutable_data_ptr<float>(), variance.mutable_data_ptr<float>(), entries,
         static_cast<int>(channels), static_cast<int>(tables), static_cast<int>(blocks / tables),
         sum_blocks);
  return {sums, mean, variance};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("upsampled_sums.cuda", TORCH_BOX(&anchorops::cuda::upsampled_sums));
}

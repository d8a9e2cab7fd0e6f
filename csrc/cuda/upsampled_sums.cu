// The operators anchorops::upsampled_sums.cuda and upsampled_sums_backward.cuda.
//
//   sums[k] = Σ_q W[k, q]·f_q    mean = Σ_q f_q / N    variance = Σ_q (f_q − mean)² / N
//   df_q = Σ_k W[k, q]·dsums[k] + (dmean + 2·dvariance·(f_q − mean)) / N
//
// W is not stored: splat.cuh computes the weights of a tile. Forward: a block sums a chunk, some
// tiles of one image, into its own partial; a second kernel adds the partials. Backward: a block
// writes one tile.
//
// At B16 C128 128² and 512² labels, bf16, a pass over the features has 67 MB, 16 µs. `make
// cuda-report` predicts ten times as much: forward, a multiprocessor has one block, because
// partials may have 10 MB together, so nothing hides the latency of loads and of shared memory.
#include "../labels.h"
#include "splat.cuh"
#include "warps.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = Weights::PIXELS;
constexpr int CHANNELS = 128;  // of a block of the forward pass, one for each thread
static_assert(CHANNELS == THREADS);
constexpr int HELD = 32;                  // channels whose gradients a thread holds in registers
constexpr int RESIDENT = 4;               // blocks of a multiprocessor
constexpr int64_t MOST_BYTES = 10 << 20;  // of partials
constexpr int MOMENTS = 3;                // of a chunk: pixels, mean, sum of squared deviations
// Blocks of a multiprocessor in the backward pass. Without it, nvcc takes 64 registers and spills;
// the 96 of five blocks are enough on sm_90 alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int BACKWARD_RESIDENT = 4;
#else
constexpr int BACKWARD_RESIDENT = 5;
#endif

// Features (B, C, H, W) whose rows join, and the grid of their labels.
struct View {
  Grids grids;
  int channels, num_classes;
  int image_keys;  // the sums of image i begin at row i·image_keys
  int64_t stride_b, stride_d, stride_p;

  View(const Tensor& features, const Tensor& keys, int64_t num_classes, bool per_image)
      : grids{LabelAxis(keys.size(1), features.size(2)), LabelAxis(keys.size(2), features.size(3))},
        channels(static_cast<int>(features.size(1))),
        num_classes(static_cast<int>(num_classes)),
        image_keys(per_image ? static_cast<int>(num_classes) : 0) {
    const auto size = to_vector(features.sizes()), stride = to_vector(features.strides());
    STD_TORCH_CHECK(rows_join(size, stride), "upsampled_sums: features: rows are not adjacent");
    const Pixels pixels = as_pixels(size, stride, true);
    stride_b = pixels.stride_b;
    stride_d = pixels.stride_d;
    stride_p = pixels.stride_p;
  }

  __host__ __device__ int row_tiles() const { return grids.row_tiles(THREADS); }
  __host__ __device__ int tiles() const { return grids.rows.features * row_tiles(); }
};

// The features of a tile: [CHANNELS, PITCH] in shared memory. With this pitch the threads of a warp
// access different banks, whether they are consecutive channels or pixels.
template <class T>
struct Tile {
  static constexpr int PITCH = THREADS + 4 / sizeof(T);
  static constexpr size_t BYTES = sizeof(T) * CHANNELS * PITCH;
  T* memory;

  __device__ const T* row(int channel) const { return memory + channel * PITCH; }

  // features: of the first channel and pixel; 0 after the last one.
  __device__ void load(const T* features, const View& view, int channels, int pixels) const {
    const auto thread = static_cast<int>(threadIdx.x);
    const bool rows = view.stride_d == 1;  // of a pixel's channels
    const int64_t step = rows ? view.stride_p : view.stride_d;
    const int steps = thread >= (rows ? channels : pixels) ? 0 : rows ? pixels : channels;
    const T* from = features + thread * (rows ? view.stride_d : view.stride_p);
    T* to = memory + thread * (rows ? PITCH : 1);
#pragma unroll 64
    for (int i = 0; i < THREADS; ++i, from += step, to += rows ? 1 : PITCH)
      *to = i < steps ? *from : static_cast<T>(0.f);
  }
};

// Number, mean and sum of squared deviations of numbers that come in parts (Chan et al.).
struct Moments {
  float count = 0, mean = 0, squares = 0;

  __device__ void add(float more, float mean_of_more, float squares_of_more) {
    const float shift = mean_of_more - mean, total = count + more;
    mean += shift * (more / total);
    squares += squares_of_more + shift * shift * (count * more / total);
    count = total;
  }
};

template <class T, class Key>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    upsampled_sums_kernel(const T* features, const Key* keys,
                          float* partials,  // [images·chunks, K, C]
                          float* moments,   // [images·chunks, MOMENTS, C]
                          View view, int chunks, int chunk_tiles) {
  permit_next_kernel();
  const int64_t image = blockIdx.x / chunks;
  const auto chunk = static_cast<int>(blockIdx.x % chunks);
  const auto first_channel = static_cast<int>(blockIdx.y) * CHANNELS;
  const int channels = min(view.channels - first_channel, CHANNELS);
  const auto thread = static_cast<int>(threadIdx.x);
  features += image * view.stride_b + first_channel * view.stride_d;
  keys += image * view.grids.labels();
  partials += blockIdx.x * int64_t{view.num_classes} * view.channels + first_channel + thread;
  const Tile<T> tile{reinterpret_cast<T*>(shared_memory())};
  Weights weights(shared_memory() + Tile<T>::BYTES, view.num_classes);

  if (thread < channels)
    for (int k = 0; k < view.num_classes; ++k) partials[int64_t{k} * view.channels] = 0;
  Moments own;
  const T* row = tile.row(thread);
  const auto add_keys = [&] {
    if (thread >= channels) return;
    for (int slot = 0; weights.key(slot) >= 0; ++slot) {
      const float* weight = weights.of(slot);
      float total = 0;
#pragma unroll 16
      for (int p = 0; p < THREADS; ++p) total += weight[p] * static_cast<float>(row[p]);
      partials[int64_t{weights.key(slot)} * view.channels] += total;
    }
  };
  const int end = min((chunk + 1) * chunk_tiles, view.tiles());
  for (int t = chunk * chunk_tiles; t < end; ++t) {
    const int y = t / view.row_tiles(), x = t % view.row_tiles() * THREADS;
    const int pixels = min(view.grids.columns.features - x, THREADS);
    __syncthreads();  // before the tile is overwritten
    tile.load(features + (int64_t{y} * view.grids.columns.features + x) * view.stride_p, view,
              channels, pixels);
    bool more = weights.first_round(keys, view.grids, y, x);
    float total = 0, squares = 0;
#pragma unroll 16
    for (int p = 0; p < pixels; ++p) total += static_cast<float>(row[p]);
    const float mean = total / static_cast<float>(pixels);
#pragma unroll 16
    for (int p = 0; p < pixels; ++p) {
      const float deviation = static_cast<float>(row[p]) - mean;
      squares += deviation * deviation;
    }
    own.add(static_cast<float>(pixels), mean, squares);
    add_keys();
    while (more) {
      more = weights.next_round(keys, view.grids, y, x);
      add_keys();
    }
  }
  if (thread >= channels) return;
  moments += int64_t{blockIdx.x} * MOMENTS * view.channels + first_channel + thread;
  moments[0] = own.count;
  moments[view.channels] = own.mean;
  moments[2 * view.channels] = own.squares;
}

// A table has the sums of all classes, [K, C]: one for each image, or one for all images. `parts`
// blocks of upsampled_sums_kernel computed its partials, which are added here. The last blocks add
// the moments of all blocks, a warp for each channel.
__global__ void __launch_bounds__(THREADS)
    add_upsampled_partials_kernel(const float* partials,  // [tables, parts, entries]
                                  const float* moments,   // [tables·parts, MOMENTS, channels]
                                  float* sums,            // [tables, entries]
                                  float* mean,            // [channels]
                                  float* variance,        // [channels]
                                  int64_t entries, int channels, int tables, int parts,
                                  int64_t sum_blocks) {
  wait_for_kernel_before();
  if (blockIdx.x < sum_blocks) {
    const int64_t e = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (e >= tables * entries) return;
    partials += e / entries * parts * entries + e % entries;
    float total = 0;
#pragma unroll 16
    for (int part = 0; part < parts; ++part) total += partials[part * entries];
    sums[e] = total;
    return;
  }
  const auto thread = static_cast<int>((blockIdx.x - sum_blocks) * THREADS + threadIdx.x);
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

struct Gradients {
  const float* sums;                      // [num_keys, C]
  const float *mean, *dmean, *dvariance;  // [C]; dmean and dvariance are null if they are not given
  float of_pixel;                         // 1 / N
};

template <class T, class Key>
__global__ void __launch_bounds__(THREADS, BACKWARD_RESIDENT)
    upsampled_sums_backward_kernel(const T* features, const Key* keys, Gradients gradients,
                                   T* dfeatures, View view, bool vectors) {
  const int64_t image = blockIdx.x / view.tiles();
  const auto tile = static_cast<int>(blockIdx.x % view.tiles());
  const int y = tile / view.row_tiles(), x = tile % view.row_tiles() * THREADS;
  const auto thread = static_cast<int>(threadIdx.x);
  const bool inside = x + thread < view.grids.columns.features;
  const int64_t pixel = int64_t{y} * view.grids.columns.features + x + thread;
  features += image * view.stride_b + pixel * view.stride_p;
  dfeatures += image * view.stride_b + pixel * view.stride_p;
  keys += image * view.grids.labels();
  const auto first_sum = static_cast<int>(image * view.image_keys);
  Weights weights(shared_memory(), view.num_classes);

  bool several = false;  // whether the tile needs more than one round
  for (int c = 0; c < view.channels; c += HELD) {
    const int held = min(view.channels - c, HELD);
    float gradient[HELD] = {};
    if (gradients.dmean && inside) {
      // All features are requested before the first is used.
#pragma unroll
      for (int i = 0; i < HELD; ++i)
        gradient[i] = i < held ? static_cast<float>(features[(c + i) * view.stride_d]) : 0;
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        if (i >= held) continue;
        const float slope = 2 * gradients.dvariance[c + i];
        gradient[i] = slope * (gradient[i] - gradients.mean[c + i]) + gradients.dmean[c + i];
        gradient[i] *= gradients.of_pixel;
      }
    }
    const auto add_keys = [&] {
      for (int slot = 0; weights.key(slot) >= 0; ++slot) {
        const float weight = weights.of(slot)[thread];
        const float* dsums =
            gradients.sums + int64_t{first_sum + weights.key(slot)} * view.channels + c;
#pragma unroll
        for (int i = 0; i < HELD; ++i)
          if (i < held) gradient[i] += weight * dsums[i];
      }
    };
    bool more = false;
    if (c == 0 || several) more = weights.first_round(keys, view.grids, y, x);
    several |= more;
    add_keys();
    while (more) {
      more = weights.next_round(keys, view.grids, y, x);
      add_keys();
    }
    if (!inside) continue;
    if (vectors && held == HELD) {
#pragma unroll
      for (int i = 0; i < HELD; i += Vector<T>::SIZE) {
        float some[Vector<T>::SIZE];
        for (int j = 0; j < Vector<T>::SIZE; ++j) some[j] = gradient[i + j];
        store_streaming(dfeatures + c + i, round_to<T>(some));
      }
    } else {
#pragma unroll
      for (int i = 0; i < HELD; ++i)
        if (i < held) dfeatures[(c + i) * view.stride_d] = static_cast<T>(gradient[i]);
    }
  }
}

// Blocks of the forward pass whose partials have so many entries: the same number for each
// multiprocessor, if there is memory for their partials, and as many as are resident.
int64_t most_blocks(int64_t entries, size_t shared_bytes) {
  const int64_t most = MOST_BYTES / (entries * int64_t{sizeof(float)}), count = multiprocessors();
  if (most < count) return most;
  const int64_t resident = std::min(blocks_in_shared(shared_bytes), int64_t{RESIDENT});
  return count * std::min(most / count, std::max(resident, int64_t{1}));
}

std::tuple<Tensor, Tensor, Tensor> upsampled_sums(Tensor features, Tensor keys, int64_t num_keys,
                                                  int64_t num_classes) {
  const OnDevice device(features);
  const int64_t images = features.size(0), channels = features.size(1);
  const int64_t entries = num_classes * channels;
  check_keys("upsampled_sums.cuda", keys, images * keys.size(1) * keys.size(2));
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
  const size_t tile_bytes =
      features.element_size() == 4 ? Tile<float>::BYTES : Tile<BFloat16>::BYTES;
  const size_t shared_bytes = tile_bytes + Weights::bytes(num_classes);
  const int64_t most = most_blocks(entries, shared_bytes);
  const int64_t chunk_tiles = ceil_div(int64_t{view.tiles()}, std::max(most / images, int64_t{1}));
  const int64_t chunks = ceil_div(int64_t{view.tiles()}, chunk_tiles), blocks = images * chunks;
  Tensor partials = new_empty(features, {blocks, entries}, ScalarType::Float);
  Tensor moments = new_empty(features, {blocks, MOMENTS, channels}, ScalarType::Float);
  for_dtype("upsampled_sums", features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    dim3 grid = grid_of("upsampled_sums.cuda", blocks);
    grid.y = static_cast<unsigned>(ceil_div(channels, int64_t{CHANNELS}));
    for_key_dtype("upsampled_sums.cuda", keys.scalar_type(), [&](auto key) {
      using Key = decltype(key);
      launch("upsampled_sums_kernel", upsampled_sums_kernel<T, Key>, grid, THREADS, shared_bytes,
             device.stream, features.const_data_ptr<T>(), keys.const_data_ptr<Key>(),
             partials.mutable_data_ptr<float>(), moments.mutable_data_ptr<float>(), view,
             static_cast<int>(chunks), static_cast<int>(chunk_tiles));
    });
  });
  const int64_t tables = per_image ? images : 1;
  const int64_t sum_blocks = ceil_div(tables * entries, int64_t{THREADS});
  launch_early(
      "add_upsampled_partials_kernel", add_upsampled_partials_kernel,
      grid_of("upsampled_sums.cuda", sum_blocks + ceil_div(channels * 32, int64_t{THREADS})),
      THREADS, 0, device.stream, partials.const_data_ptr<float>(), moments.const_data_ptr<float>(),
      sums.mutable_data_ptr<float>(), mean.mutable_data_ptr<float>(),
      variance.mutable_data_ptr<float>(), entries, static_cast<int>(channels),
      static_cast<int>(tables), static_cast<int>(blocks / tables), sum_blocks);
  return {sums, mean, variance};
}

Tensor upsampled_sums_backward(Tensor features, Tensor keys, Tensor dsums, Tensor mean,
                               std::optional<Tensor> dmean, std::optional<Tensor> dvariance,
                               int64_t num_classes) {
  const OnDevice device(features);
  check_keys("upsampled_sums_backward.cuda", keys, features.size(0) * keys.size(1) * keys.size(2));
  Tensor dfeatures = new_empty_strided(features, to_vector(features.sizes()),
                                       to_vector(features.strides()), features.scalar_type());
  if (features.numel() == 0) return dfeatures;
  const View view(features, keys, num_classes, dsums.size(0) > num_classes);
  const Gradients gradients{dsums.const_data_ptr<float>(), mean.const_data_ptr<float>(),
                            optional_data<float>(dmean), optional_data<float>(dvariance),
                            1 / static_cast<float>(features.numel() / features.size(1))};
  for_dtype("upsampled_sums", features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* const out = dfeatures.mutable_data_ptr<T>();
    const bool vectors =
        view.stride_d == 1 && vectors_aligned(out, {view.stride_b, view.stride_p}, sizeof(T));
    for_key_dtype("upsampled_sums.cuda", keys.scalar_type(), [&](auto key) {
      using Key = decltype(key);
      launch("upsampled_sums_backward_kernel", upsampled_sums_backward_kernel<T, Key>,
             grid_of("upsampled_sums.cuda", features.size(0) * view.tiles()), THREADS,
             Weights::bytes(num_classes), device.stream, features.const_data_ptr<T>(),
             keys.const_data_ptr<Key>(), gradients, out, view, vectors);
    });
  });
  return dfeatures;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("upsampled_sums.cuda", TORCH_BOX(&anchorops::cuda::upsampled_sums));
  library.impl("upsampled_sums_backward.cuda",
               TORCH_BOX(&anchorops::cuda::upsampled_sums_backward));
}

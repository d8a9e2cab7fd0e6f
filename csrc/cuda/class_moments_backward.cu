// The operator anchorops::class_moments_backward.cuda: the gradient of class moments.
//
// dfeatures[p] = 2·dsqdists[k]·(f_p − anchors[k]) + dsums[k],  k = key_p;  0 where ignored
//
// Writes dfeatures once. Reads the features once if dsqdists is given, otherwise not at all. Keys,
// 4 bytes a pixel, are read again for each range of channels, and rows of the tables for each
// pixel; both come from caches. The kernels use registers, but no shared memory. One launch.
//
// Counted (nvcc 13, sm_90; sm_80 and sm_100 differ little): warp instructions for each 512 bytes
// that a warp loads (or stores, for dsums alone) / KB of loads in flight on a multiprocessor. On an
// H200, 110 instructions take as long as the memory, or 220 if as much is stored as loaded. 23 KB
// in flight are enough, or half of this if as much is stored as loaded.
//
//                                   dsums     dsqdists        both
//   contiguous pixels, 2 bytes         16      44 / 40     51 / 32
//   contiguous pixels, 4 bytes         10      22 / 72     25 / 40
//   contiguous channels, 2 bytes       50      88 / 48     98 / 48
//   contiguous channels, 4 bytes       44      66 / 48     75 / 48
//   single elements, 2 bytes        54–58    104–106 / 20–32  116–126 / 16–20
//   single elements, 4 bytes           23      44 / 40–64  49–54 / 32–40
//
// Predicted, not measured (bench/time_model.py), for labels of images: 97 to 99 % of 4.3 TB/s for
// contiguous pixels, 87 to 99 % for contiguous channels; bf16 HRNet B8 D720 128×256 is 88 µs for
// dsums, 176 µs with dsqdists. With random labels and contiguous pixels each lane of a warp reads a
// different row: in bf16 68 to 98 % at K = 19 and 41 to 75 % at K = 150, if the L1 cache delivers
// one line a cycle. Tables in shared memory would have fewer conflicts.
#include "../labels.h"
#include "tensors.cuh"

namespace anchorops::cuda {
namespace {

// The inputs of a kernel in addition to the features. The rows of a table are contiguous.
struct Tables {
  const float* anchors;   // [K, D]
  const float* dsums;     // [num_keys, D]
  const float* dsqdists;  // [num_keys]
  unsigned num_classes, groups, row_bytes;
  bool anchor_of_each_key;  // key and class are the same

  // From keys to rows of anchors; the keys of ignored pixels may be any valid ones.
  template <int COUNT>
  __device__ __forceinline__ void to_anchors(unsigned (&rows)[COUNT]) const {
    if (anchor_of_each_key) return;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) rows[i] = rows[i] / groups % num_classes;
  }

  // One instruction; with a 64-bit index it would be three.
  __device__ const float* row(const float* table, unsigned row) const {
    return reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) +
                                          static_cast<uint64_t>(row) * row_bytes);
  }
};

// Four channels at a time, or every LANES-th channel.
template <int WIDTH, int LANES, int COUNT>
__device__ __forceinline__ void load_row(const float* row, float (&values)[COUNT]) {
  if constexpr (WIDTH > 1) {
#pragma unroll
    for (int c = 0; c < COUNT; c += 4) {
      const Vector<float> vector = load_vector(row + c);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[c + i] = vector.elements[i];
    }
  } else {
#pragma unroll
    for (int c = 0; c < COUNT; ++c) values[c] = row[c * LANES];
  }
}

// 16 bytes, or one element.
template <class T, int WIDTH>
__device__ __forceinline__ void load_features(const T* address, float (&values)[WIDTH]) {
  if constexpr (WIDTH == 1) {
    values[0] = static_cast<float>(*address);
  } else {
    const Vector<T> vector = load_streaming(address);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) values[i] = to_float(vector, i);
  }
}

// WIDTH pixels in a thread's registers, and every LANES-th channel of them.
template <class T, int WIDTH, int LANES, bool HAS_DSUMS, bool HAS_DSQDISTS>
struct PlanePixels {
  unsigned anchor_row[WIDTH], key[WIDTH];
  float scale[WIDTH];
  unsigned valid[4] = {};  // the bits of valid pixels in a vector

  __device__ PlanePixels(const int32_t* keys, const Tables& tables) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      constexpr int BITS = 8 * sizeof(T);
      if (keys[i] >= 0) valid[i * BITS / 32] |= (0xffffffff >> (32 - BITS)) << i * BITS % 32;
      key[i] = max(keys[i], 0);
      anchor_row[i] = key[i];
      if constexpr (HAS_DSQDISTS) scale[i] = 2 * tables.dsqdists[key[i]];
    }
    if constexpr (HAS_DSQDISTS) tables.to_anchors(anchor_row);
  }

  // The gradient of CHANNELS channels; all pointers are at the first of them.
  template <int CHANNELS>
  __device__ __forceinline__ void write(const T* features, int64_t stride, const float* anchors,
                                        const float* dsums, const Tables& tables, T* dfeatures,
                                        int64_t dstride) const {
    float values[CHANNELS][WIDTH];
    if constexpr (HAS_DSQDISTS) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) load_features(features + c * stride, values[c]);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      float a[CHANNELS], s[CHANNELS] = {};
      if constexpr (HAS_DSQDISTS) load_row<WIDTH, LANES>(tables.row(anchors, anchor_row[i]), a);
      if constexpr (HAS_DSUMS) load_row<WIDTH, LANES>(tables.row(dsums, key[i]), s);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        values[c][i] = HAS_DSQDISTS ? fmaf(values[c][i] - a[c], scale[i], s[c]) : s[c];
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      T* address = dfeatures + c * dstride;
      if constexpr (WIDTH == 1)
        *address = static_cast<T>(valid[0] ? values[c][0] : 0);
      else
        store_streaming(address, keep(round_to<T>(values[c]), valid));
    }
  }
};

constexpr int PLANES_THREADS = 128;
template <int WIDTH, int LANES>
constexpr int CHANNELS_PER_STEP = WIDTH > 1   ? 4
                                  : LANES > 1 ? 8
                                              : 16;

// A thread processes a range of channels of WIDTH contiguous pixels, 16 bytes; or of one pixel, one
// element at a time, with the channels of the pixel divided among LANES threads.
template <class T, int WIDTH, int LANES, bool HAS_DSUMS, bool HAS_DSQDISTS>
__global__ void __launch_bounds__(PLANES_THREADS, 4)
    class_moments_backward_planes_kernel(const T* features,    // by strides
                                         const int32_t* keys,  // [B, P], -1 where ignored
                                         Tables tables,
                                         T* dfeatures,  // by strides
                                         Pixels view, Pixels out, unsigned pixel_blocks,
                                         int channels_per_block) {
  const int64_t vectors_per_line = out.pixels / WIDTH;
  const int64_t thread =
      static_cast<int64_t>(blockIdx.x % pixel_blocks) * PLANES_THREADS + threadIdx.x;
  const int64_t vector = thread / LANES;
  if (vector >= out.lines * vectors_per_line) return;
  const int64_t line = vector / vectors_per_line;
  const int64_t pixel = vector % vectors_per_line * WIDTH;
  const PlanePixels<T, WIDTH, LANES, HAS_DSUMS, HAS_DSQDISTS> pixels(
      keys + line * out.pixels + pixel, tables);

  const int64_t first = blockIdx.x / pixel_blocks * static_cast<int64_t>(channels_per_block);
  const int64_t d = first + thread % LANES;
  features += view.offset(line, d, pixel);
  dfeatures += out.offset(line, d, pixel);
  const float *anchors = tables.anchors + d, *dsums = tables.dsums + d;
  const auto write = [&]<int CHANNELS>() {
    pixels.template write<CHANNELS>(features, LANES * view.stride_d, anchors, dsums, tables,
                                    dfeatures, LANES * out.stride_d);
    features += CHANNELS * LANES * view.stride_d;
    dfeatures += CHANNELS * LANES * out.stride_d;
    anchors += CHANNELS * LANES;
    dsums += CHANNELS * LANES;
  };
  const int64_t end = min(first + channels_per_block, out.dim);
  int channels = static_cast<int>(ceil_div(end - d, LANES));
  constexpr int STEP = CHANNELS_PER_STEP<WIDTH, LANES>;
  for (; channels >= STEP; channels -= STEP) write.template operator()<STEP>();
  if constexpr (WIDTH == 1)
    for (; channels > 0; --channels) write.template operator()<1>();
}

constexpr int ROWS_THREADS = 256;
constexpr int ROWS_UNROLL = 4;

// For contiguous channels: a block processes a slice of the channels of a line's pixels, a thread
// 16 bytes of them at a time. The slice is the slowest index of the grid, so its part of the tables
// stays in the L1 cache.
template <class T, bool HAS_DSUMS, bool HAS_DSQDISTS>
__global__ void __launch_bounds__(ROWS_THREADS, 3)
    class_moments_backward_rows_kernel(const T* features,    // by strides
                                       const int32_t* keys,  // [B, P], -1 where ignored
                                       Tables tables,
                                       T* dfeatures,  // by strides
                                       Pixels view, Pixels out, unsigned blocks_per_line,
                                       int vectors_per_slice, int rounds) {
  constexpr int WIDTH = Vector<T>::SIZE;
  const unsigned lines = static_cast<unsigned>(out.lines), block = blockIdx.x / blocks_per_line;
  const int64_t line = block % lines;
  const int first = block / lines * vectors_per_slice;
  const int vectors = min(vectors_per_slice, static_cast<int>(out.dim / WIDTH) - first);
  const int64_t vector_of_line =
      static_cast<int64_t>(blockIdx.x % blocks_per_line) * rounds * ROWS_UNROLL * ROWS_THREADS +
      threadIdx.x;
  int64_t pixel = vector_of_line / vectors;
  int vector = static_cast<int>(vector_of_line % vectors);
  const int step_pixel = ROWS_THREADS / vectors, step_vector = ROWS_THREADS % vectors;
  if constexpr (HAS_DSQDISTS) features += view.offset(line, first * WIDTH, 0);
  dfeatures += out.offset(line, first * WIDTH, 0);
  keys += line * out.pixels;
  tables.anchors += first * WIDTH;
  tables.dsums += first * WIDTH;

#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    Vector<T> x[ROWS_UNROLL];
    unsigned key[ROWS_UNROLL], anchor_row[ROWS_UNROLL], valid[ROWS_UNROLL];
    int channel[ROWS_UNROLL];
    T* address[ROWS_UNROLL];
    bool inside[ROWS_UNROLL];
#pragma unroll
    for (int u = 0; u < ROWS_UNROLL; ++u) {
      inside[u] = pixel < out.pixels;
      const int64_t p = min(pixel, out.pixels - 1);  // no branch around the loads
      channel[u] = vector * WIDTH;
      address[u] = dfeatures + p * out.stride_p + channel[u];
      if constexpr (HAS_DSQDISTS) x[u] = load_streaming(features + p * view.stride_p + channel[u]);
      const int k = keys[p];
      valid[u] = k < 0 ? 0 : 0xffffffff;
      anchor_row[u] = key[u] = max(k, 0);
      pixel += step_pixel;
      vector += step_vector;
      if (vector >= vectors) vector -= vectors, ++pixel;
    }
    if constexpr (HAS_DSQDISTS) tables.to_anchors(anchor_row);
#pragma unroll
    for (int u = 0; u < ROWS_UNROLL; ++u) {
      float values[WIDTH], a[WIDTH], s[WIDTH] = {};
      float scale = 0;
      if constexpr (HAS_DSQDISTS) {
        load_row<WIDTH, 1>(tables.row(tables.anchors, anchor_row[u]) + channel[u], a);
        scale = 2 * tables.dsqdists[key[u]];
      }
      if constexpr (HAS_DSUMS) load_row<WIDTH, 1>(tables.row(tables.dsums, key[u]) + channel[u], s);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        values[i] = HAS_DSQDISTS ? fmaf(to_float(x[u], i) - a[i], scale, s[i]) : s[i];
      if (inside[u])
        store_streaming(address[u],
                        keep(round_to<T>(values), {valid[u], valid[u], valid[u], valid[u]}));
    }
  }
}

// Enough blocks to fill a device a few times.
constexpr int64_t BLOCKS = 2048;
// The part of the L1 cache for the tables, for channels that are processed together.
constexpr int64_t TABLES_IN_CACHE = 128 << 10;

unsigned grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "class_moments_backward.cuda: features: too large");
  return static_cast<unsigned>(blocks);
}

// Images with contiguous pixels become one line.
void join_lines(Pixels& view, Pixels& out) {
  const auto joins = [](const Pixels& p) {
    return p.lines_per_image == 1 &&
           (p.lines == 1 || p.pixels == 1 || p.stride_b == p.pixels * p.stride_p);
  };
  if (!joins(view) || !joins(out)) return;
  for (Pixels* p : {&view, &out}) {
    if (p->pixels == 1) p->stride_p = p->stride_b;
    p->pixels *= p->lines;
    p->lines = 1;
    p->stride_b = 0;
  }
}

template <class T, bool HAS_DSUMS, bool HAS_DSQDISTS>
struct Gradient {
  const T* features;
  const int32_t* keys;
  Tables tables;
  T* dfeatures;
  Pixels view, out;
  int64_t table_bytes_per_channel;
  Stream stream;

  static constexpr int WIDTH = Vector<T>::SIZE;

  template <int W, int LANES>
  void write_planes() const {
    const int64_t pixel_blocks =
        ceil_div(out.lines * (out.pixels / W) * LANES, int64_t{PLANES_THREADS});
    const int64_t cached = std::clamp<int64_t>(TABLES_IN_CACHE / table_bytes_per_channel, 16, 64);
    const int64_t enough = std::max<int64_t>(out.dim * pixel_blocks / BLOCKS, 16);
    const int64_t ranges = LANES > 1 ? 1 : ceil_div(out.dim, std::min(cached, enough));
    constexpr int64_t STEP = CHANNELS_PER_STEP<W, LANES>;
    const int64_t channels = ceil_div(ceil_div(out.dim, ranges), STEP) * STEP;
    launch("class_moments_backward_planes_kernel",
           class_moments_backward_planes_kernel<T, W, LANES, HAS_DSUMS, HAS_DSQDISTS>,
           grid_of(pixel_blocks * ceil_div(out.dim, channels)), PLANES_THREADS, 0, stream, features,
           keys, tables, dfeatures, view, out, grid_of(pixel_blocks), static_cast<int>(channels));
  }

  void write_rows() const {
    const int64_t vectors = out.dim / WIDTH;
    int64_t cached = TABLES_IN_CACHE / (table_bytes_per_channel * WIDTH);
    if (cached < 8) cached = vectors;  // less than a cache line of 128 bytes of features
    const int64_t slices = ceil_div(vectors, cached), slice = ceil_div(vectors, slices);
    constexpr int64_t ROUND = ROWS_THREADS * ROWS_UNROLL;
    const int64_t rounds =
        std::clamp<int64_t>(out.lines * out.pixels * vectors / (ROUND * BLOCKS), 1, 8);
    const int64_t blocks_per_line = ceil_div(out.pixels * slice, ROUND * rounds);
    launch("class_moments_backward_rows_kernel",
           class_moments_backward_rows_kernel<T, HAS_DSUMS, HAS_DSQDISTS>,
           grid_of(ceil_div(vectors, slice) * out.lines * blocks_per_line), ROWS_THREADS, 0, stream,
           features, keys, tables, dfeatures, view, out, grid_of(blocks_per_line),
           static_cast<int>(slice), static_cast<int>(rounds));
  }

  void write() const {
    const auto aligned = [&](const Pixels& p, const T* data, int64_t line_stride) {
      return vectors_aligned(data, {p.stride_b, p.stride_h, line_stride}, sizeof(T));
    };
    const bool tables_aligned = out.dim % 4 == 0 && vectors_aligned(tables.anchors, {}, 4) &&
                                vectors_aligned(tables.dsums, {}, 4);
    const bool pixels_contiguous = view.stride_p == 1 && out.stride_p == 1;
    const bool channels_contiguous = view.stride_d == 1 && out.stride_d == 1;
    if (tables_aligned && pixels_contiguous && out.pixels % WIDTH == 0 &&
        aligned(view, features, view.stride_d) && aligned(out, dfeatures, out.stride_d))
      return write_planes<WIDTH, 1>();
    if (tables_aligned && channels_contiguous && out.dim % WIDTH == 0 &&
        aligned(view, features, view.stride_p) && aligned(out, dfeatures, out.stride_p))
      return write_rows();
    if (out.stride_d == 1 && out.dim > 1) return write_planes<1, 32>();
    write_planes<1, 1>();
  }
};

Tensor class_moments_backward(std::optional<Tensor> features, Tensor keys,
                              std::optional<Tensor> anchors, std::optional<Tensor> dsums,
                              std::optional<Tensor> dsqdists, int64_t groups,
                              std::vector<int64_t> size, std::vector<int64_t> stride,
                              ScalarType dtype) {
  STD_TORCH_CHECK(dsums || dsqdists,
                  "class_moments_backward.cuda: expected dsums or dsqdists, got neither");
  STD_TORCH_CHECK(!dsqdists || (features && anchors),
                  "class_moments_backward.cuda: dsqdists: expected features and anchors too");
  const OnDevice device(keys);
  Tensor dfeatures = new_empty_strided(keys, size, stride, dtype);
  if (dfeatures.numel() == 0) return dfeatures;
  check_keys("class_moments_backward.cuda", keys, dfeatures.numel() / dfeatures.size(1));
  const std::vector<int64_t> from = features ? to_vector(features->strides()) : stride;
  const bool join = rows_join(size, from) && rows_join(size, stride);
  Pixels view = as_pixels(size, from, join), out = as_pixels(size, stride, join);
  join_lines(view, out);
  STD_TORCH_CHECK(out.dim < 1 << 29, "class_moments_backward.cuda: features: too many channels");

  // If rows are not contiguous, or one row is expanded to all, they are copied: K×D.
  for (auto* table : {&anchors, &dsums, &dsqdists})
    if (*table) *table = torch::stable::contiguous(**table);
  const auto data = [](const std::optional<Tensor>& table) {
    return table ? table->const_data_ptr<float>() : nullptr;
  };
  const Tables tables{data(anchors),
                      data(dsums),
                      data(dsqdists),
                      anchors ? static_cast<unsigned>(anchors->size(0)) : 1,
                      static_cast<unsigned>(groups),
                      static_cast<unsigned>(out.dim * sizeof(float)),
                      dsqdists && anchors->size(0) == dsqdists->size(0)};
  const int64_t rows = (dsqdists ? anchors->size(0) : 0) + (dsums ? dsums->size(0) : 0);
  for_dtype("class_moments_backward.cuda", dtype, [&](auto element) {
    using T = decltype(element);
    const auto write = [&]<bool HAS_DSUMS, bool HAS_DSQDISTS>() {
      Gradient<T, HAS_DSUMS, HAS_DSQDISTS>{HAS_DSQDISTS ? features->const_data_ptr<T>() : nullptr,
                                           keys.const_data_ptr<int32_t>(),
                                           tables,
                                           dfeatures.mutable_data_ptr<T>(),
                                           HAS_DSQDISTS ? view : out,
                                           out,
                                           rows * static_cast<int64_t>(sizeof(float)),
                                           device.stream}
          .write();
    };
    if (dsums && dsqdists)
      write.template operator()<true, true>();
    else if (dsqdists)
      write.template operator()<false, true>();
    else
      write.template operator()<true, false>();
  });
  return dfeatures;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("class_moments_backward.cuda", TORCH_BOX(&anchorops::cuda::class_moments_backward));
}

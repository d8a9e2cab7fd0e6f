// The operator anchorops::class_moments_backward.cuda: the gradient of features,
//
//     dfeatures[p] = 2·dsqdists[k]·(f_p − a_k) + dsums[k],  k = key_p;  0 where ignored
//
// Features are read once, and only for dsqdists; dfeatures are written once. The tables of anchors
// and dsums stay in the first-level cache: 1,024 keys of 32 channels are 128 KB.
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "../../labels.h"
#include "../tensors.cuh"

namespace anchorops::cuda {
namespace {

constexpr const char* NAME = "class_moments_backward.cuda";
constexpr int THREADS = 128;
constexpr int SLICE = 32;  // channels of a block, in planes
constexpr int STEP = 4;    // channels (in rows: pixels) that a thread loads at once

template <class T>
struct Gradient {
  const T* features;      // as dfeatures, by strides; without dsqdists null
  const int32_t* keys;    // int32 [B, P], −1 where ignored
  const float* anchors;   // float32 [num_classes, D]; of key k: row k / groups mod num_classes
  const float* dsums;     // float32 [num_keys, D]
  const float* dsqdists;  // float32 [num_keys]
  T* dfeatures;           // [B, D, P] by strides
  Pixels view, out;       // of features, of dfeatures
  unsigned num_keys, num_classes, groups, blocks_per_line;
  // In planes: from a channel of a block to the next. The planes of these channels of dfeatures
  // begin at the same position in 16 bytes.
  int period;
  bool tables_aligned;  // rows of the tables begin at multiples of 16 bytes

  __device__ unsigned anchor_of_key(unsigned key) const {
    return num_keys == num_classes ? key : key / groups % num_classes;
  }
};

// SIZE neighbours: 16 bytes, or one element.
template <class T, int SIZE>
__device__ __forceinline__ void load(const T* from, float (&x)[SIZE]) {
  if constexpr (SIZE == 1) {
    x[0] = static_cast<float>(*from);
  } else {
    const Vector<T> v = load_streaming(from);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) x[i] = to_float(v, i);
  }
}

template <class T, int SIZE>
__device__ __forceinline__ void store(T* to, const float (&x)[SIZE]) {
  if constexpr (SIZE == 1)
    *to = static_cast<T>(x[0]);
  else
    store_streaming(to, round_to<T>(x));
}

// COUNT numbers of a table, `stride` apart.
template <bool ALIGNED, int COUNT>
__device__ __forceinline__ void load_table(const float* from, int stride, float (&row)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += ALIGNED ? 4 : 1) {
    if constexpr (ALIGNED) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(from + i));
      row[i] = v.x, row[i + 1] = v.y, row[i + 2] = v.z, row[i + 3] = v.w;
    } else {
      row[i] = __ldg(from + i * stride);
    }
  }
}

// N neighbouring pixels of a line in planes, in a slice of the channels.
template <int N, bool ALIGNED, bool HAS_DSUMS, bool HAS_DSQDISTS, class T>
__device__ __forceinline__ void write_slice(const Gradient<T>& in, int64_t line, int64_t pixel,
                                            int first, int channels) {
  const Pixels &view = in.view, &out = in.out;
  const T* features = HAS_DSQDISTS ? in.features + view.offset(line, first, pixel) : nullptr;
  T* dfeatures = in.dfeatures + out.offset(line, first, pixel);
  const int64_t stride = in.period * view.stride_d, dstride = in.period * out.stride_d;
  const float *anchors = in.anchors + first, *dsums = in.dsums + first;
  unsigned valid = 0, anchor[N], dsum[N];  // rows of the tables, of less than 2^31 elements
  float scale[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int key = in.keys[line * out.pixels + pixel + i];
    valid |= (key >= 0 ? 1u : 0u) << i;
    const unsigned k = max(key, 0), dim = static_cast<unsigned>(out.dim);
    scale[i] = HAS_DSQDISTS ? 2 * in.dsqdists[k] : 0;
    anchor[i] = in.anchor_of_key(k) * dim;
    dsum[i] = k * dim;
  }
  const auto write = [&]<int COUNT, bool VECTORS>() {
    float x[COUNT][N];
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
      if constexpr (HAS_DSQDISTS) load(features + c * stride, x[c]);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float a[COUNT], s[COUNT] = {};
      if constexpr (HAS_DSQDISTS) load_table<VECTORS>(anchors + anchor[i], in.period, a);
      if constexpr (HAS_DSUMS) load_table<VECTORS>(dsums + dsum[i], in.period, s);
#pragma unroll
      for (int c = 0; c < COUNT; ++c) {
        const float y = HAS_DSQDISTS ? fmaf(x[c][i] - a[c], scale[i], s[c]) : s[c];
        x[c][i] = valid >> i & 1 ? y : 0;  // a selection: the feature may be NaN
      }
    }
#pragma unroll
    for (int c = 0; c < COUNT; ++c) store(dfeatures + c * dstride, x[c]);
    features += COUNT * stride, dfeatures += COUNT * dstride;
    anchors += COUNT * in.period, dsums += COUNT * in.period;
  };
  int c = 0;
#pragma unroll 1
  for (; c + STEP <= channels; c += STEP) write.template operator()<STEP, ALIGNED>();
#pragma unroll 1
  for (; c < channels; ++c) write.template operator()<1, false>();
}

// A thread has SIZE neighbouring pixels: 16 bytes, or one. Neighbouring blocks have the same slice.
template <class T, int SIZE, bool HAS_DSUMS, bool HAS_DSQDISTS>
__global__ void __launch_bounds__(THREADS, 3)
    class_moments_backward_planes_kernel(const Gradient<T> in) {
  const int64_t line = blockIdx.x / in.blocks_per_line;
  const int first = blockIdx.y / in.period * SLICE * in.period + blockIdx.y % in.period;
  const int channels = min(ceil_div(static_cast<int>(in.out.dim) - first, in.period), SLICE);
  int64_t pixel = (int64_t{blockIdx.x % in.blocks_per_line} * THREADS + threadIdx.x) * SIZE;
  if constexpr (SIZE > 1) {  // vectors begin at multiples of 16 bytes, the line perhaps not
    const T* const begin = in.dfeatures + in.out.offset(line, first, 0);
    pixel -= reinterpret_cast<uintptr_t>(begin) % 16 / sizeof(T);
    if (pixel >= 0 && pixel + SIZE <= in.out.pixels) {
      return in.tables_aligned ? write_slice<SIZE, true, HAS_DSUMS, HAS_DSQDISTS>(in, line, pixel,
                                                                                  first, channels)
                               : write_slice<SIZE, false, HAS_DSUMS, HAS_DSQDISTS>(in, line, pixel,
                                                                                   first, channels);
    }
  }
  const int64_t end = min(pixel + SIZE, in.out.pixels);
#pragma unroll 1
  for (int64_t p = max(pixel, int64_t{0}); p < end; ++p)
    write_slice<1, false, HAS_DSUMS, HAS_DSQDISTS>(in, line, p, first, channels);
}

// A thread has SIZE channels, 16 bytes or one, of STEP neighbouring pixels.
template <class T, int SIZE, bool HAS_DSUMS, bool HAS_DSQDISTS>
__global__ void __launch_bounds__(THREADS, 3)
    class_moments_backward_rows_kernel(const Gradient<T> in) {
  const Pixels &view = in.view, &out = in.out;
  const int64_t line = blockIdx.x / in.blocks_per_line, vectors = out.dim / SIZE;
  const int64_t v = int64_t{blockIdx.x % in.blocks_per_line} * THREADS + threadIdx.x;
  const int64_t first = v / vectors * STEP, d = v % vectors * SIZE;
  if (first >= out.pixels) return;
  float x[STEP][SIZE];
  int key[STEP];
#pragma unroll
  for (int n = 0; n < STEP; ++n) {
    const int64_t p = min(first + n, out.pixels - 1);  // no branch around the loads
    key[n] = in.keys[line * out.pixels + p];
    if constexpr (HAS_DSQDISTS) load(in.features + view.offset(line, d, p), x[n]);
  }
#pragma unroll
  for (int n = 0; n < STEP; ++n) {
    const unsigned k = max(key[n], 0);
    const float scale = HAS_DSQDISTS ? 2 * in.dsqdists[k] : 0;
    float a[SIZE], s[SIZE] = {};
    if constexpr (HAS_DSQDISTS)
      load_table<(SIZE > 1)>(in.anchors + in.anchor_of_key(k) * out.dim + d, 1, a);
    if constexpr (HAS_DSUMS) load_table<(SIZE > 1)>(in.dsums + k * out.dim + d, 1, s);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float y = HAS_DSQDISTS ? fmaf(x[n][i] - a[i], scale, s[i]) : s[i];
      x[n][i] = key[n] >= 0 ? y : 0;
    }
    if (first + n < out.pixels) store(in.dfeatures + out.offset(line, d, first + n), x[n]);
  }
}

template <int SIZE, class T>
void write_gradient(Gradient<T> in, bool rows, Stream stream) {
  const Pixels& out = in.out;
  // A line in planes may begin within a vector.
  const int64_t threads = rows ? ceil_div(out.pixels, int64_t{STEP}) * (out.dim / SIZE)
                               : ceil_div(out.pixels + SIZE - 1, int64_t{SIZE});
  in.blocks_per_line = grid_of(NAME, ceil_div(threads, int64_t{THREADS})).x;
  dim3 grid = grid_of(NAME, out.lines * in.blocks_per_line);
  const int64_t slices = ceil_div(ceil_div(out.dim, int64_t{in.period}), int64_t{SLICE});
  if (!rows) grid.y = static_cast<unsigned>(in.period * slices);
  const auto run = [&]<bool HAS_DSUMS, bool HAS_DSQDISTS>() {
    const auto kernel =
        rows ? class_moments_backward_rows_kernel<T, SIZE, HAS_DSUMS, HAS_DSQDISTS>
             : class_moments_backward_planes_kernel<T, SIZE, HAS_DSUMS, HAS_DSQDISTS>;
    launch("class_moments_backward_kernel", kernel, grid, THREADS, 0, stream, in);
  };
  if (in.dsums && in.dsqdists)
    run.template operator()<true, true>();
  else if (in.dsqdists)
    run.template operator()<false, true>();
  else
    run.template operator()<true, false>();
}

template <class T>
void write_gradient(Gradient<T> in, Stream stream) {
  constexpr int64_t SIZE = Vector<T>::SIZE;
  const Pixels &view = in.view, &out = in.out;
  const bool planes = out.stride_p == 1 && out.pixels >= SIZE;
  const bool rows = !planes && out.stride_d == 1 && out.dim > 1;
  const int64_t period = SIZE / std::gcd(out.stride_d, SIZE);
  in.tables_aligned =
      out.dim % 4 == 0 && vectors_aligned(in.anchors, {}, 4) && vectors_aligned(in.dsums, {}, 4);
  const auto position = [](const T* data) { return reinterpret_cast<uintptr_t>(data) % 16; };
  const auto aligned = [](const T* data, const Pixels& p) {
    return !data || (p.stride_d == 1 &&
                     vectors_aligned(data, {p.stride_b, p.stride_h, p.stride_p}, sizeof(T)));
  };
  // In planes, vectors of features must lie as those of dfeatures.
  const bool alike =
      !in.features ||
      (view.stride_p == 1 && position(in.features) == position(in.dfeatures) &&
       (view.stride_b - out.stride_b) % SIZE == 0 && (view.stride_h - out.stride_h) % SIZE == 0 &&
       (view.stride_d - out.stride_d) % SIZE == 0);
  const bool vectors = planes ? alike
                              : out.dim % SIZE == 0 && in.tables_aligned &&
                                    aligned(in.dfeatures, out) && aligned(in.features, view);
  if (planes && vectors) in.period = static_cast<int>(period), in.tables_aligned &= period == 1;
  vectors ? write_gradient<SIZE>(in, rows, stream) : write_gradient<1>(in, rows, stream);
}

Tensor class_moments_backward(std::optional<Tensor> features, Tensor keys,
                              std::optional<Tensor> anchors, std::optional<Tensor> dsums,
                              std::optional<Tensor> dsqdists, int64_t groups,
                              std::vector<int64_t> size, std::vector<int64_t> stride,
                              ScalarType dtype) {
  STD_TORCH_CHECK(dsums || dsqdists, NAME, ": expected dsums or dsqdists, got neither");
  STD_TORCH_CHECK(!dsqdists || (features && anchors), NAME,
                  ": dsqdists: expected features and anchors too");
  const OnDevice device(keys);
  check_shape(NAME, "features", features, size);
  STD_TORCH_CHECK(features || !stride.empty(), NAME, ": stride: expected one without features");
  Tensor dfeatures = stride.empty() ? torch::stable::empty_like(*features)
                                    : new_empty_strided(keys, size, stride, dtype);
  if (dfeatures.numel() == 0) return dfeatures;
  stride = to_vector(dfeatures.strides());
  const int64_t num_keys = (dsums ? dsums : dsqdists)->size(0), dim = dfeatures.size(1);
  check_keys(NAME, keys, dfeatures.numel() / dim);
  if (anchors) check_shape(NAME, "anchors", anchors, {anchors->size(0), dim});
  check_shape(NAME, "dsums", dsums, {num_keys, dim});
  check_shape(NAME, "dsqdists", dsqdists, {num_keys});
  STD_TORCH_CHECK(num_keys * dim < int64_t{1} << 31 && dim < 1 << 20, NAME,
                  ": expected fewer than 2^20 channels and 2^31 sums, got ", num_keys, " keys of ",
                  dim, " channels");
  const std::vector<int64_t> from = dsqdists ? to_vector(features->strides()) : stride;
  const bool join = rows_join(size, from) && rows_join(size, stride);
  // If rows are not contiguous, or one row is expanded to all, they are copied: K×D.
  for (auto* table : {&anchors, &dsums, &dsqdists})
    if (*table) *table = torch::stable::contiguous(**table);
  for_dtype(NAME, dtype, [&](auto element) {
    using T = decltype(element);
    write_gradient<T>({.features = dsqdists ? features->const_data_ptr<T>() : nullptr,
                       .keys = keys.const_data_ptr<int32_t>(),
                       .anchors = optional_data<float>(anchors),
                       .dsums = optional_data<float>(dsums),
                       .dsqdists = optional_data<float>(dsqdists),
                       .dfeatures = dfeatures.mutable_data_ptr<T>(),
                       .view = as_pixels(size, from, join),
                       .out = as_pixels(size, stride, join),
                       .num_keys = static_cast<unsigned>(num_keys),
                       .num_classes = static_cast<unsigned>(anchors ? anchors->size(0) : 1),
                       .groups = static_cast<unsigned>(groups),
                       .period = 1},
                      device.stream);
  });
  return dfeatures;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, CUDA, library) {
  library.impl("class_moments_backward.cuda", TORCH_BOX(&anchorops::cuda::class_moments_backward));
}

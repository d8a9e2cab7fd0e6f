// The operator anchorops::class_moments_backward.cuda: the gradient of class moments.
//
// dfeatures[p] = 2·dsqdists[k]·(f_p − anchors[k]) + dsums[k],  k = key_p;  0 where ignored
//
// Writes dfeatures once. Reads the features once if dsqdists is given, otherwise not at all. Keys,
// 4 bytes a pixel, are read again for each slice of channels, from the second-level cache. The
// tables (anchors, dsums) are read from shared memory or from caches. One launch.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../../labels.h"
#include "../tensors.cuh"
#include "backward_elements.cuh"
#include "backward_planes.cuh"
#include "backward_rows.cuh"

namespace anchorops::cuda {
namespace {

constexpr const char* NAME = "class_moments_backward.cuda";
constexpr int64_t SMALL_BLOCKS = 2048;  // smaller ones: several for each multiprocessor
// Of a block for planes: two such blocks are resident on every GPU.
constexpr int64_t TABLES_IN_SHARED = 48 << 10;
// The part of the L1 cache for the tables, for channels that are processed together.
constexpr int64_t TABLES_IN_CACHE = 128 << 10;

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

// Calls function with whether there are dsums and dsqdists, as constants.
template <class T, class Function>
void for_gradients(const Gradient<T>& in, Function function) {
  if (in.dsums && in.dsqdists)
    function.template operator()<true, true>();
  else if (in.dsqdists)
    function.template operator()<false, true>();
  else
    function.template operator()<true, false>();
}

template <class T>
int64_t table_bytes_per_channel(const Gradient<T>& in) {
  return sizeof(float) * ((in.dsums ? in.num_keys : 0) + (in.dsqdists ? in.num_classes : 0));
}

template <class T>
bool tables_aligned(const Gradient<T>& in) {
  return in.out.dim % 4 == 0 && vectors_aligned(in.anchors, {}, 4) &&
         vectors_aligned(in.dsums, {}, 4);
}

// From a channel of a slice to the next, so that all planes of a slice begin at the same position
// in 16 bytes; 0 if this position is not the same in features and dfeatures.
template <class T>
int period_of(const Gradient<T>& in) {
  constexpr int SIZE = Vector<T>::SIZE;
  const Pixels &view = in.view, &out = in.out;
  const int64_t bytes =
      reinterpret_cast<intptr_t>(in.features) - reinterpret_cast<intptr_t>(in.dfeatures);
  if (view.stride_p != 1 || out.stride_p != 1) return 0;
  if (in.dsqdists &&
      (bytes % int64_t{sizeof(Vector<T>)} || (view.stride_b - out.stride_b) % SIZE ||
       (view.stride_h - out.stride_h) % SIZE || (view.stride_d - out.stride_d) % SIZE))
    return 0;
  int period = 1;
  while (period * out.stride_d % SIZE) period *= 2;
  return static_cast<int>(std::min<int64_t>(period, out.dim));
}

template <class T>
Slices slices_of(const Gradient<T>& in, int period, int step, int64_t most_channels) {
  constexpr int SIZE = Vector<T>::SIZE;
  const Pixels& out = in.out;
  const bool aligned =
      vectors_aligned(in.dfeatures, {out.stride_b, out.stride_h, out.stride_d}, sizeof(T));
  Slices slices{.period = period};
  slices.vectors_per_line =
      static_cast<unsigned>(ceil_div(out.pixels + (aligned ? 0 : SIZE - 1), SIZE));
  slices.vectors = static_cast<unsigned>(out.lines * slices.vectors_per_line);
  const int64_t vector_blocks = ceil_div(int64_t{slices.vectors}, int64_t{PLANES_THREADS});
  const int64_t occupied = 4 * multiprocessors();  // two blocks for each, twice
  const int64_t enough = std::max<int64_t>(out.dim * vector_blocks / occupied, 16);
  const int64_t channels = ceil_div(out.dim, int64_t{period});
  const int64_t ranges = ceil_div(channels, std::min({most_channels, enough, int64_t{64}}));
  slices.channels = static_cast<int>(ceil_div(ceil_div(channels, ranges), int64_t{step}) * step);
  slices.count = static_cast<int>(ranges * period);
  const int64_t rounds = ceil_div(vector_blocks * slices.count, occupied);
  slices.blocks = static_cast<int>(ceil_div(vector_blocks, rounds));
  return slices;
}

// Returns false if the layout or the number of keys does not permit it.
template <class T>
bool write_planes(const Gradient<T>& in, Stream stream) {
  const int period = period_of(in);
  if (period == 0 || in.out.pixels < Vector<T>::SIZE || in.out.lines * in.out.pixels >= 1u << 31)
    return false;
  bool written = false;
  for_gradients(in, [&]<bool HAS_DSUMS, bool HAS_DSQDISTS>() {
    using Table = TableSlice<T, HAS_DSUMS, HAS_DSQDISTS>;
    // Rows have an odd number of vectors, so they begin in different banks.
    const int64_t vectors = (TABLES_IN_SHARED / in.num_keys / int64_t{sizeof(float4)} - 1) | 1;
    const int64_t most_channels = vectors / Table::TABLES * Table::STEP;
    if (most_channels <= 0) return;  // more than 1,024 keys with both tables, 3,072 with one
    Slices slices = slices_of(in, period, Table::STEP, most_channels);
    slices.row_bytes = (slices.channels / Table::STEP * Table::TABLES | 1) * sizeof(float4);
    launch("class_moments_backward_planes_kernel",
           class_moments_backward_planes_kernel<T, HAS_DSUMS, HAS_DSQDISTS>,
           grid_of(NAME, int64_t{slices.count} * slices.blocks), PLANES_THREADS,
           int64_t{in.num_keys} * slices.row_bytes, stream, in, slices);
    written = true;
  });
  return written;
}

// Returns false if the layout does not permit it.
template <class T>
bool write_rows(const Gradient<T>& in, Stream stream) {
  constexpr int SIZE = Vector<T>::SIZE;
  const Pixels& out = in.out;
  const auto aligned = [](const Pixels& p, const T* data) {
    return p.stride_d == 1 &&
           vectors_aligned(data, {p.stride_b, p.stride_h, p.stride_p}, sizeof(T));
  };
  if (!aligned(in.view, in.features) || !aligned(out, in.dfeatures) || out.dim % SIZE != 0 ||
      !tables_aligned(in))
    return false;
  const int64_t vectors = out.dim / SIZE;
  int64_t cached = TABLES_IN_CACHE / (table_bytes_per_channel(in) * SIZE);
  if (cached < 8) cached = vectors;  // less than a cache line of 128 bytes of features
  const int64_t count = ceil_div(vectors, cached), slice = ceil_div(vectors, count);
  constexpr int64_t ROUND = ROWS_THREADS * ROWS_UNROLL;
  const int64_t rounds =
      std::clamp<int64_t>(out.lines * out.pixels * vectors / (ROUND * SMALL_BLOCKS), 1, 8);
  const int64_t blocks_per_line = ceil_div(out.pixels * slice, ROUND * rounds);
  const RowSlices slices{static_cast<int>(slice), static_cast<int>(rounds),
                         grid_of(NAME, blocks_per_line).x};
  for_gradients(in, [&]<bool HAS_DSUMS, bool HAS_DSQDISTS>() {
    launch("class_moments_backward_rows_kernel",
           class_moments_backward_rows_kernel<T, HAS_DSUMS, HAS_DSQDISTS>,
           grid_of(NAME, ceil_div(vectors, slice) * out.lines * blocks_per_line), ROWS_THREADS, 0,
           stream, in, slices);
  });
  return true;
}

template <int LANES, class T>
void write_elements(const Gradient<T>& in, Stream stream) {
  const Pixels& out = in.out;
  const int64_t pixel_blocks = ceil_div(out.lines * out.pixels * LANES, int64_t{ELEMENTS_THREADS});
  const int64_t cached = std::clamp<int64_t>(TABLES_IN_CACHE / table_bytes_per_channel(in), 16, 64);
  const int64_t enough = std::max<int64_t>(out.dim * pixel_blocks / SMALL_BLOCKS, 16);
  const int64_t ranges = LANES > 1 ? 1 : ceil_div(out.dim, std::min(cached, enough));
  const int64_t channels = ceil_div(ceil_div(out.dim, ranges), int64_t{16}) * 16;
  for_gradients(in, [&]<bool HAS_DSUMS, bool HAS_DSQDISTS>() {
    launch("class_moments_backward_elements_kernel",
           class_moments_backward_elements_kernel<T, LANES, HAS_DSUMS, HAS_DSQDISTS>,
           grid_of(NAME, pixel_blocks * ceil_div(out.dim, channels)), ELEMENTS_THREADS, 0, stream,
           in, grid_of(NAME, pixel_blocks).x, static_cast<int>(channels));
  });
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
  const std::vector<int64_t> from = dsqdists ? to_vector(features->strides()) : stride;
  const bool join = rows_join(size, from) && rows_join(size, stride);
  Pixels view = as_pixels(size, from, join), out = as_pixels(size, stride, join);
  join_lines(view, out);
  STD_TORCH_CHECK(out.dim < 1 << 29, NAME, ": features: too many channels");

  // If rows are not contiguous, or one row is expanded to all, they are copied: K×D.
  for (auto* table : {&anchors, &dsums, &dsqdists})
    if (*table) *table = torch::stable::contiguous(**table);
  for_dtype(NAME, dtype, [&](auto element) {
    using T = decltype(element);
    const Gradient<T> in{.features = dsqdists ? features->const_data_ptr<T>() : nullptr,
                         .keys = keys.const_data_ptr<int32_t>(),
                         .anchors = optional_data<float>(anchors),
                         .dsums = optional_data<float>(dsums),
                         .dsqdists = optional_data<float>(dsqdists),
                         .dfeatures = dfeatures.mutable_data_ptr<T>(),
                         .view = view,
                         .out = out,
                         .num_keys = static_cast<unsigned>(num_keys),
                         .num_classes = static_cast<unsigned>(anchors ? anchors->size(0) : 1),
                         .groups = static_cast<unsigned>(groups)};
    if (write_planes(in, device.stream) || write_rows(in, device.stream)) return;
    if (out.stride_d == 1 && out.dim > 1)
      write_elements<32>(in, device.stream);
    else
      write_elements<1>(in, device.stream);
  });
  return dfeatures;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("class_moments_backward.cuda", TORCH_BOX(&anchorops::cuda::class_moments_backward));
}

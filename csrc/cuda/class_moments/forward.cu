// The operator anchorops::class_moments.cuda: statistics of features by key,
//
//     sums[k] = Σ f_p    sqdists[k] = Σ ‖f_p − a_k‖²
//
// Features are read once, and no other memory is as large. A block of threads is one warp. It
// copies tiles of a chunk of the pixels to shared memory (tiles.cuh) and adds them to the sums of
// their keys (sums.cuh), in float32; then the partials of the chunks are added (reduction.cuh).
//
// It is made for labels that are equal in most neighbouring pixels (docs/gpu.md).
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../../labels.h"
#include "../tensors.cuh"
#include "reduction.cuh"

namespace anchorops::cuda {
namespace {

constexpr const char* NAME = "class_moments.cuda";
constexpr int64_t MAX_KEYS = 1024;  // CUDA_MAX_KEYS of anchorops/_backend.py

// As many chunks as occupy the device once. Fewer if the partials would be more than 1/4 of the
// features and more than 16 MB, which a cache holds.
template <class T>
Tiling plan(const Input<T>& in, size_t shared_bytes) {
  const Pixels& view = in.view;
  const int64_t period = in.period, shift = in.shifted ? Vector<T>::SIZE - 1 : 0;
  const int64_t blocks = period * ceil_div(ceil_div(view.dim, period), CHANNELS);
  const int64_t tiles_per_line = ceil_div(view.pixels + shift, int64_t{128 / sizeof(T)});
  const int64_t tiles = view.lines * tiles_per_line;
  const int64_t resident = std::min<int64_t>(blocks_in_shared(shared_bytes), 8);
  const int64_t once = std::max<int64_t>(multiprocessors() * resident / blocks, 1);
  const int64_t bytes = view.lines * view.pixels * view.dim * int64_t{sizeof(T)};
  const int64_t most =
      std::max<int64_t>(bytes / 4, 16 << 20) / (4 * in.num_keys * blocks * CHANNELS);
  const int64_t chunks = std::clamp<int64_t>(std::min(once, most), 1, tiles);
  return {.tiles_per_chunk = tiles / chunks,
          .longer = static_cast<int>(tiles % chunks),
          .tiles_per_line = static_cast<int>(tiles_per_line),
          .chunks = static_cast<int>(chunks),
          .blocks = static_cast<int>(blocks)};
}

// sums and sqdists are empty if not wanted.
template <class T, bool HAS_ANCHORS, bool IN_ROWS>
void sum_pixels(const Input<T>& in, Tensor sums, Tensor sqdists, Stream stream) {
  const size_t shared_bytes =
      STAGES * sizeof(Tile<T, IN_ROWS>) + Slots<T, HAS_ANCHORS, IN_ROWS>::bytes(in.num_keys);
  const Tiling tiling = plan(in, shared_bytes);
  const int64_t chunks = tiling.chunks, blocks = tiling.blocks, num_keys = in.num_keys;
  const Tensor part = new_empty(sums, {chunks, num_keys, blocks, 32, 2}, ScalarType::Float);
  const Tensor part_sq =
      new_empty(sums, {HAS_ANCHORS ? chunks : 0, num_keys, blocks}, ScalarType::Float);
  const Tensor met = new_empty(sums, {chunks, in.period, num_keys}, ScalarType::Byte);
  const Partials partials{reinterpret_cast<float2*>(part.mutable_data_ptr<float>()),
                          part_sq.mutable_data_ptr<float>(), met.mutable_data_ptr<uint8_t>()};
  launch("class_moments_kernel", class_moments_kernel<T, HAS_ANCHORS, IN_ROWS>,
         grid_of(NAME, chunks * blocks), 32, shared_bytes, stream, in, tiling, partials);

  int slices = 1;
  while (slices < 32 && slices * 8 < chunks) slices *= 2;
  const int64_t columns = (sums.numel() ? blocks * CHANNELS : 0) + (HAS_ANCHORS ? 1 : 0);
  launch("class_moments_reduction_kernel", class_moments_reduction_kernel,
         grid_of(NAME, ceil_div(num_keys * columns * slices, int64_t{REDUCTION_THREADS})),
         REDUCTION_THREADS, 0, stream, partials, tiling, in.num_keys, static_cast<int>(in.view.dim),
         in.period, IN_ROWS, slices, sums.numel() ? sums.mutable_data_ptr<float>() : nullptr,
         HAS_ANCHORS ? sqdists.mutable_data_ptr<float>() : nullptr);
}

template <class T>
Input<T> input_of(const Tensor& features, const Tensor& keys, const std::optional<Tensor>& anchors,
                  int64_t num_keys, int64_t groups) {
  constexpr int64_t SIZE = Vector<T>::SIZE;
  const auto size = to_vector(features.sizes()), stride = to_vector(features.strides());
  const Pixels view = as_pixels(size, stride, rows_join(size, stride));
  const bool in_rows = view.stride_d == 1 && view.stride_p != 1;
  const int64_t row_stride = in_rows ? view.stride_p : view.stride_d;
  const T* const first = features.const_data_ptr<T>();
  const bool vectors =
      (in_rows || view.stride_p == 1) &&
      vectors_aligned(first, {view.stride_b, view.stride_h, row_stride}, sizeof(T));
  const int64_t period = SIZE / std::gcd(view.stride_d, SIZE);
  // unless most lanes would have no channel
  const bool shifted = !vectors && view.stride_p == 1 && view.dim >= 16 * period;
  return {.features = first,
          .keys = keys.const_data_ptr<int32_t>(),
          .anchors = optional_data<float>(anchors),
          .view = view,
          .num_keys = static_cast<int>(num_keys),
          .num_classes = anchors ? static_cast<int>(anchors->size(0)) : 1,
          .groups = static_cast<int>(groups),
          .in_rows = in_rows,
          .vectors = vectors || shifted,
          .shifted = shifted,
          .period = shifted ? static_cast<int>(period) : 1};
}

std::tuple<Tensor, Tensor> class_moments(Tensor features, Tensor keys,
                                         std::optional<Tensor> anchors, int64_t num_keys,
                                         int64_t groups, bool with_sums) {
  const int64_t dim = features.size(1);
  check_keys(NAME, keys, features.numel() / std::max<int64_t>(dim, 1));
  STD_TORCH_CHECK(num_keys <= MAX_KEYS, NAME, ": num_keys: expected at most ", MAX_KEYS, ", got ",
                  num_keys);
  if (anchors) check_shape(NAME, "anchors", anchors, {anchors->size(0), dim});
  const OnDevice device(features);
  const std::vector<int64_t> matrix = {num_keys, dim}, none = {0};
  const Tensor sums = new_empty(features, with_sums ? matrix : none, ScalarType::Float);
  const Tensor sqdists = new_empty(features, {anchors ? num_keys : 0}, ScalarType::Float);
  if (features.numel() == 0 || num_keys == 0 || (!with_sums && !anchors)) {
    for (const Tensor* each : {&sums, &sqdists})
      fill_zero(each->mutable_data_ptr<float>(), each->numel() * sizeof(float), device.stream);
    return {sums, sqdists};
  }
  if (anchors) anchors = torch::stable::contiguous(*anchors);
  for_dtype(NAME, features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Input<T> in = input_of<T>(features, keys, anchors, num_keys, groups);
    const auto run = [&]<bool HAS_ANCHORS>() {
      if (in.in_rows)
        sum_pixels<T, HAS_ANCHORS, true>(in, sums, sqdists, device.stream);
      else
        sum_pixels<T, HAS_ANCHORS, false>(in, sums, sqdists, device.stream);
    };
    anchors ? run.template operator()<true>() : run.template operator()<false>();
  });
  return {sums, sqdists};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, CUDA, library) {
  library.impl("class_moments.cuda", TORCH_BOX(&anchorops::cuda::class_moments));
}

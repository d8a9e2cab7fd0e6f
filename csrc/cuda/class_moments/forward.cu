// The operator anchorops::class_moments.cuda: statistics of features by key,
//
//     sums[k] = Σ f_p    sqdists[k] = Σ ‖f_p − a_k‖²
//
// A block is one warp. It sums 32 channels of a chunk of the pixels on tensor cores, 32 keys at a
// time (slots.cuh). Features are read once. Keys are read once for each 32 channels: the first time
// from memory, then from the second-level cache. A chunk writes partials of the keys that it has
// met; if these are not more than there are slots, each partial is written once. A second kernel
// reads the partials once and adds them in a fixed order (reduction.cu). The division of the pixels
// is in plan.cuh.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../../labels.h"
#include "../tensors.cuh"
#include "arguments.cuh"
#include "plan.cuh"
#include "reduction.cuh"

namespace anchorops::cuda {
namespace {

constexpr int64_t MAX_KEYS = 1024;  // CUDA_MAX_KEYS of anchorops/_backend.py

// float32 [num_keys, D] and [num_keys]; empty if not wanted.
struct Outputs {
  Tensor sums, sqdists;
};

float* data(const Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

template <class T>
void sum_pixels(Input<T> input, int statistics, const Outputs& out, Stream stream) {
  shift_if_unaligned(input);
  const int64_t num_keys = input.num_keys, dim = input.view.dim, period = input.period;
  const Tiling tiling = plan(input, statistics);
  const int64_t chunks = tiling.chunks, blocks = tiling.blocks;
  const Tensor met = new_empty(out.sums, {chunks * period, num_keys}, ScalarType::Byte);
  Partials partials{.met = met.mutable_data_ptr<uint8_t>(),
                    .width = static_cast<int>(width_of(input, blocks)),
                    .period = input.period};
  Reductions all{.met = partials.met, .num_keys = num_keys, .period = input.period};
  std::vector<Tensor> buffers;
  const auto reduce = [&](int which, bool wanted, const Tensor& total, int64_t rows_per_chunk,
                          int64_t width, int64_t columns) -> float* {
    if (!wanted) return nullptr;
    buffers.push_back(
        new_empty(total, {chunks * rows_per_chunk, num_keys, width}, ScalarType::Float));
    all.of[which] = {data(buffers.back()),
                     data(total),
                     width,
                     columns,
                     static_cast<int>(chunks * rows_per_chunk),
                     static_cast<int>(rows_per_chunk)};
    return data(buffers.back());
  };
  partials.sums = reduce(0, statistics & SUMS, out.sums, 1, partials.width, dim);
  partials.sqdists = reduce(1, statistics & SQDISTS, out.sqdists, blocks, 1, 1);
  launch_moments(statistics, input, tiling, partials, stream);
  add_partials(all, stream);
}

std::tuple<Tensor, Tensor> class_moments(Tensor features, Tensor keys,
                                         std::optional<Tensor> anchors, int64_t num_keys,
                                         int64_t groups, bool with_sums) {
  check_keys("class_moments.cuda", keys, features.numel() / std::max<int64_t>(features.size(1), 1));
  STD_TORCH_CHECK(num_keys <= MAX_KEYS, "class_moments.cuda: num_keys: expected at most ", MAX_KEYS,
                  ", got ", num_keys);
  if (anchors)
    check_shape("class_moments.cuda", "anchors", anchors, {anchors->size(0), features.size(1)});
  const OnDevice device(features);
  const int statistics = (with_sums ? SUMS : 0) | (anchors ? SQDISTS : 0);
  const std::vector<int64_t> matrix = {num_keys, features.size(1)}, none = {0};
  const Outputs out = {.sums = new_empty(features, with_sums ? matrix : none, ScalarType::Float),
                       .sqdists = new_empty(features, {anchors ? num_keys : 0}, ScalarType::Float)};
  if (features.numel() == 0 || num_keys == 0 || statistics == 0) {
    for (const Tensor* each : {&out.sums, &out.sqdists})
      fill_zero(data(*each), each->numel() * sizeof(float), device.stream);
    return {out.sums, out.sqdists};
  }
  if (anchors) anchors = torch::stable::contiguous(*anchors);

  for_dtype("class_moments.cuda", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto size = to_vector(features.sizes()), stride = to_vector(features.strides());
    const Pixels view = as_pixels(size, stride, rows_join(size, stride));
    const bool in_rows = view.stride_d == 1 && view.stride_p != 1;
    const int64_t row_stride = in_rows ? view.stride_p : view.stride_d;
    const T* const first = features.const_data_ptr<T>();
    const Input<T> input{
        .features = first,
        .keys = keys.const_data_ptr<int32_t>(),
        .anchors = optional_data<float>(anchors),
        .view = view,
        .row_stride = row_stride,
        .num_keys = static_cast<int>(num_keys),
        .num_classes = anchors ? static_cast<int>(anchors->size(0)) : 1,
        .groups = static_cast<int>(groups),
        .vectors = (in_rows || view.stride_p == 1) &&
                   vectors_aligned(first, {view.stride_b, view.stride_h, row_stride}, sizeof(T)),
        .layout = in_rows ? ROWS : PLANES};
    sum_pixels(input, statistics, out, device.stream);
  });
  return {out.sums, out.sqdists};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("class_moments.cuda", TORCH_BOX(&anchorops::cuda::class_moments));
}

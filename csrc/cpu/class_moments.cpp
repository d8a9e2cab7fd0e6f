// The operators anchorops::class_moments.cpu and its backward: outputs, work items, threads.
#include "class_moments.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../labels.h"
#include "operators.h"

namespace anchorops::cpu {
namespace {

template <class T>
Kernels<T> best_kernels() {
  return BEST_OF(kernels<T>());
}

template <class Sizes, class Strides>
Layout layout_of(const Sizes& size, const Strides& stride) {
  switch (size.size()) {
    case 2:
      return {1, size[1], 1, size[0], 0, stride[1], 0, stride[0]};
    case 3:
      return {size[0], size[1], 1, size[2], stride[0], stride[1], 0, stride[2]};
    default:
      return {size[0], size[1], size[2], size[3], stride[0], stride[1], stride[2], stride[3]};
  }
}

bool one_row(const Layout& layout) {
  return layout.width == 1 || layout.stride_h == layout.width * layout.stride_w;
}

// An image as a single row of pixels.
Layout as_one_row(Layout layout) {
  if (layout.width == 1) layout.stride_w = layout.stride_h;
  layout.width *= layout.height;
  layout.height = 1;
  return layout;
}

// Work item i processes split i / groups of the tiles and group i % groups of the channels.
struct Work {
  int64_t tiles, splits, dim, groups, group_channels;

  Work(const Layout& layout, int64_t lanes, int64_t blocks_of_group, int64_t max_splits)
      : tiles(layout.batch * layout.height * ceil_div(layout.width, lanes)), dim(layout.dim) {
    const int64_t blocks = ceil_div(dim, lanes);
    groups = ceil_div(blocks, blocks_of_group);
    group_channels = ceil_div(blocks, std::max<int64_t>(groups, 1)) * lanes;
    splits = std::clamp<int64_t>(max_splits, 1, ceil_div(ITEMS, std::max<int64_t>(groups, 1)));
  }

  int64_t items() const { return splits * groups; }
  Range split(int64_t i) const {
    return {tiles * (i / groups) / splits, tiles * (i / groups + 1) / splits};
  }
  Range channels(int64_t i) const {
    const int64_t begin = i % groups * group_channels;
    return {begin, std::min(begin + group_channels, dim)};
  }
};

std::vector<int32_t> anchor_of_keys(int64_t num_keys, int64_t groups, int64_t num_classes) {
  std::vector<int32_t> rows(1 + num_keys);
  for (int64_t k = 0; k < num_keys; ++k)
    rows[1 + k] = static_cast<int32_t>(k / groups % num_classes);
  return rows;
}

template <class Stat>
Anchors<Stat> anchors_of(const std::optional<Tensor>& anchors, const std::vector<int32_t>& rows) {
  return {anchors ? anchors->const_data_ptr<Stat>() : nullptr, rows.data()};
}

template <class T>
void moments(const Tensor& features, const Tensor& keys, const std::optional<Tensor>& anchors,
             int64_t num_keys, int64_t groups, Tensor* sums, Tensor* sqdists) {
  using Stat = StatOf<T>;
  const Kernels<T> kernels = best_kernels<T>();
  const int64_t lanes = kernels.lanes;
  Layout layout = layout_of(features.sizes(), features.strides());
  if (one_row(layout)) layout = as_one_row(layout);
  const int64_t dim = layout.dim, pixels = layout.batch * layout.height * layout.width;
  const auto key_rows =
      anchor_of_keys(anchors ? num_keys : 0, groups, anchors ? anchors->size(0) : 1);
  const auto anchor_rows = anchors_of<Stat>(anchors, key_rows);

  // If planes are contiguous, one block of channels is read at a time. If rows are contiguous, 8
  // blocks, so that cache lines are read consecutively and the totals stay in cache. The partials
  // of the splits stay below 1 % of float32 features.
  const int64_t blocks_of_group = layout.stride_w == 1 ? 1 : 8;
  const Work work(layout, lanes, blocks_of_group, pixels / (256 * (1 + num_keys)));
  // [splits, num_keys, dim]
  std::vector<double> partials(sums && work.splits > 1 ? work.splits * num_keys * dim : 0);
  std::vector<double> sqdist_partials(sqdists ? work.items() * num_keys : 0);

  torch::stable::parallel_for(0, work.items(), 1, [&](int64_t first, int64_t last) {
    const int64_t block = (1 + num_keys) * lanes;
    const int64_t blocks = work.group_channels / lanes;
    std::vector<double> totals, squares(sqdists ? (1 + num_keys) * kernels.doubles : 0);
    for (int64_t item = first; item < last; ++item) {
      totals.assign(sums ? blocks * block : 0, 0);
      squares.assign(squares.size(), 0);
      const Range channels = work.channels(item);
      kernels.forward(layout, features.const_data_ptr<T>(), keys.const_data_ptr<int32_t>(),
                      num_keys, anchor_rows, work.split(item), channels,
                      sums ? totals.data() : nullptr, sqdists ? squares.data() : nullptr);
      if (sums) {
        double* partial = partials.data() + item / work.groups * num_keys * dim;
        Stat* out = sums->mutable_data_ptr<Stat>();
        for (int64_t k = 0; k < num_keys; ++k)
          for (int64_t c = channels.begin; c < channels.end; ++c) {
            const int64_t lane = c - channels.begin;
            const double total = totals[lane / lanes * block + (1 + k) * lanes + lane % lanes];
            if (work.splits > 1)
              partial[k * dim + c] = total;
            else
              out[k * dim + c] = static_cast<Stat>(total);
          }
      }
      if (!sqdists) continue;
      for (int64_t i = 0; i < num_keys * kernels.doubles; ++i)
        sqdist_partials[item * num_keys + i / kernels.doubles] += squares[kernels.doubles + i];
    }
  });

  if (sums && work.splits > 1) {
    Stat* out = sums->mutable_data_ptr<Stat>();
    torch::stable::parallel_for(0, num_keys * dim, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double total = 0;
        for (int64_t s = 0; s < work.splits; ++s) total += partials[s * num_keys * dim + i];
        out[i] = static_cast<Stat>(total);
      }
    });
  }
  if (sqdists) {
    Stat* out = sqdists->mutable_data_ptr<Stat>();
    for (int64_t k = 0; k < num_keys; ++k) {
      double total = 0;
      for (int64_t item = 0; item < work.items(); ++item)
        total += sqdist_partials[item * num_keys + k];
      out[k] = static_cast<Stat>(total);
    }
  }
}

template <class T>
void moments_backward(const std::optional<Tensor>& features, const Tensor& keys,
                      const std::optional<Tensor>& anchors, const std::optional<Tensor>& dsums,
                      const std::optional<Tensor>& dsqdists, int64_t num_keys, int64_t groups,
                      const Tensor& dfeatures) {
  using Stat = StatOf<T>;
  const Kernels<T> kernels = best_kernels<T>();
  Layout dlayout = layout_of(dfeatures.sizes(), dfeatures.strides());
  Layout layout = features ? layout_of(features->sizes(), features->strides()) : dlayout;
  if (one_row(layout) && one_row(dlayout)) {
    layout = as_one_row(layout);
    dlayout = as_one_row(dlayout);
  }
  const auto key_rows =
      anchor_of_keys(anchors ? num_keys : 0, groups, anchors ? anchors->size(0) : 1);
  const auto anchor_rows = anchors_of<Stat>(anchors, key_rows);

  const int64_t all = std::max<int64_t>(1, ceil_div(layout.dim, kernels.lanes));
  const Work work(layout, kernels.lanes, dlayout.stride_w == 1 ? 1 : all, ITEMS);
  torch::stable::parallel_for(0, work.items(), 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item)
      kernels.backward(layout, features ? features->const_data_ptr<T>() : nullptr,
                       keys.const_data_ptr<int32_t>(), anchor_rows,
                       dsums ? dsums->const_data_ptr<Stat>() : nullptr,
                       dsqdists ? dsqdists->const_data_ptr<Stat>() : nullptr, dlayout,
                       dfeatures.mutable_data_ptr<T>(), work.split(item), work.channels(item));
  });
}

std::tuple<Tensor, Tensor> class_moments(Tensor features, Tensor keys,
                                         std::optional<Tensor> anchors, int64_t num_keys,
                                         int64_t groups, bool with_sums) {
  check_keys("class_moments.cpu", keys, features.numel() / std::max<int64_t>(features.size(1), 1));
  const ScalarType dtype = features.scalar_type();
  const ScalarType stat = statistics_dtype(dtype);
  const std::vector<int64_t> matrix = {num_keys, features.size(1)};
  Tensor sums = with_sums ? new_empty(matrix, stat) : absent(stat);
  Tensor sqdists = anchors ? new_empty({num_keys}, stat) : absent(stat);
  if (anchors) anchors = torch::stable::contiguous(*anchors);
  for_dtype("class_moments.cpu", dtype, [&](auto element) {
    moments<decltype(element)>(features, keys, anchors, num_keys, groups,
                               with_sums ? &sums : nullptr, anchors ? &sqdists : nullptr);
  });
  return {sums, sqdists};
}

Tensor class_moments_backward(std::optional<Tensor> features, Tensor keys,
                              std::optional<Tensor> anchors, std::optional<Tensor> dsums,
                              std::optional<Tensor> dsqdists, int64_t groups,
                              std::vector<int64_t> size, std::vector<int64_t> stride,
                              ScalarType dtype) {
  STD_TORCH_CHECK(features || !stride.empty(),
                  "class_moments_backward.cpu: stride: expected one without features");
  Tensor dfeatures = stride.empty() ? dense_like(*features) : new_empty(size, stride, dtype);
  if (dfeatures.numel() == 0) return dfeatures;
  check_keys("class_moments_backward.cpu", keys, dfeatures.numel() / dfeatures.size(1));
  if (anchors) anchors = torch::stable::contiguous(*anchors);
  if (dsums) dsums = torch::stable::contiguous(*dsums);
  if (dsqdists) dsqdists = torch::stable::contiguous(*dsqdists);
  const int64_t num_keys = dsums ? dsums->size(0) : dsqdists ? dsqdists->size(0) : 0;
  for_dtype("class_moments_backward.cpu", dtype, [&](auto element) {
    moments_backward<decltype(element)>(features, keys, anchors, dsums, dsqdists, num_keys, groups,
                                        dfeatures);
  });
  return dfeatures;
}

}  // namespace
}  // namespace anchorops::cpu

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  library.impl("class_moments.cpu", TORCH_BOX(&anchorops::cpu::class_moments));
  library.impl("class_moments_backward.cpu", TORCH_BOX(&anchorops::cpu::class_moments_backward));
}

// The operators anchorops::softmax_moments.cpu and its backward: outputs, work items, threads.
#include "softmax_moments.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "softmax_flags.h"
#include "softmax_tiles.h"

namespace anchorops::cpu::softmax {
namespace {

// Sums of each item for each class: item i and class k at [i * K + k]. Empty if not requested.
template <class Value>
class Partials {
 public:
  Partials(bool requested, int64_t items, int64_t num_classes)
      : num_classes_(num_classes), values_(requested ? items * num_classes : 0) {}

  Value* at(int64_t item) {
    return values_.empty() ? nullptr : values_.data() + item * num_classes_;
  }

  // out [groups, K]: sums over the splits of each group.
  template <class Out>
  void add_up(int64_t groups, int64_t splits, Out* out) const {
    if (values_.empty()) return;
    torch::stable::parallel_for(0, groups * num_classes_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / num_classes_, k = i % num_classes_;
        Value total = 0;
        for (int64_t s = 0; s < splits; ++s)
          total += values_[(group * splits + s) * num_classes_ + k];
        out[i] = static_cast<Out>(total);
      }
    });
  }

 private:
  int64_t num_classes_;
  std::vector<Value> values_;
};

struct Outputs {
  Tensor losses, overlaps, masses, squares, pixel_losses, lse, counts, hits, used, outside;
};

template <class Value>
Value* data_or_null(const Tensor& output) {
  return output.numel() ? output.mutable_data_ptr<Value>() : nullptr;
}

template <class Stat>
Map<Stat> map_of(const std::optional<Tensor>& map) {
  if (!map) return {};
  return {map->template const_data_ptr<Stat>(), map->stride(0), map->stride(1), map->stride(2)};
}

// The numbers of Options in anchorops/_moments.py, in its order.
struct Numbers {
  double min_loss, focal_gamma;

  explicit Numbers(const std::vector<double>& numbers)
      : min_loss(numbers.at(0)), focal_gamma(numbers.at(1)) {}

  bool has_min_loss() const { return min_loss > -std::numeric_limits<double>::infinity(); }
};

// totals: where the sums of v are kept. smoothing becomes contiguous.
template <class Stat>
LossShape<Stat> loss_shape(std::optional<Tensor>& smoothing,
                           const std::optional<Tensor>& pixel_weights, const Numbers& numbers,
                           std::vector<Stat>& totals) {
  LossShape<Stat> shape;
  if (smoothing) {
    smoothing = torch::stable::contiguous(*smoothing);
    const int64_t num_classes = smoothing->size(-1);
    shape.smoothing = smoothing->const_data_ptr<Stat>();
    shape.stride_b = smoothing->dim() == 3 ? smoothing->stride(0) : 0;
    for (int64_t i = 0; i < smoothing->numel(); i += 2 * num_classes) {
      const Stat* all_weights = shape.smoothing + i + num_classes;
      totals.push_back(std::accumulate(all_weights, all_weights + num_classes, Stat(0)));
    }
    shape.totals = totals.data();
  }
  shape.least = static_cast<Stat>(numbers.min_loss);
  shape.gamma = static_cast<Stat>(numbers.focal_gamma);
  shape.plain = !smoothing && !numbers.has_min_loss() && numbers.focal_gamma == 0;
  shape.pixel_weights = map_of<Stat>(pixel_weights);
  return shape;
}

template <class T>
void forward(const Tensor& logits, const Labels& labels, const LossShape<StatOf<T>>& shape,
             int64_t height, int64_t width, int64_t flags, const Outputs& out) {
  using Stat = StatOf<T>;
  const Layout layout = layout_of(logits);
  const Tiles<Stat> tiles(layout, height, width, flags & ALIGN_CORNERS);
  const int64_t num_classes = tiles.num_classes();
  Problem<Stat> problem = tiles.template problem<T>(logits, labels);
  problem.shape = shape;
  const auto kernels = best_kernels<Stat>();

  // The partials stay below a tenth of the logits.
  const int64_t groups = flags & PER_IMAGE ? layout.batch : 1;
  const int64_t tiles_of_group = tiles.count() / groups;
  const int64_t pixels_of_group = layout.batch / groups * layout.height * layout.width;
  const int64_t splits = std::clamp<int64_t>(std::min(tiles_of_group, pixels_of_group / 128), 1,
                                             ceil_div(ITEMS, groups));
  const int64_t items = groups * splits;
  const std::array<Tensor, LOSS_SUMS> loss_outputs = {out.losses, out.used};
  std::vector<Partials<double>> loss_sums;
  for (const Tensor& output : loss_outputs)
    loss_sums.emplace_back(output.numel() > 0, items, num_classes);
  Partials<double> overlaps(out.overlaps.numel() > 0, items, num_classes);
  Partials<double> masses(out.masses.numel() > 0, items, num_classes);
  Partials<double> squares(out.squares.numel() > 0, items, num_classes);
  Partials<int64_t> counts(true, items, num_classes);
  Partials<int64_t> hits(out.hits.numel() > 0, items, num_classes);
  Partials<int64_t> outside(true, items, 1);
  const Maps<Stat> maps = {data_or_null<Stat>(out.pixel_losses), data_or_null<Stat>(out.lse)};

  for_items(tiles, items, num_classes, false, out.masses.numel() + out.squares.numel() > 0,
            [&](int64_t first, int64_t last, const Workspace<Stat>& workspace) {
              for (int64_t item = first; item < last; ++item) {
                Sums sums = {{},
                             overlaps.at(item),
                             masses.at(item),
                             squares.at(item),
                             counts.at(item),
                             hits.at(item),
                             outside.at(item)};
                for (int s = 0; s < LOSS_SUMS; ++s) sums.loss_sums[s] = loss_sums[s].at(item);
                const int64_t start = item / splits * tiles_of_group, split = item % splits;
                for (int64_t i = tiles_of_group * split / splits;
                     i < tiles_of_group * (split + 1) / splits; ++i)
                  kernels.forward(problem, tiles.tile(start + i, false), workspace, sums, maps);
              }
            });

  for (int s = 0; s < LOSS_SUMS; ++s)
    if (loss_outputs[s].scalar_type() == ScalarType::Long)
      loss_sums[s].add_up(groups, splits, data_or_null<int64_t>(loss_outputs[s]));
    else
      loss_sums[s].add_up(groups, splits, data_or_null<Stat>(loss_outputs[s]));
  overlaps.add_up(groups, splits, data_or_null<Stat>(out.overlaps));
  masses.add_up(groups, splits, data_or_null<Stat>(out.masses));
  squares.add_up(groups, splits, data_or_null<Stat>(out.squares));
  counts.add_up(groups, splits, out.counts.mutable_data_ptr<int64_t>());
  hits.add_up(groups, splits, data_or_null<int64_t>(out.hits));
  if (out.outside.numel()) outside.add_up(1, items, out.outside.mutable_data_ptr<int64_t>());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
softmax_moments(Tensor logits, Tensor labels, std::optional<Tensor> smoothing,
                std::optional<Tensor> pixel_weights, std::vector<double> packed_numbers,
                int64_t ignore_index, int64_t flags) {
  const Numbers numbers(packed_numbers);
  const int64_t batch = logits.size(0), num_classes = std::max<int64_t>(logits.size(1), 2);
  STD_TORCH_CHECK(!(flags & WITH_LSE) || num_classes > 2,
                  "softmax_moments.cpu: two classes need no lse");
  const ScalarType dtype = logits.scalar_type();
  const ScalarType stat = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  const bool empty = labels.numel() == 0;
  const auto by_class = [&](bool requested, ScalarType type) {
    std::vector<int64_t> size = {0};
    if (requested && flags & PER_IMAGE) size = {batch, num_classes};
    if (requested && !(flags & PER_IMAGE)) size = {num_classes};
    return empty ? torch::stable::new_zeros(logits, size, type) : new_empty(logits, size, type);
  };
  const auto by_pixel = [&](bool requested) {
    std::vector<int64_t> size = {0};
    if (requested) size = {batch, labels.size(1), labels.size(2)};
    return new_empty(logits, size, stat);
  };
  std::vector<int64_t> outside_size;  // of a scalar
  if (!(flags & WITH_OUTSIDE)) outside_size = {0};
  const Tensor outside = torch::stable::new_zeros(logits, outside_size, ScalarType::Long);
  const Outputs out = {
      by_class(true, stat),
      by_class(flags & WITH_MASSES, stat),
      by_class(flags & WITH_MASSES, stat),
      by_class(flags & WITH_SQUARES, stat),
      by_pixel(flags & WITH_PIXEL_LOSSES),
      by_pixel(flags & WITH_LSE),
      by_class(true, ScalarType::Long),
      by_class(flags & WITH_HITS, ScalarType::Long),
      by_class(pixel_weights || numbers.has_min_loss(), pixel_weights ? stat : ScalarType::Long),
      outside};
  if (!empty)
    for_dtype("softmax_moments.cpu", dtype, [&](auto element) {
      using T = decltype(element);
      std::vector<StatOf<T>> totals;
      forward<T>(logits, labels_of("softmax_moments.cpu", labels, num_classes, ignore_index),
                 loss_shape(smoothing, pixel_weights, numbers, totals), labels.size(1),
                 labels.size(2), flags, out);
    });
  return {out.losses, out.overlaps, out.masses, out.squares, out.pixel_losses,
          out.lse,    out.counts,   out.hits,   out.used,    out.outside};
}

template <class T>
void backward(const Tensor& logits, const Labels& labels, const LossShape<StatOf<T>>& shape,
              int64_t height, int64_t width, bool align_corners,
              const Gradients<StatOf<T>>& gradients, const Tensor& dlogits) {
  using Stat = StatOf<T>;
  const Layout layout = layout_of(logits);
  const Tiles<Stat> tiles(layout, height, width, align_corners);
  Problem<Stat> problem = tiles.template problem<T>(logits, labels);
  problem.shape = shape;
  const Output<Stat> output = {layout_of(dlogits), dlogits.mutable_data_ptr<T>(),
                               best_rows<T>().finish_row, best_rows<T>().write_columns};
  const auto kernels = best_kernels<Stat>();
  for_items(tiles, tiles.count(), problem.logits.num_classes, tiles.upsampled(), true,
            [&](int64_t first, int64_t last, const Workspace<Stat>& workspace) {
              for (int64_t i = first; i < last; ++i)
                kernels.backward(problem, tiles.tile(i, true), workspace, gradients, output);
            });
}

Tensor softmax_moments_backward(Tensor logits, Tensor labels, Tensor lse,
                                std::optional<Tensor> dlosses, std::optional<Tensor> doverlaps,
                                std::optional<Tensor> dmasses, std::optional<Tensor> dsquares,
                                std::optional<Tensor> dpixel_losses,
                                std::optional<Tensor> smoothing,
                                std::optional<Tensor> pixel_weights, std::vector<double> numbers,
                                int64_t ignore_index, int64_t flags) {
  Tensor dlogits = torch::stable::empty_like(logits);
  if (dlogits.numel() == 0) return dlogits;
  if (labels.numel() == 0) return torch::stable::zero_(dlogits);
  for_dtype("softmax_moments.cpu", logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Stat = StatOf<T>;
    advise_huge_pages(dlogits);
    Gradients<Stat> gradients = {};
    const auto by_class = [&](std::optional<Tensor>& table) -> const Stat* {
      if (!table) return nullptr;
      table = torch::stable::contiguous(*table);
      gradients.stride_b = table->dim() == 2 ? table->size(1) : 0;
      return table->template const_data_ptr<Stat>();
    };
    gradients.dlosses = by_class(dlosses);
    gradients.doverlaps = by_class(doverlaps);
    gradients.dmasses = by_class(dmasses);
    gradients.dsquares = by_class(dsquares);
    gradients.dpixel_losses = map_of<Stat>(dpixel_losses);
    gradients.lse = lse.const_data_ptr<Stat>();
    std::vector<Stat> totals;
    const int64_t num_classes = std::max<int64_t>(logits.size(1), 2);
    backward<T>(logits, labels_of("softmax_moments.cpu", labels, num_classes, ignore_index),
                loss_shape(smoothing, pixel_weights, Numbers(numbers), totals), labels.size(1),
                labels.size(2), flags & ALIGN_CORNERS, gradients, dlogits);
  });
  return dlogits;
}

}  // namespace
}  // namespace anchorops::cpu::softmax

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  using namespace anchorops::cpu::softmax;
  library.impl("softmax_moments.cpu", TORCH_BOX(&softmax_moments));
  library.impl("softmax_moments_backward.cpu", TORCH_BOX(&softmax_moments_backward));
}

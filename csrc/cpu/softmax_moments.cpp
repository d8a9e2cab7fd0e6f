// The operators anchorops::softmax_moments.cpu and its backward: outputs, work items, threads.
#include "softmax_moments.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

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

// RESULTS of anchorops/_moments.py. Empty if not requested. lse: Maps::totals.
struct Results {
  Tensor losses, intersections, probability_sums, squares, pixel_losses, lse, counts, correct, used,
      divisor, labels_out_of_range;
};

// Options and Wanted of anchorops/_moments.py, in the order of the schema.
struct Options {
  std::optional<Tensor> true_weights, all_weights, pixel_weights, min_loss, focal_gamma;
  int64_t ignore_index;
  bool align_corners, per_image, correct, probability_sums, squares, pixel_losses, with_lse,
      labels_out_of_range;
};

// Contiguous weights of the classes, and the sums of all_weights: what LossOptions points to.
template <class Stat>
struct ClassWeights {
  std::optional<Tensor> true_weights, all_weights;
  std::vector<Stat> sums;

  explicit ClassWeights(const Options& options) {
    STD_TORCH_CHECK(options.true_weights.has_value() == options.all_weights.has_value(),
                    "softmax_moments.cpu: true_weights and all_weights are given together");
    if (!options.true_weights) return;
    STD_TORCH_CHECK(options.true_weights->sizes().equals(options.all_weights->sizes()),
                    "softmax_moments.cpu: all_weights: expected the shape of true_weights");
    true_weights = torch::stable::contiguous(*options.true_weights);
    all_weights = torch::stable::contiguous(*options.all_weights);
    const Stat* weights = all_weights->const_data_ptr<Stat>();
    const int64_t num_classes = all_weights->size(-1);
    for (int64_t i = 0; i < all_weights->numel(); i += num_classes)
      sums.push_back(std::accumulate(weights + i, weights + i + num_classes, Stat(0)));
  }
};

template <class Stat>
LossOptions<Stat> loss_options(const Options& options, const ClassWeights<Stat>& weights) {
  LossOptions<Stat> result;
  if (weights.true_weights) {
    result.true_weights = weights.true_weights->template const_data_ptr<Stat>();
    result.all_weights = weights.all_weights->template const_data_ptr<Stat>();
    result.sums_of_all_weights = weights.sums.data();
    result.stride_b = weights.true_weights->dim() == 2 ? weights.true_weights->stride(0) : 0;
  }
  if (options.min_loss) result.min_loss = *options.min_loss->const_data_ptr<Stat>();
  if (options.focal_gamma) result.focal_gamma = *options.focal_gamma->const_data_ptr<Stat>();
  result.plain = !weights.true_weights && !options.min_loss && !options.focal_gamma;
  result.pixel_weights = map_of<Stat>(options.pixel_weights);
  return result;
}

int64_t num_classes_of(const Tensor& logits) { return std::max<int64_t>(logits.size(1), 2); }

Labels class_labels(const Tensor& labels, const Tensor& logits, const Options& options) {
  return labels_of("softmax_moments.cpu", labels, num_classes_of(logits), options.ignore_index);
}

template <class T>
void forward(const Tensor& logits, const Tensor& labels, const Options& options,
             const Results& out) {
  using Stat = StatOf<T>;
  const ClassWeights<Stat> weights(options);
  const Layout layout = layout_of(logits);
  const Tiles<Stat> tiles(layout, labels.size(1), labels.size(2), options.align_corners);
  const int64_t num_classes = tiles.num_classes();
  Problem<Stat> problem = tiles.template problem<T>(logits, class_labels(labels, logits, options));
  problem.loss_options = loss_options(options, weights);
  const auto kernels = best_kernels<Stat>();

  // The partials stay below a quarter of the logits.
  const int64_t groups = options.per_image ? layout.batch : 1;
  const int64_t tiles_of_group = tiles.count() / groups;
  const int64_t pixels_of_group = layout.batch / groups * layout.height * layout.width;
  const int64_t splits = std::clamp<int64_t>(std::min(tiles_of_group, pixels_of_group / 128), 1,
                                             ceil_div(ITEMS, groups));
  const int64_t items = groups * splits;
  const std::array<Tensor, LOSS_SUMS> loss_outputs = {out.losses, out.used};
  std::vector<Partials<double>> loss_sums;
  for (const Tensor& output : loss_outputs)
    loss_sums.emplace_back(output.numel() > 0, items, num_classes);
  Partials<double> intersections(out.intersections.numel() > 0, items, num_classes);
  Partials<double> probability_sums(out.probability_sums.numel() > 0, items, num_classes);
  Partials<double> squares(out.squares.numel() > 0, items, num_classes);
  Partials<int64_t> counts(true, items, num_classes);
  Partials<int64_t> correct(out.correct.numel() > 0, items, num_classes);
  Partials<int64_t> labels_out_of_range(true, items, 1);
  const Maps<Stat> maps = {data_or_null<Stat>(out.pixel_losses), data_or_null<Stat>(out.lse)};

  for_items(tiles, items, num_classes, false,
            out.probability_sums.numel() + out.squares.numel() > 0,
            [&](int64_t first, int64_t last, const Workspace<Stat>& workspace) {
              for (int64_t item = first; item < last; ++item) {
                Sums sums = {.loss_sums = {},
                             .intersections = intersections.at(item),
                             .probability_sums = probability_sums.at(item),
                             .squares = squares.at(item),
                             .counts = counts.at(item),
                             .correct = correct.at(item),
                             .labels_out_of_range = labels_out_of_range.at(item)};
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
  intersections.add_up(groups, splits, data_or_null<Stat>(out.intersections));
  probability_sums.add_up(groups, splits, data_or_null<Stat>(out.probability_sums));
  squares.add_up(groups, splits, data_or_null<Stat>(out.squares));
  counts.add_up(groups, splits, out.counts.mutable_data_ptr<int64_t>());
  correct.add_up(groups, splits, data_or_null<int64_t>(out.correct));
  const int64_t* all_counts = out.counts.const_data_ptr<int64_t>();
  *out.divisor.mutable_data_ptr<int64_t>() = std::max<int64_t>(
      std::accumulate(all_counts, all_counts + out.counts.numel(), int64_t{0}), 1);
  if (out.labels_out_of_range.numel())
    labels_out_of_range.add_up(1, items, out.labels_out_of_range.mutable_data_ptr<int64_t>());
}

Results softmax_moments(const Tensor& logits, const Tensor& labels, const Options& options) {
  const int64_t batch = logits.size(0), num_classes = num_classes_of(logits);
  STD_TORCH_CHECK(!options.with_lse || num_classes > 2,
                  "softmax_moments.cpu: two classes need no lse");
  const ScalarType dtype = logits.scalar_type();
  const ScalarType stat = statistics_dtype(dtype);
  const bool empty = labels.numel() == 0;
  const auto by_class = [&](bool requested, ScalarType type) {
    if (!requested) return absent(type);
    std::vector<int64_t> size = {num_classes};
    if (options.per_image) size = {batch, num_classes};
    return empty ? new_zeros(size, type) : new_empty(size, type);
  };
  const auto by_pixel = [&](bool requested) {
    if (!requested) return absent(stat);
    return new_empty({batch, labels.size(1), labels.size(2)}, stat);
  };
  const bool weighted = options.pixel_weights.has_value();
  const Results results = {
      .losses = by_class(true, stat),
      .intersections = by_class(options.probability_sums, stat),
      .probability_sums = by_class(options.probability_sums, stat),
      .squares = by_class(options.squares, stat),
      .pixel_losses = by_pixel(options.pixel_losses),
      .lse = by_pixel(options.with_lse),
      .counts = by_class(true, ScalarType::Long),
      .correct = by_class(options.correct, ScalarType::Long),
      .used = by_class(weighted || options.min_loss, weighted ? stat : ScalarType::Long),
      .divisor = new_empty({}, ScalarType::Long),
      .labels_out_of_range =
          options.labels_out_of_range ? new_zeros({}, ScalarType::Long) : absent(ScalarType::Long)};
  if (empty)
    *results.divisor.mutable_data_ptr<int64_t>() = 1;
  else
    for_dtype("softmax_moments.cpu", dtype,
              [&](auto element) { forward<decltype(element)>(logits, labels, options, results); });
  return results;
}

// The gradients of the results, None if there is none, and lse of the forward pass.
struct ResultGradients {
  std::optional<Tensor> losses, intersections, probability_sums, squares, pixel_losses;
  Tensor lse;
};

// Gradients::dp_scale, of gradients [K] or [B, K].
template <class Stat>
Stat dp_scale(std::initializer_list<const std::optional<Tensor>*> tables) {
  Stat largest = 0;
  for (const std::optional<Tensor>* table : tables)
    for (int64_t i = 0; *table && i < (*table)->numel(); ++i)
      largest = std::max(largest, std::abs((*table)->template const_data_ptr<Stat>()[i]));
  if (!(largest > 0 && std::isfinite(largest))) return 1;
  return std::ldexp(Stat(1), std::clamp(-std::ilogb(largest), -120, 120));
}

template <class T>
void backward(const Tensor& logits, const Tensor& labels, const Options& options, ResultGradients d,
              const Tensor& dlogits) {
  using Stat = StatOf<T>;
  Gradients<Stat> gradients = {};
  std::vector<Stat> equal;  // dlosses [B, K], if one number is given
  const auto by_class = [&](std::optional<Tensor>& table) -> const Stat* {
    if (!table) return nullptr;
    table = torch::stable::contiguous(*table);
    gradients.stride_b = table->dim() == 2 ? table->size(1) : 0;
    return table->template const_data_ptr<Stat>();
  };
  if (d.losses && d.losses->dim() == 0) {
    equal.assign(logits.size(0) * num_classes_of(logits),
                 *d.losses->template const_data_ptr<Stat>());
    gradients.dlosses = equal.data();
  } else {
    gradients.dlosses = by_class(d.losses);
  }
  gradients.dintersections = by_class(d.intersections);
  gradients.dprobability_sums = by_class(d.probability_sums);
  gradients.dsquares = by_class(d.squares);
  gradients.dpixel_losses = map_of<Stat>(d.pixel_losses);
  gradients.dp_scale = dp_scale<Stat>({&d.probability_sums, &d.squares});
  gradients.totals = d.lse.const_data_ptr<Stat>();
  const ClassWeights<Stat> weights(options);
  const Layout layout = layout_of(logits);
  const Tiles<Stat> tiles(layout, labels.size(1), labels.size(2), options.align_corners);
  Problem<Stat> problem = tiles.template problem<T>(logits, class_labels(labels, logits, options));
  problem.loss_options = loss_options(options, weights);
  const Output<Stat> output = output_of<T>(dlogits);
  const auto kernels = best_kernels<Stat>();
  for_items(tiles, tiles.count(), problem.logits.num_classes, tiles.upsampled(), true,
            [&](int64_t first, int64_t last, const Workspace<Stat>& workspace) {
              for (int64_t i = first; i < last; ++i)
                kernels.backward(problem, tiles.tile(i, true), workspace, gradients, output);
            });
}

Tensor softmax_moments_backward(const Tensor& logits, const Tensor& labels,
                                const ResultGradients& d, const Options& options) {
  Tensor dlogits = dense_like(logits);
  if (dlogits.numel() == 0) return dlogits;
  if (labels.numel() == 0) return torch::stable::zero_(dlogits);
  for_dtype("softmax_moments_backward.cpu", logits.scalar_type(), [&](auto element) {
    backward<decltype(element)>(logits, labels, options, d, dlogits);
  });
  return dlogits;
}

// The operators: TORCH_BOX needs one parameter for each argument. The fields of Options, of these
// types, are the last arguments of both. tests/test_csrc.py compares their names with the schema.
template <class... OptionTypes>
struct Operators {
  static auto moments(Tensor logits, Tensor labels, OptionTypes... options) {
    const Results x = softmax_moments(logits, labels, Options{options...});
    return std::make_tuple(x.losses, x.intersections, x.probability_sums, x.squares, x.pixel_losses,
                           x.lse, x.counts, x.correct, x.used, x.divisor, x.labels_out_of_range);
  }

  static Tensor moments_backward(Tensor logits, Tensor labels, Tensor lse,
                                 std::optional<Tensor> dlosses,
                                 std::optional<Tensor> dintersections,
                                 std::optional<Tensor> dprobability_sums,
                                 std::optional<Tensor> dsquares,
                                 std::optional<Tensor> dpixel_losses, OptionTypes... options) {
    const ResultGradients d = {.losses = dlosses,
                               .intersections = dintersections,
                               .probability_sums = dprobability_sums,
                               .squares = dsquares,
                               .pixel_losses = dpixel_losses,
                               .lse = lse};
    return softmax_moments_backward(logits, labels, d, Options{options...});
  }
};
using OptionalTensor = std::optional<Tensor>;
using Boxed = Operators<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                        OptionalTensor, int64_t, bool, bool, bool, bool, bool, bool, bool, bool>;

}  // namespace
}  // namespace anchorops::cpu::softmax

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  using namespace anchorops::cpu::softmax;
  library.impl("softmax_moments.cpu", TORCH_BOX(&Boxed::moments));
  library.impl("softmax_moments_backward.cpu", TORCH_BOX(&Boxed::moments_backward));
}

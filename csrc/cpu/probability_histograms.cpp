// The operators anchorops::probability_histograms.cpu and error_loss_backward.cpu.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <vector>

#include "softmax_tiles.h"

namespace anchorops::cpu::softmax {
namespace {

// Adds counts to the totals, and sets them to zero.
void add_counts(std::vector<int32_t>& counts, std::mutex& mutex, int64_t* totals) {
  const std::lock_guard lock(mutex);
  for (size_t i = 0; i < counts.size(); ++i) totals[i] += counts[i];
  std::fill(counts.begin(), counts.end(), 0);
}

Tensor probability_histograms(Tensor logits, Tensor labels, int64_t bins, int64_t ignore_index,
                              bool align_corners) {
  const int64_t num_classes = logits.size(1);
  Tensor histograms = new_zeros({num_classes, 2, bins}, ScalarType::Long);
  if (labels.numel() == 0) return histograms;
  int64_t* const totals = histograms.mutable_data_ptr<int64_t>();
  for_dtype("probability_histograms.cpu", logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Stat = StatOf<T>;
    const Tiles<Stat> tiles(layout_of(logits), labels.size(1), labels.size(2), align_corners);
    const Problem<Stat> problem = tiles.template problem<T>(
        logits, labels_of("probability_histograms.cpu", labels, num_classes, ignore_index));
    const auto kernels = best_kernels<Stat>();
    std::mutex mutex;
    for_items(tiles, tiles.count(), num_classes, false, false,
              [&](int64_t first, int64_t last, const Workspace<Stat>& workspace) {
                std::vector<int32_t> counts(num_classes * 2 * bins);
                int64_t pixels = 0;  // in counts
                for (int64_t i = first; i < last; ++i) {
                  const Tile tile = tiles.tile(i, false);
                  kernels.count_errors(problem, tile, workspace, {counts.data(), bins});
                  pixels += (tile.label_rows.end - tile.label_rows.begin) *
                            (tile.label_columns.end - tile.label_columns.begin);
                  if (pixels < 1 << 30) continue;
                  add_counts(counts, mutex, totals);
                  pixels = 0;
                }
                add_counts(counts, mutex, totals);
              });
  });
  const auto sum = [&](int64_t row) {
    return std::accumulate(totals + row * bins, totals + (row + 1) * bins, int64_t{0});
  };
  int64_t valid = 0;
  for (int64_t k = 0; k < num_classes; ++k) valid += sum(2 * k);
  for (int64_t k = 0; k < num_classes; ++k)
    totals[(2 * k + 1) * bins] += valid - sum(2 * k) - sum(2 * k + 1);
  return histograms;
}

Tensor error_loss_backward(Tensor logits, Tensor labels, Tensor slopes, int64_t ignore_index,
                           bool align_corners) {
  Tensor dlogits = dense_like(logits);
  if (dlogits.numel() == 0) return dlogits;
  if (labels.numel() == 0) return torch::stable::zero_(dlogits);
  slopes = torch::stable::contiguous(slopes);
  for_dtype("error_loss_backward.cpu", logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Stat = StatOf<T>;
    const int64_t num_classes = logits.size(1);
    const Tiles<Stat> tiles(layout_of(logits), labels.size(1), labels.size(2), align_corners);
    const Problem<Stat> problem = tiles.template problem<T>(
        logits, labels_of("error_loss_backward.cpu", labels, num_classes, ignore_index));
    const Output<Stat> output = output_of<T>(dlogits);
    const auto kernels = best_kernels<Stat>();
    for_items(tiles, tiles.count(), num_classes, tiles.upsampled(), false,
              [&](int64_t first, int64_t last, const Workspace<Stat>& workspace) {
                for (int64_t i = first; i < last; ++i)
                  kernels.error_gradients(problem, tiles.tile(i, true), workspace,
                                          {slopes.const_data_ptr<Stat>(), slopes.size(2)}, output);
              });
  });
  return dlogits;
}

}  // namespace
}  // namespace anchorops::cpu::softmax

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  using namespace anchorops::cpu::softmax;
  library.impl("probability_histograms.cpu", TORCH_BOX(&probability_histograms));
  library.impl("error_loss_backward.cpu", TORCH_BOX(&error_loss_backward));
}

// The vector kernels of softmax moments. To read in the order of the data: labels and logits are
// loaded (softmax_rows.h) and upsampled (upsampling.h), then come exponentials
// (softmax_exponentials.h), losses and their slopes (softmax_losses.h), and the gradients of
// logits (softmax_gradients.h). All of this is used pixel by pixel (softmax_pixels.h), in cells
// (softmax_cells.h, softmax_blocks.h, softmax_cells_*.h) and for two classes
// (softmax_two_classes.h).
#pragma once

#include <cstdint>
#include <type_traits>

#include "probability_histograms_kernel.h"
#include "softmax_cells_argmax.h"
#include "softmax_cells_backward.h"
#include "softmax_cells_forward.h"
#include "softmax_moments.h"
#include "softmax_pixels.h"
#include "softmax_rows.h"
#include "softmax_two_classes.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

template <class Stat>
void forward(const Problem<Stat>& problem, const Tile& tile, const Workspace<Stat>& workspace,
             const Sums& sums, const Maps<Stat>& maps) {
  if constexpr (std::is_same_v<Stat, float>) {
    if (problem.logits.num_classes == 2)
      return forward_two_classes(problem, tile, workspace, sums, maps);
    if (problem.column_cells.begin) return forward_cells(problem, tile, workspace, sums, maps);
  }
  *sums.labels_out_of_range += for_groups(
      problem, tile, workspace, [](int64_t) {},
      [&](const auto& group) { forward_group(problem, tile, workspace, group, sums, maps); });
}

template <class Stat>
void backward(const Problem<Stat>& problem, const Tile& tile, const Workspace<Stat>& workspace,
              const Gradients<Stat>& gradients, const Output<Stat>& output) {
  for_rows_of_gradients(problem, tile, workspace, output, [&](const auto& finish_until) {
    if constexpr (std::is_same_v<Stat, float>) {
      if (problem.logits.num_classes == 2)
        return backward_two_classes(problem, tile, workspace, gradients, output, finish_until);
      if (problem.column_cells.begin)
        return backward_cells(problem, tile, workspace, gradients, finish_until);
    }
    for_groups(problem, tile, workspace, finish_until, [&](const auto& group) {
      backward_group(problem, tile, workspace, gradients, output, group);
    });
  });
}

template <class Stat>
void argmax(const Problem<Stat>& problem, const Tile& tile, const Workspace<Stat>& workspace,
            const Predictions& predictions) {
  if constexpr (std::is_same_v<Stat, float>) {
    if (problem.logits.num_classes == 2)
      return argmax_two_classes(problem, tile, workspace, predictions);
    if (problem.column_cells.begin) return argmax_cells(problem, tile, workspace, predictions);
  }
  for_groups(
      problem, tile, workspace, [](int64_t) {},
      [&](const auto& group) { argmax_group(problem, tile, workspace, group, predictions); });
}

template <class Stat>
Kernels<Stat> kernels() {
  return {forward<Stat>, backward<Stat>, count_errors<Stat>, error_gradients<Stat>, argmax<Stat>};
}

template <class T>
Rows<T> rows() {
  return {pack_row<T>, read_row<T>, finish_row<T>, write_row<T>};
}

template <class Label>
decltype(Labels::read) label_reader() {
  return read_labels<Label>;
}

template decltype(Labels::read) label_reader<uint8_t>();
template decltype(Labels::read) label_reader<int8_t>();
template decltype(Labels::read) label_reader<uint16_t>();
template decltype(Labels::read) label_reader<int16_t>();
template decltype(Labels::read) label_reader<uint32_t>();
template decltype(Labels::read) label_reader<int32_t>();
template decltype(Labels::read) label_reader<uint64_t>();
template decltype(Labels::read) label_reader<int64_t>();
template Kernels<float> kernels();
template Kernels<double> kernels();
template Rows<float> rows();
template Rows<double> rows();
template Rows<BFloat16> rows();
template Rows<Half> rows();

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET

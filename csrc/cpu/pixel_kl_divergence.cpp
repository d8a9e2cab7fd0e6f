// The operators anchorops::pixel_kl_divergence.cpu and its backward: outputs, work items, threads.
#include "pixel_kl_divergence.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "softmax_tiles.h"

namespace anchorops::cpu::softmax {
namespace {

constexpr const char* NAME = "pixel_kl_divergence.cpu";

template <class Stat>
DivergenceKernels<Stat> best_divergence_kernels() {
  return BEST_OF(divergence_kernels<Stat>());
}

// The arguments of both operators.
struct Arguments {
  const Tensor &logits, &teacher_logits;
  const std::optional<Tensor>& valid;
  int64_t height, width;
  const Tensor& temperature;  // []
  bool align_corners;
};

// Calls visit(divergence, index of the tile, tiles) for the tiles of the student's logits.
template <class Stat, class Visit>
void for_tiles(const Arguments& arguments, bool backward, Visit visit) {
  const Layout layout = layout_of(arguments.logits),
               teacher_layout = layout_of(arguments.teacher_logits);
  const Tiles<Stat> tiles(layout, arguments.height, arguments.width, arguments.align_corners);
  const Tiles<Stat> teacher_tiles(teacher_layout, arguments.height, arguments.width,
                                  arguments.align_corners);
  const auto problem_of = [](const Tensor& logits, const Tiles<Stat>& of) {
    Problem<Stat> problem;
    for_dtype(NAME, logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      if constexpr (std::is_same_v<StatOf<T>, Stat>) problem = of.template problem<T>(logits, {});
    });
    return problem;
  };
  const auto tiles_at = [&](int64_t i) -> TwoTiles {
    const Tile tile = tiles.tile(i, backward);
    return {tile, teacher_tiles.tile_of_labels(tile)};
  };
  int64_t labels = 1, teacher_columns = 0;
  for (int64_t i = 0; i < tiles.per_image(); ++i) {
    const auto [student, teacher] = tiles_at(i);
    labels = std::max(labels, student.label_columns.end - student.label_columns.begin);
    teacher_columns = std::max(teacher_columns, teacher.columns.end - teacher.columns.begin);
  }
  // six rows of a chunk, of all classes, fit into half of a cache of 1 MiB
  const int64_t most = std::clamp<int64_t>((1 << 14) / layout.dim, 16, 512);
  const int64_t chunks = ceil_div(labels, most);
  const auto run = [&](int64_t first, int64_t last, const Workspace<Stat>& workspace) {
    Divergence<Stat> divergence = {};
    divergence.student = {problem_of(arguments.logits, tiles), workspace.packed,
                          workspace.differences.columns};
    divergence.teacher = {problem_of(arguments.teacher_logits, teacher_tiles)};
    divergence.packed_gradients = workspace.gradients;
    divergence.chunk = ceil_div(ceil_div(labels, chunks), 16) * 16;
    divergence.line = divergence.chunk + 16;
    divergence.valid = map_of<bool>(arguments.valid);
    divergence.temperature = *arguments.temperature.const_data_ptr<Stat>();
    const ThreadMemory memory([&](ThreadMemory& parts) {
      divergence.take(parts, layout.dim, padded(teacher_columns + 2), backward);
    });
    for (int64_t i = first; i < last; ++i) visit(divergence, i, tiles_at(i));
  };
  for_items(tiles, tiles.count(), layout.dim, backward, false, run);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pixel_kl_divergence(
    Tensor logits, Tensor teacher_logits, std::optional<Tensor> valid, int64_t height,
    int64_t width, Tensor temperature, bool align_corners, bool with_divergences, bool with_lse) {
  const ScalarType dtype = logits.scalar_type();
  const ScalarType stat = statistics_dtype(dtype);
  const auto by_pixel = [&](bool requested) {
    std::vector<int64_t> size = {0};
    if (requested) size = {logits.size(0), height, width};
    return new_empty(size, stat);
  };
  const Tensor total = new_zeros({}, stat);
  const Tensor divergences = by_pixel(with_divergences);
  const Tensor totals = by_pixel(with_lse), teacher_totals = by_pixel(with_lse);
  const auto run = [&](auto of) {
    using Stat = decltype(of);
    const DivergenceMaps<Stat> maps = {data_or_null<Stat>(divergences), data_or_null<Stat>(totals),
                                       data_or_null<Stat>(teacher_totals)};
    const auto kernels = best_divergence_kernels<Stat>();
    std::vector<double> sums;
    const Arguments arguments = {logits, teacher_logits, valid,        height,
                                 width,  temperature,    align_corners};
    sums.resize(Tiles<Stat>(layout_of(logits), height, width, align_corners).count());
    for_tiles<Stat>(arguments, false,
                    [&](const Divergence<Stat>& divergence, int64_t i, const TwoTiles& tiles) {
                      sums[i] = kernels.forward(divergence, tiles, maps);
                    });
    double sum = 0;
    for (const double part : sums) sum += part;
    *total.mutable_data_ptr<Stat>() = static_cast<Stat>(sum);
  };
  if (logits.size(0) * height * width > 0)
    dtype == ScalarType::Double ? run(double{}) : run(float{});
  return {total, divergences, totals, teacher_totals};
}

Tensor pixel_kl_divergence_backward(Tensor logits, Tensor teacher_logits,
                                    std::optional<Tensor> valid, Tensor lse, Tensor teacher_lse,
                                    std::optional<Tensor> dtotal,
                                    std::optional<Tensor> ddivergences, Tensor temperature,
                                    bool align_corners) {
  Tensor dlogits = dense_like(logits);
  if (dlogits.numel() == 0) return dlogits;
  if (lse.numel() == 0) return torch::stable::zero_(dlogits);
  for_dtype(NAME, logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Stat = StatOf<T>;
    const DivergenceGradients<Stat> gradients = {
        dtotal ? *dtotal->template const_data_ptr<Stat>() : Stat(0), map_of<Stat>(ddivergences),
        lse.const_data_ptr<Stat>(), teacher_lse.const_data_ptr<Stat>()};
    const Output<Stat> output = output_of<T>(dlogits);
    const auto kernels = best_divergence_kernels<Stat>();
    const Arguments arguments = {logits,      teacher_logits, valid,        lse.size(1),
                                 lse.size(2), temperature,    align_corners};
    for_tiles<Stat>(arguments, true,
                    [&](const Divergence<Stat>& divergence, int64_t, const TwoTiles& tiles) {
                      kernels.backward(divergence, tiles, gradients, output);
                    });
  });
  return dlogits;
}

}  // namespace
}  // namespace anchorops::cpu::softmax

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  using namespace anchorops::cpu::softmax;
  library.impl("pixel_kl_divergence.cpu", TORCH_BOX(&pixel_kl_divergence));
  library.impl("pixel_kl_divergence_backward.cpu", TORCH_BOX(&pixel_kl_divergence_backward));
}

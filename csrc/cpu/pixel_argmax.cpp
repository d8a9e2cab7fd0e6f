// The operator anchorops::pixel_argmax.cpu.
#include <torch/csrc/stable/library.h>

#include "softmax_tiles.h"

namespace anchorops::cpu::softmax {
namespace {

Tensor pixel_argmax(Tensor logits, int64_t height, int64_t width, bool align_corners,
                    ScalarType dtype) {
  Tensor predictions = new_empty({logits.size(0), height, width}, dtype);
  if (predictions.numel() == 0) return predictions;
  const int64_t element_size = predictions.element_size();
  for_dtype("pixel_argmax.cpu", logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Stat = StatOf<T>;
    const Layout layout = layout_of(logits);
    const Tiles<Stat> tiles(layout, height, width, align_corners);
    const Problem<Stat> problem = tiles.template problem<T>(logits, {});
    const auto kernels = best_kernels<Stat>();
    for_items(tiles, tiles.count(), tiles.num_classes(), false, false,
              [&](int64_t first, int64_t last, const Workspace<Stat>& workspace) {
                for (int64_t i = first; i < last; ++i)
                  kernels.argmax(problem, tiles.tile(i, false), workspace,
                                 {predictions.mutable_data_ptr(), element_size});
              });
  });
  return predictions;
}

}  // namespace
}  // namespace anchorops::cpu::softmax

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  library.impl("pixel_argmax.cpu", TORCH_BOX(&anchorops::cpu::softmax::pixel_argmax));
}

// The operator anchorops::softmax_moments_backward.cuda: the gradient of softmax moments.
//
// Launches: the shifts of positions (upsampled_logits/shifts.cu), and the gradient (dlogits.cu). If
// statistics other than the losses by class have gradients, also the slopes of pixels (slopes.cu).
// Memory in addition to the gradient: shifts, 8 bytes a position; slopes and label terms, 8 bytes a
// pixel.
#include <cstdint>
#include <optional>
#include <vector>

#include "../../softmax_flags.h"
#include "gradients.cuh"

namespace anchorops::cuda {
namespace {

Tensor softmax_moments_backward(Tensor logits, Tensor labels, Tensor lse,
                                std::optional<Tensor> dlosses, std::optional<Tensor> doverlaps,
                                std::optional<Tensor> dmasses, std::optional<Tensor> dsquares,
                                std::optional<Tensor> dpixel_losses, std::vector<double>,
                                int64_t ignore_index, int64_t flags) {
  const char* name = "softmax_moments_backward.cuda";
  const OnDevice device(logits);
  const Stream stream = device.stream;
  Tensor dlogits = torch::stable::empty_like(logits);
  if (dlogits.numel() == 0) return dlogits;
  const int64_t batch = logits.size(0), height = labels.size(1), width = labels.size(2);
  bool by_image = false;
  for (const auto* table : {&dlosses, &doverlaps, &dmasses, &dsquares})
    by_image |= *table && (*table)->dim() == 2;
  const std::vector<int64_t> table_shape =
      by_image ? std::vector{batch, logits.size(1)} : std::vector{logits.size(1)};
  // If rows are not contiguous, or one row is expanded to all, they are copied: B×K.
  const auto prepare = [&](const char* argument, std::optional<Tensor>& table) {
    check_shape(name, argument, table, table_shape);
    if (table) table = torch::stable::contiguous(*table);
  };
  prepare("dlosses", dlosses);
  prepare("doverlaps", doverlaps);
  prepare("dmasses", dmasses);
  prepare("dsquares", dsquares);
  const std::vector<int64_t> pixels = {batch, height, width};
  check_shape(name, "labels", labels, pixels);
  check_shape(name, "lse", lse, pixels);
  check_shape(name, "dpixel_losses", dpixel_losses, pixels);
  const auto map = [](const std::optional<Tensor>& map) {
    if (!map) return PixelGradient{};
    return PixelGradient{map->const_data_ptr<float>(), map->stride(0), map->stride(1),
                         map->stride(2)};
  };
  const Gradients gradients{optional_data<float>(dlosses),
                            optional_data<float>(doverlaps),
                            optional_data<float>(dmasses),
                            optional_data<float>(dsquares),
                            map(dpixel_losses),
                            by_image};
  lse = torch::stable::contiguous(lse);

  Cells cells = cells_of(name, logits, height, width, flags & ALIGN_CORNERS);
  const PixelLabels pixel_labels = labels_of(name, labels, logits.size(1), ignore_index);
  const Tensor shifts = new_shifts(logits, cells, stream);
  PixelMaps maps{.lse = lse.const_data_ptr<float>()};
  std::optional<Tensor> terms;  // slopes and label terms
  if (!gradients.only_losses()) {
    terms = new_empty(logits, {2, batch, height, width}, ScalarType::Float);
    float* slopes = terms->mutable_data_ptr<float>();
    float* label_terms = slopes + batch * height * width;
    write_slopes(cells, pixel_labels, gradients, maps.lse, slopes, label_terms, stream);
    maps.slopes = slopes;
    maps.label_terms = label_terms;
  }
  write_dlogits(cells, pixel_labels, gradients, maps, logits_of(name, dlogits), stream);
  return dlogits;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("softmax_moments_backward.cuda",
               TORCH_BOX(&anchorops::cuda::softmax_moments_backward));
}

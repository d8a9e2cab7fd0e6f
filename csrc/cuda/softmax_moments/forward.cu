// The operator anchorops::softmax_moments.cuda: statistics of the softmax of upsampled logits.
//
// Launches: the shifts of positions (upsampled_logits/shifts.cu), lse and losses (losses.cu), and
// the sum of their partials (partials.cu). With masses or squares: another pass over the logits
// (masses.cu), and a sum. With hits: pixel_argmax.cu, and a count. Memory in addition to the
// results: lse, 4 bytes a pixel; shifts, 8 bytes a position; partials, 8·K bytes for each block, or
// 12·K with masses, but at most 4 bytes for 64 logits or 256 KiB for each multiprocessor, whichever
// is more. (A launch has at least one block for each 32 columns of cells, which small images may
// exceed.)
//
// In a pass over the logits a thread has 16 sums and the four corners of a cell in registers. A
// block of 8 warps has 8 rows of 32 cells, and 42 KB of shared memory. Registers permit 16 warps on
// a multiprocessor. `make cuda-report` prints the instructions for each cell and class.
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "../labels/class_keys.cuh"
#include "../predictions/pixel_argmax.cuh"
#include "../../softmax_flags.h"
#include "statistics.cuh"

namespace anchorops::cuda {
namespace {

float* data_or_null(const Tensor& tensor) {
  return tensor.numel() ? tensor.mutable_data_ptr<float>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> softmax_moments(
    Tensor logits, Tensor labels, std::vector<double>, int64_t ignore_index, int64_t flags) {
  const char* name = "softmax_moments.cuda";
  const bool align_corners = flags & ALIGN_CORNERS, per_image = flags & PER_IMAGE;
  const bool with_masses = flags & WITH_MASSES, with_squares = flags & WITH_SQUARES;
  const bool with_hits = flags & WITH_HITS;
  const OnDevice device(logits);
  const Stream stream = device.stream;
  const int64_t batch = logits.size(0), height = labels.size(1), width = labels.size(2);
  const int num_classes = static_cast<int>(logits.size(1));
  check_shape(name, "labels", labels, {batch, height, width});
  const auto by_class = [&](bool wanted, ScalarType dtype) {
    return new_empty(logits,
                     !wanted     ? std::vector<int64_t>{0}
                     : per_image ? std::vector<int64_t>{batch, num_classes}
                                 : std::vector<int64_t>{num_classes},
                     dtype);
  };
  const auto by_pixel = [&](bool wanted, ScalarType dtype) {
    return new_empty(logits,
                     wanted ? std::vector<int64_t>{batch, height, width} : std::vector<int64_t>{0},
                     dtype);
  };
  const Tensor losses = by_class(true, ScalarType::Float);
  const Tensor overlaps = by_class(with_masses, ScalarType::Float);
  const Tensor masses = by_class(with_masses, ScalarType::Float);
  const Tensor squares = by_class(with_squares, ScalarType::Float);
  const Tensor pixel_losses = by_pixel(flags & WITH_PIXEL_LOSSES, ScalarType::Float);
  const Tensor lse = by_pixel(true, ScalarType::Float);
  const Tensor counts = by_class(true, ScalarType::Long);
  Tensor hits = by_class(with_hits, ScalarType::Long);
  const auto result = [&] {
    const Tensor wanted_lse = flags & WITH_LSE ? lse : by_pixel(false, ScalarType::Float);
    return std::tuple{losses, overlaps, masses, squares, pixel_losses, wanted_lse, counts, hits};
  };
  if (lse.numel() == 0) {
    for (const Tensor* each : {&losses, &overlaps, &masses, &squares})
      fill_zero(each->mutable_data_ptr<float>(), each->numel() * sizeof(float), stream);
    for (const Tensor* each : std::initializer_list<const Tensor*>{&counts, &hits})
      fill_zero(each->mutable_data_ptr<int64_t>(), each->numel() * sizeof(int64_t), stream);
    return result();
  }

  Cells cells = cells_of(name, logits, height, width, align_corners, per_image);
  const PixelLabels pixel_labels = labels_of(name, labels, num_classes, ignore_index);
  const Tensor shifts = new_shifts(logits, cells, stream);
  write_losses(
      logits, cells, pixel_labels, {lse.mutable_data_ptr<float>(), data_or_null(pixel_losses)},
      {{data_or_null(losses), data_or_null(overlaps)}, counts.mutable_data_ptr<int64_t>()}, stream);
  if (with_masses || with_squares) {
    // If only squares are requested, the masses are written to a tensor that is not used.
    const Tensor unread = by_class(with_squares && !with_masses, ScalarType::Float);
    write_masses(logits, cells, pixel_labels, lse.const_data_ptr<float>(),
                 {{data_or_null(with_masses ? masses : unread), data_or_null(squares)}, nullptr},
                 stream);
  }
  if (with_hits) {
    const Tensor hit_classes = by_pixel(true, ScalarType::Int);
    write_hits(cells, pixel_labels, hit_classes.mutable_data_ptr<int32_t>(), stream);
    hits = std::get<1>(class_keys(hit_classes, height, width, num_classes, per_image, -1));
  }
  return result();
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("softmax_moments.cuda", TORCH_BOX(&anchorops::cuda::softmax_moments));
}

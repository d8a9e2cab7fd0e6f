// The operator anchorops::confusion.cpu: the number of pixels for each true and predicted class.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../labels.h"
#include "operators.h"

namespace anchorops::cpu {
namespace {

// One to three axes as three.
struct Strides {
  int64_t of[3] = {0, 0, 0};

  explicit Strides(const Tensor& x) {
    for (int64_t i = 0; i < x.dim(); ++i) of[3 - x.dim() + i] = x.stride(i);
  }
};

template <class Label>
void count(const Tensor& predictions, const Tensor& labels, int64_t num_classes,
           int64_t ignore_index, int64_t* matrix) {
  const Label* truth = labels.const_data_ptr<Label>();
  const int64_t* predicted = predictions.const_data_ptr<int64_t>();
  const Strides stride(labels), predicted_stride(predictions);
  const int64_t width = labels.size(labels.dim() - 1);
  const int64_t height = labels.dim() > 1 ? labels.size(labels.dim() - 2) : 1;
  const int64_t cells = num_classes * num_classes, pixels = labels.numel();
  torch::stable::parallel_for(0, pixels, 1 << 16, [&](int64_t begin, int64_t end) {
    // A thread has its own matrix if this is small, or smaller than the pixels that it counts.
    const bool local = cells <= std::max<int64_t>(1 << 16, end - begin);
    std::vector<int64_t> counts(local ? cells : 0);
    for (int64_t p = begin; p < end;) {
      const int64_t b = p / (width * height), y = p / width % height;
      const Label* label_row = truth + b * stride.of[0] + y * stride.of[1];
      const int64_t* prediction_row =
          predicted + b * predicted_stride.of[0] + y * predicted_stride.of[1];
      for (int64_t x = p % width; x < width && p < end; ++x, ++p) {
        const auto i = static_cast<int64_t>(label_row[x * stride.of[2]]);
        const int64_t j = prediction_row[x * predicted_stride.of[2]];
        if (i < 0 || i >= num_classes || i == ignore_index || j < 0 || j >= num_classes) continue;
        if (local)
          ++counts[i * num_classes + j];
        else
          __atomic_fetch_add(&matrix[i * num_classes + j], 1, __ATOMIC_RELAXED);
      }
    }
    if (!local) return;
    for (int64_t i = 0; i < cells; ++i)
      if (counts[i] > 0) __atomic_fetch_add(&matrix[i], counts[i], __ATOMIC_RELAXED);
  });
}

Tensor confusion(Tensor predictions, Tensor labels, int64_t num_classes, int64_t ignore_index) {
  const std::vector<int64_t> shape = {num_classes, num_classes};
  Tensor matrix = new_zeros(shape, ScalarType::Long);
  if (labels.numel() == 0) return matrix;
  for_label_dtype("confusion.cpu", labels.scalar_type(), [&](auto label) {
    count<decltype(label)>(predictions, labels, num_classes, ignore_index,
                           matrix.mutable_data_ptr<int64_t>());
  });
  return matrix;
}

}  // namespace
}  // namespace anchorops::cpu

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  library.impl("confusion.cpu", TORCH_BOX(&anchorops::cpu::confusion));
}

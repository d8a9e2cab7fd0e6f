// The operator anchorops::class_keys.cpu: labels of any size and integer type -> one key per pixel.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "../labels.h"
#include "operators.h"

namespace anchorops::cpu {
namespace {

// The label's row (or column) for each row of the features, as in F.interpolate's "nearest":
// floor(i * scale), with the scale and the product in float32.
class NearestOffset {
 public:
  NearestOffset(int64_t size, int64_t source, int64_t stride)
      : same_(size == source),
        last_(source - 1),
        stride_(stride),
        scale_(size ? static_cast<float>(source) / static_cast<float>(size) : 0) {}

  int64_t operator()(int64_t i) const {
    if (same_) return i * stride_;
    const auto nearest = static_cast<int64_t>(std::floor(static_cast<float>(i) * scale_));
    return std::min(nearest, last_) * stride_;
  }

 private:
  bool same_;
  int64_t last_, stride_;
  float scale_;
};

template <class Label, class Key>
void write_keys(const Tensor& labels, int64_t height, int64_t width, int64_t num_classes,
                bool per_image, int64_t image_keys, int64_t ignore_index, Key* keys,
                int64_t* counts) {
  const Label* data = labels.const_data_ptr<Label>();
  const NearestOffset row_offset(height, labels.size(1), labels.stride(1));
  const NearestOffset column_offset(width, labels.size(2), labels.stride(2));
  const int64_t pixels = labels.size(0) * height * width;
  std::mutex mutex;
  torch::stable::parallel_for(0, pixels, 1 << 15, [&](int64_t begin, int64_t end) {
    const int64_t first_image = begin / (height * width);
    const int64_t last_image = (end - 1) / (height * width);
    std::vector<int64_t> local((per_image ? last_image - first_image + 1 : 1) * num_classes);
    for (int64_t p = begin; p < end;) {
      const int64_t image = p / (height * width), row = p / width % height;
      const Label* line = data + image * labels.stride(0) + row_offset(row);
      int64_t* count = local.data() + (per_image ? (image - first_image) * num_classes : 0);
      for (int64_t column = p % width; column < width && p < end; ++column, ++p) {
        const auto label = static_cast<int64_t>(line[column_offset(column)]);
        const bool valid = label >= 0 && label < num_classes && label != ignore_index;
        keys[p] = valid ? static_cast<Key>(image * image_keys + label) : static_cast<Key>(-1);
        if (valid) ++count[label];
      }
    }
    const std::lock_guard lock(mutex);
    int64_t* total = counts + (per_image ? first_image * num_classes : 0);
    for (size_t i = 0; i < local.size(); ++i) total[i] += local[i];
  });
}

std::tuple<Tensor, Tensor> class_keys(Tensor labels, int64_t height, int64_t width,
                                      int64_t num_classes, bool per_image, int64_t ignore_index,
                                      std::optional<ScalarType> class_dtype) {
  const int64_t batch = labels.size(0);
  const std::vector<int64_t> shape =
      per_image ? std::vector<int64_t>{batch, num_classes} : std::vector<int64_t>{num_classes};
  Tensor keys = new_empty({batch, height * width}, class_dtype.value_or(ScalarType::Int));
  const int64_t image_keys = per_image && !class_dtype ? num_classes : 0;
  Tensor counts = new_zeros(shape, ScalarType::Long);
  if (keys.numel() == 0) return {keys, counts};
  for_label_dtype("class_keys.cpu", labels.scalar_type(), [&](auto label) {
    for_key_dtype("class_keys.cpu", keys.scalar_type(), [&](auto key) {
      write_keys<decltype(label)>(labels, height, width, num_classes, per_image, image_keys,
                                  ignore_index, keys.mutable_data_ptr<decltype(key)>(),
                                  counts.mutable_data_ptr<int64_t>());
    });
  });
  return {keys, counts};
}

}  // namespace
}  // namespace anchorops::cpu

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  library.impl("class_keys.cpu", TORCH_BOX(&anchorops::cpu::class_keys));
}

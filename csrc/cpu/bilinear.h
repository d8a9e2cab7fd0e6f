// Between which logits each label lies, as F.interpolate's "bilinear". Not for vector kernels:
// their compilers would fuse the products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "softmax_moments.h"

namespace anchorops::cpu::softmax {

template <class Stat>
class Bilinear {
 public:
  Bilinear(int64_t size, int64_t source, bool align_corners) : size_(size), source_(source) {
    if (size == source) return;
    lower_.resize(size);
    weight_.resize(size);
    const double exact = align_corners ? double(source - 1) / double(std::max<int64_t>(size - 1, 1))
                                       : double(source) / double(std::max<int64_t>(size, 1));
    const Stat ratio = static_cast<Stat>(exact);
    for (int64_t i = 0; i < size; ++i) {
      Stat at = static_cast<Stat>(i);
      if (align_corners) {
        at *= ratio;
      } else {
        const volatile Stat product = (at + Stat(0.5)) * ratio;  // rounded: no fused subtraction
        at = std::max(product - Stat(0.5), Stat(0));
      }
      const Stat lower = std::min(std::floor(at), static_cast<Stat>(source - 1));
      lower_[i] = static_cast<int32_t>(lower);
      weight_[i] = std::min(at - lower, Stat(1));
    }
  }

  Axis<Stat> axis() const {
    const bool same = size_ == source_;
    return {size_, source_, same ? nullptr : lower_.data(), same ? nullptr : weight_.data()};
  }

  // The labels whose lower logit is in that range.
  Range labels(Range logits) const { return {first(logits.begin), first(logits.end)}; }

 private:
  int64_t first(int64_t logit) const {
    if (size_ == source_) return std::clamp<int64_t>(logit, 0, size_);
    return std::lower_bound(lower_.begin(), lower_.end(), logit) - lower_.begin();
  }

  int64_t size_, source_;
  std::vector<int32_t> lower_;
  std::vector<Stat> weight_;
};

}  // namespace anchorops::cpu::softmax

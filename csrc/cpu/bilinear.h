// The logits around each label of an axis and their weights, as in F.interpolate's "bilinear".
// Vector kernels read the results (upsampling.h), but do not compute them: there the compiler would
// fuse the products.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "types.h"

namespace anchorops::cpu {

// z at label i of an axis is (1 - weight[i]) * logit[lower[i]] + weight[i] * logit[lower[i] + 1],
// where the last logit is its own neighbour. The pointers are null if label i is logit i.
template <class Stat>
struct Axis {
  int64_t size, source;  // numbers of labels and of logits
  const int32_t* lower;
  const Stat* weight;
};

// Label i of an axis. The last logit is its own neighbour.
template <class Stat>
struct Position {
  int64_t lower, upper;
  Stat weight;
};

template <class Stat>
Position<Stat> position(const Axis<Stat>& axis, int64_t i) {
  if (!axis.lower) return {i, i, 0};
  const int64_t lower = axis.lower[i];
  return {lower, std::min(lower + 1, axis.source - 1), axis.weight[i]};
}

// Cell c of an axis lies between logits c and c + 1, where logit -1 is logit 0 and the one after
// the last is the last. Its labels are begin[c + 1] to begin[c + 2] - 1, from cell -1 on.
struct Cells {
  const int32_t* begin;  // [source + 2]; null if labels are not at least twice as dense
  int64_t most;          // labels of the largest cell
  float step;            // the weight of a label minus that of the label before it
};

template <class Stat>
class Bilinear {
 public:
  Bilinear(int64_t size, int64_t source, bool align_corners) : size_(size), source_(source) {
    if (size == source) return;
    // label + 1/2 must be exact
    STD_TORCH_CHECK(std::max(size, source) <= int64_t{1} << (std::numeric_limits<Stat>::digits - 1),
                    "upsampling in float32: expected axes of at most 2^23 logits and labels, got ",
                    source, " and ", size);
    lower_.resize(size);
    weight_.resize(size);
    const double exact = align_corners ? double(source - 1) / double(std::max<int64_t>(size - 1, 1))
                                       : double(source) / double(std::max<int64_t>(size, 1));
    const Stat ratio = static_cast<Stat>(exact);
    const Stat half = align_corners ? Stat(0) : Stat(0.5);
    for (int64_t i = 0; i < size; ++i) {
      const volatile Stat product = (static_cast<Stat>(i) + half) * ratio;  // rounded, never fused
      if (product < half) before_ = i + 1;
      const Stat at = std::max(product - half, Stat(0));
      const Stat lower = std::min(std::floor(at), static_cast<Stat>(source - 1));
      lower_[i] = static_cast<int32_t>(lower);
      weight_[i] = std::min(at - lower, Stat(1));
    }
    if (size < 2 * source) return;
    step_ = static_cast<float>(exact);
    cells_ = {0, before_};
    for (int64_t cell = 0; cell < source; ++cell) {
      cells_.push_back(static_cast<int32_t>(first(cell + 1)));
      most_ = std::max<int64_t>(most_, cells_[cell + 2] - cells_[cell + 1]);
    }
    most_ = std::max<int64_t>(most_, before_);
  }

  Axis<Stat> axis() const {
    const bool same = size_ == source_;
    return {size_, source_, same ? nullptr : lower_.data(), same ? nullptr : weight_.data()};
  }

  Cells cells() const { return {cells_.empty() ? nullptr : cells_.data(), most_, step_}; }

  // The labels whose lower logit is in this range.
  Range labels(Range logits) const { return {first(logits.begin), first(logits.end)}; }

 private:
  int64_t first(int64_t logit) const {
    if (size_ == source_) return std::clamp<int64_t>(logit, 0, size_);
    return std::lower_bound(lower_.begin(), lower_.end(), logit) - lower_.begin();
  }

  int64_t size_, source_;
  std::vector<int32_t> lower_;
  std::vector<Stat> weight_;
  int32_t before_ = 0;  // labels before the first logit
  std::vector<int32_t> cells_;
  int64_t most_ = 0;
  float step_ = 0;
};

}  // namespace anchorops::cpu

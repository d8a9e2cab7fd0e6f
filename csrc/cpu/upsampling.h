// Bilinear upsampling: the columns of logits that each label reads, and weighted means along a row
// and of two rows. The positions and weights are those of bilinear.h.
//
// Both directions commute. If many rows of labels are between two rows of logits, it is cheaper to
// upsample each of the two along the row first, and then take the mean for each row of labels. If
// few are, it is cheaper to take the mean of the short rows of logits first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bilinear.h"
#include "softmax_moments.h"
#include "softmax_vectors.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

// (1 - weight) * low + weight * high; with weight 0, high is not used.
template <class Vec>
ALWAYS_INLINE Vec between(Vec low, Vec high, Vec weight) {
  return weight == 0 ? low : (1 - weight) * low + weight * high;
}

// The same of two lines: whole vectors from `first` until `end` is reached.
template <class Stat>
ALWAYS_INLINE void between_lines(const Stat* low, const Stat* high, Stat weight, int64_t first,
                                 int64_t end, Stat* line) {
  using V = Simd<Stat>;
  for (int64_t j = first; j < end; j += LANES<Stat>)
    V::store(line + j, between(V::load(low + j), V::load(high + j), VecOf<Stat>{} + weight));
}

// Neighbouring labels of a row, between the columns of packed rows.
template <class Stat>
class LabelColumns {
  static constexpr int L = LANES<Stat>;

 public:
  explicit LabelColumns(const ColumnMemory<Stat>& memory) : columns_(memory) {}

  // Column j of packed rows is logit `first` + j.
  void start(const Axis<Stat>& axis, int64_t first, Range labels) {
    count_ = labels.end - labels.begin;
    for (int64_t t = 0; t < (count_ + L - 1) / L * L; ++t) {
      const auto at = position(axis, labels.begin + std::min(t, count_ - 1));
      columns_.lower[t] = static_cast<int32_t>(at.lower - first);
      columns_.weight[t] = at.weight;
    }
    near_ = true;
    for (int64_t t = 0; t < count_; t += L)
      near_ = near_ && columns_.lower[t + L - 1] - columns_.lower[t] < L;
  }

  int64_t count() const { return count_; }

  // The packed columns that the labels read.
  Range packed() const { return {columns_.lower[0], columns_.lower[count_ - 1] + 2}; }

  // line: the values at the labels' columns.
  void upsample(const Stat* packed, Stat* line) const {
    return near_ ? upsample<true>(packed, line) : upsample<false>(packed, line);
  }

 private:
  template <bool NEAR>
  void upsample(const Stat* packed, Stat* line) const {
    for (int64_t t = 0; t < count_; t += L) {
      const auto left = look_up<NEAR>(packed, columns_.lower + t);
      const auto right = look_up<NEAR>(packed + 1, columns_.lower + t);
      Simd<Stat>::store(line + t, between(left, right, Simd<Stat>::load(columns_.weight + t)));
    }
  }

  ColumnMemory<Stat> columns_;
  int64_t count_ = 0;
  bool near_ = false;  // the packed columns of any vector of labels are in one vector
};

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET

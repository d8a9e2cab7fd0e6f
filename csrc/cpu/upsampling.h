// Bilinear upsampling: the columns of logits that each label reads, weighted means along a row and
// of two rows, and the transpose, which adds up gradients. The positions and weights are those of
// bilinear.h.
//
// Both directions commute. If many rows of labels are between two rows of logits, it is cheaper to
// upsample each of the two along the row first, and then take the mean for each row of labels. If
// few are, it is cheaper to take the mean of the short rows of logits first.
#pragma once

#include "softmax_vectors.h"

template <class Stat>
struct Position {
  int64_t lower, upper;
  Stat weight;
};

template <class Stat>
ALWAYS_INLINE Position<Stat> position(const Axis<Stat>& axis, int64_t i) {
  if (!axis.lower) return {i, i, 0};
  const int64_t lower = axis.lower[i];
  return {lower, std::min(lower + 1, axis.source - 1), axis.weight[i]};
}

// (1 - weight) * low + weight * high; with weight 0, high is not used.
template <class Vec>
ALWAYS_INLINE Vec blend(Vec low, Vec high, Vec weight) {
  return weight == 0 ? low : (1 - weight) * low + weight * high;
}

// blend of two lines: whole vectors from `first` until `end` is reached.
template <class Stat>
ALWAYS_INLINE void blend_lines(const Stat* low, const Stat* high, Stat weight, int64_t first,
                               int64_t end, Stat* line) {
  using V = Simd<Stat>;
  for (int64_t j = first; j < end; j += LANES<Stat>)
    V::store(line + j, blend(V::load(low + j), V::load(high + j), VecOf<Stat>{} + weight));
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
      Simd<Stat>::store(line + t, blend(left, right, Simd<Stat>::load(columns_.weight + t)));
    }
  }

  ColumnMemory<Stat> columns_;
  int64_t count_ = 0;
  bool near_ = false;  // the packed columns of any vector of labels are in one vector
};

// The transpose of LabelColumns::upsample, with the same memory: it adds up the gradients at the
// labels' columns, which the caller keeps for two rows of logits.
template <class Stat>
class GradientLines {
  using Vec = VecOf<Stat>;
  static constexpr int L = LANES<Stat>;

 public:
  explicit GradientLines(const ColumnMemory<Stat>& memory) : columns_(memory) {}

  // The gradients of this row are added to, at the columns of one label or more.
  void use(int64_t row, int64_t labels) {
    if (count_ == 0) find_slots(labels);
    rows_[row] = row;
  }

  // Calls visit(row) for the rows in use that are before this one.
  template <class Visit>
  void finish_until(int64_t row, Visit visit) {
    for (int64_t& kept_row : rows_.values)
      if (kept_row >= 0 && kept_row < row) {
        visit(kept_row);
        kept_row = -1;
      }
  }

  // Afterwards the columns are others.
  void clear() { count_ = 0; }

  // For each vector of packed columns, calls add(the first one, its sums over the labels of
  // `line`).
  template <class Add>
  void for_sums(const Stat* line, Add add) const {
    Vec right_before = {};
    for (int64_t j = 0; j < stride_; j += L) {
      Vec left = {}, right = {};  // the sums of columns j to j + L - 1, and of those at their right
      for (int64_t i = j; i < count_; i += stride_) {
        const Vec dz = look_up<false>(line, columns_.slots + i);
        const Vec weight = Simd<Stat>::load(columns_.slot_weights + i);
        left += (1 - weight) * dz;
        right += weight == 0 ? Vec{} : weight * dz;
      }
      add(first_ + j, left + Simd<Stat>::shift_up(right_before, right));
      right_before = right;
    }
  }

 private:
  // The labels at the right of each packed column: the n-th one of column first_ + j is slots[n *
  // stride_ + j], -1 if there is none.
  void find_slots(int64_t labels) {
    const int32_t* lower = columns_.lower;
    first_ = lower[0];
    stride_ = (lower[labels - 1] + 2 - first_ + L - 1) / L * L;
    for (int64_t t = 0, n = 0; t < labels; ++t) {
      n = t > 0 && lower[t] == lower[t - 1] ? n + 1 : 0;
      for (; count_ < (n + 1) * stride_; ++count_) {
        columns_.slots[count_] = -1;
        columns_.slot_weights[count_] = 0;
      }
      const int64_t slot = n * stride_ + lower[t] - first_;
      columns_.slots[slot] = static_cast<int32_t>(t);
      columns_.slot_weights[slot] = columns_.weight[t];
    }
  }

  ColumnMemory<Stat> columns_;
  TwoRows<int64_t> rows_ = {-1, -1};
  int64_t first_ = 0, stride_ = 0, count_ = 0;
};

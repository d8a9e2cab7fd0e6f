// Upsampling in two steps, which are few operations if many rows of labels are between two rows of
// logits: packed rows along the row, to the columns of the labels; then, for each row of labels,
// the weighted mean of two lines of neighbours in memory. The transpose adds the gradients of such
// lines first, then sums each along the row.

// The first step. Column j of packed rows is logit `first` + j.
template <class Stat>
class UpsampledLines {
  static constexpr int L = LANES<Stat>;

 public:
  explicit UpsampledLines(const LabelColumns<Stat>& columns) : columns_(columns) {}

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

  LabelColumns<Stat> columns_;
  int64_t count_ = 0;
  bool near_ = false;
};

// The transpose, for the columns of UpsampledLines::start: the gradients of two rows of logits, at
// the labels' columns. The caller keeps them, by the parity of the row.
template <class Stat>
class GradientLines {
  using Vec = VecOf<Stat>;
  static constexpr int L = LANES<Stat>;

 public:
  explicit GradientLines(const LabelColumns<Stat>& columns) : columns_(columns) {}

  // The gradients of this row are added to, at the columns of one label or more.
  void use(int64_t row, int64_t labels) {
    if (count_ == 0) find_slots(labels);
    rows_[row & 1] = row;
  }

  // Calls visit(parity) for the rows before this one.
  template <class Visit>
  void finish_until(int64_t row, Visit visit) {
    for (int64_t& kept_row : rows_)
      if (kept_row >= 0 && kept_row < row) {
        visit(kept_row & 1);
        kept_row = -1;
      }
  }

  // Afterwards the columns are others.
  void clear() { count_ = 0; }

  // For each vector of packed columns, calls add(the first one, its sums over the labels of `line`,
  // and those of the columns at its right). line[labels] is 0.
  template <class Add>
  void for_sums(const Stat* line, Add add) const {
    for (int64_t j = 0; j < stride_; j += L) {
      Vec left = {}, right = {};
      for (int64_t i = j; i < count_; i += stride_) {
        const Vec dz = look_up<false>(line, columns_.slots + i);
        const Vec weight = Simd<Stat>::load(columns_.slot_weights + i);
        left += (1 - weight) * dz;
        right += weight == 0 ? Vec{} : weight * dz;
      }
      add(first_ + j, left, right);
    }
  }

 private:
  // The labels at the right of each packed column: the n-th one of column first_ + j is slots[n *
  // stride_ + j], or the one after the last, which is 0.
  void find_slots(int64_t labels) {
    const int32_t* lower = columns_.lower;
    first_ = lower[0];
    stride_ = (lower[labels - 1] + 1 - first_ + L - 1) / L * L;
    for (int64_t t = 0, n = 0; t < labels; ++t) {
      n = t > 0 && lower[t] == lower[t - 1] ? n + 1 : 0;
      for (; count_ < (n + 1) * stride_; ++count_) {
        columns_.slots[count_] = static_cast<int32_t>(labels);
        columns_.slot_weights[count_] = 0;
      }
      const int64_t slot = n * stride_ + lower[t] - first_;
      columns_.slots[slot] = static_cast<int32_t>(t);
      columns_.slot_weights[slot] = columns_.weight[t];
    }
  }

  LabelColumns<Stat> columns_;
  int64_t rows_[2] = {-1, -1}, first_ = 0, stride_ = 0, count_ = 0;
};

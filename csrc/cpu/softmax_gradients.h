// From gradients at the labels to dlogits: the transpose of the upsampling (upsampling.h), and
// writing of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "softmax_moments.h"
#include "softmax_rows.h"
#include "softmax_vectors.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

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

// Writes neighbouring columns of dlogits, beginning with `target`: column j of class k is
// source[k * stride + j], where whole vectors can be read.
template <class T>
ALWAYS_INLINE void write_columns(T* target, const Layout& layout, int64_t columns,
                                 const StatOf<T>* source, int64_t stride) {
  using V = Simd<T>;
  using Vec = VecOf<StatOf<T>>;
  constexpr int L = V::LANES;
  const auto read = [&](int64_t k, int64_t j)
                        INLINE_LAMBDA { return Simd<StatOf<T>>::load(source + k * stride + j); };
  if (layout.stride_w == 1 || columns == 1) {
    for (int64_t k = 0; k < layout.dim; ++k)
      for (int64_t j = 0; j < columns; j += L)
        V::store(target + k * layout.stride_d + j, read(k, j), std::min<int64_t>(L, columns - j));
    return;
  }
  for (int64_t j = 0; j < columns; j += L)
    for (int64_t k = 0; k < layout.dim; k += L) {
      const int64_t classes = std::min<int64_t>(L, layout.dim - k);
      Vec square[L] = {};
      for (int64_t c = 0; c < classes; ++c) square[c] = read(k + c, j);
      V::transpose(square);
      for (int64_t p = 0; p < std::min<int64_t>(L, columns - j); ++p) {
        T* pixel = target + (j + p) * layout.stride_w + k * layout.stride_d;
        if (layout.stride_d == 1) {
          V::store(pixel, square[p], classes);
        } else {
          T scattered[L];
          V::store(scattered, square[p]);
          for (int64_t c = 0; c < classes; ++c) pixel[c * layout.stride_d] = scattered[c];
        }
      }
    }
}

template <class T>
void finish_row(const Problem<StatOf<T>>& problem, const Output<StatOf<T>>& output,
                const Tile& tile, int64_t row, StatOf<T>* gradients, int64_t stride) {
  using Stat = StatOf<T>;
  const Layout& dlayout = output.layout;
  const int64_t num_classes = problem.logits.num_classes;
  Stat* source = gradients + 1;
  const int64_t columns = tile.columns.end - tile.columns.begin;
  if (row >= tile.rows.begin && row < tile.rows.end) {
    const Stat* weights = problem.loss_options.all_weights_of(tile.image);
    const Stat* sum_gradients = gradients + num_classes * stride;
    for (int64_t k = 0; weights && k < num_classes; ++k)
      for (int64_t j = 0; weights[k] != 0 && j < stride; ++j)
        gradients[k * stride + j] += weights[k] * sum_gradients[j];
    for (int64_t k = 0; k < num_classes; ++k) {  // the copies at the sides
      Stat* line = source + k * stride;
      if (tile.columns.begin == 0) line[0] += line[-1];
      if (tile.columns.end == dlayout.width) line[columns - 1] += line[columns];
    }
    write_columns(logit_at<T>(output.dlogits, dlayout, tile.image, row, tile.columns.begin),
                  dlayout, columns, source + (num_classes - dlayout.dim) * stride, stride);
  }
  std::memset(gradients, 0, (num_classes + 1) * stride * sizeof(Stat));
}

template <class T>
void write_row(const Output<StatOf<T>>& output, int64_t num_classes, int64_t image, int64_t row,
               Range columns, const StatOf<T>* source, int64_t stride) {
  const int64_t first_class = num_classes - output.layout.dim;
  write_columns(logit_at<T>(output.dlogits, output.layout, image, row, columns.begin),
                output.layout, columns.end - columns.begin, source + first_class * stride, stride);
}

// Calls visit(finish_until), which adds to the tile's dlogits, and calls finish_until(the first row
// to which it still adds) on the way: the rows before that are written.
template <class Stat, class Visit>
ALWAYS_INLINE void for_rows_of_gradients(const Problem<Stat>& problem, const Tile& tile,
                                         const Workspace<Stat>& workspace,
                                         const Output<Stat>& output, Visit visit) {
  int64_t next = std::max<int64_t>(tile.rows.begin - 1, 0);  // the first row that is not finished
  const auto finish_until = [&](int64_t row) {
    for (; next < row; ++next)
      output.finish_row(problem, output, tile, next, workspace.gradients[next],
                        workspace.packed.stride);
  };
  visit(finish_until);
  if (problem.upsampled) finish_until(std::min(tile.rows.end + 1, problem.logits.layout.height));
}

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET

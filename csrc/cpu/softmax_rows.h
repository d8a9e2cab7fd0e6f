// Reading rows of labels and logits. Only this code and that which writes rows of gradients
// (softmax_gradients.h) depend on strides, dtypes and layouts.
//
// A packed row contains, for each class, the tile's columns minus the largest logit of their
// position, the shift. The first and the last column are copied once more at the sides.
// Full-resolution logits are not packed, but read in groups of pixels, or of two classes in rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "softmax_moments.h"
#include "softmax_vectors.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

template <class Label>
int64_t read_labels(const Labels& labels, int64_t image, int64_t row, Range columns,
                    int32_t* classes) {
  const Label* data = static_cast<const Label*>(labels.data) + image * labels.stride_b +
                      row * labels.stride_h + columns.begin * labels.stride_w;
  const int64_t stride = labels.stride_w, count = columns.end - columns.begin;
  // Compared in the labels' own type, because a vector contains more of them than of int64.
  using Bits = std::make_unsigned_t<Label>;
  const auto largest = static_cast<uint64_t>(std::numeric_limits<Label>::max());
  const auto last = static_cast<Bits>(std::min<uint64_t>(labels.num_classes - 1, largest));
  const auto ignore_index = static_cast<Label>(labels.ignore_index);
  const bool ignores = static_cast<int64_t>(ignore_index) == labels.ignore_index;
  const auto is_class = [&](Label label) INLINE_LAMBDA { return static_cast<Bits>(label) <= last; };
  const auto is_ignored = [&](Label label)
                              INLINE_LAMBDA { return (label == ignore_index) & ignores; };
  Bits any_outside = 0;
  const auto read = [&](int64_t i, int64_t at) INLINE_LAMBDA {
    const Label label = data[at];
    const bool in_range = is_class(label), ignored = is_ignored(label);
    classes[i] = in_range & !ignored ? static_cast<int32_t>(label) : -1;
    any_outside |= static_cast<Bits>(!(in_range | ignored));
  };
  if (stride == 1) {
    // the row that is read next but three, from the third-level cache or from memory
    const Label* ahead = data + 4 * labels.stride_h;
    for (int64_t i = 0; i < count; i += 64 / sizeof(Label)) __builtin_prefetch(ahead + i, 0, 2);
    for (int64_t i = 0; i < count; ++i) read(i, i);
  } else {
    for (int64_t i = 0; i < count; ++i) read(i, i * stride);
  }
  // They are counted in a loop of their own, because rows seldom have such labels.
  int64_t labels_out_of_range = 0;
  for (int64_t i = 0; any_outside && i < count; ++i)
    labels_out_of_range += !(is_class(data[i * stride]) | is_ignored(data[i * stride]));
  return labels_out_of_range;
}

// Calls put(k, j, vector) for logits of neighbouring columns, beginning with `source`: those of
// class k in columns j to j + LANES - 1, arbitrary ones after the last column.
template <class T, class Put>
ALWAYS_INLINE void read_columns(const T* source, const Layout& layout, int64_t columns, Put put) {
  using V = Simd<T>;
  using Vec = VecOf<StatOf<T>>;
  constexpr int L = V::LANES;
  if (layout.stride_w == 1 || columns == 1) {
    for (int64_t k = 0; k < layout.dim; ++k)
      for (int64_t j = 0; j < columns; j += L)
        put(k, j, V::load(source + k * layout.stride_d + j, std::min<int64_t>(L, columns - j)));
    return;
  }
  for (int64_t j = 0; j < columns; j += L)
    for (int64_t k = 0; k < layout.dim; k += L) {
      const int64_t classes = std::min<int64_t>(L, layout.dim - k);
      Vec square[L] = {};
      for (int64_t p = 0; p < std::min<int64_t>(L, columns - j); ++p) {
        const T* pixel = source + (j + p) * layout.stride_w + k * layout.stride_d;
        if (layout.stride_d == 1) {
          square[p] = V::load(pixel, classes);
        } else {
          T gathered[L] = {};
          for (int64_t c = 0; c < classes; ++c) gathered[c] = pixel[c * layout.stride_d];
          square[p] = V::load(gathered);
        }
      }
      V::transpose(square);
      for (int64_t c = 0; c < classes; ++c) put(k + c, j, square[c]);
    }
}

// The first logit of a row's columns from `column` on.
template <class T, class Element>
ALWAYS_INLINE T* logit_at(Element* logits, const Layout& layout, int64_t image, int64_t row,
                          int64_t column) {
  return static_cast<T*>(logits) + image * layout.stride_b + row * layout.stride_h +
         column * layout.stride_w;
}

// Column j of packed rows is logit tile.columns.begin - 1 + j. Returns whether all logits are
// finite or -inf.
template <class T>
bool pack_row(const Logits<StatOf<T>>& logits, const Tile& tile, int64_t row,
              const PackedMemory<StatOf<T>>& memory) {
  using Stat = StatOf<T>;
  using Vec = VecOf<Stat>;
  constexpr int L = LANES<Stat>;
  const Layout& layout = logits.layout;
  const int64_t stride = memory.stride;
  const int64_t first = std::max<int64_t>(tile.columns.begin - 1, 0);
  const int64_t columns = std::min(tile.columns.end + 1, layout.width) - first;
  const int64_t left = first - (tile.columns.begin - 1);  // 1 if there is a copy at the left
  const bool right = tile.columns.end == layout.width;
  const T* source = logit_at<const T>(logits.data, layout, tile.image, row, first);
  Stat* packed = memory.rows[row] + left;
  Stat* shifts = memory.shifts + left;
  auto below = Vec{} == Vec{};  // not larger than the shift, and not NaN

  const Vec lowest = Vec{} - static_cast<Stat>(__builtin_inf());
  for (int64_t j = 0; j < columns; j += L) Simd<Stat>::store(shifts + j, lowest);
  const auto put = [&](int64_t k, int64_t j, Vec x) INLINE_LAMBDA {
    Simd<Stat>::store(packed + k * stride + j, x);
    Simd<Stat>::store(shifts + j, maximum(Simd<Stat>::load(shifts + j), x));
  };
  const int64_t first_class = logits.num_classes - layout.dim;
  for (int64_t j = 0; first_class > 0 && j < columns; j += L) put(0, j, Vec{});
  read_columns(source, layout, columns,
               [&](int64_t k, int64_t j, Vec x) INLINE_LAMBDA { put(first_class + k, j, x); });
  for (int64_t j = 0; j < columns; j += L) {
    const Vec largest = Simd<Stat>::load(shifts + j);
    // a position whose largest logit is not finite is not shifted
    Simd<Stat>::store(shifts + j, largest - largest == 0 ? largest : Vec{});
  }
  for (int64_t k = 0; k < logits.num_classes; ++k)
    for (int64_t j = 0; j < columns; j += L) {
      Stat* at = packed + k * stride + j;
      const Vec x = Simd<Stat>::load(at) - Simd<Stat>::load(shifts + j);
      Simd<Stat>::store(at, x);
      below = below & (x <= 0);
    }
  // copies at the sides, then zeros, so that unused lanes have finite numbers
  for (int64_t k = 0; k < logits.num_classes; ++k) {
    Stat* line = packed + k * stride;
    if (left) line[-1] = line[0];
    if (right) line[columns] = line[columns - 1];
    std::memset(line + columns + right, 0, (stride - left - columns - right) * sizeof(Stat));
  }
  bool ordinary = true;
  for (int i = 0; i < L; ++i) ordinary = ordinary && below[i];
  return ordinary;
}

template <class T>
void read_row(const Logits<StatOf<T>>& logits, int64_t image, int64_t row, Range columns,
              StatOf<T>* target, int64_t stride) {
  using Vec = VecOf<StatOf<T>>;
  const int64_t first_class = logits.num_classes - logits.layout.dim;
  const int64_t count = columns.end - columns.begin;
  for (int64_t j = 0; first_class > 0 && j < count; j += LANES<StatOf<T>>)
    Simd<StatOf<T>>::store(target + j, Vec{});
  read_columns(logit_at<const T>(logits.data, logits.layout, image, row, columns.begin),
               logits.layout, count, [&](int64_t k, int64_t j, Vec x) INLINE_LAMBDA {
                 Simd<StatOf<T>>::store(target + (first_class + k) * stride + j, x);
               });
}

// Appends the sum of v_k z_k to a packed row.
template <class Stat>
void mix_row(const Problem<Stat>& problem, int64_t image, Stat* packed, int64_t stride) {
  const int64_t num_classes = problem.logits.num_classes;
  const Stat* weights = problem.loss_options.all_weights_of(image);
  if (!weights) return;
  Stat* sum = packed + num_classes * stride;
  std::memset(sum, 0, stride * sizeof(Stat));
  for (int64_t k = 0; k < num_classes; ++k)
    for (int64_t j = 0; weights[k] != 0 && j < stride; ++j)
      sum[j] += weights[k] * packed[k * stride + j];
}

// The packed rows of logits.
template <class Stat>
struct PackedRows {
  TwoRows<int64_t> kept = {-1, -1};
  TwoRows<bool> ordinary;  // neither NaN nor +inf

  void need(const Problem<Stat>& problem, const Tile& tile, int64_t row,
            const PackedMemory<Stat>& memory) {
    if (kept[row] == row) return;
    ordinary[row] = problem.logits.pack_row(problem.logits, tile, row, memory);
    mix_row(problem, tile.image, memory.rows[row], memory.stride);
    kept[row] = row;
  }
};

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET

// Softmax moments of two classes and of sigmoids. They depend on one number for each pixel, the
// difference of its logits d = z_1 - z_0. With e = e^-|d|, log(1 + e) and |d| + log(1 + e) are the
// two losses, 1 / (1 + e) and e / (1 + e) the two probabilities. No lse is read.
//
// Rows of labels are processed pixel by pixel (softmax_pixels.h) if a logit around them is not
// finite.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "softmax_pixels.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

// The differences of the logits at the labels of a tile, row by row.
class DifferenceRows {
  using V = Simd<float>;
  static constexpr int L = LANES<float>;

 public:
  DifferenceRows(const Problem<float>& problem, const Tile& tile,
                 const DifferenceMemory<float>& memory)
      : problem_(problem), tile_(tile), memory_(memory), columns_(memory.columns) {
    if (problem.upsampled)
      columns_.start(problem.columns, tile.columns.begin - 1, tile.label_columns);
  }

  // d of a row of labels; null if a logit around it is not finite. It is not inlined, so its
  // products are always fused in the same way, and `correct` is the diagonal of the confusion
  // matrix.
  __attribute__((noinline)) const float* label_differences(int64_t y) {
    if (!problem_.upsampled) {
      float* d = memory_.planes + memory_.stride;
      return read(y, tile_.label_columns, 0) ? d : nullptr;
    }
    const Position<float> row = position(problem_.rows, y);
    const float *low = logit_differences(row.lower), *high = logit_differences(row.upper);
    if (!finite_[row.lower] || !finite_[row.upper]) return nullptr;
    if (row.weight == 0) return low;
    between_lines(low, high, row.weight, 0, columns_.count(), memory_.label_line);
    return memory_.label_line;
  }

 private:
  // d of a row of logits at the labels' columns.
  const float* logit_differences(int64_t row) {
    float* line = memory_.lines[row];
    if (rows_[row] == row) return line;
    rows_[row] = row;
    const int64_t begin = tile_.columns.begin - 1, width = problem_.logits.layout.width;
    const Range columns = {std::max<int64_t>(begin, 0), std::min(tile_.columns.end + 1, width)};
    finite_[row] = read(row, columns, columns.begin - begin);
    float* packed = memory_.planes + memory_.stride;
    packed[columns.end - begin] = packed[columns.end - begin - 1];  // its own neighbour
    columns_.upsample(packed, line);
    return line;
  }

  // Reads a row's d into the second plane, beginning with number `first`. Returns whether all are
  // finite.
  bool read(int64_t row, Range columns, int64_t first) {
    float* planes = memory_.planes + first;
    const int64_t stride = memory_.stride;
    problem_.logits.read_columns(problem_.logits, tile_.image, row, columns, planes, stride);
    Ints finite = Ints{} == 0;
    for (int64_t j = 0; j < columns.end - columns.begin; j += L) {
      const Floats d = V::load(planes + stride + j) - V::load(planes + j);
      V::store(planes + stride + j, d);
      finite &= d - d == 0;
    }
    return !any(~finite);
  }

  const Problem<float>& problem_;
  const Tile& tile_;
  const DifferenceMemory<float>& memory_;
  LabelColumns<float> columns_;
  TwoRows<int64_t> rows_ = {-1, -1};
  TwoRows<bool> finite_ = {};
};

// Calls visit(y, d) for the rows of a tile's labels, whose classes are read; d is null if the row
// is processed pixel by pixel. Before, it calls begin(y). Classes after the last label are -1. It
// returns the number of labels that are neither a class nor ignored.
template <class Begin, class Visit>
ALWAYS_INLINE int64_t for_differences(const Problem<float>& problem, const Tile& tile,
                                      const Workspace<float>& workspace, Begin begin, Visit visit) {
  DifferenceRows rows(problem, tile, workspace.differences);
  const int64_t count = tile.label_columns.end - tile.label_columns.begin;
  int64_t labels_out_of_range = 0;
  for (int64_t y = tile.label_rows.begin; y < tile.label_rows.end; ++y) {
    if (problem.labels.read)
      labels_out_of_range +=
          problem.labels.read(problem.labels, tile.image, y, tile.label_columns, workspace.classes);
    const Ints none = Ints{} - 1;
    std::memcpy(workspace.classes + count, &none, sizeof none);
    begin(y);
    visit(y, rows.label_differences(y));
  }
  return labels_out_of_range;
}

// The two classes of a vector of pixels.
struct TwoClasses {
  Floats d, power;  // power: e^-|d|

  ALWAYS_INLINE explicit TwoClasses(Floats d) : d(d), power(exp<float>(d < 0 ? d : -d)) {}

  // -log p of class 1, or of class 0 if `other` is -d; log_total: log(1 + power)
  static ALWAYS_INLINE Floats loss(Floats other, Floats log_total) {
    return log_total + (other < 0 ? -other : Floats{});
  }
  // The sum of v_k * -log p_k.
  ALWAYS_INLINE Floats losses(const LossesOfImage<float>& losses, Floats log_total) const {
    if (!losses.all_weights) return Floats{};
    return losses.total * log_total +
           (d < 0 ? -losses.all_weights[1] * d : losses.all_weights[0] * d);
  }
  // The probability of class k and of the other one.
  ALWAYS_INLINE Probabilities<float> probabilities(Ints k) const {
    const Floats larger = 1 / (1 + power), smaller = power * larger;
    const Ints is_larger = (k == 1) == (d > 0);
    return {is_larger ? larger : smaller, is_larger ? smaller : larger};
  }
};

// The sum of log(1 + x) over some vectors: the logarithm of the product, which is 1 + rest. The
// difference to 1 remains exact where all x are small.
struct LogOfProduct {
  Floats rest = {};

  ALWAYS_INLINE void multiply(Ints where, Floats x) { rest = where ? rest + x * (1 + rest) : rest; }
  ALWAYS_INLINE Floats value() const { return rest > 1 ? log(1 + rest) : log_of_1_plus(rest); }
};

// The sums of a class over a tile.
struct SumsOfClass {
  using Sum = Vector<double, LANES<double>>;
  Sum loss_sums[LOSS_SUMS] = {}, intersections = {}, probability_sums = {}, squares = {};
  int64_t counts = 0, correct = 0;
};

// BY_PRODUCT: the loss of a single pixel is not needed.
template <bool BY_PRODUCT, bool WITH_PROBABILITIES>
void forward_differences(const Problem<float>& problem, const Tile& tile,
                         const Workspace<float>& workspace, const Sums& sums,
                         const Maps<float>& maps) {
  using V = Simd<float>;
  constexpr int L = LANES<float>;
  const int64_t count = tile.label_columns.end - tile.label_columns.begin;
  const LossesOfImage<float> losses(problem.loss_options, tile.image);
  const Map<float>& weights = problem.loss_options.pixel_weights;
  const bool with_correct = sums.correct, with_squares = sums.squares;
  const auto number = [](Ints mask) INLINE_LAMBDA { return __builtin_popcount(lanes_of(mask)); };
  PackedRows<float> packed;
  SumsOfClass by_class[2];
  const auto visit = [&](int64_t y, const float* d) {
    if (!d)
      return for_label_row(problem, tile, workspace, packed, y, [&](const Group<float>& group) {
        forward_group(problem, tile, workspace, group, sums, maps);
      });
    float* map = maps.pixel_losses;
    if (map) map += problem.pixel(tile, y, tile.label_columns.begin);
    for (int64_t first = 0; first < count; first += 8 * L) {
      Floats loss_sums[LOSS_SUMS][2] = {}, intersections[2] = {}, probability_sums[2] = {},
             squares[2] = {};
      LogOfProduct totals[2];
      for (int64_t t = first; t < std::min(first + 8 * L, count); t += L) {
        const TwoClasses two(V::load(d + t));
        const Ints k = load_ints(workspace.classes + t), has_label[2] = {k == 0, k == 1};
        const Floats other = has_label[1] ? two.d : -two.d;
        for (int i = 0; i < 2; ++i) {
          by_class[i].counts += number(has_label[i]);
          if (with_correct)
            by_class[i].correct += number(has_label[i] & (i == 1 ? two.d > 0 : ~(two.d > 0)));
        }
        if constexpr (BY_PRODUCT) {
          const Floats without_log = two.loss(other, Floats{});
          for (int i = 0; i < 2; ++i) {
            loss_sums[LOSSES][i] += has_label[i] ? without_log : Floats{};
            totals[i].multiply(has_label[i], two.power);
          }
        } else {
          const Floats log_total = log_of_1_plus(two.power), c = two.loss(other, log_total);
          Floats loss = c, weight = Floats{} + 1;
          if (!losses.options.plain)
            loss = losses.loss(k, c, two.losses(losses, log_total),
                               [&]() INLINE_LAMBDA { return two.probabilities(k); });
          if (map) V::store(map + t, k >= 0 ? loss : Floats{}, std::min<int64_t>(L, count - t));
          if (weights.data)
            weight = load_map(weights, tile.image, y, tile.label_columns.begin + t, count - t);
          for (int s = 0; s < LOSS_SUMS; ++s) {
            if (!sums.loss_sums[s]) continue;
            const Floats term = losses.share_of_pixel(s, c, loss, weight);
            for (int i = 0; i < 2; ++i) loss_sums[s][i] += has_label[i] ? term : Floats{};
          }
        }
        for (int i = 0; WITH_PROBABILITIES && i < 2; ++i) {
          const Floats p = two.probabilities(Ints{} + i).true_class;
          intersections[i] += has_label[i] ? p : Floats{};
          probability_sums[i] += k >= 0 ? p : Floats{};
          if (with_squares) squares[i] += k >= 0 ? p * p : Floats{};
        }
      }
      for (int i = 0; i < 2; ++i) {
        if (BY_PRODUCT) loss_sums[LOSSES][i] += totals[i].value();
        for (int s = 0; s < LOSS_SUMS; ++s)
          by_class[i].loss_sums[s] += widen(fold(loss_sums[s][i]));
        if (!WITH_PROBABILITIES) continue;
        by_class[i].intersections += widen(fold(intersections[i]));
        by_class[i].probability_sums += widen(fold(probability_sums[i]));
        by_class[i].squares += widen(fold(squares[i]));
      }
    }
  };
  *sums.labels_out_of_range += for_differences(problem, tile, workspace, [](int64_t) {}, visit);
  for (int i = 0; i < 2; ++i) {
    for (int s = 0; s < LOSS_SUMS; ++s)
      if (sums.loss_sums[s]) sums.loss_sums[s][i] += sum_of_lanes(by_class[i].loss_sums[s]);
    sums.counts[i] += by_class[i].counts;
    if (sums.intersections) sums.intersections[i] += sum_of_lanes(by_class[i].intersections);
    if (sums.probability_sums)
      sums.probability_sums[i] += sum_of_lanes(by_class[i].probability_sums);
    if (sums.squares) sums.squares[i] += sum_of_lanes(by_class[i].squares);
    if (sums.correct) sums.correct[i] += by_class[i].correct;
  }
}

template <class = void>
void forward_two_classes(const Problem<float>& problem, const Tile& tile,
                         const Workspace<float>& workspace, const Sums& sums,
                         const Maps<float>& maps) {
  const LossOptions<float>& options = problem.loss_options;
  int requested = 0;
  for (const double* sum : sums.loss_sums) requested += sum != nullptr;
  const bool by_product =
      options.plain && !options.pixel_weights.data && !maps.pixel_losses && requested == 1;
  const bool with_probabilities = sums.probability_sums || sums.squares;
  const auto add = by_product           ? with_probabilities ? forward_differences<true, true>
                                                             : forward_differences<true, false>
                   : with_probabilities ? forward_differences<false, true>
                                        : forward_differences<false, false>;
  add(problem, tile, workspace, sums, maps);
}

// The derivative of the moments by d, for the pixels of one image. PLAIN: losses are -log p, and no
// map is given.
template <bool PLAIN>
class DerivativeByDifference {
 public:
  DerivativeByDifference(const Problem<float>& problem, const Gradients<float>& gradients,
                         int64_t image)
      : losses_(problem.loss_options, image),
        gradients_(gradients),
        with_squares_(gradients.dsquares) {
    const auto at = [&](const float* by_class, int k) {
      return by_class ? by_class[image * gradients.stride_b + k] : 0;
    };
    // the two probability_sums add up to a constant: equal gradients cancel out
    const float dprobability_sums =
        at(gradients.dprobability_sums, 1) - at(gradients.dprobability_sums, 0);
    for (int k = 0; k < 2; ++k) {
      const float dintersections = at(gradients.dintersections, k);
      dlosses_[k] = at(gradients.dlosses, k);
      dp_1_[k] = dprobability_sums + (k ? dintersections : -dintersections);
      dsquares_[k] = 2 * at(gradients.dsquares, k);
    }
  }

  // map_values: the values of a map at the pixels.
  template <class MapValues>
  ALWAYS_INLINE Floats at(Floats d, Ints k, MapValues map_values) const {
    const auto class_values = [&](const float (&values)[2]) INLINE_LAMBDA {
      return k == 1 ? Floats{} + values[1] : Floats{} + values[0];
    };
    const TwoClasses two(d);
    const auto [p_1, p_0] = two.probabilities(Ints{} + 1);
    Floats label_term = class_values(dlosses_), smoothing_term = {};
    if constexpr (!PLAIN) {
      const LossOptions<float>& options = losses_.options;
      if (options.pixel_weights.data) label_term *= map_values(options.pixel_weights);
      label_term += map_values(gradients_.dpixel_losses);
      Floats c = {}, u = {}, alpha, beta;
      if (losses_.needs_c()) {
        const Floats log_total = log_of_1_plus(two.power);
        c = two.loss(k == 1 ? d : -d, log_total);
        u = two.losses(losses_, log_total);
      }
      const auto p = [&, p_1 = p_1, p_0 = p_0]() INLINE_LAMBDA {  // Clang 14 captures no others
        return Probabilities<float>{k == 1 ? p_1 : p_0, k == 1 ? p_0 : p_1};
      };
      losses_.slopes_of_losses(k, c, u, p, alpha, beta);
      if (losses_.all_weights)
        smoothing_term =
            label_term * beta * (losses_.all_weights[0] * p_1 - losses_.all_weights[1] * p_0);
      label_term *= alpha;
    }
    Floats dp_1 = class_values(dp_1_);
    if (with_squares_) dp_1 += p_1 * dsquares_[1] - p_0 * dsquares_[0];
    const Floats result = smoothing_term + label_term * (k == 1 ? -p_0 : p_1) + dp_1 * (p_0 * p_1);
    return k >= 0 ? result : Floats{};
  }

 private:
  LossesOfImage<float> losses_;
  const Gradients<float>& gradients_;
  bool with_squares_;
  float dlosses_[2], dp_1_[2];  // derivatives by -log p and by p_1, of the pixels of each class
  float dsquares_[2];           // twice those by p_k^2
};

template <bool PLAIN, class Begin>
void backward_differences(const Problem<float>& problem, const Tile& tile,
                          const Workspace<float>& workspace, const Gradients<float>& gradients,
                          const Output<float>& output, Begin finish_until) {
  using V = Simd<float>;
  constexpr int L = LANES<float>;
  const int64_t count = tile.label_columns.end - tile.label_columns.begin;
  const DerivativeByDifference<PLAIN> derivative(problem, gradients, tile.image);
  GradientLines<float> lines(workspace.differences.columns);
  PackedRows<float> packed;
  const auto add_up = [&](int64_t row) {
    float* line = workspace.differences.gradients[row];
    lines.for_sums(line, [&](int64_t j, Floats sums) INLINE_LAMBDA {
      for (int i = 0; i < 2; ++i) {
        float* class_gradients = workspace.gradients[row] + i * workspace.packed.stride + j;
        V::store(class_gradients, V::load(class_gradients) + (i == 1 ? sums : -sums));
      }
    });
    std::memset(line, 0, workspace.label_stride * sizeof(float));
  };
  const auto begin = [&](int64_t y) {
    if (!problem.upsampled) return;
    const int64_t row = position(problem.rows, y).lower;
    lines.finish_until(row, add_up);
    finish_until(row);
  };
  const auto visit = [&](int64_t y, const float* d) {
    if (count == 0) return;  // a tile of logits that no label reads
    if (!d)
      return for_label_row(problem, tile, workspace, packed, y, [&](const Group<float>& group) {
        backward_group(problem, tile, workspace, gradients, output, group);
      });
    const auto at = [&](int64_t t) INLINE_LAMBDA {
      const auto map_values = [&](const Map<float>& map) INLINE_LAMBDA {
        return load_map(map, tile.image, y, tile.label_columns.begin + t, count - t);
      };
      return derivative.at(V::load(d + t), load_ints(workspace.classes + t), map_values);
    };
    if (!problem.upsampled) {  // in the place of d
      for (int64_t t = 0; t < count; t += L) {
        const Floats gradient = at(t);
        V::store(workspace.differences.planes + t, -gradient);
        V::store(workspace.differences.planes + workspace.differences.stride + t, gradient);
      }
      return output.write_columns(output, 2, tile.image, y, tile.label_columns,
                                  workspace.differences.planes, workspace.differences.stride);
    }
    const Position<float> row = position(problem.rows, y);
    lines.use(row.lower, count);
    lines.use(row.upper, count);
    float* low = workspace.differences.gradients[row.lower];
    float* high = workspace.differences.gradients[row.upper];
    for (int64_t t = 0; t < count; t += L) {
      const Floats gradient = at(t);
      V::store(low + t, V::load(low + t) + (1 - row.weight) * gradient);
      if (row.weight != 0) V::store(high + t, V::load(high + t) + row.weight * gradient);
    }
  };
  for_differences(problem, tile, workspace, begin, visit);
  lines.finish_until(problem.rows.source, add_up);
}

template <class Begin>
void backward_two_classes(const Problem<float>& problem, const Tile& tile,
                          const Workspace<float>& workspace, const Gradients<float>& gradients,
                          const Output<float>& output, Begin finish_until) {
  const LossOptions<float>& options = problem.loss_options;
  if (options.plain && !options.pixel_weights.data && !gradients.dpixel_losses.data)
    return backward_differences<true>(problem, tile, workspace, gradients, output, finish_until);
  backward_differences<false>(problem, tile, workspace, gradients, output, finish_until);
}

template <class = void>
void argmax_two_classes(const Problem<float>& problem, const Tile& tile,
                        const Workspace<float>& workspace, const Predictions& predictions) {
  PackedRows<float> packed;
  const auto visit = [&](int64_t y, const float* d) {
    if (!d)
      return for_label_row(problem, tile, workspace, packed, y, [&](const Group<float>& group) {
        argmax_group(problem, tile, workspace, group, predictions);
      });
    const Range& columns = tile.label_columns;
    predictions.at(problem.pixel(tile, y, columns.begin), [&](auto* out) {
      for (int64_t x = 0; x < columns.end - columns.begin; ++x) out[x] = d[x] > 0;
    });
  };
  for_differences(problem, tile, workspace, [](int64_t) {}, visit);
}

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET

// Softmax moments pixel by pixel, for any ratio of sizes and any values: one exponential for each
// pixel and class, after subtracting the exact maximum of the pixel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bilinear.h"
#include "softmax_gradients.h"
#include "softmax_losses.h"
#include "softmax_moments.h"
#include "softmax_rows.h"
#include "upsampling.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

template <class Stat>
using MaskOf = decltype(VecOf<Stat>{} < VecOf<Stat>{});

// At most GROUP neighbouring labels of one row.
template <class Stat>
struct Group {
  int64_t y, x, count;  // row, first column, number
  Position<Stat> row;
  int32_t classes[GROUP];      // -1 from `count` on
  LabelColumns<Stat> columns;  // if the logits are upsampled

  ALWAYS_INLINE Indices<Stat> classes_at(int64_t t) const {
    Indices<Stat> k;
    std::memcpy(&k, classes + t, sizeof k);
    return k;
  }
  ALWAYS_INLINE MaskOf<Stat> is_valid(int64_t t) const {
    return __builtin_convertvector(classes_at(t) >= 0, MaskOf<Stat>);
  }
  ALWAYS_INLINE MaskOf<Stat> is_of_class(int64_t t, int32_t k) const {
    return __builtin_convertvector(classes_at(t) == k, MaskOf<Stat>);
  }
  // The logits of the true classes of a vector of pixels, z at [k * stride]; 0 if ignored.
  ALWAYS_INLINE VecOf<Stat> label_logits(int64_t t, const Stat* z, int64_t stride) const {
    const Indices<Stat> k = classes_at(t);
    if (all_equal(k)) return k[0] < 0 ? VecOf<Stat>{} : Simd<Stat>::load(z + k[0] * stride);
    Indices<Stat> at = k * static_cast<int32_t>(stride);
    for (int i = 0; i < LANES<Stat>; ++i) at[i] += i;
    return pick(z, at);
  }
  // A bit for each pixel t whose class and t fulfil the condition.
  template <class Condition>
  ALWAYS_INLINE uint64_t pixels(Condition condition) const {
    uint64_t bits = 0;
    for (int64_t t = 0; t < count; t += LANES<float>)
      bits |= uint64_t{lanes_of(condition(load_ints(classes + t), t))} << t;
    return bits;
  }
  // Adds the values of the pixels of class k, in double.
  ALWAYS_INLINE double sum_of_class(int32_t k, const Stat* values) const {
    Vector<double, LANES<double>> total = {};
    for (int64_t t = 0; t < count; t += LANES<Stat>)
      total += widen(fold(is_of_class(t, k) ? Simd<Stat>::load(values + t) : VecOf<Stat>{}));
    return sum_of_lanes(total);
  }
};

// Calls visit(group) for columns of a row of labels, counted from the tile's first one.
template <class Stat, class Visit>
ALWAYS_INLINE void for_groups_of_row(const Problem<Stat>& problem, const Tile& tile,
                                     const Workspace<Stat>& workspace, int64_t row,
                                     const int32_t* classes, Range columns, Visit visit) {
  Group<Stat> group = {
      row, 0, 0, position(problem.rows, row), {}, LabelColumns<Stat>(workspace.group.columns)};
  for (int64_t x = columns.begin; x < columns.end; x += workspace.group.size) {
    group.x = tile.label_columns.begin + x;
    group.count = std::min(workspace.group.size, columns.end - x);
    std::memcpy(group.classes, classes + x, group.count * sizeof(int32_t));
    for (int64_t t = group.count; t < GROUP; ++t) group.classes[t] = -1;
    if (problem.upsampled)
      group.columns.start(problem.columns, tile.columns.begin - 1,
                          {group.x, group.x + group.count});
    visit(group);
  }
}

// The upsampled values of two packed lines at the group's pixels. line: scratch.
template <class Stat>
ALWAYS_INLINE void upsample(const Group<Stat>& group, const Stat* low, const Stat* high, Stat* line,
                            Stat* out) {
  if (group.row.weight != 0) {
    const Range packed = group.columns.packed();
    between_lines(low, high, group.row.weight, packed.begin, packed.end, line);
    low = line;
  }
  group.columns.upsample(low, out);
}

// The logits of the group's pixels: workspace.group.upsampled.
template <class Stat>
ALWAYS_INLINE void logits_of_group(const Problem<Stat>& problem, const Tile& tile,
                                   const Workspace<Stat>& workspace, const Group<Stat>& group) {
  if (!problem.upsampled)
    return problem.logits.read_columns(problem.logits, tile.image, group.y,
                                       {group.x, group.x + group.count}, workspace.group.upsampled,
                                       workspace.group.size);
  for (int64_t k = 0; k < problem.logits.num_classes; ++k)
    upsample(group, workspace.packed.rows[group.row.lower] + k * workspace.packed.stride,
             workspace.packed.rows[group.row.upper] + k * workspace.packed.stride,
             workspace.group.line, workspace.group.upsampled + k * workspace.group.size);
}

// The class of the largest logit of each pixel: the first of equal ones; NaN is larger than all.
template <class Stat>
ALWAYS_INLINE void largest_of_group(const Problem<Stat>& problem, const Workspace<Stat>& workspace,
                                    const Group<Stat>& group, int32_t* classes) {
  using Vec = VecOf<Stat>;
  using Index = MaskOf<Stat>;
  for (int64_t t = 0; t < group.count; t += LANES<Stat>) {
    Vec largest = Simd<Stat>::load(workspace.group.upsampled + t);
    Index index = {};
    for (int64_t k = 1; k < problem.logits.num_classes; ++k) {
      const Vec z = Simd<Stat>::load(workspace.group.upsampled + k * workspace.group.size + t);
      const Index larger = (z > largest) | ((z != z) & (largest == largest));
      largest = larger ? z : largest;
      index = larger ? Index{} + static_cast<std::remove_cvref_t<decltype(index[0])>>(k) : index;
    }
    const auto narrow = __builtin_convertvector(index, Indices<Stat>);
    std::memcpy(classes + t, &narrow, sizeof narrow);
  }
}

// The sum of e^(z - largest) over the classes of each pixel. If values are not finite, results are
// as those of torch's logsumexp and softmax.
template <class Stat>
struct SumOfPowers {
  VecOf<Stat> largest, total;
  VecOf<Stat> mixed;  // the sum of weights[k] * (z - largest), if there are weights
};

// For one vector of pixels, z at [k * stride]; with STORED, z becomes e^(z - largest).
template <class Stat, bool STORED>
ALWAYS_INLINE SumOfPowers<Stat> sum_of_powers(Stat* z, int64_t num_classes, int64_t stride,
                                              const Stat* weights) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  Vec largest = V::load(z);
  for (int64_t k = 1; k < num_classes; ++k) largest = maximum(largest, V::load(z + k * stride));
  largest = largest - largest == 0 ? largest : Vec{};
  Vec total = {}, mixed = {};
  for (int64_t first = 0; first < num_classes; first += 128) {
    Vec sum = {};  // sums of few terms, to keep rounding errors small
    for (int64_t k = first; k < std::min<int64_t>(first + 128, num_classes); ++k) {
      const Vec shifted = V::load(z + k * stride) - largest, e = exp<Stat>(shifted);
      if (weights && weights[k] != 0) mixed += weights[k] * shifted;
      if (STORED) V::store(z + k * stride, e);
      sum += e;
    }
    total += sum;
  }
  return {largest, total, mixed};
}

template <class Stat>
ALWAYS_INLINE void scale(Stat* values, int64_t num_classes, int64_t stride, VecOf<Stat> factor) {
  using V = Simd<Stat>;
  for (int64_t k = 0; k < num_classes; ++k)
    V::store(values + k * stride, V::load(values + k * stride) * factor);
}

// A map's values at `count` neighbours in a row of an image, at most a vector; 0 if there is no
// map.
template <class Stat>
ALWAYS_INLINE VecOf<Stat> load_map(const Map<Stat>& map, int64_t image, int64_t y, int64_t x,
                                   int64_t count) {
  VecOf<Stat> values = {};
  if (!map.data) return values;
  count = std::min<int64_t>(LANES<Stat>, count);
  const Stat* data = map.data + image * map.stride_b + y * map.stride_h + x * map.stride_w;
  if (map.stride_w == 1) return Simd<Stat>::load(data, count);
  for (int64_t i = 0; i < count; ++i) values[i] = data[i * map.stride_w];
  return values;
}

// Adds a group to the sums and writes its maps.
template <class Stat>
void forward_group(const Problem<Stat>& problem, const Tile& tile, const Workspace<Stat>& workspace,
                   const Group<Stat>& group, const Sums& sums, const Maps<Stat>& maps) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  constexpr int L = LANES<Stat>;
  const int64_t num_classes = problem.logits.num_classes;
  const bool with_probabilities = sums.probability_sums || sums.squares;
  const int64_t first = problem.pixel(tile, group.y, group.x);
  const LossesOfImage<Stat> image_losses(problem.loss_options, tile.image);
  const Map<Stat>& weights = problem.loss_options.pixel_weights;
  Stat intersections[GROUP], loss_terms[LOSS_SUMS][GROUP];
  uint64_t correct = 0;
  logits_of_group(problem, tile, workspace, group);
  if (sums.correct) {
    int32_t predicted[GROUP];
    largest_of_group(problem, workspace, group, predicted);
    correct = group.pixels([&](Ints k, int64_t t)
                               INLINE_LAMBDA { return k == load_ints(predicted + t); });
  }
  for (int64_t t = 0; t < group.count; t += L) {
    Stat* const z = workspace.group.upsampled + t;
    const MaskOf<Stat> is_valid = group.is_valid(t);
    const int64_t count = std::min<int64_t>(L, group.count - t);
    const Vec label_logit = group.label_logits(t, z, workspace.group.size);
    const SumOfPowers<Stat> sum =
        with_probabilities ? sum_of_powers<Stat, true>(z, num_classes, workspace.group.size,
                                                       image_losses.all_weights)
                           : sum_of_powers<Stat, false>(z, num_classes, workspace.group.size,
                                                        image_losses.all_weights);
    if (with_probabilities) scale(z, num_classes, workspace.group.size, 1 / sum.total);
    const Vec log_total = log_of_sum(sum.total);
    const Vec c = is_valid ? not_below_0(log_total - (label_logit - sum.largest)) : Vec{};
    if (sums.intersections) V::store(intersections + t, exp<Stat>(-c));
    Vec loss = c, weight = Vec{} + 1;
    if (weights.data) weight = load_map(weights, tile.image, group.y, group.x + t, count);
    if (!problem.loss_options.plain) {
      const Vec u = image_losses.total * log_total - sum.mixed;
      const auto p = [c]() INLINE_LAMBDA { return probabilities_of<Stat>(c); };
      loss = is_valid ? image_losses.loss(group.classes_at(t), c, u, p) : Vec{};
    }
    for (int s = 0; s < LOSS_SUMS; ++s)
      if (sums.loss_sums[s])
        V::store(loss_terms[s] + t, image_losses.share_of_pixel(s, c, loss, weight));
    if (maps.pixel_losses) V::store(maps.pixel_losses + first + t, loss, count);
    if (maps.totals) V::store(maps.totals + first + t, Vec{}, count);
  }
  uint64_t rest = group.pixels([&](Ints k, int64_t) INLINE_LAMBDA { return k >= 0; });
  while (rest) {
    const int32_t k = group.classes[__builtin_ctzll(rest)];
    const uint64_t same_class =
        group.pixels([k](Ints classes, int64_t) INLINE_LAMBDA { return classes == k; });
    rest &= ~same_class;
    sums.counts[k] += __builtin_popcountll(same_class);
    if (sums.correct) sums.correct[k] += __builtin_popcountll(same_class & correct);
    for (int s = 0; s < LOSS_SUMS; ++s)
      if (sums.loss_sums[s]) sums.loss_sums[s][k] += group.sum_of_class(k, loss_terms[s]);
    if (sums.intersections) sums.intersections[k] += group.sum_of_class(k, intersections);
  }
  for (int64_t k = 0; with_probabilities && k < num_classes; ++k) {
    Vector<double, LANES<double>> probability_sum = {}, square = {};
    for (int64_t t = 0; t < group.count; t += L) {
      const Vec p = V::load(workspace.group.upsampled + k * workspace.group.size + t);
      const Vec valid = group.is_valid(t) ? p : Vec{};
      probability_sum += widen(fold(valid));
      square += widen(fold(valid * valid));
    }
    if (sums.probability_sums) sums.probability_sums[k] += sum_of_lanes(probability_sum);
    if (sums.squares) sums.squares[k] += sum_of_lanes(square);
  }
}

// Replaces workspace.group.upsampled by dz of the group's pixels.
template <class Stat>
void gradients_of_group(const Problem<Stat>& problem, const Tile& tile,
                        const Workspace<Stat>& workspace, const Gradients<Stat>& gradients,
                        const Group<Stat>& group) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  constexpr int L = LANES<Stat>;
  const int64_t num_classes = problem.logits.num_classes, stride = workspace.group.size;
  const int64_t image_offset = tile.image * gradients.stride_b;
  const auto class_values = [&](const Stat* by_class, Indices<Stat> k) INLINE_LAMBDA {
    return by_class ? pick(by_class + image_offset, k) : Vec{};
  };
  const bool with_dp = gradients.dprobability_sums || gradients.dsquares;
  const auto dp = [&](Vec p, int64_t k) INLINE_LAMBDA {
    const Stat dprobability_sum =
        gradients.dprobability_sums ? gradients.dprobability_sums[image_offset + k] : 0;
    const Stat dsquare = gradients.dsquares ? gradients.dsquares[image_offset + k] : 0;
    return dprobability_sum + 2 * p * dsquare;
  };
  const LossOptions<Stat>& options = problem.loss_options;
  const LossesOfImage<Stat> losses(options, tile.image);
  Stat label_terms[GROUP];
  logits_of_group(problem, tile, workspace, group);

  // dz_k = p_k * (rest + dp_k) - v_k * smoothing_term - label_term at the true class
  for (int64_t t = 0; t < group.count; t += L) {
    Stat* const z = workspace.group.upsampled + t;
    const Indices<Stat> classes = group.classes_at(t);
    const auto map_values = [&](const Map<Stat>& map) INLINE_LAMBDA {
      return load_map(map, tile.image, group.y, group.x + t, group.count - t);
    };
    Vec label_term = class_values(gradients.dlosses, classes);
    if (options.pixel_weights.data) label_term *= map_values(options.pixel_weights);
    label_term += map_values(gradients.dpixel_losses);
    Vec smoothing_term = {};
    const Vec label_logit = options.plain ? Vec{} : group.label_logits(t, z, stride);
    const SumOfPowers<Stat> sum =
        sum_of_powers<Stat, true>(z, num_classes, stride, losses.all_weights);
    if (!options.plain) {
      const Vec log_total = log_of_sum(sum.total);
      const Vec c = not_below_0(log_total - (label_logit - sum.largest));
      const auto p = [c]() INLINE_LAMBDA { return probabilities_of<Stat>(c); };
      Vec alpha, beta;
      losses.slopes_of_losses(classes, c, losses.total * log_total - sum.mixed, p, alpha, beta);
      smoothing_term = label_term * beta;
      label_term *= alpha;
    }
    Vec rest = label_term + losses.total * smoothing_term;
    Vec unit = 1 / sum.total;
    if (with_dp) {
      scale(z, num_classes, stride, unit);
      unit = Vec{} + 1;
    }
    for (int64_t k = 0; with_dp && k < num_classes; ++k) {
      const Vec p = V::load(z + k * stride);
      rest -= p * dp(p, k);
    }
    if (gradients.dintersections) {
      const Vec p = unit * group.label_logits(t, z, stride);
      const Vec intersection_term = p * class_values(gradients.dintersections, classes);
      rest -= intersection_term;
      label_term -= intersection_term;
    }
    V::store(label_terms + t, label_term);
    rest *= unit;
    const MaskOf<Stat> is_valid = group.is_valid(t);
    for (int64_t k = 0; k < num_classes; ++k) {
      const Vec p = V::load(z + k * stride);
      Vec dz = p * (with_dp ? rest + dp(p, k) : rest);
      if (losses.all_weights && losses.all_weights[k] != 0)
        dz -= losses.all_weights[k] * smoothing_term;
      V::store(z + k * stride, is_valid ? dz : Vec{});
    }
  }
  for (int64_t t = 0; t < group.count; ++t)
    if (group.classes[t] >= 0)
      workspace.group.upsampled[group.classes[t] * stride + t] -= label_terms[t];
}

// Adds the gradients of the logits that a group reads, by the transpose of the upsampling.
template <class Stat>
void add_gradients_of_group(const Problem<Stat>& problem, const Workspace<Stat>& workspace,
                            const Group<Stat>& group) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  const Position<Stat>& row = group.row;
  GradientLines<Stat> lines(workspace.group.columns);
  lines.use(row.lower, group.count);
  for (int64_t k = 0; k < problem.logits.num_classes; ++k) {
    Stat* const low = workspace.gradients[row.lower] + k * workspace.packed.stride;
    Stat* const high = workspace.gradients[row.upper] + k * workspace.packed.stride;
    lines.for_sums(workspace.group.upsampled + k * workspace.group.size,
                   [&](int64_t j, Vec sums) INLINE_LAMBDA {
                     V::store(low + j, V::load(low + j) + (1 - row.weight) * sums);
                     if (row.weight != 0) V::store(high + j, V::load(high + j) + row.weight * sums);
                   });
  }
}

// Writes dlogits of a group, or adds to those that it reads. workspace.group.upsampled: dz.
template <class Stat>
void write_gradients_of_group(const Problem<Stat>& problem, const Tile& tile,
                              const Workspace<Stat>& workspace, const Output<Stat>& output,
                              const Group<Stat>& group) {
  if (problem.upsampled) return add_gradients_of_group(problem, workspace, group);
  output.write_columns(output, problem.logits.num_classes, tile.image, group.y,
                       {group.x, group.x + group.count}, workspace.group.upsampled,
                       workspace.group.size);
}

template <class Stat>
void backward_group(const Problem<Stat>& problem, const Tile& tile,
                    const Workspace<Stat>& workspace, const Gradients<Stat>& gradients,
                    const Output<Stat>& output, const Group<Stat>& group) {
  gradients_of_group(problem, tile, workspace, gradients, group);
  write_gradients_of_group(problem, tile, workspace, output, group);
}

template <class Stat>
void argmax_group(const Problem<Stat>& problem, const Tile& tile, const Workspace<Stat>& workspace,
                  const Group<Stat>& group, const Predictions& predictions) {
  int32_t classes[GROUP];
  logits_of_group(problem, tile, workspace, group);
  largest_of_group(problem, workspace, group, classes);
  predictions.at(problem.pixel(tile, group.y, group.x), [&](auto* out) {
    for (int64_t t = 0; t < group.count; ++t) out[t] = classes[t];
  });
}

// Calls visit(group) for a row of a tile's labels, pixel by pixel, with packed logits if they are
// upsampled.
template <class Stat, class Visit>
ALWAYS_INLINE void for_label_row(const Problem<Stat>& problem, const Tile& tile,
                                 const Workspace<Stat>& workspace, PackedRows<Stat>& rows,
                                 int64_t y, Visit visit) {
  const Range& columns = tile.label_columns;
  if (problem.upsampled) {
    const Position<Stat> row = position(problem.rows, y);
    rows.need(problem, tile, row.lower, workspace.packed);
    rows.need(problem, tile, row.upper, workspace.packed);
  }
  for_groups_of_row(problem, tile, workspace, y, workspace.classes,
                    {0, columns.end - columns.begin}, visit);
}

// Calls visit(group) for all rows of the tile, whose classes it reads. For each row it first calls
// begin(the first row of logits that is still read). It returns the number of labels that are
// neither a class nor ignored.
template <class Stat, class Begin, class Visit>
ALWAYS_INLINE int64_t for_groups(const Problem<Stat>& problem, const Tile& tile,
                                 const Workspace<Stat>& workspace, Begin begin, Visit visit) {
  PackedRows<Stat> rows;
  int64_t labels_out_of_range = 0;
  for (int64_t y = tile.label_rows.begin; y < tile.label_rows.end; ++y) {
    if (problem.upsampled) begin(position(problem.rows, y).lower);
    if (problem.labels.read)
      labels_out_of_range +=
          problem.labels.read(problem.labels, tile.image, y, tile.label_columns, workspace.classes);
    for_label_row(problem, tile, workspace, rows, y, visit);
  }
  return labels_out_of_range;
}

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET

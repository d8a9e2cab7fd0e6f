// The terms of a part's pixels in the gradient of the logits (gradients.cuh), summed at the corners
// of the cell. dz_k has a term of each pixel, p_k·(slope + …), and one of the pixels with label k,
// −label_term. The first one comes from geometric sequences; irregular pixels are computed one by
// one.
#pragma once

#include <cstdint>

#include "../labels/pixel_labels.cuh"
#include "../upsampled_logits/cell.cuh"
#include "../upsampled_logits/cells.cuh"
#include "../upsampled_logits/logits.cuh"
#include "../upsampled_logits/maps.cuh"
#include "../upsampled_logits/part.cuh"
#include "../upsampled_logits/sequences.cuh"
#include "gradients.cuh"
#include "pixel_sums.cuh"

namespace anchorops::cuda {

// What the gradient is computed from, in addition to the logits.
struct Inputs {
  PixelLabels labels;
  Gradients gradients;
  PixelMaps maps;
};

// The regular pixels: values that every class needs. BY_CLASS: gradients.by_class().
template <bool BY_CLASS>
struct RegularPixels {
  PixelValues factors;  // 2^-SCALE/Σ e^z; times slope unless BY_CLASS
  float slopes[BY_CLASS ? PART : 1][PART];

  // Returns the irregular pixels. Others that are not valid have factors of 0.
  __device__ __forceinline__ unsigned load(const Sequences& sequences, const Corners& shifts,
                                           const CellLabels& labels, const Inputs& inputs,
                                           int first_key) {
    const Cell& cell = sequences.cell;
    const unsigned valid = labels.valid();
    load_map(cell, valid, inputs.maps.lse, factors);
    if constexpr (BY_CLASS) {
      const unsigned irregular = sequences.to_inverse_sums(shifts, valid, factors);
      load_map(cell, valid & ~irregular, inputs.maps.slopes, slopes);  // 0 · NaN is NaN
      return irregular;
    } else {
      PixelValues loaded;
      if (inputs.maps.slopes) {
        load_map(cell, valid, inputs.maps.slopes, loaded);
      } else {
        const float* dlosses = inputs.gradients.dlosses + first_key;
        for_each_pixel([&](int i, int j) {
          loaded[i][j] = dlosses[valid & bit_of(i, j) ? labels.at(i, j) : 0];
        });
      }
      const unsigned irregular = sequences.to_inverse_sums(shifts, valid, factors);
      const unsigned regular = valid & ~irregular;  // 0 · NaN is NaN
      for_each_pixel(
          [&](int i, int j) { factors[i][j] *= regular & bit_of(i, j) ? loaded[i][j] : 0; });
      return irregular;
    }
  }

  // Σ p_k·(slope + dmasses[k] + 2·p_k·dsquares[k]), where powers are those of class k.
  __device__ __forceinline__ Corners terms(const Cell& cell, const Powers& powers,
                                           const Gradients& gradients, int key) const {
    if constexpr (!BY_CLASS) {
      return sum_over_pixels(powers, factors).to_corners(cell);
    } else {
      const float dmass = Gradients::at(gradients.dmasses, key);
      const float dsquare = 2 * Gradients::at(gradients.dsquares, key);
      PixelSumsInOrder sums;
      for_each_power(powers, [&](int i, int j, float e) {
        const float p = e * factors[i][j];
        sums.add(i, j, p * fmaf(p, dsquare, slopes[i][j] + dmass));
      });
      return sums.to_corners(cell);
    }
  }
};

// −Σ label_term over these pixels, whose label has this key. In a loop that needs few registers, or
// UNROLLED.
template <bool UNROLLED>
__device__ __forceinline__ Corners label_terms(const Cell& cell, const Inputs& inputs,
                                               unsigned pixels, int key) {
  const float* map = inputs.maps.label_terms;
  const float dloss = map ? 0 : inputs.gradients.dlosses[key];
  PixelSums sums;
  const auto add = [&](int i, int j) {
    const float term = map ? map[cell.pixel(i, j)] : dloss;
    sums.sum -= term;
    sums.sum_i = fmaf(-i, term, sums.sum_i);
    sums.sum_j = fmaf(-j, term, sums.sum_j);
    sums.sum_ij = fmaf(-i * j, term, sums.sum_ij);
  };
  if constexpr (UNROLLED) {
    for_each_pixel([&](int i, int j) {
      if (pixels & bit_of(i, j)) add(i, j);
    });
  } else {
    for_each_in(pixels, add);
  }
  return sums.to_corners(cell);
}

// A corner of weight 0 receives nothing, because dz may be NaN.
__device__ inline void add_weighted(float dz, float weight_y, float weight_x, Corners& corners) {
  const auto add_to = [&](float& corner, float weight) {
    if (weight != 0) corner = fmaf(weight, dz, corner);
  };
  add_to(corners.top_left, (1 - weight_y) * (1 - weight_x));
  add_to(corners.top_right, (1 - weight_y) * weight_x);
  add_to(corners.bottom_left, weight_y * (1 - weight_x));
  add_to(corners.bottom_right, weight_y * weight_x);
}

// All terms of class k, of irregular pixels. BY_CLASS: gradients.by_class().
template <bool BY_CLASS>
__device__ Corners irregular_terms(const Cell& cell, const Inputs& inputs, const CellLabels& labels,
                                   unsigned irregular, int k, int first_key) {
  const auto& [all_labels, gradients, maps] = inputs;
  const unsigned with_label = labels.pixels_with_class(k);
  Corners corners;
  for_each_in(irregular, [&](int i, int j) {
    const int64_t pixel = cell.pixel(i, j);
    float slope, label_term;
    if (BY_CLASS || maps.slopes)
      slope = maps.slopes[pixel], label_term = maps.label_terms[pixel];
    else
      slope = label_term = gradients.dlosses[first_key + labels.dynamic_at(i, j)];
    if (!(with_label & bit_of(i, j))) label_term = 0;
    const float p = probability(cell.logits(i, j).z(k), maps.lse[pixel]);
    slope += gradients.slope_of_class(first_key + k, p);
    add_weighted(p * slope - label_term, cell.cells.rows.fraction(cell.row, cell.y + i),
                 cell.cells.columns.fraction(cell.column, cell.x + j), corners);
  });
  return corners;
}

}  // namespace anchorops::cuda

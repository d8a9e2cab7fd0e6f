// e^z of a part's pixels by geometric sequences, from staged logits (cells.cuh says where they
// serve).
#pragma once

#include "../labels/pixel_labels.cuh"
#include "cell.cuh"
#include "cells.cuh"
#include "logits.cuh"
#include "maps.cuh"
#include "part.cuh"
#include "stage.cuh"

namespace anchorops::cuda {

// e^z of a part's pixels: first·x^j·y^i·xy^(ij), times 2^SCALE.
struct Powers {
  float first, x, y, xy;
};

// Calls function(i, j, e^z·2^SCALE) for all pixels of a part.
template <class Function>
__device__ __forceinline__ void for_each_power(const Powers& powers, Function function) {
  float first = powers.first, x = powers.x;
#pragma unroll
  for (int i = 0; i < PART; ++i) {
    float e = first;
#pragma unroll
    for (int j = 0; j < PART; ++j) {
      function(i, j, e);
      e *= x;
    }
    first *= powers.y;
    x *= powers.xy;
  }
}

// The sequences of the part that the cell has selected, of all staged classes.
struct Sequences {
  const Cell& cell;
  const float *a, *b, *c, *d;  // staged logits at the cell's four corners
  unsigned regular;  // bit 2i + j: sequences serve pixels that read i rows and j columns in
                     // addition to the first ones

  // A corner that no regular pixel reads is replaced by one that is read; otherwise the ratios of
  // the others might not be finite.
  template <int CLASSES>
  __device__ Sequences(const Cell& cell, const LogitsStage<CLASSES>& stage) : cell(cell) {
    const Cells& cells = cell.cells;
    const int image = cell.image, row = cell.row, column = cell.column;
    const Shift sa = cells.shift(image, row, column), sb = cells.shift(image, row, column + 1);
    const Shift sc = cells.shift(image, row + 1, column);
    const Shift sd = cells.shift(image, row + 1, column + 1);
    const auto finite = [](const Shift& s) { return s.largest == s.largest; };
    // The bits of the directions in which different positions are read.
    const unsigned reads = (cell.step_x == 0 ? 0 : RIGHT) | (cell.step_y == 0 ? 0 : DOWN);
    const bool first = cell.inside & finite(sa);
    const bool right = first & finite(sb) & !(sa.steep & reads & RIGHT);
    const bool down = first & finite(sc) & !(sa.steep & reads & DOWN);
    const bool both = right & down & finite(sd) & !((sc.steep & RIGHT | sb.steep & DOWN) & reads);
    regular = first | right << 1 | down << 2 | both << 3;
    a = stage.corner();
    b = right ? a + 1 : a;
    c = down ? a + stage.ROW : a;
    d = both ? a + stage.ROW + 1 : right ? b : c;
  }

  // Of the k-th staged class.
  __device__ __forceinline__ Powers powers(int k) const {
    const int at = k * COLUMNS;
    const float down = c[at] - a[at], down_right = d[at] - b[at];
    const float left = fmaf(cell.fraction_y, down, a[at]);
    const float across = fmaf(cell.fraction_y, down_right, b[at]) - left;
    const float cross = down_right - down;
    return {exp2_approximate(fmaf(cell.fraction_x, across, left)),
            exp2_approximate(cell.step_x * across),
            exp2_approximate(cell.step_y * fmaf(cell.fraction_x, cross, down)),
            exp2_approximate(cell.step_x * cell.step_y * cross)};
  }

  // Whether sequences can be used for the pixel, as far as its corners tell.
  __device__ __forceinline__ bool serve(const CellWeights& weights, int i, int j) const {
    return regular >> (weights.reads_below(i) * 2 + weights.reads_right(j)) & 1;
  }

  // Replaces the lse of these pixels by 2^-SCALE/Σ e^z, in units of the pixel's largest logit, and
  // by 0 where the pixel is irregular, and elsewhere. Returns the irregular pixels. shifts: of the
  // corners, as in LogitsStage.
  __device__ __forceinline__ unsigned to_inverse_sums(const Corners& shifts, unsigned pixels,
                                                      PixelValues& lse) const {
    unsigned irregular = 0;
    const CellWeights weights(cell);
    weights.interpolate(shifts, [&](int i, int j, float shift) {
      const float exponent = fmaf(-lse[i][j], LOG2E, -shift);
      const bool serves = serve(weights, i, j) && exponent <= -SCALE - SMALLEST_SUM;
      lse[i][j] = serves && pixels & bit_of(i, j) ? exp2_approximate(exponent) : 0;
      if (!serves) irregular |= pixels & bit_of(i, j);
    });
    return irregular;
  }

  // The same for the valid pixels, from their labels and the map of lse.
  __device__ __forceinline__ unsigned load_inverse_sums(const Corners& shifts,
                                                        const PixelLabels& labels, const float* lse,
                                                        PixelValues& inverse) const {
    CellLabels cell_labels;
    cell_labels.load(labels, cell);
    load_map(cell, cell_labels.valid(), lse, inverse);
    return to_inverse_sums(shifts, cell_labels.valid(), inverse);
  }
};

}  // namespace anchorops::cuda

// Forward and backward over the cells of a tile.

// masses[k] += the sum over pixels of p = factors * e^z; squares[k] += the sum of p^2, if
// requested.
template <int WIDTH>
void add_masses(const CellRow<WIDTH>& row, double* masses, double* squares) {
  using Row = CellRow<WIDTH>;
  using V = Simd<float>;
  const Workspace<float>& workspace = row.workspace;
  for (int64_t k = 0; k < row.problem.layout.dim; ++k) {
    Floats total = {}, total_square = {};
    const auto add = [&](Floats p) INLINE_LAMBDA {
      total += p;
      if (squares) total_square += p * p;
    };
    for (int64_t block = 0; block < row.passes * row.blocks; ++block) {
      const float* factors = workspace.factors[0] + block * Row::PIXELS;
      const Corners z = row.corners(k, block);
      if (z.all_above(FAR)) {
        Series e = row.series(z, block);
        for (int64_t j = 0; j < row.rows; ++j) {
          Floats v = e.first;
#pragma GCC unroll 8
          for (int i = 0; i < WIDTH; ++i) {
            add(v * V::load(factors + j * workspace.lanes + i * Row::L));
            v *= e.right;
          }
          e.next_row();
        }
      } else {
        for (int64_t j = 0; j < row.rows; ++j)
          for (int i = 0; i < WIDTH; ++i) {
            const Floats factor = V::load(factors + j * workspace.lanes + i * Row::L);
            const Floats v = exp<float>(z.at(Floats{} + row.down[j], row.right(block, i)));
            add(factor == 0 ? Floats{} : v * factor);
          }
      }
    }
    double sum = 0, sum_square = 0;
    for (int lane = 0; lane < Row::L; ++lane) {
      sum += total[lane];
      sum_square += total_square[lane];
    }
    if (masses) masses[k] += sum;
    if (squares) squares[k] += sum_square;
  }
}

// Adds a block to the sums and writes its maps. totals: the sums of e^z over the classes. Pixels
// that have the class of their cell are summed cell by cell, the others one by one.
template <int WIDTH>
void add_block(const CellRow<WIDTH>& row, int64_t block, const BlockClasses<WIDTH>& classes,
               const Floats* totals, const Sums& sums, const Maps<float>& maps) {
  using Row = CellRow<WIDTH>;
  constexpr int L = Row::L;
  const Corners of_cell = row.own_corners(block, classes.of_cells), shifts = row.shifts(block);
  const bool finite = of_cell.all_above(-3e38f);
  float of_sums[Row::HEIGHT * Row::PIXELS];
  Floats losses = {}, overlaps = {};
  Ints counts = {};
  for (int64_t j = 0; j < row.rows; ++j) {
    Floats loss[WIDTH], lse[WIDTH];
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH; ++i) {
      const int64_t n = j * WIDTH + i;
      const Ints k = classes.of_pixels(n), same = (k >= 0) & (k == classes.of_cells);
      const Floats right = row.right(block, i), of_sum = log(totals[n]);
      const Floats z = finite ? of_cell.of_finite(row.down[j], right)
                              : of_cell.at(Floats{} + row.down[j], right);
      loss[i] = same ? of_sum - z : Floats{};
      lse[i] = k >= 0 ? of_sum + shifts.of_finite(row.down[j], right) : Floats{};
      losses += loss[i];
      if (sums.overlaps) overlaps += same ? exp<float>(-loss[i]) : Floats{};
      counts -= same;
      Simd<float>::store(of_sums + n * L, of_sum);
    }
    row.store_map(block, j, maps.pixel_losses, loss);
    row.store_map(block, j, maps.lse, lse);
  }
  for (int lane = 0; lane < L; ++lane) {
    const int32_t k = classes.of_cells[lane];
    if (k < 0) continue;
    sums.losses[k] += losses[lane];
    sums.counts[k] += counts[lane];
    if (sums.overlaps) sums.overlaps[k] += overlaps[lane];
  }
  for (int64_t n = 0; n < classes.count; ++n) {
    const int32_t t = classes.others[n], k = classes.classes[t];
    const float loss = of_sums[t] - row.logit(block, t, k);
    sums.losses[k] += loss;
    ++sums.counts[k];
    if (sums.overlaps) sums.overlaps[k] += exp<float>(Floats{} - loss)[0];
    if (maps.pixel_losses)
      row.line_of(maps.pixel_losses, t / Row::PIXELS)[row.columns_of(block)[t % Row::PIXELS]] =
          loss;
  }
}

template <int WIDTH>
void forward_cells(std::integral_constant<int, WIDTH>, const Problem<float>& problem,
                   const Tile& tile, const Workspace<float>& workspace, const Sums& sums,
                   const Maps<float>& maps) {
  using Row = CellRow<WIDTH>;
  using V = Simd<float>;
  constexpr int PIXELS = Row::PIXELS;
  Row row(problem, tile, workspace);
  const bool with_probabilities = sums.masses || sums.squares;
  Sums without_hits = sums;
  without_hits.hits = nullptr;
  while (row.next(Row::HEIGHT)) {
    if (!row.ordinary()) {
      row.for_pixels(-1, [&](const Group<float>& group) {
        forward_group(problem, tile, workspace, group, sums, maps);
      });
      continue;
    }
    for (int64_t block = 0; block < row.passes * row.blocks; ++block) {
      int32_t predicted[Row::HEIGHT * PIXELS];
      Floats totals[Row::HEIGHT * WIDTH] = {};
      BlockClasses<WIDTH> classes;
      row.find_classes(block, classes);
      const bool any_valid = any(classes.of_cells >= 0);
      if (any_valid) sum_block<WIDTH, Term::POWER>(row, 0, block, nullptr, totals);
      Ints steep = {};
      for (int64_t n = 0; n < row.rows * WIDTH; ++n)
        steep |= (classes.of_pixels(n) >= 0) & ~((totals[n] >= STEEP) & (totals[n] <= 1e38f));
      const bool by_cells = any_valid && !any(steep);
      if (with_probabilities)
        for (int64_t n = 0; n < row.rows * WIDTH; ++n) {
          const Ints counts = (classes.of_pixels(n) >= 0) & (Ints{} - by_cells);
          V::store(row.factors(0, block, n / WIDTH, n % WIDTH),
                   counts != 0 ? 1 / totals[n] : Floats{});
        }
      if (sums.hits && any_valid) {
        largest_of_block(row, block, predicted);
        for (int64_t t = 0; t < row.rows * PIXELS; ++t)
          if (const int32_t k = classes.classes[t]; k >= 0) sums.hits[k] += k == predicted[t];
      }
      if (by_cells)
        add_block(row, block, classes, totals, sums, maps);
      else
        row.for_pixels(block, [&](const Group<float>& group) {
          forward_group(problem, tile, workspace, group, without_hits, maps);
        });
    }
    if (with_probabilities) add_masses(row, sums.masses, sums.squares);
  }
}

// Sums of dz over the pixels of each cell of a block: unweighted, and with the weights of the right
// logits, of the lower logits, and of both.
struct WeightedSums {
  Floats all = {}, right = {}, below = {}, right_below = {};
};

// The weighted sums of dz = factor(j, i) * e^z. In row j the powers of e are first * r^i. Therefore
// the sum of dz is a polynomial in r, and the sum of i * dz is r times its derivative. Horner's
// rule computes both without a power for each pixel. The same holds for the sum over the rows: it
// is a polynomial in 1 / (ratio down), beginning with the last row.
template <int WIDTH, class Factor>
ALWAYS_INLINE WeightedSums sums_by_series(const CellRow<WIDTH>& row, const Corners& z,
                                          int64_t block, Factor factor) {
  const float step_right = row.problem.column_cells.step, step_down = row.problem.row_cells.step;
  const float last = row.at_down + (row.rows - 1) * step_down;
  const Floats at_right = row.right_start(block);
  const Slopes slopes(z, at_right);
  Floats r = slopes.ratio_right(row.at_down, step_right);
  const Floats twist = slopes.ratio_twist(step_right, step_down);
  const Floats up = slopes.ratio_down(-step_down);
  Floats all = {}, all_rows = {}, along = {}, along_rows = {};  // _rows: times last row - j
  for (int64_t j = 0; j < row.rows; ++j) {
    Floats sum = factor(j, WIDTH - 1), derivative = sum;
#pragma GCC unroll 8
    for (int i = WIDTH - 2; i >= 0; --i) {
      sum = sum * r + factor(j, i);
      if (i > 0) derivative = derivative * r + sum;
    }
    all_rows = all_rows * up + all;
    along_rows = along_rows * up + along;
    all = all * up + sum;
    along = along * up + derivative * r;
    r *= twist;
  }
  const Floats scale = slopes.power(last);
  const Floats below = last * all - (step_down * up) * all_rows;
  const Floats along_below = last * along - (step_down * up) * along_rows;
  return {scale * all, scale * (at_right * all + step_right * along), scale * below,
          scale * (at_right * below + step_right * along_below)};
}

// The weighted sums of dz = gradient(e^z, j, i), pixel by pixel.
template <int WIDTH, class Gradient>
ALWAYS_INLINE WeightedSums sums_by_pixels(const CellRow<WIDTH>& row, const Corners& z,
                                          int64_t block, Gradient gradient) {
  WeightedSums sums;
  const bool far = !z.all_above(FAR);
  Series e = row.series(z, block);  // not used if far
  for (int64_t j = 0; j < row.rows; ++j) {
    Floats all = {}, of_right = {}, power = e.first;
    for (int i = 0; i < WIDTH; ++i) {
      const Floats right = row.right(block, i);
      const Floats v = far ? exp<float>(z.at(Floats{} + row.down[j], right)) : power;
      const Floats dz = v == v ? gradient(v, j, i) : Floats{};
      all += dz;
      of_right += dz * right;
      power *= e.right;
    }
    sums.all += all;
    sums.right += of_right;
    sums.below += row.down[j] * all;
    sums.right_below += row.down[j] * of_right;
    e.next_row();
  }
  return sums;
}

// gradients += the sum over pixels of weight * dz, with
// dz = e^z * (factors[0] + factors[1] * (dmasses + 2 * p * dsquares)) and p = factors[1] * e^z.
// TERMS is 3 with dsquares, otherwise 2 with dmasses, otherwise 1.
template <int WIDTH, int TERMS>
void add_gradients(const CellRow<WIDTH>& row, const float* dmasses, const float* dsquares) {
  using V = Simd<float>;
  constexpr int L = CellRow<WIDTH>::L;
  const Workspace<float>& workspace = row.workspace;
  for (int64_t k = 0; k < row.problem.layout.dim; ++k) {
    float* above = workspace.gradients[row.upper & 1] + k * workspace.stride + row.first_column;
    float* below = workspace.gradients[row.lower & 1] + k * workspace.stride + row.first_column;
    const float dmass = dmasses ? dmasses[k] : 0, dsquare = dsquares ? 2 * dsquares[k] : 0;
    Floats last_above = {}, last_below = {};
    for (int64_t block = 0; block < row.passes * row.blocks; ++block) {
      const Corners z = row.corners(k, block);
      const auto factor = [&](int64_t j, int i) INLINE_LAMBDA {
        const Floats own = V::load(row.factors(0, block, j, i));
        return TERMS > 1 ? own + V::load(row.factors(1, block, j, i)) * dmass : own;
      };
      const auto gradient = [&](Floats v, int64_t j, int i) INLINE_LAMBDA {
        if constexpr (TERMS < 3) return v * factor(j, i);
        const Floats p = v * V::load(row.factors(1, block, j, i));
        return v * factor(j, i) + p * p * dsquare;
      };
      row.fetch_logits(block, k);
      const bool by_series = TERMS < 3 && z.all_above(FAR);
      const WeightedSums sums = by_series ? sums_by_series(row, z, block, factor)
                                          : sums_by_pixels(row, z, block, gradient);
      const Floats left_below = sums.below - sums.right_below;
      const Floats left_above = sums.all - sums.right - left_below;
      const Floats right_above = sums.right - sums.right_below;
      const int64_t column = row.column_of(block);
      if (column == 0) last_above = last_below = Floats{};
      V::store(above + column,
               V::load(above + column) + left_above + V::shift_up(last_above, right_above));
      V::store(below + column,
               V::load(below + column) + left_below + V::shift_up(last_below, sums.right_below));
      last_above = right_above;
      last_below = sums.right_below;
      if (column + L == row.blocks * L) {
        above[column + L] += right_above[L - 1];
        below[column + L] += sums.right_below[L - 1];
      }
    }
  }
}

// Subtracts the additional terms of the pixels' true classes: values [rows][WIDTH][lanes], 0 if
// there is no class.
template <int WIDTH>
void subtract_own(const CellRow<WIDTH>& row, int64_t block, const BlockClasses<WIDTH>& classes,
                  const float* values) {
  using Row = CellRow<WIDTH>;
  constexpr int L = Row::L;
  const Workspace<float>& workspace = row.workspace;
  const int64_t column = row.first_column + row.column_of(block);
  float* const above = workspace.gradients[row.upper & 1] + column;
  float* const below = workspace.gradients[row.lower & 1] + column;
  const auto subtract = [&](int32_t k, int64_t lane, float left, float right, float left_below,
                            float right_below) INLINE_LAMBDA {
    const int64_t at = k * workspace.stride + lane;
    above[at] -= left - left_below;
    above[at + 1] -= right - right_below;
    below[at] -= left_below;
    below[at + 1] -= right_below;
  };
  Floats left = {}, right = {}, left_below = {}, right_below = {};
  for (int64_t j = 0; j < row.rows; ++j) {
    Floats all = {}, of_right = {};
    for (int i = 0; i < WIDTH; ++i) {
      const int64_t n = j * WIDTH + i;
      const Floats value = Simd<float>::load(values + n * L);
      const Floats of_cell = classes.of_pixels(n) == classes.of_cells ? value : Floats{};
      all += of_cell;
      of_right += of_cell * row.right(block, i);
    }
    left += all - of_right;
    right += of_right;
    left_below += row.down[j] * (all - of_right);
    right_below += row.down[j] * of_right;
  }
  for (int lane = 0; lane < L; ++lane)
    if (classes.of_cells[lane] >= 0)
      subtract(classes.of_cells[lane], lane, left[lane], right[lane], left_below[lane],
               right_below[lane]);
  for (int64_t n = 0; n < classes.count; ++n) {
    const int32_t t = classes.others[n];
    const float down = row.down[t / Row::PIXELS];
    const float r = values[t] * workspace.cell_weights[block * Row::PIXELS + t % Row::PIXELS];
    const float l = values[t] - r;
    subtract(classes.classes[t], t % L, l, r, l * down, r * down);
  }
}

// Writes the factors of a block's pixels and the additional terms of their true classes. Returns
// false if the block must be processed pixel by pixel. If logits are large, the rounding of lse
// would be an error of all p. Then the sums are computed again.
template <int WIDTH>
bool factors_of_block(const CellRow<WIDTH>& row, int64_t block, const BlockClasses<WIDTH>& classes,
                      const Gradients<float>& gradients, const float* dmasses,
                      const float* dsquares, float* own) {
  using V = Simd<float>;
  constexpr int H = CellRow<WIDTH>::HEIGHT, L = CellRow<WIDTH>::L;
  const int64_t of_image = row.tile.image * gradients.stride_b;
  const auto of_class = [&](const float* by_class, Ints k) INLINE_LAMBDA {
    return by_class ? gather(by_class + of_image, k, 0.0f) : Floats{};
  };
  const bool any_valid = any(classes.of_cells >= 0);
  const Corners shifts = row.shifts(block);
  const bool large = shifts.any_beyond(LARGE);
  Floats powers[H * WIDTH] = {}, totals[H * WIDTH] = {}, squares[H * WIDTH] = {};
  Ints steep = {};
  for (int64_t j = 0; j < row.rows; ++j) {
    if (any_valid && j % H == 0) {
      if (large) sum_block<WIDTH, Term::POWER>(row, j, block, nullptr, powers);
      if (dmasses) sum_block<WIDTH, Term::WEIGHTED>(row, j, block, dmasses, totals);
      if (dsquares) sum_block<WIDTH, Term::SQUARE>(row, j, block, dsquares, squares);
    }
    Floats lse[WIDTH], dpixel_losses[WIDTH], dlse[WIDTH];
    row.load_map(block, j, row.lse_map(gradients.lse), lse);
    row.load_map(block, j, gradients.dpixel_losses, dpixel_losses);
    row.load_map(block, j, gradients.dlse, dlse);
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH; ++i) {
      const Ints k = classes.of_pixels(j * WIDTH + i), valid = k >= 0;
      const int64_t n = j % H * WIDTH + i;
      const Floats of_sum =
          large ? log(powers[n]) : lse[i] - shifts.of_finite(row.down[j], row.right(block, i));
      steep |= valid & ~((of_sum >= LOG_STEEP) & (of_sum <= 80.0f));
      const Floats q = exp<float>(-of_sum);
      Floats of_own = of_class(gradients.dlosses, k) + dpixel_losses[i];
      Floats rest = of_own + dlse[i];
      rest -= (totals[n] + 2 * q * squares[n]) * q;
      if (gradients.doverlaps) {
        const Floats z = row.own_corners(block, k).at(Floats{} + row.down[j], row.right(block, i));
        const Floats of_overlap = exp<float>(z - of_sum) * of_class(gradients.doverlaps, k);
        rest -= of_overlap;
        of_own -= of_overlap;
      }
      V::store(row.factors(0, block, j, i), valid ? rest * q : Floats{});
      if (dmasses || dsquares) V::store(row.factors(1, block, j, i), valid ? q : Floats{});
      V::store(own + (j * WIDTH + i) * L, valid ? of_own : Floats{});
    }
  }
  return !any(steep);
}

template <int WIDTH, class Begin>
void backward_cells(std::integral_constant<int, WIDTH>, const Problem<float>& problem,
                    const Tile& tile, const Workspace<float>& workspace,
                    const Gradients<float>& gradients, Begin finish_until) {
  using Row = CellRow<WIDTH>;
  using V = Simd<float>;
  constexpr int PIXELS = Row::PIXELS;
  Row row(problem, tile, workspace);
  const int64_t of_image = tile.image * gradients.stride_b;
  const float* dmasses = gradients.dmasses ? gradients.dmasses + of_image : nullptr;
  const float* dsquares = gradients.dsquares ? gradients.dsquares + of_image : nullptr;
  while (row.next(ROWS)) {
    finish_until(row.upper);
    const auto backward_pixels = [&](const Group<float>& group) {
      backward_group(problem, tile, workspace, gradients, group);
    };
    if (!row.ordinary()) {
      row.for_pixels(-1, backward_pixels);
      continue;
    }
    for (int64_t block = 0; block < row.passes * row.blocks; ++block) {
      BlockClasses<WIDTH> classes;
      float own[ROWS * PIXELS];
      row.find_classes(block, classes);
      if (factors_of_block(row, block, classes, gradients, dmasses, dsquares, own)) {
        subtract_own(row, block, classes, own);
        continue;
      }
      for (int64_t j = 0; j < row.rows; ++j)
        for (int i = 0; i < WIDTH; ++i) {
          V::store(row.factors(0, block, j, i), Floats{});
          V::store(row.factors(1, block, j, i), Floats{});
        }
      row.for_pixels(block, backward_pixels);
    }
    const auto add = dsquares  ? add_gradients<WIDTH, 3>
                     : dmasses ? add_gradients<WIDTH, 2>
                               : add_gradients<WIDTH, 1>;
    add(row, dmasses, dsquares);
  }
}

// Calls visit with the WIDTH for this problem, as a constant.
template <class Visit>
void for_widths(const Problem<float>& problem, Visit visit) {
  const int64_t most = problem.column_cells.most, passes = (most + 7) / 8;
  const int64_t width = (most + passes - 1) / passes;
  if (width <= 2) return visit(std::integral_constant<int, 2>{});
  if (width == 3) return visit(std::integral_constant<int, 3>{});
  if (width == 4) return visit(std::integral_constant<int, 4>{});
  if (width <= 6) return visit(std::integral_constant<int, 6>{});
  return visit(std::integral_constant<int, 8>{});
}

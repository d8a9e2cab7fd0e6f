// Forward and backward over the cells of a tile.

// masses[k] += the sum over pixels of p = factors * e^z; squares[k] += that of its squares, where
// they are asked for.
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

template <int WIDTH>
void forward_cells(std::integral_constant<int, WIDTH>, const Problem<float>& problem,
                   const Tile& tile, const Workspace<float>& workspace, const Sums& sums,
                   const Maps<float>& maps) {
  using Row = CellRow<WIDTH>;
  using V = Simd<float>;
  constexpr int H = height_of(WIDTH), L = Row::L, PIXELS = Row::PIXELS;
  Row row(problem, tile, workspace);
  const bool with_probabilities = sums.masses || sums.squares;
  Sums without_hits = sums;
  without_hits.hits = nullptr;
  while (row.next(H)) {
    if (!row.ordinary()) {
      row.for_pixels(-1, [&](const Group<float>& group) {
        forward_group(problem, tile, workspace, group, sums, maps);
      });
      continue;
    }
    RunningTotal<double> losses(sums.losses), overlaps(sums.overlaps);
    RunningTotal<int64_t> counts(sums.counts);
    for (int64_t block = 0; block < row.passes * row.blocks; ++block) {
      int32_t classes[H * PIXELS], predicted[H * PIXELS];
      float loss[PIXELS], lse[PIXELS], overlap[PIXELS];
      Floats totals[H * WIDTH];
      const bool any_valid = row.classes_of(block, classes);
      if (any_valid) sum_block<WIDTH, Term::POWER>(row, 0, block, nullptr, totals);
      Ints steep = {};
      for (int64_t n = 0; n < row.rows * WIDTH; ++n) {
        Ints valid;
        std::memcpy(&valid, classes + n * L, sizeof valid);
        steep |= (valid >= 0) & ~((totals[n] >= STEEP) & (totals[n] <= 1e38f));
      }
      const bool by_pixel = any_valid && any(steep);
      if (sums.hits && any_valid) {
        largest_of_block(row, block, predicted);
        for (int64_t t = 0; t < row.rows * PIXELS; ++t)
          if (classes[t] >= 0) sums.hits[classes[t]] += classes[t] == predicted[t];
      }
      if (by_pixel)
        row.for_pixels(block, [&](const Group<float>& group) {
          forward_group(problem, tile, workspace, group, without_hits, maps);
        });
      if (with_probabilities)
        for (int64_t n = 0; n < row.rows * WIDTH; ++n) {
          Ints valid;
          std::memcpy(&valid, classes + n * L, sizeof valid);
          const bool counted = any_valid && !by_pixel;
          V::store(
              workspace.factors[0] + n / WIDTH * workspace.lanes + block * PIXELS + n % WIDTH * L,
              counted ? (valid >= 0 ? 1 / totals[n] : Floats{}) : Floats{});
        }
      if (by_pixel) continue;
      const int32_t* columns = row.columns_of(block);
      for (int64_t j = 0; j < row.rows; ++j) {
        const int32_t* of_row = classes + j * PIXELS;
        for (int i = 0; any_valid && i < WIDTH; ++i) {
          const Floats of_sum = log(totals[j * WIDTH + i]);
          const Floats of_pixel = of_sum - row.own(block, of_row + i * L, j, i);
          V::store(loss + i * L, of_pixel);
          if (maps.lse) V::store(lse + i * L, of_sum + row.shift(block, j, i));
          if (sums.overlaps) V::store(overlap + i * L, exp<float>(-of_pixel));
        }
        const int64_t line = (tile.image * problem.rows.size + row.y + j) * problem.columns.size +
                             tile.label_columns.begin;
        for (int t = 0; t < PIXELS; ++t) {
          const int32_t k = of_row[t];
          if (columns[t] < 0) continue;
          if (maps.pixel_losses) maps.pixel_losses[line + columns[t]] = k < 0 ? 0 : loss[t];
          if (maps.lse) maps.lse[line + columns[t]] = k < 0 ? 0 : lse[t];
          if (k < 0) continue;
          losses.add(k, loss[t]);
          counts.add(k, 1);
          if (sums.overlaps) overlaps.add(k, overlap[t]);
        }
      }
    }
    if (with_probabilities) add_masses(row, sums.masses, sums.squares);
  }
}

// Moves the lanes up by one; the last lane of before comes first.
ALWAYS_INLINE Floats shift_up(Floats before, Floats v) {
  constexpr int L = LANES<float>;
  float both[2 * L];
  Simd<float>::store(both, before);
  Simd<float>::store(both + L, v);
  return Simd<float>::load(both + L - 1);
}

// gradients += the sum over pixels of weight * dz, with dz = e^z * (factors[0] + factors[1] *
// (dmasses
// + 2 * p * dsquares)) and p = factors[1] * e^z. TERMS: how many of the three there are.
template <int WIDTH, int TERMS>
void add_gradients(const CellRow<WIDTH>& row, const float* dmasses, const float* dsquares) {
  using Row = CellRow<WIDTH>;
  using V = Simd<float>;
  constexpr int L = Row::L;
  const Workspace<float>& workspace = row.workspace;
  for (int64_t k = 0; k < row.problem.layout.dim; ++k) {
    float* above = workspace.gradients[row.upper & 1] + k * workspace.stride + row.first_column;
    float* below = workspace.gradients[row.lower & 1] + k * workspace.stride + row.first_column;
    const float dmass = dmasses ? dmasses[k] : 0, dsquare = dsquares ? 2 * dsquares[k] : 0;
    Floats last_above = {}, last_below = {};
    for (int64_t block = 0; block < row.passes * row.blocks; ++block) {
      const Corners z = row.corners(k, block);
      const auto gradient = [&](Floats v, int64_t j, int i) INLINE_LAMBDA {
        const int64_t at = j * workspace.lanes + block * Row::PIXELS + i * L;
        Floats factor = V::load(workspace.factors[0] + at);
        if constexpr (TERMS > 1) {
          const Floats q = V::load(workspace.factors[1] + at);
          factor += q * (TERMS > 2 ? v * q * dsquare + dmass : Floats{} + dmass);
        }
        return v * factor;
      };
      Floats left = {}, right = {}, left_below = {}, right_below = {};
      const auto add_row = [&](int64_t j, Floats all, Floats of_right) INLINE_LAMBDA {
        const Floats of_left = all - of_right;
        left += of_left;
        right += of_right;
        left_below += row.down[j] * of_left;
        right_below += row.down[j] * of_right;
      };
      if (z.all_above(FAR)) {
        Series e = row.series(z, block);
        for (int64_t j = 0; j < row.rows; ++j) {
          Floats v = e.first, all = {}, of_right = {};
#pragma GCC unroll 8
          for (int i = 0; i < WIDTH; ++i) {
            const Floats dz = gradient(v, j, i);
            all += dz;
            of_right += dz * row.right(block, i);
            v *= e.right;
          }
          add_row(j, all, of_right);
          e.next_row();
        }
      } else {
        for (int64_t j = 0; j < row.rows; ++j) {
          Floats all = {}, of_right = {};
          for (int i = 0; i < WIDTH; ++i) {
            const Floats v = exp<float>(z.at(Floats{} + row.down[j], row.right(block, i)));
            const Floats dz = v == v ? gradient(v, j, i) : Floats{};
            all += dz;
            of_right += dz * row.right(block, i);
          }
          add_row(j, all, of_right);
        }
      }
      const Floats right_above = right - right_below;
      const int64_t column = row.column_of(block);
      if (column == 0) last_above = last_below = Floats{};
      V::store(above + column,
               V::load(above + column) + (left - left_below) + shift_up(last_above, right_above));
      V::store(below + column,
               V::load(below + column) + left_below + shift_up(last_below, right_below));
      last_above = right_above;
      last_below = right_below;
      if (column + L == row.blocks * L) {
        above[column + L] += right_above[L - 1];
        below[column + L] += right_below[L - 1];
      }
    }
  }
}

// Subtracts what the pixels' own classes have of their own: values [rows][WIDTH][lanes], where
// classes are not negative.
template <int WIDTH>
void subtract_own(const CellRow<WIDTH>& row, int64_t block, const int32_t* classes,
                  const float* values) {
  using Row = CellRow<WIDTH>;
  constexpr int L = Row::L;
  const Workspace<float>& workspace = row.workspace;
  const int64_t column = row.first_column + row.column_of(block);
  const float* weights = workspace.cell_weights + block * Row::PIXELS;
  for (int lane = 0; lane < L; ++lane) {
    int32_t k = -1;
    float sums[4] = {};
    const auto flush = [&]() INLINE_LAMBDA {
      if (k < 0) return;
      float* above = workspace.gradients[row.upper & 1] + k * workspace.stride + column + lane;
      above[0] -= sums[0];
      above[1] -= sums[1];
      float* below = workspace.gradients[row.lower & 1] + k * workspace.stride + column + lane;
      below[0] -= sums[2];
      below[1] -= sums[3];
    };
    for (int64_t j = 0; j < row.rows; ++j)
      for (int i = 0; i < WIDTH; ++i) {
        const int64_t at = j * Row::PIXELS + i * L + lane;
        if (classes[at] < 0) continue;
        if (classes[at] != k) {
          flush();
          k = classes[at];
          for (float& sum : sums) sum = 0;
        }
        const float right = values[at] * weights[i * L + lane], left = values[at] - right;
        sums[0] += left * (1 - row.down[j]);
        sums[1] += right * (1 - row.down[j]);
        sums[2] += left * row.down[j];
        sums[3] += right * row.down[j];
      }
    flush();
  }
}

template <int WIDTH, class Begin>
void backward_cells(std::integral_constant<int, WIDTH>, const Problem<float>& problem,
                    const Tile& tile, const Workspace<float>& workspace,
                    const Gradients<float>& gradients, Begin finish_until) {
  using Row = CellRow<WIDTH>;
  using V = Simd<float>;
  constexpr int H = height_of(WIDTH), L = Row::L, PIXELS = Row::PIXELS;
  Row row(problem, tile, workspace);
  const int64_t of_image = tile.image * gradients.stride_b;
  const auto of_class = [&](const float* by_class, int32_t k)
                            INLINE_LAMBDA { return by_class ? by_class[of_image + k] : 0.0f; };
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
      int32_t classes[ROWS * PIXELS];
      float lse[PIXELS], own[ROWS * PIXELS], of_lse[PIXELS], overlaps[PIXELS];
      float* factors[2] = {workspace.factors[0] + block * PIXELS,
                           workspace.factors[1] + block * PIXELS};
      const bool any_valid = row.classes_of(block, classes);
      const int32_t* columns = row.columns_of(block);
      Floats totals[H * WIDTH] = {}, squares[H * WIDTH] = {};
      Ints steep = {};
      for (int64_t j = 0; j < row.rows; ++j) {
        const int32_t* of_row = classes + j * PIXELS;
        if (any_valid && j % H == 0) {
          if (dmasses) sum_block<WIDTH, Term::WEIGHTED>(row, j, block, dmasses, totals);
          if (dsquares) sum_block<WIDTH, Term::SQUARE>(row, j, block, dsquares, squares);
        }
        const int64_t y = row.y + j;
        const float* line = gradients.lse +
                            (tile.image * problem.rows.size + y) * problem.columns.size +
                            tile.label_columns.begin;
        for (int t = 0; t < PIXELS; ++t) {
          const int32_t k = of_row[t];
          lse[t] = k < 0 ? 0 : line[columns[t]];
          own[j * PIXELS + t] = k < 0 ? 0 : of_class(gradients.dlosses, k);
          overlaps[t] = k < 0 ? 0 : of_class(gradients.doverlaps, k);
          of_lse[t] = 0;
        }
        if (gradients.dpixel_losses.data || gradients.dlse.data)
          for (int t = 0; t < PIXELS; ++t) {
            if (of_row[t] < 0) continue;
            const int64_t x = tile.label_columns.begin + columns[t];
            own[j * PIXELS + t] += value(gradients.dpixel_losses, tile.image, y, x);
            of_lse[t] = value(gradients.dlse, tile.image, y, x);
          }
        for (int i = 0; i < WIDTH; ++i) {
          Ints valid;
          std::memcpy(&valid, of_row + i * L, sizeof valid);
          const Floats of_sum = V::load(lse + i * L) - row.shift(block, j, i);
          steep |= (valid >= 0) & ~((of_sum >= LOG_STEEP) & (of_sum <= 80.0f));
          const Floats q = valid >= 0 ? exp<float>(-of_sum) : Floats{};
          float* of_own = own + j * PIXELS + i * L;
          Floats rest = V::load(of_own) + V::load(of_lse + i * L);
          const int64_t n = j % H * WIDTH + i;
          rest -= (totals[n] + 2 * q * squares[n]) * q;
          if (gradients.doverlaps) {
            const Floats p = exp<float>(row.own(block, of_row + i * L, j, i) - of_sum);
            const Floats of_overlap = valid >= 0 ? p * V::load(overlaps + i * L) : Floats{};
            rest -= of_overlap;
            V::store(of_own, V::load(of_own) - of_overlap);
          }
          V::store(factors[0] + j * workspace.lanes + i * L, valid >= 0 ? rest * q : Floats{});
          if (dmasses || dsquares) V::store(factors[1] + j * workspace.lanes + i * L, q);
        }
      }
      if (!any_valid) continue;
      if (!any(steep)) {
        subtract_own(row, block, classes, own);
        continue;
      }
      for (int64_t j = 0; j < row.rows; ++j)
        for (const auto* factor : factors)
          std::memset(const_cast<float*>(factor) + j * workspace.lanes, 0, PIXELS * sizeof(float));
      row.for_pixels(block, backward_pixels);
    }
    const auto add = dsquares  ? add_gradients<WIDTH, 3>
                     : dmasses ? add_gradients<WIDTH, 2>
                               : add_gradients<WIDTH, 1>;
    add(row, dmasses, dsquares);
  }
}

// Calls visit with the WIDTH that serves the problem, as a constant.
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

// Softmax moments pixel by pixel, for any ratio of sizes and any values: one exponential for each
// pixel and class, after subtracting the exact maximum of the pixel.

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

// Up to GROUP labels of one row, in order, their classes and the logits around them.
template <class Stat>
struct Group {
  int64_t y, count = 0;
  Position<Stat> row;
  bool same;  // each label is one logit, and these are adjacent
  int64_t x[GROUP];
  int32_t classes[GROUP], lower[GROUP], upper[GROUP];  // packed columns
  Stat weight[GROUP];

  void add(const Axis<Stat>& columns, const Tile& tile, int64_t label, int32_t of_class) {
    const auto at = position(columns, label);
    x[count] = label;
    classes[count] = of_class;
    lower[count] = static_cast<int32_t>(at.lower - tile.columns.begin + 1);
    upper[count] = static_cast<int32_t>(at.upper - tile.columns.begin + 1);
    weight[count++] = at.weight;
  }

  void fill_up() {  // so that whole vectors can be read beyond the last label
    for (int64_t t = count; t % LANES<Stat>; ++t) {
      lower[t] = upper[t] = lower[0];
      classes[t] = -1;
      weight[t] = 0;
    }
  }
  int64_t first() const { return lower[0]; }
  int64_t last() const { return upper[count - 1]; }
};

// (1 - weight) * low + weight * high; with weight 0, high is not used.
template <class Vec>
ALWAYS_INLINE Vec blend(Vec low, Vec high, Vec weight) {
  return weight == 0 ? low : (1 - weight) * low + weight * high;
}

// The upsampled values of two packed lines at the group's pixels. line: scratch.
template <class Stat>
ALWAYS_INLINE void upsample(const Group<Stat>& group, const Stat* low, const Stat* high, Stat* line,
                            int64_t pixels, Stat* out) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  constexpr int L = LANES<Stat>;
  const Stat* between = low;
  if (group.row.weight != 0) {
    for (int64_t j = group.first(); j <= group.last(); j += L)
      V::store(line + j, blend(V::load(low + j), V::load(high + j), Vec{} + group.row.weight));
    between = line;
  }
  for (int64_t t = 0; t < pixels; t += L) {
    if (group.same) {
      V::store(out + t, V::load(between + group.first() + t));
      continue;
    }
    Vec left, right;
    for (int i = 0; i < L; ++i) {
      left[i] = between[group.lower[t + i]];
      right[i] = between[group.upper[t + i]];
    }
    V::store(out + t, blend(left, right, V::load(group.weight + t)));
  }
}

template <class Stat>
ALWAYS_INLINE int64_t round_up_to_lanes(int64_t n) {
  return (n + LANES<Stat> - 1) / LANES<Stat> * LANES<Stat>;
}

template <class Stat>
ALWAYS_INLINE void upsample_classes(const Problem<Stat>& problem, const Workspace<Stat>& workspace,
                                    const Group<Stat>& group) {
  const int64_t pixels = round_up_to_lanes<Stat>(group.count);
  for (int64_t k = 0; k < problem.layout.dim; ++k)
    upsample(group, workspace.packed[group.row.lower & 1] + k * workspace.stride,
             workspace.packed[group.row.upper & 1] + k * workspace.stride, workspace.line, pixels,
             workspace.upsampled + k * workspace.group);
}

// The class of the largest logit of each pixel: the first of equal ones; NaN is larger than all.
template <class Stat>
ALWAYS_INLINE void largest_of_group(const Problem<Stat>& problem, const Workspace<Stat>& workspace,
                                    const Group<Stat>& group, int32_t* classes) {
  using Vec = VecOf<Stat>;
  using Index = decltype(Vec{} < Vec{});
  for (int64_t t = 0; t < group.count; t += LANES<Stat>) {
    Vec largest = Simd<Stat>::load(workspace.upsampled + t);
    Index index = {};
    for (int64_t k = 1; k < problem.layout.dim; ++k) {
      const Vec z = Simd<Stat>::load(workspace.upsampled + k * workspace.group + t);
      const Index larger = (z > largest) | ((z != z) & (largest == largest));
      largest = larger ? z : largest;
      index = larger ? Index{} + static_cast<std::remove_cvref_t<decltype(index[0])>>(k) : index;
    }
    for (int i = 0; i < LANES<Stat>; ++i) classes[t + i] = static_cast<int32_t>(index[i]);
  }
}

// log x for x of at least 0, also if x is not finite.
template <class Vec>
ALWAYS_INLINE Vec log_of_sum(Vec x) {
  if constexpr (std::is_same_v<Vec, VecOf<float>>) {
    bool normal = true;
    for (int i = 0; i < LANES<float>; ++i) normal = normal & (x[i] >= 1e-37f) & (x[i] <= 3e38f);
    if (normal) return log(x);
  }
  for (size_t lane = 0; lane < sizeof x / sizeof x[0]; ++lane) x[lane] = std::log(x[lane]);
  return x;
}

// One vector of pixels, z at [k * stride]: returns their lse, and with PROBABILITIES z becomes p.
// As torch's logsumexp and softmax if values are not finite.
template <class Stat, bool PROBABILITIES>
ALWAYS_INLINE VecOf<Stat> normalize(Stat* z, int64_t num_classes, int64_t stride) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  Vec largest = V::load(z);
  for (int64_t k = 1; k < num_classes; ++k) largest = maximum(largest, V::load(z + k * stride));
  largest = largest - largest == 0 ? largest : Vec{};
  Vec total = {};
  for (int64_t first = 0; first < num_classes; first += 128) {
    Vec sum = {};  // sums of few terms, to keep rounding errors small
    for (int64_t k = first; k < std::min<int64_t>(first + 128, num_classes); ++k) {
      const Vec e = exp<Stat>(V::load(z + k * stride) - largest);
      if (PROBABILITIES) V::store(z + k * stride, e);
      sum += e;
    }
    total += sum;
  }
  if (PROBABILITIES)
    for (int64_t k = 0; k < num_classes; ++k)
      V::store(z + k * stride, V::load(z + k * stride) * (1 / total));
  return largest + log_of_sum(total);
}

template <class Stat>
ALWAYS_INLINE Stat value(const Map<Stat>& map, int64_t image, int64_t y, int64_t x) {
  if (!map.data) return 0;
  return map.data[image * map.stride_b + y * map.stride_h + x * map.stride_w];
}

// Adds a group to the sums and writes its maps.
template <class Stat>
void forward_group(const Problem<Stat>& problem, const Tile& tile, const Workspace<Stat>& workspace,
                   const Group<Stat>& group, const Sums& sums, const Maps<Stat>& maps) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  constexpr int L = LANES<Stat>;
  const int64_t num_classes = problem.layout.dim;
  const bool with_probabilities = sums.masses || sums.squares;
  const int64_t line = (tile.image * problem.rows.size + group.y) * problem.columns.size;
  Stat shift[GROUP], own[GROUP] = {}, lse[GROUP], overlap[GROUP];
  int32_t predicted[GROUP];
  upsample_classes(problem, workspace, group);
  upsample(group, workspace.shifts[group.row.lower & 1], workspace.shifts[group.row.upper & 1],
           workspace.line, round_up_to_lanes<Stat>(group.count), shift);
  if (sums.hits) largest_of_group(problem, workspace, group, predicted);
  for (int64_t t = 0; t < group.count; ++t)
    if (group.classes[t] >= 0) own[t] = workspace.upsampled[group.classes[t] * workspace.group + t];
  for (int64_t t = 0; t < group.count; t += L) {
    const auto of_pixels = with_probabilities ? normalize<Stat, true> : normalize<Stat, false>;
    V::store(lse + t, of_pixels(workspace.upsampled + t, num_classes, workspace.group));
  }
  for (int64_t t = 0; t < group.count; t += L)
    V::store(overlap + t, sums.overlaps ? exp<Stat>(V::load(own + t) - V::load(lse + t)) : Vec{});
  for (int64_t t = 0; t < group.count; ++t) {
    const int64_t k = group.classes[t];
    const Stat loss = k < 0 ? 0 : not_below_0(lse[t] - own[t]);
    if (maps.pixel_losses) maps.pixel_losses[line + group.x[t]] = loss;
    if (maps.lse) maps.lse[line + group.x[t]] = k < 0 ? 0 : lse[t] + shift[t];
    if (k < 0) continue;
    sums.losses[k] += loss;
    ++sums.counts[k];
    if (sums.hits) sums.hits[k] += predicted[t] == k;
    if (sums.overlaps) sums.overlaps[k] += overlap[t];
  }
  if (!with_probabilities) return;
  Stat valid[GROUP] = {};  // 1 or 0
  for (int64_t t = 0; t < group.count; ++t) valid[t] = group.classes[t] >= 0;
  for (int64_t k = 0; k < num_classes; ++k) {
    Vec mass = {}, square = {};
    for (int64_t t = 0; t < group.count; t += L) {
      const Vec p = V::load(workspace.upsampled + k * workspace.group + t);
      mass += V::load(valid + t) != 0 ? p : Vec{};
      square += V::load(valid + t) != 0 ? p * p : Vec{};
    }
    for (int lane = 0; lane < L; ++lane) {
      if (sums.masses) sums.masses[k] += mass[lane];
      if (sums.squares) sums.squares[k] += square[lane];
    }
  }
}

// Replaces workspace.upsampled by dz of the group's pixels.
template <class Stat>
void gradients_of_group(const Problem<Stat>& problem, const Tile& tile,
                        const Workspace<Stat>& workspace, const Gradients<Stat>& gradients,
                        const Group<Stat>& group) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  constexpr int L = LANES<Stat>;
  const int64_t num_classes = problem.layout.dim;
  const int32_t* classes = group.classes;
  const int64_t of_image = tile.image * gradients.stride_b;
  const auto by_class = [&](const Stat* of_class, int64_t k)
                            INLINE_LAMBDA { return of_class ? of_class[of_image + k] : Stat(0); };
  Stat own_gradient[GROUP] = {}, factor[GROUP] = {};
  Stat valid[GROUP] = {};  // 1 or 0
  upsample_classes(problem, workspace, group);
  for (int64_t t = 0; t < group.count; ++t) {
    const int64_t k = classes[t], x = group.x[t];
    if (k < 0) continue;
    valid[t] = 1;
    own_gradient[t] =
        by_class(gradients.dlosses, k) + value(gradients.dpixel_losses, tile.image, group.y, x);
    factor[t] = own_gradient[t] + value(gradients.dlse, tile.image, group.y, x);
  }

  const bool with_u = gradients.dmasses || gradients.dsquares;
  const auto u = [&](Vec p, int64_t k) INLINE_LAMBDA {
    return by_class(gradients.dmasses, k) + 2 * p * by_class(gradients.dsquares, k);
  };

  // dz = p * (factor + u - total) - own_gradient at the true class, total = sum of p * u
  for (int64_t t = 0; t < group.count; t += L) {
    const Vec is_valid = V::load(valid + t);
    normalize<Stat, true>(workspace.upsampled + t, num_classes, workspace.group);
    Vec total = {};
    for (int64_t k = 0; with_u && k < num_classes; ++k) {
      const Vec p = V::load(workspace.upsampled + k * workspace.group + t);
      total += p * u(p, k);
    }
    for (int i = 0; gradients.doverlaps && i < std::min<int64_t>(L, group.count - t); ++i) {
      if (classes[t + i] < 0) continue;
      const Stat of_own = workspace.upsampled[classes[t + i] * workspace.group + t + i] *
                          by_class(gradients.doverlaps, classes[t + i]);
      total[i] += of_own;
      own_gradient[t + i] -= of_own;
    }
    const Vec rest = V::load(factor + t) - total;
    for (int64_t k = 0; k < num_classes; ++k) {
      Stat* z = workspace.upsampled + k * workspace.group + t;
      const Vec p = V::load(z);
      V::store(z, is_valid != 0 ? p * (with_u ? rest + u(p, k) : rest) : Vec{});
    }
  }
  for (int64_t t = 0; t < group.count; ++t)
    if (classes[t] >= 0) workspace.upsampled[classes[t] * workspace.group + t] -= own_gradient[t];
}

// Adds the gradients of the logits that a group reads.
template <class Stat>
void backward_group(const Problem<Stat>& problem, const Tile& tile,
                    const Workspace<Stat>& workspace, const Gradients<Stat>& gradients,
                    const Group<Stat>& group) {
  const int64_t stride = workspace.stride, first = group.first(), last = group.last();
  const Position<Stat>& row = group.row;
  gradients_of_group(problem, tile, workspace, gradients, group);
  for (int64_t k = 0; k < problem.layout.dim; ++k) {
    const Stat* dz = workspace.upsampled + k * workspace.group;
    if (group.same && row.weight == 0) {
      Stat* gradients = workspace.gradients[row.lower & 1] + k * stride + first;
      for (int64_t t = 0; t < group.count; ++t) gradients[t] += dz[t];
      continue;
    }
    Stat* line = workspace.line;
    for (int64_t j = first; j <= last; ++j) line[j] = 0;
    for (int64_t t = 0; t < group.count; ++t) {
      line[group.lower[t]] += (1 - group.weight[t]) * dz[t];
      if (group.weight[t] != 0) line[group.upper[t]] += group.weight[t] * dz[t];
    }
    Stat* low = workspace.gradients[row.lower & 1] + k * stride;
    Stat* high = workspace.gradients[row.upper & 1] + k * stride;
    for (int64_t j = first; j <= last; ++j) low[j] += (1 - row.weight) * line[j];
    if (row.weight == 0) continue;
    for (int64_t j = first; j <= last; ++j) high[j] += row.weight * line[j];
  }
}

// Calls visit(group) for the labels of a tile, pixel by pixel, with packed logits. For each row of
// labels it first calls begin(the first row of logits that is still read).
template <class Stat, class Begin, class Visit>
ALWAYS_INLINE void for_groups(const Problem<Stat>& problem, const Tile& tile,
                              const Workspace<Stat>& workspace, Begin begin, Visit visit) {
  PackedRows<Stat> rows;
  Group<Stat> group;
  group.same = !problem.columns.lower;
  const Range& columns = tile.label_columns;
  for (group.y = tile.label_rows.begin; group.y < tile.label_rows.end; ++group.y) {
    group.row = position(problem.rows, group.y);
    begin(group.row.lower);
    rows.need(problem, tile, group.row.lower, workspace);
    rows.need(problem, tile, group.row.upper, workspace);
    if (problem.labels.read)
      problem.labels.read(problem.labels, tile.image, group.y, columns, workspace.classes);
    for (int64_t x = columns.begin; x < columns.end;) {
      group.count = 0;
      for (; group.count < workspace.group && x < columns.end; ++x)
        group.add(problem.columns, tile, x, workspace.classes[x - columns.begin]);
      group.fill_up();
      visit(group);
    }
  }
}

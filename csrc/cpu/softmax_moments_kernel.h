// The vector kernels of softmax moments. Included once per instruction set, in its namespace.
//
// Logits are packed less the largest of their position, the shift: lse is the log of the sum of
// their exponentials, plus the upsampled shift.

template <class Stat>
using VecOf = typename Simd<Stat>::Vec;

template <class Stat>
constexpr int LANES = Simd<Stat>::LANES;

constexpr float LOG2_E = 1.44269504f;

// e^x; right for every x, also where it is not finite.
template <class Stat>
ALWAYS_INLINE VecOf<Stat> exp(VecOf<Stat> x) {
  using Vec = VecOf<Stat>;
  if constexpr (std::is_same_v<Stat, double>) {
    Vec result;
    for (int i = 0; i < LANES<double>; ++i) result[i] = std::exp(x[i]);
    return result;
  } else {
    using Bits = typename Simd<float>::Bits;
    // x = n ln 2 + f; adding 3 * 2^22 rounds to an integer, which is in the low bits then
    const Vec shifted = x * LOG2_E + 0x1.8p23f;
    const Vec n = shifted - 0x1.8p23f;
    const Vec f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vec p = f * 0.00138368418f + 0.00837481579f;  // relative error 2e-9
    p = p * f + 0.0416682256f;
    p = p * f + 0.166664202f;
    p = p * f + 0.499999921f;
    p = p * f + 1.00000004f;
    p = p * f + 1.0f;
    p *= Vec((Bits(shifted) + 127) << 23);
    p = x < -87.3f ? Vec{} : p;
    return x > 88.7f ? Vec{} + __builtin_inff() : p;
  }
}

template <class Vec>
ALWAYS_INLINE Vec maximum(Vec a, Vec b) {  // keeps a NaN of a, drops one of b
  return b > a ? b : a;
}

// One row of logits, columns as of tile.read.
template <class T>
void pack_row(const Problem<T>& problem, const Tile& tile, int64_t row,
              const Workspace<StatOf<T>>& workspace) {
  using Stat = StatOf<T>;
  using V = Simd<T>;
  using Vec = VecOf<Stat>;
  constexpr int L = LANES<Stat>;
  const Layout& layout = problem.layout;
  const int64_t stride = workspace.stride, columns = tile.read.end - tile.read.begin;
  const T* source = problem.logits + tile.image * layout.stride_b + row * layout.stride_h +
                    tile.read.begin * layout.stride_w;
  Stat* packed = workspace.packed[row & 1];
  Stat* shifts = workspace.shifts[row & 1];

  for (int64_t j = 0; j < columns; j += L) {
    const int64_t count = std::min<int64_t>(L, columns - j);
    Vec largest = Vec{} - static_cast<Stat>(__builtin_inf());
    const auto put = [&](int64_t k, Vec x) INLINE_LAMBDA {
      largest = maximum(largest, x);
      Simd<Stat>::store(packed + k * stride + j, x);
    };
    const T* from = source + j * layout.stride_w;
    if (layout.stride_w == 1 || columns == 1) {
      for (int64_t k = 0; k < layout.dim; ++k) put(k, V::load(from + k * layout.stride_d, count));
    } else {
      for (int64_t k = 0; k < layout.dim; k += L) {
        const int64_t classes = std::min<int64_t>(L, layout.dim - k);
        Vec square[L] = {};
        for (int64_t p = 0; p < count; ++p) {
          const T* of_pixel = from + p * layout.stride_w + k * layout.stride_d;
          if (layout.stride_d == 1) {
            square[p] = V::load(of_pixel, classes);
          } else {
            T gathered[L] = {};
            for (int64_t c = 0; c < classes; ++c) gathered[c] = of_pixel[c * layout.stride_d];
            square[p] = V::load(gathered);
          }
        }
        Simd<Stat>::transpose(square);
        for (int64_t c = 0; c < classes; ++c) put(k + c, square[c]);
      }
    }
    // a position whose largest is not finite stays as it is
    const Vec shift = largest - largest == 0 ? largest : Vec{};
    Simd<Stat>::store(shifts + j, shift);
    for (int64_t k = 0; k < layout.dim; ++k) {
      Stat* x = packed + k * stride + j;
      Simd<Stat>::store(x, Simd<Stat>::load(x) - shift);
    }
  }
}

// The rows of logits that are packed, by parity.
template <class T>
struct PackedRows {
  int64_t of_parity[2] = {-1, -1};

  void need(const Problem<T>& problem, const Tile& tile, int64_t row,
            const Workspace<StatOf<T>>& workspace) {
    if (of_parity[row & 1] == row) return;
    pack_row(problem, tile, row, workspace);
    of_parity[row & 1] = row;
  }
};

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

// Up to GROUP labels of one row and the logits that they lie between.
template <class Stat>
struct Group {
  int64_t begin, count;
  Position<Stat> row;
  bool same;                           // label i of the group is logit first + i
  int64_t first, last;                 // of the packed columns that it reads
  int32_t lower[GROUP], upper[GROUP];  // packed columns
  Stat weight[GROUP];

  Group(const Axis<Stat>& columns, const Tile& tile, const Position<Stat>& row, int64_t begin,
        int64_t count)
      : begin(begin), count(count), row(row), same(!columns.lower) {
    for (int64_t t = 0; t < GROUP; ++t) {
      const auto at = position(columns, begin + std::min(t, count - 1));
      lower[t] = static_cast<int32_t>(at.lower - tile.read.begin);
      upper[t] = static_cast<int32_t>(at.upper - tile.read.begin);
      weight[t] = at.weight;
    }
    first = lower[0];
    last = upper[count - 1];
  }
};

// (1 - weight) * low + weight * high, where a weight of 0 leaves high out.
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
    for (int64_t j = group.first; j <= group.last; j += L)
      V::store(line + j, blend(V::load(low + j), V::load(high + j), Vec{} + group.row.weight));
    between = line;
  }
  for (int64_t t = 0; t < pixels; t += L) {
    if (group.same) {
      V::store(out + t, V::load(between + group.first + t));
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

template <class T>
ALWAYS_INLINE void upsample_classes(const Problem<T>& problem,
                                    const Workspace<StatOf<T>>& workspace,
                                    const Group<StatOf<T>>& group) {
  const int64_t pixels = round_up_to_lanes<StatOf<T>>(group.count);
  for (int64_t k = 0; k < problem.layout.dim; ++k)
    upsample(group, workspace.packed[group.row.lower & 1] + k * workspace.stride,
             workspace.packed[group.row.upper & 1] + k * workspace.stride, workspace.line, pixels,
             workspace.upsampled + k * workspace.group);
}

// Calls visit(row position, y) for the rows of the tile's labels, their logits packed.
template <class T, class Visit>
ALWAYS_INLINE void for_label_rows(const Problem<T>& problem, const Tile& tile,
                                  const Workspace<StatOf<T>>& workspace, Visit visit) {
  PackedRows<T> rows;
  for (int64_t y = tile.label_rows.begin; y < tile.label_rows.end; ++y) {
    const auto row = position(problem.rows, y);
    rows.need(problem, tile, row.lower, workspace);
    rows.need(problem, tile, row.upper, workspace);
    visit(row, y);
  }
}

template <class T, class Visit>
ALWAYS_INLINE void for_groups(const Problem<T>& problem, const Tile& tile,
                              const Workspace<StatOf<T>>& workspace, const Position<StatOf<T>>& row,
                              Visit visit) {
  const Range& columns = tile.label_columns;
  for (int64_t x = columns.begin; x < columns.end; x += workspace.group)
    visit(Group<StatOf<T>>(problem.columns, tile, row, x,
                           std::min(workspace.group, columns.end - x)));
}

// The class of the largest of each pixel: the first of equal ones, NaN is largest.
template <class T>
ALWAYS_INLINE void largest_of_group(const Problem<T>& problem,
                                    const Workspace<StatOf<T>>& workspace,
                                    const Group<StatOf<T>>& group, int32_t* classes) {
  using Stat = StatOf<T>;
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

// One vector of pixels, z at [k * stride]: returns their lse, and with PROBABILITIES z becomes p.
// As torch's logsumexp and softmax where values are not finite.
template <class Stat, bool PROBABILITIES>
ALWAYS_INLINE VecOf<Stat> normalize(Stat* z, int64_t num_classes, int64_t stride) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  Vec largest = V::load(z);
  for (int64_t k = 1; k < num_classes; ++k) largest = maximum(largest, V::load(z + k * stride));
  largest = largest - largest == 0 ? largest : Vec{};
  Vec total = {};
  for (int64_t first = 0; first < num_classes; first += 128) {
    Vec sum = {};  // of few terms, that rounding stays small
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
  for (int i = 0; i < LANES<Stat>; ++i) largest[i] += std::log(total[i]);
  return largest;
}

template <class T>
void forward(const Problem<T>& problem, const Tile& tile, const Workspace<StatOf<T>>& workspace,
             const Sums& sums, const Maps<StatOf<T>>& maps) {
  using Stat = StatOf<T>;
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  constexpr int L = LANES<Stat>;
  const int64_t num_classes = problem.layout.dim;
  const bool with_probabilities = sums.masses || sums.squares;
  for_label_rows(problem, tile, workspace, [&](const Position<Stat>& row, int64_t y) {
    problem.labels.read(problem.labels, tile.image, y, tile.label_columns, workspace.classes);
    const int64_t line = (tile.image * problem.rows.size + y) * problem.columns.size;
    for_groups(problem, tile, workspace, row, [&](const Group<Stat>& group) {
      const int32_t* classes = workspace.classes + group.begin - tile.label_columns.begin;
      const int64_t pixels = round_up_to_lanes<Stat>(group.count);
      Stat shift[GROUP], own[GROUP] = {}, lse[GROUP];
      int32_t predicted[GROUP];
      upsample_classes(problem, workspace, group);
      upsample(group, workspace.shifts[row.lower & 1], workspace.shifts[row.upper & 1],
               workspace.line, pixels, shift);
      if (sums.hits) largest_of_group(problem, workspace, group, predicted);
      for (int64_t t = 0; t < group.count; ++t)
        if (classes[t] >= 0) own[t] = workspace.upsampled[classes[t] * workspace.group + t];

      for (int64_t t = 0; t < group.count; t += L) {
        const auto of_group = with_probabilities ? normalize<Stat, true> : normalize<Stat, false>;
        V::store(lse + t, of_group(workspace.upsampled + t, num_classes, workspace.group));
      }
      for (int64_t t = 0; t < group.count; ++t) {
        const int64_t k = classes[t];
        const Stat loss = k < 0 ? 0 : lse[t] - own[t];
        if (maps.pixel_losses) maps.pixel_losses[line + group.begin + t] = loss;
        if (maps.lse) maps.lse[line + group.begin + t] = k < 0 ? 0 : lse[t] + shift[t];
        if (k < 0) continue;
        sums.losses[k] += loss;
        ++sums.counts[k];
        if (sums.hits) sums.hits[k] += predicted[t] == k;
        if (sums.overlaps) sums.overlaps[k] += exp<Stat>(Vec{} + (own[t] - lse[t]))[0];
      }
      if (!with_probabilities) return;
      for (int64_t k = 0; k < num_classes; ++k) {
        const Stat* p = workspace.upsampled + k * workspace.group;
        for (int64_t t = 0; t < group.count; ++t) {
          if (classes[t] < 0) continue;
          if (sums.masses) sums.masses[k] += p[t];
          if (sums.squares) sums.squares[k] += double(p[t]) * p[t];
        }
      }
    });
  });
}

template <class Stat>
ALWAYS_INLINE Stat value(const Map<Stat>& map, int64_t image, int64_t y, int64_t x) {
  if (!map.data) return 0;
  return map.data[image * map.stride_b + y * map.stride_h + x * map.stride_w];
}

// Writes a row of dlogits and makes the gradients of its parity zero again.
template <class T>
void finish_row(const Problem<T>& problem, const Tile& tile, const Workspace<StatOf<T>>& workspace,
                int64_t row, const Layout& dlayout, T* dlogits) {
  using Stat = StatOf<T>;
  using V = Simd<T>;
  using Vec = VecOf<Stat>;
  constexpr int L = LANES<Stat>;
  const int64_t stride = workspace.stride, num_classes = problem.layout.dim;
  Stat* gradients = workspace.gradients[row & 1];
  const Stat* source = gradients + tile.columns.begin - tile.read.begin;
  T* target = dlogits + tile.image * dlayout.stride_b + row * dlayout.stride_h +
              tile.columns.begin * dlayout.stride_w;
  const int64_t columns = tile.columns.end - tile.columns.begin;
  if (row >= tile.rows.begin && row < tile.rows.end) {
    for (int64_t j = 0; j < columns; j += L) {
      const int64_t count = std::min<int64_t>(L, columns - j);
      T* to = target + j * dlayout.stride_w;
      if (dlayout.stride_w == 1 || columns == 1) {
        for (int64_t k = 0; k < num_classes; ++k)
          V::store(to + k * dlayout.stride_d, Simd<Stat>::load(source + k * stride + j), count);
        continue;
      }
      for (int64_t k = 0; k < num_classes; k += L) {
        const int64_t classes = std::min<int64_t>(L, num_classes - k);
        Vec square[L] = {};
        for (int64_t c = 0; c < classes; ++c)
          square[c] = Simd<Stat>::load(source + (k + c) * stride + j);
        Simd<Stat>::transpose(square);
        for (int64_t p = 0; p < count; ++p) {
          T* of_pixel = to + p * dlayout.stride_w + k * dlayout.stride_d;
          if (dlayout.stride_d == 1) {
            V::store(of_pixel, square[p], classes);
          } else {
            T scattered[L];
            V::store(scattered, square[p]);
            for (int64_t c = 0; c < classes; ++c) of_pixel[c * dlayout.stride_d] = scattered[c];
          }
        }
      }
    }
  }
  std::memset(gradients, 0, num_classes * stride * sizeof(Stat));
}

// upsampled becomes dz of the group's pixels.
template <class T>
void gradients_of_group(const Problem<T>& problem, const Tile& tile,
                        const Workspace<StatOf<T>>& workspace,
                        const Gradients<StatOf<T>>& gradients, const Group<StatOf<T>>& group,
                        int64_t y) {
  using Stat = StatOf<T>;
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  constexpr int L = LANES<Stat>;
  const int64_t num_classes = problem.layout.dim;
  const int32_t* classes = workspace.classes + group.begin - tile.label_columns.begin;
  const int64_t of_image = tile.image * gradients.stride_b;
  const auto by_class = [&](const Stat* of_class, int64_t k)
                            INLINE_LAMBDA { return of_class ? of_class[of_image + k] : Stat(0); };
  Stat own_gradient[GROUP] = {}, factor[GROUP] = {};
  Stat valid[GROUP] = {};  // 1 or 0
  upsample_classes(problem, workspace, group);
  for (int64_t t = 0; t < group.count; ++t) {
    const int64_t k = classes[t], x = group.begin + t;
    if (k < 0) continue;
    valid[t] = 1;
    own_gradient[t] =
        by_class(gradients.dlosses, k) + value(gradients.dpixel_losses, tile.image, y, x);
    factor[t] = own_gradient[t] + value(gradients.dlse, tile.image, y, x);
  }

  // dz = p * (factor + u - total) - own_gradient at the own class, total = sum of p * u
  for (int64_t t = 0; t < group.count; t += L) {
    const Vec is_valid = V::load(valid + t);
    normalize<Stat, true>(workspace.upsampled + t, num_classes, workspace.group);
    Vec total = {};
    for (int64_t k = 0; k < num_classes; ++k) {
      const Vec p = V::load(workspace.upsampled + k * workspace.group + t);
      total += p * (by_class(gradients.dmasses, k) + 2 * p * by_class(gradients.dsquares, k));
    }
    for (int i = 0; i < std::min<int64_t>(L, group.count - t); ++i) {
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
      const Vec u = by_class(gradients.dmasses, k) + 2 * p * by_class(gradients.dsquares, k);
      V::store(z, is_valid != 0 ? p * (rest + u) : Vec{});
    }
  }
  for (int64_t t = 0; t < group.count; ++t)
    if (classes[t] >= 0) workspace.upsampled[classes[t] * workspace.group + t] -= own_gradient[t];
}

template <class T>
void backward(const Problem<T>& problem, const Tile& tile, const Workspace<StatOf<T>>& workspace,
              const Gradients<StatOf<T>>& gradients, const Layout& dlayout, T* dlogits) {
  using Stat = StatOf<T>;
  const int64_t stride = workspace.stride;
  int64_t next = std::max<int64_t>(tile.rows.begin - 1, 0);  // the first row that is not finished
  for_label_rows(problem, tile, workspace, [&](const Position<Stat>& row, int64_t y) {
    for (; next < row.lower; ++next) finish_row(problem, tile, workspace, next, dlayout, dlogits);
    problem.labels.read(problem.labels, tile.image, y, tile.label_columns, workspace.classes);
    for_groups(problem, tile, workspace, row, [&](const Group<Stat>& group) {
      gradients_of_group(problem, tile, workspace, gradients, group, y);
      for (int64_t k = 0; k < problem.layout.dim; ++k) {
        const Stat* dz = workspace.upsampled + k * workspace.group;
        Stat* line = workspace.line;
        for (int64_t j = group.first; j <= group.last; ++j) line[j] = 0;
        for (int64_t t = 0; t < group.count; ++t) {
          line[group.lower[t]] += (1 - group.weight[t]) * dz[t];
          if (group.weight[t] != 0) line[group.upper[t]] += group.weight[t] * dz[t];
        }
        Stat* low = workspace.gradients[row.lower & 1] + k * stride;
        Stat* high = workspace.gradients[row.upper & 1] + k * stride;
        for (int64_t j = group.first; j <= group.last; ++j) low[j] += (1 - row.weight) * line[j];
        if (row.weight == 0) continue;
        for (int64_t j = group.first; j <= group.last; ++j) high[j] += row.weight * line[j];
      }
    });
  });
  for (; next < tile.rows.end + 1 && next < problem.layout.height; ++next)
    finish_row(problem, tile, workspace, next, dlayout, dlogits);
}

template <class T>
void argmax(const Problem<T>& problem, const Tile& tile, const Workspace<StatOf<T>>& workspace,
            int64_t* predictions) {
  using Stat = StatOf<T>;
  for_label_rows(problem, tile, workspace, [&](const Position<Stat>& row, int64_t y) {
    int64_t* line = predictions + (tile.image * problem.rows.size + y) * problem.columns.size;
    for_groups(problem, tile, workspace, row, [&](const Group<Stat>& group) {
      int32_t classes[GROUP];
      upsample_classes(problem, workspace, group);
      largest_of_group(problem, workspace, group, classes);
      for (int64_t t = 0; t < group.count; ++t) line[group.begin + t] = classes[t];
    });
  });
}

template <class T>
Kernels<T> kernels() {
  return {forward<T>, backward<T>, argmax<T>};
}

template Kernels<float> kernels();
template Kernels<double> kernels();
template Kernels<BFloat16> kernels();
template Kernels<Half> kernels();

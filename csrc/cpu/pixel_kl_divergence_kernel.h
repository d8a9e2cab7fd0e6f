// The vector kernels of pixel_kl_divergence.
//
// Logits are upsampled along the row first. Between two lines, e^(z / T) is a geometric sequence
// down a column: up to DOWN rows of labels need two powers of 2, of exponents z * log2(e) / T.
// Where these are large, the product is rounded too much: e^(z / T) is then computed for each
// pixel, if necessary relative to its largest logit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "pixel_kl_divergence.h"
#include "softmax_pixels.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

constexpr int DOWN = 4;
constexpr float MIN_EXPONENT = -57.0f;  // powers of smaller z are computed directly
template <class Stat>
constexpr Stat LOG2_OF_E = Stat(1.4426950408889634);

template <class Stat>
ALWAYS_INLINE VecOf<Stat> exp2(VecOf<Stat> x) {  // for x in [-126, 126]
  if constexpr (std::is_same_v<Stat, float>) return power_of_two(x);
  for (int i = 0; i < LANES<Stat>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// Up to DOWN rows of labels between two rows of a model's logits, which are at the labels' columns.
template <class Stat>
struct LabelRows {
  const Stat *low, *high;
  Stat weight[DOWN] = {}, step = 0;     // of the lower row; from one row of labels to the next
  Stat scale = 0, scale_of_powers = 0;  // 1 / T, log2(e) / T
  bool ordinary = false;                // logits are finite or -inf

  ALWAYS_INLINE VecOf<Stat> at(int64_t i, int row) const {
    const auto v = Simd<Stat>::load(low + i);
    const Stat w = weight[row];
    return w == 0 ? v : (1 - w) * v + w * Simd<Stat>::load(high + i);
  }
  ALWAYS_INLINE VecOf<Stat> exponents(int64_t i, int row, VecOf<Stat> shift) const {
    return scale * (at(i, row) - shift);
  }
};

// The logits of a model at the labels of a chunk.
template <class Stat>
class ModelRows {
 public:
  ModelRows(const Model<Stat>& model, const Tile& tile, const Divergence<Stat>& divergence)
      : model_(model), tile_(tile), divergence_(divergence), columns_(model.columns) {}

  void start(Range labels) {
    upsampled_ = {-1, -1};
    columns_.start(model_.problem.columns, tile_.columns.begin - 1, labels);
  }

  // Whether the next row of labels is between the same rows of logits. A row of weight 0 is alone:
  // it must not read the lower logits. (Those before the first row of logits have weight 0 too.)
  bool continues(int64_t next) const {
    const auto last = position(model_.problem.rows, next - 1);
    return last.weight != 0 && last.lower == row_of(next);
  }

  int64_t row_of(int64_t label_row) const { return position(model_.problem.rows, label_row).lower; }

  // `count` rows of labels, between the same rows of logits.
  LabelRows<Stat> at(int64_t label_row, int64_t count) {
    LabelRows<Stat> rows;
    const int64_t lower = row_of(label_row);
    for (int64_t i = 0; i < count; ++i)
      rows.weight[i] = position(model_.problem.rows, label_row + i).weight;
    const int64_t upper =
        rows.weight[0] == 0 ? lower : std::min(lower + 1, model_.problem.logits.layout.height - 1);
    rows.low = need(lower);
    rows.high = need(upper);
    rows.scale = 1 / divergence_.temperature;
    rows.scale_of_powers = LOG2_OF_E<Stat> / divergence_.temperature;
    rows.ordinary = ordinary_[lower] && ordinary_[upper];
    if (count > 1) rows.step = (rows.weight[count - 1] - rows.weight[0]) / (count - 1);
    return rows;
  }

 private:
  const Stat* need(int64_t row) {
    Stat* rows = model_.rows[row];
    if (upsampled_[row] == row) return rows;
    upsampled_[row] = row;
    if (packed_[row] != row) {
      packed_[row] = row;
      ordinary_[row] =
          model_.problem.logits.pack_row(model_.problem.logits, tile_, row, model_.packed);
    }
    for (int64_t k = 0; k < model_.problem.logits.layout.dim; ++k)
      columns_.upsample(model_.packed.rows[row] + k * model_.packed.stride,
                        rows + k * divergence_.line);
    return rows;
  }

  const Model<Stat>& model_;
  Tile tile_;
  const Divergence<Stat>& divergence_;
  LabelColumns<Stat> columns_;
  TwoRows<int64_t> packed_ = {-1, -1}, upsampled_ = {-1, -1};
  TwoRows<bool> ordinary_ = {};
};

template <class Mask>
ALWAYS_INLINE bool any_lane(Mask mask) {
  if constexpr (std::is_same_v<Mask, Ints>) return any(mask);
  bool result = false;
  for (size_t i = 0; i < sizeof mask / sizeof mask[0]; ++i) result |= mask[i] != 0;
  return result;
}

// Calls visit(y, count, columns, student, teacher) for up to DOWN rows of the tiles' labels at a
// time, in chunks of columns, with the logits of both models there. Before the rows between two
// rows of the student's logits it calls begin(the upper one, whether the chunk is another one
// than before).
template <class Stat, class Begin, class Visit>
ALWAYS_INLINE void for_chunks(const Divergence<Stat>& divergence, const TwoTiles& tiles,
                              Begin begin, Visit visit) {
  const Range &rows = tiles.student.label_rows, &columns = tiles.student.label_columns;
  if (rows.begin >= rows.end || columns.begin >= columns.end) return;
  ModelRows<Stat> student(divergence.student, tiles.student, divergence);
  ModelRows<Stat> teacher(divergence.teacher, tiles.teacher, divergence);
  for (int64_t first = rows.begin, end; first < rows.end; first = end) {
    const int64_t row = student.row_of(first);
    for (end = first + 1; end < rows.end && student.row_of(end) == row;) ++end;
    for (int64_t x = columns.begin; x < columns.end; x += divergence.chunk) {
      const Range chunk = {x, std::min(x + divergence.chunk, columns.end)};
      const bool another =
          first == rows.begin || chunk.begin > columns.begin || chunk.end < columns.end;
      begin(row, another);
      if (another) {
        student.start(chunk);
        teacher.start(chunk);
      }
      for (int64_t y = first, next; y < end; y = next) {
        for (next = y + 1; next < std::min(y + DOWN, end); ++next)
          if (!student.continues(next) || !teacher.continues(next)) break;
        visit(y, next - y, chunk, student.at(y, next - y), teacher.at(y, next - y));
      }
    }
  }
}

// Which pixels of a row of a chunk are valid: 1 or 0 in each lane.
template <class Stat>
void read_valid(const Divergence<Stat>& divergence, int64_t image, int64_t y, Range columns,
                Stat* is_valid) {
  const Map<bool>& valid = divergence.valid;
  const int64_t at = image * valid.stride_b + y * valid.stride_h;
  const int64_t count = columns.end - columns.begin;
  const bool* line = valid.data ? valid.data + at + columns.begin * valid.stride_w : nullptr;
  for (int64_t t = 0; t < divergence.line; ++t) is_valid[t] = t < count;
  if (line && valid.stride_w == 1)
    for (int64_t t = 0; t < count; ++t) is_valid[t] = line[t];
  else if (line)
    for (int64_t t = 0; t < count; ++t) is_valid[t] = line[t * valid.stride_w];
}

// Sums over the classes of e^s, e^t and e^t * (t - s) * log2(e), for one vector of pixels, where s
// and t are the exponents of student and teacher.
template <class Stat>
struct DivergenceSums {
  using Vec = VecOf<Stat>;
  Vec student = {}, teacher = {}, difference = {};

  ALWAYS_INLINE void add(Vec s, Vec t) {
    const Vec power = exp<Stat>(t);
    student += exp<Stat>(s);
    teacher += power;
    difference += power == 0 ? Vec{} : power * (LOG2_OF_E<Stat> * (t - s));
  }
  void operator+=(const DivergenceSums& other) {
    student += other.student;
    teacher += other.teacher;
    difference += other.difference;
  }
};

// Whether no lane's sums of powers are so small that terms may have underflowed, or NaN.
template <class Vec>
ALWAYS_INLINE bool ordinary(Vec student, Vec teacher) {
  using Stat = std::remove_cvref_t<decltype(student[0])>;
  return !any_lane(~((student >= Stat(0x1p-40)) & (teacher >= Stat(0x1p-40))));
}

// Adds all classes, in parts: sums of few terms have small rounding errors.
template <class Stat, size_t ROWS, class Add>
ALWAYS_INLINE void add_classes(int64_t num_classes, DivergenceSums<Stat> (&sums)[ROWS], Add add) {
  for (int64_t first = 0; first < num_classes; first += 128) {
    DivergenceSums<Stat> some[ROWS];
    for (int64_t k = first; k < std::min<int64_t>(first + 128, num_classes); ++k) add(k, some);
    for (size_t j = 0; j < ROWS; ++j) sums[j] += some[j];
  }
}

// e^(z / T) of one class of one vector of pixels in the first row of labels, and the factor from
// row to row. It underflows if `smallest` is below MIN_EXPONENT.
//
// Both passes must round alike. So nothing else reads the exponents: the compiler then fuses these
// products with the sums that follow, or in no pass.
template <class Stat>
struct Powers {
  VecOf<Stat> z, down, power, factor, smallest;

  ALWAYS_INLINE Powers(const LabelRows<Stat>& rows, int64_t i) {
    const auto low = Simd<Stat>::load(rows.low + i), high = Simd<Stat>::load(rows.high + i);
    down = high - low;
    z = low + rows.weight[0] * down;
    power = exp2<Stat>(rows.scale_of_powers * z);
    factor = exp2<Stat>((rows.scale_of_powers * rows.step) * down);
    smallest = rows.scale_of_powers * (low < high ? low : high);
  }
};

template <class Stat>
ALWAYS_INLINE bool underflow(const Powers<Stat>& a, const Powers<Stat>& b) {
  return any_lane((a.smallest < b.smallest ? a.smallest : b.smallest) < Stat(MIN_EXPONENT));
}

template <class Stat>
VecOf<Stat> largest_of(const LabelRows<Stat>& rows, int64_t t, int row, int64_t num_classes,
                       int64_t line) {
  auto largest = rows.at(t, row);
  for (int64_t k = 1; k < num_classes; ++k) largest = maximum(largest, rows.at(k * line + t, row));
  return largest - largest == 0 ? largest : VecOf<Stat>{};
}

// One vector of pixels in one row, without powers of other rows. The logits are relative to their
// shifts. To find them takes a loop over the classes.
template <class Stat>
struct PixelSums {
  VecOf<Stat> shift = {}, teacher_shift = {};
  DivergenceSums<Stat> sums;

  ALWAYS_INLINE PixelSums(const LabelRows<Stat>& students, const LabelRows<Stat>& teachers,
                          int64_t t, int row, int64_t num_classes, int64_t line, bool shifted) {
    if (shifted) {
      shift = largest_of(students, t, row, num_classes, line);
      teacher_shift = largest_of(teachers, t, row, num_classes, line);
    }
    DivergenceSums<Stat> all[1];
    add_classes(num_classes, all, [&](int64_t k, DivergenceSums<Stat>(&some)[1]) INLINE_LAMBDA {
      const int64_t i = k * line + t;
      some[0].add(students.exponents(i, row, shift), teachers.exponents(i, row, teacher_shift));
    });
    sums = all[0];
  }
};

template <class Stat>
ALWAYS_INLINE VecOf<Stat> divergence_of(const DivergenceSums<Stat>& sums, Stat temperature) {
  const auto log_ratio = log_of_sum(sums.student / sums.teacher);
  const auto value = Stat(0.6931471805599453) * (sums.difference / sums.teacher) + log_ratio;
  return temperature * (temperature * not_below_0(value));
}

template <class Stat>
double divergence_forward(const Divergence<Stat>& divergence, const TwoTiles& tiles,
                          const DivergenceMaps<Stat>& maps) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  using Sums = DivergenceSums<Stat>;
  constexpr int L = LANES<Stat>;
  const Problem<Stat>& problem = divergence.student.problem;
  const int64_t num_classes = problem.logits.layout.dim, line = divergence.line;
  const int64_t image = tiles.student.image;
  double divergences[L] = {};
  const auto add_rows = [&](int64_t y, int64_t rows, Range columns, const LabelRows<Stat>& students,
                            const LabelRows<Stat>& teachers) INLINE_LAMBDA {
    const bool by_powers = rows > 2 && students.ordinary && teachers.ordinary;
    for (int64_t j = 0; j < rows; ++j)
      read_valid(divergence, image, y + j, columns, divergence.is_valid + j * line);
    for (int64_t t = 0; t < columns.end - columns.begin; t += L) {
      const int64_t count = std::min<int64_t>(L, columns.end - columns.begin - t);
      Sums sums[DOWN];
      if (by_powers)
        add_classes(num_classes, sums, [&](int64_t k, Sums(&some)[DOWN]) INLINE_LAMBDA {
          const int64_t i = k * line + t;
          Powers<Stat> student_powers(students, i), teacher_powers(teachers, i);
          Vec difference = teachers.scale_of_powers * (teacher_powers.z - student_powers.z);
          const Vec change = teachers.scale_of_powers * (teachers.step * teacher_powers.down -
                                                         students.step * student_powers.down);
          if (underflow(student_powers, teacher_powers)) {
            for (int j = 0; j < rows; ++j)
              some[j].add(students.exponents(i, j, Vec{}), teachers.exponents(i, j, Vec{}));
            return;
          }
          for (int j = 0; j < DOWN; ++j) {
            some[j].student += student_powers.power;
            some[j].teacher += teacher_powers.power;
            some[j].difference += teacher_powers.power * difference;
            student_powers.power *= student_powers.factor;
            teacher_powers.power *= teacher_powers.factor;
            difference += change;
          }
        });
      for (int j = 0; j < rows; ++j) {
        const auto is_valid = V::load(divergence.is_valid + j * line + t) != 0;
        const auto sum_directly = [&](bool shifted) {
          const PixelSums<Stat> pixels(students, teachers, t, j, num_classes, line, shifted);
          sums[j] = pixels.sums;
        };
        if (!by_powers) sum_directly(false);
        const bool steep = !ordinary(sums[j].student, sums[j].teacher);
        if (steep) sum_directly(true);
        const Vec value = is_valid ? divergence_of(sums[j], divergence.temperature) : Vec{};
        const int64_t at =
            (image * problem.rows.size + y + j) * problem.columns.size + columns.begin + t;
        accumulate(divergences, value);
        if (maps.divergences) V::store(maps.divergences + at, value, count);
        if (maps.totals) V::store(maps.totals + at, steep ? Vec{} : sums[j].student, count);
        if (maps.teacher_totals)
          V::store(maps.teacher_totals + at, steep ? Vec{} : sums[j].teacher, count);
      }
    }
  };
  for_chunks(divergence, tiles, [](int64_t, bool) {}, add_rows);
  double total = 0;
  for (double part : divergences) total += part;
  return total;
}

template <class Stat>
void divergence_backward(const Divergence<Stat>& divergence, const TwoTiles& tiles,
                         const DivergenceGradients<Stat>& gradients, const Output<Stat>& output) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  constexpr int L = LANES<Stat>;
  const Model<Stat>& model = divergence.student;
  const Problem<Stat>& problem = model.problem;
  const Tile& tile = tiles.student;
  GradientLines<Stat> lines(model.columns);
  const int64_t num_classes = problem.logits.layout.dim, line = divergence.line;
  const int64_t image = tile.image;
  const auto add_up = [&](int64_t row) {
    for (int64_t k = 0; k < num_classes; ++k) {
      Stat* values = divergence.gradients[row] + k * line;
      Stat* class_gradients = divergence.packed_gradients[row] + k * model.packed.stride;
      lines.for_sums(values, [&](int64_t j, Vec sums) INLINE_LAMBDA {
        V::store(class_gradients + j, V::load(class_gradients + j) + sums);
      });
      std::memset(values, 0, line * sizeof(Stat));
    }
  };
  const auto finish_lines = [&]() {  // afterwards they are those of other labels
    lines.finish_until(problem.rows.source, add_up);
    lines.clear();
  };
  int64_t next = std::max<int64_t>(tile.rows.begin - 1, 0);  // the first row that is not finished
  const auto finish_until = [&](int64_t row) {
    for (; next < row; ++next)
      output.finish_row(problem, output, tile, next, divergence.packed_gradients[next],
                        model.packed.stride);
  };
  const auto begin = [&](int64_t row, bool another) {
    if (another) finish_lines();
    lines.finish_until(row, add_up);
    finish_until(row);
  };
  const auto add_row_gradients = [&](int64_t y, int64_t rows, Range columns,
                                     const LabelRows<Stat>& students,
                                     const LabelRows<Stat>& teachers) INLINE_LAMBDA {
    const auto row = position(problem.rows, y);
    lines.use(row.lower, columns.end - columns.begin);
    lines.use(row.upper, columns.end - columns.begin);
    Stat* low = divergence.gradients[row.lower];
    Stat* high = divergence.gradients[row.upper];
    for (int64_t j = 0; j < rows; ++j)
      read_valid(divergence, image, y + j, columns, divergence.is_valid + j * line);
    for (int64_t t = 0; t < columns.end - columns.begin; t += L) {
      const int64_t count = std::min<int64_t>(L, columns.end - columns.begin - t);
      Vec student_factor[DOWN] = {}, teacher_factor[DOWN] = {};
      Vec shift[DOWN] = {}, teacher_shift[DOWN] = {};
      bool by_powers = rows > 2 && students.ordinary && teachers.ordinary;
      for (int j = 0; j < rows; ++j) {
        const auto is_valid = V::load(divergence.is_valid + j * line + t) != 0;
        const int64_t x = columns.begin + t;
        const int64_t at = (image * problem.rows.size + y + j) * problem.columns.size + x;
        const Vec one = Vec{} + 1;
        Vec total = is_valid ? V::load(gradients.totals + at, count) : one;
        Vec teacher_total = is_valid ? V::load(gradients.teacher_totals + at, count) : one;
        if (!ordinary(total, teacher_total)) {
          const PixelSums<Stat> pixels(students, teachers, t, j, num_classes, line, true);
          total = pixels.sums.student;
          teacher_total = pixels.sums.teacher;
          shift[j] = pixels.shift;
          teacher_shift[j] = pixels.teacher_shift;
          by_powers = false;
        }
        const Vec dpixels =
            gradients.dtotal + load_map(gradients.ddivergences, image, y + j, x, count);
        const Vec gradient = divergence.temperature * dpixels;
        student_factor[j] = is_valid ? gradient / total : Vec{};
        teacher_factor[j] = is_valid ? gradient / teacher_total : Vec{};
      }
      for (int64_t k = 0; k < num_classes; ++k) {
        const int64_t i = k * line + t;
        Vec low_sum = V::load(low + i), high_sum = {};
        const auto by_rows = [&]() INLINE_LAMBDA {
          for (int j = 0; j < rows; ++j) {
            const Vec q = student_factor[j] * exp<Stat>(students.exponents(i, j, shift[j]));
            const Vec p = teacher_factor[j] * exp<Stat>(teachers.exponents(i, j, teacher_shift[j]));
            const auto is_valid = V::load(divergence.is_valid + j * line + t) != 0;
            const Vec dz = is_valid ? q - p : Vec{};
            low_sum += (1 - students.weight[j]) * dz;
            high_sum += students.weight[j] == 0 ? Vec{} : students.weight[j] * dz;
          }
        };
        if (by_powers) {
          Powers<Stat> student_powers(students, i), teacher_powers(teachers, i);
          if (underflow(student_powers, teacher_powers)) {
            by_rows();
          } else {
            for (int j = 0; j < DOWN; ++j) {
              const Vec dz = student_factor[j] * student_powers.power -
                             teacher_factor[j] * teacher_powers.power;
              low_sum += (1 - students.weight[j]) * dz;
              high_sum += students.weight[j] * dz;
              student_powers.power *= student_powers.factor;
              teacher_powers.power *= teacher_powers.factor;
            }
          }
        } else {
          by_rows();
        }
        V::store(low + i, low_sum);
        V::store(high + i, V::load(high + i) + high_sum);
      }
    }
  };
  for_chunks(divergence, tiles, begin, add_row_gradients);
  finish_lines();
  finish_until(std::min(tile.rows.end + 1, problem.logits.layout.height));
}

template <class Stat>
DivergenceKernels<Stat> divergence_kernels() {
  return {divergence_forward<Stat>, divergence_backward<Stat>};
}

template DivergenceKernels<float> divergence_kernels();
template DivergenceKernels<double> divergence_kernels();

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET

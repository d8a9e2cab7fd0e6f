// The operators anchorops::centroid_info_nce.cpu and centroid_info_nce_backward.cpu.
//
// Products of matrices are torch's. One pass over the logits computes the losses, and replaces the
// logits by the slopes of their row's loss, which are kept for the gradient. Rows are copied only
// to convert or normalise them, or if some are absent.
#include "centroid_info_nce.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "operators.h"

namespace anchorops::cpu {
namespace {

using Flags = std::vector<uint8_t>;
template <class Stat>
constexpr ScalarType DTYPE = torch::headeronly::CppTypeToScalarType<Stat>::value;

// Calls function(r) for each row. Several threads only if each has some numbers.
template <class Function>
void for_rows(int64_t rows, int64_t numbers_of_row, const Function& function) {
  const int64_t grain = std::max<int64_t>((1 << 15) / std::max<int64_t>(numbers_of_row, 1), 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) function(r);
  });
}

// Sixteen sums, which the compiler keeps in vectors.
template <class Stat>
Stat dot(const Stat* a, const Stat* b, int64_t size) {
  constexpr int64_t SUMS = 16;
  Stat sums[SUMS] = {};
  int64_t i = 0;
  for (; i + SUMS <= size; i += SUMS)
    for (int64_t j = 0; j < SUMS; ++j) sums[j] += a[i + j] * b[i + j];
  for (; i < size; ++i) sums[i % SUMS] += a[i] * b[i];
  for (int64_t half = SUMS / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

// A matrix in the memory of x.
Tensor view(const Tensor& x, int64_t rows, int64_t columns, int64_t stride_r, int64_t stride_c) {
  const int64_t sizes[] = {rows, columns}, strides[] = {stride_r, stride_c};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

Tensor transposed(const Tensor& matrix) {
  return view(matrix, matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0));
}

// product = scale · a b, by torch, without its dispatcher.
void multiply(const Tensor& a, const Tensor& b, const Tensor& product, double scale = 1) {
  AtenTensorHandle target = product.get();
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(target, target, a.get(), b.get(), 0, scale));
}

// Where row r = c·G + g is in a tensor whose first axes are [C] or [C, G]. A tensor without axes
// has one number for all rows.
struct Place {
  int64_t groups, stride_c, stride_g;

  Place(const Tensor& x, int64_t axes)
      : groups(axes > 1 ? x.size(1) : 1),
        stride_c(axes > 0 ? x.stride(0) : 0),
        stride_g(axes > 1 ? x.stride(1) : 0) {}

  int64_t operator()(int64_t r) const { return r / groups * stride_c + r % groups * stride_g; }
};

// Without a mask all.
Flags flags_of(const std::optional<Tensor>& mask, int64_t size) {
  Flags flags(size, 1);
  if (!mask) return flags;
  const Place place(*mask, mask->dim());
  const bool* const data = mask->const_data_ptr<bool>();
  for (int64_t r = 0; r < size; ++r) flags[r] = data[place(r)];
  return flags;
}

// Queries, keys or positives, as the operators compute with them.
template <class Stat>
struct Rows {
  Tensor given, matrix;       // [R, D], channels are consecutive
  std::vector<Stat> lengths;  // [R], if they are normalised

  const Stat* operator[](int64_t r) const {
    return matrix.const_data_ptr<Stat>() + r * matrix.stride(0);
  }
};

// What is not used is 0.
template <class Stat>
Rows<Stat> rows_of(const Tensor& given, const Flags& used, const std::optional<double>& eps) {
  const int64_t axes = given.dim() - 1, dim = given.size(axes), stride_d = given.stride(axes);
  const Place place(given, axes);
  const int64_t rows = given.size(0) * place.groups;
  const int64_t stride_r = place.groups > 1 ? place.stride_g : place.stride_c;
  const bool even = place.groups == 1 || place.stride_c == place.groups * stride_r;
  const bool complete = std::find(used.begin(), used.end(), 0) == used.end();
  if (complete && even && stride_d == 1 && !eps && given.scalar_type() == DTYPE<Stat>)
    return {given, view(given, rows, dim, stride_r, 1), {}};
  Rows<Stat> result = {given, new_empty({rows, dim}, DTYPE<Stat>), {}};
  if (eps) result.lengths.resize(rows);
  Stat* const matrix = result.matrix.template mutable_data_ptr<Stat>();
  for_dtype("centroid_info_nce.cpu", given.scalar_type(), [&](auto element) {
    const auto* const data = given.const_data_ptr<decltype(element)>();
    for_rows(rows, dim, [&](int64_t r) {
      const auto* const source = data + place(r);
      Stat* const row = matrix + r * dim;
      for (int64_t d = 0; d < dim; ++d)
        row[d] = used[r] ? static_cast<Stat>(source[d * stride_d]) : Stat(0);
      if (!eps) return;
      result.lengths[r] = std::sqrt(dot(row, row, dim));
      const Stat divisor = std::max(result.lengths[r], static_cast<Stat>(*eps));
      for (int64_t d = 0; d < dim; ++d) row[d] /= divisor;
    });
  });
  return result;
}

// The gradient of the given rows, from dx, that of the matrix. A row that is not longer than eps
// was divided by a constant.
template <class Stat>
Tensor gradient_of(const Rows<Stat>& x, const Tensor& dx, const std::optional<double>& eps) {
  const ScalarType dtype = x.given.scalar_type();
  if (dtype == DTYPE<Stat> && !eps) return dx;
  const Tensor gradient = new_empty({dx.sizes().begin(), dx.sizes().end()}, dtype);
  const int64_t dim = x.matrix.size(1);
  const Stat* const source = dx.const_data_ptr<Stat>();
  for_dtype("centroid_info_nce.cpu", dtype, [&](auto element) {
    using T = decltype(element);
    T* const target = gradient.mutable_data_ptr<T>();
    for_rows(x.matrix.size(0), dim, [&](int64_t r) {
      const Stat *const row = x[r], *const drow = source + r * dim;
      Stat along = 0, divisor = 1;
      if (eps) {
        divisor = std::max(x.lengths[r], static_cast<Stat>(*eps));
        if (x.lengths[r] > static_cast<Stat>(*eps)) along = dot(row, drow, dim);
      }
      for (int64_t d = 0; d < dim; ++d)
        target[r * dim + d] = static_cast<T>((drow[d] - along * row[d]) / divisor);
    });
  });
  return gradient;
}

// The arguments of both operators.
struct Arguments {
  const Tensor &queries, &keys;
  const std::optional<Tensor>&positives, &bias, &present, &present_keys;
  int64_t first;
  const Tensor& temperature;  // []
  const std::string& reduction;
  const std::optional<double>& eps;
};

void check(const char* name, const Tensor& x, const std::vector<int64_t>& sizes,
           std::optional<ScalarType> dtype = std::nullopt) {
  STD_TORCH_CHECK(x.sizes().equals(sizes) && (!dtype || x.scalar_type() == *dtype),
                  "centroid_info_nce.cpu: ", name, ": unexpected shape or dtype");
}

// Returns the sizes [C] or [C, G] of the rows.
std::vector<int64_t> check(const Arguments& x) {
  STD_TORCH_CHECK((x.queries.dim() == 2 || x.queries.dim() == 3) && x.keys.dim() == 2,
                  "centroid_info_nce.cpu: queries, keys: expected [C, D] or [C, G, D], and [K, D]");
  const std::vector<int64_t> sizes(x.queries.sizes().begin(), x.queries.sizes().end());
  const std::vector<int64_t> rows(sizes.begin(), sizes.end() - 1);
  const int64_t num_classes = x.keys.size(0);
  STD_TORCH_CHECK(x.first >= 0 && x.first <= num_classes - rows[0],
                  "centroid_info_nce.cpu: first: expected keys of all classes of the queries");
  check("keys", x.keys, {num_classes, sizes.back()});
  check("temperature", x.temperature, {}, statistics_dtype(x.queries.scalar_type()));
  if (x.positives) check("positives", *x.positives, sizes);
  if (x.bias) check("bias", *x.bias, {num_classes});
  if (x.present) check("present", *x.present, rows, ScalarType::Bool);
  if (x.present_keys) check("present_keys", *x.present_keys, {num_classes}, ScalarType::Bool);
  return rows;
}

template <class Stat>
struct Problem {
  int64_t num_rows, num_classes, dim, groups, first;
  Stat temperature;
  double factor = 1;       // by which the reduction multiplies losses
  std::vector<Stat> bias;  // [K], or empty
  Flags present, counted;  // [R]; [K]: the keys in the denominators of other queries
  Rows<Stat> queries, keys;
  std::optional<Rows<Stat>> positives;

  explicit Problem(const Arguments& x)
      : num_classes(x.keys.size(0)),
        dim(x.keys.size(1)),
        groups(x.queries.dim() == 3 ? x.queries.size(1) : 1),
        first(x.first),
        temperature(*x.temperature.const_data_ptr<Stat>()) {
    num_rows = x.queries.size(0) * groups;
    present = flags_of(x.present, num_rows);
    if (x.bias) {
      bias.resize(num_classes);
      for_dtype("centroid_info_nce.cpu", x.bias->scalar_type(), [&](auto element) {
        const auto* const data = x.bias->const_data_ptr<decltype(element)>();
        for (int64_t k = 0; k < num_classes; ++k)
          bias[k] = static_cast<Stat>(data[k * x.bias->stride(0)]);
      });
    }
    if (x.reduction == "mean")
      factor = 1.0 / std::max<int64_t>(std::count(present.begin(), present.end(), 1), 1);
    Flags has_query(num_classes);
    for (int64_t r = 0; r < num_rows; ++r) has_query[class_of(r)] |= present[r];
    const bool by_query = !x.present_keys && !x.bias;
    counted = by_query ? has_query : flags_of(x.present_keys, num_classes);
    Flags read = counted;
    if (!x.positives)
      for (int64_t k = 0; k < num_classes; ++k) read[k] |= has_query[k];
    queries = rows_of<Stat>(x.queries, present, x.eps);
    keys = rows_of<Stat>(x.keys, read, x.eps);
    if (x.positives) positives = rows_of<Stat>(*x.positives, present, x.eps);
  }

  int64_t class_of(int64_t r) const { return first + r / groups; }
};

// The losses, and their slopes [R, K].
template <class Stat>
std::tuple<Tensor, Tensor> forward(const Arguments& arguments) {
  const Problem<Stat> problem(arguments);
  const auto& queries = problem.queries;
  const auto& positives = problem.positives;
  const int64_t num_rows = problem.num_rows, num_classes = problem.num_classes;
  const auto sizes = arguments.queries.sizes();
  const Tensor losses = new_empty({sizes.begin(), sizes.end() - 1}, DTYPE<Stat>);
  const Tensor slopes = new_empty({num_rows, num_classes}, DTYPE<Stat>);
  multiply(queries.matrix, transposed(problem.keys.matrix), slopes);
  const auto kernel = BEST_OF(loss_of_row<Stat>);
  const std::vector<Stat> counted(problem.counted.begin(), problem.counted.end());
  Stat* const of_rows = losses.mutable_data_ptr<Stat>();
  Stat* const products = slopes.mutable_data_ptr<Stat>();
  for_rows(num_rows, num_classes, [&](int64_t r) {
    Stat* const x = products + r * num_classes;
    of_rows[r] = 0;
    if (!problem.present[r]) {
      std::fill(x, x + num_classes, Stat(0));
      return;
    }
    const int64_t k = problem.class_of(r);
    Stat temperature = problem.temperature;
    if (!problem.bias.empty()) {
      for (int64_t j = 0; j < num_classes; ++j) x[j] = x[j] / temperature + problem.bias[j];
      temperature = 1;
    }
    const Stat product = positives ? dot(queries[r], (*positives)[r], problem.dim) : x[k];
    of_rows[r] = kernel(x, counted.data(), num_classes, k, product / temperature, temperature);
  });
  if (arguments.reduction == "none") return {losses, slopes};
  const Tensor reduced = new_empty({}, DTYPE<Stat>);
  const double sum = std::accumulate(of_rows, of_rows + num_rows, 0.0);
  *reduced.mutable_data_ptr<Stat>() = static_cast<Stat>(sum * problem.factor);
  return {reduced, slopes};
}

// The gradients of queries, keys, positives and bias; empty if they are not wanted.
template <class Stat>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Arguments& arguments,
                                                    const Tensor& dlosses, const Tensor& slopes,
                                                    bool of_queries, bool of_keys,
                                                    bool of_positives, bool of_bias) {
  const Problem<Stat> problem(arguments);
  const auto &queries = problem.queries, &keys = problem.keys;
  const auto& positives = problem.positives;
  const int64_t num_rows = problem.num_rows, num_classes = problem.num_classes, dim = problem.dim;

  const Stat* const upstream = dlosses.const_data_ptr<Stat>();
  const double factor = problem.factor / problem.temperature;
  // Slopes are multiplied by a number for each row, unless torch's products can do it.
  const bool one_scale = dlosses.dim() == 0 && !positives;
  const double scale = one_scale ? *upstream * factor : 1;
  const Tensor dproducts = one_scale ? slopes : new_empty({num_rows, num_classes}, DTYPE<Stat>);
  std::vector<Stat> of_own(num_rows);  // the gradients of the products with positives
  if (!one_scale) {
    const Place place(dlosses, dlosses.dim());
    const Stat* const source = slopes.const_data_ptr<Stat>();
    Stat* const target = dproducts.mutable_data_ptr<Stat>();
    for_rows(num_rows, num_classes, [&](int64_t r) {
      const Stat row_scale =
          problem.present[r] ? static_cast<Stat>(upstream[place(r)] * factor) : 0;
      const Stat* const slope = source + r * num_classes;
      Stat* const dx = target + r * num_classes;
      for (int64_t k = 0; k < num_classes; ++k) dx[k] = slope[k] * row_scale;
      if (positives) of_own[r] = std::exchange(dx[problem.class_of(r)], Stat(0));
    });
  }

  const auto like = [](const Rows<Stat>& x) {
    return new_empty({x.given.sizes().begin(), x.given.sizes().end()}, DTYPE<Stat>);
  };
  const auto add_of_own = [&](const Tensor& gradient, const Rows<Stat>& others) {
    Stat* const rows = gradient.mutable_data_ptr<Stat>();
    for_rows(num_rows, dim, [&](int64_t r) {
      const Stat* const other = others[r];
      for (int64_t d = 0; d < dim; ++d) rows[r * dim + d] += of_own[r] * other[d];
    });
  };
  Tensor dqueries = absent(arguments.queries.scalar_type()),
         dkeys = absent(arguments.keys.scalar_type()),
         dpositives = absent(arguments.positives.value_or(arguments.queries).scalar_type()),
         dbias = absent(arguments.bias.value_or(arguments.queries).scalar_type());
  if (of_queries) {
    const Tensor dx = like(queries);
    multiply(dproducts, keys.matrix, view(dx, num_rows, dim, dim, 1), scale);
    if (positives) add_of_own(dx, *positives);
    dqueries = gradient_of(queries, dx, arguments.eps);
  }
  if (of_keys) {
    const Tensor dx = like(keys);
    multiply(transposed(dproducts), queries.matrix, dx, scale);
    dkeys = gradient_of(keys, dx, arguments.eps);
  }
  if (of_positives) {
    Tensor dx = like(*positives);
    torch::stable::zero_(dx);
    add_of_own(dx, queries);
    dpositives = gradient_of(*positives, dx, arguments.eps);
  }
  if (of_bias) {
    dbias = new_empty({num_classes}, arguments.bias->scalar_type());
    std::vector<double> sums(num_classes);
    const Stat* const dx = dproducts.const_data_ptr<Stat>();
    for (int64_t r = 0; r < num_rows; ++r)
      for (int64_t k = 0; k < num_classes; ++k) sums[k] += dx[r * num_classes + k];
    for_dtype("centroid_info_nce.cpu", dbias.scalar_type(), [&](auto element) {
      auto* const target = dbias.mutable_data_ptr<decltype(element)>();
      for (int64_t k = 0; k < num_classes; ++k)
        target[k] = static_cast<decltype(element)>(sums[k] * scale * problem.temperature);
    });
  }
  return {dqueries, dkeys, dpositives, dbias};
}

std::tuple<Tensor, Tensor> centroid_info_nce(
    Tensor queries, Tensor keys, std::optional<Tensor> positives, std::optional<Tensor> bias,
    std::optional<Tensor> present, std::optional<Tensor> present_keys, int64_t first,
    Tensor temperature, std::string reduction, std::optional<double> normalize) {
  const Arguments arguments = {queries,      keys,  positives,   bias,      present,
                               present_keys, first, temperature, reduction, normalize};
  check(arguments);
  const bool is_double = queries.scalar_type() == ScalarType::Double;
  return is_double ? forward<double>(arguments) : forward<float>(arguments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> centroid_info_nce_backward(
    Tensor dlosses, Tensor queries, Tensor keys, std::optional<Tensor> positives,
    std::optional<Tensor> bias, std::optional<Tensor> present, std::optional<Tensor> present_keys,
    Tensor slopes, int64_t first, Tensor temperature, std::string reduction,
    std::optional<double> normalize, bool of_queries, bool of_keys, bool of_positives,
    bool of_bias) {
  const Arguments arguments = {queries,      keys,  positives,   bias,      present,
                               present_keys, first, temperature, reduction, normalize};
  const std::vector<int64_t> rows = check(arguments);
  const ScalarType dtype = statistics_dtype(queries.scalar_type());
  check("dlosses", dlosses, reduction == "none" ? rows : std::vector<int64_t>{}, dtype);
  const int64_t num_rows = rows[0] * (rows.size() > 1 ? rows[1] : 1);
  check("slopes", slopes, {num_rows, keys.size(0)}, dtype);
  STD_TORCH_CHECK(slopes.is_contiguous() && (positives || !of_positives) && (bias || !of_bias),
                  "centroid_info_nce_backward.cpu: expected contiguous slopes, and no gradient of "
                  "what is not given");
  const bool is_double = queries.scalar_type() == ScalarType::Double;
  const auto run = is_double ? backward<double> : backward<float>;
  return run(arguments, dlosses, slopes, of_queries, of_keys, of_positives, of_bias);
}

}  // namespace
}  // namespace anchorops::cpu

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  using namespace anchorops::cpu;
  library.impl("centroid_info_nce.cpu", TORCH_BOX(&centroid_info_nce));
  library.impl("centroid_info_nce_backward.cpu", TORCH_BOX(&centroid_info_nce_backward));
}

// The operators anchorops::centroid_info_nce.cpu and centroid_info_nce_backward.cpu.
//
// Products of matrices are torch's. Between them, one pass over the logits computes the losses, and
// replaces the logits by the slopes of their row's loss, which are kept for the gradient. Rows are
// copied only to convert or normalise them, or if some are absent.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "operators.h"
#include "softmax_exponentials.h"

namespace anchorops::cpu {
namespace {

constexpr const char* NAME = "centroid_info_nce.cpu";
using Flags = std::vector<uint8_t>;

// Where row r = c·G + g is in a tensor whose first axes are [C] or [C, G]. One without axes has a
// number for all rows.
struct Place {
  int64_t groups, stride_c, stride_g;

  Place(const Tensor& x, int64_t axes)
      : groups(axes > 1 ? x.size(1) : 1),
        stride_c(axes > 0 ? x.stride(0) : 0),
        stride_g(axes > 1 ? x.stride(1) : 0) {}

  int64_t operator()(int64_t r) const { return r / groups * stride_c + r % groups * stride_g; }
};

// The arguments of both operators.
struct Problem {
  const Tensor &queries, &keys;
  const std::optional<Tensor>&positives, &present, &present_keys;
  int64_t first;
  const Tensor& temperature;  // []
  const std::string& reduction;
  const std::optional<double>& eps;

  ScalarType stat() const { return statistics_dtype(queries.scalar_type()); }
  int64_t num_classes() const { return keys.size(0); }
  int64_t dim() const { return keys.size(1); }
  int64_t groups() const { return queries.dim() == 3 ? queries.size(1) : 1; }
  int64_t rows() const { return queries.size(0) * groups(); }
  int64_t class_of(int64_t r) const { return first + r / groups(); }
};

struct Masks {
  Flags present;      // [R]
  Flags counted;      // [K]: keys in the denominators of other queries
  Flags read;         // [K]: keys in any denominator
  double factor = 1;  // by which the reduction multiplies losses

  explicit Masks(const Problem& problem) : present(problem.rows(), 1) {
    if (problem.present) {
      const Place place(*problem.present, problem.present->dim());
      const bool* flags = problem.present->const_data_ptr<bool>();
      for (size_t r = 0; r < present.size(); ++r) present[r] = flags[place(r)];
    }
    Flags has_query(problem.num_classes());
    for (size_t r = 0; r < present.size(); ++r) has_query[problem.class_of(r)] |= present[r];
    counted = has_query;
    if (problem.present_keys) {
      const bool* flags = problem.present_keys->const_data_ptr<bool>();
      const int64_t stride = problem.present_keys->stride(0);
      for (size_t k = 0; k < counted.size(); ++k) counted[k] = flags[k * stride];
    }
    read = counted;
    if (!problem.positives)
      for (size_t k = 0; k < read.size(); ++k) read[k] |= has_query[k];
    if (problem.reduction == "mean")
      factor = 1.0 / std::max<int64_t>(std::count(present.begin(), present.end(), 1), 1);
  }
};

// Calls function(r) for each row. Several threads only if each has some numbers.
template <class Function>
void for_rows(int64_t rows, int64_t numbers_of_row, const Function& function) {
  const int64_t grain = std::max<int64_t>((1 << 13) / std::max<int64_t>(numbers_of_row, 1), 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) function(r);
  });
}

// Sixteen sums, for vectors of them.
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

// torch's product, without its dispatcher.
void multiply(const Tensor& a, const Tensor& b, const Tensor& product) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(product.get(), a.get(), b.get()));
}

// Queries, keys or positives, as the operators compute with them.
template <class Stat>
struct Rows {
  Tensor matrix;  // [R, D], channels are consecutive
  const Stat* data;
  int64_t stride;
  std::vector<Stat> lengths;  // [R] if they are normalised

  explicit Rows(const Tensor& x, std::vector<Stat> lengths = {})
      : matrix(x),
        data(x.const_data_ptr<Stat>()),
        stride(x.stride(0)),
        lengths(std::move(lengths)) {}

  const Stat* operator[](int64_t r) const { return data + r * stride; }
};

// used: other rows are 0. Null: they may be anything.
template <class Stat>
Rows<Stat> rows_of(const Problem& problem, const Tensor& x, const Flags* used) {
  const Place place(x, x.dim() - 1);
  const int64_t dim = problem.dim(), rows = x.size(0) * place.groups;
  const int64_t stride_r = x.stride(x.dim() - 2), stride_d = x.stride(x.dim() - 1);
  const bool complete = !used || std::find(used->begin(), used->end(), 0) == used->end();
  const bool even = place.groups == 1 || place.stride_c == place.groups * stride_r;
  if (complete && even && stride_d == 1 && x.scalar_type() == problem.stat() && !problem.eps)
    return Rows<Stat>(view(x, rows, dim, place.groups == 1 ? place.stride_c : stride_r, 1));
  const Tensor matrix = new_empty({rows, dim}, problem.stat());
  std::vector<Stat> lengths(problem.eps ? rows : 0);
  Stat* const target = matrix.mutable_data_ptr<Stat>();
  for_dtype(NAME, x.scalar_type(), [&](auto element) {
    const auto* source = x.const_data_ptr<decltype(element)>();
    for_rows(rows, dim, [&](int64_t r) {
      Stat* const row = target + r * dim;
      if (used && !(*used)[r]) {
        std::fill(row, row + dim, Stat(0));
        return;
      }
      const auto* const given = source + place(r);
      for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<Stat>(given[d * stride_d]);
      if (!problem.eps) return;
      lengths[r] = std::sqrt(dot(row, row, dim));
      const Stat divisor = std::max(lengths[r], static_cast<Stat>(*problem.eps));
      for (int64_t d = 0; d < dim; ++d) row[d] /= divisor;
    });
  });
  return Rows<Stat>(matrix, std::move(lengths));
}

// The gradient of x from dx, that of its rows, in the shape of x. A row that is not longer than eps
// was divided by a constant.
template <class Stat>
Tensor gradient_of(const Problem& problem, const Tensor& x, const Rows<Stat>& rows,
                   const Tensor& dx) {
  if (x.scalar_type() == problem.stat() && !problem.eps) return dx;
  const Tensor gradient = new_empty({x.sizes().begin(), x.sizes().end()}, x.scalar_type());
  const int64_t dim = problem.dim();
  const Stat* const source = dx.const_data_ptr<Stat>();
  for_dtype(NAME, x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    T* const target = gradient.mutable_data_ptr<T>();
    for_rows(rows.matrix.size(0), dim, [&](int64_t r) {
      const Stat *const row = rows[r], *const drow = source + r * dim;
      Stat along = 0, divisor = 1;
      if (problem.eps) {
        const Stat eps = static_cast<Stat>(*problem.eps), length = rows.lengths[r];
        divisor = std::max(length, eps);
        if (length > eps) along = dot(row, drow, dim);
      }
      for (int64_t d = 0; d < dim; ++d)
        target[r * dim + d] = static_cast<T>((drow[d] - along * row[d]) / divisor);
    });
  });
  return gradient;
}

// Replaces the products x [K] of a row by the slopes of its loss in the logits x/τ, that of its own
// key by the slope in `own`, the logit of its positive. counted [K] is 0 where a key is not in the
// denominator. Returns the loss.
template <class Stat>
Stat loss_of_row(Stat* x, const Stat* counted, int64_t num_classes, int64_t own_key, Stat own,
                 Stat temperature) {
  namespace vectors = softmax::INSTRUCTION_SET;
  using V = vectors::Simd<Stat>;
  using Vec = typename V::Vec;
  const auto for_vectors = [&](auto visit) INLINE_LAMBDA {
    for (int64_t k = 0; k < num_classes; k += V::LANES)
      visit(x + k, counted + k, std::min<int64_t>(V::LANES, num_classes - k));
  };
  x[own_key] = -std::numeric_limits<Stat>::infinity();
  Vec most = Vec{} + x[own_key];
  for_vectors([&](Stat* at, const Stat* used, int64_t size) INLINE_LAMBDA {
    most = vectors::maximum(most, V::load(used, size) != 0 ? V::load(at, size) : most);
  });
  Stat shift = own;
  for (int i = 0; i < V::LANES; ++i) shift = std::max(shift, most[i] / temperature);
  Vec sums = {};
  for_vectors([&](Stat* at, const Stat* used, int64_t size) INLINE_LAMBDA {
    const Vec power = vectors::exp<Stat>(V::load(at, size) / temperature - shift);
    const Vec term = V::load(used, size) != 0 ? power : Vec{};
    sums += term;
    V::store(at, term, size);
  });
  double others = 0;
  for (int i = 0; i < V::LANES; ++i) others += sums[i];
  const double sum = others + std::exp(own - shift);
  const Stat factor = static_cast<Stat>(1 / sum);
  for_vectors([&](Stat* at, const Stat*, int64_t size)
                  INLINE_LAMBDA { V::store(at, V::load(at, size) * factor, size); });
  x[own_key] = static_cast<Stat>(-others / sum);
  return static_cast<Stat>(shift - own + std::log(sum));
}

// Writes the losses of all rows, and their slopes [R, K].
template <class Stat>
void forward(const Problem& problem, const Masks& masks, Stat* losses, const Tensor& slopes) {
  const int64_t num_classes = problem.num_classes();
  const Stat temperature = *problem.temperature.const_data_ptr<Stat>();
  const auto queries = rows_of<Stat>(problem, problem.queries, nullptr);
  const auto keys = rows_of<Stat>(problem, problem.keys, nullptr);
  std::optional<Rows<Stat>> positives;
  if (problem.positives) positives = rows_of<Stat>(problem, *problem.positives, nullptr);
  multiply(queries.matrix, transposed(keys.matrix), slopes);
  const std::vector<Stat> counted(masks.counted.begin(), masks.counted.end());
  Stat* const products = slopes.mutable_data_ptr<Stat>();
  for_rows(problem.rows(), num_classes, [&](int64_t r) {
    Stat* const x = products + r * num_classes;
    losses[r] = 0;
    if (!masks.present[r]) {
      std::fill(x, x + num_classes, Stat(0));
      return;
    }
    const int64_t k = problem.class_of(r);
    const Stat own = positives ? dot(queries[r], (*positives)[r], problem.dim()) : x[k];
    losses[r] = loss_of_row(x, counted.data(), num_classes, k, own / temperature, temperature);
  });
}

std::tuple<Tensor, Tensor> centroid_info_nce(Tensor queries, Tensor keys,
                                             std::optional<Tensor> positives,
                                             std::optional<Tensor> present,
                                             std::optional<Tensor> present_keys, int64_t first,
                                             Tensor temperature, std::string reduction,
                                             std::optional<double> normalize) {
  const Problem problem = {queries, keys,        positives, present,  present_keys,
                           first,   temperature, reduction, normalize};
  const Masks masks(problem);
  const int64_t rows = problem.rows();
  const Tensor slopes = new_empty({rows, problem.num_classes()}, problem.stat());
  Tensor losses = new_empty({queries.sizes().begin(), queries.sizes().end() - 1}, problem.stat());
  const auto run = [&](auto of) {
    using Stat = decltype(of);
    Stat* const of_rows = losses.mutable_data_ptr<Stat>();
    forward(problem, masks, of_rows, slopes);
    if (reduction == "none") return;
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += of_rows[r];
    const Tensor reduced = new_empty({}, problem.stat());
    *reduced.mutable_data_ptr<Stat>() = static_cast<Stat>(sum * masks.factor);
    losses = reduced;
  };
  problem.stat() == ScalarType::Double ? run(double{}) : run(float{});
  return {losses, slopes};
}

std::tuple<Tensor, Tensor, Tensor> centroid_info_nce_backward(
    Tensor dlosses, Tensor queries, Tensor keys, std::optional<Tensor> positives,
    std::optional<Tensor> present, std::optional<Tensor> present_keys, Tensor slopes, int64_t first,
    Tensor temperature, std::string reduction, std::optional<double> normalize, bool of_queries,
    bool of_keys, bool of_positives) {
  const Problem problem = {queries, keys,        positives, present,  present_keys,
                           first,   temperature, reduction, normalize};
  const Masks masks(problem);
  const int64_t rows = problem.rows(), num_classes = problem.num_classes(), dim = problem.dim();
  const ScalarType stat = problem.stat();
  const Tensor dlogits = new_empty({rows, num_classes}, stat);
  Tensor dqueries = absent(queries.scalar_type()), dkeys = absent(keys.scalar_type()),
         dpositives = absent(positives.value_or(queries).scalar_type());
  const auto run = [&](auto of) {
    using Stat = decltype(of);
    const auto q = rows_of<Stat>(problem, queries, &masks.present);
    const auto k = rows_of<Stat>(problem, keys, &masks.read);
    std::vector<Stat> of_own(rows);  // the gradients of the logits of positives
    const auto add_of_own = [&](const Tensor& gradient, const Rows<Stat>& factors) {
      Stat* const target = gradient.mutable_data_ptr<Stat>();
      for_rows(rows, dim, [&](int64_t r) {
        const Stat* const factor = factors[r];
        for (int64_t d = 0; d < dim; ++d) target[r * dim + d] += of_own[r] * factor[d];
      });
    };
    const Place place(dlosses, dlosses.dim());
    const Stat scale = static_cast<Stat>(masks.factor) / *temperature.const_data_ptr<Stat>();
    const Stat *const upstream = dlosses.const_data_ptr<Stat>(), *const slope =
                                                                     slopes.const_data_ptr<Stat>();
    Stat* const dx = dlogits.mutable_data_ptr<Stat>();
    for_rows(rows, num_classes, [&](int64_t r) {
      const Stat factor = masks.present[r] ? upstream[place(r)] * scale : 0;
      for (int64_t i = r * num_classes; i < (r + 1) * num_classes; ++i) dx[i] = slope[i] * factor;
      if (positives) of_own[r] = std::exchange(dx[r * num_classes + problem.class_of(r)], Stat(0));
    });
    std::optional<Rows<Stat>> p;
    if (positives) p = rows_of<Stat>(problem, *positives, &masks.present);
    if (of_queries) {
      const Tensor dq = new_empty({queries.sizes().begin(), queries.sizes().end()}, stat);
      multiply(dlogits, k.matrix, view(dq, rows, dim, dim, 1));
      if (p) add_of_own(dq, *p);
      dqueries = gradient_of(problem, queries, q, dq);
    }
    if (of_keys) {
      const Tensor dk = new_empty({num_classes, dim}, stat);
      multiply(transposed(dlogits), q.matrix, dk);
      dkeys = gradient_of(problem, keys, k, dk);
    }
    if (of_positives) {
      const Tensor dp = new_zeros({positives->sizes().begin(), positives->sizes().end()}, stat);
      add_of_own(dp, q);
      dpositives = gradient_of(problem, *positives, *p, dp);
    }
  };
  stat == ScalarType::Double ? run(double{}) : run(float{});
  return {dqueries, dkeys, dpositives};
}

}  // namespace
}  // namespace anchorops::cpu

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  using namespace anchorops::cpu;
  library.impl("centroid_info_nce.cpu", TORCH_BOX(&centroid_info_nce));
  library.impl("centroid_info_nce_backward.cpu", TORCH_BOX(&centroid_info_nce_backward));
}

// The operator anchorops::centroid_info_nce_backward.cuda. Names as in forward.cu.
//
//   dlogits[r, k] = dlosses[r]·e^(logits[r, k] − lse[r])/τ
//   dpositive[r] = dlosses[r]·(e^−losses[r] − 1)/τ, which is dlogits[r, k] if p_r is the own key k
//   dqueries[r] = Σ_k dlogits[r, k]·key_k + dpositive[r]·p_r    dpositives[r] = dpositive[r]·q_r
//   dkeys[k] = Σ_r dlogits[r, k]·q_r
//
// A block computes the logits of its rows again, for each 256 channels of their gradient.
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "products.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CHANNELS = THREADS;  // of a gradient that a block computes
constexpr int DLOGITS_FLOATS = OTHERS * OURS;

struct Gradients {
  const float *dlosses, *losses, *lse;  // [R]
  float *dqueries, *dkeys;              // [R, D], [K, D]
  float* dpositives;                    // [R, D], or null
};

// The gradients of the inner products of a row that is present.
struct DlogitsOfRow {
  float dloss, lse, dpositive;
  int own_key;

  __device__ DlogitsOfRow(const Problem& problem, const Gradients& gradients, int r)
      : dloss(gradients.dlosses[r] * problem.inverse_temperature),
        lse(gradients.lse[r]),
        dpositive(dloss * expm1f(-gradients.losses[r])),
        own_key(problem.own_key(r)) {}
};

// The gradient of 16 queries, with that of their positives; or of 16 keys.
template <bool OF_QUERIES>
__device__ void write_gradients(const Problem& problem, const Gradients& gradients, int first_our) {
  extern __shared__ __align__(16) float shared[];
  float* const dlogits = shared + TILE_FLOATS;  // [OTHERS, OURS]
  const Rows &queries = problem.queries, &keys = problem.keys;
  const Rows &ours = OF_QUERIES ? queries : keys, &others = OF_QUERIES ? keys : queries;
  const int our = first_our + threadIdx.x / 16, dim = problem.dim;
  const int d = blockIdx.y * CHANNELS + threadIdx.x;
  float totals[OURS] = {};
  for (int first = 0; first < others.count; first += OTHERS) {
    float products[EACH] = {};
    // begins with a barrier: all threads have read the dlogits before
    multiply(shared, ours, first_our, others, first, dim, products);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int place = threadIdx.x % 16 + 16 * i, other = first + place;
      const int r = OF_QUERIES ? our : other, k = OF_QUERIES ? other : our;
      float dlogit = 0;
      if (queries.has(r) && k < keys.count) {
        const DlogitsOfRow row(problem, gradients, r);
        if (problem.in_denominator(r, k))
          dlogit = row.dloss * expf(problem.inverse_temperature * products[i] - row.lse);
        else if (k == row.own_key && problem.own_key_is_positive && !OF_QUERIES)
          dlogit = row.dpositive;
      }
      dlogits[place * OURS + threadIdx.x / 16] = dlogit;
    }
    __syncthreads();
    float sums[OURS] = {};
    const int end = min(OTHERS, others.count - first);
    for (int i = 0; i < end; ++i) {
      const float x = d < dim && others.has(first + i) ? others.at(first + i, d) : 0;
#pragma unroll
      for (int j = 0; j < OURS; j += 4) {
        const auto four = *reinterpret_cast<const float4*>(dlogits + i * OURS + j);
        sums[j] = fmaf(four.x, x, sums[j]);
        sums[j + 1] = fmaf(four.y, x, sums[j + 1]);
        sums[j + 2] = fmaf(four.z, x, sums[j + 2]);
        sums[j + 3] = fmaf(four.w, x, sums[j + 3]);
      }
    }
#pragma unroll
    for (int j = 0; j < OURS; ++j) totals[j] += sums[j];
  }

#pragma unroll
  for (int j = 0; j < OURS; ++j) {
    const int i = first_our + j;
    if (i >= ours.count || d >= dim) continue;
    const int64_t place = int64_t{i} * dim + d;
    if (!OF_QUERIES) {
      gradients.dkeys[place] = totals[j];
      continue;
    }
    const bool present = queries.has(i);
    const float weight = present ? DlogitsOfRow(problem, gradients, i).dpositive : 0;
    gradients.dqueries[place] =
        present ? fmaf(weight, problem.positives.at(problem.positive(i), d), totals[j]) : 0;
    if (gradients.dpositives) gradients.dpositives[place] = present ? weight * queries.at(i, d) : 0;
  }
}

// grid: (blocks of 16 queries, then of 16 keys) × blocks of 256 channels.
__global__ void __launch_bounds__(THREADS, 1)
    centroid_info_nce_backward_kernel(const __grid_constant__ Problem problem,
                                      const __grid_constant__ Gradients gradients) {
  const int row_blocks = ceil_div(problem.queries.count, OURS), block = blockIdx.x;
  if (block < row_blocks)
    write_gradients<true>(problem, gradients, block * OURS);
  else
    write_gradients<false>(problem, gradients, (block - row_blocks) * OURS);
}

std::tuple<Tensor, Tensor, Tensor> centroid_info_nce_backward(
    Tensor dlosses, Tensor queries, Tensor keys, std::optional<Tensor> positives,
    std::optional<Tensor> present, std::optional<Tensor> present_keys, Tensor losses, Tensor lse,
    double temperature) {
  const char* name = "centroid_info_nce_backward.cuda";
  const OnDevice device(queries);
  const Problem problem =
      problem_of(name, queries, keys, positives, present, present_keys, temperature);
  check_table(name, "dlosses", dlosses, {queries.size(0)});
  check_table(name, "losses", losses, {queries.size(0)});
  check_table(name, "lse", lse, {queries.size(0)});
  const auto like = [](const Tensor& tensor) {
    return new_empty(tensor, to_vector(tensor.sizes()), ScalarType::Float);
  };
  const Tensor empty = new_empty(queries, {0}, ScalarType::Float);
  Tensor dqueries = like(queries), dkeys = like(keys);
  Tensor dpositives = positives ? like(*positives) : empty;
  const Gradients gradients = {
      .dlosses = dlosses.const_data_ptr<float>(),
      .losses = losses.const_data_ptr<float>(),
      .lse = lse.const_data_ptr<float>(),
      .dqueries = dqueries.mutable_data_ptr<float>(),
      .dkeys = dkeys.mutable_data_ptr<float>(),
      .dpositives = positives ? dpositives.mutable_data_ptr<float>() : nullptr};
  const int blocks = ceil_div(problem.queries.count, OURS) + ceil_div(problem.keys.count, OURS);
  launch("centroid_info_nce_backward_kernel", centroid_info_nce_backward_kernel,
         dim3(blocks, ceil_div(problem.dim, CHANNELS)), THREADS,
         (TILE_FLOATS + DLOGITS_FLOATS) * sizeof(float), device.stream, problem, gradients);
  return {dqueries, dkeys, dpositives};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, CUDA, library) {
  library.impl("centroid_info_nce_backward.cuda",
               TORCH_BOX(&anchorops::cuda::centroid_info_nce_backward));
}

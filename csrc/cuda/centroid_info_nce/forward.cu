// The operator anchorops::centroid_info_nce.cuda.
//
//   logits[r, k] = q_r·key_k/τ                 positive[r] = q_r·p_r/τ
//   lse[r] = log(e^positive[r] + Σ_k e^logits[r, k]), k: the keys that are present, without the own
//   losses[r] = lse[r] − positive[r], 0 of an absent row
//
// Row r is a query of class r / G. The logits are never in memory. All sums have a fixed order.
#include <cmath>
#include <optional>
#include <tuple>

#include "products.cuh"

namespace anchorops::cuda {
namespace {

// grid: blocks of 16 rows.
__global__ void __launch_bounds__(THREADS, 1)
    centroid_info_nce_kernel(const __grid_constant__ Problem problem,
                             float* losses,  // [R]
                             float* lse) {   // [R]
  extern __shared__ __align__(16) float shared[];
  const Rows &queries = problem.queries, &keys = problem.keys, &positives = problem.positives;
  const int column = threadIdx.x % 16, first_row = blockIdx.x * OURS;
  const int r = first_row + threadIdx.x / 16;
  float maximum = -INFINITY, total = 0;  // of the thread's logits
  for (int first = 0; first < keys.count; first += OTHERS) {
    float logits[EACH] = {};
    multiply(shared, queries, first_row, keys, first, problem.dim, logits);
    float largest = maximum;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int k = first + column + 16 * i;
      logits[i] =
          problem.in_denominator(r, k) ? problem.inverse_temperature * logits[i] : -INFINITY;
      largest = fmaxf(largest, logits[i]);
    }
    const float shift = largest == -INFINITY ? 0 : largest;
    total *= expf(maximum - shift);
#pragma unroll
    for (int i = 0; i < EACH; ++i) total += expf(logits[i] - shift);
    maximum = largest;
  }

  const bool present = queries.has(r);
  float product = 0;
  if (present)
    for (int d = column; d < problem.dim; d += 16)
      product = fmaf(queries.at(r, d), positives.at(problem.positive(r), d), product);
  float largest = maximum;
  for (int lanes = 8; lanes; lanes /= 2) {  // the 16 threads of a row
    product += __shfl_xor_sync(FULL_WARP, product, lanes);
    largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, lanes));
  }
  const float positive = problem.inverse_temperature * product;
  largest = fmaxf(largest, positive);
  total *= expf(maximum - largest);
  for (int lanes = 8; lanes; lanes /= 2) total += __shfl_xor_sync(FULL_WARP, total, lanes);
  if (column > 0 || r >= queries.count) return;
  const float result = largest + logf(total + expf(positive - largest));
  lse[r] = result;
  losses[r] = present ? result - positive : 0;
}

std::tuple<Tensor, Tensor> centroid_info_nce(Tensor queries, Tensor keys,
                                             std::optional<Tensor> positives,
                                             std::optional<Tensor> present,
                                             std::optional<Tensor> present_keys,
                                             double temperature) {
  const OnDevice device(queries);
  const Problem problem = problem_of("centroid_info_nce.cuda", queries, keys, positives, present,
                                     present_keys, temperature);
  Tensor losses = new_empty(queries, {queries.size(0)}, ScalarType::Float);
  Tensor lse = new_empty(queries, {queries.size(0)}, ScalarType::Float);
  launch("centroid_info_nce_kernel", centroid_info_nce_kernel,
         ceil_div(problem.queries.count, OURS), THREADS, TILE_FLOATS * sizeof(float), device.stream,
         problem, losses.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>());
  return {losses, lse};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, CUDA, library) {
  library.impl("centroid_info_nce.cuda", TORCH_BOX(&anchorops::cuda::centroid_info_nce));
}

// The operators anchorops::unit_rows.cuda and unit_rows_backward.cuda: rows of length 1, or the
// means of classes scaled to length 1.
//
//   m_r = rows_r / max(counts_r, 1)    u_r = m_r / max(‖m_r‖, eps)
//   drows_r = (du_r − (u_r·du_r)·u_r) / (max(counts_r, 1)·max(‖m_r‖, eps))
//
// If ‖m_r‖ < eps, drows has no term (u_r·du_r)·u_r.
//
// One launch in each direction, a warp per row. The K×D numbers are read twice, the second time
// from the L1 cache. Latency determines the time: predicted 3 µs, not measured.
#include "tensors.cuh"

#include <cmath>

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 128;

__device__ float sum_of_warp(float value) {
  for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(FULL_WARP, value, lanes);
  return value;
}

__device__ float count_of(const int64_t* counts, int64_t row) {
  return counts ? static_cast<float>(max(counts[row], int64_t{1})) : 1;
}

__global__ void __launch_bounds__(THREADS)
    unit_rows_kernel(const float* rows,      // [count, dim]
                     const int64_t* counts,  // [count] or null
                     float* units,           // [count, dim]
                     float* norms,           // [count]
                     int64_t count, int64_t dim, float eps) {
  const int64_t row = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= count) return;
  rows += row * dim;
  units += row * dim;
  const float n = count_of(counts, row);
  float squares = 0;
#pragma unroll 8
  for (int64_t d = lane; d < dim; d += 32) squares += (rows[d] / n) * (rows[d] / n);
  const float norm = sqrtf(sum_of_warp(squares)), length = fmaxf(norm, eps);
#pragma unroll 8
  for (int64_t d = lane; d < dim; d += 32) units[d] = rows[d] / n / length;
  if (lane == 0) norms[row] = norm;
}

__global__ void __launch_bounds__(THREADS)
    unit_rows_backward_kernel(const float* dunits,    // [count, dim]
                              const float* units,     // [count, dim]
                              const float* norms,     // [count]
                              const int64_t* counts,  // [count] or null
                              float* drows,           // [count, dim]
                              int64_t count, int64_t dim, float eps) {
  const int64_t row = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= count) return;
  dunits += row * dim;
  units += row * dim;
  drows += row * dim;
  const float norm = norms[row], length = fmaxf(norm, eps) * count_of(counts, row);
  float product = 0;
#pragma unroll 8
  for (int64_t d = lane; d < dim; d += 32) product += dunits[d] * units[d];
  product = sum_of_warp(product);
  if (norm < eps) product = 0;
#pragma unroll 8
  for (int64_t d = lane; d < dim; d += 32) drows[d] = (dunits[d] - product * units[d]) / length;
}

const int64_t* data(const std::optional<Tensor>& counts) {
  return counts ? counts->const_data_ptr<int64_t>() : nullptr;
}

dim3 blocks_for(int64_t rows) {
  return grid_of("unit_rows.cuda", ceil_div(rows, int64_t{THREADS / 32}));
}

std::tuple<Tensor, Tensor> unit_rows(Tensor rows, std::optional<Tensor> counts, double eps) {
  const OnDevice device(rows);
  std::vector<int64_t> shape = to_vector(rows.sizes());
  Tensor units = new_empty(rows, shape, ScalarType::Float);
  const int64_t dim = shape.back();
  shape.pop_back();
  Tensor norms = new_empty(rows, shape, ScalarType::Float);
  if (rows.numel() == 0) return {units, norms};
  launch("unit_rows_kernel", unit_rows_kernel, blocks_for(norms.numel()), THREADS, 0, device.stream,
         rows.const_data_ptr<float>(), data(counts), units.mutable_data_ptr<float>(),
         norms.mutable_data_ptr<float>(), norms.numel(), dim, static_cast<float>(eps));
  return {units, norms};
}

Tensor unit_rows_backward(Tensor dunits, Tensor units, Tensor norms, std::optional<Tensor> counts,
                          double eps) {
  const OnDevice device(units);
  Tensor drows = new_empty(units, to_vector(units.sizes()), ScalarType::Float);
  if (units.numel() == 0) return drows;
  launch("unit_rows_backward_kernel", unit_rows_backward_kernel, blocks_for(norms.numel()), THREADS,
         0, device.stream, dunits.const_data_ptr<float>(), units.const_data_ptr<float>(),
         norms.const_data_ptr<float>(), data(counts), drows.mutable_data_ptr<float>(),
         norms.numel(), units.size(-1), static_cast<float>(eps));
  return drows;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("unit_rows.cuda", TORCH_BOX(&anchorops::cuda::unit_rows));
  library.impl("unit_rows_backward.cuda", TORCH_BOX(&anchorops::cuda::unit_rows_backward));
}

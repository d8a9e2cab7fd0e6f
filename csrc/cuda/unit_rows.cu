// The operators anchorops::unit_rows.cuda and unit_rows_backward.cuda: rows of length 1, or the
// means of classes scaled to length 1.
//
//   m_r = rows_r / max(counts_r, 1)    u_r = m_r / max(‖m_r‖, eps)
//   c_k = unit row of mean_g m_kg
//   present_r = [counts_r > 0]; with centroids: for all rows of the class
//   drows_r = (dm_r + (du_r − (u_r·du_r)·u_r) / max(‖m_r‖, eps)) / max(counts_r, 1)
//
// If ‖m_r‖ < eps, drows has no term (u_r·du_r)·u_r. The centroids c have no gradient.
//
// One launch in each direction, a warp per row or centroid. The means are written first, and read
// again from the caches. Latency determines the time: predicted 6 to 9 µs, with the launch, not
// measured.
#include "row_lanes.cuh"
#include "tensors.cuh"
#include "warps.cuh"

#include <cmath>

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 128;

// 1 / max(counts[row], 1). Numbers are multiplied by it: a division of each number has a branch,
// and takes longer than the loads.
__device__ float share_of(const int64_t* counts, int64_t row) {
  return counts ? 1 / static_cast<float>(max(counts[row], int64_t{1})) : 1;
}

// The warps after those of the rows compute the centroid of a class each.
__global__ void __launch_bounds__(THREADS)
    unit_rows_kernel(const float* rows,      // [count, dim], for centroids [K, G, dim]
                     const int64_t* counts,  // [count] or null
                     float* units,           // [count, dim]
                     float* means,           // [count, dim] or null
                     float* centroids,       // [K, dim], or null: K is 0
                     float* norms,           // [count]
                     bool* present,          // [count] or null
                     int64_t count, int64_t num_classes, int64_t groups, int64_t dim, float eps) {
  const int64_t warp = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (warp >= count + num_classes) return;
  const bool of_row = warp < count;
  const int64_t first = of_row ? warp : (warp - count) * groups,
                last = first + (of_row ? 1 : groups);
  float* unit = of_row ? units + warp * dim : centroids + (warp - count) * dim;
  float squares = 0;
  for (int64_t r = first; r < last; ++r) {
    const float share = share_of(counts, r) / static_cast<float>(last - first);
    struct Numbers {
      float row, before;
    };
    for_lane(
        dim, [&](int64_t d) { return Numbers{rows[r * dim + d], r == first ? 0 : unit[d]}; },
        [&](int64_t d, Numbers of) {
          const float value = unit[d] = of.before + share * of.row;
          if (r == last - 1) squares += value * value;
        });
  }
  const float norm = sqrtf(sum_of_warp(squares)), inverse = 1 / fmaxf(norm, eps);
  for_lane(
      dim, [&](int64_t d) { return unit[d]; },
      [&](int64_t d, float value) {
        unit[d] = inverse * value;
        if (of_row && means) means[warp * dim + d] = value;
      });
  if (!of_row || lane > 0) return;
  norms[warp] = norm;
  if (!present) return;
  const int64_t begin = num_classes ? warp / groups * groups : warp;
  bool in_all = true;
  for (int64_t r = begin; r < begin + (num_classes ? groups : 1); ++r) in_all &= counts[r] > 0;
  present[warp] = in_all;
}

__global__ void __launch_bounds__(THREADS)
    unit_rows_backward_kernel(const float* dunits,    // [count, dim] or null
                              const float* dmeans,    // [count, dim] or null
                              const float* units,     // [count, dim]
                              const float* norms,     // [count]
                              const int64_t* counts,  // [count] or null
                              float* drows,           // [count, dim]
                              int64_t count, int64_t dim, float eps) {
  const int64_t row = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= count) return;
  const float norm = norms[row], inverse = 1 / fmaxf(norm, eps), share = share_of(counts, row);
  float product = 0;
  if (dunits && norm >= eps) {
    for_lane(
        dim, [&](int64_t d) { return dunits[row * dim + d] * units[row * dim + d]; },
        [&](int64_t, float term) { product += term; });
    product = sum_of_warp(product);
  }
  struct Numbers {
    float dunit, unit, dmean;
  };
  for_lane(
      dim,
      [&](int64_t d) {
        const int64_t i = row * dim + d;
        return Numbers{dunits ? dunits[i] : 0, units[i], dmeans ? dmeans[i] : 0};
      },
      [&](int64_t d, Numbers of) {
        const float dunit = dunits ? inverse * (of.dunit - product * of.unit) : 0;
        drows[row * dim + d] = share * (dunit + of.dmean);
      });
}

dim3 blocks_for(int64_t rows) {
  return grid_of("unit_rows.cuda", ceil_div(rows, int64_t{THREADS / 32}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> unit_rows(Tensor rows,
                                                             std::optional<Tensor> counts,
                                                             double eps, bool with_means,
                                                             bool with_centroids) {
  const OnDevice device(rows);
  const std::vector<int64_t> size = to_vector(rows.sizes()), nothing = {0};
  const int64_t dim = size.back(), num_classes = with_centroids ? size[0] : 0;
  const auto new_floats = [&](const std::vector<int64_t>& shape) {
    return new_empty(rows, shape, ScalarType::Float);
  };
  Tensor units = new_floats(size), means = new_floats(with_means ? size : nothing);
  Tensor centroids = new_floats(with_centroids ? std::vector<int64_t>{num_classes, dim} : nothing);
  const std::vector<int64_t> shape = {size.begin(), size.end() - 1};
  Tensor norms = new_floats(shape);
  Tensor present = new_empty(rows, counts ? shape : nothing, ScalarType::Bool);
  if (rows.numel() > 0)
    launch("unit_rows_kernel", unit_rows_kernel, blocks_for(norms.numel() + num_classes), THREADS,
           0, device.stream, rows.const_data_ptr<float>(), optional_data<int64_t>(counts),
           units.mutable_data_ptr<float>(), with_means ? means.mutable_data_ptr<float>() : nullptr,
           with_centroids ? centroids.mutable_data_ptr<float>() : nullptr,
           norms.mutable_data_ptr<float>(), counts ? present.mutable_data_ptr<bool>() : nullptr,
           norms.numel(), num_classes, with_centroids ? size[1] : 1, dim, static_cast<float>(eps));
  return {units, means, centroids, norms, present};
}

Tensor unit_rows_backward(std::optional<Tensor> dunits, std::optional<Tensor> dmeans, Tensor units,
                          Tensor norms, std::optional<Tensor> counts, double eps) {
  const OnDevice device(units);
  Tensor drows = new_empty(units, to_vector(units.sizes()), ScalarType::Float);
  if (units.numel() == 0) return drows;
  launch("unit_rows_backward_kernel", unit_rows_backward_kernel, blocks_for(norms.numel()), THREADS,
         0, device.stream, optional_data<float>(dunits), optional_data<float>(dmeans),
         units.const_data_ptr<float>(), norms.const_data_ptr<float>(),
         optional_data<int64_t>(counts), drows.mutable_data_ptr<float>(), norms.numel(),
         units.size(-1), static_cast<float>(eps));
  return drows;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("unit_rows.cuda", TORCH_BOX(&anchorops::cuda::unit_rows));
  library.impl("unit_rows_backward.cuda", TORCH_BOX(&anchorops::cuda::unit_rows_backward));
}

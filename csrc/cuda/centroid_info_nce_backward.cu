// The operator anchorops::centroid_info_nce_backward.cuda.
//
//   dlogits[r, j] = dloss[r]·(e^(logits[r, j] − lse[r]) − [j is r's own])/τ
//   dqueries = dlogits·keys,  dkeys = dlogitsᵀ·queries,  dpositives[r] = dlogits[r, own]·q_r
//
// Two launches: the first computes the logits again, tile by tile, and their gradients; the second
// computes both products with these gradients.
//
// Predicted for K = 150, D = 768 on an H200, not measured: the first kernel as in the forward pass,
// 5 µs. The second has 120 blocks of 32 × 64 outputs; each reads 58 KB (float32) from the L2
// cache, 7 MB together, 1.3 µs. A warp needs 451 instructions for 32 terms, 256 of them
// multiplications: 2.6 µs if none waits; with the launch and five stages of loads behind
// multiplications 6 µs. Forward and backward together 19 µs.
#include "centroid_info_nce.cuh"

#include <cmath>

namespace anchorops::cuda {
namespace {

// grid: blocks of rows × blocks of keys.
template <int TILE>
__global__ void __launch_bounds__(THREADS, TILE == 64 ? 2 : 1)
    dlogits_kernel(const float* dloss,  // [K·G] by strides, 0 for a scalar
                   int64_t stride_dloss_k, int64_t stride_dloss_g, Rows queries, Rows keys,
                   Present present,
                   const float* lse,              // [K·G]
                   const float* positive_logits,  // [K·G]
                   const float* scale,            // one
                   float* dlogits,  // [K·G, width], without that of the own key if positives were
                                    // given; zeros from column K on
                   float* dpositive_logits,  // [K·G], written if positives were given
                   int width, float inverse_temperature) {
  constexpr int N = Logits<TILE>::PER_THREAD;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int first_row = blockIdx.x * TILE + threadIdx.x / 16;
  const int first_key = blockIdx.y * TILE + threadIdx.x % 16;
  // All of these are loaded before the product, but used after it.
  uint8_t is_present[N], in_denominator[N];
  float lse_of_row[N], positive[N], dloss_of_row[N];
  const float scale_of_sum = *scale;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int r = first_row + 16 * i, k = first_key + 16 * i;
    in_denominator[i] = k < keys.count ? present.key(k) : 0;
    is_present[i] = 0;
    if (r >= queries.count) continue;
    is_present[i] = present.row(r);
    lse_of_row[i] = lse[r];
    positive[i] = positive_logits[r];
    dloss_of_row[i] = dloss[row_offset(r, queries.groups, stride_dloss_k, stride_dloss_g)];
  }
  Logits<TILE>::multiply(shared, queries, keys, present, blockIdx.x * TILE, blockIdx.y * TILE);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int r = first_row + 16 * i, own = r / queries.groups;
    if (r >= queries.count) continue;
    const float factor = dloss_of_row[i] * scale_of_sum * inverse_temperature;
    const float dpositive = is_present[i] ? factor * expm1f(positive[i] - lse_of_row[i]) : 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int k = first_key + 16 * j;
      const float logit =
          inverse_temperature *
          Logits<TILE>::Product::sum(shared, threadIdx.x / 16 + 16 * i, threadIdx.x % 16 + 16 * j);
      float dlogit = 0;
      if (k == own)
        dlogit = present.own_is_positive ? dpositive : 0;
      else if (in_denominator[j] && is_present[i])
        dlogit = factor * expf(logit - lse_of_row[i]);
      if (k < width) dlogits[int64_t{r} * width + k] = dlogit;
    }
    if (first_key == 0 && !present.own_is_positive) dpositive_logits[r] = dpositive;
  }
}

// The rows of a new tensor.
struct Output {
  void* data;
  ScalarType dtype;
  int count, dim;

  template <class T>
  __device__ void store(int64_t start, int elements, const EightFloats& values) const {
    T* address = static_cast<T*>(data) + start;
    if (elements < 8 || dim % 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < elements) address[i] = static_cast<T>(values[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; i += Vector<T>::SIZE) {
      Vector<T> vector;
#pragma unroll
      for (int j = 0; j < Vector<T>::SIZE; ++j) vector.elements[j] = static_cast<T>(values[i + j]);
      store_vector(address + i, vector);
    }
  }

  // Elements d to d + 7 of row r.
  __device__ void store(int r, int d, const EightFloats& values) const {
    const int64_t start = int64_t{r} * dim + d;
    const int elements = min(dim - d, 8);
    if (r >= count || elements <= 0) return;
    if (dtype == ScalarType::Float)
      store<float>(start, elements, values);
    else if (dtype == ScalarType::BFloat16)
      store<BFloat16>(start, elements, values);
    else
      store<Half>(start, elements, values);
  }
};

inline Output output_of(const Tensor& tensor, const Rows& rows) {
  return {tensor.mutable_data_ptr(), tensor.scalar_type(), rows.count, rows.dim};
}

// TILE rows of dqueries, or of dkeys, by WIDTH channels; both store their sums in the same way.
template <int TILE>
struct Gradients {
  static constexpr int WIDTH = 64, DEPTH = 32;
  using OfRows = TileProduct<TILE, WIDTH, DEPTH, true, false>;
  using OfKeys = TileProduct<TILE, WIDTH, DEPTH, false, false>;
  static constexpr size_t SHARED_BYTES = std::max(OfRows::SHARED_BYTES, OfKeys::SHARED_BYTES);
};

// grid: (blocks of rows for dqueries and dpositives, then blocks of keys for dkeys) × blocks of D.
template <int TILE>
__global__ void __launch_bounds__(THREADS, TILE == 64 ? 2 : 1)
    centroid_info_nce_backward_kernel(Rows dlogits,                   // these two: see
                                      const float* dpositive_logits,  // dlogits_kernel
                                      Rows queries, Rows keys, Rows positives, Present present,
                                      Output dqueries,   // [K, G, D]
                                      Output dkeys,      // [K, D]
                                      Output dpositives  // [K, G, D], if positives were given
    ) {
  using OfRows = typename Gradients<TILE>::OfRows;
  using OfKeys = typename Gradients<TILE>::OfKeys;
  constexpr int WIDTH = Gradients<TILE>::WIDTH;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const auto any = [](int) -> uint8_t { return 1; };
  const auto row = [&](int r) { return present.row(r); };
  const auto key = [&](int k) { return present.key_used(k); };
  const int row_blocks = ceil_div(queries.count, TILE), block = blockIdx.x;
  const bool of_rows = block < row_blocks;
  const int first = (of_rows ? block : block - row_blocks) * TILE, first_d = blockIdx.y * WIDTH;
  Output gradient = dkeys;
  if (of_rows) gradient = dqueries;
  if (of_rows)
    OfRows::multiply(
        shared, keys.count, ScalarType::Float, keys.dtype,
        [&](auto& stage, int k) { stage.load(dlogits, first, k, any); },
        [&](auto& stage, int k) { stage.load(keys, k, first_d, key); });
  else
    OfKeys::multiply(
        shared, queries.count, ScalarType::Float, queries.dtype,
        [&](auto& stage, int r) { stage.load(dlogits, r, first, any); },
        [&](auto& stage, int r) { stage.load(queries, r, first_d, row); });

  for (int unit = threadIdx.x; unit < TILE * WIDTH / 8; unit += THREADS) {
    const int m = unit / (WIDTH / 8), n = unit % (WIDTH / 8) * 8, r = first + m, d = first_d + n;
    EightFloats totals = OfRows::sum_eight(shared, m, n);
    if (of_rows && !present.own_is_positive && r < queries.count) {
      const float weight = dpositive_logits[r];
      EightFloats q = to_float(load_eight(queries, r, d, row), queries.dtype);
      const EightFloats p = to_float(load_eight(positives, r, d, row), positives.dtype);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        totals[i] = fmaf(weight, p[i], totals[i]);
        q[i] *= weight;
      }
      dpositives.store(r, d, q);
    }
    gradient.store(r, d, totals);
  }
}

template <int TILE>
void launch_dlogits(const Tensor& dloss, const Rows& queries, const Rows& keys,
                    const Present& present, const Tensor& lse, const Tensor& positive_logits,
                    const Tensor& scale, const Tensor& dlogits, const Tensor& dpositive_logits,
                    float inverse_temperature, Stream stream) {
  launch("centroid_info_nce dlogits_kernel", dlogits_kernel<TILE>,
         dim3(ceil_div(queries.count, TILE), ceil_div(keys.count, TILE)), THREADS,
         Logits<TILE>::Product::SHARED_BYTES, stream, dloss.const_data_ptr<float>(),
         dloss.dim() > 0 ? dloss.stride(0) : 0, dloss.dim() > 1 ? dloss.stride(1) : 0, queries,
         keys, present, lse.const_data_ptr<float>(), positive_logits.const_data_ptr<float>(),
         scale.const_data_ptr<float>(), dlogits.mutable_data_ptr<float>(),
         dpositive_logits.mutable_data_ptr<float>(), static_cast<int>(dlogits.size(1)),
         inverse_temperature);
}

template <int TILE>
void launch_gradients(const Rows& dlogits, const float* dpositive_logits, const Rows& queries,
                      const Rows& keys, const Rows& positives, const Present& present,
                      const Output& dqueries, const Output& dkeys, const Output& dpositives,
                      Stream stream) {
  launch("centroid_info_nce_backward_kernel", centroid_info_nce_backward_kernel<TILE>,
         dim3(ceil_div(queries.count, TILE) + ceil_div(keys.count, TILE),
              ceil_div(queries.dim, Gradients<TILE>::WIDTH)),
         THREADS, Gradients<TILE>::SHARED_BYTES, stream, dlogits, dpositive_logits, queries, keys,
         positives, present, dqueries, dkeys, dpositives);
}

std::tuple<Tensor, Tensor, Tensor> centroid_info_nce_backward(
    Tensor dloss, Tensor queries, Tensor keys, std::optional<Tensor> positives,
    std::optional<Tensor> present, std::optional<Tensor> present_keys, Tensor lse,
    Tensor positive_logits, Tensor scale, double temperature) {
  const OnDevice device(queries);
  const ScalarType dtype_of_keys = keys.scalar_type();
  const ScalarType dtype_of_positives = (positives ? *positives : queries).scalar_type();
  keys = without_doubles(keys);
  if (positives) positives = without_doubles(*positives);
  const Rows rows = rows_of(queries), key_rows = rows_of(keys);
  const Present mask = present_of(present, present_keys, rows.groups, !positives);
  const std::vector<int64_t> size = to_vector(queries.sizes());
  Tensor dqueries = new_empty(queries, size, rows.dtype);
  Tensor dkeys = new_empty(keys, to_vector(keys.sizes()), key_rows.dtype);
  Tensor dpositives = positives ? new_empty(*positives, size, positives->scalar_type())
                                : new_empty(queries, {0}, rows.dtype);
  const int64_t width = ceil_div(int64_t{key_rows.count}, 8) * 8;
  Tensor dlogits = new_empty(lse, {rows.count, width}, ScalarType::Float);
  Tensor dpositive_logits = new_empty(lse, {positives ? rows.count : 0}, ScalarType::Float);

  const bool large = large_tiles(rows.count, key_rows.count);
  const auto launch_first = large ? launch_dlogits<64> : launch_dlogits<16>;
  launch_first(dloss, rows, key_rows, mask, lse, positive_logits, scale, dlogits, dpositive_logits,
               static_cast<float>(1 / temperature), device.stream);

  const auto launch_second = large ? launch_gradients<64> : launch_gradients<32>;
  launch_second(rows_of(dlogits), dpositive_logits.const_data_ptr<float>(), rows, key_rows,
                positives ? rows_of(*positives) : Rows{}, mask, output_of(dqueries, rows),
                output_of(dkeys, key_rows), output_of(dpositives, rows), device.stream);
  return {dqueries, torch::stable::to(dkeys, dtype_of_keys),
          torch::stable::to(dpositives, dtype_of_positives)};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("centroid_info_nce_backward.cuda",
               TORCH_BOX(&anchorops::cuda::centroid_info_nce_backward));
}

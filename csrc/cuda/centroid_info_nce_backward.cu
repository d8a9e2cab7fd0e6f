// The operator anchorops::centroid_info_nce_backward.cuda.
//
//   dlogits[r, j] = dloss[r]·(e^(logits[r, j] − lse[r]) − [j is r's own])/τ
//   dqueries = dlogits·keys,  dkeys = dlogitsᵀ·queries,  dpositives[r] = dlogits[r, own]·q_r
//   dbias[j] = τ·Σ_r dlogits[r, j]
//
// One launch, if the logits were kept: their gradients are computed while they are copied to shared
// memory. Otherwise the logits of some rows are computed again, as in the forward pass, and then
// the gradients of their queries; those of the keys are added in the order of the rows.
#include "centroid_info_nce.cuh"

#include <cmath>

namespace anchorops::cuda {
namespace {

// The gradient of each row's loss.
struct DlossOfRows {
  const float* dloss;  // [K·G] by strides, 0 for a scalar
  int64_t stride_k, stride_g;
  const float* scale;            // one
  const float* lse;              // [K·G]
  const float* positive_logits;  // [K·G]
  float inverse_temperature;
  int count, groups;

  struct Row {
    float dloss, lse, positive;  // dloss/τ. An absent row: 0, ∞, 0

    __device__ float dlogit(float logit) const { return dloss * expf(logit - lse); }
    __device__ float dpositive() const { return dloss * expm1f(positive - lse); }
  };

  __device__ Row row(int r, const Present& present) const {
    if (r >= count || !present.row(r)) return {0, INFINITY, 0};
    const float gradient = dloss[row_offset(r, groups, stride_k, stride_g)];
    return {gradient * *scale * inverse_temperature, lse[r], positive_logits[r]};
  }
};

// Logits of the rows from first_row on, and what their gradients need.
struct KeptLogits {
  Rows logits;
  int first_row;
  DlossOfRows losses;
  Present present;
};

// Loads logits, and stores their gradients.
template <int ROWS, int COLUMNS>
struct DlogitsStage : OperandStage<ROWS, COLUMNS> {
  using Base = OperandStage<ROWS, COLUMNS>;
  DlossOfRows::Row rows[Base::PER_THREAD];
  int own[Base::PER_THREAD];  // the column of the own key among the eight; −1: it has no logit

  __device__ void load(const KeptLogits& from, int first_row, int first_column) {
    Base::load(from.logits, first_row, first_column, [](int) -> uint8_t { return 1; });
#pragma unroll
    for (int i = 0; i < Base::PER_THREAD; ++i) {
      const int unit = threadIdx.x + i * THREADS;
      const int r = from.first_row + first_row + unit / (COLUMNS / 8);
      rows[i] = from.losses.row(r, from.present);
      own[i] = from.present.own_is_positive
                   ? r / from.losses.groups - first_column - unit % (COLUMNS / 8) * 8
                   : -1;
    }
  }

  __device__ void store(float* shared, ScalarType dtype) const {
    Base::store_values(shared, [&](int i) {
      const Eight& eight = Base::eights[i];
      EightFloats values = to_float(eight, dtype);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float dlogit = own[i] == j ? rows[i].dpositive() : rows[i].dlogit(values[j]);
        values[j] = eight.selected ? dlogit : 0;
      }
      return values;
    });
  }
};

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

  // Adds elements d to d + 7 of row r, float32, to the values.
  __device__ void add_to(int r, int d, EightFloats& values) const {
    if (r >= count) return;
    const float* row = static_cast<const float*>(data) + int64_t{r} * dim;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (d + i < dim) values[i] += row[d + i];
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
  using OfRows = TileProduct<TILE, WIDTH, DEPTH, true, false, DlogitsStage>;
  using OfKeys = TileProduct<TILE, WIDTH, DEPTH, false, false, DlogitsStage>;
  static constexpr size_t SHARED_BYTES = std::max(OfRows::SHARED_BYTES, OfKeys::SHARED_BYTES);
};

struct Outputs {
  Output dqueries;    // [K, G, D]
  Output dkeys;       // [K, D]
  Output dpositives;  // [K, G, D], if positives were given
  float* dbias;       // [K] or null
  bool mirrored;      // positives are queries
  bool add;           // to dkeys, float32, and to dbias
};

// dbias of 32 keys: a warp sums every eighth row, a lane one column.
__device__ void sum_columns(float* shared, const KeptLogits& logits, const Outputs& outputs,
                            float temperature, int first_key, int num_classes) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = first_key + lane;
  float total = 0;
#pragma unroll 4
  for (int r = warp; r < logits.logits.count && k < num_classes; r += THREADS / 32) {
    const auto* row = static_cast<const float*>(logits.logits.data) + logits.logits.offset(r);
    const DlossOfRows::Row loss = logits.losses.row(logits.first_row + r, logits.present);
    const bool own =
        logits.present.own_is_positive && k == (logits.first_row + r) / logits.losses.groups;
    total += own ? loss.dpositive() : loss.dlogit(row[k]);
  }
  shared[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || k >= num_classes) return;
  for (int i = 1; i < THREADS / 32; ++i) total += shared[32 * i + lane];
  outputs.dbias[k] = temperature * total + (outputs.add ? outputs.dbias[k] : 0);
}

// grid: (blocks of rows for dqueries and dpositives, then blocks of keys for dkeys, then blocks of
// 32 keys for dbias) × blocks of D.
template <int TILE>
__global__ void __launch_bounds__(THREADS, TILE == 64 ? 2 : 1)
    centroid_info_nce_backward_kernel(Problem problem, KeptLogits logits, Outputs outputs) {
  using OfRows = typename Gradients<TILE>::OfRows;
  using OfKeys = typename Gradients<TILE>::OfKeys;
  constexpr int WIDTH = Gradients<TILE>::WIDTH;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const Rows &queries = problem.queries, &keys = problem.keys;
  const Present& present = problem.present;
  const auto row = [&](int r) { return present.row(r); };
  const auto key = [&](int k) { return present.key_used(k); };
  const int rows = logits.logits.count;
  const int row_blocks = ceil_div(rows, TILE), key_blocks = ceil_div(keys.count, TILE);
  const int block = blockIdx.x, first_d = blockIdx.y * WIDTH;
  if (block >= row_blocks + key_blocks) {
    if (blockIdx.y == 0)
      sum_columns(shared, logits, outputs, problem.temperature,
                  (block - row_blocks - key_blocks) * 32, keys.count);
    return;
  }
  const bool of_rows = block < row_blocks;
  const int first = (of_rows ? block : block - row_blocks) * TILE;
  if (of_rows)
    OfRows::multiply(
        shared, keys.count, ScalarType::Float, keys.dtype,
        [&](auto& stage, int k) { stage.load(logits, first, k); },
        [&](auto& stage, int k) { stage.load(keys, k, first_d, key); });
  else
    OfKeys::multiply(
        shared, rows, ScalarType::Float, queries.dtype,
        [&](auto& stage, int r) { stage.load(logits, r, first); },
        [&](auto& stage, int r) { stage.load(queries, logits.first_row + r, first_d, row); });

  for (int unit = threadIdx.x; unit < TILE * WIDTH / 8; unit += THREADS) {
    const int m = unit / (WIDTH / 8), n = unit % (WIDTH / 8) * 8, d = first_d + n;
    EightFloats totals = OfRows::sum_eight(shared, m, n);
    if (!of_rows) {
      if (outputs.add) outputs.dkeys.add_to(first + m, d, totals);
      outputs.dkeys.store(first + m, d, totals);
      continue;
    }
    if (first + m >= rows) continue;
    const int r = logits.first_row + first + m;
    if (!present.own_is_positive) {
      float weight = logits.losses.row(r, present).dpositive();
      const auto any = [](int) -> uint8_t { return 1; };
      const EightFloats p =
          to_float(load_eight(problem.positives, r, d, any), problem.positives.dtype);
      if (outputs.mirrored) {  // the positive is a query, and this row is its positive
        const int mirror =
            r / queries.groups * queries.groups + queries.groups - 1 - r % queries.groups;
        weight += logits.losses.row(mirror, present).dpositive();
      } else {
        EightFloats q = to_float(load_eight(queries, r, d, row), queries.dtype);
#pragma unroll
        for (int i = 0; i < 8; ++i) q[i] *= weight;
        outputs.dpositives.store(r, d, q);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)  // an absent row may contain NaN
        if (weight != 0) totals[i] = fmaf(weight, p[i], totals[i]);
    }
    outputs.dqueries.store(r, d, totals);
  }
}

template <int TILE>
void launch_gradients(const Problem& problem, const KeptLogits& logits, const Outputs& outputs,
                      Stream stream) {
  const int blocks_of_bias = outputs.dbias ? ceil_div(problem.keys.count, 32) : 0;
  const dim3 grid(
      ceil_div(logits.logits.count, TILE) + ceil_div(problem.keys.count, TILE) + blocks_of_bias,
      ceil_div(problem.queries.dim, Gradients<TILE>::WIDTH));
  launch("centroid_info_nce_backward_kernel", centroid_info_nce_backward_kernel<TILE>, grid,
         THREADS, Gradients<TILE>::SHARED_BYTES, stream, problem, logits, outputs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> centroid_info_nce_backward(
    Tensor dloss, Tensor queries, Tensor keys, std::optional<Tensor> bias,
    std::optional<Tensor> positives, std::optional<Tensor> present,
    std::optional<Tensor> present_keys, Tensor lse, Tensor positive_logits, Tensor scale,
    Tensor kept_logits, bool all_keys, bool mirrored, double temperature, int64_t logits_at_once) {
  const OnDevice device(queries);
  const ScalarType dtype_of_keys = keys.scalar_type();
  const ScalarType dtype_of_positives = (positives ? *positives : queries).scalar_type();
  keys = without_doubles(keys);
  if (positives) positives = without_doubles(*positives);
  const Problem problem = problem_of(queries, keys, bias, positives, present, present_keys,
                                     all_keys, mirrored, temperature);
  const Rows &rows = problem.queries, &key_rows = problem.keys;
  const int width = problem.width();

  // Without kept logits, a multiple of 64 rows at a time.
  const bool kept = kept_logits.dim() == 2;
  const int64_t rows_at_once = std::max(logits_at_once / std::max(width, 1) / 64, int64_t{1}) * 64;
  const int part =
      kept ? rows.count : static_cast<int>(std::min(rows_at_once, int64_t{rows.count}));
  const std::vector<int64_t> size = to_vector(queries.sizes());
  Tensor dqueries = new_empty(queries, size, rows.dtype);
  Tensor dkeys = new_empty(keys, to_vector(keys.sizes()),
                           part < rows.count ? ScalarType::Float : key_rows.dtype);
  Tensor dbias = new_empty(lse, {bias ? key_rows.count : 0}, ScalarType::Float);
  Tensor dpositives = positives ? new_empty(*positives, size, positives->scalar_type())
                                : new_empty(queries, {0}, rows.dtype);
  Tensor logits = kept ? kept_logits : new_empty(lse, {part, width}, ScalarType::Float);
  const DlossOfRows losses = {.dloss = dloss.const_data_ptr<float>(),
                              .stride_k = dloss.dim() > 0 ? dloss.stride(0) : 0,
                              .stride_g = dloss.dim() > 1 ? dloss.stride(1) : 0,
                              .scale = scale.const_data_ptr<float>(),
                              .lse = lse.const_data_ptr<float>(),
                              .positive_logits = positive_logits.const_data_ptr<float>(),
                              .inverse_temperature = 1 / problem.temperature,
                              .count = rows.count,
                              .groups = rows.groups};
  int first = 0;
  do {
    const int end = std::min(first + part, rows.count);
    if (!kept)
      compute_logits(problem,
                     {.first = first, .end = end, .logits = logits.mutable_data_ptr<float>()},
                     device.stream);
    Rows logits_of_part = rows_of(logits);
    logits_of_part.count = end - first;
    const auto launch_part =
        large_tiles(end - first, key_rows.count) ? launch_gradients<64> : launch_gradients<32>;
    launch_part(problem, {logits_of_part, first, losses, problem.present},
                {.dqueries = output_of(dqueries, rows),
                 .dkeys = output_of(dkeys, key_rows),
                 .dpositives = output_of(dpositives, rows),
                 .dbias = bias ? dbias.mutable_data_ptr<float>() : nullptr,
                 .mirrored = mirrored,
                 .add = first > 0},
                device.stream);
    first = end;
  } while (first < rows.count);
  return {dqueries, torch::stable::to(dkeys, dtype_of_keys), dbias,
          torch::stable::to(dpositives, dtype_of_positives)};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("centroid_info_nce_backward.cuda",
               TORCH_BOX(&anchorops::cuda::centroid_info_nce_backward));
}

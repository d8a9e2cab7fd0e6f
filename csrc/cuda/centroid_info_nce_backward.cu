// The operator anchorops::centroid_info_nce_backward.cuda.
//
//   dlogits[r, j] = dloss[r]·(e^(logits[r, j] − lse[r]) − [j is r's own])/τ
//   dqueries = dlogits·keys,  dkeys = dlogitsᵀ·queries,  dpositives[r] = dlogits[r, own]·q_r
//   dbias[j] = τ·Σ_r dlogits[r, j]
//
// One launch, if the logits were kept: their gradients are computed while they are copied to shared
// memory. Otherwise the logits of some rows are computed again, as in the forward pass, and then
// the gradients of their queries; those of the keys are added in the order of the rows.
#include "centroid_info_nce_backward.cuh"

namespace anchorops::cuda {
namespace {

// Loads logits, and stores their gradients.
template <int ROWS, int COLUMNS>
struct DlogitsStage : OperandStage<ROWS, COLUMNS> {
  using Base = OperandStage<ROWS, COLUMNS>;
  DlossOfRows::Loaded rows[Base::PER_THREAD];
  const DlossOfRows* losses;
  int own[Base::PER_THREAD];  // the column of the own key among the eight; −1: it has no logit

  __device__ void load(const KeptLogits& from, int first_row, int first_column) {
    Base::load(from.logits, first_row, first_column, [](int) -> uint8_t { return 1; });
    losses = &from.losses;
#pragma unroll
    for (int i = 0; i < Base::PER_THREAD; ++i) {
      const int r = from.first_row + first_row + Base::row(i);
      rows[i] = losses->load(r, from.present);
      own[i] =
          from.present.own_is_positive ? r / losses->groups - first_column - Base::column(i) : -1;
    }
  }

  __device__ void store(float* shared, ScalarType dtype) const {
    Base::store_values(shared, [&](int i) {
      const Eight& eight = Base::eights[i];
      EightFloats values = to_float(eight, dtype);
      const DlossOfRows::Row row = losses->row(rows[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float dlogit = own[i] == j ? row.dpositive() : row.dlogit(values[j]);
        values[j] = eight.selected ? dlogit : 0;
      }
      return values;
    });
  }
};

// TILE rows of dqueries, or of dkeys, by WIDTH channels; both store their sums in the same way.
template <int TILE>
struct Gradients {
  static constexpr int WIDTH = 64, DEPTH = TILE == 32 ? 64 : 32;
  using OfRows = TileProduct<TILE, WIDTH, DEPTH, true, false, DlogitsStage>;
  using OfKeys = TileProduct<TILE, WIDTH, DEPTH, false, false, DlogitsStage>;
  static constexpr size_t SHARED_BYTES = std::max(OfRows::SHARED_BYTES, OfKeys::SHARED_BYTES);
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
// 32 keys for dbias) × blocks of D × problems.
template <int TILE, int PROBLEMS>
__global__ void __launch_bounds__(THREADS, 2)
    centroid_info_nce_backward_kernel(const __grid_constant__ GradientProblems<PROBLEMS> given) {
  const int which = PROBLEMS > 1 ? blockIdx.z : 0;
  const Problem& problem = given.problems[which];
  const KeptLogits& logits = given.logits[which];
  const Outputs& outputs = given.outputs[which];
  const bool same_queries = PROBLEMS > 1 && given.same_queries;
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
    if (blockIdx.y == 0 && outputs.dbias)
      sum_columns(shared, logits, outputs, problem.temperature,
                  (block - row_blocks - key_blocks) * 32, keys.count);
    return;
  }
  const bool of_rows = block < row_blocks;
  if (!of_rows && !outputs.with_dkeys) return;
  const int first = (of_rows ? block : block - row_blocks) * TILE;
  if (of_rows) {
    if (same_queries && which > 0) return;
    // Keys of the second problem follow those of the first, from a multiple of DEPTH on.
    constexpr int DEPTH = Gradients<TILE>::DEPTH;
    const int before = same_queries ? ceil_div(keys.count, DEPTH) * DEPTH : 0;
    const auto in_second = [&](int k) { return PROBLEMS > 1 && same_queries && k >= before; };
    OfRows::multiply(
        shared, before + keys.count, ScalarType::Float, keys.dtype,
        [&](auto& stage, int k) {
          if (in_second(k))
            stage.load(given.logits[PROBLEMS - 1], first, k - before);
          else
            stage.load(logits, first, k);
        },
        [&](auto& stage, int k) {
          if (in_second(k)) {
            const Problem& second = given.problems[PROBLEMS - 1];
            stage.load(second.keys, k - before, first_d,
                       [&](int i) { return second.present.key_used(i); });
          } else {
            stage.load(keys, k, first_d, key);
          }
        });
  } else {
    OfKeys::multiply(
        shared, rows, ScalarType::Float, queries.dtype,
        [&](auto& stage, int r) { stage.load(logits, r, first); },
        [&](auto& stage, int r) { stage.load(queries, logits.first_row + r, first_d, row); });
  }

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

template <int TILE, int PROBLEMS>
void launch_gradients(const GradientProblems<PROBLEMS>& given, Stream stream) {
  const Rows &rows = given.logits[0].logits, &keys = given.problems[0].keys;
  bool bias = false;
  for (const Outputs& outputs : given.outputs) bias |= outputs.dbias != nullptr;
  const dim3 grid(ceil_div(rows.count, TILE) + ceil_div(keys.count, TILE) +
                      (bias ? ceil_div(keys.count, 32) : 0),
                  ceil_div(keys.dim, Gradients<TILE>::WIDTH), PROBLEMS);
  launch("centroid_info_nce_backward_kernel", centroid_info_nce_backward_kernel<TILE, PROBLEMS>,
         grid, THREADS, Gradients<TILE>::SHARED_BYTES, stream, given);
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
    const Outputs outputs = {.dqueries = output_of(dqueries, rows),
                             .dkeys = output_of(dkeys, key_rows),
                             .with_dkeys = true,
                             .dpositives = output_of(dpositives, rows),
                             .dbias = bias ? dbias.mutable_data_ptr<float>() : nullptr,
                             .mirrored = mirrored,
                             .add = first > 0};
    const GradientProblems<1> given = {
        {problem}, {{logits_of_part, first, losses, problem.present}}, {outputs}};
    large_tiles(end - first, key_rows.count) ? launch_gradients<64>(given, device.stream)
                                             : launch_gradients<32>(given, device.stream);
    first = end;
  } while (first < rows.count);
  return {dqueries, torch::stable::to(dkeys, dtype_of_keys), dbias,
          torch::stable::to(dpositives, dtype_of_positives)};
}

}  // namespace

void compute_gradients(const GradientProblems<2>& pair, Stream stream) {
  launch_gradients<32>(pair, stream);
}

}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("centroid_info_nce_backward.cuda",
               TORCH_BOX(&anchorops::cuda::centroid_info_nce_backward));
}

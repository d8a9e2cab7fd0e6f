// The operator anchorops::centroid_info_nce_backward.cuda.
//
//   dlogits[r, j] = dloss[r]·(e^(logits[r, j] − lse[r]) − [j is r's own])/τ
//   dqueries = dlogits·keys,  dkeys = dlogitsᵀ·queries,  dpositives[r] = dlogits[r, own]·q_r
//   dbias[j] = τ·Σ_r dlogits[r, j]
//
// One launch, if the logits were kept: each warp computes their gradients before it multiplies
// them. Otherwise the logits of some rows are computed again, as in the forward pass, and then
// the gradients of their queries; those of the keys are added in the order of the rows.
#include "centroid_info_nce_backward.cuh"
#include "row_products.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CHANNELS = ChannelProducts::CHANNELS, PITCH = CHANNELS + 8;

// dlogits·keys for 16 rows from `first` on, and 64 channels, in steps of 16 keys.
struct TimesKeys {
  const KeptLogits& logits;
  const Rows& keys;
  const Present& present;
  const int first, first_d, n = threadIdx.x % 32 / 4, q = threadIdx.x % 4;

  struct Step {
    Vector<float> logits[2];  // of rows n and n + 8, keys 4q to 4q + 3
    Eight eights[4];          // of these keys
    uint8_t used;             // the key begin + lane % 16
  };

  __device__ __forceinline__ Step load(int begin) const {
    Step step;
    const int k = begin + 4 * q, of_lane = begin + threadIdx.x % STEP;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first + 8 * half + n;
      step.logits[half] = r < logits.rows && k < logits.width
                              ? load_vector(logits.at(r, k))
                              : Vector<float>{{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
    }
    const uint8_t* rows[4];
    keys.four_rows(k, rows);
#pragma unroll
    for (int i = 0; i < 4; ++i) step.eights[i] = load_eight(keys, rows[i], first_d + 8 * n);
    step.used = of_lane < keys.count ? present.key_used(of_lane) : 0;
    return step;
  }

  __device__ __forceinline__ void add_to(ChannelProducts& products, int begin, int stride) const {
    const DlossOfRows::Loaded loaded[2] = {logits.load(first + n), logits.load(first + 8 + n)};
    const DlossOfRows::OfRow losses[2] = {logits.row(loaded[0]), logits.row(loaded[1])};
#pragma unroll 1
    for (; begin < keys.count; begin += stride) {
      const Step step = load(begin);
      const unsigned used = __ballot_sync(FULL_WARP, step.used);
      float dlogits[2][4];
      EightFloats floats[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        floats[i] = to_float(step.eights[i], keys.dtype, used >> (4 * q + i) & 1);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          dlogits[half][i] = losses[half].dlogit(begin + 4 * q + i, step.logits[half].elements[i]);
      }
      products.add(dlogits, floats);
    }
  }
};

// dlogitsᵀ·queries for 16 keys from `first` on, and 64 channels, in steps of 16 rows. Outputs n and
// n + 8 of the products are keys 2n and 2n + 1.
struct TimesQueries {
  const KeptLogits& logits;
  const Rows& queries;
  const int first, first_d, n = threadIdx.x % 32 / 4, q = threadIdx.x % 4;

  struct Step {
    float2 logits[4];            // of rows 4q to 4q + 3, keys 2n and 2n + 1
    Eight eights[4];             // of these rows
    DlossOfRows::Loaded losses;  // of row begin + lane % 16
  };

  __device__ __forceinline__ Step load(int begin) const {
    Step step;
    const int k = first + 2 * n;
    const uint8_t* rows[4];
    queries.four_rows(logits.first_row + begin + 4 * q, rows);
    step.losses = logits.load(begin + threadIdx.x % STEP);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = begin + 4 * q + i;
      step.logits[i] = r < logits.rows && k < logits.width
                           ? *reinterpret_cast<const float2*>(logits.at(r, k))
                           : float2{};
      step.eights[i] = load_eight(queries, rows[i], first_d + 8 * n);
    }
    return step;
  }

  __device__ __forceinline__ void add_to(ChannelProducts& products, int begin, int stride) const {
    const int k = first + 2 * n;
#pragma unroll 1
    for (; begin < logits.rows; begin += stride) {
      const Step step = load(begin);
      const unsigned selected = __ballot_sync(FULL_WARP, step.losses.selected);
      const DlossOfRows::OfRow losses = logits.row(step.losses);
      float dlogits[2][4];
      EightFloats floats[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        floats[i] = to_float(step.eights[i], queries.dtype, selected >> (4 * q + i) & 1);
        const DlossOfRows::OfRow row = losses.of_lane(4 * q + i);
        dlogits[0][i] = row.dlogit(k, step.logits[i].x);
        dlogits[1][i] = row.dlogit(k + 1, step.logits[i].y);
      }
      products.add(dlogits, floats);
    }
  }
};

// dbias of 32 keys: each warp sums every WARPS-th row, a lane one column.
__device__ void sum_columns(float* shared, const KeptLogits& logits, const Outputs& outputs,
                            float temperature, int first_key, int num_classes) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = first_key + lane;
  float total = 0;
#pragma unroll 8
  for (int r = warp; r < logits.rows && k < num_classes; r += WARPS)
    total += logits.row(logits.load(r)).dlogit(k, *logits.at(r, k));
  shared[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || k >= num_classes) return;
  for (int i = 1; i < WARPS; ++i) total += shared[32 * i + lane];
  outputs.dbias[k] = temperature * total + (outputs.add ? outputs.dbias[k] : 0);
}

// Rows of a block: TILE keys, or as many queries, but at least 32. With the small tile the warps of
// a block have different terms, so that few queries and keys occupy the device; of the gradient of
// the keys there are more terms.
template <int TILE>
constexpr int QUERIES = std::max(TILE, 32);

// Blocks that divide the channels of an output. Without channels one is left, for the bias.
__host__ __device__ inline int channel_blocks_of(const Rows& keys) {
  return max(ceil_div(keys.dim, CHANNELS), 1);
}

// grid: ((blocks of rows for dqueries and dpositives, then blocks of keys for dkeys) × blocks of D,
// then blocks of 32 keys for dbias) × problems. Blocks of D are next to each other, so at K = 171 a
// multiprocessor has a block of rows and one of keys.
template <int TILE, int PROBLEMS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    centroid_info_nce_backward_kernel(const __grid_constant__ GradientProblems<PROBLEMS> given) {
  const int which = PROBLEMS > 1 ? blockIdx.y : 0;
  const Problem& problem = given.problems[which];
  const KeptLogits& logits = given.logits[which];
  const Outputs& outputs = given.outputs[which];
  const bool same_queries = PROBLEMS > 1 && given.same_queries;
  auto* shared = reinterpret_cast<float*>(shared_memory());  // [splits, tile, PITCH]
  const Rows &queries = problem.queries, &keys = problem.keys;
  const Present& present = problem.present;
  const int rows = logits.rows;
  const int row_blocks = ceil_div(rows, QUERIES<TILE>), key_blocks = ceil_div(keys.count, TILE);
  const int channel_blocks = channel_blocks_of(keys);
  const int block = blockIdx.x / channel_blocks, first_d = blockIdx.x % channel_blocks * CHANNELS;
  if (block >= row_blocks + key_blocks) {
    const int of_bias = blockIdx.x - (row_blocks + key_blocks) * channel_blocks;
    if (outputs.dbias)
      sum_columns(shared, logits, outputs, problem.temperature, of_bias * 32, keys.count);
    return;
  }
  const bool of_rows = block < row_blocks;
  if (of_rows ? same_queries && which > 0 : !outputs.with_dkeys) return;
  const int tile = of_rows ? QUERIES<TILE> : TILE, splits = WARPS * 16 / tile;
  const int first = (of_rows ? block : block - row_blocks) * tile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = lane / 4, q = lane % 4;
  const int split = warp % splits, row_of_warp = warp / splits * 16;
  ChannelProducts products;
  if (of_rows) {
    for (int i = which; i < (same_queries ? PROBLEMS : which + 1); ++i) {
      const Problem& of = given.problems[i];
      TimesKeys{given.logits[i], of.keys, of.present, first + row_of_warp, first_d}.add_to(
          products, split * STEP, splits * STEP);
    }
  } else {
    TimesQueries{logits, queries, first + row_of_warp, first_d}.add_to(products, split * STEP,
                                                                       splits * STEP);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int row = split * tile + row_of_warp + (of_rows ? 8 * half + n : 2 * n + half);
      const EightFloats floats = products.eight(half, part);
      float* to = shared + row * PITCH + 16 * q + 8 * part;
      store_vector(to, floats.part[0]);
      store_vector(to + 4, floats.part[1]);
    }
  __syncthreads();

  for (int unit = threadIdx.x; unit < tile * CHANNELS / 8; unit += THREADS) {
    const int m = unit / (CHANNELS / 8), column = unit % (CHANNELS / 8) * 8, d = first_d + column;
    EightFloats totals{};
#pragma unroll 2
    for (int i = 0; i < splits; ++i) {
      const float* from = shared + (i * tile + m) * PITCH + column;
      const EightFloats of_split{{load_vector(from), load_vector(from + 4)}};
#pragma unroll
      for (int j = 0; j < 8; ++j) totals[j] += of_split[j];
    }
    if (!of_rows) {
      if (outputs.add) outputs.dkeys.add_to(first + m, d, totals);
      outputs.dkeys.store(first + m, d, totals);
      continue;
    }
    if (first + m >= rows) continue;
    const int r = logits.first_row + first + m;
    if (!present.own_is_positive) {
      float weight = logits.losses.row(r, present).dpositive;
      const EightFloats p = to_float(load_eight(problem.positives, problem.positives.row(r), d),
                                     problem.positives.dtype);
      if (outputs.mirrored) {  // the positive is a query, and this row is its positive
        const int mirror =
            r / queries.groups * queries.groups + queries.groups - 1 - r % queries.groups;
        weight += logits.losses.row(mirror, present).dpositive;
      } else {
        EightFloats q =
            to_float(load_eight(queries, queries.row(r), d), queries.dtype, present.row(r));
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
  const int rows = given.logits[0].rows;
  const Rows& keys = given.problems[0].keys;
  bool bias = false;
  for (const Outputs& outputs : given.outputs) bias |= outputs.dbias != nullptr;
  const int blocks = ceil_div(rows, QUERIES<TILE>) + ceil_div(keys.count, TILE);
  const dim3 grid(blocks * channel_blocks_of(keys) + (bias ? ceil_div(keys.count, 32) : 0),
                  PROBLEMS);
  launch("centroid_info_nce_backward_kernel", centroid_info_nce_backward_kernel<TILE, PROBLEMS>,
         grid, THREADS, WARPS * 16 * PITCH * sizeof(float), stream, given);
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
                              .groups = rows.groups};
  int first = 0;
  do {
    const int end = std::min(first + part, rows.count);
    if (!kept)
      compute_logits(problem,
                     {.first = first, .end = end, .logits = logits.mutable_data_ptr<float>()},
                     device.stream);
    const Outputs outputs = {.dqueries = output_of(dqueries, rows),
                             .dkeys = output_of(dkeys, key_rows),
                             .with_dkeys = true,
                             .dpositives = output_of(dpositives, rows),
                             .dbias = bias ? dbias.mutable_data_ptr<float>() : nullptr,
                             .mirrored = mirrored,
                             .add = first > 0};
    const GradientProblems<1> given = {{problem},
                                       {{.logits = logits.const_data_ptr<float>(),
                                         .rows = end - first,
                                         .width = width,
                                         .first_row = first,
                                         .losses = losses,
                                         .present = problem.present}},
                                       {outputs}};
    large_tiles(end - first, key_rows.count) ? launch_gradients<LARGE_TILE>(given, device.stream)
                                             : launch_gradients<SMALL_TILE>(given, device.stream);
    first = end;
  } while (first < rows.count);
  return {dqueries, torch::stable::to(dkeys, dtype_of_keys), dbias,
          torch::stable::to(dpositives, dtype_of_positives)};
}

}  // namespace

void compute_gradients(const GradientProblems<2>& pair, Stream stream) {
  launch_gradients<SMALL_TILE>(pair, stream);
}

}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("centroid_info_nce_backward.cuda",
               TORCH_BOX(&anchorops::cuda::centroid_info_nce_backward));
}

// The operators anchorops::centroid_losses.cuda and centroid_losses_backward.cuda: two losses of
// the same K·G rows, and losses of classes that are given, in two launches and in one.
//
//   loss = contrast + classification + Σ added
//   contrast = InfoNCE of queries and keys
//   classification = cross-entropy of rows·weightᵀ + bias, an InfoNCE whose denominators contain
//                    all keys; rows: the queries, unless others are given
//
// The kernels of centroid InfoNCE (centroid_info_nce.cuh) compute the logits and the gradients of
// both at the same time, in different blocks. If both have the same queries, one block adds their
// gradients: the keys of both follow each other in one product. The second kernel of the forward
// pass has one block, which sums the losses in a fixed order. All tensors are float32.
//
// The products take as long as those of two operators; launches, round trips to memory and the
// reduction are needed once.
#include "centroid_info_nce_backward.cuh"
#include "warps.cuh"

namespace anchorops::cuda {
namespace {

constexpr int SUM_THREADS = 512, SUM_WARPS = SUM_THREADS / 32;

// What is summed over the rows, the classes, or the given losses.
struct Sums {
  float losses[2], added;
  int rows, classes;
};

// Of each row, those of the classification after those of the contrast.
struct Rowwise {
  const float2* partials[2];     // [chunks, K·G]
  const float* positive_logits;  // [2, K·G]
  float* lse;                    // [2, K·G]
  int rows, chunks;
};

// One block.
__global__ void __launch_bounds__(SUM_THREADS, 1)
    sum_losses_kernel(Rowwise rowwise, Present present,
                      const float* added,  // [num_added] by stride
                      float* loss,         // one
                      float* terms,        // [4]: contrast, classification, Σ added, classes with a
                                           // present row
                      float* scale,        // [2]: the factors of the sums of the losses
                      int num_classes, int num_added, int64_t stride_added, float contrast_weight,
                      float class_weight, bool mean) {
  wait_for_kernel_before();
  const int rows = rowwise.rows;
  Sums sums = {};
#pragma unroll
  for (int which = 0; which < 2; ++which)
    for (int r = threadIdx.x; r < rows; r += SUM_THREADS) {
      const bool is_present = present.row(r);
      const float positive = rowwise.positive_logits[which * rows + r];
      const float lse = log_sum_exp(rowwise.partials[which], positive, r, rows, rowwise.chunks);
      rowwise.lse[which * rows + r] = lse;
      if (!is_present) continue;
      sums.losses[which] += lse - positive;
      if (which == 0) ++sums.rows;
    }
  for (int k = threadIdx.x; k < num_classes; k += SUM_THREADS) sums.classes += present.any_row(k);
  for (int i = threadIdx.x; i < num_added; i += SUM_THREADS) sums.added += added[i * stride_added];

  sums = {{sum_of_warp(sums.losses[0]), sum_of_warp(sums.losses[1])},
          sum_of_warp(sums.added),
          sum_of_warp(sums.rows),
          sum_of_warp(sums.classes)};
  auto* of_warps = reinterpret_cast<Sums*>(shared_memory());  // [SUM_WARPS]
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < SUM_WARPS; ++warp) {
    const Sums& other = of_warps[warp];
    sums.losses[0] += other.losses[0], sums.losses[1] += other.losses[1];
    sums.added += other.added, sums.rows += other.rows, sums.classes += other.classes;
  }
  const float count = mean ? static_cast<float>(max(sums.rows, 1)) : 1;
  scale[0] = contrast_weight / count;
  scale[1] = class_weight / count;
  terms[0] = sums.losses[0] * scale[0];
  terms[1] = sums.losses[1] * scale[1];
  terms[2] = sums.added;
  terms[3] = static_cast<float>(sums.classes);
  *loss = terms[0] + terms[1] + terms[2];
}

// The inputs of both directions. rows: those that are classified; null: the queries.
struct Given {
  Tensor queries, keys;
  std::optional<Tensor> rows;
  Tensor weight;
  std::optional<Tensor> bias;
  Tensor present;

  Problem contrast(bool mirrored, double temperature) const {
    return problem_of(queries, keys, {}, {}, present, {}, false, mirrored, temperature);
  }
  Problem classification(double temperature) const {
    return problem_of(rows ? *rows : queries, weight, bias, {}, present, {}, true, false,
                      temperature);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> centroid_losses(
    Tensor queries, Tensor keys, std::optional<Tensor> rows, Tensor weight,
    std::optional<Tensor> bias, std::optional<Tensor> added, Tensor present, bool mirrored,
    double temperature, double class_temperature, double contrast_weight, double class_weight,
    bool mean) {
  const OnDevice device(queries);
  const Given given{queries, keys, rows, weight, bias, present};
  LogitsProblems<2> pair = {
      {given.contrast(mirrored, temperature), given.classification(class_temperature)}, {}};
  const Problem& contrast = pair.problems[0];
  const int count = contrast.queries.count, num_classes = contrast.keys.count;
  const int width = contrast.width(), chunks = chunks_of(count, num_classes, SMALL_TILE).count;
  const auto new_floats = [&](const std::vector<int64_t>& size) {
    return new_empty(queries, size, ScalarType::Float);
  };
  Tensor loss = new_floats({}), terms = new_floats({4}), scale = new_floats({2});
  Tensor lse = new_floats({2, count}), positive_logits = new_floats({2, count});
  Tensor logits = new_floats({2, count, width});
  const Tensor partials = new_floats({2, chunks, count, 2});
  Rowwise rowwise = {.positive_logits = positive_logits.const_data_ptr<float>(),
                     .lse = lse.mutable_data_ptr<float>(),
                     .rows = count,
                     .chunks = chunks};
  for (int which = 0; which < 2; ++which) {
    auto* of_chunks = reinterpret_cast<float2*>(partials.mutable_data_ptr<float>()) +
                      int64_t{which} * chunks * count;
    rowwise.partials[which] = of_chunks;
    pair.outputs[which] = {
        .first = 0,
        .end = count,
        .partials = of_chunks,
        .positive_logits = positive_logits.mutable_data_ptr<float>() + which * count,
        .logits = logits.mutable_data_ptr<float>() + int64_t{which} * count * width};
  }
  compute_logits(pair, device.stream);
  launch_early("sum_losses_kernel", sum_losses_kernel, 1, SUM_THREADS, SUM_WARPS * sizeof(Sums),
               device.stream, rowwise, contrast.present, optional_data<float>(added),
               loss.mutable_data_ptr<float>(), terms.mutable_data_ptr<float>(),
               scale.mutable_data_ptr<float>(), num_classes,
               added ? static_cast<int>(added->numel()) : 0, added ? added->stride(0) : int64_t{0},
               static_cast<float>(contrast_weight), static_cast<float>(class_weight), mean);
  return {loss, terms, lse, positive_logits, scale, logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> centroid_losses_backward(
    Tensor dloss, Tensor queries, Tensor keys, std::optional<Tensor> rows, Tensor weight,
    std::optional<Tensor> bias, Tensor present, Tensor lse, Tensor positive_logits, Tensor scale,
    Tensor logits, bool mirrored, double temperature, double class_temperature, bool with_dkeys,
    bool with_dweight) {
  const OnDevice device(queries);
  const Given given{queries, keys, rows, weight, bias, present};
  GradientProblems<2> pair = {
      {given.contrast(mirrored, temperature), given.classification(class_temperature)},
      {},
      {},
      !rows};
  const auto gradient_of = [&](const Tensor* tensor) {  // empty, if null
    const auto size = tensor ? to_vector(tensor->sizes()) : std::vector<int64_t>{0};
    return new_empty(queries, size, ScalarType::Float);
  };
  Tensor dqueries = gradient_of(&queries), dkeys = gradient_of(with_dkeys ? &keys : nullptr);
  Tensor drows = gradient_of(rows ? &*rows : nullptr);
  Tensor dweight = gradient_of(with_dweight ? &weight : nullptr);
  Tensor dbias = gradient_of(bias ? &*bias : nullptr);
  const int count = pair.problems[0].queries.count, width = pair.problems[0].width();
  for (int which = 0; which < 2; ++which) {
    const Problem& problem = pair.problems[which];
    pair.logits[which] = {
        .logits = logits.const_data_ptr<float>() + int64_t{which} * count * width,
        .rows = count,
        .width = width,
        .first_row = 0,
        .losses = {.dloss = dloss.const_data_ptr<float>(),
                   .stride_k = 0,
                   .stride_g = 0,
                   .scale = scale.const_data_ptr<float>() + which,
                   .lse = lse.const_data_ptr<float>() + which * count,
                   .positive_logits = positive_logits.const_data_ptr<float>() + which * count,
                   .inverse_temperature = 1 / problem.temperature,
                   .groups = problem.queries.groups},
        .present = problem.present};
    const bool contrast = which == 0;
    pair.outputs[which] = {.dqueries = output_of(contrast ? dqueries : drows, problem.queries),
                           .dkeys = output_of(contrast ? dkeys : dweight, problem.keys),
                           .with_dkeys = contrast ? with_dkeys : with_dweight,
                           .dpositives = {},
                           .dbias = contrast || !bias ? nullptr : dbias.mutable_data_ptr<float>(),
                           .mirrored = contrast && mirrored,
                           .add = false};
  }
  compute_gradients(pair, device.stream);
  return {dqueries, dkeys, drows, dweight, dbias};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("centroid_losses.cuda", TORCH_BOX(&anchorops::cuda::centroid_losses));
  library.impl("centroid_losses_backward.cuda",
               TORCH_BOX(&anchorops::cuda::centroid_losses_backward));
}

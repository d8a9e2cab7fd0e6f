// Sorts the pixels by key, then sums them (class_moments_sorted.cuh): each warp reads 12 bytes for
// each pixel in addition, the offset and the key. The sums of a key inside a chunk are complete,
// except those of the first and the last key. Another kernel joins these.
#include "class_moments_key_order.cuh"

#include "class_moments_launch.cuh"
#include "class_moments_plan.cuh"
#include "class_moments_reduction.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256, JOIN_THREADS = 128;

// Pixels in the order of their keys: the offset of each, and its key.
template <class Key>
__global__ void __launch_bounds__(THREADS)
    sorted_pixels_kernel(int64_t* order,   // pixels on entry, offsets on return
                         const Key* keys,  // in this order
                         int32_t* sorted_keys, const Pixels view) {
  const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (i >= view.lines * view.pixels) return;
  const int64_t pixel = order[i];
  sorted_keys[i] = keys[i];
  order[i] = view.line_offset(pixel / view.pixels) + pixel % view.pixels * view.stride_p;
}

// Rows of the first and the last key of each chunk, and the output for their sums.
struct Ends {
  const float* ends;  // float32 [2·chunks, width]
  float* out;         // key k, column c: out[k·stride_k + c·stride_c]
  int64_t width, stride_k, stride_c;
};
struct AllEnds {
  Ends of[3];
};

// Adds the ends of each key, in the order of the chunks. A block processes the last key of a chunk,
// or its first key if this did not begin in the chunk before.
__global__ void __launch_bounds__(JOIN_THREADS)
    join_chunks_kernel(const int32_t* sorted_keys, int64_t pixels, const Tiling tiling, int tile,
                       const AllEnds all) {
  const int chunk = blockIdx.x / 2, which = blockIdx.x % 2;
  const auto begin_of = [&](int chunk) { return tiling.first_tile(chunk) * tile; };
  const int64_t begin = begin_of(chunk), end = min(begin_of(chunk + 1), pixels);
  int32_t key = sorted_keys[begin];
  if (which == 0) {
    if (begin > 0 && sorted_keys[begin - 1] == key) return;
  } else {
    // An incomplete last tile ends with padding, whose key is −1, so this end has no sums.
    if (end % tile != 0 || sorted_keys[end - 1] == key) return;
    key = sorted_keys[end - 1];
  }
  if (key < 0) return;
  int after = chunk + 1, stop = tiling.chunks;  // chunks [chunk + 1, after) begin with the key
  while (after < stop) {
    const int middle = after + (stop - after) / 2;
    if (sorted_keys[begin_of(middle)] == key)
      after = middle + 1;
    else
      stop = middle;
  }
  const Ends own = blockIdx.y == 0 ? all.of[0] : blockIdx.y == 1 ? all.of[1] : all.of[2];
  for (int64_t c = threadIdx.x; c < own.width; c += JOIN_THREADS) {
    double total = own.ends[int64_t{blockIdx.x} * own.width + c];
#pragma unroll 8
    for (int64_t next = chunk + 1; next < after; ++next)
      total += own.ends[2 * next * own.width + c];
    own.out[key * own.stride_k + c * own.stride_c] = static_cast<float>(total);
  }
}

// The sorted keys, and the pixels in this order.
std::pair<Tensor, Tensor> stable_sort(const Tensor& keys) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  const auto sorted = torch::stable::detail::to<Tensor>(stack[0]);
  return {sorted, torch::stable::detail::to<Tensor>(stack[1])};
}

struct SortedPixels {
  Tensor keys;     // int32 [pixels]
  Tensor offsets;  // int64 [pixels], where the features of each begin
};

SortedPixels sort_pixels(const Tensor& keys, int64_t num_keys, const Pixels& view, Stream stream) {
  const int64_t pixels = view.lines * view.pixels;
  Tensor flat = torch::stable::view(keys, {pixels});
  // With half the bits, a radix sort needs half the passes.
  if (num_keys <= 1 << 15) flat = torch::stable::to(flat, ScalarType::Short);
  const auto [sorted, order] = stable_sort(flat);
  const Tensor sorted_keys = new_empty(keys, {pixels}, ScalarType::Int);
  const auto prepare = [&](const auto* keys_in_order) {
    using Key = std::remove_cvref_t<decltype(*keys_in_order)>;
    launch("sorted_pixels_kernel", sorted_pixels_kernel<Key>,
           static_cast<unsigned>(ceil_div(pixels, THREADS)), THREADS, 0, stream,
           order.template mutable_data_ptr<int64_t>(), keys_in_order,
           sorted_keys.mutable_data_ptr<int32_t>(), view);
  };
  if (sorted.scalar_type() == ScalarType::Short)
    prepare(sorted.template const_data_ptr<int16_t>());
  else
    prepare(sorted.template const_data_ptr<int32_t>());
  return {sorted_keys, order};
}

}  // namespace

template <class T>
void in_order_of_keys(Input<T> input, int statistics, const Tensor& keys, const Outputs& out,
                      Stream stream) {
  const int64_t num_keys = input.num_keys, dim = input.view.dim;
  const SortedPixels sorted = sort_pixels(keys, num_keys, input.view, stream);
  input.keys = sorted.keys.const_data_ptr<int32_t>();
  input.key_vectors = true;
  input.offsets = sorted.offsets.const_data_ptr<int64_t>();
  input.view.pixels *= input.view.lines;
  input.view.lines = input.view.lines_per_image = 1;
  const Tiling tiling = plan_sorted(input);

  SortedSums output{.sums = data(out.sums), .residuals = data(out.residuals)};
  AllEnds all{};
  std::vector<Tensor> buffers;
  const auto new_buffer = [&](int64_t rows, int64_t columns) {
    buffers.push_back(new_empty(keys, {rows, columns}, ScalarType::Float));
    return data(buffers.back());
  };
  const int64_t edges = int64_t{2} * tiling.chunks;
  const auto join = [&](int which, float* ends, float* out, int64_t width, int64_t stride_k,
                        int64_t stride_c) {
    all.of[which] = {ends, out, width, stride_k, stride_c};
    fill_zero(out, num_keys * width * sizeof(float), stream);
  };
  if (statistics & SUMS) {
    output.sums_ends = new_buffer(edges, dim);
    join(0, output.sums_ends, output.sums, dim, dim, 1);
  }
  if (statistics & RESIDUALS) {
    output.residuals_ends = new_buffer(edges, dim);
    join(1, output.residuals_ends, output.residuals, dim, dim, 1);
  }
  if (statistics & SQDISTS) {
    output.sqdists_ends = new_buffer(edges, tiling.blocks);
    output.sqdists = new_buffer(tiling.blocks, num_keys);
    join(2, output.sqdists_ends, output.sqdists, tiling.blocks, 1, num_keys);
  }
  launch_moments(statistics, input, tiling, output, stream);
  launch("join_chunks_kernel", join_chunks_kernel, dim3(static_cast<unsigned>(edges), 3),
         JOIN_THREADS, 0, stream, input.keys, input.view.pixels, tiling, TILE<T>, all);
  if (statistics & SQDISTS) {
    Reductions by_block{.num_keys = num_keys};
    by_block.of[0] = {output.sqdists, data(out.sqdists), 1, 1, tiling.blocks, 1};
    add_partials(by_block, stream);
  }
}

template void in_order_of_keys(Input<float>, int, const Tensor&, const Outputs&, Stream);
template void in_order_of_keys(Input<BFloat16>, int, const Tensor&, const Outputs&, Stream);
template void in_order_of_keys(Input<Half>, int, const Tensor&, const Outputs&, Stream);

}  // namespace anchorops::cuda

// The operator anchorops::class_moments.cuda: statistics of features by key,
//
//     sums[k] = Σ f_p    residuals[k] = Σ (f_p − a_k)    sqdists[k] = Σ ‖f_p − a_k‖²
//
// If tables of all keys fit in a block's shared memory, pixels are read in raster order. A block is
// one warp, which sums 32 channels of a chunk of the pixels. Features are read once, keys once for
// each 32 channels (from the L2 cache except the first time), partials are written and read once:
// they are 1 to 5 % of the features. A second kernel adds them in a fixed order. Otherwise pixels
// are read in the order of their keys (a stable sort, and 12 bytes more for each pixel and 32
// channels). Keys inside a chunk are complete; another kernel joins the first and the last key of
// each chunk.
//
// Counted in the SASS of sm_90, if the label does not change within 32 pixels: warp instructions
// for each 512 bytes (the memory takes as long as 110 on an H200).
//
//                            bf16 NCHW  channels last    fp32 NCHW  channels last
//     sums                          30             37           16             19
//     sums, sqdists                 46             53           23             27
//     sums, sqdists, residuals      54             61           28             31
//
// Counted from shared memory (registers do not limit it): warps and KB of features in flight on a
// multiprocessor of an H200, where 23 KB are needed, in bf16.
//
//                              K = 19       K = 150      K = 200
//     sums                      8, 64 KB     5, 40 KB     5, 40 KB
//     sums, sqdists             8, 64 KB     5, 40 KB     4, 32 KB
//     sums, sqdists, residuals  8, 64 KB     3, 24 KB     3, 24 KB
//
// Predicted, not measured (bench/time_model.py), for labels of images in bf16 NCHW, as a share of
// 4.3 TB/s: HRNet B8 D720 128×256 K19 (378 MB, 88 µs) 86 % for sums, 81 % with sqdists; SegFormer
// B16 D768 128×128 K150 (403 MB, 94 µs) 66 % and 34 %, because its five warps wait for each change
// of key.
#include "../labels.h"
#include "class_moments_kernel.cuh"

namespace anchorops::cuda {
namespace {

// The partials of chunks and their sum.
struct Partials {
  const float* partials;  // float32 [count, size]
  float* out;             // float32 [size]
  int64_t count, size;
  int slices;  // threads for each result, a power of two
};
struct AllPartials {
  Partials of[3];
};

constexpr int THREADS = 256;

// Reads each partial and writes each result once. Each thread adds every slices-th partial of a
// result; then half of the threads add the sums of the other half, and so on.
__global__ void __launch_bounds__(THREADS) add_partials_kernel(const AllPartials all) {
  const Partials own = blockIdx.y == 0 ? all.of[0] : blockIdx.y == 1 ? all.of[1] : all.of[2];
  const int width = THREADS / own.slices, slice = threadIdx.x / width;
  const int64_t i = int64_t{blockIdx.x} * width + threadIdx.x % width;
  double* const totals = reinterpret_cast<double*>(shared_memory());
  double total = 0;
  if (i < own.size) {
#pragma unroll 8
    for (int64_t c = slice; c < own.count; c += own.slices) total += own.partials[c * own.size + i];
  }
  totals[threadIdx.x] = total;
  for (int half = own.slices / 2; half > 0; half /= 2) {
    __syncthreads();
    if (slice < half) totals[threadIdx.x] = total += totals[threadIdx.x + half * width];
  }
  if (slice == 0 && i < own.size) own.out[i] = static_cast<float>(total);
}

void add_partials(AllPartials all, Stream stream) {
  int64_t blocks = 0;
  for (Partials& each : all.of) {
    each.slices = 1;
    while (each.slices < THREADS && each.slices * 8 < each.count) each.slices *= 2;
    blocks = std::max(blocks, ceil_div(each.size, int64_t{THREADS} / each.slices));
  }
  launch("add_partials_kernel", add_partials_kernel, dim3(static_cast<unsigned>(blocks), 3),
         THREADS, THREADS * sizeof(double), stream, all);
}

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
__global__ void __launch_bounds__(128)
    join_chunks_kernel(const int32_t* sorted_keys, int64_t pixels, int64_t pixels_per_chunk,
                       int tile, int chunks, const AllEnds all) {
  const int chunk = blockIdx.x / 2, which = blockIdx.x % 2;
  const int64_t begin = chunk * pixels_per_chunk, end = min(begin + pixels_per_chunk, pixels);
  int32_t key = sorted_keys[begin];
  if (which == 0) {
    if (begin > 0 && sorted_keys[begin - 1] == key) return;
  } else {
    // An incomplete last tile ends without a pixel, so no key continues there.
    if (end % tile != 0 || sorted_keys[end - 1] == key) return;
    key = sorted_keys[end - 1];
  }
  if (key < 0) return;
  int after = chunk + 1, stop = chunks;  // chunks [chunk + 1, after) begin with the key
  while (after < stop) {
    const int middle = after + (stop - after) / 2;
    if (sorted_keys[middle * pixels_per_chunk] == key)
      after = middle + 1;
    else
      stop = middle;
  }
  const Ends own = blockIdx.y == 0 ? all.of[0] : blockIdx.y == 1 ? all.of[1] : all.of[2];
  for (int64_t c = threadIdx.x; c < own.width; c += 128) {
    double total = own.ends[int64_t{blockIdx.x} * own.width + c];
#pragma unroll 8
    for (int64_t next = chunk + 1; next < after; ++next)
      total += own.ends[2 * next * own.width + c];
    own.out[key * own.stride_k + c * own.stride_c] = static_cast<float>(total);
  }
}

constexpr int64_t MULTIPROCESSORS = 132, SHARED_BYTES = 227 << 10;  // of each: an H200
constexpr int64_t MAX_BLOCKS = 12;  // of a multiprocessor: as many as registers allow
constexpr int64_t PARTIALS_IN_CACHE = 16 << 20;

struct Outputs {
  Tensor sums, sqdists, residuals;
};

float* data(const Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

template <class T, bool CHANNELS_LAST>
constexpr int64_t RING_BYTES =
    STAGES * Stage<T, CHANNELS_LAST>::BYTES + (STAGES + 1) * TILE<T> * int64_t{sizeof(int)};

// As many as fit. More than eight warps are rounded to a multiple of four: there are four
// schedulers, and if one has three warps and the others two, all wait for it.
int64_t blocks_per_multiprocessor(int64_t shared_bytes) {
  const int64_t blocks = std::min(MAX_BLOCKS, SHARED_BYTES / (shared_bytes + 1024));
  return blocks > 8 ? blocks / 4 * 4 : blocks;
}

// The shared memory that a block requests, so that not more blocks than this are resident.
int64_t padded_shared_bytes(int64_t shared_bytes) {
  const int64_t blocks = blocks_per_multiprocessor(shared_bytes);
  const auto all = static_cast<int64_t>(shared_bytes_of_multiprocessor());
  if (blocks < 8 || all < SHARED_BYTES) return shared_bytes;
  return std::max(shared_bytes, SHARED_BYTES / blocks - 1024);
}

template <class T, int STATISTICS, bool SORTED>
void launch_moments(Problem<T>& problem, int64_t shared_bytes, Stream stream) {
  const bool channels_last = problem.view.stride_d == 1 && problem.view.stride_p != 1;
  const dim3 grid(static_cast<unsigned>(problem.chunks * problem.blocks));
  const auto bytes = [&](int64_t ring_bytes) {
    return SORTED ? ring_bytes : padded_shared_bytes(shared_bytes + ring_bytes);
  };
  if (channels_last)
    launch("class_moments_kernel", class_moments_kernel<T, STATISTICS, true, SORTED>, grid,
           CHANNELS, bytes(RING_BYTES<T, true>), stream, problem);
  else
    launch("class_moments_kernel", class_moments_kernel<T, STATISTICS, false, SORTED>, grid,
           CHANNELS, bytes(RING_BYTES<T, false>), stream, problem);
}

template <class T, bool SORTED>
void launch_moments(int statistics, Problem<T>& problem, int64_t shared_bytes, Stream stream) {
  switch (statistics) {
    case SUMS:
      return launch_moments<T, SUMS, SORTED>(problem, shared_bytes, stream);
    case SQDISTS:
      return launch_moments<T, SQDISTS, SORTED>(problem, shared_bytes, stream);
    case SUMS | SQDISTS:
      return launch_moments<T, SUMS | SQDISTS, SORTED>(problem, shared_bytes, stream);
    case SQDISTS | RESIDUALS:
      return launch_moments<T, SQDISTS | RESIDUALS, SORTED>(problem, shared_bytes, stream);
    default:
      return launch_moments<T, SUMS | SQDISTS | RESIDUALS, SORTED>(problem, shared_bytes, stream);
  }
}

template <class T>
void set_tiles(Problem<T>& problem, int64_t chunks) {
  problem.tiles_per_line = static_cast<int>(ceil_div(problem.view.pixels, TILE<T>));
  problem.last_tile = static_cast<int>((problem.view.pixels - 1) % TILE<T>) + 1;
  problem.key_vectors = reinterpret_cast<uintptr_t>(problem.keys) % 16 == 0 &&
                        (problem.view.lines == 1 || problem.view.pixels % 4 == 0);
  problem.tiles = problem.view.lines * problem.tiles_per_line;
  problem.tiles_per_chunk = ceil_div(problem.tiles, std::clamp<int64_t>(chunks, 1, problem.tiles));
  problem.chunks = static_cast<int>(ceil_div(problem.tiles, problem.tiles_per_chunk));
}

// Bytes of the tables of a block.
int64_t table_bytes(int statistics, int64_t num_keys, int columns) {
  const int64_t row = (((statistics & SUMS) != 0) + ((statistics & RESIDUALS) != 0)) * CHANNELS +
                      ((statistics & SQDISTS) != 0) * columns;
  return (1 + num_keys) * row * static_cast<int64_t>(sizeof(float));
}

// Columns for the squared distances of a key: one for each lane, if other blocks still fit.
int columns_of(int statistics, int64_t num_keys, int64_t ring_bytes) {
  const auto blocks = [&](int columns) {
    return blocks_per_multiprocessor(ring_bytes + table_bytes(statistics, num_keys, columns));
  };
  for (int columns : {32, 8})
    if (blocks(columns) == blocks(1) || blocks(columns) >= 6) return columns;
  return 1;
}

// As many chunks as occupy the device once, or a few times if their partials are less than 1/64 of
// the features; fewer if the partials would be more than 1/8 of the features and than a share of
// the L2 cache. This depends only on shapes, because the order of additions affects the result.
int64_t wanted_chunks(const Pixels& view, int64_t blocks, int64_t shared_bytes, int64_t chunk_bytes,
                      int64_t feature_bytes) {
  const int64_t resident = MULTIPROCESSORS * blocks_per_multiprocessor(shared_bytes);
  const int64_t once = std::max<int64_t>(resident / blocks, 1);
  const int64_t times = std::clamp<int64_t>(feature_bytes / 64 / (once * chunk_bytes), 1, 4);
  return std::min(once * times, std::max(feature_bytes / 8, PARTIALS_IN_CACHE) / chunk_bytes);
}

template <class T>
void in_raster_order(Problem<T>& problem, int statistics, int64_t shared_bytes, const Outputs& out,
                     Stream stream) {
  const Pixels& view = problem.view;
  const int64_t num_keys = problem.num_keys, size = num_keys * view.dim;
  const int matrices = ((statistics & SUMS) != 0) + ((statistics & RESIDUALS) != 0);
  const int64_t chunk_bytes =
      (matrices * size + ((statistics & SQDISTS) != 0) * problem.blocks * num_keys) * 4;
  set_tiles(problem,
            wanted_chunks(view, problem.blocks, shared_bytes + RING_BYTES<T, false>, chunk_bytes,
                          view.lines * view.pixels * view.dim * static_cast<int64_t>(sizeof(T))));

  AllPartials all{};
  std::vector<Tensor> partials;
  const auto partials_of = [&](int which, bool wanted, const Tensor& total, int64_t count,
                               int64_t size) -> float* {
    if (!wanted || count == 1) return data(total);
    partials.push_back(new_empty(total, {count, size}, ScalarType::Float));
    all.of[which] = {data(partials.back()), data(total), count, size};
    return data(partials.back());
  };
  problem.sums = partials_of(0, statistics & SUMS, out.sums, problem.chunks, size);
  problem.residuals = partials_of(1, statistics & RESIDUALS, out.residuals, problem.chunks, size);
  problem.sqdists = partials_of(2, statistics & SQDISTS, out.sqdists,
                                int64_t{problem.chunks} * problem.blocks, num_keys);
  launch_moments<T, false>(statistics, problem, shared_bytes, stream);
  add_partials(all, stream);
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

template <class T>
void in_order_of_keys(Problem<T>& problem, int statistics, const Tensor& keys, const Outputs& out,
                      Stream stream) {
  const Pixels view = problem.view;
  const int64_t pixels = view.lines * view.pixels, num_keys = problem.num_keys;
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

  problem.keys = sorted_keys.const_data_ptr<int32_t>();
  problem.offsets = order.const_data_ptr<int64_t>();
  problem.view.lines = problem.view.lines_per_image = 1;
  problem.view.pixels = pixels;
  // Chunks that occupy the device a few times, of at least two tiles, so that there are few ends.
  const int64_t tiles = ceil_div(pixels, TILE<T>);
  const int64_t occupied = 4 * MAX_BLOCKS * MULTIPROCESSORS;
  set_tiles(problem,
            ceil_div(tiles, std::clamp<int64_t>(tiles * problem.blocks / occupied, 2, 16)));

  AllEnds all{};
  std::vector<Tensor> buffers;
  const auto new_buffer = [&](bool wanted, int64_t rows, int64_t columns) {
    buffers.push_back(new_empty(keys, {wanted ? rows : 0, columns}, ScalarType::Float));
    return data(buffers.back());
  };
  const int64_t edges = int64_t{2} * problem.chunks;
  problem.sums_ends = new_buffer(statistics & SUMS, edges, view.dim);
  problem.residuals_ends = new_buffer(statistics & RESIDUALS, edges, view.dim);
  problem.sqdists_ends = new_buffer(statistics & SQDISTS, edges, problem.blocks);
  problem.sums = data(out.sums);
  problem.residuals = data(out.residuals);
  problem.sqdists = new_buffer(statistics & SQDISTS, problem.blocks, num_keys);
  if (statistics & SUMS) {
    all.of[0] = {problem.sums_ends, problem.sums, view.dim, view.dim, 1};
    fill_zero(problem.sums, num_keys * view.dim * sizeof(float), stream);
  }
  if (statistics & RESIDUALS) {
    all.of[1] = {problem.residuals_ends, problem.residuals, view.dim, view.dim, 1};
    fill_zero(problem.residuals, num_keys * view.dim * sizeof(float), stream);
  }
  if (statistics & SQDISTS) {
    all.of[2] = {problem.sqdists_ends, problem.sqdists, problem.blocks, 1, num_keys};
    fill_zero(problem.sqdists, num_keys * problem.blocks * sizeof(float), stream);
  }
  launch_moments<T, true>(statistics, problem, 0, stream);
  launch("join_chunks_kernel", join_chunks_kernel, dim3(static_cast<unsigned>(edges), 3), 128, 0,
         stream, problem.keys, pixels, problem.tiles_per_chunk * TILE<T>, TILE<T>, problem.chunks,
         all);
  if (statistics & SQDISTS) {
    AllPartials by_block{};
    by_block.of[0] = {problem.sqdists, data(out.sqdists), problem.blocks, num_keys};
    add_partials(by_block, stream);
  }
}

std::tuple<Tensor, Tensor, Tensor> class_moments(Tensor features, Tensor keys,
                                                 std::optional<Tensor> anchors, int64_t num_keys,
                                                 int64_t groups, bool with_sums,
                                                 bool with_residuals) {
  check_keys("class_moments.cuda", keys, features.numel() / std::max<int64_t>(features.size(1), 1));
  const OnDevice device(features);
  const int statistics = (with_sums ? SUMS : 0) | (anchors ? SQDISTS : 0) |
                         (anchors && with_residuals ? RESIDUALS : 0);
  const std::vector<int64_t> matrix = {num_keys, features.size(1)}, none = {0};
  const Outputs out = {
      .sums = new_empty(features, with_sums ? matrix : none, ScalarType::Float),
      .sqdists = new_empty(features, {anchors ? num_keys : 0}, ScalarType::Float),
      .residuals = new_empty(features, with_residuals ? matrix : none, ScalarType::Float)};
  if (features.numel() == 0 || num_keys == 0 || statistics == 0) {
    for (const Tensor* each : {&out.sums, &out.sqdists, &out.residuals})
      fill_zero(data(*each), each->numel() * sizeof(float), device.stream);
    return {out.sums, out.sqdists, out.residuals};
  }
  if (anchors) anchors = torch::stable::contiguous(*anchors);

  for_dtype("class_moments.cuda", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto size = to_vector(features.sizes()), stride = to_vector(features.strides());
    Problem<T> problem{};
    const Pixels view = as_pixels(size, stride, rows_join(size, stride));
    const bool channels_last = view.stride_d == 1 && view.stride_p != 1;
    problem.features = features.const_data_ptr<T>();
    problem.keys = keys.const_data_ptr<int32_t>();
    problem.anchors = anchors ? anchors->const_data_ptr<float>() : nullptr;
    problem.view = view;
    problem.num_keys = static_cast<int>(num_keys);
    problem.num_classes = anchors ? static_cast<int>(anchors->size(0)) : 1;
    problem.groups = static_cast<int>(groups);
    problem.blocks = static_cast<int>(ceil_div(view.dim, CHANNELS));
    problem.vectors = (channels_last || view.stride_p == 1) &&
                      vectors_aligned(problem.features,
                                      {view.stride_b, view.stride_h,
                                       channels_last ? view.stride_p : view.stride_d},
                                      sizeof(T));
    problem.sqdists_columns = columns_of(statistics, num_keys, RING_BYTES<T, false>);
    const int64_t tables = table_bytes(statistics, num_keys, problem.sqdists_columns);
    if (tables + RING_BYTES<T, false> <= int64_t{MAX_SHARED_BYTES})
      in_raster_order(problem, statistics, tables, out, device.stream);
    else
      in_order_of_keys(problem, statistics, keys, out, device.stream);
  });
  return {out.sums, out.sqdists, out.residuals};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("class_moments.cuda", TORCH_BOX(&anchorops::cuda::class_moments));
}

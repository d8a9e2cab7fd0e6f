// The operator anchorops::class_moments.cuda: statistics of features by key,
//
//     sums[k] = Σ f_p    residuals[k] = Σ (f_p − a_k)    sqdists[k] = Σ ‖f_p − a_k‖²
//
// Up to 1,024 keys: pixels are read in raster order. A block is one warp. It sums 32 channels of a
// chunk of the pixels on tensor cores, 32 keys at a time (class_moments_slots.cuh). Features are
// read once. Keys are read once for each 32 channels: the first time from memory, then from the
// second-level cache. A chunk writes partials of the keys that it has met; if these are at most 32,
// each partial is written once. A second kernel reads the partials once and adds them in a fixed
// order.
//
// Random labels of 33 to 192 classes (in float32 with several statistics: from 12 on), on GPUs with
// 227 KB of shared memory for a block: each block sorts its pixels in shared memory
// (class_moments_random.cuh). Two kernels are launched. Both look at the same few keys, and one of
// them returns at once.
//
// More keys: pixels are first sorted by key, with a stable sort. Each warp reads 12 bytes for each
// pixel in addition, the offset and the key. The sums of a key inside a chunk are complete, except
// those of the first and the last key. Another kernel joins these.
//
// Eight or twelve warps are resident on a multiprocessor, for any number of keys: 32 to 48 KB of
// features are in flight; an H200 needs 23. With 100 KB of shared memory there are at least four.
// `make cuda-report` prints the warp instructions for each 512 bytes, and the times that follow
// from them. bench/NOTES.md has the shares of the bandwidth. All of these are predicted, not
// measured.
#include <numeric>

#include "../labels.h"
#include "class_moments_launch.cuh"
#include "class_moments_random_sort.cuh"
#include "class_moments_slots.cuh"

namespace anchorops::cuda {
namespace {

// Partial statistics and their sum. The columns of sums are channels, in the order of the blocks.
struct Reduction {
  const float* partials;  // float32 [count, num_keys, width]
  float* out;             // float32 [num_keys, columns]
  int64_t width, columns;
  int count, rows_per_chunk;  // of partials: either 1, or the number of blocks
  int slices;                 // threads for each result, a power of two
};
struct Reductions {
  Reduction of[3];
  const uint8_t* met;  // see Partials; null if all partials were written
  int64_t num_keys;
  int period = 1;  // see Input
};

constexpr int THREADS = 256;

// Reads each partial and writes each result once. Each thread adds every slices-th partial of a
// result; then half of the threads add the sums of the other half, and so on.
__global__ void __launch_bounds__(THREADS) add_partials_kernel(const Reductions all) {
  wait_for_kernel_before();
  const Reduction own = blockIdx.y == 0 ? all.of[0] : blockIdx.y == 1 ? all.of[1] : all.of[2];
  if (own.count == 0) return;  // not wanted
  const int width = THREADS / own.slices, slice = threadIdx.x / width;
  const int64_t i = int64_t{blockIdx.x} * width + threadIdx.x % width;
  const int64_t size = all.num_keys * own.width;
  double* const totals = reinterpret_cast<double*>(shared_memory());
  double total = 0;
  const int64_t key = i / own.width;
  const int column = static_cast<int>(i % own.width), block = column / CHANNELS;
  if (i < size) {
    // Of sqdists, each block of a chunk has a partial; of sums, each has columns of a partial. The
    // number of blocks is a multiple of the period, and the period is a power of two.
    const auto is_met = [&](int c) {
      const int of_block = own.rows_per_chunk > 1 ? c : block;
      const int64_t row =
          int64_t{c / own.rows_per_chunk} * all.period + (of_block & (all.period - 1));
      return all.met[row * all.num_keys + key] != 0;
    };
#pragma unroll 8
    for (int c = slice; c < own.count; c += own.slices)
      if (!all.met || is_met(c)) total += own.partials[c * size + i];
  }
  totals[threadIdx.x] = total;
  for (int half = own.slices / 2; half > 0; half /= 2) {
    __syncthreads();
    if (slice < half) totals[threadIdx.x] = total += totals[threadIdx.x + half * width];
  }
  const int channel = first_channel(block, all.period) + column % CHANNELS * all.period;
  if (slice == 0 && i < size && channel < own.columns)
    own.out[key * own.columns + channel] = static_cast<float>(total);
}

void add_partials(Reductions all, Stream stream) {
  int64_t blocks = 0;
  for (Reduction& each : all.of) {
    each.slices = 1;
    while (each.slices < THREADS && each.slices * 8 < each.count) each.slices *= 2;
    blocks = std::max(blocks, ceil_div(all.num_keys * each.width, int64_t{THREADS} / each.slices));
  }
  launch_early("add_partials_kernel", add_partials_kernel, dim3(static_cast<unsigned>(blocks), 3),
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
  for (int64_t c = threadIdx.x; c < own.width; c += 128) {
    double total = own.ends[int64_t{blockIdx.x} * own.width + c];
#pragma unroll 8
    for (int64_t next = chunk + 1; next < after; ++next)
      total += own.ends[2 * next * own.width + c];
    own.out[key * own.stride_k + c * own.stride_c] = static_cast<float>(total);
  }
}

constexpr int64_t PARTIALS_IN_CACHE = 16 << 20;
// With more keys, writing partials takes longer than sorting.
constexpr int64_t MAX_UNSORTED_KEYS = 1024;

struct Outputs {
  Tensor sums, sqdists, residuals;
};

float* data(const Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

template <class T>
Tiling tiles_of(const Input<T>& input, int64_t wanted_chunks) {
  const Pixels& view = input.view;
  const int most_before = input.shifted ? Vector<T>::SIZE - 1 : 0;
  Tiling tiling{};
  tiling.tiles_per_line = static_cast<int>(ceil_div(view.pixels + most_before, TILE<T>));
  tiling.last_tile = static_cast<int>(view.pixels - int64_t{tiling.tiles_per_line - 1} * TILE<T>);
  tiling.tiles = view.lines * tiling.tiles_per_line;
  tiling.blocks = blocks_of(view.dim, input.period);
  return tiling.in_chunks(wanted_chunks);
}

// For how many warps of class_moments_kernel a multiprocessor has registers and shared memory: in
// either layout, so that the plan does not depend on it.
template <class T>
int64_t resident_warps(int statistics, int64_t num_keys) {
  constexpr int ALL = SUMS | SQDISTS | RESIDUALS;
  constexpr int STAGE = std::max(Ring<T, false, false, 1>::BYTES, Ring<T, true, false, 1>::BYTES);
  const int stages = statistics == ALL ? STAGES<T, ALL> : STAGES<T, SUMS>;
  const int64_t slots =
      statistics & SQDISTS ? Slots<SQDISTS>::bytes(num_keys) : Slots<SUMS>::bytes(num_keys);
  return std::min<int64_t>(warps_of<T>(statistics, hardware().major),
                           blocks_in_shared(STAGE * stages + slots));
}

// Columns of a partial of sums.
template <class T>
int64_t width_of(const Input<T>& input, int64_t blocks) {
  return input.period > 1 ? blocks * CHANNELS : input.view.dim;
}

// As many chunks as occupy the device once, or up to four times if the partials are then at most
// 1/64 of the features. Fewer chunks if the partials would be more than 1/4 of the features and
// more than PARTIALS_IN_CACHE bytes.
template <class T>
Tiling plan(const Input<T>& input, int statistics) {
  const Pixels& view = input.view;
  const int64_t blocks = blocks_of(view.dim, input.period), num_keys = input.num_keys;
  const int64_t width = width_of(input, blocks);
  const int64_t matrices = ((statistics & SUMS) != 0) + ((statistics & RESIDUALS) != 0);
  const int64_t chunk_bytes =
      4 * num_keys * (matrices * width + ((statistics & SQDISTS) != 0) * blocks);
  const int64_t feature_bytes =
      view.lines * view.pixels * view.dim * static_cast<int64_t>(sizeof(T));
  const int64_t once =
      std::max<int64_t>(multiprocessors() * resident_warps<T>(statistics, num_keys) / blocks, 1);
  const int64_t times = std::clamp<int64_t>(feature_bytes / 64 / (once * chunk_bytes), 1, 4);
  const int64_t most = std::max(feature_bytes / 4, PARTIALS_IN_CACHE) / chunk_bytes;
  return tiles_of(input, std::min(once * times, most));
}

// The chunks of class_moments_random_kernel; none if it cannot be used. Up to SLOTS keys,
// class_moments_kernel is as fast with random labels, except in float32 with several statistics.
// Random groups of a class are those of images. That kernel has no shifted tiles.
template <class T>
Tiling plan_random(const Tiling& tiling, const Input<T>& input, int statistics) {
  const int64_t num_keys = input.num_keys;
  const auto bytes =
      std::max(RandomMemory<T, false>::bytes(num_keys), RandomMemory<T, true>::bytes(num_keys));
  const bool several = statistics != SUMS && statistics != SQDISTS;
  const int64_t fewest = sizeof(T) == 4 && several ? WINDOWS : SLOTS + 1;
  if (input.shifted || input.groups > 1 || num_keys < fewest || num_keys > WINDOWS * WINDOW_KEYS ||
      bytes > largest_shared_bytes())
    return {};
  // As many blocks as multiprocessors, or a multiple if chunks would be too large, but at least
  // three rounds in a chunk.
  const int64_t groups = ceil_div(tiling.blocks, CHANNEL_BLOCKS),
                chunks = ceil_div(tiling.tiles, CHUNK_PIXELS / TILE<T>),
                waves = ceil_div(chunks * groups, multiprocessors());
  return tiling.in_chunks(
      std::max(chunks, std::min(waves * multiprocessors() / groups, tiling.tiles / (3 * WINDOWS))));
}

// Lets tiles of contiguous pixels begin at multiples of 16 bytes where lines do not. Blocks have at
// least eight channels: with fewer, most of their products would be of zeros.
template <class T>
void shift_if_unaligned(Input<T>& input) {
  constexpr int64_t SIZE = Vector<T>::SIZE;
  const auto period = SIZE / std::gcd(input.view.stride_d, SIZE);
  if (input.vectors || input.view.stride_p != 1 || input.view.dim < 8 * period) return;
  input.period = static_cast<int>(period);
  input.row_stride *= period;
  input.shifted = true;
}

template <class T>
void in_raster_order(Input<T> input, int statistics, const Outputs& out, Stream stream) {
  shift_if_unaligned(input);
  const int64_t num_keys = input.num_keys, dim = input.view.dim, period = input.period;
  const Tiling tiling = plan(input, statistics);
  const Tiling random = plan_random(tiling, input, statistics);
  const int64_t chunks = std::max(tiling.chunks, random.chunks), blocks = tiling.blocks;
  const Tensor met = new_empty(out.sums, {chunks * period, num_keys}, ScalarType::Byte);
  Partials partials{.met = met.mutable_data_ptr<uint8_t>(),
                    .rows = static_cast<int>(chunks * period),
                    .width = static_cast<int>(width_of(input, blocks)),
                    .period = input.period};
  Reductions all{.met = partials.met, .num_keys = num_keys, .period = input.period};
  std::vector<Tensor> buffers;
  const auto reduce = [&](int which, bool wanted, const Tensor& total, int64_t rows_per_chunk,
                          int64_t width, int64_t columns) -> float* {
    if (!wanted) return nullptr;
    buffers.push_back(
        new_empty(total, {chunks * rows_per_chunk, num_keys, width}, ScalarType::Float));
    all.of[which] = {data(buffers.back()),
                     data(total),
                     width,
                     columns,
                     static_cast<int>(chunks * rows_per_chunk),
                     static_cast<int>(rows_per_chunk)};
    return data(buffers.back());
  };
  partials.sums = reduce(0, statistics & SUMS, out.sums, 1, partials.width, dim);
  partials.residuals = reduce(1, statistics & RESIDUALS, out.residuals, 1, partials.width, dim);
  partials.sqdists = reduce(2, statistics & SQDISTS, out.sqdists, blocks, 1, 1);
  if (random.chunks > tiling.chunks) fill_zero(partials.met, chunks * num_keys, stream);
  // A normal launch, which all earlier work precedes. So class_moments_kernel, launched early, may
  // read the keys and write partials while that kernel runs.
  if (random.chunks > 0) launch_random(statistics, input, random, partials, stream);
  launch_moments(statistics, input, tiling, partials, random.chunks > 0, stream);
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
void in_order_of_keys(Input<T> input, int statistics, const Tensor& keys, const Outputs& out,
                      Stream stream) {
  const Pixels view = input.view;
  const int64_t pixels = view.lines * view.pixels, num_keys = input.num_keys;
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

  input.keys = sorted_keys.const_data_ptr<int32_t>();
  input.key_vectors = true;
  input.offsets = order.const_data_ptr<int64_t>();
  input.view.lines = input.view.lines_per_image = 1;
  input.view.pixels = pixels;
  // Chunks of 2 to 16 tiles: if possible, just enough chunks to occupy the device four times.
  const int64_t warps = std::min<int64_t>(12, blocks_in_shared(Ring<T, true, true>::BYTES));
  const int64_t occupied = 4 * warps * multiprocessors();
  const int64_t tiles = ceil_div(pixels, TILE<T>), blocks = ceil_div(view.dim, CHANNELS);
  const Tiling tiling =
      tiles_of(input, ceil_div(tiles, std::clamp<int64_t>(tiles * blocks / occupied, 2, 16)));

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
    output.sums_ends = new_buffer(edges, view.dim);
    join(0, output.sums_ends, output.sums, view.dim, view.dim, 1);
  }
  if (statistics & RESIDUALS) {
    output.residuals_ends = new_buffer(edges, view.dim);
    join(1, output.residuals_ends, output.residuals, view.dim, view.dim, 1);
  }
  if (statistics & SQDISTS) {
    output.sqdists_ends = new_buffer(edges, blocks);
    output.sqdists = new_buffer(blocks, num_keys);
    join(2, output.sqdists_ends, output.sqdists, blocks, 1, num_keys);
  }
  launch_moments(statistics, input, tiling, output, stream);
  launch("join_chunks_kernel", join_chunks_kernel, dim3(static_cast<unsigned>(edges), 3), 128, 0,
         stream, input.keys, pixels, tiling, TILE<T>, all);
  if (statistics & SQDISTS) {
    Reductions by_block{.num_keys = num_keys};
    by_block.of[0] = {output.sqdists, data(out.sqdists), 1, 1, tiling.blocks, 1};
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
    const Pixels view = as_pixels(size, stride, rows_join(size, stride));
    const bool channels_last = view.stride_d == 1 && view.stride_p != 1;
    const T* const first = features.const_data_ptr<T>();
    const int32_t* const first_key = keys.const_data_ptr<int32_t>();
    const Input<T> input{.features = first,
                         .keys = first_key,
                         .offsets = nullptr,
                         .anchors = optional_data<float>(anchors),
                         .view = view,
                         .row_stride = channels_last ? view.stride_p : view.stride_d,
                         .num_keys = static_cast<int>(num_keys),
                         .num_classes = anchors ? static_cast<int>(anchors->size(0)) : 1,
                         .groups = static_cast<int>(groups),
                         .vectors = (channels_last || view.stride_p == 1) &&
                                    vectors_aligned(first,
                                                    {view.stride_b, view.stride_h,
                                                     channels_last ? view.stride_p : view.stride_d},
                                                    sizeof(T)),
                         .key_vectors = reinterpret_cast<uintptr_t>(first_key) % 16 == 0 &&
                                        (view.lines == 1 || view.pixels % 4 == 0)};
    if (num_keys <= MAX_UNSORTED_KEYS)
      in_raster_order(input, statistics, out, device.stream);
    else
      in_order_of_keys(input, statistics, keys, out, device.stream);
  });
  return {out.sums, out.sqdists, out.residuals};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("class_moments.cuda", TORCH_BOX(&anchorops::cuda::class_moments));
}

// The operator anchorops::split_groups.cuda: the pixels of each key are divided at random into
// groups of equal size (±1), by the rank of a pixel's hash among the hashes of its key.
//
// Nothing is sorted. The n pixels of a key are divided among n buckets by their hashes, in
// ascending order, so a bucket has one pixel on average. The rank of a pixel is the number of
// pixels in the buckets before its own, plus the number of smaller hashes in its own bucket. A
// bucket is a linked list. The order of a list does not matter, because ranks depend only on the
// hashes. Three launches compute where the buckets of each key start, the lists, and the ranks.
//
// Reads keys twice and writes them once; writes and reads 8 bytes a pixel for the lists. Most of
// these accesses are in the order of the hashes: each moves a sector of 32 bytes, from the
// second-level cache. Predicted for 262,144 pixels, not measured: 12 to 15 µs together. This is
// 2.5 µs for each launch, two round trips to memory for the lists, and about ten for the ranks.
#include "../labels.h"
#include "tensors.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256;

// The sum of a value over the block's threads before this one. shared: [THREADS / 32].
__device__ uint64_t sum_before(uint64_t value, uint64_t* shared) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t total = value;
  for (unsigned lanes = 1; lanes < 32; lanes *= 2) {
    const uint64_t other = __shfl_up_sync(FULL_WARP, total, lanes);
    if (lane >= lanes) total += other;
  }
  if (lane == 31) shared[warp] = total;
  __syncthreads();
  for (unsigned w = 0; w < warp; ++w) total += shared[w];
  __syncthreads();
  return total - value;
}

// One block; each thread processes a range of the keys.
__global__ void __launch_bounds__(THREADS)
    group_counts_kernel(const int64_t* counts,  // [num_keys]
                        int64_t* starts,        // [num_keys]: number of pixels with smaller keys
                        int64_t* of_groups,     // [num_keys, groups]
                        int64_t num_keys, int64_t groups) {
  const int64_t each = ceil_div(num_keys, int64_t{THREADS});
  const int64_t begin = min(threadIdx.x * each, num_keys), end = min(begin + each, num_keys);
  uint64_t own = 0;
  for (int64_t k = begin; k < end; ++k) own += counts[k];
  uint64_t before = sum_before(own, reinterpret_cast<uint64_t*>(shared_memory()));
  for (int64_t k = begin; k < end; ++k) {
    starts[k] = static_cast<int64_t>(before);
    before += counts[k];
    for (int64_t g = 0; g < groups; ++g)
      of_groups[k * groups + g] = (counts[k] - g + groups - 1) / groups;
  }
}

struct Lists {
  uint32_t* first;   // [pixels], for each bucket: its first pixel + 1, or 0
  uint32_t* totals;  // [blocks]: the number of pixels in the buckets of each block
  uint32_t* next;    // [pixels], for each pixel: the next pixel in its bucket + 1, or 0
};

__global__ void __launch_bounds__(THREADS)
    link_pixels_kernel(const int32_t* keys,    // [pixels], -1 where ignored
                       const int64_t* counts,  // [num_keys]
                       const int64_t* starts,  // [num_keys]
                       const int64_t* seed,    // one
                       Lists lists,            // `first` and `totals` are zero on entry
                       int32_t* split,         // [pixels], written here if the key is ignored
                       int64_t pixels) {
  const int64_t p = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (p >= pixels) return;
  const int32_t key = keys[p];
  if (key < 0) {
    split[p] = -1;
    return;
  }
  const auto pixel = static_cast<uint32_t>(p);
  const auto bucket = static_cast<uint32_t>(starts[key]) +
                      bucket_of(PixelHash(*seed)(pixel), static_cast<uint32_t>(counts[key]));
  lists.next[pixel] = atomicExch(&lists.first[bucket], pixel + 1);
  atomicAdd(&lists.totals[bucket / THREADS], 1u);
}

// A thread processes one bucket. It reads its list m + 2 times if there are m pixels in it.
__global__ void __launch_bounds__(THREADS)
    rank_pixels_kernel(const int32_t* keys, const int64_t* starts, const int64_t* seed,
                       const Lists lists, int32_t* split, int64_t pixels, int32_t groups) {
  auto* shared = reinterpret_cast<uint64_t*>(shared_memory());
  const PixelHash hash(*seed);
  const int64_t bucket = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  const uint32_t head = bucket < pixels ? lists.first[bucket] : 0;
  uint64_t size = 0, in_blocks_before = 0;
  for (uint32_t a = head; a; a = lists.next[a - 1]) ++size;
  for (unsigned block = threadIdx.x; block < blockIdx.x; block += THREADS)
    in_blocks_before += lists.totals[block];
  // the number of pixels in the buckets of all blocks before this one
  for (int lanes = 16; lanes; lanes /= 2)
    in_blocks_before += __shfl_xor_sync(FULL_WARP, in_blocks_before, lanes);
  uint64_t before = sum_before(size, shared);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = in_blocks_before;
  __syncthreads();
  for (int warp = 0; warp < THREADS / 32; ++warp) before += shared[warp];

  for (uint32_t a = head; a; a = lists.next[a - 1]) {
    const int32_t key = keys[a - 1];
    auto rank = static_cast<uint32_t>(before - static_cast<uint64_t>(starts[key]));
    for (uint32_t b = head; b; b = lists.next[b - 1]) rank += hash(b - 1) < hash(a - 1);
    split[a - 1] = key * groups + static_cast<int32_t>(rank % static_cast<uint32_t>(groups));
  }
}

std::tuple<Tensor, Tensor> split_groups(Tensor keys, Tensor counts, Tensor seed, int64_t groups) {
  const OnDevice device(keys);
  const int64_t pixels = keys.numel(), num_keys = counts.numel();
  check_keys("split_groups.cuda", keys, pixels);
  STD_TORCH_CHECK(pixels < int64_t{1} << 31, "split_groups.cuda: keys: more than 2^31 pixels");
  std::vector<int64_t> shape = to_vector(counts.sizes());
  shape.push_back(groups);
  Tensor split = new_empty(keys, to_vector(keys.sizes()), ScalarType::Int);
  Tensor of_groups = new_empty(counts, shape, ScalarType::Long);
  const Tensor starts = new_empty(counts, {num_keys}, ScalarType::Long);
  const auto* of_keys = counts.const_data_ptr<int64_t>();
  launch("group_counts_kernel", group_counts_kernel, 1, THREADS, THREADS / 32 * sizeof(uint64_t),
         device.stream, of_keys, starts.mutable_data_ptr<int64_t>(),
         of_groups.mutable_data_ptr<int64_t>(), num_keys, groups);
  if (pixels == 0) return {split, of_groups};

  const int64_t blocks = ceil_div(pixels, int64_t{THREADS});
  const Tensor workspace = new_empty(keys, {2 * pixels + blocks}, ScalarType::Int);
  auto* first = reinterpret_cast<uint32_t*>(workspace.mutable_data_ptr<int32_t>());
  const Lists lists{first, first + pixels, first + pixels + blocks};
  fill_zero(first, (pixels + blocks) * sizeof(uint32_t), device.stream);
  const auto* of_pixels = keys.const_data_ptr<int32_t>();
  const auto* start = starts.const_data_ptr<int64_t>();
  const auto* seed_data = seed.const_data_ptr<int64_t>();
  const dim3 grid = grid_of("split_groups.cuda", blocks);
  launch("link_pixels_kernel", link_pixels_kernel, grid, THREADS, 0, device.stream, of_pixels,
         of_keys, start, seed_data, lists, split.mutable_data_ptr<int32_t>(), pixels);
  launch("rank_pixels_kernel", rank_pixels_kernel, grid, THREADS, THREADS / 32 * sizeof(uint64_t),
         device.stream, of_pixels, start, seed_data, lists, split.mutable_data_ptr<int32_t>(),
         pixels, static_cast<int32_t>(groups));
  return {split, of_groups};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("split_groups.cuda", TORCH_BOX(&anchorops::cuda::split_groups));
}

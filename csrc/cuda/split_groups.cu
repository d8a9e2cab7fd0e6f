// The operator anchorops::split_groups.cuda: the pixels of each key are divided at random into
// groups of equal size (±1), by the rank of a pixel's hash among the hashes of its key.
//
// Nothing is sorted. The n pixels of a key are divided among n buckets by their hashes, in
// ascending order, so a bucket has one pixel on average. The rank of a pixel is the number of
// pixels in the buckets before its own, plus the number of smaller hashes in its own bucket. A
// bucket is a linked list. The order of a list does not matter, because ranks depend only on the
// hashes. Two launches compute the lists and the ranks, after one memset. Each block of the first
// kernel computes where the buckets of each key start, so there are at most MAX_KEYS keys: as many
// as class moments support.
//
// Reads keys twice and writes them once; writes and reads 8 bytes a pixel for the lists. Most of
// these accesses are in the order of the hashes: each moves a sector of 32 bytes, from the
// second-level cache. A warp waits for its largest bucket, which has four pixels on average.
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../labels.h"
#include "tensors.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int64_t MAX_KEYS = 1024;

// The sum of a value over the block's threads before this one.
__device__ uint32_t sum_before(uint32_t value, uint32_t* shared) {  // [WARPS]
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t total = value;
  for (unsigned lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t other = __shfl_up_sync(FULL_WARP, total, lanes);
    if (lane >= lanes) total += other;
  }
  if (lane == 31) shared[warp] = total;
  __syncthreads();
  for (unsigned w = 0; w < warp; ++w) total += shared[w];
  __syncthreads();
  return total - value;
}

struct Memory {
  uint32_t* first;   // [pixels], for each bucket: its first pixel + 1, or 0
  uint32_t* totals;  // [blocks]: the number of pixels in the buckets of each block
  uint32_t* next;    // [pixels], for each pixel: the next pixel in its bucket + 1, or 0
  uint32_t* starts;  // [num_keys]: the number of pixels with smaller keys
};

__global__ void __launch_bounds__(THREADS)
    link_pixels_kernel(const int32_t* keys,    // [pixels], -1 where ignored
                       const int64_t* counts,  // [num_keys]
                       const int64_t* seed,    // [1]
                       Memory memory,          // `first` and `totals` are zero on entry
                       int64_t* group_counts,  // [num_keys, groups]
                       int32_t* split,         // [pixels], written here if the key is ignored
                       int64_t pixels, int num_keys, int groups) {
  __shared__ uint32_t shared[WARPS];
  extern __shared__ uint32_t start_of[];  // [num_keys]
  // a thread has a range of the keys
  const int each = ceil_div(num_keys, THREADS);
  const int begin = min(static_cast<int>(threadIdx.x) * each, num_keys);
  const int end = min(begin + each, num_keys);
  uint32_t pixels_of_range = 0;
  for (int k = begin; k < end; ++k) pixels_of_range += static_cast<uint32_t>(counts[k]);
  uint32_t before = sum_before(pixels_of_range, shared);
  for (int k = begin; k < end; ++k) {
    const auto count = static_cast<int>(counts[k]);
    start_of[k] = before;
    before += count;
    if (blockIdx.x > 0) continue;
    memory.starts[k] = start_of[k];
    const int least = count / groups, larger = count % groups;
    for (int g = 0; g < groups; ++g) group_counts[int64_t{k} * groups + g] = least + (g < larger);
  }
  __syncthreads();
  const int64_t p = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (p >= pixels) return;
  const int32_t key = keys[p];
  if (key < 0) {
    split[p] = -1;
    return;
  }
  const auto pixel = static_cast<uint32_t>(p);
  const uint32_t bucket =
      start_of[key] + bucket_of(PixelHash(*seed)(pixel), static_cast<uint32_t>(counts[key]));
  memory.next[pixel] = atomicExch(&memory.first[bucket], pixel + 1);
  atomicAdd(&memory.totals[bucket / THREADS], 1u);
}

// A thread processes one bucket. It reads its list m + 2 times if there are m pixels in it.
__global__ void __launch_bounds__(THREADS)
    rank_pixels_kernel(const int32_t* keys,  // [pixels]
                       const int64_t* seed,  // [1]
                       const Memory memory,
                       int32_t* split,  // [pixels], -1 where ignored
                       int64_t pixels, int32_t groups) {
  __shared__ uint32_t shared[WARPS];
  const PixelHash hash(*seed);
  const int64_t bucket = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  const uint32_t head = bucket < pixels ? memory.first[bucket] : 0;
  uint32_t size = 0, in_blocks_before = 0;
  for (uint32_t a = head; a; a = memory.next[a - 1]) ++size;
  for (unsigned block = threadIdx.x; block < blockIdx.x; block += THREADS)
    in_blocks_before += memory.totals[block];
  uint32_t before = sum_before(size, shared);
  in_blocks_before = __reduce_add_sync(FULL_WARP, in_blocks_before);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = in_blocks_before;
  __syncthreads();
  // the number of pixels in the buckets of all blocks before this one
  for (int warp = 0; warp < WARPS; ++warp) before += shared[warp];

  for (uint32_t a = head; a; a = memory.next[a - 1]) {
    unsigned smaller = 0;  // hashes of the bucket
    for (uint32_t b = head; b; b = memory.next[b - 1]) smaller += hash(b - 1) < hash(a - 1);
    const int32_t key = keys[a - 1];
    const uint32_t rank = before - memory.starts[key] + smaller;
    split[a - 1] = key * groups + static_cast<int32_t>(rank % static_cast<uint32_t>(groups));
  }
}

std::tuple<Tensor, Tensor> split_groups(Tensor keys, Tensor counts, Tensor seed, int64_t groups) {
  const char* name = "split_groups.cuda";
  const int64_t pixels = keys.numel(), num_keys = counts.numel();
  check_keys(name, keys, pixels);
  STD_TORCH_CHECK(counts.is_contiguous(), name,
                  ": counts: expected a contiguous tensor, got strides ",
                  text_of(counts.strides()));
  STD_TORCH_CHECK(seed.numel() == 1, name, ": seed: expected one number, got ", seed.numel());
  STD_TORCH_CHECK(groups > 0, name, ": groups: expected at least 1, got ", groups);
  STD_TORCH_CHECK(pixels < int64_t{1} << 31, name, ": keys: more than 2^31 pixels");
  STD_TORCH_CHECK(num_keys <= MAX_KEYS, name, ": counts: expected at most ", MAX_KEYS,
                  " keys, got ", num_keys);
  const OnDevice device(keys);
  std::vector<int64_t> shape = to_vector(counts.sizes());
  shape.push_back(groups);
  Tensor split = new_empty(keys, to_vector(keys.sizes()), ScalarType::Int);
  Tensor group_counts = new_empty(counts, shape, ScalarType::Long);
  auto* group_counts_data = group_counts.mutable_data_ptr<int64_t>();
  if (pixels == 0) {
    fill_zero(group_counts_data, group_counts.numel() * sizeof(int64_t), device.stream);
    return {split, group_counts};
  }
  const int64_t blocks = ceil_div(pixels, int64_t{THREADS});
  const Tensor tensor = new_empty(keys, {2 * pixels + blocks + num_keys}, ScalarType::Int);
  auto* first = reinterpret_cast<uint32_t*>(tensor.mutable_data_ptr<int32_t>());
  const Memory memory{.first = first,
                      .totals = first + pixels,
                      .next = first + pixels + blocks,
                      .starts = first + 2 * pixels + blocks};
  fill_zero(first, (pixels + blocks) * sizeof(uint32_t), device.stream);
  const dim3 grid = grid_of(name, blocks);
  launch("link_pixels_kernel", link_pixels_kernel, grid, THREADS, num_keys * sizeof(uint32_t),
         device.stream, keys.const_data_ptr<int32_t>(), counts.const_data_ptr<int64_t>(),
         seed.const_data_ptr<int64_t>(), memory, group_counts_data,
         split.mutable_data_ptr<int32_t>(), pixels, static_cast<int>(num_keys),
         static_cast<int>(groups));
  launch("rank_pixels_kernel", rank_pixels_kernel, grid, THREADS, 0, device.stream,
         keys.const_data_ptr<int32_t>(), seed.const_data_ptr<int64_t>(), memory,
         split.mutable_data_ptr<int32_t>(), pixels, static_cast<int>(groups));
  return {split, group_counts};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, CUDA, library) {
  library.impl("split_groups.cuda", TORCH_BOX(&anchorops::cuda::split_groups));
}

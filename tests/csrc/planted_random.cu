// class_moments_random_kernel without some of its barriers. Macros remove them, so that the rest is
// the kernel itself.
#include <cstring>

#include "../../csrc/cuda/class_moments_sample.cuh"
#include "../../csrc/matrices.cuh"

namespace anchorops {
namespace {
enum class Fault { NONE, NO_BARRIER_IN_SORT, NO_BARRIER_OF_ROUNDS } planted;
}  // namespace
}  // namespace anchorops

#define __syncthreads() (planted == Fault::NO_BARRIER_IN_SORT ? void() : (__syncthreads)())
#define barrier_of_block() (planted == Fault::NO_BARRIER_OF_ROUNDS ? void() : (barrier_of_block)())
#include "../../csrc/cuda/class_moments_random.cuh"
#undef __syncthreads
#undef barrier_of_block

// features: float32 [32, pixels]; keys: int32 [pixels]; sums: float32 [num_keys, 32]. The number of
// pixels is a multiple of 32.
extern "C" [[gnu::visibility("default")]] void random_sums(const char* fault, const float* features,
                                                           const int32_t* keys, float* sums,
                                                           int pixels, int num_keys) {
  using namespace anchorops;
  using namespace anchorops::cuda;
  planted = !std::strcmp(fault, "NO_BARRIER_IN_SORT")     ? Fault::NO_BARRIER_IN_SORT
            : !std::strcmp(fault, "NO_BARRIER_OF_ROUNDS") ? Fault::NO_BARRIER_OF_ROUNDS
                                                          : Fault::NONE;
  const Input<float> input{.features = features,
                           .keys = keys,
                           .view = {.lines = 1,
                                    .dim = CHANNELS,
                                    .pixels = pixels,
                                    .lines_per_image = 1,
                                    .stride_d = pixels,
                                    .stride_p = 1},
                           .row_stride = pixels,
                           .num_keys = num_keys,
                           .num_classes = 1,
                           .groups = 1,
                           .vectors = true};
  Tiling tiling{.tiles_per_line = pixels / TILE<float>, .last_tile = TILE<float>, .blocks = 1};
  tiling.tiles = tiling.tiles_per_line;
  std::vector<uint8_t> met(num_keys);
  const Partials partials{
      .sums = sums, .met = met.data(), .rows = 1, .width = CHANNELS, .period = 1};
  launch_kernel(Launch::LARGE, "class_moments_random_kernel",
                class_moments_random_kernel<float, SUMS, false>, 1,
                dim3(CHANNELS, WINDOWS + MOVERS), RandomMemory<float, false>::bytes(num_keys),
                nullptr, input, tiling.in_chunks(1), partials);
}

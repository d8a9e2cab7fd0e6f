// The vector kernels for any processor: SSE2 on x86-64, NEON on Arm.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "pixel_kl_divergence.h"
#include "softmax_moments.h"

#define VECTOR_BYTES 16
namespace anchorops::cpu::softmax::baseline {
#include "softmax_moments_kernel.h"
}  // namespace anchorops::cpu::softmax::baseline

// The vector kernels for any processor: SSE2 on x86-64, NEON on Arm.
#include <algorithm>
#include <cstring>
#include <utility>

#include "class_moments.h"

#define VECTOR_BYTES 16
namespace anchorops::cpu::baseline {
#include "simd.h"
#include "class_moments_kernel.h"
}  // namespace anchorops::cpu::baseline

// The vector kernels for AVX2.
#ifdef __x86_64__
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "pixel_kl_divergence.h"
#include "softmax_moments.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define VECTOR_BYTES 32
namespace anchorops::cpu::softmax::avx2 {
#include "softmax_moments_kernel.h"
}  // namespace anchorops::cpu::softmax::avx2

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

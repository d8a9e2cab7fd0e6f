// The vector kernels of softmax moments for AVX2.
#ifdef __x86_64__
#define VECTOR_BYTES 32
#include "softmax_moments_kernel.h"
#endif

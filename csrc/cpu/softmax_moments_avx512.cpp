// The vector kernels of softmax moments for AVX-512.
#ifdef __x86_64__
#define VECTOR_BYTES 64
#include "softmax_moments_kernel.h"
#endif

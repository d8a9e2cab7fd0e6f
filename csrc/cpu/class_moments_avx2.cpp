// The vector kernels of class moments for AVX2.
#ifdef __x86_64__
#define VECTOR_BYTES 32
#include "class_moments_kernel.h"
#endif

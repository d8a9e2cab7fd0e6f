// The vector kernels of class moments for AVX-512.
#ifdef __x86_64__
#define VECTOR_BYTES 64
#include "class_moments_kernel.h"
#endif

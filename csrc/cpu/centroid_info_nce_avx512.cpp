// The vector kernel of centroid InfoNCE for AVX-512.
#ifdef __x86_64__
#define VECTOR_BYTES 64
#include "centroid_info_nce_kernel.h"
#endif

// The vector kernel of centroid InfoNCE for AVX2.
#ifdef __x86_64__
#define VECTOR_BYTES 32
#include "centroid_info_nce_kernel.h"
#endif

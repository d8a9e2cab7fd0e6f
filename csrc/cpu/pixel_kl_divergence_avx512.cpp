// The vector kernels of the divergence of upsampled logits for AVX-512.
#ifdef __x86_64__
#define VECTOR_BYTES 64
#include "pixel_kl_divergence_kernel.h"
#endif

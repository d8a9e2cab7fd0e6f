// The vector kernels of the divergence of upsampled logits for AVX2.
#ifdef __x86_64__
#define VECTOR_BYTES 32
#include "pixel_kl_divergence_kernel.h"
#endif

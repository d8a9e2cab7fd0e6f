// The vector kernels of the divergence of upsampled logits for any processor.
#define VECTOR_BYTES 16
#include "pixel_kl_divergence_kernel.h"

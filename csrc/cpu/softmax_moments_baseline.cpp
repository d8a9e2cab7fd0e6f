// The vector kernels of softmax moments for any processor.
#define VECTOR_BYTES 16
#include "softmax_moments_kernel.h"

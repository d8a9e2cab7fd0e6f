// The vector kernels of class moments for any processor.
#define VECTOR_BYTES 16
#include "class_moments_kernel.h"

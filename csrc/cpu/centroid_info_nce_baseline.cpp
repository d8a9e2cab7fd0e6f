// The vector kernel of centroid InfoNCE for any processor.
#define VECTOR_BYTES 16
#include "centroid_info_nce_kernel.h"

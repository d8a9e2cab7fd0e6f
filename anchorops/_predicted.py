"""Where `auto` takes Triton's kernels although `cuda` is usable: they are predicted to be faster.

Nothing was measured. The times were predicted for an H200 from the machine code of commit abb0ad2,
by a model of its instructions that is no longer in the repository: they cannot be computed again,
and a measurement should replace them. They are in µs, in bfloat16, for labels of images.
"""

from torch import Tensor

# Cross-entropy, forward and backward, B8, 128×256 → 512×1024:
#
#     classes      2    19    32    64   150
#     cuda       131   188   220   354   732
#     triton      79   213   313   567  1249
#
# With 12 classes cuda takes 150; Triton's times, which are linear, are then 158.
CROSS_ENTROPY_CLASSES = 10

# Class moments, forward and backward of sums and sqdists, B16, D768, 128×128. Up to 1,024 keys
# `cuda` does not sort the pixels. With more keys it loads those of planes one by one.
#
#              150 keys, planes   sorted, planes   sorted, channels last
#     cuda                  292              535                     361
#     triton                523              464                     363
CLASS_MOMENTS_KEYS = 1024


def cross_entropy_by_triton(num_classes: int) -> bool:
    return num_classes <= CROSS_ENTROPY_CLASSES


def class_moments_by_triton(features: Tensor, num_keys: int) -> bool:
    in_planes = features.dim() > 2 and features.stride(1) != 1
    return in_planes and num_keys > CLASS_MOMENTS_KEYS

"""Where `auto` takes Triton's kernels although `cuda` is usable: they are predicted to be faster.

Nothing was measured. The times were predicted for an H200 from the machine code of commit abb0ad2,
by a model of its instructions that is no longer in the repository: they cannot be computed again,
and a measurement should replace them. They are in µs, in bfloat16, for labels of images.
"""

# Cross-entropy, forward and backward, B8, 128×256 → 512×1024:
#
#     classes      2    19    32    64   150
#     cuda       131   188   220   354   732
#     triton      79   213   313   567  1249
#
# With 12 classes cuda takes 150; Triton's times, which are linear, are then 158.
CROSS_ENTROPY_CLASSES = 10


def cross_entropy_by_triton(num_classes: int) -> bool:
    return num_classes <= CROSS_ENTROPY_CLASSES

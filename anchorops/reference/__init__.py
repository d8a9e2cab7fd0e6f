"""The definition of every operator, in plain PyTorch for any device.

The functions here have the signatures of the public functions. Their arguments are already checked,
and ignore_index is always given. They are also the `reference` backend; as they are plain PyTorch,
higher-order derivatives work.

Shapes: features (B, D, H, W), (B, D, N) or (N, D); labels (B, H', W'), (B, N) or (N,); K classes;
P = H·W pixels of an image; logits (B, K, h, w). Accumulation is in float64, so the order of a sum
does not affect the float32 result.
"""

from .centroid_info_nce import centroid_info_nce
from .class_keys import class_keys
from .class_moments import class_moments, pixel_to_anchor_mse
from .confusion import confusion
from .mask_rle import mask_codes, mask_rle
from .pixel_argmax import pixel_argmax
from .pixel_kl_divergence import pixel_kl_divergence
from .probability_histograms import error_gradients, probability_histograms
from .softmax_moments import softmax_moments
from .split_groups import group_counts, split_groups
from .upsampled_sums import upsampled_sums

__all__ = [
    "centroid_info_nce",
    "class_keys",
    "class_moments",
    "confusion",
    "error_gradients",
    "group_counts",
    "mask_codes",
    "mask_rle",
    "pixel_argmax",
    "pixel_kl_divergence",
    "pixel_to_anchor_mse",
    "probability_histograms",
    "softmax_moments",
    "split_groups",
    "upsampled_sums",
]

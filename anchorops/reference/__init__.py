"""The definition of every operator, in plain PyTorch for any device.

The functions here have the signatures of the public functions. Their arguments are already checked,
and ignore_index is always given. They are also the `reference` backend; as they are plain PyTorch,
higher-order derivatives work.

Shapes: features (B, D, H, W), (B, D, N) or (N, D); labels (B, H', W'), (B, N) or (N,); K classes;
P = H·W pixels of an image; logits (B, K, h, w). Accumulation is in float64, so the order of a sum
does not affect the float32 result.
"""

from .centroid_info_nce import centroid_info_nce
from .class_keys import class_keys, resize_labels
from .class_moments import class_centroids, class_moments, feature_rows, pixel_to_anchor_mse
from .confusion import confusion
from .fixed_order_sum import fixed_order_sum
from .mask_rle import decode, mask_rle
from .pixel_argmax import pixel_argmax
from .pixel_kl_divergence import pixel_kl_divergence
from .probability_histograms import error_gradients, probability_histograms
from .softmax_moments import softmax_moments
from .split_groups import group_counts, split_groups
from .upsampled_sums import SPLAT_UNITS, splat_axis, splat_keys, splat_of, upsampled_sums
from .upsampling import bilinear_sources, upsample

__all__ = [
    "SPLAT_UNITS",
    "bilinear_sources",
    "centroid_info_nce",
    "class_centroids",
    "class_keys",
    "class_moments",
    "confusion",
    "decode",
    "error_gradients",
    "feature_rows",
    "fixed_order_sum",
    "group_counts",
    "mask_rle",
    "pixel_argmax",
    "pixel_kl_divergence",
    "pixel_to_anchor_mse",
    "probability_histograms",
    "resize_labels",
    "softmax_moments",
    "splat_axis",
    "splat_keys",
    "splat_of",
    "split_groups",
    "upsample",
    "upsampled_sums",
]

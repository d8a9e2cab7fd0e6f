"""The definition of every operator, in plain PyTorch for any device.

Arguments are already checked, and ignore_index is always given. The functions are also the
`reference` backend; as they are plain PyTorch, higher-order derivatives work.

Shapes: features (B, D, H, W), (B, D, N) or (N, D); labels (B, H', W'), (B, N) or (N,); K classes;
P = H·W pixels of an image; logits (B, K, h, w). Accumulation is in float64, so the order of a sum
does not affect the float32 result.
"""

from .centroid_info_nce import centroid_info_nce as centroid_info_nce
from .class_keys import class_keys as class_keys
from .class_moments import class_moments as class_moments
from .confusion import confusion as confusion
from .mask_rle import mask_codes as mask_codes
from .mask_rle import mask_rle as mask_rle
from .pixel_argmax import pixel_argmax as pixel_argmax
from .pixel_kl_divergence import pixel_kl_divergence as pixel_kl_divergence
from .probability_histograms import error_gradients as error_gradients
from .probability_histograms import probability_histograms as probability_histograms
from .softmax_moments import softmax_moments as softmax_moments
from .split_groups import group_counts as group_counts
from .split_groups import split_groups as split_groups
from .upsampled_sums import upsampled_sums as upsampled_sums

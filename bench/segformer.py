"""SegFormer of Transformers."""

from typing import Any

from torch import nn


def segformer(size: int, num_classes: int) -> nn.Module:
    """SegFormer-B0, B2 or B5."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    small = size == 0
    sizes: dict[str, Any] = {
        "depths": {0: [2, 2, 2, 2], 2: [3, 4, 6, 3], 5: [3, 6, 40, 3]}[size],
        "hidden_sizes": [32, 64, 160, 256] if small else [64, 128, 320, 512],
        "decoder_hidden_size": 256 if small else 768,
        "num_labels": num_classes,
    }
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes))

"""Networks as their users write them: maps are upsampled before the convolution that reads them."""

from typing import Any

from torch import Tensor, nn

from anchorops.train.networks.models import HRNetBody, Segmenter, at_first_size, build_model


class PlainHRNetBody(HRNetBody):
    """The training program's HRNet upsamples after the convolution itself; this one before."""

    def forward(self, images: Tensor) -> Tensor:
        return self.mix(at_first_size(self.backbone(images)))


def plain_network(name: str, num_classes: int) -> Segmenter:
    """A network of the training program, without late upsampling."""
    model = build_model(name, num_classes)
    if isinstance(model.body, HRNetBody):
        model.body.__class__ = PlainHRNetBody
    return model


def segformer(size: int, num_classes: int) -> nn.Module:
    """SegFormer-B0, B2 or B5 of Transformers."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    small = size == 0
    sizes: dict[str, Any] = {
        "depths": {0: [2, 2, 2, 2], 2: [3, 4, 6, 3], 5: [3, 6, 40, 3]}[size],
        "hidden_sizes": [32, 64, 160, 256] if small else [64, 128, 320, 512],
        "decoder_hidden_size": 256 if small else 768,
        "num_labels": num_classes,
    }
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes))

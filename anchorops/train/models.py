"""Segmentation networks as a body, giving features (B, D, h, w), and a 1×1 convolution on them."""

from pathlib import Path

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HRNETS = {
    "hrnet-w18-small": "hrnet_w18_small",
    "hrnet-w18-small-v2": "hrnet_w18_small_v2",
    **{f"hrnet-w{width}": f"hrnet_w{width}" for width in (18, 30, 32, 40, 44, 48, 64)},
}
SEGFORMERS = {f"segformer-b{size}": f"mit_b{size}" for size in range(6)}


class Segmenter(nn.Module):
    """Images (B, C, H, W) to logits (B, K, H/s, W/s), s the stride of the body (4 as a rule).

    Its last module is the classifier, whose input are the features that the methods work on.
    """

    def __init__(self, body: nn.Module, dim: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.classifier = nn.Conv2d(dim, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(images))


class HRNetBody(nn.Module):
    """HRNetV2 (arXiv 1908.07919): the four resolutions brought to stride 4, concatenated and mixed;
    D is the sum of their channels, 720 for W48."""

    def __init__(self, name: str, channels: int, pretrained: bool) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            name,
            pretrained=pretrained,
            in_chans=channels,
            features_only=True,
            feature_location="",
            out_indices=(1, 2, 3, 4),
        )
        self.dim = sum(self.backbone.feature_info.channels())  # pyright: ignore
        self.mix = nn.Sequential(
            nn.Conv2d(self.dim, self.dim, 1, bias=False), nn.BatchNorm2d(self.dim), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        first, *others = self.backbone(images)
        size = first.shape[2:]
        resized = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in others]
        return self.mix(torch.cat([first, *resized], dim=1))


def build_model(
    name: str,
    num_classes: int,
    *,
    channels: int = 3,
    pretrained: bool = False,
    weights: Path | None = None,
) -> Segmenter:
    """A network by name.

    Args:
        name: "hrnet-w18-small", "hrnet-w18", "hrnet-w48", …, "segformer-b0" to "segformer-b5", or
            ARCHITECTURE:ENCODER of segmentation-models-pytorch, "unet:resnet34" for instance.
        num_classes, channels: classes predicted and channels of the images.
        pretrained: start the backbone from ImageNet weights; they are downloaded.
        weights: a checkpoint of this program, or any file of a state dict, to start from; entries
            of the classifier are left out where the number of classes differs.

    Raises ValueError for an unknown name, and where the weights do not fit.
    """
    if name in HRNETS:
        body = HRNetBody(HRNETS[name], channels, pretrained)
        dim = body.dim
    else:
        architecture, _, encoder = name.partition(":")
        if name in SEGFORMERS:
            architecture, encoder = "segformer", SEGFORMERS[name]
        if not encoder:
            known = ", ".join([*HRNETS, *SEGFORMERS])
            raise ValueError(f"model: expected {known} or ARCHITECTURE:ENCODER, got {name!r}")
        try:
            body = smp.create_model(
                architecture,
                encoder_name=encoder,
                encoder_weights="imagenet" if pretrained else None,
                in_channels=channels,
            )
        except KeyError as error:
            raise ValueError(f"model {name!r}: {error}") from None
        dim = body.segmentation_head[0].in_channels  # pyright: ignore
        body.segmentation_head = nn.Identity()
    model = Segmenter(body, int(dim), num_classes)
    if weights:
        load_weights(model, weights)
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Start from the weights in `path`; see build_model."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("model", "state_dict"):
            state = state.get(key, state)
    except FileNotFoundError:
        raise ValueError(f"weights {path} do not exist") from None
    except Exception as error:
        raise ValueError(f"weights {path} cannot be read: {error}") from error
    own = model.state_dict()
    state = {
        key: value
        for key, value in state.items()
        if not (key.startswith("classifier.") and key in own and own[key].shape != value.shape)
    }
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"weights {path}: {error}") from None
    missing = [key for key in missing if not key.startswith("classifier.")]
    if missing or unexpected:
        raise ValueError(
            f"weights {path} are of another model: missing {', '.join(missing[:3]) or 'none'} "
            f"({len(missing)} entries), unknown {', '.join(unexpected[:3]) or 'none'} "
            f"({len(unexpected)} entries)"
        )

"""Segmentation networks: a body that returns features (B, D, h, w), and a 1×1 convolution."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
# the parts that depend on the classes; in a checkpoint, a method is under "regularizer"
HEADS = ("classifier.", "auxiliary.", "regularizer.")
AUXILIARY_DIM = 256
SEGFORMERS = {f"segformer-b{size}": f"mit_b{size}" for size in range(6)}


class Segmenter(nn.Module):
    """Computes logits (B, K, H/s, W/s) of images (B, C, H, W); s is the stride of the body
    (usually 4).

    The methods use the input of its classifier. If auxiliary_dim is given, the number of channels
    of the backbone's second last map, there is an auxiliary head on this map.
    """

    def __init__(
        self, body: nn.Module, dim: int, num_classes: int, auxiliary_dim: int | None = None
    ) -> None:
        super().__init__()
        self.body = body
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        self.auxiliary = (
            AuxiliaryHead(self.backbone, auxiliary_dim, num_classes) if auxiliary_dim else None
        )

    @property
    def backbone(self) -> nn.Module:
        """The backbone: HRNet, or the encoder of a segmentation-models-pytorch architecture."""
        body = self.body
        return body.backbone if hasattr(body, "backbone") else body.encoder  # pyright: ignore

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(images))


class AuxiliaryHead(nn.Sequential):
    """Logits from the second last map of the backbone, only in training: mmsegmentation's FCNHead
    with one convolution."""

    def __init__(self, backbone: nn.Module, dim: int, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(dim, AUXILIARY_DIM, 3, padding=1, bias=False),
            nn.BatchNorm2d(AUXILIARY_DIM),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(AUXILIARY_DIM, num_classes, 1),
        )
        self._map: Tensor | None = None
        backbone.register_forward_hook(self._keep)

    def _keep(self, backbone: nn.Module, images: tuple[Tensor], maps: Sequence[Tensor]) -> None:
        self._map = maps[-2] if self.training else None

    def logits(self) -> Tensor:
        """The logits (B, K, h, w) of the model's last forward; they can be read once."""
        kept, self._map = self._map, None
        assert kept is not None, "the model has not run in training mode"
        return self(kept)


class HRNetBody(nn.Module):
    """HRNetV2 (arXiv 1908.07919): the four resolutions are upsampled to stride 4, concatenated and
    mixed; D is the sum of their channels, 720 for W48."""

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
        self.out_channels = self.backbone.feature_info.channels()  # pyright: ignore
        self.dim = sum(self.out_channels)
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
    auxiliary: bool = False,
) -> Segmenter:
    """A network by name.

    Args:
        name: "hrnet-w18-small", "hrnet-w18", "hrnet-w48", …, "segformer-b0" to "segformer-b5", or
            ARCHITECTURE:ENCODER of segmentation-models-pytorch, for example "unet:resnet34".
        num_classes, channels: the number of classes, and of channels of the images.
        pretrained: start the backbone from ImageNet weights; they are downloaded.
        weights: a checkpoint of this program, or any file of a state dict, to start from. Entries
            of a classifier are skipped if the number of classes differs.
        auxiliary: add an auxiliary head.

    Raises ValueError for an unknown name, for weights that do not match, and for an auxiliary head
    on DPT, whose backbone has no such map.
    """
    if name in HRNETS:
        body = HRNetBody(HRNETS[name], channels, pretrained)
        dim, stages = body.dim, body.out_channels
    else:
        architecture, _, encoder = name.partition(":")
        if name in SEGFORMERS:
            architecture, encoder = "segformer", SEGFORMERS[name]
        if not encoder:
            known = ", ".join([*HRNETS, *SEGFORMERS])
            raise ValueError(f"model: expected {known} or ARCHITECTURE:ENCODER, got {name!r}")
        try:
            body: Any = smp.create_model(
                architecture,
                encoder_name=encoder,
                encoder_weights="imagenet" if pretrained else None,
                in_channels=channels,
                **_takes_any_size(architecture, encoder),
            )
        except KeyError as error:
            raise ValueError(f"model {name!r}: {error}") from None
        stages, head = body.encoder.out_channels, body.segmentation_head
        *layers, classifier = head.head if architecture == "dpt" else [head[0]]
        dim, body.segmentation_head = classifier.in_channels, nn.Sequential(*layers)
    if auxiliary and name.startswith("dpt:"):
        raise ValueError(f"--auxiliary-weight: expected 0, {name} has no map for such a head")
    model = Segmenter(body, int(dim), num_classes, stages[-2] if auxiliary else None)  # pyright: ignore
    if weights:
        load_weights(model, weights)
    return model


def _takes_any_size(architecture: str, encoder: str) -> dict[str, bool]:
    """Options with which networks for a fixed size accept images of any size."""
    if architecture == "dpt":
        return {"dynamic_img_size": True}
    return {"strict_img_size": False} if encoder.startswith("tu-swin_") else {}


def load_weights(model: nn.Module, path: Path) -> None:
    """Start from the weights in `path`; see build_model."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("model", "state_dict"):
            state = state.get(key, state) if isinstance(state, dict) else state
        if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
            raise ValueError(f"expected tensors by name, got a {type(state).__name__}")
    except FileNotFoundError:
        raise ValueError(f"weights {path} do not exist") from None
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"weights {path} cannot be read: {reason}") from error
    own = model.state_dict()
    state = {
        key: value
        for key, value in state.items()
        if not key.startswith(HEADS) or (key in own and own[key].shape == value.shape)
    }
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"weights {path}: {error}") from None
    missing = [key for key in missing if not key.startswith(HEADS)]
    if missing or unexpected:
        raise ValueError(
            f"weights {path} are of another model: missing {', '.join(missing[:3]) or 'none'} "
            f"({len(missing)} entries), unknown {', '.join(unexpected[:3]) or 'none'} "
            f"({len(unexpected)} entries)"
        )

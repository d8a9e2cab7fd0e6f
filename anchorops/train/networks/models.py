"""Segmentation networks: a body that returns features (B, D, h, w), and a 1×1 convolution."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

import anchorops as ao

from .. import ranks
from ..options import Model

SIZES = ("18-small", "18-small-v2", "18", "30", "32", "40", "44", "48", "64")
HRNETS = {f"hrnet-w{size}": f"hrnet_w{size.replace('-', '_')}" for size in SIZES}
# the parts that depend on the classes; in a checkpoint, a method is under "regularizer"
HEADS = ("classifier.", "auxiliary.", "regularizer.")
OLD_PREFIX = "learner.model."  # of the names of weights in a checkpoint of an earlier version
AUXILIARY_DIM = 256
OWN_DROPOUT = {
    **dict.fromkeys(("deeplabv3", "deeplabv3plus"), "decoder_aspp_dropout"),
    "fpn": "decoder_dropout",
    "pspnet": "psp_dropout",
}
SEGFORMERS = {f"segformer-b{size}": f"mit_b{size}" for size in range(6)}


class Segmenter(nn.Module):
    """Computes logits (B, K, H/s, W/s) of images (B, C, H, W); s is the stride of the body
    (usually 4).

    The methods use the input of its classifier. If auxiliary_dim is given, the number of channels
    of the backbone's second last map, there is an auxiliary head on this map. dropout: share of the
    channels that are dropped before the classifier in training.
    """

    def __init__(
        self,
        body: nn.Module,
        dim: int,
        num_classes: int,
        auxiliary_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.body = body
        self.dropout = nn.Dropout2d(dropout) if dropout else nn.Identity()
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
        return self.classifier(self.dropout(self.body(images)))

    def draw_classifiers(self, std: float) -> None:
        """Give the classifiers, the auxiliary one too, weights from N(0, std²) and biases of 0."""
        auxiliary = [] if self.auxiliary is None else [self.auxiliary[-1]]
        for classifier in (self.classifier, *auxiliary):
            assert isinstance(classifier, nn.Conv2d) and classifier.bias is not None
            nn.init.normal_(classifier.weight, std=std)
            nn.init.zeros_(classifier.bias)


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
    """HRNetV2 (arXiv 1908.07919): the four resolutions are upsampled to stride 4 and mixed by a
    1×1 convolution; D is the sum of their channels, 720 for W48."""

    def __init__(self, name: str, channels: int, pretrained: bool) -> None:
        super().__init__()
        self.backbone: Any = timm.create_model(
            HRNETS[name],
            pretrained=pretrained,
            in_chans=channels,
            features_only=True,
            out_indices=(1, 2, 3, 4),
            feature_location="",
        )
        self.out_channels = self.backbone.feature_info.channels()
        self.dim = sum(self.out_channels)
        self.mix = Conv2dNormActivation(self.dim, self.dim, 1, inplace=False)

    def forward(self, images: Tensor) -> Tensor:
        first, *others = self.backbone(images)
        size = first.shape[2:]
        resized = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in others]
        return self.mix(torch.cat([first, *resized], dim=1))


def build_model(options: Model, num_classes: int, channels: int = 3) -> Segmenter:
    """The network. channels: of the images. The file of weights may be a checkpoint of this
    program, or any file of a state dict.

    Raises ValueError for an unknown name, and for weights that do not match."""
    from_file = options.weights or options.backbone_weights
    pretrained = options.pretrained and not from_file
    if options.network in HRNETS:
        body = HRNetBody(options.network, channels, pretrained)
        dim, stages = body.dim, body.out_channels
    else:
        body, dim, stages = _smp_body(options.network, channels, pretrained, options.dropout)
    auxiliary_dim = stages[-2] if options.auxiliary_weight > 0 else None
    model = Segmenter(body, dim, num_classes, auxiliary_dim, options.dropout)
    if options.classifier_std is not None:
        model.draw_classifiers(options.classifier_std)
    if options.weights:
        loaded, path = read_checkpoint(Path(options.weights)), Path(options.weights)
        found = loaded.get("model", loaded.get("state_dict", loaded))
        load_weights(model, _checked(found, path), path)
    if options.backbone_weights:
        load_backbone(model.backbone, Path(options.backbone_weights))
    return model


def _smp_body(
    name: str, channels: int, pretrained: bool, dropout: float
) -> tuple[nn.Module, int, Sequence[int]]:
    """One of segmentation-models-pytorch's networks without its classifier; the channels of its
    features and of its backbone's maps."""
    architecture, _, encoder = name.partition(":")
    if name in SEGFORMERS:
        architecture, encoder = "segformer", SEGFORMERS[name]
    if not encoder:
        known = ", ".join([*HRNETS, *SEGFORMERS])
        raise ValueError(f"--model.network: expected {known} or ARCHITECTURE:ENCODER, got {name!r}")
    try:
        body: Any = smp.create_model(
            architecture,
            encoder_name=encoder,
            encoder_weights="imagenet" if pretrained else None,
            in_channels=channels,
            **_options(architecture, encoder, dropout),
        )
    except (KeyError, RuntimeError) as error:  # the second is timm's
        raise ValueError(f"--model.network {name}: {error}") from None
    head = body.segmentation_head
    *layers, classifier = head.head if architecture == "dpt" else [head[0]]
    body.segmentation_head = nn.Sequential(*layers)
    return body, int(classifier.in_channels), body.encoder.out_channels


def upsample_late(model: Segmenter, images: Tensor) -> None:
    """`late_upsampling`, where there is something to move."""
    with contextlib.suppress(ValueError):
        ao.late_upsampling(model, images)


def _options(architecture: str, encoder: str, dropout: float) -> dict[str, Any]:
    """Arguments of smp's networks. Those made for one image size accept other sizes too. Their own
    dropout is switched off if there is dropout before the classifier."""
    if architecture == "dpt":
        return {"dynamic_img_size": True}
    options: dict[str, Any] = {"strict_img_size": False} if encoder.startswith("tu-swin_") else {}
    if dropout and architecture in OWN_DROPOUT:
        options[OWN_DROPOUT[architecture]] = 0.0
    return options


def read_checkpoint(path: Path, needed: str | None = None) -> dict[str, Any]:
    """A file of weights or of the state of a run, whose tensors stay in the file. The network's
    weights of an earlier version are under "model", too. Raises ValueError if it is damaged or of
    another kind."""
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        weights = state.get("state_dict", {})  # those of an earlier version are also of the losses
        of_earlier_version = [x for x in weights if x.startswith(OLD_PREFIX)]
        if of_earlier_version:
            state["model"] = {x.removeprefix(OLD_PREFIX): weights[x] for x in of_earlier_version}
        found = needed is None or needed in state
    except Exception as error:
        raise ValueError(f"{path} is damaged ({shorten(repr(error), 200)})") from error
    if not found:
        raise ValueError(f"{path} is of another kind: it has no {needed}")
    return state


def trained_model(options: Model, path: Path, channels: int) -> Segmenter:
    """The network of a checkpoint without its methods. CBP has removed the classifier's bias."""
    weights = _checked(read_checkpoint(path, "model")["model"], path)
    if "classifier.weight" not in weights:
        raise ValueError(f"weights {path}: they have no classifier.weight")
    weight = weights["classifier.weight"]
    options = replace(options, pretrained=False, weights=None, backbone_weights=None)
    model = build_model(options, len(weight), channels)
    expected = model.classifier.weight.shape
    if weight.shape != expected:  # load_weights would leave it out
        raise ValueError(
            f"weights {path} are not those of this --model.network: expected classifier.weight of "
            f"shape {tuple(expected)}, got {tuple(weight.shape)}"
        )
    load_weights(model, {"classifier.bias": weight.new_zeros(len(weight)), **weights}, path)
    return model


def _checked(weights: Any, path: Path) -> Mapping[str, Tensor]:
    tensors = isinstance(weights, Mapping) and all(map(torch.is_tensor, weights.values()))
    if not tensors:
        raise ValueError(f"weights {path}: expected a state dict, got {type(weights).__name__}")
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Start from the weights of a file. Those of heads are left out that the model does not have,
    or has for another number of classes. Raises ValueError for weights of another network."""
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    taken = {
        name: x
        for name, x in weights.items()
        if not name.startswith(HEADS) or shapes.get(name) == x.shape
    }
    try:
        missing, unknown = model.load_state_dict(taken, strict=False)
        missing = [name for name in missing if not name.startswith(HEADS)]
        reason = f"missing {missing[:3]}, unknown {unknown[:3]}" if missing or unknown else ""
    except RuntimeError as error:  # of other shapes
        reason = str(error)
    if reason:
        raise ValueError(
            f"weights {path} are not those of this --model.network and these --data.channels: "
            f"{shorten(reason, 200)}"
        )


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Start a backbone from the weights in `path`, .pth or .safetensors, of any floating dtype.
    Their names are those of timm, or of an encoder of segmentation-models-pytorch, alone or in a
    whole network. What the backbone does not have, as a classifier, is not used; the number of
    batches that batch norm has seen may be missing. Says how many tensors were taken.

    Raises ValueError for a file that cannot be read, or of another network.
    """
    own = {_flat_name(name): name for name in backbone.state_dict()}
    try:
        loaded = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
        named = {own.get(_flat_name(name)): value for name, value in loaded.items()}
        taken = {name: value for name, value in named.items() if name is not None}
        # some encoders of smp have another load_state_dict
        missing, _ = nn.Module.load_state_dict(backbone, taken, strict=False)
    except Exception as error:
        reason = shorten(str(error), 300)
        raise ValueError(f"--model.backbone_weights: {path} cannot be loaded: {reason}") from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"--model.backbone_weights: {path} is of another network: {len(missing)} tensors of "
            f"the backbone are missing: {missing[:3]}"
        )
    unused = len(loaded) - len(taken)
    ranks.say(f"backbone: {len(taken)} tensors of {path} taken, {unused} not used")


def _flat_name(name: str) -> str:
    """What timm's name of a tensor, layers.0.x, has in common with that of a backbone that returns
    maps, layers_0.x, and with that of an encoder of smp, encoder.model.layers_0.x."""
    return name.removeprefix("encoder.").removeprefix("model.").replace(".", "_")

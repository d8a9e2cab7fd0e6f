"""Segmentation networks: a body that returns features (B, D, h, w), and a 1×1 convolution.

The heads of FCN, OCRNet and SegFormer are as in mmsegmentation: their input is the list of a
backbone's maps, the finest first; their output is the features before the last classifier.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao

HRNETS = {
    "hrnet-w18-small": "hrnet_w18_small",
    "hrnet-w18-small-v2": "hrnet_w18_small_v2",
    **{f"hrnet-w{width}": f"hrnet_w{width}" for width in (18, 30, 32, 40, 44, 48, 64)},
}
# the parts that depend on the classes; in a checkpoint, a method is under "regularizer"
HEADS = ("classifier.", "auxiliary.", "body.head.regions.", "regularizer.")
IN_CHECKPOINT = "learner.model."  # of the names of a network's weights in a checkpoint of Lightning
AUXILIARY_DIM = 256
# the heads of mmsegmentation, as ARCHITECTURE:BACKBONE
MMSEG = {f"mmseg-{head}": head for head in ("fcn", "ocrnet", "segformer")}
SEGFORMERS = {f"segformer-b{size}": f"mit_b{size}" for size in range(6)}


def conv_norm_relu(inputs: int, outputs: int, kernel: int = 1) -> nn.Sequential:
    """A convolution without bias that keeps the size, then batch norm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def at_first_size(maps: Sequence[Tensor]) -> Tensor:
    """(B, ΣC, H, W): the maps, resized to the size of the first one and concatenated."""
    size = maps[0].shape[2:]
    resized = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps[1:]]
    return torch.cat([maps[0], *resized], dim=1)


def _without_autocast() -> contextlib.AbstractContextManager[Any]:
    """CUDA's autocast would make the results of F.interpolate float32. Where it is disabled, there
    is no context for torch.export to record."""
    if torch.is_autocast_enabled("cuda"):
        return torch.autocast("cuda", enabled=False)
    return contextlib.nullcontext()


# Fewer channels are upsampled and mixed faster than the results of their convolution are upsampled
LEAST_CHANNELS = 64


def mixed(mix: nn.Sequential, maps: Sequence[Tensor]) -> Tensor:
    """mix(at_first_size(maps)), where mix begins with a 1×1 convolution without bias. Upsampling
    and a 1×1 convolution commute, so it runs at each map's own size:

        conv(cat(x_1, up(x_2), …, up(x_n))) = conv_1(x_1) + Σ_i up(conv_i(x_i))

    with conv_i the columns of the weight for the channels of x_i. Maps with few channels are
    upsampled first.
    """
    convolution, *others = mix
    assert isinstance(convolution, nn.Conv2d)
    few = sum(x.shape[1] < LEAST_CHANNELS for x in maps[1:])
    first, late = at_first_size(maps[: 1 + few]), maps[1 + few :]
    widths = [x.shape[1] for x in (first, *late)]
    weight, *weights = convolution.weight.split(widths, dim=1)
    result = F.conv2d(first, weight)
    for x, weight in zip(late, weights, strict=True):
        y = F.conv2d(x, weight)
        with _without_autocast():
            result += F.interpolate(y, result.shape[2:], mode="bilinear")
    for layer in others:
        result = layer(result)
    return result


class FCNHead(nn.Module):
    """Two 3×3 convolutions of the last map, and a third one of that map and their result
    (arXiv 1411.4038)."""

    dim = 512

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        last = channels[-1]
        self.convolutions = nn.Sequential(
            conv_norm_relu(last, self.dim, 3), conv_norm_relu(self.dim, self.dim, 3)
        )
        self.mix = conv_norm_relu(last + self.dim, self.dim, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        last = maps[-1]
        return self.mix(torch.cat([last, self.convolutions(last)], dim=1))


class SegFormerHead(nn.Module):
    """Every map is reduced to 256 channels and resized to the size of the first one; a 1×1
    convolution mixes them (arXiv 2105.15203). As in the papers' baselines, batch norm and ReLU
    follow each linear layer."""

    dim = 256

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(conv_norm_relu(width, self.dim) for width in channels)
        self.mix = conv_norm_relu(len(channels) * self.dim, self.dim)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        reduced = [linear(x) for linear, x in zip(self.linears, maps, strict=True)]
        return mixed(self.mix, reduced)


class SoftRegions(nn.Sequential):
    """The logits of OCRNet's regions. In training they have their own loss."""

    def __init__(self, inputs: int, hidden: int, kernel: int, dropout: float, num_classes: int):
        super().__init__(
            conv_norm_relu(inputs, hidden, kernel),
            nn.Dropout2d(dropout) if dropout else nn.Identity(),
            nn.Conv2d(hidden, num_classes, 1),
        )
        self._logits: Tensor | None = None

    def forward(self, maps: Tensor) -> Tensor:
        logits = super().forward(maps)
        self._logits = logits if self.training else None
        return logits

    def logits(self) -> Tensor:
        """The logits (B, K, h, w) of the last training forward; they can be read once."""
        kept, self._logits = self._logits, None
        assert kept is not None, "the model has not run in training mode"
        return kept


class OCRHead(nn.Module):
    """Object-contextual representations (arXiv 1909.11065): each pixel attends to the classes'
    soft regions.

    joined: whether regions and pixels are computed from all maps, resized to the size of the first
    one (as for HRNet). Otherwise the regions are computed from the second last map, and the pixels
    from the last one (as for ResNet).
    """

    dim, inner_dim = 512, 256

    def __init__(self, channels: Sequence[int], num_classes: int, *, joined: bool) -> None:
        super().__init__()
        self.joined, dim, inner = joined, self.dim, self.inner_dim
        if joined:
            inputs = sum(channels)
            self.regions = SoftRegions(inputs, inputs, 1, 0.0, num_classes)
        else:
            inputs = channels[-1]
            self.regions = SoftRegions(channels[-2], 256, 3, 0.1, num_classes)
        self.pixels = conv_norm_relu(inputs, dim, 3)
        self.query = nn.Sequential(conv_norm_relu(dim, inner), conv_norm_relu(inner, inner))
        self.key = nn.Sequential(conv_norm_relu(dim, inner), conv_norm_relu(inner, inner))
        self.value = conv_norm_relu(dim, inner)
        self.context = conv_norm_relu(inner, dim)
        self.mix = conv_norm_relu(2 * dim, dim)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        last = at_first_size(maps) if self.joined else maps[-1]
        pixels = self.pixels(last)  # (B, D, h, w)
        logits = self.regions(last if self.joined else maps[-2])  # (B, K, h, w)
        shares = logits.flatten(2).softmax(2)  # of the pixels in each region
        regions = (pixels.flatten(2) @ shares.transpose(1, 2))[..., None]  # (B, D, K, 1)
        query, key, value = (
            x.flatten(2).transpose(1, 2)
            for x in (self.query(pixels), self.key(regions), self.value(regions))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        context = self.context(attended.reshape(len(pixels), -1, *pixels.shape[2:]))
        return self.mix(torch.cat([context, pixels], dim=1))


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
    def auxiliary_head(self) -> "AuxiliaryHead | SoftRegions | None":
        """The part of the model that has its own loss: the auxiliary head, or OCRNet's regions."""
        head = getattr(self.body, "head", None)
        return head.regions if isinstance(head, OCRHead) else self.auxiliary

    @property
    def backbone(self) -> nn.Module:
        """The backbone: HRNet, or the encoder of a segmentation-models-pytorch architecture."""
        body = self.body
        return body.backbone if hasattr(body, "backbone") else body.encoder  # pyright: ignore

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.body(images)))

    def draw_classifiers(self, std: float) -> None:
        """Give the classifiers, the auxiliary one too, weights from N(0, std²) and biases of 0."""
        head = self.auxiliary_head
        for classifier in (self.classifier, *([] if head is None else [head[-1]])):
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
        self.backbone, self.out_channels = _backbone(name, channels, pretrained)
        self.dim = sum(self.out_channels)
        self.mix = conv_norm_relu(self.dim, self.dim)

    def forward(self, images: Tensor) -> Tensor:
        return mixed(self.mix, self.backbone(images))


class HeadedBody(nn.Module):
    """A backbone with one of mmsegmentation's heads; ResNets are dilated, to stride 8."""

    def __init__(
        self, head: str, backbone: str, num_classes: int, channels: int, pretrained: bool
    ) -> None:
        super().__init__()
        self.backbone, self.out_channels = _backbone(backbone, channels, pretrained)
        if head == "ocrnet":
            joined = backbone in HRNETS
            self.head = OCRHead(self.out_channels, num_classes, joined=joined)
        else:
            self.head = {"fcn": FCNHead, "segformer": SegFormerHead}[head](self.out_channels)
        self.dim = self.head.dim

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-4:])  # smp's encoders begin with the images


def _backbone(name: str, channels: int, pretrained: bool) -> tuple[nn.Module, list[int]]:
    """A backbone and the channels of its four maps, finest first: HRNet, SegFormer's mit_b0 to
    mit_b5, or tu-NAME of timm."""
    if name.startswith("mit_"):
        if name not in SEGFORMERS.values():
            raise ValueError(f"model: backbone: expected mit_b0 to mit_b5, got {name!r}")
        weights = "imagenet" if pretrained else None
        encoder = smp.encoders.get_encoder(name, in_channels=channels, weights=weights)
        return encoder, list(encoder.out_channels[-4:])
    options: dict[str, Any] = {"output_stride": 8}
    if name in HRNETS:
        name, options = HRNETS[name], {"feature_location": ""}
    try:
        backbone = timm.create_model(
            name.removeprefix("tu-"),
            pretrained=pretrained,
            in_chans=channels,
            features_only=True,
            out_indices=(1, 2, 3, 4),
            **options,
        )
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"model: backbone {name!r}: {error}") from None
    return backbone, backbone.feature_info.channels()  # pyright: ignore


def build_model(
    name: str,
    num_classes: int,
    *,
    channels: int = 3,
    pretrained: bool = False,
    weights: Path | None = None,
    auxiliary: bool = False,
    dropout: float = 0.0,
    classifier_std: float | None = None,
) -> Segmenter:
    """A network by name.

    Args:
        name: "hrnet-w18-small", "hrnet-w18", "hrnet-w48", …, "segformer-b0" to "segformer-b5", or
            ARCHITECTURE:ENCODER of segmentation-models-pytorch, for example "unet:resnet34". With
            mmsegmentation's heads: "mmseg-fcn:BACKBONE", "mmseg-ocrnet:BACKBONE" and
            "mmseg-segformer:BACKBONE", of an HRNet, of mit_b0 to mit_b5, or of tu-NAME of timm.
        num_classes, channels: the number of classes, and of channels of the images.
        pretrained: start the backbone from ImageNet weights; they are downloaded.
        weights: a checkpoint of this program, or any file of a state dict, to start from. Entries
            of a classifier are skipped if the number of classes differs.
        auxiliary: add an auxiliary head.
        dropout: share of the channels that are dropped before the classifier in training; it
            replaces DeepLab's own dropout.
        classifier_std: of the classifiers' initial weights, with biases of 0; None: torch's.

    Raises ValueError for an unknown name, for weights that do not match, for an auxiliary head on
    DPT, whose backbone has no such map, and for OCRNet without an auxiliary head, because the loss
    of its regions has the same weight.
    """
    architecture, _, backbone = name.partition(":")
    regions = architecture == "mmseg-ocrnet"
    if regions and not auxiliary:
        raise ValueError(
            f"--model.auxiliary_weight: expected more than 0, for by it {name} learns its regions; "
            "mmsegmentation's is 0.4"
        )
    if auxiliary and architecture == "dpt":
        raise ValueError(f"--model.auxiliary_weight: expected 0, {name} has no map for such a head")
    if name in HRNETS:
        body = HRNetBody(name, channels, pretrained)
        dim, stages = body.dim, body.out_channels
    elif architecture in MMSEG:
        body = HeadedBody(MMSEG[architecture], backbone, num_classes, channels, pretrained)
        dim, stages = body.dim, body.out_channels
    else:
        body, dim, stages = _smp_body(name, channels, pretrained, dropout)
    auxiliary_dim = stages[-2] if auxiliary and not regions else None
    model = Segmenter(body, dim, num_classes, auxiliary_dim, dropout)
    if classifier_std is not None:
        model.draw_classifiers(classifier_std)
    if weights:
        load_weights(model, weights)
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
        raise ValueError(f"model: expected {known} or ARCHITECTURE:ENCODER, got {name!r}")
    try:
        body: Any = smp.create_model(
            architecture,
            encoder_name=encoder,
            encoder_weights="imagenet" if pretrained else None,
            in_channels=channels,
            **_options(architecture, encoder, dropout),
        )
    except KeyError as error:
        raise ValueError(f"model {name!r}: {error}") from None
    head = body.segmentation_head
    *layers, classifier = head.head if architecture == "dpt" else [head[0]]
    body.segmentation_head = nn.Sequential(*layers)
    return body, int(classifier.in_channels), body.encoder.out_channels


def upsample_late(model: Segmenter, images: Tensor) -> None:
    """`late_upsampling` of one of segmentation-models-pytorch's networks, where there is something
    to move. The other networks here are written so themselves (`mixed`)."""
    if not isinstance(model.body, HRNetBody | HeadedBody):
        with contextlib.suppress(ValueError):
            ao.late_upsampling(model, images)


def _options(architecture: str, encoder: str, dropout: float) -> dict[str, Any]:
    """Arguments of smp's networks. Those made for one image size accept other sizes too. DeepLab's
    own dropout is switched off if there is dropout before the classifier."""
    if architecture == "dpt":
        return {"dynamic_img_size": True}
    if dropout and architecture.startswith("deeplab"):
        return {"decoder_aspp_dropout": 0.0}
    return {"strict_img_size": False} if encoder.startswith("tu-swin_") else {}


def load_weights(model: nn.Module, path: Path) -> None:
    """Start from the weights in `path`; see build_model."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("model", "state_dict"):
            state = state.get(key, state) if isinstance(state, dict) else state
        if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
            raise ValueError(f"expected tensors by name, got a {type(state).__name__}")
        state = {key.removeprefix(IN_CHECKPOINT): value for key, value in state.items()}
    except FileNotFoundError:
        raise ValueError(f"weights {path} do not exist") from None
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"weights {path} cannot be read: {reason}") from error
    model_state = model.state_dict()
    state = {
        key: value
        for key, value in state.items()
        if not key.startswith(HEADS)
        or (key in model_state and model_state[key].shape == value.shape)
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

"""Segmentation networks: a body that returns features (B, D, h, w), and a 1×1 convolution. With its
losses a network is one module, which DDP wraps and torch.compile compiles."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

import anchorops as ao

from ..losses import MomentsLoss, Regularizer
from . import IGNORED, MULTIPLE
from .options import CLASSES, Model, expect

# the parts that depend on the classes; in a checkpoint, a method is under "regularizer"
HEADS = ("classifier.", "auxiliary.", "regularizer.")
Moments = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel
FROZEN = "frozen.ckpt"  # beside the states of a run: the weights of a backbone that stays as it is
AUXILIARY_DIM = 256
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Segmenter(nn.Module):
    """Computes logits (B, K, H/s, W/s) of images (B, C, H, W); s is the stride of the body
    (usually 4).

    The methods use the input of its classifier. If auxiliary_dim is given, the number of channels
    of the backbone's second last map, there is an auxiliary head on this map, in training:
    mmsegmentation's FCNHead with one convolution. dropout: share of the channels that are dropped
    before the classifier in training. frozen: the backbone stays in evaluation mode, without
    gradients, and is no part of the state.
    """

    def __init__(
        self,
        body: nn.Module,
        dim: int,
        num_classes: int,
        auxiliary_dim: int | None = None,
        dropout: float = 0.0,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.body = body
        self.backbone_name = "body.backbone" if hasattr(body, "backbone") else "body.encoder"
        self.multiple: int = getattr(body, "multiple", MULTIPLE)  # image sides are multiples of it
        self.moments: Moments | None = getattr(body, "moments", None)
        self.frozen = frozen
        if frozen:
            self.backbone.requires_grad_(False).eval()
            self.register_state_dict_post_hook(_leave_backbone_out)
            self.register_load_state_dict_pre_hook(_keep_backbone)
        self.dropout = nn.Dropout2d(dropout) if dropout else nn.Identity()
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        self.auxiliary: nn.Sequential | None = None
        self._map: Tensor | None = None  # of the backbone, for the auxiliary head
        self.left_out: Sequence[str] = ()  # tensors of the file of weights from which it starts
        if auxiliary_dim is not None:
            self.auxiliary = nn.Sequential(
                *Conv2dNormActivation(auxiliary_dim, AUXILIARY_DIM, 3, inplace=False),
                nn.Dropout2d(0.1),
                nn.Conv2d(AUXILIARY_DIM, num_classes, 1),
            )
            self.backbone.register_forward_hook(self._keep)

    @property
    def backbone(self) -> nn.Module:
        """The backbone: HRNet, or the encoder of a segmentation-models-pytorch architecture."""
        return self.get_submodule(self.backbone_name)

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.body(images)))

    def _keep(self, backbone: nn.Module, images: tuple[Tensor], maps: Sequence[Tensor]) -> None:
        self._map = maps[-2] if self.training else None

    def auxiliary_logits(self) -> Tensor | None:
        """Those (B, K, h, w) of the last forward in training, which can be read once; None if there
        is no auxiliary head."""
        kept, self._map = self._map, None
        return None if self.auxiliary is None else self.auxiliary(kept)


def _leave_backbone_out(model: Any, state: dict[str, Any], prefix: str, _: object) -> None:
    for name in [x for x in state if x.startswith(f"{prefix}{model.backbone_name}.")]:
        del state[name]


def _keep_backbone(model: Any, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Its own weights, where a state does not have them."""
    for name, x in model.backbone.state_dict().items():
        state.setdefault(f"{prefix}{model.backbone_name}.{name}", x)


class ProbeBody(nn.Module):
    """Maps of a frozen backbone of timm, after its last norm: upsampled to the size of the first
    one, joined, and normalised by batch norm, whose weights would add nothing before a convolution.
    `multiple`: image sides are multiples of it. `moments`: the mean and standard deviation of the
    images with which it was trained, in values of 8 bits, for 3 channels."""

    def __init__(self, name: str, channels: int, pretrained: bool, levels: Sequence[int]) -> None:
        super().__init__()
        common: dict[str, Any] = {"pretrained": pretrained, "in_chans": channels, "num_classes": 0}
        self.backbone: Any
        # of networks with positions, and of those with windows; others take any size, or one alone
        any_size: list[dict[str, Any]] = [{"dynamic_img_size": True}, {"strict_img_size": False}]
        for options in any_size:
            with suppress(TypeError):  # for an argument that a network does not have
                self.backbone = timm.create_model(name, **common, **options)
                break
        else:
            self.backbone = timm.create_model(name, **common)
        known = self.backbone.feature_info
        fits = all(-len(known) <= level < len(known) for level in levels)
        expect(fits, "--model.probe_levels", f"those of {len(known)}", levels)
        self.levels = sorted({level % len(known) for level in levels})
        self.multiple = max(known[level]["reduction"] for level in self.levels)
        self.norm = nn.BatchNorm2d(sum(known[i]["num_chs"] for i in self.levels), affine=False)
        of_training = (self.backbone.pretrained_cfg[x] for x in ("mean", "std"))
        mean, std = ([255 * x for x in values] for values in of_training)
        self.moments = (mean, std) if channels == 3 else None

    def forward(self, images: Tensor) -> Tensor:
        first, *others = self.backbone.forward_intermediates(
            images, self.levels, norm=True, stop_early=True, intermediates_only=True
        )
        return self.norm(_joined(first, others))


def _joined(first: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Maps, upsampled to the size of the first one."""
    size = first.shape[2:]
    resized = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in others]
    return torch.cat([first, *resized], dim=1)


class HRNetBody(nn.Module):
    """HRNetV2 (arXiv 1908.07919): the four resolutions are upsampled to stride 4 and mixed by a
    1×1 convolution; D is the sum of their channels, 720 for W48."""

    def __init__(self, name: str, channels: int, pretrained: bool) -> None:
        super().__init__()
        self.backbone: Any = timm.create_model(
            name,
            pretrained=pretrained,
            in_chans=channels,
            features_only=True,
            out_indices=(1, 2, 3, 4),
            feature_location="",
        )
        dim = sum(self.backbone.feature_info.channels())
        self.mix = Conv2dNormActivation(dim, dim, 1, inplace=False)

    def forward(self, images: Tensor) -> Tensor:
        first, *others = self.backbone(images)
        return self.mix(_joined(first, others))


def build_model(options: Model, num_classes: int, channels: int = 3) -> Segmenter:
    """The network. channels: of the images. The file of weights may be a checkpoint of this
    program, or any file of a state dict. Raises ValueError for an unknown name, and for weights
    that do not match."""
    try:
        body, dim, stages = _body(options, channels)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:  # of smp, of timm
        raise ValueError(f"--model.network {options.network}: {error}") from None
    auxiliary_dim = stages[-2] if options.auxiliary_weight > 0 else None
    model = Segmenter(body, dim, num_classes, auxiliary_dim, options.dropout, options.frozen)
    if options.classifier_std is not None:
        auxiliary: list[Any] = [] if model.auxiliary is None else [model.auxiliary[-1]]
        for classifier in [model.classifier, *auxiliary]:
            nn.init.normal_(classifier.weight, std=options.classifier_std)
            nn.init.zeros_(classifier.bias)
    if options.weights:
        weights = read_weights(options.weights)
        model.left_out = load_trained(model, weights, options.weights, HEADS)
    if options.backbone_weights:
        load_backbone(model, options.backbone_weights)
    return model


def load_backbone(model: Segmenter, path: Path | str) -> None:
    """From a file with the names of timm or smp, or from that of a frozen backbone."""
    loaded = {_flat_name(name): x for name, x in read_weights(path).items()}
    names = {_flat_name(name): name for name in model.backbone.state_dict()}
    used = {names[flat]: x for flat, x in loaded.items() if flat in names}
    load_weights(model.backbone, used, path)


def load_trained(
    model: Segmenter, weights: Mapping[str, Tensor], path: Path | str, heads: tuple[str, ...]
) -> list[str]:
    """As `load_weights`; the backbone from the file beside `path`, if it was frozen."""
    frozen, prefix = Path(path).with_name(FROZEN), f"{model.backbone_name}."
    if not any(name.startswith(prefix) for name in weights):
        exists = frozen.exists() or not model.frozen
        expect(exists, path, f"{FROZEN} beside it, of its backbone", "no such file")
        if frozen.exists():
            weights = {prefix + name: x for name, x in read_weights(frozen).items()} | {**weights}
    return load_weights(model, weights, path, heads)


def _body(options: Model, channels: int) -> tuple[nn.Module, int, Sequence[int]]:
    """HRNet, or a network of segmentation-models-pytorch without its classifier; the channels of
    its features and of its backbone's maps. Those made for one image size accept other sizes too.
    The own dropout of a decoder is off if there is dropout before the classifier."""
    pretrained = options.pretrained and not (options.weights or options.backbone_weights)
    if options.probe is not None:
        body: Any = ProbeBody(options.probe, channels, pretrained, options.probe_levels)
        return body, body.norm.num_features, ()
    if options.network.startswith("hrnet-"):
        body = HRNetBody(options.network.replace("-", "_"), channels, pretrained)
        stages = body.backbone.feature_info.channels()
        return body, sum(stages), stages
    name = options.network.replace("segformer-", "segformer:mit_")
    architecture, _, encoder = name.partition(":")
    any_size = {"dynamic_img_size": True} if architecture == "dpt" else {}
    if encoder.startswith("tu-swin_"):
        any_size = {"strict_img_size": False}
    weights = "imagenet" if pretrained else None
    body = smp.create_model(architecture, encoder, weights, channels, **any_size)
    for layer in body.decoder.modules() if options.dropout else ():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0
    head = body.segmentation_head
    *layers, classifier = head.head if architecture == "dpt" else [head[0]]
    body.segmentation_head = nn.Sequential(*layers)
    return body, classifier.in_channels, body.encoder.out_channels


def read_checkpoint(path: Path, needed: str) -> dict[str, Any]:
    """The state of a run, whose tensors stay in the file. Raises ValueError if it is damaged or of
    another kind."""
    try:
        check_content(path)
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged ({shorten(repr(error), 200)})") from error
    if needed not in state:
        raise ValueError(f"{path} is of another kind: it has no {needed}")
    return state


def check_content(path: Path | str) -> None:
    """Raises BadZipFile for a file of torch.save with another content than was written: it has
    checksums, which torch.load does not read, nor does torch have to write them (they are 0)."""
    with ZipFile(path) as file:
        if any(x.CRC for x in file.infolist()) and (name := file.testzip()):
            raise BadZipFile(f"wrong checksum of {name}")


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Those in a checkpoint of this program, or in another file of a state dict. Raises ValueError
    if there is none, or if it is damaged, which is found by the checksums of zip files."""
    if not Path(path).is_file():
        why = "" if Path(path).name == FROZEN else ": a run has its best weights after a validation"
        raise ValueError(f"{path} does not exist{why}")
    try:
        if is_zipfile(path):
            check_content(path)
        # weights_only, because earlier versions of timm run what a file says
        return timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged ({shorten(repr(error), 200)})") from error


def trained_model(options: Model, path: Path, channels: int) -> Segmenter:
    """The network of a checkpoint without its methods. CBP has removed the classifier's bias."""
    weights = read_weights(path)
    if "classifier.weight" not in weights:
        raise ValueError(f"weights {path}: they have no classifier.weight")
    classes = len(weights["classifier.weight"])
    options = replace(options, pretrained=False, weights=None, backbone_weights=None)
    model = build_model(options, classes, channels)
    load_trained(model, {"classifier.bias": torch.zeros(classes), **weights}, path, HEADS[1:])
    return model


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    path: Path | str,
    heads: tuple[str, ...] = (),
) -> list[str]:
    """Start from weights, of any floating dtype. Those of these heads are left out that the module
    does not have, or has for another number of classes: their names are returned. torch adds the
    number of batches that batch norm has seen, if it is missing. Raises ValueError for weights of
    another network, from the file `path`."""
    own = module.state_dict()
    left_out = [
        name
        for name, x in weights.items()
        if name.startswith(heads) and (name not in own or own[name].shape != x.shape)
    ]
    taken = {name: x for name, x in own.items() if name.startswith(heads)}
    taken |= {name: x for name, x in weights.items() if name not in left_out}
    try:  # some encoders of smp have another load_state_dict
        nn.Module.load_state_dict(module, taken)
    except RuntimeError as error:
        reasons = "; ".join(shorten(line, 200) for line in str(error).splitlines()[1:4])
        raise ValueError(
            f"weights {path} are not those of this --model.network and these --data.channels: "
            f"{reasons}"
        ) from None
    return left_out


def _flat_name(name: str) -> str:
    """What timm's name of a tensor, layers.0.x, has in common with that of a backbone that returns
    maps, layers_0.x, and with that of an encoder of smp, encoder.model.layers_0.x."""
    return name.removeprefix("encoder.").removeprefix("model.").replace(".", "_")


def class_weights(options: Model, num_classes: int, frequencies: Tensor | None) -> Tensor | None:
    """float32 [K], or None without weights, and for `balanced` before the data are read.
    frequencies: [K], shares of the training pixels. Raises ValueError for another number of them.
    """
    weights = options.class_weights
    if isinstance(weights, str):
        if frequencies is None:
            return None
        occurs = frequencies > 0
        return torch.where(occurs, 1 / (occurs.sum() * frequencies), 0)
    if weights is None:
        return None
    expect(len(weights) == num_classes, "--model.class_weights", f"{num_classes} numbers", weights)
    return torch.tensor(weights, dtype=torch.float32)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """That of --precision: of the forward passes in training, evaluation and prediction."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def build_loss(options: Model, weights: Tensor | None = None) -> MomentsLoss:
    """The loss of the logits; its `terms` contain the accuracy. weights: [K], of the classes."""
    common: dict[str, Any] = {"ignore_index": IGNORED, "accuracy": True}
    dice = ao.Dice(**common)
    if options.loss == "dice":
        return dice
    cross_entropy = ao.CrossEntropy(
        weights,
        label_smoothing=options.label_smoothing,
        focal_gamma=options.focal_gamma if options.loss == "focal" else 0.0,
        ohem_threshold=options.ohem_threshold,
        ohem_min_kept=options.ohem_min_kept,
        **common,
    )
    return ao.CrossEntropyDice(cross_entropy, dice) if options.loss == "ce+dice" else cross_entropy


def build_regularizer(
    options: Model, num_classes: int, dim: int, prior: Tensor | None = None
) -> Regularizer | None:
    """The methods as one regulariser, or None if there are none. Their arguments are those of the
    preset and the options, which override them.

    prior: [K], the share of the training images that contain each class, for CeCo.
    Raises ValueError for an option that no chosen method has.
    """
    paper, given = options.paper_options or {}, options.method_options or {}
    for name in given:
        among = f"METHOD.ARGUMENT with a METHOD among --model.methods {options.methods}"
        expect(name.partition(".")[0] in options.methods, "--model.method_options", among, name)
    chosen = {"cr.embed": False, "ceco.prior": prior, **paper, **given}
    regularizers = []
    for method in options.methods:
        prefix = f"{method}."
        own = {name: x for name, x in chosen.items() if name.startswith(prefix)}
        arguments = {"ignore_index": IGNORED} | {x.removeprefix(prefix): own[x] for x in own}
        try:
            regularizers.append(getattr(ao, CLASSES[method])(num_classes, dim, **arguments))
        except (ValueError, TypeError) as error:
            raise ValueError(f"--model.method_options {method}: {error}") from error
    return ao.Combined(*regularizers) if len(regularizers) > 1 else next(iter(regularizers), None)


class Learner(nn.Module):
    """The network with its methods. Computes the loss and its parts from images and labels. If the
    network has an auxiliary head, the same loss of its logits is added, times auxiliary_weight."""

    def __init__(
        self,
        options: Model,
        num_classes: int,
        channels: int = 3,
        prior: Tensor | None = None,
        frequencies: Tensor | None = None,
    ) -> None:
        """prior, frequencies: [K], of the training images and pixels; None before they are read."""
        super().__init__()
        self.model = build_model(options, num_classes, channels)
        self.pixel_loss = build_loss(options, class_weights(options, num_classes, frequencies))
        self.auxiliary_weight = options.auxiliary_weight
        dim = self.model.classifier.in_channels
        regularizer = build_regularizer(options, num_classes, dim, prior)
        self.attachment = None if regularizer is None else ao.attach(self.model, regularizer)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.pixel_loss(self.model(images), labels)
        terms = dict(self.pixel_loss.terms)
        if (logits := self.model.auxiliary_logits()) is not None:
            auxiliary = self.auxiliary_weight * self.pixel_loss(logits, labels)
            loss = loss + auxiliary
            terms["auxiliary"] = auxiliary.detach()
        if self.attachment is not None:
            loss = loss + self.attachment(labels)
            terms |= self.attachment.terms
        return loss, {"loss": loss.detach(), **terms}


def build_optimizer(options: Model, model: Segmenter, precision: str) -> torch.optim.Optimizer:
    """No weight decay on vectors (biases, normalisation), and another learning rate for everything
    outside the backbone and the methods."""
    methods = [module for module in model.modules() if isinstance(module, Regularizer)]
    others = {x for module in (model.backbone, *methods) for x in module.parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = options.lr * (1.0 if parameter in others else options.head_lr_factor)
            # a plain float, because the state is loaded with weights_only
            decay = float(options.weight_decay) if parameter.dim() > 1 else 0.0
            settings = {"params": [], "lr": rate, "peak": rate, "weight_decay": decay}
            groups.setdefault((rate, decay), settings)["params"].append(parameter)
    if options.optimizer == "sgd":
        # a fused one allocates its momentum in the first step, and does not fill it if the scaler
        # of float16 skips this step
        return torch.optim.SGD(groups.values(), momentum=0.9, fused=precision != "fp16")
    return torch.optim.AdamW(groups.values(), fused=True)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, options: Model, step: int, steps: int
) -> float:
    """Linear warm-up, then polynomial decay to zero; step: the number of steps before. Returns the
    rate of the first group."""
    warmup = min(1.0, (step + 1) / max(1, options.warmup))
    factor = warmup * max(0.0, 1 - step / steps) ** options.power
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return optimizer.param_groups[0]["lr"]

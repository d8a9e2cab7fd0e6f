"""The networks whose training steps are counted or measured, and how their users train them."""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from record import BASELINE, STEP_NAMES
from torch import Tensor, nn

import anchorops as ao
from anchorops.losses import Regularizer

IGNORE_INDEX = 255
METHODS = ("CR", *ao.losses.METHODS, "CBP + OCCL")


def names_of(method: str) -> list[str]:
    """Those of the training program."""
    return method.lower().split(" + ")


class Candidate(NamedTuple):
    """How a network is trained. ours: with our cross-entropy. late: with late_upsampling. method:
    of METHODS, or "" for none. compiled: with torch.compile. checkpointing: of activations."""

    ours: bool
    late: bool
    method: str = ""
    compiled: bool = False
    checkpointing: bool = False

    @property
    def name(self) -> str:
        if self.method:
            return f"{self.method}, {'both' if self.late else 'ours'}"
        name = STEP_NAMES[self.ours, self.late]
        if self.compiled:
            return f"{'baseline' if name == BASELINE else name}, torch.compile"
        return name


def candidates(late: bool, methods: Iterable[str] = ()) -> list[Candidate]:
    """The baseline first. late: late_upsampling finds something to move; methods are with it."""
    every = [
        Candidate(ours, moved) for moved in (False, True)[: 1 + late] for ours in (False, True)
    ]
    return [*every, *(Candidate(True, late, method) for method in methods)]


class Network(NamedTuple):
    """A network, its batch, and how its users train it.

    make, small: of the number of classes, the network and a small relative for a dry run. dim: of
    the features before the classifier. blocks: the classes whose outputs are computed again
    with activation checkpointing. channels: of the images. upsamples: forward upsamples the logits.
    weights: of the loss of each of its outputs. channels_last: the layout when it is measured.
    stride: the labels' size divided by that of the images; above 1 they are the cached features of
    a frozen backbone.
    """

    name: str
    make: Callable[[int], nn.Module]
    size: tuple[int, ...]
    batch: int
    num_classes: int
    dim: int = 0
    blocks: tuple[str, ...] = ()
    channels: int = 3
    upsamples: bool = False
    weights: tuple[float, ...] = (1.0,)
    channels_last: bool = True
    small: Callable[[int], nn.Module] | None = None
    stride: int = 1

    def build(self) -> nn.Module:
        return self.make(self.num_classes)

    def tiny(self) -> "Network":
        """For a dry run, which only tests the code."""
        side = 16 if self.volumes else 64
        return self._replace(make=self.small or self.make, size=(side,) * len(self.size), batch=2)

    @property
    def volumes(self) -> bool:
        return len(self.size) == 3

    def shape(self, batch: int) -> tuple[int, ...]:
        """Of a batch of images."""
        return batch, self.channels, *(n // self.stride for n in self.size)

    def images(self, device: torch.device | str = "meta") -> Tensor:
        """A batch of two images."""
        return torch.zeros(self.shape(2), device=device)

    def runs_later(self, model: nn.Module) -> bool:
        """Whether late_upsampling finds something to move. This depends on the model's device;
        "meta" is as a GPU."""
        device = next(model.parameters()).device
        try:
            ao.late_upsampling(copy.deepcopy(model), self.images(device))
        except ValueError:
            return False
        return True

    def arrange(self, model: nn.Module, images: Tensor, candidate: Candidate) -> None:
        """Remove the last upsampling, if the loss is ours, and let an earlier one run later."""
        if self.upsamples and candidate.ours:
            ao.low_resolution(model, images)
        if candidate.late:
            ao.late_upsampling(model, images)

    def regularizer(self, method: str) -> Regularizer:
        """With the options of its paper."""
        from anchorops.train.networks import build_regularizer
        from anchorops.train.options import Model

        names: Any = names_of(method)
        given: Any = {f"{name}.ignore_index": IGNORE_INDEX for name in names}
        options = Model(methods=names, method_options=given)
        regularizer = build_regularizer(options, self.num_classes, self.dim)
        assert regularizer is not None
        return regularizer

    def outputs(self, model: nn.Module, images: Tensor, low: bool) -> Sequence[Tensor]:
        """Logits of all heads; low: at their own resolution."""
        if self.volumes:
            if not low:
                return model(images).unbind(1)
            unet: Any = model
            return [unet.output_block(unet.skip_layers(images)), *unet.heads]
        output = model(images)
        if isinstance(output, Tensor):
            return [output]
        if "logits" in output:
            return [output["logits"]]
        return list(output.values())

    def loss(self, outputs: Sequence[Tensor], labels: Tensor, ours: bool) -> Tensor:
        """Of the logits of all heads."""
        loss_of = our_loss if ours else plain_loss
        weighted = zip(self.weights, outputs, strict=True)
        return torch.stack([weight * loss_of(logits, labels) for weight, logits in weighted]).sum()

    def __str__(self) -> str:
        return f"{self.name} {'×'.join(map(str, self.size))} batch {self.batch} K{self.num_classes}"


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[2:] != labels.shape[1:]:
        mode = "bilinear" if labels.dim() == 3 else "trilinear"
        logits = F.interpolate(logits, labels.shape[1:], mode=mode, align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)


def our_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return ao.pixel_cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)


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


def upernet(num_classes: int) -> nn.Module:
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages: dict[str, Any] = {"out_features": [f"stage{i}" for i in range(1, 5)]}
    backbone = SwinConfig(**stages)  # its defaults are Swin-T
    options: dict[str, Any] = {"use_auxiliary_head": False, "num_labels": num_classes}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **options))


def deeplab(num_classes: int) -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_resnet101

    return deeplabv3_resnet101(weights_backbone=None, num_classes=num_classes, aux_loss=True)


def of_smp(architecture: str, encoder: str, num_classes: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    make = getattr(smp, architecture)
    return make(encoder, encoder_weights=None, classes=num_classes)


def unet_of_volumes(num_classes: int, levels: int = 6) -> nn.Module:
    from monai.networks.nets.dynunet import DynUNet

    strides = [1, *[2] * (levels - 1)]
    return DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=num_classes,
        kernel_size=[3] * levels,
        strides=strides,
        upsample_kernel_size=strides[1:],
        deep_supervision=True,
        deep_supr_num=2,
    )


class Probe(nn.Module):
    """1×1 convolutions of cached features (B, 768, h, w), which share a batch norm."""

    def __init__(self, heads: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(768, affine=False)
        self.heads = nn.ModuleList(nn.Conv2d(768, num_classes, 1) for _ in range(heads))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        x = self.norm(features)
        return {f"head {i}": head(x) for i, head in enumerate(self.heads)}


def of_training_program(name: str, num_classes: int) -> nn.Module:
    from anchorops.train.networks import build_model
    from anchorops.train.options import Model

    return build_model(Model(name), num_classes)


segformer_b0 = partial(segformer, 0)
small_hrnet = partial(of_training_program, "hrnet-w18-small")
BASIC, BOTTLENECK = "BasicBlock", "Bottleneck"
DEEPLAB = {"dim": 256, "blocks": (BOTTLENECK,), "upsamples": True, "weights": (1.0, 0.5)}
SEGFORMER_B0 = Network("SegFormer-B0", segformer_b0, (512, 512), 16, 150)
SEGFORMER_B5 = Network(
    *("SegFormer-B5", partial(segformer, 5), (512, 512), 16, 150, 768),
    blocks=("SegformerLayer",),
    small=segformer_b0,
)
HRNET_W48 = Network(
    *("HRNet-W48", partial(of_training_program, "hrnet-w48"), (512, 1024), 8, 19, 720),
    blocks=(BASIC, BOTTLENECK),
    small=small_hrnet,
)
VOLUMES = Network(
    *("3-D U-Net", unet_of_volumes, (128, 128, 128), 2, 14, 32),
    blocks=("UnetBasicBlock",),
    channels=1,
    weights=(1.0, 0.5, 0.25),
    channels_last=False,
    small=partial(unet_of_volumes, levels=4),
)
COUNTED = (
    SEGFORMER_B5,
    Network(
        *("UperNet-Swin-T", upernet, (512, 512), 16, 150, 512),
        blocks=("SwinLayer",),
        upsamples=True,
    ),
    HRNET_W48,
    Network(
        *("PSPNet-R101", partial(of_smp, "PSPNet", "resnet101"), (512, 512), 16, 150, 512),
        blocks=(BOTTLENECK,),
        upsamples=True,
    ),
    Network("DeepLabV3-R101", deeplab, (769, 769), 8, 19, **DEEPLAB),
    Network("DeepLabV3-R101", deeplab, (513, 513), 16, 21, **DEEPLAB),
    VOLUMES,
)
UNET = Network("U-Net-R34", partial(of_smp, "Unet", "resnet34"), (512, 512), 16, 20)
ON_GPU = (SEGFORMER_B0, UNET, SEGFORMER_B5, VOLUMES, HRNET_W48)


def probe(name: str, num_classes: int, batch: int, heads: int) -> Network:
    """Heads of several learning rates on the features of a ViT-B/16."""
    named = name if heads == 1 else f"{name}, {heads} heads"
    return Network(
        *(f"linear probe, {named}", partial(Probe, heads), (512, 512), batch, num_classes),
        channels=768,
        weights=(1.0,) * heads,
        channels_last=False,
        stride=16,
    )


MEASURED_PROBES = (
    probe("ADE20K", 150, 8, 1),
    probe("ADE20K", 150, 8, 9),
    probe("Cityscapes", 19, 8, 1),
    probe("Cityscapes", 19, 8, 9),
)
COUNTED = (
    *COUNTED,
    probe("ADE20K", 150, 16, 1),
    probe("ADE20K", 150, 16, 9),
    probe("Cityscapes", 19, 16, 1),
    probe("Cityscapes", 19, 16, 9),
)
small_segformer = partial(of_training_program, "segformer-b0")
ON_CPU = (
    Network("hrnet-w18-small", small_hrnet, (512, 1024), 2, 19, 240),
    Network("segformer-b0", small_segformer, (512, 512), 2, 150, 256, channels_last=False),
)


def networks_on(device: str, section: str, compiled: bool) -> tuple[Network, ...]:
    """Those that are measured. compiled: with torch.compile."""
    if device == "cpu":
        return (*ON_CPU, *MEASURED_PROBES) if section == "training_steps" else ON_CPU
    return (SEGFORMER_B0, UNET) if compiled else ON_GPU

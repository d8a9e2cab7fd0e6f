"""What is measured: shapes that users have, their inputs, and cases in the order of their worth.

Inputs are random numbers; logits may also be those of a small network that was trained on the
labels: few errors, and steep between classes. No label of a pixel loss is ignored, because MONAI
cannot ignore any.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao
from anchorops.doctor.catalogue import Inputs
from anchorops.measure import example_labels

STEPS, WIDTH, NOISE = 100, 64, 0.5  # of the trained network: Adam's, channels, in its images
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward + backward"
IMAGES, VOLUMES = "images", "volumes"  # names of the shapes of a grid of options


class Features(NamedTuple):
    """A feature map (B, D, H, W) or points (N, D), with K classes. On CPU the batch is smaller.
    Labels of a map have four times its height and width."""

    name: str
    size: tuple[int, ...]
    num_classes: int
    cpu_batch: int = 2

    stride = None

    def on(self, device: torch.device, tiny: bool = False) -> "Features":
        size = list(self.size)
        if device.type == "cpu":
            size[0] = min(self.cpu_batch, size[0])
        if tiny:
            largest = (2, 24, 8, 12) if len(size) == 4 else (500, 24)
            size = [min(pair) for pair in zip(size, largest, strict=True)]
            num_classes = min(self.num_classes, size[1])  # as CBP needs
            return self._replace(size=tuple(size), num_classes=num_classes)
        return self._replace(size=tuple(size))

    @property
    def sizes(self) -> str:
        axes = "BDHW" if len(self.size) == 4 else "ND"
        sizes = " ".join(f"{axis}{size:,}" for axis, size in zip(axes, self.size, strict=True))
        return f"{sizes} K{self.num_classes:,}"

    def inputs(self, dtype: str, labels: str, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        features = torch.randn(self.size, dtype=DTYPES[dtype], device=device, generator=generator)
        pixels = (self.size[0], *self.size[2:])
        classes = example_labels(pixels, self.num_classes, labels).to(device)
        if len(self.size) == 4:
            classes = classes.repeat_interleave(4, 1).repeat_interleave(4, 2)
        anchors = (self.num_classes, self.size[1])
        return {
            "features": features,
            "labels": classes,
            "anchors": torch.randn(anchors, device=device, generator=generator),
        }


class Centroids(NamedTuple):
    """Queries and keys [K, D]."""

    num_classes: int
    dim: int

    name, stride = "centroids", None

    def on(self, device: torch.device, tiny: bool = False) -> "Centroids":
        return Centroids(min(self.num_classes, 20), 24) if tiny else self

    @property
    def sizes(self) -> str:
        return f"N{self.num_classes:,} D{self.dim:,} K{self.num_classes:,}"

    def inputs(self, dtype: str, labels: str, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        drawn = torch.randn(2, self.num_classes, self.dim, device=device, generator=generator)
        queries, keys = F.normalize(drawn, dim=2)
        return {"queries": queries.clone(), "keys": keys.clone()}


class Logits(NamedTuple):
    """Logits (B, K, h, w), or a volume (B, K, d, h, w), and the size of their labels. With `dim`
    they are cosines of features (B, D, h, w) to anchors [K, D]. sigmoid: labels have the logits'
    channels, 0 or 1."""

    name: str
    size: tuple[int, ...]
    label_size: tuple[int, ...]
    channels_last: bool = False
    cpu_batch: int = 2
    dim: int = 0
    sigmoid: bool = False

    @property
    def num_classes(self) -> int:
        return self.size[1]

    @property
    def stride(self) -> int:
        return round(self.label_size[-1] / self.size[-1])

    @property
    def sizes(self) -> str:
        axes = "BKhw" if len(self.size) == 4 else "BKdhw"
        sizes = " ".join(f"{axis}{size:,}" for axis, size in zip(axes, self.size, strict=True))
        features = f", D{self.dim:,}" if self.dim else ""
        return f"{sizes}{features}, labels {'×'.join(map(str, self.label_size))}"

    def on(self, device: torch.device, tiny: bool = False) -> "Logits":
        batch, num_classes, *space = self.size
        if device.type == "cpu":
            batch = min(self.cpu_batch, batch)
        if tiny:
            batch, num_classes = min(batch, 2), min(num_classes, 20 if num_classes <= 255 else 256)
            space = [max(4, 32 // self.stride) if len(space) == 2 else 5] * len(space)
        label_size = tuple(n * self.stride for n in space) if tiny else self.label_size
        dim = min(self.dim, 24) if tiny else self.dim
        return self._replace(size=(batch, num_classes, *space), label_size=label_size, dim=dim)

    def inputs(self, dtype: str, labels: str, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        size = (self.size[0], self.dim or self.num_classes, *self.size[2:])
        logits = torch.randn(size, dtype=DTYPES[dtype], device=device, generator=generator)
        if self.channels_last:
            logits = logits.contiguous(memory_format=torch.channels_last)
        batch = self.size[0] * (self.num_classes if self.sigmoid else 1)
        flat = (batch, math.prod(self.label_size[:-1]), self.label_size[-1])
        num_classes = 2 if self.sigmoid else self.num_classes
        kind = "random" if labels == "random" else "coherent"
        classes = example_labels(flat, num_classes, kind).clamp(min=0)
        channels = [self.num_classes] if self.sigmoid else []
        classes = classes.view(self.size[0], *channels, *self.label_size)
        if labels == "trained":
            logits = trained_logits(classes, num_classes, self.stride)
        classes = classes.to(device, torch.uint8 if labels == "uint8" else torch.int64)
        inputs = {"logits": logits.to(device), "labels": classes}
        if self.dim:
            anchors = torch.randn(num_classes, self.dim, device=device, generator=generator)
            inputs = {"features": logits, "labels": classes, "anchors": F.normalize(anchors, dim=1)}
        return inputs


def trained_logits(labels: Tensor, num_classes: int, ratio: int) -> Tensor:
    """Logits of a network that was trained on images of low resolution, whose noisy colours are
    those of the classes."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(num_classes, 3, generator=generator)
    images = colours[labels[:, ::ratio, ::ratio]].movedim(-1, 1)
    images = images + NOISE * torch.randn(images.shape, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()),
            nn.Conv2d(WIDTH, num_classes, 1),
        )
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        ao.pixel_cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network(images).detach()


class Case(NamedTuple):
    """One comparison: every implementation does the same on the same inputs.

    Attributes:
        labels: in rectangles (coherent), random, uint8 (the same rectangles), or coherent with the
            logits of a trained network (trained).
        compiled: also compile the alternatives, which takes about 10 s each.
        only: the type of the only device it is measured on.
    """

    operation: str
    shape: Any  # Features, Centroids or Logits
    direction: str = TRAINING
    dtype: str = ""  # float32 on CPU, bfloat16 on GPU
    labels: str = "coherent"
    compiled: bool = False
    only: str = ""

    def __str__(self) -> str:
        shape = self.shape.name
        if shape in (IMAGES, VOLUMES, "centroids"):
            shape += f" {self.shape.sizes}"
        return ", ".join((self.operation, self.direction, shape, self.dtype, self.labels))

    @property
    def fields(self) -> dict[str, Any]:
        """Those of its rows."""
        return {
            "case": str(self),
            "operation": self.operation,
            "direction": self.direction,
            "shape": self.shape.name,
            "sizes": self.shape.sizes,
            "num_classes": self.shape.num_classes,
            "stride": self.shape.stride,
            "dtype": self.dtype,
            "labels": self.labels,
        }

    def inputs(self, device: torch.device) -> Inputs:
        return _inputs(self.shape, self.dtype, self.labels, device)


@lru_cache(1)  # consecutive cases may have the same inputs
def _inputs(shape: Any, *rest: Any) -> Inputs:
    return shape.inputs(*rest)


HRNET = Features("HRNet-W48, Cityscapes", (8, 720, 128, 256), 19)
OCRNET = Features("OCRNet, Cityscapes", (8, 512, 128, 256), 19)
SEGFORMER_B5 = Features("SegFormer-B5, ADE20K", (16, 768, 128, 128), 150)
POINTS = Features("points, ScanNet200", (1_000_000, 96), 200, cpu_batch=100_000)
IMAGENET = Features("images, ImageNet", (1024, 2048), 1000, cpu_batch=1024)
MANY_KEYS = Features("1,200 classes", (8, 512, 128, 128), 1200, cpu_batch=1)

SEGFORMER = Logits("SegFormer, ADE20K", (16, 150, 128, 128), (512, 512))
CITYSCAPES = Logits("HRNet, Cityscapes", (8, 19, 128, 256), (512, 1024))
DEEPLAB = Logits("DeepLab, VOC", (8, 21, 65, 65), (513, 513))
DEEPLAB_16 = DEEPLAB._replace(name="DeepLab, VOC, output stride 16", size=(8, 21, 33, 33))
LAST = SEGFORMER._replace(name="SegFormer, ADE20K, channels last", channels_last=True)
ONE = SEGFORMER._replace(name="SegFormer, ADE20K, one image", cpu_batch=1)
COCO = Logits("SegFormer, COCO-Stuff", (16, 171, 128, 128), (512, 512))
MANY = Logits("1,200 classes", (4, 1200, 64, 64), (256, 256))
UNET = Logits("U-Net", (8, 20, 512, 512), (512, 512))
BINARY_UNET = UNET._replace(name="binary U-Net", size=(16, 1, 512, 512), sigmoid=True)
PATCH = Logits("3-D patch", (2, 4, 64, 64, 64), (64, 64, 64))
NNUNET = Logits("nnU-Net", (2, 14, 128, 128, 128), (128, 128, 128))
DEEP = NNUNET._replace(name="nnU-Net, half resolution", size=(2, 14, 64, 64, 64))
MATCHED = Logits("MaskFormer, 20 masks", (20, 1, 128, 128), (512, 512), cpu_batch=20, sigmoid=True)
LARGE_MATCHED = MATCHED._replace(
    name="MaskFormer, 20 masks of 1024²", size=(20, 1, 256, 256), label_size=(1024, 1024)
)
ROW = Logits("points, 150 classes", (2, 150, 1, 8192), (1, 8192))
LONG_ROW = Logits("points, 2 classes", (2, 2, 1, 2**20), (1, 2**20))
TEXT = Logits("LSeg, ADE20K", (8, 150, 128, 128), (512, 512), cpu_batch=1, dim=512)
PIXELS = TEXT._replace(name="LSeg, ADE20K, labels of the features' size", label_size=(128, 128))

METHODS = ("SAR", "OCCL", "CBP, moving average", "CeCo", "CeCo at label size", "MVSC", "SAR + OCCL")

OF_USERS = [
    Case("cross-entropy", SEGFORMER, compiled=True),
    Case("cross-entropy", CITYSCAPES),
    Case("cross-entropy + Dice", NNUNET, only="cuda"),
    Case("cross-entropy", UNET, only="cuda"),
    Case("sigmoid: cross-entropy", BINARY_UNET, only="cuda"),
    Case("cross-entropy + Dice", SEGFORMER),
    Case("class moments with anchors", HRNET, compiled=True),
    Case("cross-entropy", DEEPLAB),
    Case("Dice", CITYSCAPES),
    Case("cross-entropy", DEEPLAB_16, only="cuda"),
    Case("cross-entropy + Dice", DEEP, only="cuda"),
    Case("sigmoid: Dice", BINARY_UNET, only="cuda"),
    Case("cross-entropy + Dice", UNET, only="cuda"),
    Case("divergence from a teacher", CITYSCAPES),
    Case("focal cross-entropy", CITYSCAPES),
    *(
        Case("matched masks: focal + Dice", shape, labels="uint8", compiled=True)
        for shape in (MATCHED, LARGE_MATCHED)
    ),
    Case("confusion matrix", CITYSCAPES, FORWARD),
    Case("pixel-to-anchor MSE", HRNET, compiled=True),
    Case("class moments", HRNET),
    Case("cross-entropy", SEGFORMER, FORWARD),
    *(Case("cross-entropy", SEGFORMER, dtype=dtype, only="cuda") for dtype in ("fp16", "fp32")),
    *(Case("cross-entropy", UNET, dtype=dtype, only="cuda") for dtype in ("fp16", "fp32")),
    Case("class moments with anchors", POINTS, labels="random"),
    Case("class moments with anchors", SEGFORMER_B5, compiled=True),
    Case("class moments with anchors", HRNET, FORWARD, compiled=True),
    Case("class centroids", OCRNET),
    Case("class moments in 4 groups", OCRNET),
    *(Case(method, OCRNET) for method in METHODS),
    Case("cross-entropy, aligned corners", DEEPLAB),
    *(Case("cross-entropy", shape) for shape in (COCO, LAST, ONE, MANY)),
    Case("cross-entropy + Dice", PATCH),
    Case("confusion matrix", SEGFORMER, FORWARD),
    *(Case("cross-entropy of cosines", shape) for shape in (TEXT, PIXELS)),
    *(Case("divergence from a teacher", shape) for shape in (SEGFORMER, ROW, LONG_ROW)),
    Case("class moments with anchors", HRNET, BACKWARD),
    Case("class moments", HRNET, FORWARD),
    Case("pixel-to-anchor MSE", HRNET, FORWARD),
    Case("class moments with anchors", HRNET, FORWARD, labels="random"),
    Case("class moments with anchors", HRNET, labels="random"),
    *(Case("class moments with anchors", HRNET, dtype=dtype) for dtype in ("bf16", "fp32")),
    Case("class moments with anchors", IMAGENET, labels="random"),
    Case("class moments with anchors", MANY_KEYS),
    *(Case("class keys", HRNET, FORWARD, labels=labels) for labels in ("coherent", "random")),
    *(
        Case("centroid InfoNCE", Centroids(*size), direction, "fp32", compiled=True)
        for size in ((19, 720), (150, 768), (1000, 512), (1000, 2048))
        for direction in (TRAINING, FORWARD)
    ),
]

# The grid of options: K (of sigmoids: channels) × output stride, labels of 512 × 512.
SIZE, CLASSES, CHANNELS, STRIDES = 512, (2, 19, 150), (1, 20), (1, 2, 4, 8)
COMPILED = {(1, 1), (2, 1), (19, 4), (20, 4)}  # K, stride
MOST_IMAGES, MOST_LOGITS = 4, 10e6  # of a batch, at full resolution; one image or more
OPTIONS = (
    *("cross-entropy", "class weights", "label smoothing", "focal cross-entropy"),
    *("OHEM, threshold", "OHEM, largest", "pixel weights", "Dice", "Lovász"),
    *("cross-entropy + Dice", "pseudo-labels", "divergence from a teacher"),
)
OF_SIGMOIDS = (
    *("sigmoid: cross-entropy", "sigmoid: pos_weight", "sigmoid: label smoothing"),
    *("sigmoid: OHEM, threshold", "sigmoid: pixel weights", "sigmoid: focal", "sigmoid: Dice"),
)
ONLY_EAGER = OF_SIGMOIDS[1:5]
OF_VOLUMES = {  # K and stride; volumes of the second are several slabs
    "cross-entropy": ((14, 4), (30, 2)),
    "Dice": ((14, 4),),
    "cross-entropy + Dice": ((14, 4),),
    "pseudo-labels": ((14, 4), (30, 2)),
}


def image(option: str, num_classes: int, stride: int, labels: str = "coherent") -> Case:
    batch = max(1, min(MOST_IMAGES, int(MOST_LOGITS / (num_classes * SIZE**2))))
    size, sigmoid = (batch, num_classes, SIZE // stride, SIZE // stride), option in OF_SIGMOIDS
    shape = Logits(IMAGES, size, (SIZE, SIZE), cpu_batch=batch, sigmoid=sigmoid)
    compiled = (num_classes, stride) in COMPILED and option not in ONLY_EAGER
    direction = FORWARD if option == "pseudo-labels" else TRAINING
    return Case(option, shape, direction, "fp32", labels, compiled and labels != "trained")


def volume(option: str, num_classes: int, stride: int, dtype: str) -> Case:
    size = (1, num_classes, *(SIZE // 4 // stride,) * 3)
    direction = FORWARD if option == "pseudo-labels" else TRAINING
    return Case(option, Logits(VOLUMES, size, (SIZE // 4,) * 3), direction, dtype)


GRID = [
    *(
        volume(option, num_classes, stride, dtype)
        for dtype in ("fp32", "bf16")
        for option, every in OF_VOLUMES.items()
        for num_classes, stride in every
    ),
    *(
        image(option, num_classes, stride)
        for option in OPTIONS
        for num_classes in CLASSES
        for stride in ((4,) if option == "Lovász" else STRIDES)
    ),
    *(
        image(option, channels, stride, labels)
        for option, labels in (
            *((option, "coherent") for option in OF_SIGMOIDS),
            *((option, "uint8") for option in ("sigmoid: cross-entropy", "sigmoid: Dice")),
        )
        for channels in CHANNELS
        for stride in STRIDES
    ),
    *(
        image(option, num_classes, 4, "trained")
        for option in ("cross-entropy", "cross-entropy + Dice", "Lovász")
        for num_classes in CLASSES
    ),
]


def cases_on(device: str, tiny: bool = False) -> list[Case]:
    """Those of a type of device, with their dtypes. On a GPU all alternatives that users have are
    compiled. tiny: only to test the code, so the grid has each option once, and alternatives of an
    operation are compiled once."""
    natural, compiled = {"cpu": ("fp32", False), "cuda": ("bf16", True)}[device]
    of_users = [case._replace(compiled=case.compiled or compiled) for case in OF_USERS]
    cases = [case._replace(dtype=case.dtype or natural) for case in (*of_users, *GRID)]
    unique: dict[Any, Case] = {}
    compiled_once: set[str] = set()
    for case in cases:
        if case.only not in ("", device):
            continue
        if tiny:
            case = case._replace(compiled=case.operation not in compiled_once)
            compiled_once.add(case.operation)
            unique.setdefault(case._replace(shape=case.shape.name, compiled=False), case)
        else:
            unique.setdefault(str(case), case)
    return [*unique.values()]

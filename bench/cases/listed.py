"""What is measured: operations with shapes that users have, in the order of their worth, and a grid
of options."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from cases.shapes import Features, Logits

from anchorops.doctor.catalogue import Inputs

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward + backward"
IMAGES, VOLUMES = "images", "volumes"  # names of the shapes of the grid


class Case(NamedTuple):
    """One comparison: every implementation does the same on the same inputs.

    Attributes:
        labels: in rectangles (coherent), random, uint8 (the same rectangles), or coherent with the
            logits of a trained network (trained).
        compiled: also compile the alternatives, which takes about 10 s each.
        only: the type of the only device it is measured on.
    """

    operation: str
    shape: Features | Logits
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
    Case("cross-entropy, aligned corners", DEEPLAB),
    *(Case("cross-entropy", shape) for shape in (COCO, LAST, ONE, MANY)),
    Case("cross-entropy + Dice", PATCH),
    Case("confusion matrix", SEGFORMER, FORWARD),
    *(Case("divergence from a teacher", shape) for shape in (SEGFORMER, ROW, LONG_ROW)),
    Case("class moments with anchors", HRNET, BACKWARD),
    Case("class moments", HRNET, FORWARD),
    Case("pixel-to-anchor MSE", HRNET, FORWARD),
    Case("class moments with anchors", HRNET, FORWARD, labels="random"),
    Case("class moments with anchors", HRNET, labels="random"),
    *(Case("class moments with anchors", HRNET, dtype=dtype) for dtype in ("bf16", "fp32")),
    Case("class moments with anchors", IMAGENET, labels="random"),
    Case("class moments with anchors", MANY_KEYS),
    *(
        Case(
            "centroid InfoNCE",
            Features("centroids", (k, d), k, k),
            direction,
            "fp32",
            compiled=True,
        )
        for k, d in ((19, 720), (150, 768), (1000, 512), (1000, 2048))
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
ONLY_EAGER, DIRECTIONS = OF_SIGMOIDS[1:5], {"pseudo-labels": FORWARD}
OF_VOLUMES = (  # K and stride; volumes of the last two are several slabs
    *(("cross-entropy", 14, 4), ("Dice", 14, 4), ("cross-entropy + Dice", 14, 4)),
    *(("pseudo-labels", 14, 4), ("cross-entropy", 30, 2), ("pseudo-labels", 30, 2)),
)


def image(option: str, num_classes: int, stride: int, labels: str = "coherent") -> Case:
    batch = max(1, min(MOST_IMAGES, int(MOST_LOGITS / (num_classes * SIZE**2))))
    size = (batch, num_classes, SIZE // stride, SIZE // stride)
    shape = Logits(IMAGES, size, (SIZE, SIZE), cpu_batch=batch, sigmoid=option in OF_SIGMOIDS)
    compiled = (num_classes, stride) in COMPILED and option not in ONLY_EAGER
    compiled &= labels != "trained"
    return Case(option, shape, DIRECTIONS.get(option, TRAINING), "fp32", labels, compiled)


def volume(option: str, num_classes: int, stride: int, dtype: str) -> Case:
    shape = Logits(VOLUMES, (1, num_classes, *(128 // stride,) * 3), (128,) * 3)
    return Case(option, shape, DIRECTIONS.get(option, TRAINING), dtype)


GRID = [
    *(volume(*option, dtype) for dtype in ("fp32", "bf16") for option in OF_VOLUMES),
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

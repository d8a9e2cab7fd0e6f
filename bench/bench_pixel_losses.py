"""Losses and confusion matrices at full resolution, compared with upsampling the logits first.

Bytes are those of the operator: forward reads logits and labels and writes lse; backward reads
these three and writes the logits' gradient. Where the logits are cosines of features to anchors,
the bytes of the features are counted instead.

The formulas people write allocate several tensors of all labels and classes. On CPU these are new
memory in each call, and their page faults take about half of the time. "kept pages" are the same
formulas with a malloc that does not return memory to the operating system, as in some programs.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import DTYPES, IGNORE_INDEX, Case, backends, grid, labels_of
from torch import Tensor

import anchorops as ao
from anchorops.catalogue import usual
from anchorops.catalogue.formulas import upsampled

FORWARD, TRAINING = "forward", "forward + backward"
cross_entropy = partial(usual.cross_entropy, ignore_index=IGNORE_INDEX)
CE, CE_DICE, DICE, FOCAL = "cross-entropy", "cross-entropy + Dice", "Dice", "focal cross-entropy"
CONFUSION, COSINES = "confusion matrix", "cross-entropy of cosines"
TEMPERATURE = 0.07  # of the cosines
DIVERGENCE = "divergence from a teacher"
KEPT = ", kept pages"
LIBRARIES = {"smp": "segmentation_models_pytorch", "torchmetrics": "torchmetrics"}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's <malloc.h>


class Logits(NamedTuple):
    """Logits (B, K, h, w), or a volume (B, K, d, h, w), and the size of their labels. With `dim`
    they are cosines of features (B, D, h, w) to anchors [K, D]."""

    name: str
    size: tuple[int, ...]
    label_size: tuple[int, ...]
    align_corners: bool = False
    channels_last: bool = False
    cpu_batch: int = 2
    dim: int = 0

    @property
    def num_classes(self) -> int:
        return self.size[1]

    @property
    def sizes(self) -> str:
        axes = "BKhw" if len(self.size) == 4 else "BKdhw"
        sizes = " ".join(f"{axis}{size:,}" for axis, size in zip(axes, self.size, strict=True))
        features = f", D{self.dim:,}" if self.dim else ""
        return f"{sizes}{features}, labels {'×'.join(map(str, self.label_size))}"

    def upsampled(self, x: Tensor) -> Tensor:
        """float32 logits at full resolution."""
        return upsampled(x.float(), self.label_size, self.align_corners)

    def on(self, device: torch.device, tiny: bool = False) -> "Logits":
        size, label_size = list(self.size), self.label_size
        if device.type == "cpu":
            size[0] = min(self.cpu_batch, size[0])
        if tiny:
            size[1] = min(size[1], 20)
            if size[2:] == list(label_size):
                label_size = (4,) * len(label_size)
                size[2:] = label_size
            else:
                label_size = tuple(n * 5 // s for n, s in zip(label_size, size[2:], strict=True))
                size[2:] = (5, 5)
        dim = min(self.dim, 24) if tiny else self.dim
        return self._replace(size=tuple(size), label_size=label_size, dim=dim)


SEGFORMER = Logits("SegFormer, ADE20K", (16, 150, 128, 128), (512, 512))
HRNET = Logits("HRNet, Cityscapes", (8, 19, 128, 256), (512, 1024))
DEEPLAB = Logits("DeepLab, VOC", (8, 21, 65, 65), (513, 513))
CORNERS = DEEPLAB._replace(name="DeepLab, VOC, aligned corners", align_corners=True)
LAST = SEGFORMER._replace(name="SegFormer, ADE20K, channels last", channels_last=True)
ONE = SEGFORMER._replace(name="SegFormer, ADE20K, one image", cpu_batch=1)
COCO = Logits("SegFormer, COCO-Stuff", (16, 171, 128, 128), (512, 512))
MANY = Logits("1,200 classes", (4, 1200, 64, 64), (256, 256))
VOLUME = Logits("3-D patch", (2, 4, 64, 64, 64), (64, 64, 64))
TEXT = Logits("LSeg, ADE20K", (8, 150, 128, 128), (512, 512), cpu_batch=1, dim=512)
PIXELS = TEXT._replace(name="LSeg, ADE20K, labels of the features' size", label_size=(128, 128))

QUICK = [
    Case(CE, TRAINING, SEGFORMER, compiled=True),
    Case(CE, FORWARD, SEGFORMER),
    *(Case(CE, TRAINING, shape) for shape in (HRNET, DEEPLAB, CORNERS, COCO, LAST, ONE, MANY)),
    Case(CE_DICE, TRAINING, SEGFORMER),
    Case(CE_DICE, TRAINING, VOLUME),
    Case(DICE, TRAINING, HRNET),
    Case(FOCAL, TRAINING, HRNET),
    Case(CONFUSION, FORWARD, HRNET),
    Case(CONFUSION, FORWARD, SEGFORMER),
    Case(COSINES, TRAINING, TEXT),
    Case(COSINES, TRAINING, PIXELS),
    *(Case(DIVERGENCE, TRAINING, shape) for shape in (HRNET, SEGFORMER)),
]
FULL = [
    Case(operation, direction, shape, dtype)
    for shape in (SEGFORMER, HRNET, DEEPLAB, COCO, LAST)
    for dtype in ("bf16", "fp32")
    for operation in (CE, CE_DICE)
    for direction in (FORWARD, TRAINING)
]

Formula = Callable[[Tensor, Tensor], Tensor]


def ours(case: Case) -> Formula:
    align_corners = case.shape.align_corners
    options = {"ignore_index": IGNORE_INDEX, "align_corners": align_corners}
    if case.operation == CONFUSION:
        return lambda x, y: ao.pixel_confusion(x, y, **options)
    if case.operation == COSINES:
        return lambda x, y: ao.pixel_cross_entropy(cosines(case.shape, x), y, **options)
    if case.operation == DIVERGENCE:
        return lambda x, y: ao.pixel_kl_divergence(
            x,
            teacher_of(x),
            (y.shape[1], y.shape[2]),
            valid=y != IGNORE_INDEX,
            align_corners=align_corners,
        )
    dice = ao.Dice(absent="zero", **options)
    cross_entropy = ao.CrossEntropy(focal_gamma=2.0 * (case.operation == FOCAL), **options)
    if case.operation == CE_DICE:
        return ao.CrossEntropyDice(cross_entropy, dice)
    return dice if case.operation == DICE else cross_entropy


@lru_cache(2)
def scaled_anchors(shape: Logits, device: torch.device) -> Tensor:
    """Unit vectors [K, D], divided by the temperature."""
    generator = torch.Generator(device).manual_seed(1)
    anchors = torch.randn(shape.num_classes, shape.dim, device=device, generator=generator)
    return F.normalize(anchors, dim=1) / TEMPERATURE


def cosines(shape: Logits, features: Tensor) -> Tensor:
    anchors = scaled_anchors(shape, features.device).to(features.dtype)
    return F.conv2d(F.normalize(features, dim=1), anchors[:, :, None, None])


def teacher_of(x: Tensor) -> Tensor:
    """Logits of a teacher at the same resolution."""
    return x.detach().flip(1)


def divergence(z: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    terms = F.kl_div(z.log_softmax(1), teacher.softmax(1), reduction="none")
    valid = y != IGNORE_INDEX
    return torch.where(valid, terms.sum(1), 0).sum() / valid.sum()


def focal(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, ignore_index=IGNORE_INDEX, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).sum() / (y != IGNORE_INDEX).sum()


def linear_cross_entropy(case: Case, chunked: bool, x: Tensor, y: Tensor) -> Tensor:
    """torch's, from unit features at full resolution. Its logits equal the upsampled cosines,
    because both the upsampling and the product are linear."""
    rows = case.shape.upsampled(F.normalize(x, dim=1)).movedim(1, -1).flatten(0, -2)
    anchors = scaled_anchors(case.shape, x.device).to(rows.dtype)
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return F.linear_cross_entropy(
        rows, anchors, y.flatten(), ignore_index=IGNORE_INDEX, options=options
    )


def torchmetrics_confusion(z: Tensor, y: Tensor) -> Tensor:
    functional = importlib.import_module("torchmetrics.functional.classification")
    return functional.multiclass_confusion_matrix(
        z.argmax(1), y, z.shape[1], ignore_index=IGNORE_INDEX
    )


def bincount_confusion(z: Tensor, y: Tensor) -> Tensor:
    num_classes, valid = z.shape[1], y != IGNORE_INDEX
    pairs = y[valid] * num_classes + z.argmax(1)[valid]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def cosine_alternatives(case: Case) -> dict[str, Formula]:
    """The formulas of torch. Older versions have no linear_cross_entropy."""
    formulas: dict[str, Formula] = {
        "product + interpolate + cross_entropy": lambda x, y: cross_entropy(
            case.shape.upsampled(cosines(case.shape, x)), y
        )
    }
    if hasattr(F, "linear_cross_entropy"):
        for name, chunked in (("", False), (", chunked", True)):
            formulas[f"interpolate + linear_cross_entropy{name}"] = partial(
                linear_cross_entropy, case, chunked
            )
    return formulas


def alternative_formulas(case: Case) -> dict[str, Formula]:
    """The formulas of installed libraries. smp's focal loss is another loss, so its value is not
    checked."""
    if case.operation == COSINES:
        return cosine_alternatives(case)
    if case.operation == DIVERGENCE:
        return {
            "interpolate + kl_div": lambda x, y: divergence(
                case.shape.upsampled(x), case.shape.upsampled(teacher_of(x)), y
            )
        }

    def smp(name: str) -> Formula:
        losses = importlib.import_module("segmentation_models_pytorch.losses")
        return getattr(losses, name)("multiclass", ignore_index=IGNORE_INDEX)

    formulas: dict[str, Formula] = {
        CE: {"interpolate + cross_entropy": cross_entropy},
        DICE: {"interpolate + smp's Dice": lambda z, y: smp("DiceLoss")(z, y)},
        CE_DICE: {
            "interpolate + cross_entropy + smp's Dice": lambda z, y: (
                cross_entropy(z, y) + smp("DiceLoss")(z, y)
            )
        },
        FOCAL: {
            "interpolate + focal": focal,
            "interpolate + smp's focal": lambda z, y: smp("FocalLoss")(z, y),
        },
        CONFUSION: {
            "interpolate + argmax + torchmetrics": torchmetrics_confusion,
            "interpolate + argmax + bincount": bincount_confusion,
        },
    }[case.operation]
    formulas = {
        name: lambda x, y, formula=formula: formula(case.shape.upsampled(x), y)
        for name, formula in formulas.items()
        if not any(mark in name and absent(library) for mark, library in LIBRARIES.items())
    }
    if not formulas:
        return {}
    first, formula = next(iter(formulas.items()))
    if case.operation == CE:

        def by_image(x: Tensor, y: Tensor) -> Tensor:
            images = zip(x.split(1), y.split(1), strict=True)
            losses = [formula(one, label) * (label != IGNORE_INDEX).sum() for one, label in images]
            return torch.stack(losses).sum() / (y != IGNORE_INDEX).sum()

        formulas["image by image"] = by_image
    if case.compiled:
        formulas[f"compiled {first}"] = torch.compile(formula, dynamic=False)
    return formulas


def absent(library: str) -> bool:
    return importlib.util.find_spec(library) is None


def names(case: Case, device: torch.device) -> list[str]:
    alternatives = [*alternative_formulas(case)]
    if alternatives and device.type == "cpu":
        alternatives.append(alternatives[0] + KEPT)
    ours = [name for name, kind in backends(device).items() if kind != "cuda"]
    return [*ours, *alternatives]


@contextlib.contextmanager
def kept_pages() -> Iterator[None]:
    """malloc neither maps large blocks separately nor returns memory to the operating system."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65_536)
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)


@lru_cache(1)
def make_inputs(shape: Logits, dtype: str, labels: str, device: torch.device):
    generator = torch.Generator(device).manual_seed(0)
    inputs = (shape.size[0], shape.dim or shape.num_classes, *shape.size[2:])
    logits = torch.randn(inputs, dtype=DTYPES[dtype], device=device, generator=generator)
    if shape.channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    size = (shape.size[0], *shape.label_size)
    flat = (size[0], math.prod(size[1:-1]), size[-1])
    return logits, labels_of(flat, shape.num_classes, labels, device).view(size)


@lru_cache(2)
def exact(case: Case, device: torch.device) -> Tensor:
    """The results of the plain formula in float32. (The tests compare with float64.)"""
    logits, labels = make_inputs(case.shape, case.dtype, case.labels, device)
    formula = next(iter(alternative_formulas(case).values()), ours(case))
    logits = logits.detach().requires_grad_(case.direction == TRAINING)
    value = formula(logits, labels)
    return torch.autograd.grad(value, logits)[0] if case.direction == TRAINING else value.double()


def counted_bytes(logits: Tensor, labels: Tensor, direction: str, operation: str = CE) -> int:
    forward = logits.nbytes + labels.nbytes + 4 * labels.numel()
    if operation == DIVERGENCE:  # two models, a mask of one byte, two lse
        forward = 2 * logits.nbytes + 9 * labels.numel()
    return forward if direction == FORWARD else 2 * forward + logits.nbytes


@grid(QUICK, FULL, names)
def test_pixel_losses(bench, case: Case, name: str):
    case = case._replace(shape=case.shape.on(bench.device, bench.tiny))
    logits, labels = make_inputs(case.shape, case.dtype, case.labels, bench.device)
    plain = name.removesuffix(KEPT)
    formula = ours(case) if name in backends(bench.device) else alternative_formulas(case)[plain]
    logits = logits.detach().requires_grad_(case.direction == TRAINING)

    def run() -> tuple[Tensor, ...]:
        value = formula(logits, labels)
        return torch.autograd.grad(value, logits) if logits.requires_grad else (value,)

    with bench.backend(name), kept_pages() if name.endswith(KEPT) else contextlib.nullcontext():
        if "smp's focal" not in name:
            bench.check(run(), [exact(case._replace(compiled=False), bench.device)], case.dtype)
        counted = counted_bytes(logits, labels, case.direction, case.operation)
        bench.record(run, case, name, counted, beside=logits)

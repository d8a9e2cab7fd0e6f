"""The calls of the Triton launchers that kernels_report.py compiles, with tensors on the meta
device: every dtype, layout and flag that changes the machine code."""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from anchorops._moments import GRADIENTS, Options
from anchorops.kernels import (
    centroid_info_nce,
    centroid_info_nce_backward,
    class_keys,
    class_moments,
    class_moments_backward,
    confusion,
    pixel_argmax,
    pixel_kl_divergence,
    pixel_kl_divergence_backward,
    softmax_moments,
    softmax_moments_backward,
    split_groups,
    upsampled_sums,
    upsampled_sums_backward,
)


class Variant(NamedTuple):
    dtype: torch.dtype
    layout: str
    anchors: bool

    def __str__(self) -> str:
        extra = " + anchors" * self.anchors
        return f"{str(self.dtype).removeprefix('torch.')} {self.layout}: sums{extra}"


MANY = 16_381  # classes, sorted by key; like 19 not a multiple of 16, for Triton's constants
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUICK = [
    Variant(BF16, "NCHW", True),
    Variant(BF16, "NHWC", True),
    Variant(FP32, "NCHW", True),
    Variant(FP16, "cropped", True),
]


def variants() -> Iterator[Variant]:
    for dtype in (BF16, FP16, FP32):
        for layout in ("NCHW", "NHWC", "cropped"):
            for anchors in (False, True):
                yield Variant(dtype, layout, anchors)


def launch_info_nce(groups: int, with_positives: bool) -> None:
    """Both directions of centroid InfoNCE, K = 150, D = 768. The positives are given, or the
    keys."""
    queries, keys = (torch.empty((n, 768), device="meta") for n in (150 * groups, 150))
    positives = torch.empty_like(queries) if with_positives else None
    present = torch.empty(len(queries), dtype=torch.bool, device="meta")
    inputs = queries, keys, positives, present, None
    losses, lse = centroid_info_nce.centroid_info_nce(*inputs, 0.07)
    backward = centroid_info_nce_backward.centroid_info_nce_backward
    backward(losses, *inputs, losses, lse, 0.07)


def launch_moments(variant: Variant, classes: int) -> None:
    """Everything that class moments launch, at the HRNet shape."""
    batch, dim, height, width = 8, 720, 128, 256
    size = (batch, dim, height, width)
    features = torch.empty(size, dtype=variant.dtype, device="meta")
    if variant.layout == "NHWC":
        features = features.contiguous(memory_format=torch.channels_last)
    elif variant.layout == "cropped":
        features = features.new_empty((batch, dim, height + 2, width + 2))[:, :, 1:-1, 1:-1]
    labels = torch.empty((batch, 512, 1024), dtype=torch.uint8, device="meta")
    keys, _ = class_keys.class_keys(labels, height, width, classes, False, 255)
    anchors = torch.empty((classes, dim), device="meta") if variant.anchors else None
    sums, sqdists = class_moments.class_moments(features, keys, anchors, classes, 1, True)
    class_moments_backward.class_moments_backward(
        features if variant.anchors else None,
        keys,
        anchors,
        sums,
        sqdists if variant.anchors else None,
        1,
        list(size),
        list(torch.empty_like(features).stride()),
        variant.dtype,
    )


def launch_groups() -> None:
    """Everything that random groups launch."""
    keys = torch.empty((8, 128 * 256), dtype=torch.int32, device="meta")
    counts, seed = (torch.empty(n, dtype=torch.int64, device="meta") for n in (19, 1))
    split_groups.split_groups(keys, counts, seed, 2)


def launch_upsampled(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Sums of upsampled features and their gradient, as in CeCo at the HRNet shape."""
    features = torch.empty((8, 128, 128, 256), dtype=dtype, device="meta", memory_format=layout)
    keys = torch.empty((8, 512, 1024), dtype=torch.uint8, device="meta")
    sums, mean, variance = upsampled_sums.upsampled_sums(features, keys, 19, 19)
    for moments in ((mean, variance), (None, None)):
        upsampled_sums_backward.upsampled_sums_backward(features, keys, sums, mean, *moments, 19)


class PixelVariant(NamedTuple):
    """Upsampled logits; with `dice` masses, squares, hits and all gradients, otherwise only the
    cross-entropy. `shaped`: with label smoothing, a focal factor, a smallest loss, pixel weights.
    `dice` and `shaped` also count the labels outside, as the modules do."""

    dtype: torch.dtype
    size: tuple[int, ...]
    labels: tuple[int, int]
    align_corners: bool
    dice: bool
    shaped: str = ""

    def __str__(self) -> str:
        what = "masses, squares, hits, maps" if self.dice else "cross-entropy"
        what += f" with {self.shaped}" if self.shaped else ""
        corners = ", corners aligned" if self.align_corners else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}: {self.size} to {self.labels}{corners}, {what}"


# Channels last are copied, and other numbers of classes give the same code.
ADE20K, DEEPLAB, FEW = (16, 150, 128, 128), (16, 21, 65, 65), (16, 21, 8, 8)
EVERYTHING = "smoothing, focal factor, smallest loss, pixel weights"
QUICK_PIXELS = [
    PixelVariant(BF16, ADE20K, (512, 512), False, False),
    PixelVariant(BF16, ADE20K, (512, 512), False, False, EVERYTHING),
]
PIXELS = [
    *QUICK_PIXELS,
    PixelVariant(BF16, ADE20K, (512, 512), False, True),
    PixelVariant(FP32, DEEPLAB, (513, 513), True, True),
    PixelVariant(FP16, DEEPLAB, (513, 513), False, False),
    PixelVariant(BF16, ADE20K, (512, 512), True, False),  # cells of 4 or 5 pixels
    PixelVariant(BF16, FEW, (512, 512), False, True),  # 64 pixels for each logit
    PixelVariant(BF16, (16, 21, 64, 4096), (64, 4096), False, True),  # not upsampled
    PixelVariant(BF16, ADE20K, (512, 512), False, False, "smoothing"),
    PixelVariant(BF16, ADE20K, (512, 512), False, False, "focal factor"),
    PixelVariant(FP32, DEEPLAB, (513, 513), True, False, "smallest loss"),
    PixelVariant(BF16, ADE20K, (512, 512), False, False, "pixel weights"),
    PixelVariant(BF16, ADE20K, (512, 512), False, True, EVERYTHING),
    PixelVariant(FP32, DEEPLAB, (513, 513), True, True, EVERYTHING),
    PixelVariant(BF16, (16, 21, 64, 4096), (64, 4096), False, False, EVERYTHING),
]


def launch_pixels(variant: PixelVariant) -> None:
    """Everything that softmax moments, argmax and confusion launch."""
    logits = torch.empty(variant.size, dtype=variant.dtype, device="meta")
    labels = torch.empty((variant.size[0], *variant.labels), dtype=torch.uint8, device="meta")
    dice, align_corners = variant.dice, variant.align_corners
    smooth = torch.empty((2, variant.size[1]), device="meta")
    weights = torch.empty(labels.shape, device="meta")
    options = Options(
        smoothing=smooth if "smoothing" in variant.shaped else None,
        pixel_weights=weights if "weights" in variant.shaped else None,
        min_loss=1.0 if "smallest" in variant.shaped else -math.inf,
        focal_gamma=2.0 if "focal" in variant.shaped else 0.0,
        align_corners=align_corners,
        hits=dice,
        masses=dice,
        squares=dice,
        pixel_losses=dice,
        lse=True,
        outside=dice or variant.shaped != "",
    )
    moments = softmax_moments.softmax_moments(logits, labels, options)
    gradients = {f"d{name}": moments.get(name) for name in GRADIENTS}
    softmax_moments_backward.softmax_moments_backward(
        logits, labels, moments["lse"], **gradients, options=options
    )
    if dice:
        predictions = pixel_argmax.pixel_argmax(logits, *variant.labels, align_corners, torch.int64)
        confusion.confusion(predictions, labels, variant.size[1], 255)


class DivergenceVariant(NamedTuple):
    """Logits of student and teacher; with `maps` a mask, and a gradient of each pixel."""

    dtype: torch.dtype
    size: tuple[int, ...]
    teacher: tuple[int, ...]
    labels: tuple[int, int]
    align_corners: bool
    maps: bool

    def __str__(self) -> str:
        what = "mask, divergence of each pixel" if self.maps else "sum of all pixels"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}: {self.size} and {self.teacher} to {self.labels}, {what}"


QUICK_DIVERGENCES = [DivergenceVariant(BF16, ADE20K, ADE20K, (512, 512), False, False)]
DIVERGENCES = [
    *QUICK_DIVERGENCES,
    DivergenceVariant(FP32, ADE20K, (16, 150, 64, 64), (512, 512), False, True),
    DivergenceVariant(FP16, DEEPLAB, DEEPLAB, (513, 513), True, True),
    DivergenceVariant(BF16, ADE20K, ADE20K, (128, 128), False, True),
    DivergenceVariant(BF16, FEW, DEEPLAB, (512, 512), False, False),
]


def launch_divergence(variant: DivergenceVariant) -> None:
    logits = torch.empty(variant.size, dtype=variant.dtype, device="meta")
    teacher = torch.empty(variant.teacher, dtype=variant.dtype, device="meta")
    valid = torch.empty((variant.size[0], *variant.labels), dtype=torch.bool, device="meta")
    inputs = logits, teacher, valid if variant.maps else None
    options = 2.0, variant.align_corners
    total, divergences, lse, teacher_lse = pixel_kl_divergence.pixel_kl_divergence(
        *inputs, *variant.labels, *options, variant.maps, True
    )
    gradients = (None, divergences) if variant.maps else (total, None)
    pixel_kl_divergence_backward.pixel_kl_divergence_backward(
        *inputs, lse, teacher_lse, *gradients, *options
    )


def native_sizes(stride: int) -> Iterator[Callable[[], None]]:
    """Both directions of cross-entropy, of a batch of each of 40 sizes, with a network that gives a
    logit for stride² pixels."""
    sizes = random.Random(0)
    for _ in range(40):
        labels = sizes.randint(200, 1000), sizes.randint(200, 1000)
        low = (math.ceil(n / stride) for n in labels)
        variant = PixelVariant(BF16, (2, 21, *low), labels, False, False)
        yield partial(launch_pixels, variant)


def jobs(quick: bool) -> list[tuple[Any, ...]]:
    """Launcher, title of the variant, arguments of the launcher."""
    launches: list[tuple[Any, ...]] = [
        (launch_moments, f"{variant}, {classes} classes", variant, classes)
        for variant in (QUICK if quick else variants())
        for classes in (19, MANY)
    ]
    launches.append((launch_info_nce, "the positives are the keys", 1, False))
    launches.append((launch_info_nce, "two queries of a class, with positives", 2, True))
    for pixels in QUICK_PIXELS if quick else PIXELS:
        launches.append((launch_pixels, str(pixels), pixels))
    for divergence in QUICK_DIVERGENCES if quick else DIVERGENCES:
        launches.append((launch_divergence, str(divergence), divergence))
    for dtype in (BF16,) if quick else (BF16, FP16, FP32):
        for layout in (torch.contiguous_format, torch.channels_last):
            title = f"upsampled sums: {str(dtype).removeprefix('torch.')}, {layout}"
            launches.append((launch_upsampled, title, dtype, layout))
    launches.append((launch_groups, "any number of groups"))
    return launches

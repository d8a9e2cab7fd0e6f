"""What Triton compiles for the report, and the launches of many sizes of images."""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

import anchorops as ao
from anchorops._moments import GRADIENTS, Options, Results, Wanted
from anchorops.doctor.catalogue import ENTRIES, Case, Sample, cases
from anchorops.doctor.catalogue.entry import evaluate
from anchorops.doctor.catalogue.features import Features, centroids
from anchorops.doctor.catalogue.masks import Masks
from anchorops.doctor.catalogue.pixels import Pixels
from anchorops.kernels import class_keys, softmax_moments, softmax_moments_backward

MANY = 16_381  # classes, sorted by key; like 19 not a multiple of 16, for Triton's constants
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Channels last are copied, and other numbers of classes give the same code.
UINT8 = torch.uint8
ADE20K = Pixels(150, (128, 128), (512, 512), dtype=BF16, label_dtype=UINT8)
EIGHT_TIMES = ADE20K._replace(logits=(64, 64))
DEEPLAB = Pixels(21, (65, 65), (513, 513), dtype=FP16, label_dtype=UINT8)
ALIGNED = DEEPLAB._replace(dtype=FP32, align=True)
FEW = DEEPLAB._replace(logits=(8, 8), labels=(512, 512), dtype=BF16)  # 64 pixels for each logit
SAME_SIZE = DEEPLAB._replace(logits=(64, 256), labels=(64, 256), dtype=BF16)
UPSAMPLED = Features(19, (2, 128, 32, 64), ratio=4, label_dtype=UINT8, anchors=False)
SMOOTHING: dict[str, Any] = {"label_smoothing": 0.1}
EVERYTHING: dict[str, Any] = {**SMOOTHING, "focal_gamma": 2.0, "ohem_threshold": 0.3}


def variant(entry: str, name: str, make: Any, quick: bool = False, **options: Any) -> Case:
    """make: the inputs; the name of the case says what they are."""
    if isinstance(make, Pixels):
        options |= {"align_corners": True} if make.align else {}
        size, label_size = ("×".join(map(str, x)) for x in (make.logits, make.labels))
        name = f"{make.num_classes} classes, {size} to {label_size}, {name}"
    if isinstance(make, (Features, Pixels)):
        name = f"{str(make.dtype).removeprefix('torch.')}, {make.layout}: {name}"
    return Case(ENTRIES[entry], Sample(name, make, options, ("quick",) if quick else ()))


def moments_variants() -> Iterator[Case]:
    """Everything that class moments launch, at the channels of HRNet."""
    few = [(BF16, "planes"), (BF16, "channels last"), (FP32, "planes"), (FP16, "cropped")]
    for dtype in (BF16, FP16, FP32):
        for layout in ("planes", "channels last", "cropped"):
            for anchors, classes in product((False, True), (19, MANY)):
                name = f"sums{' + anchors' * anchors}, {classes} classes"
                make = Features(classes, (2, 720, 32, 64), layout, dtype, label_dtype=UINT8)
                quick = anchors and (dtype, layout) in few
                make = make._replace(anchors=anchors)
                yield variant("class_moments", name, make, quick, num_classes=classes)
    for classes in (19, MANY):  # HRNet-W18: rows that are not aligned
        make = Features(classes, (2, 270, 32, 64), "channels last", BF16, label_dtype=UINT8)
        name = f"sums + anchors, {classes} classes, 270 channels"
        yield variant("class_moments", name, make, True, num_classes=classes)


def variants_of_images() -> Iterator[Case]:
    """Everything that the losses of logits and predictions launch."""
    for name, make, quick, options in (
        ("cross-entropy", ADE20K, True, {}),
        ("cross-entropy with all options", ADE20K._replace(weights=True), True, EVERYTHING),
        ("cross-entropy", EIGHT_TIMES, False, {}),
        ("cross-entropy", ADE20K._replace(logits=(16, 16)), False, {}),
        ("cross-entropy", DEEPLAB, False, {}),
        ("cross-entropy", ADE20K._replace(align=True), False, {}),  # cells of 4 or 5 pixels
        ("cross-entropy with smoothing", ADE20K, False, SMOOTHING),
        ("cross-entropy with a focal factor", ADE20K, False, {"focal_gamma": 2.0}),
        ("cross-entropy with a smallest loss", ALIGNED, False, {"ohem_threshold": 0.3}),
        ("cross-entropy with pixel weights", ADE20K._replace(weights=True), False, {}),
        ("cross-entropy with all options", SAME_SIZE._replace(weights=True), False, EVERYTHING),
    ):
        yield variant(
            "CrossEntropy" if options or make.weights else "pixel_cross_entropy",
            name,
            make,
            quick,
            **options,
        )
    for make in (ADE20K, EIGHT_TIMES):
        yield variant("CrossEntropyDice", "cross-entropy + Dice", make)
    for make in (ADE20K, ALIGNED):
        options = EVERYTHING | {"squared": True}
        yield variant("CrossEntropyDice", "cross-entropy + Dice with all options", make, **options)
    for make in (ADE20K, ALIGNED, FEW, SAME_SIZE):
        yield variant("softmax_moments", "all statistics", make)
        yield variant("pixel_confusion", "confusion", make)
    for make, quick in ((ADE20K, True), (ALIGNED, False), (FEW, False), (SAME_SIZE, False)):
        yield variant("Lovasz", "Lovász", make, quick)
    for make, quick, options in (
        (ADE20K._replace(teacher=()), True, {}),
        (ADE20K._replace(teacher=(64, 64), dtype=FP32), False, {"reduction": "none"}),
        (DEEPLAB._replace(teacher=(), align=True), False, {"reduction": "none"}),
        (ADE20K._replace(teacher=(), labels=(128, 128)), False, {"reduction": "none"}),
        (FEW._replace(teacher=(65, 65)), False, {}),
    ):
        name = f"divergence, {options.get('reduction', 'mean')}, teacher {make.teacher}"
        yield variant("pixel_kl_divergence", name, make, quick, temperature=2.0, **options)


def in_dtype(make: Any, dtype: torch.dtype, n: int, random: Any) -> dict[str, torch.Tensor]:
    inputs = make(n, random)
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def listed_variants() -> Iterator[Case]:
    yield from moments_variants()
    yield from variants_of_images()
    for dtype, layout in product((BF16, FP16, FP32), ("planes", "channels last")):
        make = UPSAMPLED._replace(dtype=dtype, layout=layout)
        case = variant("upsampled_sums", "upsampled sums", make, dtype == BF16, num_classes=19)
        yield case
        alone = case.entry._replace(ours=lambda call=case.entry.ours, **x: call(**x).sums)
        yield Case(alone, case.sample._replace(name=f"{case}, without mean and variance"))
    make = UPSAMPLED._replace(shape=(2, 128, 32, 65), ratio=16)
    yield variant("upsampled_sums", "upsampled sums, 65 columns", make, True, num_classes=19)
    for dtype, align, boxes in ((FP32, False, True), (BF16, True, False), (FP16, False, False)):
        name = f"{dtype}, {'aligned' if align else 'not aligned'}, {'boxes' if boxes else 'no box'}"
        make = Masks((5, 192, 192), dtype=dtype, boxes=boxes)
        options = {"ratios": (5.625, 10), "align_corners": align}
        yield variant("mask_rle", f"masks, {name}", make, boxes, **options)
    for (classes, groups, dim), dtype, positives in (
        ((19, 2, 512), FP32, True),
        ((150, 1, 768), BF16, False),
        ((150, 4, 2048), FP32, True),
        ((1000, 1, 2048), FP32, False),
    ):
        name = f"InfoNCE, {dtype}, {classes} × {groups} × {dim}{', positives' * positives}"
        make = partial(centroids, (classes, groups, dim), positives)
        of_type = partial(in_dtype, make, dtype)
        for eps in (None, 1e-6):
            quick = eps is not None and classes > 19
            yield variant("centroid_info_nce", f"{name}, {eps}", of_type, quick, normalize=eps)


def variants_to_compile() -> Iterator[Case]:
    """Those, and of other operators the first case of the catalogue."""
    listed = [*listed_variants()]
    yield from listed
    known = {operator for case in listed for operator in case.entry.operators}
    for case in cases("all"):
        if not known.issuperset(case.entry.operators[:1]):
            known.update(case.entry.operators)
            yield case


def launch(case: Case) -> None:
    """Forward and backward. Anchors get no gradient: torch would compute it from keys that no
    kernel has written."""
    inputs = case.sample.inputs()
    constant = {name: inputs.pop(name) for name in ("anchors",) if name in inputs}
    with ao.use_backend("triton"):
        evaluate(partial(case.ours, **constant), inputs)


def launch_loss(size: tuple[int, ...], labels: tuple[int, int], sums: bool) -> None:
    """Both directions of plain cross-entropy, without memory; with the sums of probabilities that
    Dice needs."""
    logits = torch.empty(size, dtype=BF16, device="meta")
    classes = torch.empty((size[0], *labels), dtype=UINT8, device="meta")
    options = Options()
    wanted = Wanted(with_lse=True, probability_sums=sums)
    moments = Results(*softmax_moments.softmax_moments(logits, classes, options, wanted))
    gradients = {f"d{name}": getattr(moments, name) for name in GRADIENTS}
    softmax_moments_backward.softmax_moments_backward(
        logits, classes, moments.lse, **gradients, options=options
    )


def launch_keys(size: tuple[int, ...], labels: tuple[int, int]) -> None:
    """Class keys of features of this size, without memory."""
    batch, num_classes, height, width = size
    classes = torch.empty((batch, *labels), dtype=UINT8, device="meta")
    class_keys.class_keys(classes, height, width, num_classes, False, 255)


def native_sizes(
    stride: int, launch: Callable[..., None], *options: bool
) -> Iterator[Callable[[], None]]:
    """What launches the kernels for an image of each of 40 sizes, with a network that gives a logit
    for stride² pixels."""
    sizes = random.Random(0)
    for _ in range(40):
        labels = sizes.randint(200, 1000), sizes.randint(200, 1000)
        low = (math.ceil(n / stride) for n in labels)
        yield partial(launch, (1, 21, *low), labels, *options)


def jobs(quick: bool) -> list[Case]:
    return [x for x in variants_to_compile() if not quick or x.sample.tags]

"""Operators and losses of logits: softmax moments, predictions, divergence, Lovász."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

import anchorops as ao

from ..._ops.kth_largest import kth_largest
from . import formulas
from .budget import FLOOR
from .entry import Entry, Inputs, Sample, of_options, small
from .inputs import F32, in_layout, labels_of, normal, uniform

BF16, F16 = torch.bfloat16, torch.float16
MOMENTS, ARGMAX, HISTOGRAMS = ("softmax_moments",), ("pixel_argmax",), ("probability_histograms",)
OFTEN = ("4×", "1×", "1.5×")  # sizes for which --verify checks all losses without --all
BINS = 2.0**-8  # the floor of Lovász, whose errors are rounded to bins


class Pixels(NamedTuple):
    """Logits and labels of images, volumes or points, which have sizes ()."""

    num_classes: int
    logits: tuple[int, ...]
    labels: tuple[int, ...]
    align: bool = False
    layout: str = "planes"
    dtype: torch.dtype = F32
    steep: float = 0.0  # the logit of a region's class, above the others
    quick: bool = False
    sigmoid: bool = False  # labels of each channel
    label_dtype: torch.dtype | None = None
    half: bool = False  # half of an image is ignored, and labels are int16
    distinct: bool = False  # pixels with two almost equal logits are ignored
    weights: bool = False  # of the pixels
    teacher: tuple[int, ...] | None = None  # its logits' size; () if they are the student's
    batch: int = 2
    scale: float = 2.0  # of the logits

    def __call__(self, n: int, random: Generator) -> Inputs:
        size, label_size = (tuple(n * i for i in x) for x in (self.logits, self.labels))
        size, label_size = (self.batch, self.num_classes, *size), (self.batch, *label_size)
        z = self.scale * normal(*size, random=random)
        if self.steep:
            region = labels_of((self.batch, *size[2:]), self.num_classes, random).clamp(min=0)
            z.scatter_add_(1, region[:, None], torch.full_like(z, self.steep))
        if self.sigmoid:
            channels = (self.batch, self.num_classes, *label_size[1:])
            y = labels_of(channels, 2, random, self.half)
        else:
            y = labels_of(label_size, self.num_classes, random, self.half)
        if self.distinct:
            two = formulas.upsampled(z.double(), label_size[1:]).topk(2, 1).values
            y = torch.where(two[:, 0] - two[:, 1] < 1e-3, -1, y)
        y = y if self.label_dtype is None else y.to(self.label_dtype)
        logits = in_layout(z.to(self.dtype), self.layout)
        if self.teacher is not None:
            teacher = z.flip(1)
            if self.teacher:
                teacher_size = (*size[:2], *(n * i for i in self.teacher))
                teacher = self.scale * normal(*teacher_size, random=random)
            return {"logits": logits, "teacher": teacher.to(self.dtype), "valid": y >= 0}
        if not self.weights:
            return {"logits": logits, "labels": y}
        weights = uniform(*y.shape, random=random)
        weights = weights.masked_fill(weights < 0.1, 0)
        return {"logits": logits, "labels": y, "pixel_weights": weights}


IMAGES = {
    "4×": Pixels(19, (20, 24), (80, 96), quick=True),
    "4×, bfloat16, channels last": Pixels(19, (20, 24), (80, 96), False, "channels last", BF16),
    "4×, cropped, 150 classes": Pixels(150, (12, 17), (48, 68), False, "cropped", F16, quick=True),
    "4×, 150 columns": Pixels(19, (3, 150), (12, 600)),
    "4× and 8×, 150 rows": Pixels(19, (150, 3), (600, 24)),
    "8×, 300 classes": Pixels(300, (5, 6), (40, 48)),
    "33 to 129 aligned": Pixels(19, (33, 17), (129, 65), True, quick=True),
    "64×": Pixels(5, (2, 3), (128, 192)),
    "2×": Pixels(19, (24, 40), (48, 80), dtype=F16),
    "1.5×": Pixels(19, (22, 26), (33, 39), quick=True),
    "1×": Pixels(19, (33, 40), (33, 40), quick=True),
    "1×, cropped": Pixels(19, (33, 40), (33, 40), False, "cropped"),
    "half the size": Pixels(7, (40, 48), (20, 24)),
    "4×, 2 classes": Pixels(2, (20, 24), (80, 96), quick=True),
    "8×, neighbours 40 apart": Pixels(19, (10, 12), (80, 96), steep=40.0),
    "4×, neighbours 300 apart": Pixels(19, (20, 24), (80, 96), steep=300.0, quick=True),
}
BASE = IMAGES["4×"]._replace(distinct=True)
VOLUME, SIGMOIDS = Pixels(5, (4, 5, 6), (9, 12, 12)), BASE._replace(sigmoid=True, distinct=False)
FOUR_TIMES = Pixels(4, (3, 5), (12, 20), half=True)
ANY_SIZE = Pixels(4, (5, 4), (9, 13), half=True)
VOLUMES = Pixels(4, (3, 4, 5), (9, 8, 10), half=True)
CHANNELS = Pixels(3, (3, 5), (12, 20), half=True, sigmoid=True)


def of_images(
    what: str, often: bool = True, weighted: bool = False, **options: Any
) -> Iterator[Sample]:
    """A sample of each of IMAGES. often: quick for those of OFTEN, else for those that are;
    weighted: with class weights."""
    for name, images in IMAGES.items():
        quick = name in OFTEN if often else images.quick
        weight = {"weight": torch.linspace(0.5, 1.5, images.num_classes, device="cpu")}
        yield Sample(
            f"{what}, {name}",
            images,
            {"align_corners": images.align, **options, **(weight if weighted else {})},
            ("all", "quick") if quick else ("all",),
        )


def hidden(n: int, random: Generator) -> Inputs:
    """NaN where only ignored pixels read."""
    inputs = BASE(n, random)
    inputs["logits"][:, :, :1], inputs["labels"][:, :8] = torch.nan, -1
    return inputs


def masked(n: int, random: Generator) -> Inputs:
    """The absent class is −∞."""
    inputs = BASE(n, random)
    inputs["logits"][:, -1] = -torch.inf
    return inputs


def points(n: int, random: Generator) -> Inputs:
    labels = labels_of((700 * n**2,), 19, random)
    return {"logits": normal(700 * n**2, 19, random=random), "labels": labels}


def two_maps(n: int, random: Generator) -> Inputs:
    labels = labels_of((2, 80 * n, 96 * n), 19, random)
    return {"predictions": labels.flip(0).clamp(min=0), "labels": labels}


def thousands(n: int, random: Generator) -> Inputs:
    return {"values": uniform(3000 * n**2, random=random)}


class Loss:
    """A new module for each call: a traced one would keep its terms, tensors of the trace."""

    def __init__(self, make: Callable[..., nn.Module], **always: Any) -> None:
        self.module = partial(make, **always, ignore_index=-1)

    def __call__(
        self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None = None, **options: Any
    ) -> Tensor:
        module = self.module(**options)
        if not logits.is_cpu:  # torch 2.10 does not compile this
            module = module.to(logits.device)
        return module(logits, labels, pixel_weights)


def cross_entropy_dice(
    *, squared: bool = False, per_image: bool = False, **options: Any
) -> ao.CrossEntropyDice:
    cross_entropy = ao.CrossEntropy(**options)
    shared = {name: x for name, x in options.items() if name in ("align_corners", "ignore_index")}
    return ao.CrossEntropyDice(
        cross_entropy, ao.Dice(squared=squared, per_image=per_image, **shared)
    )


def statistics(logits: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor | None, ...]:
    options |= {"squares": True, "pixel_losses": True, "ignore_index": -1}
    return ao.ops.softmax_moments(logits, labels, **options)[: len(formulas.STATISTICS)]


def divergence_of_valid(logits: Tensor, teacher: Tensor, valid: Tensor, **options: Any) -> Tensor:
    return ao.pixel_kl_divergence(logits, teacher, valid.shape[1:], valid=valid, **options)


def largest(logits: Tensor, labels: Tensor, confidence: bool = False, **options: Any) -> Any:
    """Predicted classes may differ where two logits are almost equal: the logits then do not."""
    size, z = labels.shape[1:], logits.detach()
    found: Any = ao.pixel_argmax(z, size, confidence=confidence, **options)
    classes, *confidences = found if confidence else (found,)
    z = formulas.upsampled(z.double(), size, **options).gather(1, classes[:, None])[:, 0]
    return (z, *confidences)


WEIGHT: dict[str, Any] = {"weight": [0.5, 1.0, 2.0, 0.25]}
WEIGHTS = {"weight": torch.tensor(WEIGHT["weight"], device="cpu")}
SHAPED: dict[str, Any] = {"label_smoothing": 0.1, "focal_gamma": 1.5}
OHEM: dict[str, Any] = {"ohem_threshold": 0.3}
PLAIN = Entry(
    "pixel_cross_entropy",
    MOMENTS,
    partial(ao.pixel_cross_entropy, ignore_index=-1),
    formulas.cross_entropy,
    (
        *of_images("cross-entropy", often=False),
        Sample("points", points),
        Sample("NaN where ignored", hidden),
    ),
)
CROSS_ENTROPY = Entry(
    "CrossEntropy",
    MOMENTS,
    Loss(ao.CrossEntropy),
    formulas.cross_entropy,
    (
        Sample("pixel weights", BASE._replace(weights=True)),
        small("CrossEntropy", FOUR_TIMES._replace(weights=True), **SHAPED),
        *of_options(
            "CrossEntropy",
            ANY_SIZE._replace(weights=True),
            WEIGHT | {"label_smoothing": 0.1},
            WEIGHT | {"focal_gamma": 0.7},
            WEIGHT | OHEM | {"ohem_min_kept": 20},
            {"ohem_threshold": 0.01, "ohem_min_kept": 60},
            {"ohem_min_kept": 10**6},
        ),
        *of_options("CrossEntropy of volumes", VOLUMES, {"ohem_min_kept": 100}),
        *of_options(
            "CrossEntropy of bfloat16", ANY_SIZE._replace(dtype=BF16), {"label_smoothing": 0.2}
        ),
    ),
)
DICE = Entry(
    "Dice",
    MOMENTS,
    Loss(ao.Dice),
    formulas.dice,
    (
        small("Dice", ANY_SIZE, squared=True, per_image=True),
        *of_options(
            "Dice",
            FOUR_TIMES,
            WEIGHT | {"squared": True},
            WEIGHT | {"absent": "zero"},
            {"per_image": True, "log": True, "absent": "zero"},
            {"alpha": 0.3, "beta": 0.7, "gamma": 0.75, "smooth": 1.0},
        ),
        *of_options("Dice", CHANNELS, {"sigmoid": True, "squared": True}),
        *of_options("Dice of volumes", VOLUMES._replace(sigmoid=True), {"sigmoid": True}),
    ),
)
LOVASZ = Entry(
    "Lovasz",
    HISTOGRAMS,
    Loss(ao.Lovasz),
    formulas.lovasz,
    (
        small("Lovasz", ANY_SIZE)._replace(floor=BINS),
        *(x._replace(floor=BINS) for x in of_options("Lovasz", ANY_SIZE, {"per_image": True})),
    ),
    exact=False,
)
ENTRIES = [
    Entry(
        "softmax_moments",
        MOMENTS,
        statistics,
        formulas.statistics,
        (
            Sample("all statistics", BASE),
            small("softmax_moments", FOUR_TIMES, per_image=True),
            small("softmax_moments of any size", ANY_SIZE, align_corners=True),
        ),
    ),
    PLAIN,
    PLAIN._replace(
        name="labels of uint8",
        ours=ao.pixel_cross_entropy,
        samples=(Sample("labels of uint8", BASE._replace(label_dtype=torch.uint8)),),
    ),
    PLAIN._replace(
        name="a class of −∞",
        formula=lambda logits, labels: formulas.cross_entropy(logits[:, :-1], labels),
        samples=(Sample("a class of −∞", masked),),
    ),
    PLAIN._replace(
        name="a loss for each pixel",
        ours=partial(ao.pixel_cross_entropy, ignore_index=-1, reduction="none"),
        formula=formulas.loss_of_pixels,
        samples=(
            *of_images("a loss for each pixel"),
            small("pixel_cross_entropy", Pixels(2, (6, 7), (6, 7), half=True)),
            Sample("1×, bfloat16", Pixels(3, (4, 4), (4, 4), dtype=BF16), tags=("kernels",)),
            *of_options(
                "pixel_cross_entropy",
                ANY_SIZE,
                {"reduction": "sum", "label_smoothing": 0.3, "align_corners": True},
                WEIGHTS | {"reduction": "mean"},
                WEIGHTS | {"reduction": "mean", "label_smoothing": 0.3},
                WEIGHTS | {"reduction": "none", "label_smoothing": 0.3},
                on_cpu=False,
            ),
        ),
    ),
    CROSS_ENTROPY,
    CROSS_ENTROPY._replace(
        name="OHEM",
        ignores=False,  # other pixels have no gradient either
        samples=(
            Sample("OHEM", BASE, OHEM),
            Sample(
                "OHEM, pixel weights, smoothing",
                BASE._replace(weights=True),
                OHEM | {"label_smoothing": 0.1},
            ),
            Sample("OHEM, smoothing, focal", BASE, OHEM | SHAPED),
            small(
                "CrossEntropy of hard pixels", FOUR_TIMES._replace(weights=True), ohem_threshold=0.5
            ),
        ),
    ),
    CROSS_ENTROPY._replace(
        name="OHEM of a number",
        operators=(*MOMENTS, "kth_largest"),
        ignores=False,
        samples=(
            Sample("OHEM of a number", BASE, {"ohem_min_kept": 6400}),
            small("CrossEntropy of the hardest", FOUR_TIMES, ohem_min_kept=40),
        ),
    ),
    DICE,
    DICE._replace(
        name="Dice of absent classes",
        ignores=False,
        samples=(
            *of_options("Dice", FOUR_TIMES, WEIGHT | {"absent": "keep"}),
            *of_options(
                "Dice",
                CHANNELS,
                {"sigmoid": True, "per_image": True, "absent": "keep", "smooth": 0.5},
            ),
        ),
    ),
    Entry(
        "CrossEntropyDice",
        MOMENTS,
        Loss(cross_entropy_dice),
        formulas.cross_entropy_dice,
        (
            *of_images("cross-entropy + Dice"),
            *of_images("all options", weighted=True, squared=True, per_image=True, **SHAPED),
            Sample("label smoothing + Dice", BASE, {"label_smoothing": 0.1, "squared": True}),
            Sample("volume, cross-entropy + Dice", VOLUME),
            small("CrossEntropyDice of volumes", VOLUMES, on_cpu=True),
        ),
    ),
    LOVASZ,
    LOVASZ._replace(
        name="Lovasz of many bins",
        ours=Loss(ao.Lovasz, bins=2**16),
        samples=tuple(
            sample._replace(floor=BINS)
            for sample, images in zip(of_images("Lovász"), IMAGES.values(), strict=True)
            if images.quick
        ),
    ),
    LOVASZ._replace(
        name="Lovasz of sigmoids",
        ours=Loss(ao.Lovasz, sigmoid=True, absent="keep"),
        formula=formulas.lovasz_of_sigmoids,
        samples=(small("Lovasz of sigmoids", CHANNELS, on_cpu=True)._replace(floor=BINS),),
    ),
    Entry(
        "pixel_binary_cross_entropy",
        MOMENTS,
        partial(ao.pixel_binary_cross_entropy, ignore_index=-1),
        formulas.binary_cross_entropy,
        (
            *(
                Sample(
                    f"binary cross-entropy, {channels} channels",
                    SIGMOIDS._replace(num_classes=channels),
                    {"pos_weight": weight},
                )
                for channels, weight in ((1, 1.0), (3, 2.5))
            ),
            small("pixel_binary_cross_entropy", CHANNELS, pos_weight=2.5),
            *of_options(
                "pixel_binary_cross_entropy",
                CHANNELS,
                *({"reduction": name, "pos_weight": [1.0, 3.0, 0.5]} for name in ("sum", "none")),
            ),
        ),
    ),
    Entry(
        "BinaryCrossEntropy",
        MOMENTS,
        Loss(ao.BinaryCrossEntropy),
        formulas.binary_cross_entropy_of,
        tuple(
            of_options(
                "BinaryCrossEntropy",
                CHANNELS._replace(weights=True),
                {"pos_weight": [1.0, 3.0, 0.5], "label_smoothing": 0.2},
                {"pos_weight": 1 / 3, "focal_gamma": 0.5},
                {"pos_weight": [1.0, 3.0, 0.5], "ohem_threshold": 0.4},
                {"ohem_threshold": 0.2, "ohem_min_kept": 300},
                {"ohem_min_kept": 100},
            )
        ),
    ),
    Entry(
        "pixel_kl_divergence",
        ("pixel_kl_divergence",),
        divergence_of_valid,
        formulas.kl_divergence,
        (
            Sample("divergence, temperature 3", BASE._replace(teacher=()), {"temperature": 3.0}),
            Sample("divergence, small teacher", BASE._replace(teacher=(7, 9))),
            Sample("divergence, 1×", IMAGES["1×"]._replace(teacher=())),
            Sample("a divergence for each pixel", BASE._replace(teacher=()), {"reduction": "none"}),
            Sample("volume, divergence", VOLUME._replace(teacher=())),
            small("pixel_kl_divergence", FOUR_TIMES._replace(teacher=(3, 5)), temperature=2.0),
            *of_options(
                "pixel_kl_divergence",
                ANY_SIZE._replace(teacher=(6, 9)),
                *({"reduction": x, "align_corners": True} for x in ("mean", "sum", "none")),
                on_cpu=False,
            ),
            small(
                "pixel_kl_divergence of volumes",
                VOLUMES._replace(teacher=(3, 4, 5)),
                on_cpu=True,
                temperature=2.0,
            ),
        ),
    ),
    Entry(
        "pixel_argmax",
        ARGMAX,
        largest,
        formulas.largest,
        tuple(of_images("argmax")),
        differentiable=False,
    ),
    Entry(
        "pixel_argmax with confidence",
        (*ARGMAX, *MOMENTS),
        partial(largest, confidence=True),
        partial(formulas.largest, confidence=True),
        (
            # e^−loss: the error of a loss, which is relative to log Σ e^z
            Sample("argmax, confidence", BASE, floor=8 * FLOOR),
            small("pixel_argmax", FOUR_TIMES),
            small("pixel_argmax of volumes", VOLUMES, on_cpu=True),
            *of_options("pixel_argmax with confidence", ANY_SIZE, {"align_corners": True}),
        ),
        differentiable=False,
        ignores=False,
    ),
    Entry(
        "pixel_confusion",
        (*ARGMAX, "confusion"),
        partial(ao.pixel_confusion, ignore_index=-1),
        formulas.confusion_of_logits,
        (Sample("confusion of logits", BASE), small("pixel_confusion", FOUR_TIMES)),
        differentiable=False,
        ignores=False,
    ),
    Entry(
        "confusion",
        ("confusion",),
        partial(ao.confusion, ignore_index=-1),
        formulas.confusion,
        (Sample("confusion", two_maps, {"num_classes": 19}),),
        differentiable=False,
    ),
    Entry(
        "kth_largest",
        ("kth_largest",),
        lambda values, k: kth_largest(values.detach(), k),
        lambda values, k: values.detach().topk(k).values[-1],
        (Sample("k-th largest", thousands, {"k": 700}),),
        differentiable=False,
    ),
]

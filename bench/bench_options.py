"""Every option of the pixel losses against what people write: forward and backward, of
pseudo-labels forward.

    pytest bench/bench_options.py --seconds 0.25 --rows ROWS.json [-k OPTION] [--eager]

Rows are options, columns the number of classes K (for sigmoids: of channels) and the output stride
of the logits; volumes are 32³ → 128³ and 64³ → 128³. A cell is the alternative's time divided by
ours: above 1 we are faster. Ours and the alternatives take turns; medians are compared. Our
gradient is compared with that of torch's formula first. Alternatives are torch's functions after
F.interpolate, and the classes of segmentation_models.pytorch and MONAI; for most options, in the
cells of COMPILED, also torch.compile of torch's formula with F.interpolate, which takes long to
compile (--eager leaves it out). Labels are int64; where an option says so uint8, as masks are
stored. Logits are float32; where an option says so bfloat16, as under autocast, and the
alternatives upsample them in float32. They are random numbers, or those of a small network that was
trained on the labels: few errors, and steep between classes.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from bench_pixel_losses import teacher_of
from cases import trained_logits
from torch import Tensor

import anchorops as ao
from anchorops.catalogue.formulas import upsampled
from anchorops.catalogue.usual import (
    binary_cross_entropy,
    cross_entropy,
    cross_entropy_dice,
    dice,
    kl_divergence,
    lovasz,
)
from anchorops.measure import Run, example_labels

monai = pytest.importorskip("monai.losses")
smp = pytest.importorskip("segmentation_models_pytorch.losses")

RATIOS, CLASSES = (1, 2, 4, 8), (2, 19, 150)
COMPILED = {(1, 1), (2, 1), (19, 4), (20, 4)}  # K, ratio
MOST_IMAGES, MOST_LOGITS = 4, 10e6  # of a batch, at full resolution; one image or more
SIZE, TINY = 512, 32  # of the labels
BOUND, GAMMA, SMOOTHING = 0.7, 2.0, 0.1

Formula = Callable[..., Tensor]  # of logits and labels


class Option(NamedTuple):
    """ours: from logits and labels. alternatives: from full-resolution logits and labels. Labels of
    sigmoids have the logits' channels, 0 or 1; of masks they are uint8. Half: bfloat16 logits.
    Trained: logits of a trained network."""

    ours: Formula
    alternatives: dict[str, Formula]
    sigmoid: bool = False
    masks: bool = False
    half: bool = False
    trained: bool = False
    ratios: tuple[int, ...] = RATIOS
    rounds: int | None = None  # None: those of the command
    compiled: bool = True  # whether torch's formula is compiled too, in the cells of COMPILED
    upsamples: bool = False  # whether the alternatives upsample the logits themselves
    ties: bool = False  # torch's choice among equal losses is another one: it is not compared


def focal(z: Tensor, y: Tensor, of: Formula = cross_entropy) -> Tensor:
    losses = of(z, y, reduction="none")
    return ((1 - (-losses).exp()) ** GAMMA * losses).mean()


def ohem(z: Tensor, y: Tensor, of: Formula = cross_entropy) -> Tensor:
    losses = of(z, y, reduction="none")
    return losses[losses.detach() >= -math.log(BOUND)].mean()


def ohem_min_kept(z: Tensor, y: Tensor) -> Tensor:
    losses = cross_entropy(z, y, reduction="none").flatten()
    return losses.topk(y.numel() // 16).values.mean()


def kept(x: Tensor, y: Tensor) -> Tensor:
    return ao.CrossEntropy(ohem_min_kept=y.numel() // 16)(x, y)


def pixel_weights(y: Tensor) -> Tensor:
    return (y == 0).float() + 0.5


def weighted(z: Tensor, y: Tensor, of: Formula = cross_entropy) -> Tensor:
    weights = pixel_weights(y)
    return (of(z, y, reduction="none") * weights).sum() / weights.sum()


def binary_smoothed(z: Tensor, y: Tensor) -> Tensor:
    return binary_cross_entropy(z, y.to(z.dtype) * (1 - SMOOTHING) + SMOOTHING / 2)


def binary_dice(z: Tensor, y: Tensor) -> Tensor:
    p, axes = z.sigmoid(), (0, 2, 3)
    return 1 - (2 * (p * y).sum(axes) / (p.sum(axes) + y.sum(axes)).clamp(min=1e-7)).mean()


def pseudo_labels(z: Tensor, y: Tensor) -> Tensor:
    return z.detach().softmax(1).max(1).values


def our_pseudo_labels(x: Tensor, y: Tensor) -> Tensor:
    return ao.pixel_argmax(x.detach(), y.shape[1:], confidence=True)[1]


def our_divergence(x: Tensor, y: Tensor) -> Tensor:
    return ao.pixel_kl_divergence(x, teacher_of(x), (y.shape[1], y.shape[2]))


def with_floats(loss: Formula) -> Formula:
    return lambda z, y: loss(z, y.to(z.dtype))


def with_channel(loss: Formula) -> Formula:
    return lambda z, y: loss(z, y[:, None])


def class_weights(z: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, z.shape[1], device=z.device)


DICE = ao.Dice(absent="keep")  # as the formula; smp and MONAI differ for absent classes

OPTIONS: dict[str, Option] = {
    "cross-entropy": Option(ao.CrossEntropy(), {"torch": cross_entropy}),
    "class weights": Option(
        lambda x, y: ao.pixel_cross_entropy(x, y, weight=class_weights(x)),
        {"torch": lambda z, y: cross_entropy(z, y, weight=class_weights(z))},
    ),
    "label smoothing": Option(
        ao.CrossEntropy(label_smoothing=SMOOTHING),
        {
            "torch": partial(cross_entropy, label_smoothing=SMOOTHING),
            "smp": smp.SoftCrossEntropyLoss(smooth_factor=SMOOTHING),
        },
    ),
    "focal": Option(
        ao.CrossEntropy(focal_gamma=GAMMA),
        {
            "torch": focal,
            "MONAI": with_channel(monai.FocalLoss(use_softmax=True, to_onehot_y=True, gamma=GAMMA)),
        },
    ),
    "OHEM, threshold": Option(ao.CrossEntropy(ohem_threshold=BOUND), {"torch": ohem}),
    "OHEM, largest": Option(kept, {"torch": ohem_min_kept}, ties=True),
    "pixel weights": Option(
        lambda x, y: ao.CrossEntropy()(x, y, pixel_weights(y)), {"torch": weighted}
    ),
    "Dice": Option(
        DICE,
        {
            "torch": dice,
            "smp": smp.DiceLoss("multiclass"),
            "MONAI": with_channel(monai.DiceLoss(softmax=True, to_onehot_y=True, batch=True)),
        },
    ),
    "Lovász": Option(
        ao.Lovasz(),
        {"torch": lovasz, "smp": smp.LovaszLoss("multiclass")},
        ratios=(4,),
        rounds=5,  # of up to half a minute
        ties=True,  # errors are rounded to bins
    ),
    "cross-entropy + Dice": Option(ao.CrossEntropyDice(dice=DICE), {"torch": cross_entropy_dice}),
    "pseudo-labels": Option(our_pseudo_labels, {"torch": pseudo_labels}),
    "divergence": Option(
        our_divergence, {"torch": lambda x, y: kl_divergence(x, y, teacher_of(x))}, upsamples=True
    ),
    "sigmoid: cross-entropy": Option(
        ao.BinaryCrossEntropy(),
        {"torch": binary_cross_entropy, "smp": with_floats(smp.SoftBCEWithLogitsLoss())},
        sigmoid=True,
    ),
    "sigmoid: pos_weight": Option(
        ao.BinaryCrossEntropy(2.0),
        {"torch": lambda z, y: binary_cross_entropy(z, y, pos_weight=torch.tensor(2.0))},
        sigmoid=True,
        compiled=False,
    ),
    "sigmoid: label smoothing": Option(
        ao.BinaryCrossEntropy(label_smoothing=SMOOTHING),
        {
            "torch": binary_smoothed,
            "smp": with_floats(smp.SoftBCEWithLogitsLoss(smooth_factor=SMOOTHING / 2)),
        },
        sigmoid=True,
        compiled=False,
    ),
    "sigmoid: OHEM, threshold": Option(
        ao.BinaryCrossEntropy(ohem_threshold=BOUND),
        {"torch": partial(ohem, of=binary_cross_entropy)},
        sigmoid=True,
        compiled=False,
    ),
    "sigmoid: pixel weights": Option(
        lambda x, y: ao.BinaryCrossEntropy()(x, y, pixel_weights(y)),
        {"torch": partial(weighted, of=binary_cross_entropy)},
        sigmoid=True,
        compiled=False,
    ),
    "sigmoid: focal": Option(
        ao.BinaryCrossEntropy(focal_gamma=GAMMA),
        {
            "torch": partial(focal, of=binary_cross_entropy),
            "smp": with_floats(smp.FocalLoss("multilabel", gamma=GAMMA)),
        },
        sigmoid=True,
    ),
    "sigmoid: Dice": Option(
        ao.Dice(sigmoid=True),
        {
            "torch": binary_dice,
            "smp": smp.DiceLoss("multilabel"),
            "MONAI": monai.DiceLoss(sigmoid=True, batch=True),
        },
        sigmoid=True,
    ),
}
OPTIONS |= {
    f"{name}, uint8": OPTIONS[name]._replace(masks=True)
    for name in ("sigmoid: cross-entropy", "sigmoid: Dice")
}

OPTIONS |= {
    f"{name}, trained": OPTIONS[name]._replace(trained=True, ratios=(4,), compiled=False)
    for name in ("cross-entropy", "cross-entropy + Dice", "Lovász")
}

VOLUMES = {  # classes and ratio of each option; volumes of the second are several slabs
    "cross-entropy": ((14, 4), (30, 2)),
    "Dice": ((14, 4),),
    "cross-entropy + Dice": ((14, 4),),
    "pseudo-labels": ((14, 4), (30, 2)),
}
OPTIONS |= {f"{name}, bf16": OPTIONS[name]._replace(half=True) for name in VOLUMES}
VOLUMES |= {f"{name}, bf16": sizes for name, sizes in VOLUMES.items()}


class Cell(NamedTuple):
    """ratio: the output stride of the logits. axes: of the labels of an image."""

    option: str
    num_classes: int
    ratio: int
    axes: int = 2

    def __str__(self) -> str:
        volume = ", volume" * (self.axes == 3)
        return f"{self.option}, K{self.num_classes}, 1:{self.ratio}{volume}"


def cells() -> Iterator[Cell]:
    for name, sizes in VOLUMES.items():
        for num_classes, ratio in sizes:
            yield Cell(name, num_classes, ratio, axes=3)
    for name, option in OPTIONS.items():
        if option.half:
            continue
        for num_classes in (1, 20) if option.sigmoid else CLASSES:
            for ratio in option.ratios:
                yield Cell(name, num_classes, ratio)


def inputs(cell: Cell, size: int) -> tuple[Tensor, Tensor]:
    option, num_classes, ratio = OPTIONS[cell.option], cell.num_classes, cell.ratio
    if cell.axes == 3:
        size //= 4
        logits = torch.randn(1, num_classes, *(size // ratio,) * 3)
        logits = logits.to(torch.bfloat16 if option.half else logits.dtype).requires_grad_()
        labels = example_labels((1, size**2, size), num_classes, "coherent").clamp(min=0)
        return logits, labels.view(1, *(size,) * 3)
    batch = max(1, min(MOST_IMAGES, int(MOST_LOGITS / (num_classes * size**2))))
    logits = torch.randn(batch, num_classes, size // ratio, size // ratio, requires_grad=True)
    if option.sigmoid:
        labels = example_labels((batch * num_classes, size, size), 2, "coherent").clamp(min=0)
        labels = labels.view(batch, num_classes, size, size)
        return logits, labels.to(torch.uint8) if option.masks else labels
    labels = example_labels((batch, size, size), num_classes, "coherent").clamp(min=0)
    return trained_logits(labels, num_classes, ratio) if option.trained else logits, labels


@pytest.mark.rank(2)
@pytest.mark.parametrize("cell", [*cells()], ids=str)
def test_option(bench, cell: Cell):
    option = OPTIONS[cell.option]
    logits, labels = inputs(cell, TINY if bench.tiny else SIZE)
    logits = logits.detach().to(bench.device).requires_grad_()
    labels = labels.to(bench.device)
    size = labels.shape[-cell.axes :]

    def whole(formula: Formula) -> Formula:
        return formula if option.upsamples else lambda x, y: formula(upsampled(x.float(), size), y)

    formulas = {"ours": option.ours}
    formulas |= {name: whole(formula) for name, formula in option.alternatives.items()}
    if option.compiled and (cell.num_classes, cell.ratio) in COMPILED and not bench.eager:
        formulas["compiled"] = torch.compile(formulas["torch"], dynamic=False)

    def run_of(formula: Formula) -> Run:
        def run() -> tuple[Tensor, ...]:
            value = formula(logits, labels)
            return torch.autograd.grad(value, logits) if value.requires_grad else (value,)

        return run

    runs = {name: run_of(formula) for name, formula in formulas.items()}
    if not option.ties:
        bench.check(runs["ours"](), runs["torch"](), "bf16" if option.half else "fp32")
    row = {**cell._asdict(), "batch": logits.shape[0]}
    bench.record_in_turns(runs, row, option.rounds)

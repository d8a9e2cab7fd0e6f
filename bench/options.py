"""Every option of the pixel losses against what people write, on the CPU: forward and backward, of
pseudo-labels forward.

    python bench/options.py [--out ROWS.json] [--only OPTION] [--axes 3] [--rounds 10]

Rows are options, columns the number of classes K (for sigmoids: of channels) and the ratio of the
labels' size to that of the logits; volumes are 32³ → 128³ and 64³ → 128³. A cell is the rival's
time divided by ours: above 1 we are faster. Ours and the rivals take turns for `--seconds`,
`--rounds` times or more; medians are compared. Rivals are torch's functions after F.interpolate,
and the classes of segmentation_models.pytorch and MONAI; for most options, in the cells of
COMPILED, also torch.compile of torch's formula with F.interpolate, which takes long to compile
(--eager leaves it out). Labels are int64; where an option says so uint8, as masks are stored.
Logits are float32; where an option says so bfloat16, as under autocast, and the rivals upsample
them in float32.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.losses.dice import DiceLoss as MonaiDice
from monai.losses.focal_loss import FocalLoss as MonaiFocal
from plot_options import gain
from record import head_of, save
from segmentation_models_pytorch import losses as smp
from torch import Tensor

import anchorops as ao
from anchorops.measure import OtherProcesses, example_labels

RATIOS, CLASSES = (1, 2, 4, 8), (2, 19, 150)
COMPILED = {(1, 1), (2, 1), (19, 4), (20, 4)}  # K, ratio
MOST_IMAGES, MOST_LOGITS = 4, 10e6  # of a batch, at the labels' size; one image or more
WARM_UP = 2
BOUND, GAMMA, SMOOTHING = 0.7, 2.0, 0.1

Formula = Callable[[Tensor, Tensor], Tensor]


class Option(NamedTuple):
    """ours: from logits and labels. rivals: from logits of the labels' size and labels. Labels of
    sigmoids have the logits' channels, 0 or 1; of masks they are uint8. Half: bfloat16 logits."""

    ours: Formula
    rivals: dict[str, Formula]
    sigmoid: bool = False
    masks: bool = False
    half: bool = False
    compiled: bool = True  # whether torch's formula is compiled too, in the cells of COMPILED
    upsamples: bool = False  # whether the rivals upsample the logits themselves


def ce(z: Tensor, y: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(z, y, **options)  # pyright: ignore[reportArgumentType]


def focal(z: Tensor, y: Tensor) -> Tensor:
    losses = ce(z, y, reduction="none")
    return ((1 - (-losses).exp()) ** GAMMA * losses).mean()


def ohem(z: Tensor, y: Tensor) -> Tensor:
    losses = ce(z, y, reduction="none")
    return losses[losses.detach() >= -math.log(BOUND)].mean()


def ohem_kept(z: Tensor, y: Tensor) -> Tensor:
    losses = ce(z, y, reduction="none").flatten()
    return losses.topk(y.numel() // 16).values.mean()


def kept(x: Tensor, y: Tensor) -> Tensor:
    return ao.CrossEntropy(ohem_kept=y.numel() // 16)(x, y)


def pixel_weights(y: Tensor) -> Tensor:
    return (y == 0).float() + 0.5


def weighted(z: Tensor, y: Tensor) -> Tensor:
    weights = pixel_weights(y)
    return (ce(z, y, reduction="none") * weights).sum() / weights.sum()


def dice(z: Tensor, y: Tensor) -> Tensor:
    p, truth = z.softmax(1), F.one_hot(y, z.shape[1]).movedim(-1, 1)
    axes = (0, *range(2, z.dim()))
    overlaps = (p * truth).sum(axes)
    return 1 - (2 * overlaps / (p.sum(axes) + truth.sum(axes)).clamp(min=1e-7)).mean()


def bce(z: Tensor, y: Tensor, **options: object) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y.to(z.dtype), **options)  # pyright: ignore


def binary_smoothed(z: Tensor, y: Tensor) -> Tensor:
    return bce(z, y.to(z.dtype) * (1 - SMOOTHING) + SMOOTHING / 2)


def binary_ohem(z: Tensor, y: Tensor) -> Tensor:
    losses = bce(z, y, reduction="none")
    return losses[losses.detach() >= -math.log(BOUND)].mean()


def binary_weighted(z: Tensor, y: Tensor) -> Tensor:
    weights = pixel_weights(y)
    return (bce(z, y, reduction="none") * weights).sum() / weights.sum()


def binary_focal(z: Tensor, y: Tensor) -> Tensor:
    losses = bce(z, y, reduction="none")
    return ((1 - (-losses).exp()) ** GAMMA * losses).mean()


def binary_dice(z: Tensor, y: Tensor) -> Tensor:
    p, axes = z.sigmoid(), (0, 2, 3)
    return 1 - (2 * (p * y).sum(axes) / (p.sum(axes) + y.sum(axes)).clamp(min=1e-7)).mean()


def pseudo_labels(z: Tensor, y: Tensor) -> Tensor:
    return z.detach().softmax(1).max(1).values


def our_pseudo_labels(x: Tensor, y: Tensor) -> Tensor:
    return ao.pixel_argmax(x.detach(), y.shape[1:], confidence=True)[1]


def divergence(x: Tensor, y: Tensor) -> Tensor:
    """From a teacher with the classes in reverse order."""
    ratio = y.shape[1] // x.shape[2]
    z, teacher = upsampled(x, ratio), upsampled(x.detach().flip(1), ratio).log_softmax(1)
    losses = F.kl_div(z.log_softmax(1), teacher, reduction="none", log_target=True)
    return losses.sum(1).mean()


def our_divergence(x: Tensor, y: Tensor) -> Tensor:
    return ao.pixel_kl_divergence(x, x.detach().flip(1), (y.shape[1], y.shape[2]))


def library(make: Callable[[], torch.nn.Module]) -> Formula:
    return lambda z, y: make()(z, y)


def of_floats(make: Callable[[], torch.nn.Module]) -> Formula:
    return lambda z, y: make()(z, y.to(z.dtype))


def monai_dice(z: Tensor, y: Tensor) -> Tensor:
    return MonaiDice(softmax=True, to_onehot_y=True, batch=True)(z, y[:, None])


def monai_focal(z: Tensor, y: Tensor) -> Tensor:
    return MonaiFocal(use_softmax=True, to_onehot_y=True, gamma=GAMMA)(z, y[:, None])


def class_weights(z: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, z.shape[1])


OPTIONS: dict[str, Option] = {
    "cross-entropy": Option(ao.CrossEntropy(), {"torch": ce}),
    "class weights": Option(
        lambda x, y: ao.pixel_cross_entropy(x, y, weight=class_weights(x)),
        {"torch": lambda z, y: ce(z, y, weight=class_weights(z))},
    ),
    "label smoothing": Option(
        ao.CrossEntropy(label_smoothing=SMOOTHING),
        {
            "torch": lambda z, y: ce(z, y, label_smoothing=SMOOTHING),
            "smp": library(lambda: smp.SoftCrossEntropyLoss(smooth_factor=SMOOTHING)),
        },
    ),
    "focal": Option(ao.CrossEntropy(focal_gamma=GAMMA), {"torch": focal, "MONAI": monai_focal}),
    "OHEM, threshold": Option(ao.CrossEntropy(ohem=BOUND), {"torch": ohem}),
    "OHEM, largest": Option(kept, {"torch": ohem_kept}),
    "pixel weights": Option(
        lambda x, y: ao.CrossEntropy()(x, y, pixel_weights(y)), {"torch": weighted}
    ),
    "Dice": Option(
        ao.Dice(),
        {"torch": dice, "smp": library(lambda: smp.DiceLoss("multiclass")), "MONAI": monai_dice},
    ),
    "cross-entropy + Dice": Option(
        ao.CrossEntropyDice(), {"torch": lambda z, y: ce(z, y) + dice(z, y)}
    ),
    "pseudo-labels": Option(our_pseudo_labels, {"torch": pseudo_labels}),
    "divergence": Option(our_divergence, {"torch": divergence}, upsamples=True),
    "sigmoid: cross-entropy": Option(
        ao.BinaryCrossEntropy(),
        {"torch": bce, "smp": of_floats(lambda: smp.SoftBCEWithLogitsLoss())},
        sigmoid=True,
    ),
    "sigmoid: pos_weight": Option(
        ao.BinaryCrossEntropy(2.0),
        {"torch": lambda z, y: bce(z, y, pos_weight=torch.tensor(2.0))},
        sigmoid=True,
        compiled=False,
    ),
    "sigmoid: label smoothing": Option(
        ao.BinaryCrossEntropy(label_smoothing=SMOOTHING),
        {
            "torch": binary_smoothed,
            "smp": of_floats(lambda: smp.SoftBCEWithLogitsLoss(smooth_factor=SMOOTHING / 2)),
        },
        sigmoid=True,
        compiled=False,
    ),
    "sigmoid: OHEM, threshold": Option(
        ao.BinaryCrossEntropy(ohem=BOUND), {"torch": binary_ohem}, sigmoid=True, compiled=False
    ),
    "sigmoid: pixel weights": Option(
        lambda x, y: ao.BinaryCrossEntropy()(x, y, pixel_weights(y)),
        {"torch": binary_weighted},
        sigmoid=True,
        compiled=False,
    ),
    "sigmoid: focal": Option(
        ao.BinaryCrossEntropy(focal_gamma=GAMMA),
        {"torch": binary_focal, "smp": of_floats(lambda: smp.FocalLoss("multilabel", gamma=GAMMA))},
        sigmoid=True,
    ),
    "sigmoid: Dice": Option(
        ao.Dice(sigmoid=True),
        {
            "torch": binary_dice,
            "smp": library(lambda: smp.DiceLoss("multilabel")),
            "MONAI": library(lambda: MonaiDice(sigmoid=True, batch=True)),
        },
        sigmoid=True,
    ),
}
OPTIONS |= {
    f"{name}, uint8": OPTIONS[name]._replace(masks=True)
    for name in ("sigmoid: cross-entropy", "sigmoid: Dice")
}

VOLUMES = {  # classes and ratio of each option; volumes of the second are several slabs
    "cross-entropy": ((14, 4), (30, 2)),
    "Dice": ((14, 4),),
    "cross-entropy + Dice": ((14, 4),),
    "pseudo-labels": ((14, 4), (30, 2)),
}
OPTIONS |= {f"{name}, bf16": OPTIONS[name]._replace(half=True) for name in VOLUMES}
VOLUMES |= {f"{name}, bf16": sizes for name, sizes in VOLUMES.items()}


def cells() -> Iterator[tuple[str, int, int, int]]:
    """Option, classes, ratio and axes of the labels of an image."""
    for name, sizes in VOLUMES.items():
        for num_classes, ratio in sizes:
            yield name, num_classes, ratio, 3
    for name, option in OPTIONS.items():
        if option.half:
            continue
        for num_classes in (1, 20) if option.sigmoid else CLASSES:
            for ratio in RATIOS:
                yield name, num_classes, ratio, 2


def inputs(
    option: Option, num_classes: int, ratio: int, axes: int, size: int
) -> tuple[Tensor, Tensor]:
    if axes == 3:
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
    return logits, example_labels((batch, size, size), num_classes, "coherent").clamp(min=0)


def upsampled(x: Tensor, ratio: int) -> Tensor:
    mode = "bilinear" if x.dim() == 4 else "trilinear"
    return x if ratio == 1 else F.interpolate(x.float(), scale_factor=ratio, mode=mode)


def run(formula: Formula, logits: Tensor, labels: Tensor) -> None:
    value = formula(logits, labels)
    if value.requires_grad:
        torch.autograd.grad(value, logits)


def measured(
    name: str, num_classes: int, ratio: int, axes: int, options: argparse.Namespace
) -> dict:
    """The median seconds of ours and each rival."""
    option = OPTIONS[name]
    logits, labels = inputs(option, num_classes, ratio, axes, options.size)
    formulas: dict[str, Formula] = {"ours": option.ours}
    rivals = dict(option.rivals)
    if option.compiled and (num_classes, ratio) in COMPILED and not options.eager:
        rivals["compiled"] = option.rivals["torch"]
    for rival, formula in rivals.items():

        def whole(x: Tensor, y: Tensor, formula: Formula = formula) -> Tensor:
            return formula(x if option.upsamples else upsampled(x, ratio), y)

        formulas[rival] = torch.compile(whole, dynamic=False) if rival == "compiled" else whole
    seconds: dict[str, list[float]] = {rival: [] for rival in formulas}
    for _ in range(WARM_UP):
        for formula in formulas.values():
            run(formula, logits, labels)
    processes, end = OtherProcesses(logits.device), time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(seconds["ours"]) < options.rounds:
        for rival, formula in formulas.items():
            start = time.perf_counter()
            run(formula, logits, labels)
            seconds[rival].append(time.perf_counter() - start)
    return {
        "option": name,
        "num_classes": num_classes,
        "ratio": ratio,
        "axes": axes,
        "batch": logits.shape[0],
        "rounds": len(seconds["ours"]),
        "seconds": {rival: median(times) for rival, times in seconds.items()},
        "quartiles": {rival: quartiles(times) for rival, times in seconds.items()},
        "minimum": {rival: min(times) for rival, times in seconds.items()},
        "others": processes.cores(),
    }


def quartiles(times: list[float]) -> list[float]:
    q1, _, q3 = quantiles(times if len(times) > 1 else 2 * times, n=4, method="inclusive")
    return [q1, q3]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/options.json"))
    parser.add_argument("--rounds", type=int, default=10, help="of each cell, at least")
    parser.add_argument("--seconds", type=float, default=0.25, help="of each cell, at least")
    parser.add_argument("--size", type=int, default=512, help="of the labels")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--only", default="", help="options whose names contain this")
    parser.add_argument("--axes", type=int, choices=(2, 3), help="images or volumes alone")
    options = parser.parse_args()
    memory = torch.empty(2**28)  # new memory is slow at first
    for _ in range(8):
        memory.fill_(1.0)
    del memory
    head, rows = head_of(torch.device("cpu")), []
    for name, num_classes, ratio, axes in cells():
        if options.only not in name or options.axes not in (None, axes):
            continue
        row = measured(name, num_classes, ratio, axes, options)
        rows.append(row)
        times = ", ".join(f"{rival} {1e3 * s:.1f} ms" for rival, s in row["seconds"].items())
        print(f"{name}, K{num_classes}, 1:{ratio}: {gain(row):.2f}; {times}", flush=True)
        save(options.out, "options", head, rows)


if __name__ == "__main__":
    main()

"""Cases of softmax moments with all options, of any layout, beside torch's formula."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

import anchorops as ao
from anchorops._moments import Options, SoftmaxMoments, Wanted, statistics_dtype
from anchorops._ops.softmax_moments import moments_of
from anchorops.doctor.catalogue import Case, Entry, Inputs, Sample, formulas
from anchorops.doctor.catalogue.budget import FLOOR
from anchorops.doctor.catalogue.pixels import Pixels
from tests.helpers.cpu_kernels import in_layout
from tests.helpers.operators import results

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FLOATING = ("losses", "intersections", "probability_sums", "squares", "pixel_losses", "used")
ALL = ("correct", "probability_sums", "squares", "pixel_losses")
CE = ()  # the cross-entropy needs only counts and losses


def names_of(
    statistics: Sequence[str],
    pixel_weights: Tensor | None = None,
    min_loss: float | None = None,
    **_,
) -> list[str]:
    names = {"counts", "losses", "divisor", *statistics}
    names |= {"intersections"} if "probability_sums" in statistics else set()
    names |= {"used"} if min_loss is not None or pixel_weights is not None else set()
    return [name for name in SoftmaxMoments._fields if name in names]


def detached(results: Sequence[Tensor], names: list[str], through: Sequence[str]) -> list[Tensor]:
    """Those that are not in `through` have no gradient."""
    pairs = zip(results, names, strict=True)
    return [x if name in through else x.detach() for x, name in pairs]


def ours(
    logits: Tensor,
    labels: Tensor,
    pixel_weights: Tensor | None = None,
    *,
    statistics: Sequence[str],
    through: Sequence[str] = FLOATING,
    **options: Any,
) -> list[Tensor]:
    names = names_of(statistics, pixel_weights, **options)
    for name in {"true_weights", "all_weights"} & options.keys():
        options[name] = options[name].to(logits.device, statistics_dtype(logits.dtype))
    wanted = Wanted(options.pop("per_image", False), **dict.fromkeys(statistics, True))
    given = Options(pixel_weights=pixel_weights, ignore_index=-1, **options)
    moments = moments_of("test", logits, labels, given, wanted)
    return detached([x for x in moments if x is not None], names, through)


def formula(
    logits: Tensor,
    labels: Tensor,
    pixel_weights: Tensor | None = None,
    *,
    statistics: Sequence[str],
    through: Sequence[str] = FLOATING,
    **options: Any,
) -> list[Tensor]:
    names = names_of(statistics, pixel_weights, **options)
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    options["pixel_weights"] = pixel_weights
    return detached(formulas.statistics(logits, labels, names=names, **options), names, through)


MOMENTS = Entry("softmax_moments", ("softmax_moments",), ours, formula)


def make(
    pixels: Pixels, channels: int, layout: str, coherent: bool, n: int, random: Generator
) -> Inputs:
    """Some labels are out of range; pixels with two almost equal logits are ignored. The weights of
    pixels are not contiguous, and NaN where they are ignored."""
    inputs = pixels(n, random)
    z, labels = inputs["logits"], inputs["labels"].long()
    if coherent:
        row, column = (torch.arange(n, device="cpu") // 8 * 8 for n in labels.shape[1:])
        labels = labels[:, row[:, None], column]
    if labels.numel() > 3:
        labels.view(-1)[:3] = torch.tensor([255, -1, pixels.num_classes])
    with torch.device("cpu"):
        inputs["logits"] = z = in_layout(z[:, :channels], layout)[0]
    both = torch.cat([torch.zeros_like(z), z], 1) if channels == 1 else z
    both = formulas.upsampled(both.double(), labels.shape[1:], pixels.align)
    largest = both.topk(2, 1).values
    almost_equal = largest[:, 0] - largest[:, 1] < 1e-6 * (1 + largest[:, 0].abs())
    labels = torch.where(almost_equal, -1, labels)
    inputs["labels"] = labels.to(pixels.label_dtype or torch.int64)
    if pixels.weights:
        valid = (labels >= 0) & (labels < pixels.num_classes)
        weights = torch.where(valid, inputs["pixel_weights"], torch.nan)
        weights = weights.to(statistics_dtype(pixels.dtype))
        inputs["pixel_weights"] = weights.repeat_interleave(2, -1)[..., ::2]
    return inputs


def moments(
    size: tuple[int, ...],
    pixels: tuple[int, ...],
    dtype: torch.dtype = F32,
    align_corners: bool = False,
    layout: str = "contiguous",
    *,
    coherent: bool = False,
    label_dtype: torch.dtype | None = None,
    statistics: Sequence[str] = ALL,
    scale: float = 3.0,
    weights_by: str = "",
    pixel_weights: bool = False,
    floor: float = 0.0,
    **options: Any,
) -> Case:
    """size: of the logits; one channel has the two classes of a sigmoid. pixels: of the labels,
    without the batch. coherent: labels in squares of one class. weights_by: true_weights and
    all_weights, by "class" or "image and class". floor: of the error, instead of the usual."""
    (batch, channels), num_classes = size[:2], max(2, size[1])
    maker = Pixels(num_classes, size[2:], pixels, align_corners, dtype=dtype)
    maker = maker._replace(batch=batch, scale=scale, weights=pixel_weights, label_dtype=label_dtype)
    options |= {"statistics": statistics, "align_corners": align_corners}
    if weights_by:  # one class has no weight of its own, another one none among all classes
        shape = (2, num_classes) if weights_by == "class" else (batch, 2, num_classes)
        number = torch.arange(math.prod(shape), dtype=F64, device="cpu")
        weights = number.cos().square().view(shape)
        weights[..., 0, -1] = weights[..., 1, 0] = 0
        weights[..., 1, :] /= num_classes
        options["true_weights"], options["all_weights"] = weights.unbind(-2)
    shown = [f"{k} {x}" for k, x in options.items() if not isinstance(x, Tensor) and x]
    what = [dtype, layout, coherent, scale, weights_by, pixel_weights, label_dtype]
    name = ", ".join(str(x) for x in (size, pixels, *what, *shown) if x)
    made = partial(make, maker, channels, layout, coherent)
    return Case(MOMENTS, Sample(name, made, options, (), floor or FLOOR))


def run(case: Case, **changed: Tensor) -> dict[str, Tensor]:
    """The results of the backend by name, and "dlogits", the gradient of a weighted sum of them."""
    inputs = case.sample.inputs() | changed
    inputs = {name: x.to(torch.get_default_device()) for name, x in inputs.items()}
    names = names_of(pixel_weights=inputs.get("pixel_weights"), **case.sample.options)
    return dict(zip([*names, "dlogits", "dweights"], results(case.ours, inputs), strict=False))


def run_reference(case: Case, **changed: Tensor) -> dict[str, Tensor]:
    with ao.use_backend("reference"):
        return run(case, **changed)

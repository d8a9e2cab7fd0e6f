"""Cases of softmax moments: inputs, exact values and the error budget.

The exact values are those of the reference, float64 with coordinates in float32. The error is at
most twice that of the float32 formula (upsample, log-softmax, a masked sum for each class), plus
FLOOR of the largest value, times 1 + max|z| for the rounding of logits.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from emulator import BACKEND

import anchorops as ao
from anchorops import reference
from anchorops._ops.softmax_moments import Options, unchecked_moments

FLOOR = 2**-22
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLOATING = ("losses", "overlaps", "masses", "squares", "pixel_losses", "lse")
ALL = ("hits", "masses", "squares", "pixel_losses", "lse")


class Case(NamedTuple):
    size: tuple[int, ...]
    pixels: tuple[int, ...]  # of the labels, without the batch
    align_corners: bool = False
    dtype: torch.dtype = FP32
    layout: str = "contiguous"
    label_dtype: torch.dtype = torch.int64
    asked: tuple[str, ...] = ALL
    per_image: bool = False
    scale: float = 1.0
    smoothing: str = ""  # by "class", or by "image and class"
    min_loss: float | None = None
    focal_gamma: float = 0.0

    @property
    def labels_size(self):
        return (*self.size[:1], *self.pixels)

    @property
    def ignore_index(self):
        return 255 if self.size[1] <= 255 else -1

    @property
    def options(self):
        asked = {name: name in self.asked for name in ALL}
        options = {"align_corners": self.align_corners, "per_image": self.per_image}
        return asked | options | {"ignore_index": self.ignore_index}

    @property
    def shape(self):
        """Of the losses. One class has no weight of its own, another one none among all classes."""
        if not self.smoothing:
            return {"min_loss": self.min_loss, "focal_gamma": self.focal_gamma}
        size = (2, self.size[1]) if self.smoothing == "class" else (self.size[0], 2, self.size[1])
        smoothing = torch.rand(size, generator=torch.Generator().manual_seed(0))
        smoothing[..., 0, -1] = smoothing[..., 1, 0] = 0
        smoothing[..., 1, :] /= self.size[1]
        return {
            "smoothing": smoothing,
            "min_loss": self.min_loss,
            "focal_gamma": self.focal_gamma,
        }


def make_logits(case: Case) -> torch.Tensor:
    """Random logits of that layout; what lies around a view is NaN."""
    values = (case.scale * 3 * torch.randn(case.size)).to(case.dtype)
    if case.layout == "contiguous":
        return values
    if case.layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if case.layout == "sliced":
        view = torch.full([2 * n + 1 for n in case.size], torch.nan, dtype=case.dtype)
        view = view[tuple(slice(1, 2 * n + 1, 2) for n in case.size)]
    else:
        view = torch.full([n + 3 for n in case.size], torch.nan, dtype=case.dtype)
        view = view[tuple(slice(1, n + 1) for n in case.size)]
    return view.copy_(values)


def make_labels(case: Case) -> torch.Tensor:
    """Random classes, without class 1 where there are three; a fifth is ignored, three are none."""
    num_classes = case.size[1]
    labels = torch.randint(0, num_classes, case.labels_size)
    if num_classes > 2:
        labels[labels == 1] = 0
    labels[torch.rand(labels.shape) < 0.2] = case.ignore_index
    none = torch.tensor([-1, num_classes, case.ignore_index])
    labels.view(-1)[:3] = none[: labels.numel()]
    if case.label_dtype in (torch.int8, torch.uint8):
        labels[labels > 127] = -1  # as uint8: 255
    return labels.to(case.label_dtype)


def is_valid(case: Case, labels) -> torch.Tensor:
    labels = labels.long()
    return (labels >= 0) & (labels < case.size[1]) & (labels != case.ignore_index)


def moments_of(case: Case, logits, labels) -> dict[str, torch.Tensor]:
    shaped = Options(**case.options, **case.shape)
    if shaped.shapes_losses:
        moments = unchecked_moments("test", logits, labels, shaped)
    else:
        moments = ao.ops.softmax_moments(logits, labels, **case.options)
    return {name: x for name, x in moments._asdict().items() if x is not None}


def values_and_gradient(case: Case, logits, labels, weights, through=FLOATING):
    """All statistics, and the gradient of a weighted sum of the statistics in `through`."""
    logits = logits.detach().requires_grad_()
    moments = moments_of(case, logits, labels)
    asked = [k for k in FLOATING if k in through and k in moments]
    total = torch.stack([(moments[k] * weights[k]).sum() for k in asked]).sum()
    (dlogits,) = torch.autograd.grad(total, logits)
    return {name: x.detach() for name, x in moments.items()}, dlogits


def exact_values_and_gradient(case: Case, logits, labels, weights, through=FLOATING):
    with ao.use_backend("reference"):
        return values_and_gradient(case, logits.detach().float(), labels, weights, through)


def straightforward(case: Case, logits, labels, weights, through=FLOATING):
    """The results of `values_and_gradient` by the float32 formula, for finite logits."""
    x = logits.detach().float().contiguous().requires_grad_()
    z, shape = x, labels.shape
    if x.dim() == 2:
        z, labels = x.t()[None], labels[None]
    elif x.dim() == 4:
        align = case.align_corners
        z = F.interpolate(x, case.pixels, mode="bilinear", align_corners=align)
    z, labels, num_classes = z.flatten(2), labels.flatten(1).long(), case.size[1]
    valid = is_valid(case, labels)
    own = torch.where(valid, labels, 0)
    one_hot = (own[:, None] == torch.arange(num_classes)[:, None]) & valid[:, None]
    log_p = z.log_softmax(1)
    pixel_losses = shaped_losses(case, log_p, -log_p.gather(1, own[:, None])[:, 0], own)
    pixel_losses = torch.where(valid, pixel_losses, 0)
    p = torch.where(valid[:, None], log_p.exp(), 0)
    by_class = (2,) if case.per_image else (0, 2)
    moments = {
        "losses": (one_hot * pixel_losses[:, None]).sum(by_class),
        "overlaps": (one_hot * p).sum(by_class),
        "masses": p.sum(by_class),
        "squares": p.square().sum(by_class),
        "pixel_losses": pixel_losses.view(shape),
        "lse": torch.where(valid, z.logsumexp(1), 0).view(shape),
    }
    asked = {"losses", "overlaps" if "masses" in case.asked else "losses", *case.asked}
    used = asked & set(through) & set(FLOATING)
    total = torch.stack([(moments[k] * weights[k]).sum() for k in used]).sum()
    (dlogits,) = torch.autograd.grad(total, x)
    return {name: moment.detach() for name, moment in moments.items()}, dlogits


def shaped_losses(case: Case, log_p, c, own):
    losses, shape = c, case.shape
    if "smoothing" in shape:
        weights = shape["smoothing"].to(c.dtype).expand(len(c), 2, -1)
        others = (weights[:, 1, :, None] * log_p).sum(1)
        losses = weights[:, 0].gather(1, own) * c - others
    if case.focal_gamma > 0:
        miss = -torch.expm1(-c).clamp(max=-torch.finfo(c.dtype).tiny)
        losses = losses * miss**case.focal_gamma
    if case.min_loss is not None:
        losses = torch.where(c < case.min_loss, 0, losses)
    return losses


def make_weights(case: Case) -> dict[str, torch.Tensor]:
    by_class = (case.size[0], case.size[1]) if case.per_image else (case.size[1],)
    of_pixels = ("pixel_losses", "lse")
    shapes = {name: case.labels_size if name in of_pixels else by_class for name in FLOATING}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def assert_within_budget(name, ours, exact, formula, eps=0.0, floor=FLOOR):
    assert ours.shape == exact.shape, name
    error = (ours.double() - exact.double()).abs()
    size = exact.abs().max().clamp(min=1)
    allowed = 2 * (formula.double() - exact.double()).abs().max() + floor * size
    assert (error <= eps * exact.double().abs() + allowed).all(), (name, error.max(), allowed)


def check(case: Case, through=FLOATING):
    logits, labels, weights = make_logits(case), make_labels(case), make_weights(case)
    ours, dlogits = values_and_gradient(case, logits, labels, weights, through)
    exact, exact_gradient = exact_values_and_gradient(case, logits, labels, weights, through)
    formula, formula_gradient = straightforward(case, logits, labels, weights, through)

    assert ours.keys() == exact.keys()
    assert torch.equal(ours["counts"], exact["counts"])
    if case.min_loss is not None:
        assert torch.equal(ours["used"], exact["used"])
    floor = FLOOR * (1 + float(logits.float().abs().max()))
    for name in FLOATING:
        if name in ours:
            assert ours[name].dtype == FP32
            assert_within_budget(name, ours[name], exact[name], formula[name], floor=floor)
    if "hits" in ours:
        check_hits(case, logits, labels, ours["hits"], floor)
    for name in ("pixel_losses", "lse"):
        if name in ours:
            assert not ours[name][~is_valid(case, labels)].any(), f"{name}: ignored pixels are 0"
    layout = torch.empty_like(logits, device="meta").stride()
    assert dlogits.dtype == case.dtype and dlogits.stride() == layout
    # one rounding to the logits' dtype, and float32 arithmetic before it
    eps = torch.finfo(case.dtype).eps * (1 if case.dtype == BF16 and BACKEND == "triton" else 0.5)
    if case.dtype == FP16:
        formula_gradient = formula_gradient + 2**-24  # its smallest number
    assert_within_budget("dlogits", dlogits, exact_gradient, formula_gradient, eps, floor)


def check_hits(case: Case, logits, labels, hits, floor):
    """The hits are exact, except for pixels whose two largest logits are equal up to rounding."""
    if logits.dim() == 2:
        logits, labels = logits.t()[None], labels[None]
    if logits.dim() != 4:
        logits, labels = logits.flatten(2)[:, :, None], labels.flatten(1)[:, None]
    z = reference.upsample(logits.float(), tuple(labels.shape[1:]), case.align_corners)
    labels, num_classes = labels.long(), case.size[1]
    valid = is_valid(case, labels)
    own = torch.where(valid, labels, 0)
    others = z.scatter(1, own[:, None], -torch.inf).amax(1)
    lead = z.gather(1, own[:, None])[:, 0] - others
    image = torch.arange(labels.shape[0])[:, None, None] * num_classes
    bounds = []
    for at_least in (floor, -floor):
        keys = (own + image)[valid & (lead > at_least)]
        counts = keys.bincount(minlength=labels.shape[0] * num_classes).view(-1, num_classes)
        bounds.append(counts if case.per_image else counts.sum(0))
    assert ((bounds[0] <= hits) & (hits <= bounds[1])).all()

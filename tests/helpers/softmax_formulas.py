"""Cases of softmax moments: inputs, torch's formulas, and the allowed error.

The error against float64 is at most twice that of torch's formula in the dtype of the statistics
(F.interpolate, log_softmax, masked sums), plus a floor: one rounding of the result, and of the
largest result the roundings of its terms. An exponent is a difference of logits, rounded once, so
the floor grows with their spread. On a GPU the error is at most ON_GPU of the largest result.
"""

from typing import NamedTuple

import torch
from cpu_kernels import in_layout
from simulated_gpu import BACKEND
from torch import Tensor

import anchorops as ao
from anchorops._moments import Options, changes_losses, statistics_dtype
from anchorops._ops.softmax_moments import moments_of as checked_moments
from anchorops.catalogue import formulas
from anchorops.catalogue.budget import error_and_limit

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FLOATING = ("losses", "intersections", "probability_sums", "squares", "pixel_losses")
ALL = ("correct", "probability_sums", "squares", "pixel_losses")
EVERYTHING = {name: True for name in ALL}
CE = ()  # the cross-entropy needs only counts and losses
ON_GPU = 2e-5


class Case(NamedTuple):
    size: tuple[int, ...]  # of the logits; one channel has the two classes of a sigmoid
    pixels: tuple[int, ...]  # of the labels, without the batch
    dtype: torch.dtype = F32
    align_corners: bool = False
    layout: str = "contiguous"
    labels: str = "random"
    label_dtype: torch.dtype = torch.int64
    statistics: tuple[str, ...] = ALL
    per_image: bool = False
    scale: float = 3.0  # of the logits
    weights_by: str = ""  # true_weights and all_weights, by "class", or by "image and class"
    min_loss: float = -torch.inf
    focal_gamma: float = 0.0
    pixel_weights: bool = False

    @property
    def num_classes(self) -> int:
        return max(2, self.size[1])

    @property
    def labels_size(self) -> tuple[int, ...]:
        return (*self.size[:1], *self.pixels)

    @property
    def by_class(self) -> tuple[int, ...]:
        return (*self.size[: int(self.per_image)], self.num_classes)

    @property
    def options(self) -> Options:
        """One class has no weight of its own, another one none among all classes."""
        true_weights = all_weights = None
        if self.weights_by:
            size = (2, self.num_classes)
            size = size if self.weights_by == "class" else (self.size[0], *size)
            weights = torch.arange(torch.Size(size).numel(), dtype=F64).cos().square().view(size)
            weights[..., 0, -1] = weights[..., 1, 0] = 0
            weights[..., 1, :] /= self.num_classes
            true_weights, all_weights = weights.to(statistics_dtype(self.dtype)).unbind(-2)
        return Options(
            true_weights,
            all_weights,
            min_loss=self.min_loss,
            focal_gamma=self.focal_gamma,
            align_corners=self.align_corners,
            per_image=self.per_image,
            **{name: name in self.statistics for name in ALL},
        )


def make_logits(case: Case) -> tuple[Tensor, Tensor]:
    """Random logits of this layout, and their buffer, which is NaN around them."""
    values = (torch.randn(case.size, dtype=F64) * case.scale).to(case.dtype)
    return in_layout(values, case.layout)


def make_labels(case: Case) -> Tensor:
    """Random, without class 1 where there are three, or patches of 7 × 9 pixels, or one class; some
    ignored and some out of range."""
    size, num_classes = case.labels_size, case.num_classes
    labels = torch.randint(0, num_classes, size)
    if case.labels == "coherent":
        labels = labels.repeat_interleave(7, 1).repeat_interleave(9, 2)[:, : size[1], : size[2]]
    elif case.labels == "one class":
        labels.fill_(num_classes - 1)
    elif case.labels == "ignored":
        labels.fill_(255)
    elif num_classes > 2:
        labels[labels == 1] = 0
    wrong = torch.tensor([255, -1, num_classes])
    if labels.numel() > 2:
        labels = torch.where(torch.rand(size) < 0.1, wrong[torch.randint(0, 3, size)], labels)
    if labels.numel() > 3:
        labels.view(-1)[:3] = wrong
    return labels.to(case.label_dtype)


def make_weights(case: Case) -> dict[str, Tensor]:
    """A gradient for each floating result."""
    sizes = [case.by_class] * 4 + [case.labels_size]
    dtype = statistics_dtype(case.dtype)
    return {k: torch.randn(n, dtype=dtype) for k, n in zip(FLOATING, sizes, strict=True)}


def make_pixel_weights(case: Case, labels: Tensor) -> Tensor | None:
    """Not contiguous, 0 for some pixels and NaN where the label is ignored."""
    if not case.pixel_weights:
        return None
    weights = torch.arange(2 * labels.numel(), dtype=F64).cos().square()
    weights[4::10] = 0
    weights = torch.where(is_valid(case, labels), weights.view(*labels.shape, 2)[..., 0], torch.nan)
    return weights.to(statistics_dtype(case.dtype)).repeat_interleave(2, -1)[..., ::2]


def is_valid(case: Case, labels: Tensor) -> Tensor:
    labels = labels.long()
    return (labels >= 0) & (labels < case.num_classes) & (labels != 255)


def moments_of(case: Case, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    options = case.options._replace(pixel_weights=make_pixel_weights(case, labels))
    if changes_losses(options) or case.pixel_weights or case.size[1] == 1:
        moments = checked_moments("test", logits, labels, options)
    else:
        names = ("ignore_index", "align_corners", "per_image", *ALL)
        public = {name: getattr(options, name) for name in names}
        moments = ao.ops.softmax_moments(logits, labels, **public)
    return {name: x for name, x in moments._asdict().items() if x is not None}


Results = tuple[dict[str, Tensor], Tensor]


def with_gradient(moments, logits: Tensor, weights: dict[str, Tensor], through) -> Results:
    used = [name for name in FLOATING if name in through and name in moments]
    gradients = [weights[name].to(moments[name].dtype) for name in used]
    (dlogits,) = torch.autograd.grad([moments[name] for name in used], logits, gradients)
    return {name: x.detach() for name, x in moments.items()}, dlogits


def run(case: Case, logits: Tensor, labels: Tensor, weights, through=FLOATING) -> Results:
    """All statistics, and the gradient of a weighted sum of those in `through`."""
    logits = logits.detach().requires_grad_()
    return with_gradient(moments_of(case, logits, labels), logits, weights, through)


def results(case: Case, logits: Tensor, labels: Tensor, weights, through=FLOATING) -> list[Tensor]:
    """The results of `run` as a list."""
    values, dlogits = run(case, logits, labels, weights, through)
    return [*values.values(), dlogits]


def run_reference(case: Case, logits: Tensor, labels: Tensor, weights, through=FLOATING) -> Results:
    with ao.use_backend("reference"):
        return run(case, logits.detach().to(statistics_dtype(case.dtype)), labels, weights, through)


def by_torch(case: Case, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """All statistics but `correct` by torch's formulas in the dtype of x."""
    names = {"counts", "losses", "divisor", *case.statistics} - {"correct"}
    names |= {"intersections"} if "probability_sums" in case.statistics else set()
    names |= {"used"} if case.min_loss > -torch.inf or case.pixel_weights else set()
    options = case.options
    return formulas.softmax_moments(
        torch.cat([torch.zeros_like(x), x], 1) if case.size[1] == 1 else x,
        torch.where(is_valid(case, labels), labels.long(), -1),
        sorted(names),
        true_weights=options.true_weights,
        all_weights=options.all_weights,
        pixel_weights=make_pixel_weights(case, labels),
        min_loss=case.min_loss,
        focal_gamma=case.focal_gamma,
        per_image=case.per_image,
        align_corners=case.align_corners,
    )


def formula(case: Case, logits, labels, weights, dtype: torch.dtype, through=FLOATING) -> Results:
    """The results of `run` by torch's formulas in this dtype."""
    x = logits.detach().to(dtype, memory_format=torch.contiguous_format).requires_grad_()
    return with_gradient(by_torch(case, x, labels), x, weights, through)


def check(case: Case, backend: str, through=FLOATING, logits=None, labels=None) -> None:
    """Values and gradients of the backend, which is chosen, are within the error budget."""
    logits = make_logits(case)[0] if logits is None else logits
    labels = make_labels(case) if labels is None else labels
    weights, dtype = make_weights(case), statistics_dtype(case.dtype)
    ours, dlogits = run(case, logits, labels, weights, through)
    exact, exact_gradient = formula(case, logits, labels, weights, F64, through)
    plain, plain_gradient = formula(case, logits, labels, weights, dtype, through)

    assert ours.keys() - {"correct"} == exact.keys() and ("correct" in ours) == (
        "correct" in case.statistics
    )
    for name in ("counts", "divisor"):
        assert torch.equal(ours[name], exact[name])
    if "used" in ours and case.pixel_weights:
        torch.testing.assert_close(ours["used"], exact["used"].to(dtype))
    elif "used" in ours:
        assert torch.equal(ours["used"], exact["used"])
    if "pixel_losses" in ours:
        assert not ours["pixel_losses"][~is_valid(case, labels)].any(), "ignored pixels are 0"
    assert dlogits.dtype == case.dtype
    if backend != "reference":
        assert dlogits.stride() == torch.empty_like(logits, device="meta").stride()

    eps, spread = torch.finfo(dtype).eps, float(logits.max()) - float(logits.min())
    roundings = 32 if dtype == F64 else 12 if BACKEND else 8  # of float64, like the formula
    floor = ON_GPU if logits.is_cuda else eps * max(roundings, spread / 2)
    if "correct" in ours:
        check_correct(case, logits, labels, ours["correct"], ON_GPU if logits.is_cuda else 2 * eps)
    for name in FLOATING:
        if name in ours:
            assert ours[name].dtype == dtype and ours[name].shape == exact[name].shape
            one = exact if logits.is_cuda else plain
            error, limit = error_and_limit(ours[name], exact[name], one[name], floor, eps)
            assert error <= limit, name
    # one rounding to the logits' dtype, or to its smallest number
    eps = torch.finfo(case.dtype).eps * (1 if logits.is_cuda or case.dtype == dtype else 0.5)
    one = exact_gradient if logits.is_cuda else plain_gradient
    error, limit = error_and_limit(dlogits, exact_gradient, one, floor, eps)
    assert error <= limit, "dlogits"


def check_correct(
    case: Case, logits: Tensor, labels: Tensor, correct: Tensor, floor: float
) -> None:
    """Exact, except for pixels whose two largest logits are equal up to rounding."""
    z = logits.double()
    if case.size[1] == 1:
        z = torch.cat([torch.zeros_like(z), z], 1)
    if z.dim() == 2:
        z, labels = z.t()[None], labels[None]
    z = formulas.upsampled(z, case.pixels, case.align_corners).flatten(2)
    valid = is_valid(case, labels).flatten(1)
    classes = torch.where(valid, labels.flatten(1).long(), 0)
    others = z.scatter(1, classes[:, None], -torch.inf).amax(1)
    lead = z.gather(1, classes[:, None])[:, 0] - others
    one_hot = (classes[:, None] == torch.arange(case.num_classes)[:, None]) & valid[:, None]
    floor *= 1 + float(z.abs().max())
    lower, upper = (
        (one_hot & (lead > at_least)[:, None]).sum((2,) if case.per_image else (0, 2))
        for at_least in (floor, -floor)
    )
    assert ((lower <= correct) & (correct <= upper)).all()


def check_loss(ours: Tensor, expected: Tensor, logits: Tensor) -> None:
    """Assert equal values and gradients."""
    torch.testing.assert_close(ours, expected)
    gradients = [
        torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (ours, expected)
    ]
    torch.testing.assert_close(*gradients)

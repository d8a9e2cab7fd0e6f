"""`anchorops-doctor --benchmark`: losses and operators beside torch's own formulas."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import CUDA_BACKENDS, FUSED, TRITON_ON_HOST, unusable, use_backend
from ._ops.centroid_info_nce import centroid_info_nce
from ._ops.class_moments import class_centroids, pixel_to_anchor_mse
from ._ops.pixel_binary_cross_entropy import pixel_binary_cross_entropy
from ._ops.pixel_cross_entropy import pixel_cross_entropy
from ._ops.pixel_kl_divergence import pixel_kl_divergence
from .losses import CrossEntropyDice
from .measure import (
    DISTURBED,
    OtherProcesses,
    duration,
    environment,
    example_labels,
    measure,
    peak_extra_bytes,
)

# of logits, a teacher's logits and labels; or of features, anchors and labels
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]
Run = Callable[[], tuple[Tensor, Tensor]]  # the loss and the gradient of its first argument
CLASSES_OF_FEATURES = 19
LEGEND = """\
input   logits flat (randn) or sharp (in regions, one class is 20 above the others, as of a trained
        network; labels in one twentieth are others); labels of features in rectangles or random
ms      median time of forward and backward pass, and of torch's formula in eager mode
faster  the second time divided by the first
MB      peak memory of both passes without inputs and gradient, and of torch's formula
µs      host time of both passes, and of torch's formula: {host}
error   of loss and gradient, relative to torch's formula in float32"""


class Case(NamedTuple):
    """A loss, and torch's own formula.

    size: of logits (B, K, h, w) or (B, K, d, h, w), or of features (B, D, h, w), on a CPU. On a GPU
        two images of twice this height and width are computed.
    ratio: size of the labels / size of the logits, along each axis.
    """

    name: str
    size: tuple[int, ...]
    ratio: int
    ours: Loss
    formula: Loss
    inputs: Sequence[str] = ("flat", "sharp")
    backends: Sequence[str] = FUSED


def _upsampled(x: Tensor, labels: Tensor) -> Tensor:
    """In float32, as under autocast."""
    if x.shape[2:] != labels.shape[1:]:
        mode = "bilinear" if x.dim() == 4 else "trilinear"
        x = F.interpolate(x, labels.shape[1:], mode=mode)
    return x.float()


def _cross_entropy(x: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_upsampled(x, labels), labels)


def _cross_entropy_dice(x: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    z = _upsampled(x, labels)
    probabilities, targets = z.softmax(1), F.one_hot(labels, z.shape[1]).movedim(-1, 1).float()
    axes = (0, *range(2, z.dim()))
    counts = targets.sum(axes)
    intersections = (probabilities * targets).sum(axes)
    scores = 2 * intersections / (probabilities.sum(axes) + counts)
    return F.cross_entropy(z, labels) + (1 - scores)[counts > 0].mean()


def _binary_cross_entropy(x: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(_upsampled(x, labels)[:, 0], labels.float())


def _kl_divergence(x: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    student, teacher = (_upsampled(z, labels).log_softmax(1) for z in (x, teacher))
    return F.kl_div(student, teacher, log_target=True, reduction="sum") / labels.numel()


def _centroids(features: Tensor, anchors: Tensor, labels: Tensor) -> Tensor:
    pixels, labels = features.movedim(1, -1).flatten(0, -2).float(), labels.flatten()
    sums = pixels.new_zeros(anchors.shape).index_add(0, labels, pixels)
    centroids = sums / labels.bincount(minlength=len(anchors)).clamp(min=1)[:, None]
    return (centroids * anchors).mean()


def _anchor_mse(features: Tensor, anchors: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(features.movedim(1, -1).float(), anchors[labels].float())


def _info_nce(queries: Tensor, keys: Tensor, _: Tensor) -> Tensor:
    own_keys = torch.arange(len(keys), device=keys.device)
    return F.cross_entropy(queries.float() @ keys.float().T / 0.07, own_keys)


def _ours(x: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    return pixel_cross_entropy(x, labels)


CASES = [
    Case("cross-entropy, K 19, ratio 4", (1, 19, 64, 128), 4, _ours, _cross_entropy),
    Case("cross-entropy, K 19, ratio 1", (1, 19, 256, 512), 1, _ours, _cross_entropy),
    Case("cross-entropy, K 150, ratio 4", (1, 150, 64, 64), 4, _ours, _cross_entropy),
    Case("cross-entropy, K 150, ratio 1", (1, 150, 256, 256), 1, _ours, _cross_entropy),
    Case("cross-entropy of a volume", (1, 4, 8, 32, 32), 4, _ours, _cross_entropy),
    Case(
        "cross-entropy + Dice",
        (1, 19, 64, 128),
        4,
        lambda x, _, y: CrossEntropyDice()(x, y),
        _cross_entropy_dice,
    ),
    Case(
        "binary cross-entropy",
        (1, 1, 64, 128),
        4,
        lambda x, _, y: pixel_binary_cross_entropy(x, y),
        _binary_cross_entropy,
    ),
    Case(
        "pixel_kl_divergence",
        (1, 19, 64, 128),
        4,
        lambda x, t, y: pixel_kl_divergence(x, t, y.shape[1:]),
        _kl_divergence,
    ),
    Case(
        "class moments",
        (1, 256, 128, 256),
        1,
        lambda f, a, y: (class_centroids(f, y, len(a))[0] * a).mean(),
        _centroids,
        inputs=("coherent", "random"),
        backends=CUDA_BACKENDS,
    ),
    Case(
        "pixel-to-anchor MSE",
        (1, 256, 128, 256),
        1,
        lambda f, a, y: pixel_to_anchor_mse(f, y, a),
        _anchor_mse,
        inputs=("coherent", "random"),
        backends=CUDA_BACKENDS,
    ),
    Case(
        "centroid InfoNCE",
        (CLASSES_OF_FEATURES, 256),
        1,
        lambda q, k, _: centroid_info_nce(q, k),
        _info_nce,
        inputs=("centroids",),
        backends=CUDA_BACKENDS,
    ),
]


def make_inputs(case: Case, kind: str, device: torch.device, largest: int | None = None) -> Inputs:
    """The arguments of a loss; float32 on a CPU, bfloat16 on a GPU.

    largest: limits the axes of the labels.
    """
    batch, channels, *space = case.size
    if device.type == "cuda" and space:
        batch, space = 2, [*space[:-2], 2 * space[-2], 2 * space[-1]]
    if largest is not None:
        space = [min(n, largest // case.ratio) for n in space]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if kind not in ("flat", "sharp"):
        anchors = F.normalize(torch.randn(CLASSES_OF_FEATURES, channels, device=device))
        if not space:
            keys = F.normalize(torch.randn_like(anchors))
            return anchors.requires_grad_(), keys, torch.empty(0, device=device)
        features = torch.randn(batch, channels, *space, device=device).to(dtype)
        labels = example_labels((batch, *space), len(anchors), kind).clamp(min=0)
        return features.requires_grad_(), anchors, labels.to(device)
    plane = example_labels((batch, *space[-2:]), max(channels, 2), "coherent").clamp(min=0)
    classes = plane.to(device).view(batch, *[1] * (len(space) - 2), *space[-2:])
    classes = classes.expand(batch, *space)
    # Without wrong pixels, the loss of sharp logits would be the rounding error of float32.
    errors = classes.narrow(1, 0, 1 + classes.shape[1] // 20)
    labels = torch.cat([(errors + 1) % max(channels, 2), classes[:, errors.shape[1] :]], 1)
    logits, teacher = (_logits(x, channels, kind).to(dtype) for x in (classes, labels))
    for axis in range(1, labels.dim()):
        labels = labels.repeat_interleave(case.ratio, axis)
    return logits.requires_grad_(), teacher, labels


def _logits(classes: Tensor, channels: int, kind: str) -> Tensor:
    """Logits [B, K, …] of the classes [B, …]. At the border of two sharp regions, neighbours differ
    by about 20, in a sigmoid too."""
    flat = torch.randn(classes.shape[0], channels, *classes.shape[1:], device=classes.device)
    if kind == "flat":
        return flat
    one_hot = F.one_hot(classes, max(channels, 2)).movedim(-1, 1)[:, -channels:]
    return 20.0 * one_hot - 10 + 0.3 * flat


def _step(loss: Loss, inputs: Inputs) -> Run:
    def run() -> tuple[Tensor, Tensor]:
        value = loss(*inputs)
        return value.detach(), torch.autograd.grad(value, inputs[0])[0]

    return run


class Cost(NamedTuple):
    seconds: float
    peak: int | None
    host: float


def _cost(loss: Loss, inputs: Inputs, small: Inputs, device: torch.device, seconds: float) -> Cost:
    """small: tiny inputs, for which the time on a CPU is nearly that of the host."""
    run, small_run = _step(loss, inputs), _step(loss, small)
    peak = peak_extra_bytes(run, device)
    measured, _ = measure(run, 0, device, seconds=seconds)
    times = []
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize()
            times.append(duration(run))
        else:
            with _one_thread():
                times.append(duration(small_run))
    return Cost(measured.median, peak, median(times))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Threads of small operators wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _error(ours: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    """The larger ‖ours − exact‖ / ‖exact‖ of loss and gradient."""
    errors = [(a.float() - b).norm() / b.norm() for a, b in zip(ours, exact, strict=True)]
    return float(torch.stack(errors).max())  # NaN if one is


def benchmark(largest: int | None = None, seconds: float = 0.2) -> bool:
    """Prints errors and costs of every usable fused backend; True if all results are correct.

    Args:
        largest: limits the axes of the labels, for tests.
        seconds: for about how long each call is repeated.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    on_device = ("cuda", "triton") if cuda else ("cpu",)
    usable = [name for name in on_device if unusable()[name] is None and not TRITON_ON_HOST]
    torch.manual_seed(0)
    host = "until the calls return" if cuda else "of labels of 8×8 pixels, with one thread"
    print(f"\n{environment(device)['device']}, {'bfloat16' if cuda else 'float32'}")
    print(LEGEND.format(host=host))
    print(
        f"{'backend':<10}{'call':<31}{'input':<10}{'ms':>9}{'torch':>9}{'faster':>8}"
        f"{'MB':>7}{'torch':>7}{'µs':>7}{'torch':>7}{'error':>8}"
    )
    right, processes = True, OtherProcesses(device)
    tolerance = 1e-2 if cuda else 1e-4  # a gradient in bfloat16 is rounded
    for case in CASES:
        for kind in case.inputs:
            inputs, small = (make_inputs(case, kind, device, n) for n in (largest, 8))
            x, other, labels = inputs
            exact = _step(case.formula, (x.float(), other.float(), labels))()
            theirs = _cost(case.formula, inputs, small, device, seconds)
            for backend in [n for n in usable if n in case.backends] or ["reference"]:
                with use_backend(backend):
                    error = _error(_step(case.ours, inputs)(), exact)
                    ours = _cost(case.ours, inputs, small, device, seconds)
                right &= error <= tolerance
                print(
                    f"{backend:<10}{case.name:<31}{kind:<10}{ours.seconds * 1e3:>9.3f}"
                    f"{theirs.seconds * 1e3:>9.3f}{theirs.seconds / ours.seconds:>8.1f}"
                    f"{_megabytes(ours.peak):>7}{_megabytes(theirs.peak):>7}"
                    f"{ours.host * 1e6:>7.0f}{theirs.host * 1e6:>7.0f}{error:>8.0e}"
                    f"{'' if error <= tolerance else '  WRONG'}",
                    flush=True,
                )
    if (busy := processes.cores() or 0) > DISTURBED:
        print(f"disturbed: other processes kept {busy:.1f} cores busy at the same time")
    return right


def _megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f}"

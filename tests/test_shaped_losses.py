"""Losses shaped inside the operator: label smoothing, focal factor, smallest loss, one channel."""

import math

import pytest
import torch
import torch.nn.functional as F
from cpu_kernels import in_layout, same_for_all_threads
from torch import Tensor

import anchorops as ao
from anchorops._ops.softmax_moments import Options, unchecked_moments
from anchorops.reference import SoftmaxMoments, statistics_dtype

BACKENDS = ["cpu", "reference"]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def expected_moments(
    logits: Tensor, labels: Tensor, options: Options, dtype: torch.dtype
) -> SoftmaxMoments:
    """By torch's formulas in this dtype; finite logits."""
    z = F.interpolate(
        logits.to(dtype), labels.shape[1:], mode="bilinear", align_corners=options.align_corners
    )
    if z.shape[1] == 1:
        z = torch.cat([torch.zeros_like(z), z], 1)
    num_classes = z.shape[1]
    valid = (labels >= 0) & (labels < num_classes) & (labels != options.ignore_index)
    own = torch.where(valid, labels, 0)
    log_p = z.log_softmax(1)
    c = -log_p.gather(1, own[:, None])[:, 0]
    losses, used = c, valid
    if options.smoothing is not None:
        a, v = options.smoothing.to(dtype).expand(len(logits), 2, num_classes).unbind(1)
        losses = a.gather(1, own.flatten(1)).view_as(c) * c - (v[..., None, None] * log_p).sum(1)
    if options.focal_gamma > 0:
        losses = losses * (1 - (-c).exp()) ** options.focal_gamma
    if options.min_loss is not None:
        used = valid & ~(c < options.min_loss)
    losses = torch.where(used, losses, 0)
    one_hot = F.one_hot(own, num_classes).movedim(-1, 1) * valid[:, None]
    axes = (2, 3) if options.per_image else (0, 2, 3)
    p = log_p.exp() * valid[:, None]
    return SoftmaxMoments(
        counts=one_hot.sum(axes),
        hits=(one_hot * (z.argmax(1) == own)[:, None]).sum(axes),
        losses=(one_hot * losses[:, None]).sum(axes),
        overlaps=(one_hot * p).sum(axes),
        masses=p.sum(axes),
        squares=p.square().sum(axes),
        pixel_losses=losses,
        lse=torch.where(valid, z.logsumexp(1), 0),
        used=(one_hot * used[:, None]).sum(axes),
    )


ALL = {"hits": True, "masses": True, "squares": True, "pixel_losses": True, "lse": True}
SHAPES = {
    "smoothing": {"smoothing": True},
    "focal": {"focal_gamma": 2.0},
    "root": {"focal_gamma": 0.5},
    "power": {"focal_gamma": 1.7},
    "hard": {"min_loss": 0.8},
    "everything": {"smoothing": True, "focal_gamma": 3.0, "min_loss": 0.5, **ALL},
    "images": {"smoothing": "images", "per_image": True, "masses": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("num_classes", "size", "label_size", "dtype", "layout"),
    [
        (19, (9, 17), (36, 68), F32, "contiguous"),
        (2, (31, 40), (31, 40), F32, "contiguous"),
        (150, (6, 5), (13, 9), BF16, "channels_last"),
        (5, (7, 9), (20, 33), F64, "contiguous"),
        (19, (13, 21), (13, 21), BF16, "channels_last"),
        (1, (8, 12), (32, 48), F32, "contiguous"),
        (1, (33, 70), (33, 70), BF16, "contiguous"),
    ],
    ids=str,
)
def test_values_and_gradients(num_classes, size, label_size, dtype, layout, shape, backend):
    options = dict(SHAPES[shape])
    classes, kind, stat = (
        max(num_classes, 2),
        options.pop("smoothing", None),
        statistics_dtype(dtype),
    )
    smoothing = None
    if kind:
        smoothing = torch.rand((3, 2, classes) if kind == "images" else (2, classes), dtype=stat)
        smoothing[..., 0] = 0
    options = Options(smoothing=smoothing, align_corners=layout != "contiguous", **options)
    values = (2 * torch.randn(3, num_classes, *size, dtype=F64)).to(dtype)
    logits = in_layout(values, layout)[0].requires_grad_()
    labels = torch.randint(-1, classes + 1, (3, *label_size))
    labels[0, 2:5] = 255
    with ao.use_backend(backend):
        found = unchecked_moments("test", logits, labels, options)
    x = values.double().requires_grad_()
    exact = expected_moments(x, labels, options, F64)
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if a is not None]
    weights = [torch.randn(a.shape, dtype=F64) for a, _ in pairs]
    for a, b in pairs:
        scale = b.detach().double().abs().max().item()
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5 * scale)
    differentiable = [
        (a, b, w) for (a, b), w in zip(pairs, weights, strict=True) if a.is_floating_point()
    ]
    ours, exactly, weights = zip(*differentiable, strict=True)
    (gradient,) = torch.autograd.grad(ours, logits, [w.to(stat) for w in weights])
    (right,) = torch.autograd.grad(exactly, x, weights)
    assert gradient.dtype == dtype
    if backend == "cpu":
        assert gradient.stride() == torch.empty_like(logits).stride()
    eps = 1e-2 if dtype == BF16 else 1e-4
    atol = eps * right.abs().max().item()
    torch.testing.assert_close(gradient.double(), right, rtol=eps, atol=atol)


def losses_and_gradient(logits: Tensor, labels: Tensor, options: Options) -> list[Tensor]:
    logits = logits.detach().requires_grad_()
    found = unchecked_moments("test", logits, labels, options)
    assert found.pixel_losses is not None
    loss = found.losses.sum() + (found.pixel_losses * labels.sin()).sum()
    gradient = torch.autograd.grad(loss, logits)[0]
    return [found.losses.detach(), found.pixel_losses.detach(), gradient]


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
@pytest.mark.parametrize(
    ("num_classes", "size", "ratio", "dtype"),
    [
        (2, (9, 20), 4, F32),
        (150, (6, 9), 4, F16),
        (19, (9, 20), 16, F32),
        (1, (9, 20), 8, F32),
        (1, (9, 70), 1, F16),
        (7, (9, 70), 1, F32),
    ],
    ids=str,
)
def test_coherent_labels_and_steep_logits(num_classes, size, ratio, dtype, scale):
    """Runs of one class, and cells that are processed pixel by pixel, against float64."""
    classes = max(num_classes, 2)
    logits = (torch.randn(2, num_classes, *size) * scale).to(dtype)
    labels = torch.randint(-1, classes, (2, ratio * size[0], ratio * size[1]))
    labels = labels[:, ::7, ::9].repeat_interleave(7, 1).repeat_interleave(9, 2)
    labels = labels[:, : ratio * size[0], : ratio * size[1]].contiguous()
    for options in (
        Options(smoothing=torch.rand(2, classes), pixel_losses=True),
        Options(smoothing=torch.rand(2, classes), focal_gamma=2.0, pixel_losses=True),
        Options(focal_gamma=1.5, pixel_losses=True),
    ):
        with ao.use_backend("cpu"):
            found = losses_and_gradient(logits, labels, options)
        exact = options
        if options.smoothing is not None:
            exact = options._replace(smoothing=options.smoothing.double())
        with ao.use_backend("reference"):
            right = losses_and_gradient(logits.double(), labels, exact)
        spread = (logits.max() - logits.min()).item()
        for a, b in zip(found, right, strict=True):
            error = 2e-5 + torch.finfo(a.dtype).eps + 8 * torch.finfo(F32).eps * spread
            atol = error * b.abs().max().item()
            torch.testing.assert_close(a.double(), b, rtol=error, atol=atol)


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("num_classes", [1, 5])
def test_threads_do_not_matter(num_classes: int, ratio: int):
    logits = torch.randn(2, num_classes, 40, 33)
    labels = torch.randint(-1, max(num_classes, 2), (2, 40 * ratio, 33 * ratio))
    smoothing = torch.rand(2, max(num_classes, 2))
    options = Options(smoothing=smoothing, focal_gamma=1.5, min_loss=0.3, pixel_losses=True)
    same_for_all_threads(lambda: losses_and_gradient(logits, labels, options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [1, 4])
def test_values_that_are_not_finite(ratio, backend):
    """Ignored pixels change nothing; a class of weight 0 may be masked by −∞; c may be ∞."""
    logits = torch.randn(1, 3, 4, 8)
    logits[:, 2] = -math.inf
    logits[:, :, :, 0] = math.nan
    logits.requires_grad_()
    labels = torch.zeros(1, 4 * ratio, 8 * ratio, dtype=torch.int64)
    labels[:, :, : 2 * ratio] = 255
    smoothing = torch.tensor([[0.9, 0.9, 0.0], [0.05, 0.05, 0.0]])
    options = Options(smoothing=smoothing, focal_gamma=2.0, min_loss=0.1, pixel_losses=True)
    with ao.use_backend(backend):
        found = unchecked_moments("test", logits, labels, options)
        (gradient,) = torch.autograd.grad(found.losses.sum(), logits)
        assert found.losses.isfinite().all() and gradient.isfinite().all()
        assert gradient[:, :, :, 2:].any() and not gradient[:, 2].any()

        labels[0, 0, -1] = 2  # c = ∞, a = 0: its loss is that of the other classes
        found = unchecked_moments("test", logits, labels, options)
        (gradient,) = torch.autograd.grad(found.losses.sum(), logits)
        assert found.losses.isfinite().all() and gradient.isfinite().all()

        hard = Options(min_loss=0.1, focal_gamma=2.0, pixel_losses=True)
        found = unchecked_moments("test", logits, labels, hard)
        assert found.pixel_losses is not None and found.pixel_losses[0, 0, -1] == math.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_used(backend):
    logits = torch.randn(2, 4, 5, 5, requires_grad=True)
    labels = torch.randint(0, 4, (2, 10, 10))
    with ao.use_backend(backend):
        found = unchecked_moments("test", logits, labels, Options(min_loss=1e9, focal_gamma=1.0))
    assert found.used is not None and not found.used.any() and found.counts.sum() == 200
    (gradient,) = torch.autograd.grad(found.losses.sum(), logits)
    assert not gradient.any() and not found.losses.any()

"""Softmax moments of logits that are not finite, on every backend. A pixel reads a logit if its
weight is not 0. A NaN affects the pixels that read it, and nothing else."""

import math

import pytest
import torch
from softmax_formulas import (
    BF16,
    EVERYTHING,
    F16,
    F32,
    F64,
    Case,
    make_labels,
    make_logits,
    make_weights,
    run,
    run_reference,
)
from torch import Tensor

import anchorops as ao
from anchorops._moments import Options
from anchorops._ops.softmax_moments import moments_of
from anchorops._shared.upsampling import upsample

on_cpu = pytest.mark.on("cpu", "reference")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the machine for PTX

RATIOS = [  # of labels to logits of (3, 4)
    ((12, 16), False),
    ((9, 13), True),
    ((3, 4), False),
]
each_ratio = pytest.mark.parametrize(("pixels", "align_corners"), RATIOS)
CASES = [
    Case((2, 7, 9, 20), (36, 80), labels="coherent"),
    Case((2, 7, 9, 20), (36, 80), BF16, True, layout="channels_last"),
    Case((2, 7, 9, 20), (31, 67), F32, True),
    Case((2, 3, 9, 20), (72, 160), F16),
    Case((2, 7, 9, 20), (9, 20), F32),
    Case((2, 7, 9, 20), (5, 11), F64),
    Case((2, 2, 5, 6), (20, 24)),
]


def read_by(pixels: tuple[int, int], align_corners: bool, row: int, column: int) -> Tensor:
    """bool [H, W]: the pixels that read the logit at (row, column)."""
    x = torch.zeros(1, 1, 3, 4)
    x[0, 0, row, column] = 1
    return upsample(x, pixels, align_corners)[0, 0] != 0


@each_ratio
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_spoils_the_pixels_that_read_it(pixels, align_corners, value, backend: str):
    case = Case((2, 5, 3, 4), pixels, F32, align_corners)
    logits, weights = make_logits(case)[0], make_weights(case)
    labels = torch.randint(0, 5, case.labels_size)
    spoilt = read_by(pixels, align_corners, 1, 2)
    labels[1, spoilt] %= 2
    clean, clean_gradient = run(case, logits, labels, weights)
    logits[1, 3, 1, 2] = value
    ours, dlogits = run(case, logits, labels, weights)
    losses, clean_losses = ours["pixel_losses"], clean["pixel_losses"]
    assert torch.equal(losses[0], clean_losses[0])
    torch.testing.assert_close(losses[1][~spoilt], clean_losses[1][~spoilt])
    assert not losses[1][spoilt].isfinite().any()
    assert not ours["probability_sums"][3].isfinite()
    assert not ours["losses"][labels[1, spoilt]].isfinite().any()
    torch.testing.assert_close(ours["losses"][2:], clean["losses"][2:])
    # Positions that no affected pixel reads keep their gradient. That of the logit is not finite.
    reached = [
        [(read_by(pixels, align_corners, i, j) & spoilt).any() for j in range(4)] for i in range(3)
    ]
    reached = torch.tensor(reached)
    assert not dlogits[1, 3, 1, 2].isfinite()
    assert torch.equal(dlogits[0], clean_gradient[0])
    torch.testing.assert_close(dlogits[1][:, ~reached], clean_gradient[1][:, ~reached])
    if math.isnan(value):
        assert dlogits[1][:, reached].isnan().all()


def test_a_pixel_just_above_a_row_of_logits(backend: str):
    """In float32 the middle one of 37 rows is just above row 1 of 3, so it does not read row 2."""
    case = Case((1, 3, 3, 4), (37, 16), F32)
    logits, weights = make_logits(case)[0], make_weights(case)
    logits[0, 1, 2, 2] = torch.nan
    ours, _ = run(case, logits, torch.zeros(1, 37, 16, dtype=torch.int64), weights)
    spoilt = read_by((37, 16), False, 2, 2)
    assert torch.equal(ours["pixel_losses"][0].isnan(), spoilt) and not spoilt[18].any()


@on_cpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_that_no_pixel_reads(case: Case, backend: str):
    """Not a bit changes."""
    logits, labels, weights = make_logits(case)[0], make_labels(case), make_weights(case)
    labels[:, : case.pixels[0] * 2 // 3] = 255
    upper = logits[:, :, : case.size[2] // 2]
    clean, gradient = run(case, logits, labels, weights)
    for value in (torch.nan, torch.inf, -torch.inf):
        upper.fill_(value)
        ours, dlogits = run(case, logits, labels, weights)
        assert all(torch.equal(ours[name], clean[name]) for name in clean)
        assert torch.equal(dlogits, gradient)
    assert not gradient[:, :, : case.size[2] // 2].any()


@pytest.mark.on("cpu")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_the_reference(case: Case, value: float, backend: str):
    """One logit, all classes of a position, and a whole class."""
    logits, labels, weights = make_logits(case)[0], make_labels(case), make_weights(case)
    logits[0, 0, 2, 3] = logits[1, :, 4, 4] = value
    if case.num_classes > 2:
        logits[1, 2] = value
    (ours, dlogits), (exact, exact_gradient) = (
        f(case, logits, labels, weights) for f in (run, run_reference)
    )
    for actual, expected in ((dlogits, exact_gradient), *((ours[k], exact[k]) for k in exact)):
        rtol = 1e-2 if actual.dtype in (BF16, F16) else 1e-5
        atol = rtol * float(torch.where(expected.isfinite(), expected, 0).abs().max())
        expected = expected.to(actual.dtype)
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


@each_ratio
def test_minus_infinity_masks_a_class(pixels, align_corners, backend: str):
    """A logit of −inf, in a whole plane or at single positions: p = 0, gradient 0, no NaN."""
    case = Case((1, 5, 3, 4), pixels, F32, align_corners)
    logits, weights = make_logits(case)[0], make_weights(case)
    labels = torch.randint(0, 2, case.labels_size)
    logits[0, 2] = -torch.inf
    logits[0, 4, 0, 1] = -torch.inf
    logits[0, 3, 1:, 2:] = -torch.inf
    ours, dlogits = run(case, logits, labels, weights)
    expected = run_reference(case, logits, labels, weights)
    torch.testing.assert_close((ours, dlogits), expected, rtol=1e-5, atol=1e-5)
    assert not dlogits[0, 2].any() and not dlogits[0, 4, 0, 1].any()
    labels[0, 1, 1] = 2  # a masked class is not expected: its loss is infinite
    ours, _ = run(case, logits, labels, weights)
    assert ours["losses"][2] == torch.inf and ours["pixel_losses"][0, 1, 1] == torch.inf
    assert ours["losses"].isfinite().sum() == 4 and ours["intersections"][2] == 0


@on_cpu
def test_a_class_of_minus_infinity_is_no_class(backend: str):
    case, fewer = (Case((2, num_classes, 9, 20), (36, 80)) for num_classes in (6, 5))
    logits, labels, weights = make_logits(case)[0], make_labels(case), make_weights(case)
    labels[labels == 3] = 255
    logits[:, 3] = -torch.inf
    kept = torch.tensor([0, 1, 2, 4, 5])
    kept_labels = torch.full((256,), 255).index_put_((kept,), torch.arange(5))
    kept_labels = kept_labels[labels.where((labels >= 0) & (labels < 6), 255)]
    weights_of_kept = {name: w[kept] if w.dim() == 1 else w for name, w in weights.items()}
    ours, dlogits = run(case, logits, labels, weights)
    others, gradient = run(fewer, logits[:, kept], kept_labels, weights_of_kept)
    torch.testing.assert_close(dlogits[:, kept], gradient)
    assert not dlogits[:, 3].any()
    for name, statistic in ours.items():
        torch.testing.assert_close(
            statistic[kept] if statistic.dim() == 1 else statistic, others[name]
        )
        assert statistic.dim() != 1 or not statistic[3]


@each_ratio
def test_shaped_losses(pixels, align_corners, backend: str):
    """A class that is −inf and has no weight; NaN in ignored pixels; a label whose loss is ∞."""
    case = Case((1, 4, 3, 4), pixels, F32, align_corners, weights_by="class", focal_gamma=2.0)
    logits, weights = make_logits(case)[0], make_weights(case)
    labels = torch.randint(1, 4, case.labels_size)
    logits[0, 0] = -torch.inf  # v = 0
    logits[0, 2, 1, 2] = torch.nan
    labels[0, read_by(pixels, align_corners, 1, 2)] = 255
    through = ("losses", "pixel_losses")
    for min_loss in (-torch.inf, 0.2):
        case = case._replace(min_loss=min_loss)
        ours, dlogits = run(case, logits, labels, weights, through)
        expected = run_reference(case, logits, labels, weights, through)
        torch.testing.assert_close((ours, dlogits), expected, rtol=1e-5, atol=1e-5)
        assert dlogits.isfinite().all() and dlogits[0, 1].any() and not dlogits[0, 0].any()
    labels[0, 0, 0] = 0
    ours, _ = run(case, logits, labels, weights, through)
    assert ours["pixel_losses"][0, 0, 0] == ours["losses"][0] == torch.inf
    assert ours["losses"][1:].isfinite().all()


@pytest.mark.parametrize("ratio", [1, 4])
def test_a_label_of_a_masked_class_without_weights(ratio: int, backend: str):
    """a = v = 0: its loss is that of the other classes; without smoothing it is ∞."""
    logits = torch.randn(1, 3, 4, 8)
    logits[:, 2] = -torch.inf
    logits[:, :, :, 0] = torch.nan
    logits.requires_grad_()
    labels = torch.zeros(1, 4 * ratio, 8 * ratio, dtype=torch.int64)
    labels[:, :, : 2 * ratio] = 255
    labels[0, 0, -1] = 2
    weights = torch.tensor([0.9, 0.9, 0.0]), torch.tensor([0.05, 0.05, 0.0])
    options = Options(*weights, focal_gamma=2.0, min_loss=0.1, pixel_losses=True)
    moments = moments_of("test", logits, labels, options)
    (gradient,) = torch.autograd.grad(moments.losses.sum(), logits)
    assert moments.losses.isfinite().all() and gradient.isfinite().all()
    assert gradient[:, :, :, 2:].any() and not gradient[:, 2].any()
    moments = moments_of(
        "test", logits, labels, options._replace(true_weights=None, all_weights=None)
    )
    assert moments.pixel_losses[0, 0, -1] == torch.inf


@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])
@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize(
    "unused",
    [
        1e3,
        # the CPU would need a second comparison for each pixel: 5 to 10 % of two classes' time
        pytest.param(torch.inf, marks=pytest.mark.on("reference", "simulated_triton", "triton")),
    ],
)
def test_pixel_weights(unused: float, ratio: int, focal_gamma: float, backend: str):
    """A pixel that is not used adds nothing, even if its weight is ∞. Nor does a pixel of weight 0,
    even if its loss is ∞."""
    logits = torch.randn(1, 3, 4, 8)
    logits[:, 2] = -torch.inf
    labels = torch.randint(0, 2, (1, 4 * ratio, 8 * ratio))
    labels[0, :, 0], labels[0, 0, -1] = 255, 2
    options = Options(min_loss=0.7, focal_gamma=focal_gamma)
    with ao.use_backend("reference"):
        plain = options.without_loss_options(pixel_losses=True)
        ce = moments_of("test", logits, labels, plain).pixel_losses
    assert ce is not None
    weights = torch.where(ce < options.min_loss, unused, torch.rand(labels.shape))
    weights[labels == 255], weights[labels == 2] = torch.nan, 0

    def results() -> list[Tensor]:
        leaves = logits.clone().requires_grad_(), weights.clone().requires_grad_()
        moments = moments_of("test", leaves[0], labels, options._replace(pixel_weights=leaves[1]))
        assert moments.used is not None
        outputs = [moments.losses, moments.used]
        gradients = torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs])
        return [x.detach() for x in (*outputs, *gradients)]

    ours = results()
    with ao.use_backend("reference"):
        torch.testing.assert_close(ours, results(), rtol=2e-5, atol=2e-5)
    assert all(x.isfinite().all() and x.any() for x in ours)


def test_gradient_of_nan_reaches_the_logits_that_its_pixel_reads(backend: str):
    """With aligned corners, label pixel (2, 2) reads the logit (1, 1) alone."""
    logits = torch.randn(1, 3, 4, 4)
    logits[0, :, 1, 1] = torch.nan
    labels = torch.full((1, 7, 7), 255)
    labels[0, 2, 2], labels[0, 6, 6] = 1, 2
    for outputs in (["intersections"], ["losses", "probability_sums", "intersections"], ["losses"]):
        leaf = logits.clone().requires_grad_()
        moments = ao.ops.softmax_moments(leaf, labels, align_corners=True)
        torch.stack([getattr(moments, name).sum() for name in outputs]).sum().backward()
        expected = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
        expected[0, :, 1, 1] = True
        assert leaf.grad is not None and torch.equal(leaf.grad.isnan(), expected), outputs


@pytest.mark.parametrize(
    ("size", "labels", "dtype"),
    [
        ((0, 5, 3, 4), (0, 6, 8), F32),
        ((2, 5, 3, 4), (2, 6, 8), F16),
        ((0, 5), (0,), F32),
        ((0, 5, 7), (0, 7), F32),
        ((2, 5, 0), (2, 0), F32),
        ((2, 5, 0, 4), (2, 0, 4), F32),
        ((2, 5, 3, 4), (2, 0, 8), F32),
        ((2, 5, 3, 4), (2, 8, 0), F32),
        ((2, 5, 3, 4), (2, 7, 9), F16),
        ((2, 5, 2, 3, 4), (2, 2, 3, 4), F32),
        ((9, 5), (9,), F32),
    ],
)
@pytest.mark.parametrize("per_image", [False, True])
def test_nothing_valid(size, labels, dtype, per_image, backend: str, poisoned: None):
    logits = torch.full(size, torch.nan, dtype=dtype, requires_grad=True)
    ignored = torch.full(labels, 255)
    moments = ao.ops.softmax_moments(logits, ignored, per_image=per_image, **EVERYTHING)
    loss = ao.pixel_cross_entropy(logits, ignored)
    images = (1 if len(size) == 2 else size[0],) if per_image else ()
    for statistic in moments[:6]:
        assert statistic.shape == (*images, 5)
    assert moments.pixel_losses.shape == labels
    assert not any(x.any() for x in (*moments[:7], loss))
    outputs = [*moments[2:7], loss]
    (gradient,) = torch.autograd.grad(outputs, logits, outputs)  # pyright: ignore
    assert gradient.shape == size and not gradient.any()

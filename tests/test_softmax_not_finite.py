"""Softmax moments of logits that are not finite, on every backend. A pixel reads a logit if its
weight is not 0. A NaN affects the pixels that read it, and nothing else."""

import math

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops._moments import Options, Wanted
from anchorops._ops.softmax_moments import moments_of
from anchorops._shared.upsampling import upsample
from anchorops.doctor.catalogue import Case
from tests.helpers.softmax_cases import BF16, CE, F16, F32, F64, moments, run, run_reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the machine for PTX

RATIOS = [  # of labels to logits of (3, 4)
    ((12, 16), False),
    ((9, 13), True),
    ((3, 4), False),
]
each_ratio = pytest.mark.parametrize(("pixels", "align_corners"), RATIOS)
CASES = [
    moments((2, 7, 9, 20), (36, 80), coherent=True),
    moments((2, 7, 9, 20), (36, 80), BF16, True, layout="channels_last"),
    moments((2, 7, 9, 20), (31, 67), F32, True),
    moments((2, 3, 9, 20), (72, 160), F16),
    moments((2, 7, 9, 20), (9, 20), F32),
    moments((2, 7, 9, 20), (5, 11), F64),
    moments((2, 2, 5, 6), (20, 24)),
]


def read_by(pixels: tuple[int, int], align_corners: bool, row: int, column: int) -> Tensor:
    """bool [H, W]: the pixels that read the logit at (row, column)."""
    x = torch.zeros(1, 1, 3, 4)
    x[0, 0, row, column] = 1
    return upsample(x, pixels, align_corners)[0, 0] != 0


@each_ratio
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_spoils_the_pixels_that_read_it(pixels, align_corners, value, backend: str):
    case = moments((2, 5, 3, 4), pixels, F32, align_corners)
    logits, labels = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, *pixels))
    spoilt = read_by(pixels, align_corners, 1, 2)
    labels[1, spoilt] %= 2
    clean = run(case, logits=logits, labels=labels)
    logits[1, 3, 1, 2] = value
    ours = run(case, logits=logits, labels=labels)
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
    reached, dlogits, right = torch.tensor(reached), ours["dlogits"], clean["dlogits"]
    assert not dlogits[1, 3, 1, 2].isfinite()
    assert torch.equal(dlogits[0], right[0])
    torch.testing.assert_close(dlogits[1][:, ~reached], right[1][:, ~reached])
    if math.isnan(value):
        assert dlogits[1][:, reached].isnan().all()


def test_a_pixel_just_above_a_row_of_logits(backend: str):
    """In float32 the middle one of 37 rows is just above row 1 of 3, so it does not read row 2."""
    logits, labels = torch.randn(1, 3, 3, 4), torch.zeros(1, 37, 16, dtype=torch.int64)
    logits[0, 1, 2, 2] = torch.nan
    losses = run(moments((1, 3, 3, 4), (37, 16)), logits=logits, labels=labels)["pixel_losses"]
    spoilt = read_by((37, 16), False, 2, 2)
    assert torch.equal(losses[0].isnan(), spoilt) and not spoilt[18].any()


@pytest.mark.on("cpu")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_the_reference(case: Case, value: float, backend: str):
    """One logit, all classes of a position, and a whole class."""
    logits = case.sample.inputs()["logits"]
    logits[0, 0, 2, 3] = logits[1, :, 4, 4] = value
    if logits.shape[1] > 2:
        logits[1, 2] = value
    wide = logits if logits.dtype == F64 else logits.float()
    expected = run_reference(case, logits=wide)
    for name, actual in run(case, logits=logits).items():
        rtol = 1e-2 if actual.dtype in (BF16, F16) else 1e-5
        right = expected[name]
        atol = rtol * float(torch.where(right.isfinite(), right, 0).abs().max())
        options = {"rtol": rtol, "atol": atol, "equal_nan": True}
        torch.testing.assert_close(actual, right.to(actual.dtype), **options)


@each_ratio
def test_minus_infinity_masks_a_class(pixels, align_corners, backend: str):
    """A logit of −inf, in a whole plane or at single positions: p = 0, gradient 0, no NaN."""
    case = moments((1, 5, 3, 4), pixels, F32, align_corners)
    logits, labels = torch.randn(1, 5, 3, 4), torch.randint(0, 2, (1, *pixels))
    logits[0, 2] = -torch.inf
    logits[0, 4, 0, 1] = -torch.inf
    logits[0, 3, 1:, 2:] = -torch.inf
    ours, expected = (f(case, logits=logits, labels=labels) for f in (run, run_reference))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert not ours["dlogits"][0, 2].any() and not ours["dlogits"][0, 4, 0, 1].any()
    labels[0, 1, 1] = 2  # a masked class is not expected: its loss is infinite
    ours = run(case, logits=logits, labels=labels)
    assert ours["losses"][2] == torch.inf and ours["pixel_losses"][0, 1, 1] == torch.inf
    assert ours["losses"].isfinite().sum() == 4 and ours["intersections"][2] == 0


@each_ratio
def test_shaped_losses(pixels, align_corners, backend: str):
    """A class that is −inf and has no weight; NaN in ignored pixels; a label whose loss is ∞."""
    logits, labels = torch.randn(1, 4, 3, 4), torch.randint(1, 4, (1, *pixels))
    logits[0, 0] = -torch.inf  # v = 0
    logits[0, 2, 1, 2] = torch.nan
    labels[0, read_by(pixels, align_corners, 1, 2)] = 255
    options = {"weights_by": "class", "focal_gamma": 2.0, "through": ("losses", "pixel_losses")}
    for min_loss in (None, 0.2):
        options["min_loss"] = min_loss
        case = moments((1, 4, 3, 4), pixels, F32, align_corners, **options)
        ours, expected = (f(case, logits=logits, labels=labels) for f in (run, run_reference))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        gradient = ours["dlogits"]
        assert gradient.isfinite().all() and gradient[0, 1].any() and not gradient[0, 0].any()
    labels[0, 0, 0] = 0
    ours = run(case, logits=logits, labels=labels)
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
    options, wanted = Options(*weights, focal_gamma=2.0, min_loss=0.1), Wanted(pixel_losses=True)
    moments = moments_of("test", logits, labels, options, wanted)
    (gradient,) = torch.autograd.grad(moments.losses.sum(), logits)
    assert moments.losses.isfinite().all() and gradient.isfinite().all()
    assert gradient[:, :, :, 2:].any() and not gradient[:, 2].any()
    options = options._replace(true_weights=None, all_weights=None)
    moments = moments_of("test", logits, labels, options, wanted)
    assert moments.pixel_losses[0, 0, -1] == torch.inf


@pytest.mark.parametrize("focal_gamma", [None, 2.0])
@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize(
    "unused",
    [
        1e3,
        # the CPU would need a second comparison for each pixel: 5 to 10 % of two classes' time
        pytest.param(torch.inf, marks=pytest.mark.on("reference", "simulated_triton", "triton")),
    ],
)
def test_pixel_weights(unused: float, ratio: int, focal_gamma: float | None, backend: str):
    """A pixel that is not used adds nothing, even if its weight is ∞. Nor does a pixel of weight 0,
    even if its loss is ∞."""
    logits = torch.randn(1, 3, 4, 8)
    logits[:, 2] = -torch.inf
    labels = torch.randint(0, 2, (1, 4 * ratio, 8 * ratio))
    labels[0, :, 0], labels[0, 0, -1] = 255, 2
    chosen = {"min_loss": 0.7, "focal_gamma": focal_gamma}
    with ao.use_backend("reference"):
        losses = ao.pixel_cross_entropy(logits, labels, reduction="none")
    weights = torch.where(losses < 0.7, unused, torch.rand(labels.shape))
    weights[labels == 255], weights[labels == 2] = torch.nan, 0

    case = moments((1, 3, 4, 8), (4 * ratio, 8 * ratio), statistics=CE, **chosen)
    inputs = {"logits": logits, "labels": labels, "pixel_weights": weights}
    ours = run(case, **inputs)
    torch.testing.assert_close(ours, run_reference(case, **inputs), rtol=2e-5, atol=2e-5)
    assert all(ours[x].isfinite().all() and ours[x].any() for x in ("losses", "dlogits"))
    assert ours["used"].isfinite().all() and ours["dweights"].isfinite().all()


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

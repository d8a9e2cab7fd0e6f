"""Softmax moments of logits that are not finite. A pixel reads a logit if its weight is not 0. A
NaN affects the pixels that read it, and nothing else."""

import pytest
import torch
from emulator import BACKEND
from pixels import Case, exact_values_and_gradient, make_logits, make_weights, values_and_gradient

import anchorops as ao
from anchorops import reference

RATIOS = [((3, 4), (12, 16), False), ((3, 4), (9, 13), True), ((3, 4), (3, 4), False)]


def read_by(size, pixels, align_corners, row, column):
    """bool [H, W]: the pixels that read the logit at (row, column)."""
    x = torch.zeros(1, 1, *size)
    x[0, 0, row, column] = 1
    return reference.upsample(x, pixels, align_corners)[0, 0] != 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("size", "pixels", "align_corners"), RATIOS)
def test_not_finite_logit_spoils_the_pixels_that_read_it(size, pixels, align_corners, value):
    case = Case((2, 5, *size), pixels, align_corners)
    logits, labels, weights = (
        make_logits(case),
        torch.randint(0, 5, (2, *pixels)),
        make_weights(case),
    )
    spoilt = read_by(size, pixels, align_corners, 1, 2)
    labels[1, spoilt] %= 2
    clean, clean_gradient = values_and_gradient(case, logits, labels, weights)
    logits[1, 3, 1, 2] = value
    ours, dlogits = values_and_gradient(case, logits, labels, weights)
    for name in ("pixel_losses", "lse"):
        assert torch.equal(ours[name][0], clean[name][0])
        torch.testing.assert_close(ours[name][1][~spoilt], clean[name][1][~spoilt])
        assert not ours[name][1][spoilt].isfinite().any()
    assert not ours["masses"][3].isfinite()
    assert not ours["losses"][labels[1, spoilt]].isfinite().any()
    torch.testing.assert_close(ours["losses"][2:], clean["losses"][2:])
    # Positions that no affected pixel reads keep their gradient. That of the logit is not finite.
    reached = torch.tensor(
        [
            [(read_by(size, pixels, align_corners, i, j) & spoilt).any() for j in range(size[1])]
            for i in range(size[0])
        ]
    )
    assert not dlogits[1, 3, 1, 2].isfinite()
    assert torch.equal(dlogits[0], clean_gradient[0])
    torch.testing.assert_close(dlogits[1][:, ~reached], clean_gradient[1][:, ~reached])
    if torch.isnan(torch.tensor(value)):
        assert dlogits[1][:, reached].isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("size", "pixels", "align_corners"), RATIOS)
def test_ignored_pixels_change_nothing(size, pixels, align_corners):
    """Every pixel that reads a NaN or an Inf is ignored. Then the results are those of finite
    logits, except for rounding, because another maximum may be subtracted."""
    case = Case((1, 5, *size), pixels, align_corners)
    logits, labels, weights = (
        make_logits(case),
        torch.randint(0, 5, (1, *pixels)),
        make_weights(case),
    )
    labels[0, read_by(size, pixels, align_corners, 1, 2)] = 255
    expected = values_and_gradient(case, logits, labels, weights)
    for value in (torch.nan, torch.inf, -torch.inf):
        logits[0, 3, 1, 2] = value
        ours = values_and_gradient(case, logits, labels, weights)
        torch.testing.assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("size", "pixels", "align_corners"), RATIOS)
def test_minus_infinity_masks_a_class(size, pixels, align_corners):
    """A logit of −inf, in a whole plane or at single positions: p = 0, gradient 0, no NaN."""
    case = Case((1, 5, *size), pixels, align_corners)
    logits, weights = make_logits(case), make_weights(case)
    labels = torch.randint(0, 2, (1, *pixels))
    logits[0, 2] = -torch.inf
    logits[0, 4, 0, 1] = -torch.inf
    logits[0, 3, 1:, 2:] = -torch.inf
    ours, dlogits = values_and_gradient(case, logits, labels, weights)
    exact, exact_gradient = exact_values_and_gradient(case, logits, labels, weights)
    for name in ours:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dlogits, exact_gradient, rtol=1e-5, atol=1e-5)
    assert not dlogits[0, 2].any() and not dlogits[0, 4, 0, 1].any()
    labels[0, 1, 1] = 2  # a masked class is not expected: its loss is infinite
    ours, _ = values_and_gradient(case, logits, labels, weights)
    assert ours["losses"][2] == torch.inf and ours["pixel_losses"][0, 1, 1] == torch.inf
    assert ours["losses"].isfinite().sum() == 4 and ours["overlaps"][2] == 0


@pytest.mark.skipif(BACKEND == "cuda", reason="it leaves shaped losses to Triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("size", "pixels", "align_corners"), RATIOS)
def test_shaped_losses(size, pixels, align_corners):
    """A class that is −inf and has no weight; NaN in ignored pixels; a label whose loss is ∞."""
    case = Case((1, 4, *size), pixels, align_corners, smoothing="class", focal_gamma=2.0)
    logits, weights = make_logits(case), make_weights(case)
    labels = torch.randint(1, 4, (1, *pixels))
    logits[0, 0] = -torch.inf  # v = 0
    logits[0, 2, 1, 2] = torch.nan
    labels[0, read_by(size, pixels, align_corners, 1, 2)] = 255
    through = ("losses", "pixel_losses")
    for min_loss in (None, 0.2):
        case = case._replace(min_loss=min_loss)
        ours, dlogits = values_and_gradient(case, logits, labels, weights, through)
        exact, exact_gradient = exact_values_and_gradient(case, logits, labels, weights, through)
        for name in ours:
            torch.testing.assert_close(ours[name], exact[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dlogits, exact_gradient, rtol=1e-5, atol=1e-5)
        assert dlogits.isfinite().all() and dlogits[0, 1].any() and not dlogits[0, 0].any()
    labels[0, 0, 0] = 0
    ours, _ = values_and_gradient(case, logits, labels, weights, through)
    assert ours["pixel_losses"][0, 0, 0] == ours["losses"][0] == torch.inf
    assert ours["losses"][1:].isfinite().all()


def test_gradient_of_nan_reaches_the_logits_that_its_pixel_reads():
    """With aligned corners, label pixel (2, 2) reads the logit (1, 1) alone."""
    logits = torch.randn(1, 3, 4, 4)
    logits[0, :, 1, 1] = torch.nan
    labels = torch.full((1, 7, 7), 255)
    labels[0, 2, 2], labels[0, 6, 6] = 1, 2
    for outputs in (["overlaps"], ["losses", "masses", "overlaps"], ["losses"]):
        leaf = logits.clone().requires_grad_()
        moments = ao.ops.softmax_moments(leaf, labels, align_corners=True)
        torch.stack([getattr(moments, name).sum() for name in outputs]).sum().backward()
        expected = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
        expected[0, :, 1, 1] = True
        assert leaf.grad is not None and torch.equal(leaf.grad.isnan(), expected), outputs

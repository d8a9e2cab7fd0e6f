import pytest
import torch
from emulator import BACKEND

from anchorops import reference
from anchorops.ops.unit_rows import unit_rows, unit_views

EPS = 1e-6


def check(rows, counts=None):
    rows.requires_grad_()
    units, drows = unit_rows(rows, counts, eps=EPS), torch.randn(rows.shape)
    (gradient,) = torch.autograd.grad(units, rows, drows)
    wide = rows.detach().double().requires_grad_()
    expected = reference.unit_rows(wide, counts, eps=EPS)
    (dwide,) = torch.autograd.grad(expected, wide, drows.double())
    torch.testing.assert_close(units.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), dwide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 12), (3, 2, 40), (1, 1), (7, 33)])
def test_rows(shape):
    check(torch.randn(shape))


def test_means():
    counts = torch.tensor([[3, 0], [100, 1], [7, 2]])
    sums = torch.randn(3, 2, 20) * counts[..., None]
    check(sums, counts)


def test_short_rows_keep_a_finite_gradient():
    rows = torch.randn(3, 10)
    rows[0] = 0
    rows[1] *= 1e-9
    check(rows)


def test_strides_dtypes_and_nothing():
    check(torch.randn(12, 6).T)
    units = unit_rows(torch.randn(4, 8).bfloat16(), eps=EPS)
    assert units.dtype == torch.bfloat16
    assert unit_rows(torch.empty(0, 3), eps=EPS).shape == (0, 3)


@pytest.mark.parametrize(
    ("groups", "dim", "used"), [(2, 40, "units"), (1, 7, "both"), (4, 33, "both"), (3, 16, "means")]
)
def test_views(groups, dim, used):
    counts = torch.randint(1, 9, (5, groups))
    counts[2], counts[3, 0] = 0, 0
    sums = torch.randn(5, groups, dim) * counts[..., None]
    results, weights = [], torch.randn(2, 5, groups, dim)
    for given in (sums, sums.double()):
        given.requires_grad_()
        if given.dtype == torch.float32:
            units, means, centroids, present = unit_views(
                given, counts, eps=EPS, with_means=used != "units", with_centroids=True
            )
        else:
            units, means, centroids, present = reference.unit_views(given, counts, EPS, True, True)
        found = {"units": (units,), "means": (means,), "both": (units, means)}[used]
        parts = [(x * w.to(x.dtype)).sum() for x, w in zip(found, weights, strict=False)]
        gradients = torch.autograd.grad(torch.stack(parts).sum(), given)
        results.append((*found, centroids, present.double(), *gradients))
        assert not centroids.requires_grad and present.any() and not present.all()
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def test_operators_are_registered_as_torch_expects():
    counts = torch.tensor([[3, 0], [2, 1]])
    rows = torch.randn(2, 2, 6, requires_grad=True)
    operators = torch.ops.anchorops
    for given in ((counts, EPS, True, True), (None, EPS, False, False)):
        torch.library.opcheck(getattr(operators.unit_rows, BACKEND), (rows, *given))
        units, means, _, norms, _ = getattr(operators.unit_rows, BACKEND)(rows.detach(), *given)
        inputs = units, means if given[2] else None, units, norms, given[0], EPS
        torch.library.opcheck(getattr(operators.unit_rows_backward, BACKEND), inputs)

import pytest
import torch

from anchorops import reference
from anchorops.ops.unit_rows import unit_rows

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

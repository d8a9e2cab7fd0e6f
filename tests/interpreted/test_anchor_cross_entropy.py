import pytest
import torch
from emulator import BACKEND

from anchorops import reference
from anchorops.ops.anchor_cross_entropy import anchor_cross_entropy

INF, NAN = float("inf"), float("nan")


def check(logits, delta=0.3):
    logits = logits.detach().requires_grad_()
    losses, recognised = anchor_cross_entropy(logits, delta=delta)
    dlosses = torch.randn(losses.shape)
    (gradient,) = torch.autograd.grad(losses, logits, dlosses)
    wide = logits.detach().double().requires_grad_()
    expected, same = reference.anchor_cross_entropy(wide, delta=delta)
    (dwide,) = torch.autograd.grad(expected, wide, dlosses.double())
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-7, equal_nan=True)
    torch.testing.assert_close(gradient.double(), dwide, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert recognised.tolist() == same.tolist()
    return recognised


@pytest.mark.parametrize("classes", [1, 2, 19, 33, 70])
def test_classes(classes):
    recognised = check(torch.randn(classes, classes) + 3 * torch.rand(classes).diag())
    assert recognised.any()


def test_large_logits_keep_their_digits():
    check(3000 + 4 * torch.randn(5, 5))


def test_of_equal_logits_the_first_is_the_argmax():
    assert check(torch.zeros(4, 4), delta=0.0).tolist() == [True, False, False, False]


def test_values_that_are_not_finite():
    logits = torch.randn(5, 5)
    logits[0, 3], logits[1, 0], logits[2, 2], logits[3, 3] = NAN, INF, INF, -INF
    logits[4, :4] = -INF
    assert check(logits).tolist() == [False, False, False, False, True]


def test_strides_and_dtypes():
    check(torch.randn(6, 6).T)
    losses, _ = anchor_cross_entropy(torch.randn(3, 3).bfloat16(), delta=0.5)
    assert losses.dtype == torch.float32
    with pytest.raises(ValueError, match=r"anchor_cross_entropy: .*does not support float64"):
        anchor_cross_entropy(torch.randn(3, 3).double(), delta=0.5)


def test_with_torch():
    operators = torch.ops.anchorops
    logits = torch.randn(4, 4, requires_grad=True)
    torch.library.opcheck(getattr(operators.anchor_cross_entropy, BACKEND), (logits, 0.5))
    given = torch.randn(4), logits.detach()
    torch.library.opcheck(getattr(operators.anchor_cross_entropy_backward, BACKEND), given)
    losses, _ = anchor_cross_entropy(logits, delta=0.5)
    (first,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="anchor_cross_entropy: second derivatives"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match=r"anchor_cross_entropy: torch.func's derivatives"):
        torch.func.grad(lambda x: anchor_cross_entropy(x, delta=0.5)[0].sum())(logits.detach())

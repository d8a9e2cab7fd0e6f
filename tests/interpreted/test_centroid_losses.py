"""Both losses of centroids and their gradients, as the reference computes them in float64."""

import pytest
import torch
from emulator import BACKEND

import anchorops as ao
from anchorops.ops import centroid_losses as operator
from anchorops.ops.centroid_losses import centroid_losses

OCCL = {"mirrored": True, "temperature": 0.2, "class_temperature": 0.2}
MVSC = {"temperature": 0.2, "class_temperature": 1.0}
WEIGHTS = {"contrast_weight": 0.3, "class_weight": 0.7}


def inputs(num_classes, groups, dim, names):
    shapes = {
        "queries": (num_classes, groups, dim),
        "keys": (num_classes, dim),
        "weight": (num_classes, dim),
        "rows": (num_classes, groups, dim),
        "bias": (num_classes,),
        "added": (num_classes,),
    }
    return {name: torch.randn(shapes[name]) / 2 for name in names}


def results(given, **options):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    losses = centroid_losses(**leaves, **WEIGHTS, **options)
    total = torch.stack(losses.terms).sum() if losses.total is None else losses.total
    gradients = torch.autograd.grad(1.5 * total, list(leaves.values()))
    return [total.detach(), *(x.detach() for x in losses.terms), losses.present, *gradients]


def check(given, **options):
    ours = results(given, **options)
    with ao.use_backend("reference"):
        expected = results({name: tensor.double() for name, tensor in given.items()}, **options)
    for x, y in zip(ours, expected, strict=True):
        assert x.dtype == torch.float32 and x.isfinite().all()
        rounding = 2e-6 * max(1.0, float(y.abs().max()))  # of the largest terms
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=rounding)
    return ours


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("num_classes", "dim"), [(1, 3), (19, 40), (37, 130)])
def test_the_queries_are_classified(num_classes, dim, reduction):
    present = (torch.rand(num_classes) < 0.7)[:, None].expand(-1, 2)
    given = inputs(num_classes, 2, dim, ["queries", "keys", "weight"])
    check(given, present=present, reduction=reduction, **OCCL)


@pytest.mark.parametrize("names", [["rows"], ["rows", "bias"], ["rows", "bias", "added"], ["bias"]])
@pytest.mark.parametrize(("num_classes", "groups", "dim"), [(5, 3, 12), (35, 4, 70), (260, 1, 4)])
def test_other_rows_are_classified(num_classes, groups, dim, names):
    present = torch.rand(num_classes, groups) < 0.7
    given = inputs(num_classes, groups, dim, ["queries", "keys", "weight", *names])
    check(given, present=present, **MVSC)


def test_absent_rows_may_hold_nan():
    present = torch.rand(20, 2) < 0.5
    given = inputs(20, 2, 24, ["queries", "keys", "weight", "rows", "bias"])
    given["queries"][~present], given["rows"][~present] = torch.nan, torch.inf
    given["keys"][~present.any(1)] = torch.nan
    check(given, present=present, **MVSC)
    check(given, present=torch.zeros(20, 2) > 0, **MVSC)


@pytest.mark.skipif(BACKEND != "cuda", reason="Triton computes one loss after the other")
def test_so_many_rows_that_one_loss_would_have_large_tiles():
    given = inputs(1, 8200, 1, ["queries", "keys", "weight"])
    options = MVSC | {"present": torch.rand(1, 8200) < 0.7}
    found = centroid_losses(**given, **WEIGHTS, **options)
    assert found.total is not None
    with ao.use_backend("reference"):
        expected = centroid_losses(**given, **WEIGHTS, **options)
    torch.testing.assert_close(found.terms, expected.terms)


def test_strides():
    given = inputs(9, 4, 33, ["queries", "keys", "weight", "rows", "added"])
    given["rows"] = torch.randn(4, 9, 66)[..., ::2].transpose(0, 1)
    given["added"] = torch.randn(1).expand(9)
    given["bias"] = torch.randn(9, 34)[:, -1]
    given["keys"] = torch.randn(33, 9).T
    present = (torch.rand(4, 9) < 0.7).T
    check(given, present=present, **MVSC)


@pytest.mark.skipif(BACKEND != "cuda", reason="Triton computes one loss after the other")
def test_with_more_logits_one_loss_after_the_other(monkeypatch):
    given = inputs(20, 2, 24, ["queries", "keys", "weight"])
    options = OCCL | {"present": torch.rand(20, 2) < 0.8}
    together = check(given, **options)
    assert centroid_losses(**given, **WEIGHTS, **options).total is not None
    monkeypatch.setattr(operator, "MOST_LOGITS", 20 * 2 * 20 - 1)
    assert centroid_losses(**given, **WEIGHTS, **options).total is None
    torch.testing.assert_close(together, check(given, **options))


@pytest.mark.skipif(BACKEND != "cuda", reason="Triton computes one loss after the other")
def test_operators_are_registered_as_torch_expects():
    operators, options = torch.ops.anchorops, (False, 0.1, 1.0)
    present = torch.rand(6, 2) < 0.7
    for names in ([], ["rows", "bias", "added"]):
        given = inputs(6, 2, 5, ["queries", "keys", "weight", *names])
        tensors = [given.get(name) for name in ("queries", "keys", "rows", "weight", "bias")]
        tensors[0].requires_grad_()
        arguments = *tensors, given.get("added"), present, *options, 0.5, 0.3, True
        torch.library.opcheck(operators.centroid_losses.cuda, arguments)
        _, _, *saved = operators.centroid_losses.cuda(*arguments)
        tensors[0] = tensors[0].detach()
        arguments = torch.tensor(1.0), *tensors, present, *saved, *options
        backward = operators.centroid_losses_backward.cuda
        torch.library.opcheck(backward, (*arguments, True, False))
        both, none = backward(*arguments, True, True), backward(*arguments, False, False)
        assert [x.shape for x in (none[1], none[3])] == [(0,), (0,)]  # dkeys, dweight
        for i in (0, 2, 4):
            assert torch.equal(both[i], none[i])


def test_gradients_that_are_not_needed():
    """OCCL's keys have no gradient; of a frozen classifier, the weight has none."""
    given = inputs(6, 2, 5, ["queries", "keys", "weight"])
    options = OCCL | WEIGHTS | {"present": torch.ones(6, 2) > 0}

    def gradient(*learnable: str) -> torch.Tensor | None:
        leaves = {name: x.clone().requires_grad_(name in learnable) for name, x in given.items()}
        losses = centroid_losses(**leaves, **options)
        total = torch.stack(losses.terms).sum() if losses.total is None else losses.total
        total.backward()
        assert all((x.grad is not None) == (name in learnable) for name, x in leaves.items())
        return leaves[learnable[0]].grad

    every = gradient("queries", "keys", "weight")
    assert every is not None
    assert torch.equal(gradient("queries", "weight"), every)
    assert torch.equal(gradient("queries"), every)
    gradient("weight")


def test_second_derivatives_raise():
    given = inputs(6, 2, 5, ["queries", "keys", "weight"])
    given["queries"].requires_grad_()
    losses = centroid_losses(**given, **WEIGHTS, **OCCL, present=torch.ones(6, 2) > 0)
    total = losses.terms[0] if losses.total is None else losses.total
    (gradient,) = torch.autograd.grad(total, given["queries"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()

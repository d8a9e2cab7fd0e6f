"""Centroid InfoNCE against a plain formula, within the error budget. It is a function of torch."""

import math
import sys
from typing import Any

import pytest
import torch
from host_time import Operators
from operators import check, results
from torch import Tensor

import anchorops as ao
from anchorops import catalogue
from anchorops.catalogue import Case, Entry, Inputs, Sample, formulas
from tests import test_guarantees_of_torch as of_torch
from tests.helpers.memory import peak_allocated_bytes

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
REDUCTIONS = ("mean", "sum", "none")


def formula(queries: Tensor, keys: Tensor, **others: Any) -> Tensor:
    """Of finite numbers: what is absent may hold anything."""
    if "positives" in others:
        others["positives"] = others["positives"].nan_to_num(0, 0, 0)
    finite = (x.nan_to_num(0, 0, 0) for x in (queries, keys))
    return formulas.centroid_info_nce(*finite, **others)


INFO_NCE = Entry("InfoNCE", (), ao.ops.centroid_info_nce, formula)


(OF_GUARANTEES,) = (x for x in catalogue.cases("small") if str(x) == "centroid_info_nce")


def check_info_nce(
    queries: Tensor, keys: Tensor, positives: Tensor | None = None, **others: Any
) -> Inputs:
    """The loss and all gradients are within the error budget. Returns the inputs."""
    others |= {"queries": queries, "keys": keys, "positives": positives}
    inputs = {name: x for name, x in others.items() if isinstance(x, Tensor)}
    inputs = {name: inputs[name] for name in ("queries", *inputs)}  # the first one is checked more
    options = {name: x for name, x in others.items() if isinstance(x, float | str)}
    check(Case(INFO_NCE, Sample("centroids", lambda n, random: inputs, options)), "reference")
    return inputs


def inputs(groups: int | None, with_positives: bool):
    shape = (6, 5) if groups is None else (6, groups, 5)
    queries = torch.randn(shape, dtype=F64)
    positives = torch.randn(shape, dtype=F64) if with_positives else None
    return queries, torch.randn(6, 5, dtype=F64), positives


def test_in_parts(monkeypatch):
    """The logits of a few rows at a time: the same losses, first and second derivatives."""
    module = sys.modules["anchorops._ops.centroid_info_nce"]
    queries, keys, positives = (t.requires_grad_() for t in inputs(3, True) if t is not None)
    options = {"present": torch.rand(6, 3) < 0.7, "temperature": 0.5, "reduction": "none"}

    def losses(queries: Tensor, keys: Tensor, positives: Tensor) -> Tensor:
        default = ao.ops.centroid_info_nce(queries, keys, positives=positives, **options)
        every = torch.ones(6, dtype=torch.bool)
        other = ao.ops.centroid_info_nce(queries, keys, present_keys=every, **options)
        return torch.stack((default, other))

    leaves = queries, keys, positives
    results = []
    for logits in (module.LOGITS_AT_ONCE, 1):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", logits)
        monkeypatch.setattr(module, "LOGITS_OF_PART", 5 * 6)  # five rows of 18
        values = losses(*leaves)
        results.append((values, *torch.autograd.grad(values.square().sum(), leaves)))
    torch.testing.assert_close(*results)
    assert torch.autograd.gradcheck(losses, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(losses, leaves, fast_mode=True)


def test_in_parts_under_a_transform(monkeypatch):
    module = sys.modules["anchorops._ops.centroid_info_nce"]
    queries, keys, _ = inputs(None, False)

    def loss(keys: Tensor) -> Tensor:
        return ao.ops.centroid_info_nce(queries.detach(), keys, temperature=0.5)

    (expected,) = torch.autograd.grad(loss(keys.requires_grad_()), keys)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 1)
    torch.testing.assert_close(torch.func.grad(loss)(keys.detach()), expected)


def test_memory():
    """4096 × 4096 logits are 64 MiB in float32; the formula for all of them needs 4.5 tensors of
    this size. In parts it needs 18.4 MiB."""
    queries, keys = torch.randn(2, 4096, 8).requires_grad_().unbind()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ao.ops.centroid_info_nce(queries, keys), (queries, keys))

    step()
    assert peak_allocated_bytes(step) < 24 << 20


@pytest.mark.parametrize(
    ("shape", "dtype", "reduction"),
    [
        ((1, 3), F32, "mean"),
        ((19, 40), F32, "sum"),
        ((37, 130), BF16, "mean"),
        ((33, 64), F16, "none"),
    ],
)
@pytest.mark.parametrize("with_positives", [False, True])
def test_values_and_gradients(shape, dtype, reduction: str, with_positives: bool):
    queries, keys, positives = torch.randn(3, *shape).to(dtype) / 4
    given = queries, keys, positives if with_positives else None
    check_info_nce(*given, reduction=reduction)


@pytest.mark.on("gpu")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((19, 40), F32), ((150, 768), F32), ((150, 768), BF16), ((80, 4, 256), F16)],
)
@pytest.mark.parametrize("with_positives", [False, True])
def test_values_and_gradients_on_a_gpu(backend: str, shape, dtype, with_positives: bool):
    queries, positives = torch.randn(2, *shape).div(shape[-1] ** 0.25).to(dtype)
    keys, present = torch.randn(shape[0], shape[-1]).to(dtype), torch.rand(shape[:-1]) < 0.8
    given = queries, keys, positives if with_positives else None
    inputs = check_info_nce(*given, present=present)
    first, again = (results(ao.ops.centroid_info_nce, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_operator_that_adds_in_any_order(monkeypatch):
    """The gradients of gather and index_select do, on a GPU: scatter_add, index_add."""
    monkeypatch.setattr(sys.modules["anchorops._ops.centroid_info_nce"], "LOGITS_AT_ONCE", 1)
    with Operators() as operators:
        results(OF_GUARANTEES.ours, OF_GUARANTEES.sample.inputs(1))
    names = {name.split(".")[1] for name in operators.names}
    assert "mm" in names
    assert not [x for x in names if "index" in x or "scatter" in x or "put" in x]


@pytest.mark.filterwarnings("ignore")  # as there
@pytest.mark.parametrize("trace", of_torch.TRACES)
def test_traces(trace: str):
    of_torch.test_gradients_that_the_call_does_not_see(trace, OF_GUARANTEES, "auto")


def test_compiles_as_one_graph():
    of_torch.test_compiles_as_one_graph(OF_GUARANTEES, "auto")


@pytest.mark.parametrize("dtype", [F16, F64])
def test_keys_and_positives_of_another_dtype(dtype):
    queries, keys, positives = torch.randn(3, 20, 9)
    check_info_nce(queries, keys.to(dtype))
    check_info_nce(queries, keys.to(dtype), positives.to(dtype))
    check_info_nce(queries.to(BF16), keys, positives.to(dtype))
    loss = ao.ops.centroid_info_nce(queries.to(BF16), keys.to(dtype), reduction="none")
    assert loss.dtype == F32


@pytest.mark.parametrize(
    ("shape", "reduction"),
    [
        ((27, 9), "mean"),
        ((21, 3, 20), "mean"),
        ((21, 3, 20), "none"),
    ],
)
@pytest.mark.parametrize("with_positives", [False, True])
def test_some_are_present(shape, reduction: str, with_positives: bool):
    queries, positives = torch.randn(2, *shape) / 2
    keys, present = torch.randn(shape[0], shape[-1]), torch.rand(shape[:-1]) < 0.7
    given = queries, keys, positives if with_positives else None
    check_info_nce(*given, present=present, reduction=reduction)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("with_positives", [False, True])
@pytest.mark.parametrize("with_keys", [False, True])
def test_absent_classes_may_hold_anything(groups, with_positives: bool, with_keys: bool):
    shape = (40, 24) if groups is None else (40, groups, 24)
    queries, positives = torch.randn(2, *shape) / 2
    keys, present = torch.randn(40, 24) / 2, torch.rand(shape[:-1]) < 0.5
    present[0], present[1] = True, False
    used = present if groups is None else present.any(1)
    present_keys = (torch.rand(40, 2) < 0.7)[:, 0] if with_keys else None
    if present_keys is not None:  # with positives, a query does not use the key of its class
        used = present_keys if with_positives else used | present_keys
    options = {"present": present, "present_keys": present_keys}
    found = []
    for value in (0.0, torch.nan, torch.inf):
        queries[~present] = positives[~present] = keys[~used] = value
        given = queries, keys, positives if with_positives else None
        found.append(results(INFO_NCE.ours, check_info_nce(*given, **options)))
    for _, dqueries, dkeys, *dpositives in found:
        assert not dqueries[~present].any() and not dkeys[~used].any()
        assert all(not gradient[~present].any() for gradient in dpositives)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_classifier(dtype):
    """Logits of all keys, whether their class is present or not; and of some."""
    queries, keys = torch.randn(70, 2, 24).to(dtype), torch.randn(70, 24).to(dtype)
    present = torch.rand(70, 2) < 0.3
    for present_keys in torch.ones(70) > 0, torch.arange(70) % 2 == 0:
        options = {"present_keys": present_keys, "temperature": 1.0}
        check_info_nce(queries, keys, **options)
        check_info_nce(queries, keys, present=present, **options)
        check_info_nce(queries, keys, queries.flip(0), present=present, **options)


def test_no_channels():
    empty = {"queries": torch.randn(40, 2, 0), "keys": torch.randn(40, 0)}
    loss, dqueries, dkeys = results(ao.ops.centroid_info_nce, empty)
    torch.testing.assert_close(loss, torch.tensor(40.0).log())
    assert dqueries.shape == (40, 2, 0) and dkeys.shape == (40, 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_present(reduction: str):
    nan = {name: torch.full((6, 5), torch.nan) for name in ("queries", "keys")}
    options = {"present": torch.zeros(6) > 0, "reduction": reduction}
    found = results(lambda **x: ao.ops.centroid_info_nce(**x, **options), nan)
    assert not any(x.any() for x in found)


def test_one_class_has_nothing_to_be_told_from():
    one = {name: torch.randn(1, 5) for name in ("queries", "keys")}
    loss, dqueries, _ = results(ao.ops.centroid_info_nce, one)
    assert loss == 0 and not dqueries.any()


def test_large_logits_stay_finite():
    queries = torch.tensor([[3e3, 0.0], [0.0, 3e3]])
    inputs = {"queries": queries, "keys": queries.flip(0)}
    loss, *gradients = results(ao.ops.centroid_info_nce, inputs)
    torch.testing.assert_close(loss, torch.tensor(9e6 / 0.07))
    assert all(gradient.isfinite().all() for gradient in gradients)
    check_info_nce(*30 * torch.randn(2, 20, 16), reduction="sum")


Q, K = torch.zeros(4, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": [1.0]}, r"queries: expected a tensor \[K, D\] or \[K, G, D\], got \[1.0\]"),
        ({"queries": torch.zeros(3)}, r"queries: .* got torch.float32 tensor of shape \(3,\)"),
        ({"queries": Q.int()}, "queries: expected float32, .* got torch.int32"),
        ({"keys": torch.zeros(4, 2)}, r"keys: expected \(4, 3\) on cpu, got .* \(4, 2\) on cpu"),
        ({"keys": K.long()}, "keys: expected float32, .* got torch.int64"),
        ({"keys": None}, r"keys: expected \(4, 3\) on cpu, got None"),
        ({"positives": torch.zeros(4)}, r"positives: expected \(4, 3\) on cpu, got .* \(4,\)"),
        ({"positives": Q.int()}, "positives: expected float32, .* got torch.int32"),
        ({"present": torch.ones(3) > 0}, r"present: expected \(4,\) on cpu, got .* \(3,\)"),
        ({"present": torch.ones(4)}, "present: expected a bool tensor, got torch.float32"),
        ({"present_keys": torch.ones(4, 1) > 0}, r"present_keys: expected \(4,\) on cpu"),
        ({"present_keys": torch.ones(4)}, "present_keys: expected a bool tensor"),
        ({"temperature": 0}, "temperature: expected a finite float or int, above 0, got 0"),
        ({"temperature": math.nan}, "temperature: expected a finite float or int, above 0"),
        ({"temperature": 1e-38}, "temperature: expected a normal number of float32, 1.2e-38 to"),
        ({"reduction": "max"}, "reduction: expected 'mean' or 'sum' or 'none', got 'max'"),
    ],
    ids=str,
)
def test_messages(arguments, message: str):
    with pytest.raises(ValueError, match="^centroid_info_nce: " + message):
        ao.ops.centroid_info_nce(**({"queries": Q, "keys": K} | arguments))

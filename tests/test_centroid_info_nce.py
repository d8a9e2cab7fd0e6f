"""Centroid InfoNCE against F.cross_entropy and against plain loops."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao
from tests.helpers.memory import peak_allocated_bytes

F64 = torch.float64
REDUCTIONS = ("mean", "sum", "none")


def loops(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    temperature: float,
) -> Tensor:
    """The formula, one query and one key at a time: losses [K] or [K, G]."""
    grouped = queries.dim() == 3
    rows = queries if grouped else queries[:, None]
    given = positives if grouped or positives is None else positives[:, None]
    here = torch.ones(rows.shape[:2], dtype=torch.bool) if present is None else present
    here = here.view(rows.shape[:2])
    others = here.any(1) if present_keys is None else present_keys
    losses = torch.zeros(rows.shape[:2], dtype=rows.dtype)
    for i in range(rows.shape[0]):
        for g in range(rows.shape[1]):
            if here[i, g]:
                query = rows[i, g]
                own = math.exp(query @ (keys[i] if given is None else given[i, g]) / temperature)
                rest = [
                    math.exp(query @ keys[j] / temperature)
                    for j in range(len(keys))
                    if j != i and others[j]
                ]
                losses[i, g] = -math.log(own / (own + sum(rest)))
    return losses if grouped else losses[:, 0]


def inputs(groups: int | None, with_positives: bool):
    shape = (6, 5) if groups is None else (6, groups, 5)
    queries = torch.randn(shape, dtype=F64)
    positives = torch.randn(shape, dtype=F64) if with_positives else None
    return queries, torch.randn(6, 5, dtype=F64), positives


@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("with_positives", [False, True])
@pytest.mark.parametrize("masks", ["none", "queries", "queries and keys", "keys", "none present"])
def test_equals_loops(groups: int | None, with_positives: bool, masks: str):
    queries, keys, positives = inputs(groups, with_positives)
    present = present_keys = None
    if "queries" in masks or masks == "none present":
        present = torch.rand(queries.shape[:-1]) < (0.6 if "queries" in masks else 0)
    if "keys" in masks:
        present_keys = torch.tensor([True, False, True, True, False, False])
    expected = loops(queries, keys, positives, present, present_keys, 0.7)
    number = expected.numel() if present is None else int(present.sum())
    arguments = {"present": present, "present_keys": present_keys, "temperature": 0.7}
    for reduction, value in zip(
        REDUCTIONS, (expected.sum() / max(number, 1), expected.sum(), expected), strict=True
    ):
        ours = ao.ops.centroid_info_nce(
            queries, keys, positives=positives, reduction=reduction, **arguments
        )
        torch.testing.assert_close(ours, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
def test_equals_cross_entropy(dtype: torch.dtype):
    queries, keys = torch.randn(7, 4).to(dtype), torch.randn(7, 4).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    logits = queries.to(wide) @ keys.to(wide).T / 0.07
    for reduction in REDUCTIONS:
        ours = ao.ops.centroid_info_nce(queries, keys, reduction=reduction)
        assert ours.dtype == wide
        expected = F.cross_entropy(logits, torch.arange(7), reduction=reduction)
        torch.testing.assert_close(ours, expected)
    grouped = torch.randn(7, 3, 4).to(dtype)
    logits = grouped.to(wide).flatten(0, 1) @ keys.to(wide).T / 0.07
    torch.testing.assert_close(
        ao.ops.centroid_info_nce(grouped, keys),
        F.cross_entropy(logits, torch.arange(7).repeat_interleave(3)),
    )


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("with_positives", [False, True])
def test_gradcheck(groups: int | None, with_positives: bool):
    given = [t.requires_grad_() for t in inputs(groups, with_positives) if t is not None]
    present = torch.rand(given[0].shape[:-1]) < 0.7
    present_keys = torch.tensor([True, True, False, True, False, True])

    def loss(queries: Tensor, keys: Tensor, positives: Tensor | None = None) -> Tensor:
        return ao.ops.centroid_info_nce(
            queries,
            keys,
            positives=positives,
            present=present,
            present_keys=present_keys,
            temperature=0.5,
        )

    assert torch.autograd.gradcheck(loss, given)
    assert torch.autograd.gradgradcheck(loss, given)


def test_in_parts(monkeypatch):
    """The logits of a few rows at a time: the same losses, first and second derivatives."""
    reference = sys.modules["anchorops.reference.centroid_info_nce"]
    queries, keys, positives = (t.requires_grad_() for t in inputs(3, True) if t is not None)
    options = {"present": torch.rand(6, 3) < 0.7, "temperature": 0.5, "reduction": "none"}

    def losses(queries: Tensor, keys: Tensor, positives: Tensor) -> Tensor:
        given = ao.ops.centroid_info_nce(queries, keys, positives=positives, **options)
        every = torch.ones(6, dtype=torch.bool)
        other = ao.ops.centroid_info_nce(queries, keys, present_keys=every, **options)
        return torch.stack((given, other))

    leaves = queries, keys, positives
    results = []
    for logits in (reference.LOGITS_AT_ONCE, 1):
        monkeypatch.setattr(reference, "LOGITS_AT_ONCE", logits)
        monkeypatch.setattr(reference, "LOGITS_OF_PART", 5 * 6)  # five rows of 18
        found = losses(*leaves)
        results.append((found, *torch.autograd.grad(found.square().sum(), leaves)))
    torch.testing.assert_close(*results)
    assert torch.autograd.gradcheck(losses, leaves)
    assert torch.autograd.gradgradcheck(losses, leaves)


def test_in_parts_under_a_transform(monkeypatch):
    module = sys.modules["anchorops.reference.centroid_info_nce"]
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


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("with_positives", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_absent_rows_may_hold_anything(groups: int | None, with_positives: bool, value: float):
    queries, keys, positives = inputs(groups, with_positives)
    present = torch.rand(queries.shape[:-1]) < 0.5
    present[0], present[1] = True, False
    used = present if groups is None else present.any(1)
    results = []
    for spoilt in (False, True):
        given = [
            queries.clone(),
            keys.clone(),
            positives if positives is None else positives.clone(),
        ]
        if spoilt:
            given[0][~present], given[1][~used] = value, value
            if given[2] is not None:
                given[2][~present] = value
        leaves = [t.requires_grad_() for t in given if t is not None]
        loss = ao.ops.centroid_info_nce(given[0], given[1], positives=given[2], present=present)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for ours, expected in zip(*results, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, expected)
    assert not results[1][1][~present].any() and not results[1][2][~used].any()


def test_a_key_that_nothing_uses_may_hold_anything():
    """With positives, the key of a class that is absent among the keys is not in any term."""
    queries, keys, positives = (t.requires_grad_() for t in inputs(None, True) if t is not None)
    with torch.no_grad():
        keys[1] = torch.nan
    present_keys = torch.arange(6) != 1
    loss = ao.ops.centroid_info_nce(queries, keys, positives=positives, present_keys=present_keys)
    assert loss.isfinite()
    gradients = torch.autograd.grad(loss, (queries, keys, positives))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 5)])
def test_nothing_present(shape):
    queries = torch.full(shape, torch.nan, requires_grad=True)
    keys = torch.full((6, 5), torch.nan, requires_grad=True)
    present = torch.zeros(shape[:-1], dtype=torch.bool)
    for reduction in REDUCTIONS:
        loss = ao.ops.centroid_info_nce(queries, keys, present=present, reduction=reduction)
        assert not loss.any()
        for gradient in torch.autograd.grad(loss.sum(), (queries, keys)):
            assert not gradient.any()


def test_one_class_has_nothing_to_be_told_from():
    queries, keys = torch.randn(1, 5, requires_grad=True), torch.randn(1, 5)
    loss = ao.ops.centroid_info_nce(queries, keys)
    assert loss == 0 and not torch.autograd.grad(loss, queries)[0].any()


def test_large_logits_stay_finite():
    queries = torch.tensor([[3e3, 0.0], [0.0, 3e3]], requires_grad=True)
    loss = ao.ops.centroid_info_nce(queries, queries.detach().flip(0))
    torch.testing.assert_close(loss, torch.tensor(9e6 / 0.07))
    assert torch.autograd.grad(loss, queries)[0].isfinite().all()


def test_compiled_as_one_graph():
    torch._dynamo.reset()

    def loss(queries: Tensor, keys: Tensor, present: Tensor) -> Tensor:
        return ao.ops.centroid_info_nce(queries, keys, present=present)

    graph = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_classes in (5, 8):
        queries, keys = torch.randn(num_classes, 2, 4), torch.randn(num_classes, 4)
        present = torch.rand(num_classes, 2) < 0.6
        torch.testing.assert_close(graph(queries, keys, present), loss(queries, keys, present))


Q, K = torch.zeros(4, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": [1.0]}, r"queries: expected a tensor \[K, D\] or \[K, G, D\], got \[1.0\]"),
        ({"queries": torch.zeros(3)}, r"queries: .* got torch.float32 tensor of shape \(3,\)"),
        ({"queries": Q.int()}, "queries: expected float32, .* got torch.int32"),
        ({"keys": torch.zeros(4, 2)}, r"keys: expected \(4, 3\) on cpu, got .* \(4, 2\) on cpu"),
        ({"keys": K.to("meta")}, r"keys: expected \(4, 3\) on cpu, got .* on meta"),
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

"""Centroid InfoNCE of each backend against a plain formula, within the error budget. `make proofs`
runs the cases that take `backend` again, with Triton's kernels."""

import math
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import anchorops as ao
from anchorops.doctor import catalogue
from anchorops.doctor.catalogue import Case, Entry, Inputs, Sample, formulas
from anchorops.doctor.catalogue.inputs import normal, uniform
from tests.helpers.memory import peak_allocated_bytes
from tests.helpers.operators import Operators, check, results
from tests.helpers.simulated_gpu import PTX_ARCH

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
REDUCTIONS = ("mean", "sum", "none")
EPS = 1e-6
MODULE = sys.modules["anchorops._ops.centroid_info_nce"]
pytestmark = pytest.mark.on("reference", "cpu", "simulated_triton", "triton")


def formula(queries: Tensor, keys: Tensor, **others: Any) -> Tensor:
    """Of finite numbers: what is absent may hold anything."""
    if "positives" in others:
        others["positives"] = others["positives"].nan_to_num(0, 0, 0)
    finite = (x.nan_to_num(0, 0, 0) for x in (queries, keys))
    return formulas.centroid_info_nce(*finite, **others)


INFO_NCE = Entry("InfoNCE", ("centroid_info_nce",), ao.ops.centroid_info_nce, formula)
(OF_GUARANTEES,) = (x for x in catalogue.cases("small") if str(x) == "centroid_info_nce")


def make(
    size: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    positives: bool,
    absent: float | None,
    keys: str | None,
    bias: torch.dtype | None,
    length: float,
    n: int,
    random: Generator,
) -> Inputs:
    """Rows of a length whose pairs are similar, as in training; NaN where absent."""
    shape, (num_classes, dim) = size[:-1], (size[0], size[-1])
    queries, wanted = normal(*size, random=random), normal(*size, random=random)
    others = normal(num_classes, dim, random=random)
    others += 0.5 * (queries if len(size) == 2 else queries.mean(1))
    wanted += 0.5 * queries
    rows = [length * F.normalize(x, dim=-1) for x in (queries, others, wanted)]
    of_type = [x.to(dtype) for x, dtype in zip(rows, dtypes, strict=True)]
    inputs: Inputs = {}
    inputs |= zip(("queries", "keys", "positives"), of_type, strict=True)
    if not positives:
        del inputs["positives"]
    present = torch.ones(shape) > 0
    if absent is not None:
        present = inputs["present"] = uniform(*shape, random=random) >= absent
    has_query = used = present.view(num_classes, -1).any(1)
    if keys is not None:
        counted = uniform(num_classes, random=random) < {"all": 1.0, "some": 0.6}[keys]
        inputs["present_keys"] = counted
        used = counted if positives else counted | has_query
    if bias is not None:
        inputs["bias"] = normal(num_classes, random=random).to(bias)
        used = torch.ones(num_classes) > 0
    inputs["keys"][~used] = torch.nan
    for name in {"queries", "positives"} & {*inputs}:
        inputs[name][~present] = torch.nan
    return inputs


def centroids(
    *size: int,
    dtype: torch.dtype | tuple[torch.dtype, ...] = F32,
    positives: bool = False,
    absent: float | None = 0.3,
    keys: str | None = None,
    bias: torch.dtype | None = None,
    length: float = 1.0,
    **options: Any,
) -> Case:
    """size: of the queries, [K, D] or [K, G, D]. absent: the share of absent queries; None: all
    are present. keys: which are in the denominators. bias: its dtype. length: of the rows. dtype:
    of all others, or of queries, keys and positives."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * 3
    of_bias = {} if bias is None else {"bias": bias}
    described = size, dtypes, positives, absent, keys, length, options | of_bias
    name = ", ".join(str(x).replace("torch.", "") for x in described)
    made = partial(make, size, dtypes, positives, absent, keys, bias, length)
    return Case(INFO_NCE, Sample(name, made, options, ()))


CASES = [
    centroids(2, 8, absent=None),
    centroids(1, 16, absent=None),
    centroids(1, 2, 24, positives=True, absent=None),
    centroids(19, 40, absent=None),
    centroids(19, 256),
    centroids(19, 4, 256, reduction="sum"),
    centroids(19, 2, 512, positives=True),
    centroids(19, 2, 512, keys="all", normalize=EPS),
    centroids(19, 2, 130, positives=True, normalize=EPS),
    centroids(37, 130, dtype=BF16),
    centroids(33, 64, dtype=F16, reduction="none"),
    centroids(33, 3, 64, dtype=BF16, positives=True, reduction="none"),
    centroids(33, 2, 72, dtype=F16, positives=True, normalize=EPS),
    centroids(40, 2, 24, keys="some"),
    centroids(40, 2, 24, keys="some", positives=True, reduction="none"),
    centroids(40, 24, keys="some", reduction="sum", absent=0.6),
    centroids(40, 24, keys="some", absent=None),
    centroids(64, 64, temperature=0.01),
    centroids(64, 64, temperature=0.01, normalize=EPS),
    centroids(64, 64, temperature=1.0),
    centroids(64, 2, 64, temperature=1.0, positives=True, reduction="none"),
    centroids(64, 2, 64, temperature=0.01, positives=True, normalize=EPS),
    centroids(21, 3, 20, absent=0.9),
    centroids(21, 3, 20, absent=1.0),
    centroids(21, 3, 20, absent=1.0, keys="all", reduction="none", positives=True),
    centroids(150, 96),
    centroids(150, 2, 64, positives=True, normalize=EPS),
    centroids(150, 4, 48, normalize=EPS),
    centroids(150, 520, normalize=EPS),
    centroids(300, 40, reduction="none"),
    centroids(300, 72, normalize=EPS, absent=0.1),
    centroids(257, 1, 33, positives=True),
    centroids(60, 2, 48, length=1e-4, temperature=0.01),
    centroids(60, 2, 48, length=30.0, normalize=EPS),
    centroids(60, 2, 48, length=1e-8, normalize=EPS),  # shorter than eps
    centroids(60, 2, 48, length=0.5, normalize=1.0, positives=True),
    centroids(60, 2, 48, length=3.0, temperature=1.0),
    centroids(20, 9, dtype=(F32, F16, F32)),
    centroids(20, 9, dtype=(F32, F64, F64), positives=True),
    centroids(20, 9, dtype=(BF16, F32, F64), positives=True, normalize=EPS),
    centroids(70, 2, 24, absent=None, keys="all", temperature=1.0),  # as of a classifier
    centroids(70, 2, 130, bias=F32, temperature=1.0),
    centroids(19, 40, bias=F32, absent=None, temperature=1.0, reduction="none"),
    centroids(33, 24, dtype=BF16, bias=BF16, reduction="sum"),
    centroids(20, 3, 9, bias=F64, temperature=0.5, reduction="none"),
]
LARGE = [  # tiles of many classes
    centroids(140, 2, 72),
    centroids(140, 2, 72, positives=True, normalize=EPS, reduction="none"),
    centroids(150, 1, 136, normalize=EPS),
    centroids(130, 1, 64, dtype=BF16, positives=True),
    centroids(257, 40, keys="some", dtype=F16),
    centroids(140, 2, 136, bias=F32, temperature=1.0),
]
MANY = pytest.param(
    centroids(1000, 8, normalize=EPS),
    marks=pytest.mark.skipif(PTX_ARCH == "80", reason="a check of --verify has as many classes"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, backend: str):
    check(case, backend)


@pytest.mark.on("simulated_triton", "triton")
@pytest.mark.parametrize("case", [*LARGE, MANY], ids=str)
def test_large_tiles(case: Case, backend: str, monkeypatch):
    """As with so many classes that large tiles keep a GPU busy."""
    from anchorops.kernels import centroid_info_nce, centroid_info_nce_backward

    for module in (centroid_info_nce, centroid_info_nce_backward):
        monkeypatch.setattr(module, "ENOUGH", 1)
    check(case, backend)


@pytest.mark.parametrize("case", [CASES[i] for i in (8, 11, 14)], ids=str)
def test_equal_bits_and_nothing_of_what_is_absent(case: Case, backend: str, set_order):
    """NaN, ∞ and 0 in absent rows give the same bits, in any order of warps, and no gradient."""
    inputs, found = case.sample.inputs(), []
    absent = {name: x.isnan() for name, x in inputs.items() if x.is_floating_point()}
    for order, value in enumerate((math.nan, math.inf, 0.0)):
        set_order(order)
        others = {
            name: x.masked_fill(absent[name], value) for name, x in inputs.items() if name in absent
        }
        found.append(results(case.ours, inputs | others))
    for gradient, where in zip(found[0][-len(absent) :], absent.values(), strict=True):
        assert where.any() and not gradient[where].any()
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize("positives", [False, True])
def test_upstream_gradients(positives: bool, backend: str):
    """Strided ones, and NaN for what is absent."""
    case = centroids(21, 3, 20, reduction="none", positives=positives)
    inputs = case.sample.inputs()
    present = inputs["present"]
    gradients = []
    for value in (0.0, math.nan):
        leaves = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        upstream = torch.linspace(-1, 1, 2 * present.numel()).view(3, 21, 2)[..., 1].T
        upstream = upstream.masked_fill(~present, value) if value else upstream
        wanted = [x for x in leaves.values() if x.requires_grad]
        gradients.append(torch.autograd.grad(case.ours(**leaves), wanted, upstream))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("needed", ["queries", "keys", "positives", "bias"])
def test_one_gradient(needed: str, backend: str):
    with_bias = {"bias": F32} if needed == "bias" else {"positives": True, "normalize": EPS}
    case = centroids(19, 2, 64, **with_bias)
    inputs = case.sample.inputs()
    names = [name for name, x in inputs.items() if x.is_floating_point()]
    expected = dict(zip(names, results(case.ours, inputs)[1:], strict=True))[needed]
    leaf = inputs[needed].requires_grad_()
    (gradient,) = torch.autograd.grad(case.ours(**inputs), leaf, torch.tensor(0.5))
    torch.testing.assert_close(gradient, expected * (0.5 / 0.5))


def normalized_formula(queries: Tensor, keys: Tensor) -> Tensor:
    q, k = (F.normalize(x, dim=-1, eps=1.0) for x in (queries, keys))
    return F.cross_entropy(q @ k.T / 0.07, torch.arange(4))


@pytest.mark.parametrize("length", [0.0, 0.5, 1.5])
def test_rows_around_eps(length: float, backend: str):
    inputs = {"queries": length * torch.eye(4, 6), "keys": torch.randn(4, 6)}
    found = results(partial(ao.ops.centroid_info_nce, normalize=1.0), inputs)
    torch.testing.assert_close(found, results(normalized_formula, inputs))


@pytest.mark.on("cpu", "simulated_triton", "triton")
def test_rows_as_long_as_eps(backend: str):
    """They are divided by a constant, as all shorter rows. (Versions of torch differ here.)"""
    inputs = {"queries": torch.eye(4, 6), "keys": torch.eye(4, 6).flip(0)}
    found = results(partial(ao.ops.centroid_info_nce, normalize=1.0), inputs)
    torch.testing.assert_close(found, results(ao.ops.centroid_info_nce, inputs))


@pytest.mark.on("cpu", "reference", "simulated_triton")
@pytest.mark.parametrize(
    "dtype", [pytest.param(F32, marks=pytest.mark.on("cpu", "reference")), BF16]
)
@pytest.mark.parametrize(
    "others",
    [
        {"positives": True, "normalize": EPS},
        {"keys": "some", "normalize": EPS},
        {"bias": BF16},
    ],
)
def test_in_parts(others: dict[str, Any], dtype: torch.dtype, backend: str, monkeypatch):
    """The logits of a class at a time: the gradients of keys and bias are rounded once. In the
    machine for PTX, where kernels are compiled for each part, with what alone is rounded."""
    monkeypatch.setattr(MODULE, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(MODULE, "LOGITS_OF_PART", 3 * 7)
    check(centroids(7, 3, 5, dtype=dtype, temperature=0.5, **others), backend)


@pytest.mark.parametrize("normalize", [None, EPS])
@pytest.mark.parametrize("logits_at_once", [MODULE.LOGITS_AT_ONCE, 1])
def test_second_derivatives(normalize: float | None, logits_at_once: int, monkeypatch):
    """Of the reference; test_guarantees_of_torch.py has the first ones, and the other backends."""
    monkeypatch.setattr(MODULE, "LOGITS_AT_ONCE", logits_at_once)
    monkeypatch.setattr(MODULE, "LOGITS_OF_PART", 5 * 6)
    shapes = (6, 3, 5), (6, 5), (6, 3, 5), (6,)
    leaves = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]
    present, every = torch.rand(6, 3) < 0.7, torch.ones(6) > 0
    of_bias = {"temperature": 0.5, "reduction": "none", "present": present}
    options = of_bias | {"normalize": normalize}

    def losses(queries: Tensor, keys: Tensor, positives: Tensor, bias: Tensor) -> Tensor:
        others = {"positives": positives}, {"present_keys": every}
        runs = [ao.ops.centroid_info_nce(queries, keys, **options, **x) for x in others]
        with_bias = ao.ops.centroid_info_nce(queries, keys, bias=bias, **of_bias)
        return torch.stack((*runs, with_bias))

    with ao.use_backend("reference"):
        assert torch.autograd.gradgradcheck(losses, leaves, fast_mode=True)


@pytest.mark.parametrize("argument", ["queries", "keys", "positives", "bias", "present", "first"])
def test_wrong_shapes_in_the_operator_itself(argument: str):
    rows = torch.randn(4, 3)
    arguments = {"queries": rows, "keys": rows, "positives": rows, "bias": rows[:, 0]}
    arguments |= {"present": rows[:, 0] > 0, "present_keys": None, "first": 0}
    arguments |= {"temperature": torch.ones(()), "reduction": "mean", "normalize": None}
    operator = torch.ops.anchorops.centroid_info_nce.cpu
    operator(**arguments)
    wrong = 1 if argument == "first" else torch.ones(5)
    with pytest.raises(RuntimeError, match=f"centroid_info_nce.cpu: .*{argument}.*: "):
        operator(**(arguments | {argument: wrong}))


@pytest.mark.parametrize(
    ("rows", "dtype", "most"),
    [
        # 4096 × 4096 logits are 64 MiB in float32; the formula for all of them needs 4.5 tensors of
        # this size. In parts it needs 18.4 MiB
        ((2, 4096, 8), F32, 24 << 20),
        # twice the logits, and what is added for float32 copies of half-precision rows
        ((2, 1024, 64), BF16, 2 * 4 * 1024**2 + 3 * 4 * 2 * 1024 * 64),
    ],
)
def test_memory(rows: tuple[int, ...], dtype: torch.dtype, most: int):
    queries, keys = torch.randn(rows).to(dtype).requires_grad_().unbind()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ao.ops.centroid_info_nce(queries, keys), (queries, keys))

    step()
    assert peak_allocated_bytes(step) < most


def test_no_operator_of_the_reference_that_adds_in_any_order(monkeypatch):
    """The gradients of gather and index_select do, on a GPU: scatter_add, index_add."""
    monkeypatch.setattr(MODULE, "LOGITS_AT_ONCE", 1)
    with Operators() as operators, ao.use_backend("reference"):
        results(OF_GUARANTEES.ours, OF_GUARANTEES.sample.inputs(1))
    names = {name.split(".")[1] for name in operators.names}
    assert "mm" in names
    assert not [x for x in names if "index" in x or "scatter" in x or "put" in x]


EMPTY_OPTIONS = [{"normalize": EPS}, *({"reduction": name} for name in REDUCTIONS)]


@pytest.mark.parametrize("options", EMPTY_OPTIONS)
def test_no_channels_classes_or_groups(options: dict[str, Any], backend: str):
    run = partial(ao.ops.centroid_info_nce, **options)
    for shape in ((40, 2, 0), (0, 5), (0, 2, 5), (3, 0, 5)):
        inputs = {"queries": torch.randn(shape), "keys": torch.randn(shape[0], shape[-1])}
        loss, *gradients = results(run, inputs)
        assert loss.shape == (shape[:-1] if options.get("reduction") == "none" else ())
        assert [x.shape for x in gradients] == [x.shape for x in inputs.values()]
        if shape[-1] > 0:
            assert not loss.any() and not any(x.any() for x in gradients)
        elif options.get("reduction") != "sum":
            torch.testing.assert_close(loss.mean(), torch.tensor(40.0).log())


def test_one_class_has_nothing_to_be_told_from(backend: str):
    one = {name: torch.randn(1, 5) for name in ("queries", "keys")}
    loss, dqueries, _ = results(ao.ops.centroid_info_nce, one)
    assert loss == 0 and not dqueries.any()


def test_large_logits_stay_finite(backend: str):
    queries = torch.tensor([[3e3, 0.0], [0.0, 3e3]])
    inputs = {"queries": queries, "keys": queries.flip(0)}
    loss, *gradients = results(ao.ops.centroid_info_nce, inputs)
    torch.testing.assert_close(loss, torch.tensor(9e6 / 0.07))
    assert all(gradient.isfinite().all() for gradient in gradients)
    check(centroids(20, 16, length=120.0, absent=None, reduction="sum"), backend)

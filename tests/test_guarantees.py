"""What every backend guarantees (docs/how-it-works.md), of every operator: values and gradients,
equal bits, any strides, 64-bit offsets, and what is ignored. test_guarantees_of_torch.py has what
torch needs of an operator. The cases and peculiarities of an operator are in its own file."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops._ops.kth_largest import kth_largest
from anchorops.doctor import catalogue
from anchorops.doctor.catalogue import Case, Inputs
from anchorops.doctor.catalogue.entry import as_dtype, random_of
from tests.helpers.cpu_kernels import same_for_all_threads
from tests.helpers.operators import check, each, results, strided

F64 = torch.float64
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the machine for PTX
]


def same_bits(ours: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@each(options=True, exact=True)
def test_values_and_gradients(case: Case, backend: str, poisoned: None):
    check(case, backend)


@each("reference", "cpu", options=True, exact=True)
def test_float64(case: Case, backend: str):
    inputs = as_dtype(case.sample.inputs(1), F64)
    expected = results(case.formula, inputs)
    for ours, right in zip(results(case.ours, inputs), expected, strict=True):
        assert ours.dtype in (F64, torch.int64)
        atol = case.entry.rtol * float(right.abs().max())
        torch.testing.assert_close(ours.double(), right.double(), rtol=case.entry.rtol, atol=atol)


@each()
def test_the_same_bits(case: Case, backend: str, set_order):
    """In any order of the threads, where there is no GPU."""
    inputs = case.sample.inputs(1)
    first = results(case.ours, inputs)
    for order in (1, 2):
        set_order(order)
        assert same_bits(results(case.ours, inputs), first)


@each("cpu")
def test_threads_do_not_matter(case: Case, backend: str):
    inputs = case.sample.inputs(8)
    same_for_all_threads(lambda: results(case.ours, inputs))


@each()
def test_strides(case: Case, backend: str):
    """Inputs and incoming gradients may have any strides. Gradients of images have their layout."""
    inputs = case.sample.inputs(1)
    expected = results(case.ours, inputs)
    changed = {name: x if name in case.entry.dense else strided(x) for name, x in inputs.items()}
    actual = results(case.ours, changed, weights_are_strided=True)
    torch.testing.assert_close(actual, expected)
    name, x = next(iter(inputs.items()))
    if case.entry.differentiable and backend != "reference" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        actual = results(case.ours, inputs | {name: x})
        torch.testing.assert_close(actual, expected)
        (gradient,) = [g for g in actual if g.shape == x.shape and g.dtype == x.dtype][:1]
        assert gradient.stride() == x.stride()


def far(x: Tensor, axis: int, memory_format: torch.memory_format) -> Tensor:
    """A copy of x, of which the numbers of the last index of this axis lie beyond 2^31. Few pages
    are touched."""
    strides, last = list(x.contiguous(memory_format=memory_format).stride()), x.shape[axis] - 1
    strides[axis] = 2**31 // last + 1
    buffer = torch.empty(last * strides[axis] + x.numel(), dtype=x.dtype)
    return buffer.as_strided(x.shape, strides).copy_(x)


@each("cpu", "simulated_triton", "simulated_cuda")
def test_offsets_are_64_bit(case: Case, backend: str):
    """Along each axis, of all inputs."""
    torch.use_deterministic_algorithms(False)  # otherwise torch.empty would write all of it
    inputs = case.sample.inputs(4 if backend == "cpu" else 1)  # with whole vectors
    expected = results(case.ours, inputs)
    changed = {  # int64 would be 16 GB
        name: x
        for name, x in inputs.items()
        if name not in case.entry.dense and x.element_size() <= 4
    }
    for axis in range(max(x.dim() for x in changed.values())):
        for images in (torch.contiguous_format, torch.channels_last):
            if images == torch.channels_last and backend != "cpu" and "features" not in inputs:
                continue  # Triton copies such logits
            moved = {
                name: far(x, axis, images if x.dim() == 4 else torch.contiguous_format)
                for name, x in changed.items()
                if x.dim() > axis
            }
            torch.testing.assert_close(results(case.ours, inputs | moved), expected)


@each(ignores=True)
def test_what_nothing_valid_reads_changes_nothing(case: Case, backend: str):
    """NaN and ∞ there. Another maximum of the logits of ignored pixels may round differently."""
    inputs = case.sample.inputs(1)
    name, x = next(iter(inputs.items()))
    expected = results(case.ours, inputs)
    leaf = x.double().requires_grad_()
    wide = as_dtype(inputs, F64) | {name: leaf}
    value = case.formula(**wide)
    values = [value] if isinstance(value, Tensor) else [v for v in value if v.requires_grad]
    (gradient,) = torch.autograd.grad(torch.stack([v.sum() for v in values]).sum(), leaf)
    unread = gradient == 0
    assert unread.any() and not unread.all()
    values = torch.tensor([torch.nan, torch.inf, -torch.inf])
    values = values[torch.arange(x.numel()) % 3].view_as(x)
    actual = results(case.ours, inputs | {name: torch.where(unread, values, x)})
    torch.testing.assert_close(actual, expected)


NOTHING: dict[str, Callable[[str, Tensor], Tensor]] = {  # of an input by its name
    "no image": lambda name, x: x[:0],
    "no row": lambda name, x: x[..., :0, :],
    "no column": lambda name, x: x[..., :0],
    "no label": lambda name, x: x if name in ("logits", "teacher") else x[..., :0, :],
    "all ignored": lambda name, x: torch.full_like(
        x, {torch.float32: torch.nan, torch.bool: False}.get(x.dtype, -1)
    ),
}


@each(options=True, ignores=True)
@pytest.mark.parametrize("what", NOTHING)
def test_nothing_valid(what: str, case: Case, backend: str, poisoned: None):
    """An empty batch or image, or only ignored pixels, which are NaN: results and gradients are
    0."""
    given, tables = case.sample.inputs(1), () if what == "all ignored" else case.entry.tables
    if given.keys() <= set(tables):
        pytest.skip("the inputs are tables of classes")
    if what == "no label" and "features" in given:
        pytest.skip("features have at least one label")
    inputs = {name: x if name in tables else NOTHING[what](name, x) for name, x in given.items()}
    found = results(case.ours, inputs)
    assert not any(x.any() for x in found)
    with ao.use_backend("reference"):
        assert [x.shape for x in found] == [x.shape for x in results(case.ours, inputs)]


LONG = {  # numbers of images and classes, sizes of the logits and of the labels
    "points of a batch": (1, 4, (40_001,), (40_001,)),
    "points": (40_001, 4, (), ()),
    "one row": (1, 4, (1, 10_000), (1, 40_001)),
    "short rows": (33_000, 4, (2,), (2,)),
    "one column": (1, 4, (10_000, 1), (40_001, 1)),
    "volume": (1, 4, (8, 70, 91), (8, 70, 91)),
    "cells": (1, 4, (24, 33), (96, 132)),
    "any size": (2, 4, (20, 33), (65, 129)),
    "many classes": (1, 40_000, (1, 2), (3, 5)),
}
LONG_DTYPES = [*((shapes, torch.float32) for shapes in LONG), ("points", F64)]
PIXEL_LOSSES = [
    case
    for case in catalogue.cases("small") + catalogue.cases("options")
    if case.entry.name in ("CrossEntropy", "Dice", "CrossEntropyDice")
    and "sigmoid" not in case.sample.options
]


KINDS: list[dict[str, Any]] = [  # a CPU computes them in different ways
    {"logits": (9, 17), "labels": (36, 68)},
    {"logits": (6, 5), "labels": (13, 9), "layout": "channels last", "dtype": torch.bfloat16},
    {"logits": (31, 40), "labels": (31, 40), "num_classes": 2},
    {"logits": (9, 20), "labels": (72, 160), "num_classes": 2, "scale": 30.0},
    {"logits": (9, 20), "labels": (36, 80), "scale": 30.0},
]


def of_another_size(case: Case, **size: Any) -> Inputs:
    maker: Any = case.sample.make
    return maker._replace(half=False, **size)(1, random_of(str(size)))


@pytest.mark.on("cpu")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_options_of_pixel_losses(kind: dict[str, Any], backend: str):
    for case in PIXEL_LOSSES:
        maker: Any = case.sample.make
        if len(maker.logits) == 2 and not (
            "num_classes" in kind and "weight" in case.sample.options
        ):
            sample = case.sample._replace(make=maker._replace(**kind))
            check(case._replace(sample=sample), backend)


@pytest.mark.on("cpu")
@pytest.mark.parametrize(("shapes", "dtype"), LONG_DTYPES, ids=str)
def test_threads_where_torch_divides_a_sum(shapes: str, dtype: torch.dtype, backend: str):
    """Long rows, many rows or many classes, which torch's own sums would divide among threads."""
    size = dict(zip(("batch", "num_classes", "logits", "labels"), LONG[shapes], strict=True))
    for case in PIXEL_LOSSES:
        if shapes != "many classes" or "weight" not in case.sample.options:
            inputs = as_dtype(of_another_size(case, **size), dtype)
            same_for_all_threads(lambda case=case, inputs=inputs: results(case.ours, inputs))


@pytest.mark.on("cpu", "reference")
@pytest.mark.parametrize(
    ("shape", "num_classes"),
    [
        ((1, 7, 40_001), 3),
        ((1, 60, 20_001), 19),
        ((40_001, 9), 4),
        ((2, 3, 40, 51), 65_536),
        ((6, 40, 12, 13), 150),
    ],
)
def test_threads_of_class_moments(shape: tuple[int, ...], num_classes: int, backend: str):
    for name in ("class_moments", "class_moments of groups", "pixel_to_anchor_mse"):
        (case,) = (x for x in catalogue.cases("small") if str(x) == name)
        inputs = of_another_size(case, shape=shape, num_classes=num_classes, ratio=1)
        options = {key: x for key, x in case.sample.options.items() if key != "num_classes"}
        options |= {} if name == "pixel_to_anchor_mse" else {"num_classes": num_classes}
        run = partial(case.entry.ours, **options)
        same_for_all_threads(lambda run=run, inputs=inputs: results(run, inputs))


def test_threads_of_the_kth_largest():
    values = torch.rand(100_000)
    same_for_all_threads(lambda: (kth_largest(values, 33_333),))

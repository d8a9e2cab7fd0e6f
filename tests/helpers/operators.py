"""The cases of the catalogue that tests of the guarantees run: its small samples and those of
options."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anchorops._moments import statistics_dtype
from anchorops.doctor import catalogue
from anchorops.doctor.catalogue import Case, Inputs
from anchorops.doctor.catalogue.entry import evaluate
from tests.helpers.simulated_gpu import SIMULATED

FEW = ("class_moments", "CrossEntropy", "Dice", "pixel_argmax")


class Operators(TorchDispatchMode):
    """Notes the operators that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def places_of(case: Case) -> list[str]:
    """Where its tests run. A function of torch is the same on every backend."""
    simulated = () if "cpu" in case.sample.tags else ("triton", "cuda")
    backends = case.entry.backends
    on_cpu = [name for name in backends if name == "cpu"]
    return ["reference", *on_cpu, *(f"simulated_{x}" for x in simulated if x in backends)]


def each(
    *places: str,
    slow: bool = False,
    options: bool = False,
    few_in_machine: bool = False,
    **having: object,
) -> pytest.MarkDecorator:
    """All cases whose entries have these properties, in these places. slow: a case takes about a
    second, so `make test` runs a few of them; options: also the samples of options;
    few_in_machine: what the options of an operator do not change runs in the machine for PTX,
    where each new program takes seconds, for its case with the most inputs alone."""
    chosen = catalogue.cases("small") + (catalogue.cases("options") if options else [])
    in_machine = {str(case) for case in chosen}
    if few_in_machine:
        by_inputs = sorted(reversed(chosen), key=lambda case: len(case.sample.inputs(1)))
        in_machine = {*{case.entry.operators: str(case) for case in by_inputs}.values()}

    def places_here(case: Case) -> list[str]:
        return [
            place
            for place in places_of(case)
            if (not places or place in places)
            and (str(case) in in_machine or not place.startswith("simulated"))
        ]

    cases = [
        pytest.param(
            case,
            marks=[pytest.mark.on(*here), *[pytest.mark.slow] * (slow and str(case) not in FEW)],
            id=str(case),
        )
        for case in chosen
        if all(getattr(case.entry, name) == value for name, value in having.items())
        and (here := places_here(case))
    ]
    return pytest.mark.parametrize("case", cases)


def strided(x: Tensor) -> Tensor:
    """x with its axes in the opposite order in memory, and gaps between the numbers. Its address is
    a multiple of 16, as that of most tensors: for others, Triton would compile kernels again."""
    axes = [*range(x.dim())][::-1]
    return torch.stack([x.permute(axes).contiguous()] * 2, -1)[..., 0].permute(axes)


def results(
    run: Callable[..., Any], inputs: Inputs, weights_are_strided: bool = False
) -> list[Tensor]:
    """The results; and the gradients of the floating inputs, of a weighted sum of the results."""
    found = evaluate(run, inputs, strided) if weights_are_strided else evaluate(run, inputs)
    return [x for x in found if x is not None]


def check(case: Case, backend: str) -> None:
    """Values and gradients are within the error budget. The gradient of the first input has its
    layout. No input changes, nor the memory around it."""
    inputs = {k: x.to(torch.get_default_device()) for k, x in case.sample.inputs().items()}
    whole = [x if x._base is None else x._base for x in inputs.values()]
    before = [x.clone() for x in whole]
    first = next(iter(inputs.values()))
    dtype = statistics_dtype(first.dtype)
    roundings = 32 if dtype == torch.float64 else 12 if SIMULATED else 8
    found = evaluate(case.ours, inputs)
    floor = roundings * torch.finfo(dtype).eps
    for number, pair in enumerate(case.errors_and_limits(inputs, found, dtype, floor)):
        assert pair[0] <= pair[1], number
    gradient = found[-sum(x.is_floating_point() for x in inputs.values())]
    # Triton's gradient of sigmoids is every second plane of a larger tensor
    sigmoids = case.entry.name in ("pixel_binary_cross_entropy", "MaskLoss")
    planes = backend == "triton" and sigmoids
    if gradient is not None and backend != "reference" and not planes:
        assert gradient.stride() == torch.empty_like(first, device="meta").stride()
    torch.testing.assert_close(whole, before, rtol=0, atol=0, equal_nan=True)


def gradient_of(call: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(call(leaf, *others).sum(), leaf)[0]


def check_loss(ours: Tensor, expected: Tensor, *inputs: Tensor, **of_gradients: float) -> None:
    """Assert equal values and, within these bounds, gradients."""
    torch.testing.assert_close(ours, expected)
    gradients = [
        torch.autograd.grad(loss.sum(), inputs, retain_graph=True) for loss in (ours, expected)
    ]
    torch.testing.assert_close(*gradients, **of_gradients)


def gradient_errors(
    ours: Callable[..., Tensor], formula: Callable[..., Tensor], x: Tensor, *others: Tensor
) -> tuple[float, float]:
    """The largest errors of our gradient and of torch's, relative to the largest number of the
    formula's in float64."""
    exact = gradient_of(formula, x.double(), *others)
    found = (gradient_of(call, x, *others).double() for call in (ours, formula))
    first, second = (float((x - exact).abs().max() / exact.abs().max()) for x in found)
    return first, second


class Calls(TorchDispatchMode):
    """The calls of our operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "anchorops":
            assert not kwargs
            backward = func.overloadpacket.__name__.endswith("_backward")
            self.recorded.append((func, tuple(_leaf(x, backward) for x in args)))
        return func(*args, **(kwargs or {}))


def _leaf(x: Any, constant: bool) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.detach().clone().requires_grad_(x.requires_grad and not constant)

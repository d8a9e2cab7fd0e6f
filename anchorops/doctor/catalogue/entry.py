"""The types of the catalogue, after PyTorch's OpInfo and SampleInput."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._backend import OPERATORS
from .budget import FLOOR, error_and_limit, ordinary, roundings

Inputs = dict[str, Tensor]  # by the names of a call's arguments
Maker = Callable[[Any, torch.Generator], Inputs]
PIXEL_LOSSES = ("softmax_moments", "pixel_kl_divergence")  # their operators


class Sample(NamedTuple):
    """Inputs of a call, and its options. Labels of −1 are ignored.

    Attributes:
        make: the inputs, on the CPU, of n and a random generator: n² as many pixels as for n = 1.
        options: of our call and of the formula.
        tags: where it is used; "all", "quick": by --verify (also without --all); by tests:
            "small" of the guarantees, "options" of options, both on the CPU alone with "cpu",
            "kernels" of every kernel, with "cuda" those of CUDA; "bench": by --benchmark.
        floor: of the limit, relative to the largest number (budget.py).
    """

    name: str
    make: Maker
    options: Mapping[str, Any] = {}
    tags: tuple[str, ...] = ("all", "quick")
    floor: float = FLOOR

    def inputs(self, n: float = 1) -> Inputs:
        """The same numbers in each call, on every machine."""
        return self.make(n, random_of(self.name))


def small(name: str, make: Maker, on_cpu: bool = False, **options: Any) -> Sample:
    """A sample for the tests of the guarantees; on_cpu: on the CPU alone."""
    return Sample(name, make, options, ("small", "cpu") if on_cpu else ("small",))


def of_options(
    what: str, make: Maker, *every: Mapping[str, Any], on_cpu: bool = True
) -> Iterator[Sample]:
    """A sample of each of these options, with the tag "options"."""
    for options in every:
        name = ", ".join([what, *(f"{key} {value}" for key, value in options.items())])
        yield Sample(name, make, options, ("options", "cpu") if on_cpu else ("options",))


class Entry(NamedTuple):
    """An operator, or a loss: our call, and the same by torch's functions.

    Attributes:
        operators: those of _backend.OPERATORS that the call selects a backend for. More than one:
            it is a composition, and the first of them says which backends have it. None: it is a
            function of torch.
        ours, formula: called with the inputs by name and the options, they return a tensor or
            several. Floating inputs have gradients. The formula computes in their dtype.
        differentiable: the result has a gradient in the first input.
        exact: results are right to rounding; in the reference gradients have derivatives.
        ignores: what no valid pixel reads changes nothing, and has the gradient 0.
        tables: names of the inputs that are of classes, not of pixels.
        dense: names of the inputs that must be contiguous or channels last.
        rtol: of results and gradients in float64.
    """

    name: str
    operators: tuple[str, ...]
    ours: Callable[..., Any]
    formula: Callable[..., Any]
    samples: tuple[Sample, ...] = ()
    differentiable: bool = True
    exact: bool = True
    ignores: bool = True
    tables: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    rtol: float = 1e-10

    @property
    def backends(self) -> tuple[str, ...]:
        """Those that have it, besides `reference`."""
        return OPERATORS[self.operators[0]] if self.operators else ()


class Case(NamedTuple):
    """An entry with one of its samples."""

    entry: Entry
    sample: Sample

    def __str__(self) -> str:
        return self.sample.name

    def ours(self, **inputs: Tensor) -> Any:
        return self.entry.ours(**inputs, **self.sample.options)

    def formula(self, **inputs: Tensor) -> Any:
        return self.entry.formula(**inputs, **self.sample.options)

    def errors_and_limits(
        self,
        inputs: Inputs,
        found: Sequence[Tensor | None],
        dtype: torch.dtype = torch.float32,
        floor: float = FLOOR,
    ) -> Iterator[tuple[float, float]]:
        """Of each result and gradient that our call found (budget.py). dtype: of the arithmetic;
        floor: of samples that have none of their own."""
        wide = as_dtype(inputs, torch.float64)
        exact: list[Any] = evaluate(self.formula, wide)
        plain: list[Any] = evaluate(self.formula, as_dtype(inputs, dtype))
        also, floor = exact, floor * self.sample.floor / FLOOR
        if self.entry.operators[0] in PIXEL_LOSSES:
            also = evaluate(self.formula, wide | {"logits": ordinary(wide["logits"])})
            logits = [wide[name] for name in ("logits", "teacher") if name in wide]
            floor = max(floor, roundings(*logits) * torch.finfo(dtype).eps)
        for one, right, other, ordinary_one in zip(found, exact, plain, also, strict=True):
            if one is None or right is None:
                yield (0.0 if one is right else torch.inf), floor
            else:
                yield error_and_limit(one, right, other, floor, also=ordinary_one)


def as_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating inputs in this dtype, labels of int16 as int64."""
    labels = {torch.int16: torch.int64}
    return {
        name: x.to(dtype if x.is_floating_point() else labels.get(x.dtype, x.dtype))
        for name, x in inputs.items()
    }


def tensors_of(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [x for x in results if x is not None]


def evaluate(
    call: Callable[..., Any],
    inputs: Inputs,
    weights_in: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> list[Tensor | None]:
    """The results, and the gradients of all floating inputs, of a weighted sum of the results; None
    where there is no gradient. weights_in: puts the weights in another layout."""
    leaves = {name: x.detach() for name, x in inputs.items()}
    floating = [x.requires_grad_() for x in leaves.values() if x.is_floating_point()]
    results = tensors_of(call(**leaves))
    differentiable = [x for x in results if x.requires_grad]
    gradients: Sequence[Tensor | None] = [None for _ in floating]
    if differentiable:
        sizes = [torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float32) for x in differentiable]
        weights = [w.view(x.shape).to(x) for w, x in zip(sizes, differentiable, strict=True)]
        weights = [weights_in(x) for x in weights]
        gradients = torch.autograd.grad(differentiable, floating, weights, allow_unused=True)
    return [*(x.detach() for x in results), *gradients]


def random_of(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))

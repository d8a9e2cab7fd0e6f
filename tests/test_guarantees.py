"""What every backend guarantees (docs/how-it-works.md), of every operator: values and gradients,
equal bits, any strides, 64-bit offsets, and what is ignored. test_guarantees_of_torch.py has what
torch needs of an operator. The cases and peculiarities of an operator are in its own file."""

import pytest
import torch
from torch import Tensor

from anchorops.catalogue import Case
from tests.helpers.cpu_kernels import same_for_all_threads
from tests.helpers.operators import as_dtype, check, each, results, strided

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
            if images == torch.channels_last and backend != "cpu":
                continue
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


@each(options=True, ignores=True)
@pytest.mark.parametrize("images", [0, 2])
def test_nothing_valid(images: int, case: Case, backend: str, poisoned: None):
    """No image; or all are ignored, and NaN. Results and gradients are 0."""
    ignored = {torch.float32: torch.nan, torch.bool: False}
    inputs = {
        name: torch.full_like(x, ignored.get(x.dtype, -1)) if images else x
        for name, x in case.sample.inputs(1).items()
    }
    inputs = {name: x if name in case.entry.tables else x[:images] for name, x in inputs.items()}
    if images == 0 and len(case.entry.tables) == len(inputs):
        pytest.skip("the inputs are tables of classes")
    assert not any(x.any() for x in results(case.ours, inputs))

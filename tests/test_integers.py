"""Integers and numbers that are not Python's: of NumPy, tensors, torch.Size, traced and symbolic
sizes."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anchorops as ao
from anchorops.doctor.catalogue.entry import tensors_of
from tests.test_settings import (
    ARGUMENTS,
    NUMBER,
    POSITIVE,
    RIGHT,
    SHARE,
    TEMPERATURE,
    D,
    K,
)

Number = Callable[[Any], Any]
INTS: dict[str, Number] = {
    "np.int64": np.int64,
    "np.uint8": np.uint8,
    "array": np.array,
    "tensor": torch.tensor,
    "uint8 tensor": lambda n: torch.tensor(n, dtype=torch.uint8),
}
LOGITS, LABELS = torch.randn(2, K, 4, 6), torch.randint(0, K, (2, 8, 12))


# Right values of the arguments that are integers, and of those that are numbers.
GIVEN = {"num_classes": K, "dim": D, "groups": 2, "seed": 3, "ignore_index": 1, "layers": 2}
GIVEN |= {"reduced_dim": 6, "center_dim": 9, "ohem_min_kept": 50, "bins": 64}
OF_NUMBERS = {
    name
    for arguments in ARGUMENTS.values()
    for name, wrong in arguments.items()
    if any(wrong is x for x in (NUMBER, POSITIVE, TEMPERATURE, SHARE))
    or name in ("dropout", "length")
}


def result(call: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
    """Of a function; or the settings of a loss, method or metric, whose types count."""
    torch.manual_seed(0)
    value = call(**arguments)
    if not isinstance(value, nn.Module):
        return tensors_of(value)
    settings = {k: x for k, x in vars(value).items() if isinstance(x, int | float | str | tuple)}
    return [repr(sorted(settings.items())), *value.state_dict().values()]


def check(call: Callable[..., Any], name: str, value: Any, make: Number) -> None:
    right = {key: x for key, x in GIVEN.items() if key in ("num_classes", "dim")}
    right = RIGHT.get(call) or {key: x for key, x in right.items() if key in ARGUMENTS[call]}
    pair = [result(call, right | {name: x}) for x in (value, make(value))]
    for expected, ours in zip(*pair, strict=True):
        assert ours == expected if isinstance(ours, str) else torch.equal(ours, expected)


CALLS = [(call, name) for call, arguments in ARGUMENTS.items() for name in arguments]


@pytest.mark.parametrize("kind", INTS)
def test_every_integer(kind: str) -> None:
    of_integers = [(call, name) for call, name in CALLS if name in GIVEN]
    assert len(of_integers) > 50
    for call, name in of_integers:
        check(call, name, GIVEN[name], INTS[kind])


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_every_number(kind: str) -> None:
    of_numbers = [(call, name) for call, name in CALLS if name in OF_NUMBERS]
    assert len(of_numbers) > 30
    for call, name in of_numbers:
        check(call, name, 0.5, getattr(np, kind))


@pytest.mark.parametrize(
    "size",
    [
        torch.Size([8, 12]),
        [np.int64(8), torch.tensor(12)],
        np.array([8, 12]),
        torch.tensor([8, 12]),
    ],
    ids=repr,
)
def test_every_size(size: Any) -> None:
    expected = ao.pixel_argmax(LOGITS, (8, 12))
    assert torch.equal(ao.pixel_argmax(LOGITS, size), expected)
    assert torch.equal(
        ao.pixel_kl_divergence(LOGITS, LOGITS.sin(), size),
        ao.pixel_kl_divergence(LOGITS, LOGITS.sin(), (8, 12)),
    )


@pytest.mark.parametrize(
    "classes", [range(1, 3), [np.int64(1), 2], np.array([1, 2]), torch.tensor([1, 2])], ids=repr
)
def test_every_list_of_classes(classes: Any) -> None:
    for make in (ao.Dice, ao.Lovasz):
        assert torch.equal(
            make(classes=classes)(LOGITS, LABELS), make(classes=[1, 2])(LOGITS, LABELS)
        )


class Calls(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs)


# Of (logits, teacher's logits, image): their sizes are tensors in a trace, symbolic in an export.
OF_SIZES: dict[str, Callable[..., Any]] = {
    "classes": lambda x, t, image: ao.pixel_argmax(x, image.shape[-2:]),
    "probabilities": lambda x, t, image: ao.pixel_argmax(
        x, (image.shape[2], image.shape[3]), confidence=True
    ),
    "sigmoids": lambda x, t, image: ao.pixel_argmax(x, image.shape[2:], sigmoid=True),
    "divergence": lambda x, t, image: ao.pixel_kl_divergence(x, t, image.shape[2:]),
    "divergences": lambda x, t, image: ao.pixel_kl_divergence(
        x, t, list(image.shape[2:]), reduction="none"
    ),
}
OF_CLASSES: dict[str, Callable[..., Any]] = {
    "class_centroids": lambda x, t, y: ao.class_centroids(t, y, x.shape[1]),
    "class_moments": lambda x, t, y: ao.ops.class_moments(t, y, x.shape[1])[:2],
    "confusion": lambda x, t, y: ao.confusion(y, y, x.shape[1], ignore_index=x.shape[1] - 1),
    "ignore_index": lambda x, t, y: ao.pixel_cross_entropy(x, y, ignore_index=x.shape[1] - 1),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", OF_SIZES | OF_CLASSES)
@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_sizes_in_a_trace(name: str, chosen: str) -> None:
    """They are constants of the trace, and torch's warning says so."""
    last = torch.zeros(2, 3, 8, 12) if name in OF_SIZES else LABELS
    inputs = LOGITS, LOGITS.sin(), last
    module = Calls((OF_SIZES | OF_CLASSES)[name])
    with ao.use_backend(chosen):
        with pytest.warns(Warning, match="Converting a tensor to a Python integer"):
            traced: Any = torch.jit.trace(module, inputs, check_trace=False)
        expected, actual = tensors_of(module(*inputs)), tensors_of(traced(*inputs))
    for ours, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("name", OF_SIZES)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sizes_of_an_export(name: str, strict: bool) -> None:
    """They remain symbolic: the program takes images of other sizes."""
    module = Calls(OF_SIZES[name])
    dims = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    inputs = LOGITS, LOGITS.sin(), torch.zeros(2, 3, 8, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(
            module, inputs, dynamic_shapes={"inputs": (dims, dims, dims)}, strict=strict
        ).module()
    for logits, image in (((4, 6), (8, 12)), ((5, 7), (21, 13))):
        x, t = torch.randn(2, 2, K, *logits)
        batch = x, t, torch.zeros(2, 3, *image)
        for ours, right in zip(
            tensors_of(program(*batch)), tensors_of(module(*batch)), strict=True
        ):
            torch.testing.assert_close(ours, right)

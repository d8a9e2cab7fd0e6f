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
from anchorops import diagnostics
from anchorops.catalogue.entry import tensors_of

K, D = 5, 12
Number = Callable[[Any], Any]
INTS: dict[str, Number] = {
    "np.int64": np.int64,
    "np.uint8": np.uint8,
    "array": np.array,
    "tensor": torch.tensor,
    "uint8 tensor": lambda n: torch.tensor(n, dtype=torch.uint8),
}
LOGITS, LABELS = torch.randn(2, K, 4, 6), torch.randint(0, K, (2, 8, 12))
FEATURES, WEIGHT = torch.randn(2, D, 4, 6), torch.randn(K, D)
LABEL_MAPS = torch.stack([LABELS] * K, 1) % 2


def metric(value: Any, *batch: Tensor) -> list[Tensor]:
    value.update(*batch)
    result = value.compute()
    return [*result.values()] if isinstance(result, dict) else [result]


def method(value: Any) -> list[Tensor]:
    assert type(value.num_classes) is type(value.dim) is int
    return [value(FEATURES, LABELS, WEIGHT), *value.terms.values()]


def loss(value: Any) -> list[Tensor]:
    assert type(value.ignore_index) is int
    return [value(LOGITS, LABELS), *value.terms.values()]


# Each is called with a function that makes the integer.
CALLS: dict[str, Callable[[Number], Any]] = {
    "class_moments": lambda i: ao.ops.class_moments(
        FEATURES, LABELS, i(K), groups=i(2), seed=i(3), ignore_index=i(4)
    ),
    "class_centroids": lambda i: ao.class_centroids(FEATURES, LABELS, i(K), ignore_index=i(1)),
    "pixel_to_anchor_mse": lambda i: ao.pixel_to_anchor_mse(
        FEATURES, LABELS, WEIGHT, ignore_index=i(1)
    ),
    "softmax_moments": lambda i: ao.ops.softmax_moments(LOGITS, LABELS, ignore_index=i(1)),
    "pixel_cross_entropy": lambda i: ao.pixel_cross_entropy(LOGITS, LABELS, ignore_index=i(1)),
    "pixel_binary_cross_entropy": lambda i: ao.pixel_binary_cross_entropy(
        LOGITS, LABEL_MAPS, ignore_index=i(1)
    ),
    "pixel_kl_divergence": lambda i: ao.pixel_kl_divergence(LOGITS, LOGITS.sin(), (i(8), i(12))),
    "pixel_argmax": lambda i: ao.pixel_argmax(LOGITS, [i(8), i(12)]),
    "pixel_argmax of volumes": lambda i: ao.pixel_argmax(LOGITS[:, :, None], (i(2), i(8), i(12))),
    "confusion": lambda i: ao.confusion(LABELS, LABELS, i(K), ignore_index=i(1)),
    "pixel_confusion": lambda i: ao.pixel_confusion(LOGITS, LABELS, ignore_index=i(1)),
    "SAR": lambda i: method(ao.SAR(i(K), i(D), layers=i(2), ignore_index=i(1))),
    "OCCL": lambda i: method(ao.OCCL(i(K), i(D), seed=i(3))),
    "MVSC": lambda i: method(ao.MVSC(i(K), i(D), groups=i(2), seed=i(3))),
    "CeCo": lambda i: method(ao.CeCo(i(K), i(D), reduced_dim=i(6), center_dim=i(9), dropout=0.0)),
    "CBP": lambda i: method(ao.CBP(i(K), i(D), update="penalty")),
    "CrossEntropy": lambda i: loss(ao.CrossEntropy(ohem_min_kept=i(50), ignore_index=i(1))),
    "Dice": lambda i: loss(ao.Dice(classes=[i(0), i(2)], ignore_index=i(1))),
    "CrossEntropyDice": lambda i: loss(ao.CrossEntropyDice(ignore_index=i(1))),
    "Lovasz": lambda i: loss(ao.Lovasz(bins=i(64), classes=(i(0), i(2)), ignore_index=i(1))),
    "MeanIoU": lambda i: metric(ao.MeanIoU(i(K), ignore_index=i(1)), LOGITS, LABELS),
    "MeanIoU of sigmoids": lambda i: metric(ao.MeanIoU(i(K), sigmoid=True), LOGITS, LABEL_MAPS),
    "CentroidGeometry": lambda i: metric(
        diagnostics.CentroidGeometry(i(K), i(D), ignore_index=i(1)), FEATURES, LABELS
    ),
    "LabelImbalance": lambda i: metric(diagnostics.LabelImbalance(i(K), ignore_index=i(1)), LABELS),
    "random_anchors": lambda i: ao.anchors.random_anchors(i(K), i(D)),
    "orthogonal_anchors": lambda i: ao.anchors.orthogonal_anchors(i(K), i(D)),
    "simplex_etf": lambda i: ao.anchors.simplex_etf(i(K), i(D)),
    "category_basis": lambda i: ao.anchors.category_basis(i(K), i(D)),
}


@pytest.mark.parametrize("kind", INTS)
@pytest.mark.parametrize("name", CALLS)
def test_every_integer(name: str, kind: str) -> None:
    torch.manual_seed(0)
    expected = tensors_of(CALLS[name](int))
    torch.manual_seed(0)
    actual = tensors_of(CALLS[name](INTS[kind]))
    assert len(actual) == len(expected) > 0
    for ours, right in zip(actual, expected, strict=True):
        assert torch.equal(ours.nan_to_num(), right.nan_to_num())


@pytest.mark.parametrize(
    "size", [torch.Size([8, 12]), [8, 12], np.array([8, 12]), torch.tensor([8, 12])], ids=repr
)
def test_every_size(size: Any) -> None:
    expected = ao.pixel_argmax(LOGITS, (8, 12))
    assert torch.equal(ao.pixel_argmax(LOGITS, size), expected)
    assert torch.equal(
        ao.pixel_kl_divergence(LOGITS, LOGITS.sin(), size),
        ao.pixel_kl_divergence(LOGITS, LOGITS.sin(), (8, 12)),
    )


@pytest.mark.parametrize("classes", [range(1, 3), np.array([1, 2]), torch.tensor([1, 2])], ids=repr)
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


def test_sizes_of_a_compiled_function() -> None:
    compiled = torch.compile(OF_SIZES["classes"], fullgraph=True, dynamic=True)
    for size in ((8, 12), (9, 10)):
        image = torch.zeros(2, 3, *size)
        assert torch.equal(compiled(LOGITS, None, image), ao.pixel_argmax(LOGITS, size))


NUMBERS = {"np.float16": np.float16, "np.float32": np.float32, "np.float64": np.float64}
# Each is called with a function that makes a number of 0.5.
OF_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "OCCL": lambda n: method(ao.OCCL(K, D, centroid_weight=n, category_weight=n, temperature=n)),
    "SAR": lambda n: method(ao.SAR(K, D, loss_weight=n, aux_weight=n, momentum=n, tau=n, delta=n)),
    "MVSC": lambda n: method(
        ao.MVSC(K, D, fca_weight=n, cos_weight=n, visual_weight=n, temperature=n)
    ),
    "CeCo": lambda n: method(ao.CeCo(K, D, loss_weight=n, scale=n, dropout=n)),
    "CBP": lambda n: method(ao.CBP(K, D, length=n, penalty_weight=n, update="penalty")),
    "CrossEntropy": lambda n: ao.CrossEntropy(label_smoothing=n, focal_gamma=n, ohem_threshold=n)(
        LOGITS, LABELS
    ),
    "Dice": lambda n: ao.Dice(alpha=n, beta=n, smooth=n, smooth_denominator=n, gamma=n)(
        LOGITS, LABELS
    ),
    "CrossEntropyDice": lambda n: ao.CrossEntropyDice(ce_weight=n, dice_weight=n)(LOGITS, LABELS),
    "pixel_cross_entropy": lambda n: ao.pixel_cross_entropy(LOGITS, LABELS, label_smoothing=n),
    "pixel_binary_cross_entropy": lambda n: ao.pixel_binary_cross_entropy(
        LOGITS, LABEL_MAPS, pos_weight=[n] * K
    ),
    "pixel_kl_divergence": lambda n: ao.pixel_kl_divergence(
        LOGITS, LOGITS.sin(), (8, 12), temperature=n
    ),
    "centroid_info_nce": lambda n: ao.ops.centroid_info_nce(WEIGHT, WEIGHT.sin(), temperature=n),
    "pixel_argmax": lambda n: ao.pixel_argmax(LOGITS, (8, 12), sigmoid=True, threshold=n),
    "category_basis": lambda n: ao.anchors.category_basis(K, D, n),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_every_number(name: str, kind: str) -> None:
    torch.manual_seed(0)
    expected = tensors_of(OF_NUMBERS[name](0.5))
    torch.manual_seed(0)
    actual = tensors_of(OF_NUMBERS[name](NUMBERS[kind](0.5)))
    for ours, right in zip(actual, expected, strict=True):
        assert torch.equal(ours, right)

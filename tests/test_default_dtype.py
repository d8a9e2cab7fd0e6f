"""No result depends on torch's default dtype: values, gradients, `terms`, metrics and diagnostics
are those with float32. Only parameters and anchors that are made have this dtype."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops import diagnostics
from anchorops.doctor.catalogue import Case, Inputs
from anchorops.doctor.catalogue.entry import tensors_of
from anchorops.doctor.catalogue.pixels import Loss
from tests.helpers import methods
from tests.helpers.operators import each, results
from tests.helpers.simulated_gpu import SIMULATED

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
on_cpu = pytest.mark.on("reference", "cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float64)
K, SIZE = 5, 300  # more than 65,504 pixels, the largest float16
LOGITS = torch.randn(1, K, 30, 30)
LABELS = torch.randint(0, K, (1, SIZE, SIZE))
MAPS = torch.stack([LABELS] * K, 1) % 2
PREDICTIONS = LABELS.where(torch.rand(LABELS.shape) < 0.7, LABELS.flip(1))
FEATURES = torch.randn(2, 12, 6, 7)
WEIGHTS = [0.1, 1e5, 1.0, 2.0, 3.0]


@pytest.fixture(params=DTYPES, ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Sets it when it is called."""
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(torch.float32)


def same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    assert len(actual) == len(expected) > 0
    for ours, right in zip(actual, expected, strict=True):
        assert ours.dtype == right.dtype
        torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance, equal_nan=True)


def of_many_pixels(case: Case) -> Inputs:
    """More than the largest float16."""
    inputs = case.sample.inputs()
    if SIMULATED or inputs.keys() <= {*case.entry.tables}:
        return inputs
    pixels = inputs["labels" if "labels" in inputs else "valid"].numel()
    return case.sample.inputs(1 + math.isqrt(65_504 // pixels))


@each("reference", "cpu", "simulated_triton", options=True, few_in_machine=True)
def test_operators(case: Case, backend: str, default_dtype: Callable[[], None]) -> None:
    """Also the terms of a loss."""
    inputs = of_many_pixels(case)

    def values() -> list[Tensor]:
        found = results(case.ours, inputs)
        if not isinstance(case.entry.ours, Loss):
            return found
        loss: Any = case.entry.ours.module(**case.sample.options)
        loss.accuracy = True
        loss(*inputs.values())
        return [*found, *loss.terms.values()]

    expected = values()
    default_dtype()
    same(values(), expected, 1e-6)


def computed(metric: Any, *batch: Tensor) -> list[Tensor]:
    """After two updates."""
    for _ in range(2):
        metric.update(*batch)
    value = metric.compute()
    more = [metric.per_class()] if isinstance(metric, ao.MeanIoU) else []
    more += [metric.prior()] if isinstance(metric, diagnostics.LabelImbalance) else []
    return [*(value.values() if isinstance(value, dict) else [value]), *more]


def gradient_ratio() -> Tensor:
    x = LOGITS.clone().requires_grad_()
    other = ao.pixel_cross_entropy(x, LABELS)
    return diagnostics.gradient_ratio(x, ao.Dice()(x, LABELS), other)


# Large numbers of pixels, and what the operators above do not have.
CALLS: dict[str, Callable[[], Any]] = {
    "confusion": lambda: ao.confusion(LABELS, LABELS.flip(1), K),
    "pixel_confusion of sigmoids": lambda: ao.pixel_confusion(LOGITS, MAPS, sigmoid=True),
    "sigmoids": lambda: ao.pixel_argmax(
        LOGITS, (SIZE, SIZE), sigmoid=True, threshold=0.3, confidence=True
    ),
    "pos_weight": lambda: ao.pixel_binary_cross_entropy(LOGITS, MAPS, pos_weight=1e5),
    "pos_weights": lambda: ao.pixel_binary_cross_entropy(LOGITS, MAPS, pos_weight=WEIGHTS),
    "class_separability": lambda: diagnostics.class_separability(FEATURES[0, :, :3, 0]),
    "equiangularity": lambda: diagnostics.equiangularity(FEATURES[0, :, :3, 0]),
    "maximal_angle": lambda: diagnostics.maximal_angle(FEATURES[0, :, :3, 0]),
    "imbalance_factor": lambda: diagnostics.imbalance_factor(torch.tensor([90_000, 7, 0])),
    "no imbalance": lambda: diagnostics.imbalance_factor(torch.zeros(3).long()),
    "pearson": lambda: diagnostics.pearson(torch.arange(70_000), torch.arange(70_000) ** 2),
    "norm_correlation": lambda: diagnostics.norm_correlation(
        FEATURES[0, :, :3, 0], torch.arange(12) * 10_000
    ),
    "gradient_ratio": gradient_ratio,
    **{
        f"MeanIoU, {average}": lambda average=average: computed(
            ao.MeanIoU(K, average=average), PREDICTIONS, LABELS
        )
        for average in ("macro", "micro", "weighted", "none")
    },
    "MeanIoU of logits": lambda: computed(ao.MeanIoU(K), LOGITS, LABELS),
    "MeanIoU of sigmoids": lambda: computed(ao.MeanIoU(K, sigmoid=True), LOGITS, MAPS),
    "MeanIoU of masks": lambda: computed(ao.MeanIoU(K, sigmoid=True), MAPS.flip(2), MAPS),
    "CentroidGeometry": lambda: computed(
        diagnostics.CentroidGeometry(K, 12), FEATURES, LABELS[:, :9, :9].expand(2, -1, -1)
    ),
    "LabelImbalance": lambda: computed(diagnostics.LabelImbalance(K), LABELS**2 % K),
    **{
        f"CalibrationError, {norm}": lambda norm=norm: computed(
            diagnostics.CalibrationError(K, norm=norm), LOGITS, LABELS
        )
        for norm in ("l1", "l2", "max")
    },
}


@on_cpu
@pytest.mark.parametrize("name", CALLS)
def test_functions(name: str, backend: str, default_dtype: Callable[[], None]) -> None:
    expected = tensors_of(CALLS[name]())
    default_dtype()
    same(tensors_of(CALLS[name]()), expected, 1e-6)


def loss_gradient_and_terms(loss: Any, *inputs: Tensor) -> list[Tensor]:
    x = inputs[0].detach().requires_grad_()
    value = loss(x, *inputs[1:])
    gradient = torch.autograd.grad(value, x)[0]
    return [value.detach(), gradient, *loss.terms.values()]


@on_cpu
@methods.each_on_pixels
def test_methods(build: Callable[[], Any], backend: str, default_dtype: Callable[[], None]) -> None:
    """With parameters and anchors in float32."""
    features, labels, classifier = methods.batch()
    method = methods.open_gate(build())
    ours = copy.deepcopy(method)
    expected = loss_gradient_and_terms(method, features, labels, classifier)
    expected += [x.detach() for x in (*method.parameters(), *method.buffers())]
    default_dtype()
    actual = loss_gradient_and_terms(ours, features, labels, classifier)
    actual += [x.detach() for x in (*ours.parameters(), *ours.buffers())]
    same(actual, expected, 1e-6)


@methods.each_on_pixels
def test_methods_that_are_made(build: Callable[[], Any], default_dtype: Callable[[], None]) -> None:
    """With parameters and anchors in the default dtype the loss has its precision."""
    torch.manual_seed(0)
    features, labels, classifier = methods.batch()
    default_dtype()
    method = methods.open_gate(build())
    assert method(features, labels, classifier).dtype == torch.float32
    exact = copy.deepcopy(method).double()
    expected = exact(features.detach().double(), labels, copy.deepcopy(classifier).double())
    loss = method(features, labels, classifier)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-3)


def test_small_shares_of_images() -> None:
    """CeCo's prior is float32 at least: 1e-6 is 0 in float16, and 70,000 is ∞."""
    torch.set_default_dtype(torch.float16)
    try:
        prior = torch.tensor([70_000, 1, 0, 5, 9])
        method = ao.CeCo(K, 12, prior=prior)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(method.prior, prior / prior.sum())


def test_cells_of_triton(default_dtype: Callable[[], None]) -> None:
    """The kernels' plan is computed in float32, as the kernels compute."""
    upsampling = pytest.importorskip("anchorops.kernels.upsampling", reason="triton is missing")
    sizes = [(33, 257, False), (33, 257, True), (100, 333, False), (129, 1024, True)]
    plans = []
    for change in (lambda: None, default_dtype):
        change()
        upsampling.axis_of.cache_clear()
        plans.append([upsampling.axis_of(*size, 16, False) for size in sizes])
    assert plans[0] == plans[1]

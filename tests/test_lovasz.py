"""Lovász losses from histograms, against the sorted errors of the released code."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops import reference
from anchorops.doctor.catalogue.formulas import lovasz_of_classes, lovasz_of_sigmoids, upsampled
from tests.helpers.memory import peak_allocated_bytes
from tests.helpers.small_networks import NO_TORCHVISION

IGNORED = 255
EVERYWHERE = pytest.mark.on("reference", "cpu", "simulated_triton", "triton")


def example(num_classes: int, *size: int, ratio: int = 4, noise: float = 1.0) -> tuple[Tensor, ...]:
    """Logits and labels that agree as those of a network that learns; some are ignored."""
    logits = 3 * torch.randn(2, num_classes, *size, dtype=torch.float64)
    truth = upsampled(logits, torch.Size(ratio * n for n in size))
    labels = (truth + 3 * noise * torch.randn_like(truth)).argmax(1)
    labels[torch.rand(labels.shape) < 0.1] = IGNORED
    return logits, labels


def dtype_on(backend: str) -> torch.dtype:
    return torch.float32 if backend == "triton" else torch.float64


def value_and_gradient(loss: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    leaf = inputs[0].clone().requires_grad_()
    value = loss(leaf, *inputs[1:])
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def compare(loss: Any, right: Any, *inputs: Tensor, value: float = 1e-4, gradient: float = 0.01):
    """The gradient of each class in the 2-norm."""
    ours, theirs = value_and_gradient(loss, *inputs), value_and_gradient(right, *inputs)
    assert abs(ours[0] - theirs[0]) <= value
    channels = [x.double().movedim(1, 0).flatten(1) for x in (ours[1], theirs[1])]
    for actual, expected in zip(*channels, strict=True):
        assert (actual - expected).norm() <= gradient * expected.norm() + 1e-12


def of_classes(x: Tensor, y: Tensor) -> Tensor:
    return lovasz_of_classes(upsampled(x, y.shape[1:]), y).mean()


@EVERYWHERE
@pytest.mark.parametrize(
    ("num_classes", "size", "ratio"),
    [
        (2, (9, 18), 4),
        (5, (9, 13), 1),
        (19, (12, 20), 4),
        pytest.param(
            150, (10, 10), 4, marks=[pytest.mark.on("reference", "cpu"), pytest.mark.slow]
        ),
        (5, (3, 5, 6), 3),
        (5, (4, 5, 6), 1),
    ],
)
def test_softmax(num_classes: int, size: tuple[int, ...], ratio: int, backend: str):
    if backend != "reference" and len(size) == 3 and ratio > 1:
        pytest.skip("the reference serves volumes that are upsampled")
    logits, labels = example(num_classes, *size, ratio=ratio)
    logits = logits.to(dtype_on(backend))

    def right(x: Tensor, y: Tensor) -> Tensor:
        losses = lovasz_of_classes(upsampled(x, y.shape[1:]), y)
        present = torch.stack([(y == k).any() for k in range(num_classes)])
        return losses[present].mean()

    few = num_classes == 150  # about 20 pixels of a class
    compare(ao.Lovasz(), right, logits, labels, gradient=0.1 if few else 0.01)
    compare(ao.Lovasz(bins=8192), right, logits, labels, value=1e-5, gradient=0.05 if few else 0.01)
    compare(ao.Lovasz(bins=65536), right, logits, labels, value=1e-6, gradient=1e-3)


@EVERYWHERE
def test_settings(backend: str):
    logits, labels = example(5, 12, 20)
    logits = logits.to(dtype_on(backend))
    labels[labels == 4] = 1  # absent
    z = upsampled(logits, labels.shape[1:])
    losses = lovasz_of_classes(z, labels)
    present = losses[:4].mean()
    for settings, right in (
        ({}, present),
        ({"absent": "zero"}, losses[:4].sum() / 5),
        ({"absent": "keep"}, losses.mean()),
        ({"classes": [1, 4]}, losses[1]),
        ({"classes": (1, 2), "absent": "keep"}, losses[1:3].mean()),
    ):
        assert abs(ao.Lovasz(**settings)(logits, labels) - right) < 1e-3
    images = [
        lovasz_of_classes(x[None], y[None])[:4].mean() for x, y in zip(z, labels, strict=True)
    ]
    assert abs(ao.Lovasz(per_image=True)(logits, labels) - sum(images) / 2) < 1e-3
    aligned = lovasz_of_classes(upsampled(logits, labels.shape[1:], True), labels)[:4].mean()
    assert abs(ao.Lovasz(align_corners=True)(logits, labels) - aligned) < 1e-3
    points, point_labels = logits.movedim(1, -1).flatten(0, 2), labels[:, ::4, ::4].flatten()
    right = lovasz_of_classes(points[..., None], point_labels[:, None])[:4].mean()
    assert abs(ao.Lovasz()(points, point_labels) - right) < 1e-3


def test_absent_class_of_all_images_has_the_gradient_of_its_largest_error():
    logits, labels = example(5, 6, 7)
    labels[labels == 4] = IGNORED

    compare(ao.Lovasz(absent="keep", bins=65536), of_classes, logits, labels, gradient=0.05)


CASES = [  # classes, size of the logits and of the labels, align_corners
    (5, (21, 30), (8, 11), False),
    (2, (9, 18), (36, 72), False),
    (19, (9, 13), (9, 13), False),
    (5, (9, 9), (33, 33), True),
    (5, (2, 3), (40, 60), False),
]
MANY_CLASSES = (1100, (3, 4), (9, 12), False)
LAYOUTS = "", "channels last", "cropped"
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
EACH = [
    pytest.param(
        *(case, dtype, layout),
        # the machine compiles each case in two dtypes, and each dtype in several layouts
        marks=[pytest.mark.on("cpu", "triton")] * ((i + j) % 2 or layout != LAYOUTS[(i + j) % 3]),
    )
    for (i, case), (j, dtype), layout in product(enumerate(CASES), enumerate(DTYPES), LAYOUTS)
]
OF_MANY_CLASSES = [
    pytest.param(MANY_CLASSES, *others, marks=pytest.mark.on("cpu"))
    for others in product(DTYPES, LAYOUTS)
]


@pytest.mark.on("cpu", "simulated_triton", "triton")
@pytest.mark.parametrize(("case", "dtype", "layout"), [*EACH, *OF_MANY_CLASSES], ids=str)
def test_equals_the_reference(case: tuple, dtype: torch.dtype, layout: str, backend: str):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the reference serves float64")
    num_classes, size, labels_size, align_corners = case
    logits = (3 * torch.randn(2, num_classes, *size)).to(dtype)
    if layout:
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    labels = torch.randint(0, num_classes, (2, *labels_size))
    labels[torch.rand(labels.shape) < 0.1] = IGNORED
    if layout == "cropped":
        logits, labels = logits[..., 1:], labels.transpose(1, 2).contiguous().transpose(1, 2)
    options = IGNORED, align_corners
    operator = getattr(torch.ops.anchorops.probability_histograms, backend)
    counts = operator(logits, labels, 64, *options)
    right = reference.probability_histograms(logits, labels, 64, *options)
    assert (counts.sum((1, 2)) == (labels != IGNORED).sum()).all()
    # an error at the edge of a bin, moved to the next one, changes two counts
    moved = (counts - right).abs().sum()
    assert moved <= max(2, 1e-4 * right.sum()) and torch.equal(counts.sum(2), right.sum(2))
    slopes = torch.randn(num_classes, 2, 64, dtype=torch.promote_types(dtype, torch.float32))
    operator = getattr(torch.ops.anchorops.error_loss_backward, backend)
    gradient = operator(logits, labels, slopes, *options)
    assert gradient.dtype == dtype and gradient.stride() == torch.empty_like(logits).stride()
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-3)
    right = reference.error_gradients(logits, labels, slopes, *options).double()
    assert (gradient.double() - right).norm() <= tolerance * right.norm()


@EVERYWHERE
def test_not_finite_logits_are_errors_of_1_and_their_gradients_are_nan(backend: str):
    logits, labels = example(5, 9, 13, ratio=1)
    logits = logits.to(dtype_on(backend))
    labels[0, 0, 0] = 2
    logits[0, 1, 0, 0] = torch.nan
    results = [value_and_gradient(ao.Lovasz(), logits, labels)]
    with ao.use_backend("reference"):
        results.append(value_and_gradient(ao.Lovasz(), logits, labels))
    for value, gradient in results:
        assert torch.equal(value, results[0][0]) and gradient[0, :, 0, 0].isnan().all()
        assert gradient.isnan().sum() == 5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(12, 20), (3, 5, 6)])
def test_hinge(size: tuple[int, ...], channels: int):
    logits = 5 * torch.randn(2, channels, *size)
    truth = upsampled(logits, torch.Size(4 * n for n in size))
    labels = (truth + 5 * torch.randn(truth.shape) > 3).long()
    labels[torch.rand(labels.shape) < 0.1] = IGNORED

    value = 0.005 * float(lovasz_of_sigmoids(logits, labels))
    compare(ao.Lovasz(sigmoid=True), lovasz_of_sigmoids, logits, labels, value=value)


def test_hinge_without_errors_and_with_large_ones():
    labels = torch.randint(0, 2, (2, 8, 8))
    signs = (2 * labels - 1)[:, None]
    for factor, expected in ((2.0, 0.0), (-1e4, 1e4 + 1), (-1e11, 1e11)):
        loss, gradient = value_and_gradient(ao.Lovasz(sigmoid=True), factor * signs, labels)
        assert loss.item() == pytest.approx(expected, rel=0.005, abs=1e-6)
        assert gradient.isfinite().all() and (gradient != 0).any() == (expected > 0)


def test_smp():
    smp = pytest.importorskip("segmentation_models_pytorch", reason=NO_TORCHVISION).losses
    logits, labels = example(7, 9, 13, ratio=1)
    logits = logits.float()
    for per_image in (False, True):
        theirs = smp.LovaszLoss("multiclass", per_image=per_image, ignore_index=IGNORED)
        compare(ao.Lovasz(per_image=per_image), theirs, logits, labels, value=1e-3)
        binary, theirs = labels % 2, smp.LovaszLoss("binary", per_image, ignore_index=IGNORED)
        binary[0] = 0  # an image without the class
        binary[labels == IGNORED] = IGNORED
        ours = ao.Lovasz(sigmoid=True, per_image=per_image, absent="keep")
        compare(ours, theirs, logits[:, :1], binary, value=0.01)


def test_memory():
    """No map of all classes at full resolution, nor of one."""
    logits = torch.randn(1, 64, 32, 32, requires_grad=True)
    labels = torch.randint(0, 64, (1, 256, 256))
    loss = ao.Lovasz()

    def run() -> Tensor:
        return torch.autograd.grad(loss(logits, labels), logits)[0]

    histograms = 64 * 2 * 1024 * 8
    assert peak_allocated_bytes(run) < 2 * logits.nbytes + 16 * histograms + labels.numel()


def test_sigmoids_store_no_map():
    logits = torch.randn(1, 3, 32, 32, requires_grad=True)
    labels = torch.randint(0, 2, (1, 3, 256, 256), dtype=torch.uint8)
    stored: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: stored.append(tensor) or tensor, lambda tensor: tensor
    ):
        ao.Lovasz(sigmoid=True)(logits, labels)
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in stored}
    assert labels.nbytes < sum(sizes.values()) < labels.nbytes + 3 * 2**19  # the slopes


@pytest.mark.parametrize("sigmoid", [False, True])
def test_second_derivative_of_the_reference_raises(sigmoid: bool):
    logits, labels = example(5, 6, 7)
    if sigmoid:
        logits, labels = logits[:, :1], labels.where(labels == IGNORED, labels % 2)
    logits.requires_grad_()
    with ao.use_backend("reference"):
        total = ao.Lovasz(sigmoid=sigmoid)(logits, labels) + logits.square().sum()
        (gradient,) = torch.autograd.grad(total, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="Lovasz: second derivatives are not implemented"):
            torch.autograd.grad(gradient.square().sum(), logits)


def test_sigmoids_that_are_not_finite():
    logits, labels = example(2, 6, 7, ratio=1)
    labels[labels != IGNORED] %= 2
    labels[0, 0, :2] = torch.tensor([IGNORED, 1])
    logits[0, 0, 0, :2] = torch.tensor([torch.nan, -torch.inf])  # the first one is ignored
    value, gradient = value_and_gradient(ao.Lovasz(sigmoid=True), logits[:, :1], labels)
    assert value.isnan() and gradient.isnan().nonzero().tolist() == [[0, 0, 0, 1]]
    labels[0, 0, 1] = 0  # no error
    value, gradient = value_and_gradient(ao.Lovasz(sigmoid=True), logits[:, :1], labels)
    assert value.isfinite() and gradient.isfinite().all() and gradient[0, 0, 0, 1] == 0


def test_upsampled_volumes_are_for_the_reference():
    logits, labels = example(5, 2, 6, 7)
    with ao.use_backend("cpu"), pytest.raises(ValueError, match='choose "reference" or "auto"'):
        ao.Lovasz()(logits, labels)

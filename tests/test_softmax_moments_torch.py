"""softmax_moments and pixel_cross_entropy together with torch: all shapes and dtypes,
opcheck, gradcheck, torch.compile, autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao

EVERYTHING = {"squares": True, "pixel_losses": True, "lse": True}


def inputs(dtype: torch.dtype = torch.float32, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, num_classes, 4, 5, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, num_classes, (2, 16, 20))
    labels[torch.rand(labels.shape) < 0.1] = 255
    return logits, labels


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("asked", [(True,) * 6, (False,) * 4 + (True, False)])
def test_opcheck(asked: tuple[bool, ...], per_image: bool):
    arguments = (*inputs(), None, None, 0.0, 255, False, per_image, *asked)
    torch.library.opcheck(torch.ops.anchorops.softmax_moments.cpu, arguments)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_of_the_gradient(channels_last: bool):
    logits, labels = inputs()
    logits = logits.detach()
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    lse = ao.ops.softmax_moments(logits, labels, lse=True).lse
    arguments = (logits, labels, lse, torch.rand(5), None, torch.rand(5), None, None, None)
    operator = torch.ops.anchorops.softmax_moments_backward.cpu
    torch.library.opcheck(operator, (*arguments, None, None, 0.0, 255, False))


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("pixel_argmax", (torch.randn(2, 5, 4, 6), 16, 13, True)),
        ("confusion", (torch.randint(0, 5, (2, 9)), torch.randint(0, 5, (2, 9)), 5, 255)),
    ],
)
def test_opcheck_of_what_has_no_gradient(operator: str, arguments: tuple):
    torch.library.opcheck(getattr(torch.ops.anchorops, operator).cpu, arguments)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(16, 20), (9, 13), (3, 4)])
def test_gradcheck(size: tuple[int, int], align_corners: bool):
    logits = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (1, *size))

    def function(x: Tensor):
        return ao.ops.softmax_moments(x, labels, align_corners=align_corners, **EVERYTHING)[2:8]

    with ao.use_backend("cpu"):
        assert torch.autograd.gradcheck(function, logits)


def test_second_derivatives_raise():
    logits, labels = inputs()
    with ao.use_backend("cpu"):
        loss = ao.pixel_cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            gradient.square().sum().backward()
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(RuntimeError, match="forward-mode"),
        ):
            ao.pixel_cross_entropy(
                torch.autograd.forward_ad.make_dual(logits.detach(), torch.ones_like(logits)),
                labels,
            )


def test_backward_twice_and_in_place_scaling():
    logits, labels = inputs()
    with ao.use_backend("cpu"):
        loss = ao.pixel_cross_entropy(logits, labels)
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        expected = first.clone()
        first.mul_(7)
        (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(second, expected)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ],
)
def test_every_label_dtype(dtype: torch.dtype):
    logits, labels = inputs()
    labels[labels == 255] = 100
    with ao.use_backend("cpu"):
        expected = ao.ops.softmax_moments(logits, labels, ignore_index=100)
        found = ao.ops.softmax_moments(logits, labels.to(dtype), ignore_index=100)
        matrix = ao.pixel_confusion(logits, labels, ignore_index=100)
        same = ao.pixel_confusion(logits, labels.to(dtype), ignore_index=100)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)
    assert torch.equal(matrix, same)


def test_labels_and_gradients_of_any_strides():
    logits, labels = inputs()
    weights = torch.randn(2, 20, 16)
    wide = torch.full((2, 20, 48), 255)
    wide[:, :, 1::3] = labels.transpose(1, 2)
    results = []
    for y, w in (
        (labels, weights.transpose(1, 2).contiguous()),
        (wide[:, :, 1::3].transpose(1, 2), weights.transpose(1, 2)),
    ):
        with ao.use_backend("cpu"):
            moments = ao.ops.softmax_moments(logits, y, pixel_losses=True, lse=True)
            outputs = [moments.pixel_losses, moments.lse, moments.losses]
            grads = [w, torch.tensor(2.0).expand(2, 16, 20), torch.tensor(3.0).expand(5)]
            results.append(torch.autograd.grad(outputs, logits, grads)[0])
    assert torch.equal(*results)


def test_fullgraph_and_dynamic_shapes():
    def step(x: Tensor, y: Tensor) -> Tensor:
        moments = ao.ops.softmax_moments(x, y, pixel_losses=True)
        assert moments.masses is not None and moments.pixel_losses is not None
        predictions = ao.pixel_argmax(x, (y.shape[1], y.shape[2]))
        correct = ao.confusion(predictions, y, x.shape[1]).trace()
        total = moments.losses.sum() + moments.masses.square().sum()
        return total + moments.pixel_losses.square().sum() + 0 * correct

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    with ao.use_backend("cpu"):
        for batch, height, width in ((2, 4, 5), (3, 6, 7), (1, 8, 3)):
            logits = torch.randn(batch, 5, height, width, requires_grad=True)
            labels = torch.randint(0, 5, (batch, 4 * height, 3 * width))
            losses = [f(logits, labels) for f in (step, compiled)]
            grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
            torch.testing.assert_close(*losses)
            torch.testing.assert_close(*grads)


def test_grad_scaler_in_half_precision():
    logits, labels = inputs(torch.float16)
    with ao.use_backend("cpu"):
        loss = ao.pixel_cross_entropy(logits, labels)
        (plain,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (scaled,) = torch.autograd.grad(loss * 2.0**12, logits)
    torch.testing.assert_close(
        scaled / 2**12, plain.float(), rtol=2e-3, atol=1e-6, check_dtype=False
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("size", "labels"),
    [
        ((0, 5), (0,)),
        ((0, 5, 7), (0, 7)),
        ((2, 5, 0), (2, 0)),
        ((0, 5, 3, 4), (0, 6, 8)),
        ((2, 5, 0, 4), (2, 0, 4)),
        ((2, 5, 3, 4), (2, 0, 8)),
        ((2, 5, 3, 4), (2, 8, 0)),
        ((2, 5, 3, 4), (2, 6, 8)),
        ((2, 5, 2, 3, 4), (2, 2, 3, 4)),
        ((9, 5), (9,)),
    ],
)
@pytest.mark.parametrize("per_image", [False, True])
def test_nothing_valid(size, labels, backend: str, per_image: bool, poisoned: None):
    logits = torch.full(size, torch.nan, requires_grad=True)
    ignored = torch.full(labels, 255)
    with ao.use_backend(backend):
        moments = ao.ops.softmax_moments(logits, ignored, per_image=per_image, **EVERYTHING)
        loss = ao.pixel_cross_entropy(logits, ignored)
    images = (1 if len(size) == 2 else size[0],) if per_image else ()
    for statistic in moments[:6]:
        assert statistic.shape == (*images, 5)
    assert moments.lse.shape == moments.pixel_losses.shape == labels
    assert not any(x.any() for x in (*moments[:8], loss))
    found = [*moments[2:8], loss]
    (gradient,) = torch.autograd.grad(found, logits, found)  # pyright: ignore
    assert gradient.shape == size and not gradient.any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [(130, 24), (3, 7, 50), (2, 4, 3, 5, 6)])
def test_points_and_volumes(size: tuple[int, ...], backend: str):
    logits = torch.randn(size, requires_grad=True)
    labels = torch.randint(0, size[1], (size[0], *size[2:]))
    labels[0] = 255
    with ao.use_backend(backend):
        loss = ao.pixel_cross_entropy(logits, labels)
    expected = F.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(weighted, label_smoothing, reduction, backend):
    logits = torch.randn(2, 7, 5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (2, 17, 25))
    labels[torch.rand(labels.shape) < 0.2] = 255
    weight = torch.rand(7, dtype=torch.float64) if weighted else None
    options = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
    with ao.use_backend(backend):
        loss = ao.pixel_cross_entropy(logits, labels, **options)
    z = F.interpolate(logits, (17, 25), mode="bilinear")
    expected = F.cross_entropy(z, labels, ignore_index=255, **options)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x.sum(), logits)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted)

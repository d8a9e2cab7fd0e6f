"""Sums of upsampled features over each class, compared with sums of the upsampled tensor."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao
from anchorops._ops.upsampled_sums import upsampled_sums
from tests.helpers.memory import peak_allocated_bytes

K = 5
Size = tuple[int, int]


@pytest.fixture(params=[1, 2**18], ids=["many parts", "one part"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["anchorops._ops.upsampled_sums"]
    monkeypatch.setattr(module, "CACHED", request.param)


def example(size: Size, label_size: Size) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Features, labels, and gradients of the sums, the mean and the variance."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 4, *size, generator=generator, requires_grad=True)
    labels = torch.randint(-1, K + 1, (3, *label_size), generator=generator)
    labels[0, 0, 0] = 255
    gradients = [torch.randn(shape, generator=generator) for shape in ((3, K, 4), (4,), (4,))]
    return features, labels, gradients


def naive(features: Tensor, labels: Tensor, upsample: bool) -> tuple[Tensor, Tensor, Tensor]:
    pixels = features
    if upsample:
        pixels = F.interpolate(features, labels.shape[1:], mode="bilinear", align_corners=True)
    else:
        labels = F.interpolate(labels[:, None].float(), features.shape[2:])[:, 0]
    sums = torch.stack([(pixels * (labels == k)[:, None]).sum((2, 3)) for k in range(K)], 1)
    return sums, features.mean((0, 2, 3)), features.var((0, 2, 3), correction=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("size", "label_size"),
    [((6, 10), (24, 40)), ((5, 7), (13, 11)), ((1, 3), (4, 9)), ((3, 1), (9, 4)), ((4, 4), (1, 2))],
)
def test_sums_of_the_upsampled_tensor(size: Size, label_size: Size, backend: str, parts: None):
    features, labels, gradients = example(size, label_size)
    for upsample in (True, False):
        expected = naive(features, labels, upsample)
        (dfeatures,) = torch.autograd.grad(expected, features, gradients, retain_graph=True)
        with ao.use_backend(backend):
            counts, *found = upsampled_sums(
                features, labels, K, per_image=True, upsample=upsample, ignore_index=255
            )
            (gradient,) = torch.autograd.grad(found, features, gradients)
            together = upsampled_sums(
                features, labels, K, per_image=False, upsample=upsample, ignore_index=255
            )
        if upsample:
            assert counts.tolist() == [[int((im == k).sum()) for k in range(K)] for im in labels]
        torch.testing.assert_close(found, list(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, dfeatures, rtol=1e-5, atol=1e-5)
        assert torch.equal(together.counts, counts.sum(0))
        torch.testing.assert_close(together.sums, expected[0].sum(0), rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(together.sums, features, gradients[0][0])
        (dfeatures,) = torch.autograd.grad(expected[0].sum(0), features, gradients[0][0])
        torch.testing.assert_close(gradient, dfeatures, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_classes", [255, 256, 2**15 + 1])  # keys of 8, 16 and 32 bits
@pytest.mark.parametrize("label_size", [(24, 40), (6, 10)])
@pytest.mark.parametrize("per_image", [False, True])
def test_last_classes(num_classes: int, label_size: Size, per_image: bool):
    features, labels, gradients = example((6, 10), label_size)
    options = {"per_image": per_image, "upsample": True, "ignore_index": -1}
    gradient = gradients[0] if per_image else gradients[0][0]
    first = num_classes - K
    few = upsampled_sums(features, labels, K, **options)
    labels = torch.where((labels >= 0) & (labels < K), labels + first, -1)
    many = upsampled_sums(features, labels, num_classes, **options)
    assert torch.equal(many.counts[..., first:], few.counts) and not many.counts[..., :first].any()
    torch.testing.assert_close(many.sums[..., first:, :], few.sums)
    assert not many.sums[..., :first, :].any()
    found, expected = (
        torch.autograd.grad(moments.sums[..., -K:, :], features, gradient)[0]
        for moments in (many, few)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("per_image", [False, True])
def test_layout_and_the_rest_of_torch(per_image: bool):
    features, labels, gradients = example((6, 10), (24, 40))
    gradients = gradients if per_image else [gradients[0][0], *gradients[1:]]
    operator = torch.ops.anchorops.upsampled_sums.cpu
    of_labels = torch.where(labels < K, labels, -1).byte()
    for keys in (of_labels, of_labels[:, :6, :10]):
        torch.library.opcheck(operator, (features, keys, K, K))
    last = features.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    def moments(x: Tensor) -> list[Tensor]:
        options = {"per_image": per_image, "upsample": True, "ignore_index": 255}
        return list(upsampled_sums(x, labels, K, **options))[1:]

    compiled = torch.compile(moments, fullgraph=True)
    results = [f(x) for f in (moments, compiled) for x in (features, last)]
    dfeatures = [
        torch.autograd.grad(result, x, gradients)[0]
        for result, x in zip(results, (features, last) * 2, strict=True)
    ]
    for i, x in enumerate((features, last) * 2):
        torch.testing.assert_close(results[i], results[0])
        torch.testing.assert_close(dfeatures[i], dfeatures[0])
        assert dfeatures[i].stride() == x.stride()
    with pytest.raises(RuntimeError, match=r"^upsampled_sums: second derivatives .*reference"):
        gradients[0].requires_grad_()
        (gradient,) = torch.autograd.grad(moments(features), features, gradients, create_graph=True)
        gradient.sum().backward()


@pytest.mark.parametrize("label_size", [(24, 40), (6, 10)])
def test_half_precision_is_summed_in_float32(label_size: Size):
    features, labels, gradients = example((6, 10), label_size)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        x = features.detach().bfloat16().to(dtype).requires_grad_()
        _, *found = upsampled_sums(x, labels, K, per_image=True, upsample=True, ignore_index=255)
        results.append((found, *torch.autograd.grad(found, x, gradients)))
    (found, gradient), (expected, dfeatures) = results
    torch.testing.assert_close(found, expected)
    assert torch.equal(gradient, dfeatures.bfloat16())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_features_that_no_valid_label_uses(
    value: float, per_image: bool, backend: str, parts: None
):
    """If they are not finite, neither are mean and variance of their channel; all else is equal."""
    features, labels, _ = example((4, 20), (8, 60))
    labels[:, :, :30] = 255  # the next ones are between columns 9 and 10
    spoilt = features.detach().clone()
    spoilt[:, 1, :, :9] = value
    results = []
    for x in (features.detach(), spoilt):
        x.requires_grad_()
        with ao.use_backend(backend):
            _, sums, mean, variance = upsampled_sums(
                x, labels, K, per_image=per_image, upsample=True, ignore_index=255
            )
        dsums = torch.arange(sums.numel(), dtype=torch.float32).view(sums.shape)
        results.append((sums, *torch.autograd.grad(sums, x, dsums), mean, variance))
    others = torch.arange(features.shape[1]) != 1
    for i, (clean, ours) in enumerate(zip(*results, strict=True)):
        if i < 2:
            assert torch.equal(ours, clean)
        else:
            assert torch.equal(ours[others], clean[others]) and not ours[1].isfinite()


def test_memory():
    """W has 600 classes × the pixels; in int64 and float32 these are 472 MB. Only a part of it
    exists at a time.

    A part and the keys need less than 8 MiB, the gradient of the features 16 MiB.
    """
    features = torch.randn(4, 64, 128, 128, requires_grad=True)
    labels = torch.randint(0, 600, (4, 512, 512), dtype=torch.int16)

    def step() -> Tensor:
        _, sums, mean, variance = upsampled_sums(
            features, labels, 600, per_image=False, upsample=True, ignore_index=-1
        )
        loss = sums.square().sum() + mean.sum() + variance.sum()
        return torch.autograd.grad(loss, features)[0]

    step()
    assert peak_allocated_bytes(step) < 24 << 20

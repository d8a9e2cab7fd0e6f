"""Sums of upsampled features over each class, compared with sums of the upsampled tensor."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao
from anchorops.measure import peak_extra_bytes
from anchorops.ops.upsampled_sums import upsampled_sums

K = 5
Size = tuple[int, int]


@pytest.fixture(params=[1, 2**18], ids=["many parts", "one part"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["anchorops.ops.upsampled_sums"]
    monkeypatch.setattr(module, "CACHED", request.param)


def example(size: Size, label_size: Size) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 4, *size, generator=generator, requires_grad=True)
    labels = torch.randint(-1, K + 1, (3, *label_size), generator=generator)
    labels[0, 0, 0] = 255
    return features, labels, torch.randn(3, K, 4, generator=generator)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("size", "label_size"),
    [((6, 10), (24, 40)), ((5, 7), (13, 11)), ((1, 3), (4, 9)), ((3, 1), (9, 4)), ((4, 4), (1, 2))],
)
def test_sums_of_the_upsampled_tensor(size: Size, label_size: Size, backend: str, parts: None):
    features, labels, dsums = example(size, label_size)
    with ao.use_backend(backend):
        counts, sums, _ = upsampled_sums(features, labels, K, ignore_index=255)
        (gradient,) = torch.autograd.grad(sums, features, dsums)
    upsampled = F.interpolate(features, label_size, mode="bilinear", align_corners=True)
    naive = torch.stack([(upsampled * (labels == k)[:, None]).sum((2, 3)) for k in range(K)], 1)
    assert counts.tolist() == [[int((image == k).sum()) for k in range(K)] for image in labels]
    torch.testing.assert_close(sums, naive, rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(naive, features, dsums)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_layout_and_the_rest_of_torch():
    features, labels, dsums = example((6, 10), (24, 40))
    operator = torch.ops.anchorops.upsampled_sums.torch
    torch.library.opcheck(operator, (features, labels, K, 255, "cpu"))
    last = features.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    def sums(x: Tensor) -> Tensor:
        return upsampled_sums(x, labels, K, ignore_index=255).sums

    compiled = torch.compile(sums, fullgraph=True)
    results = [f(x) for f in (sums, compiled) for x in (features, last)]
    gradients = [
        torch.autograd.grad(result, x, dsums)[0]
        for result, x in zip(results, (features, last) * 2, strict=True)
    ]
    for i, x in enumerate((features, last) * 2):
        torch.testing.assert_close(results[i], results[0])
        torch.testing.assert_close(gradients[i], gradients[0])
        assert gradients[i].stride() == x.stride()
    with pytest.raises(RuntimeError, match=r"^upsampled_sums: second derivatives .*reference"):
        dsums.requires_grad_()
        (gradient,) = torch.autograd.grad(sums(features), features, dsums, create_graph=True)
        gradient.sum().backward()


def test_memory():
    """W has 600 classes × the pixels; in int64 and float32 these are 472 MB. Only a part of it
    exists at a time.

    A part needs about 10 MB. The allocator keeps some freed pages, and their number changes from
    run to run, by about 10 MB too.
    """
    features = torch.randn(4, 64, 128, 128, requires_grad=True)
    labels = torch.randint(0, 600, (4, 512, 512), dtype=torch.int16)

    def step() -> Tensor:
        sums = upsampled_sums(features, labels, 600, ignore_index=-1).sums
        return torch.autograd.grad(sums.square().sum(), features)[0]

    step()
    extra = peak_extra_bytes(step, torch.device("cpu"))
    if extra is None:
        pytest.skip("this system does not tell the peak of the memory")
    assert extra < 48 << 20

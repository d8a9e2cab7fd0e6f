"""CeCo compared with numbers of the released code, and its weights with the upsampled tensor."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import anchorops as ao
from anchorops.losses.batch_norm import batch_norm
from tests.helpers.memory import peak_allocated_bytes
from tests.helpers.methods import oracle
from tests.helpers.operators import check_loss


def ceco_of_release(numbers: dict[str, Tensor]) -> ao.CeCo:
    num_classes, center_dim = numbers["etf"].shape
    reduced_dim, dim = numbers["reduce_conv"].shape[:2]
    ceco = ao.CeCo(
        num_classes,
        dim,
        reduced_dim=reduced_dim,
        center_dim=center_dim,
        prior=numbers["prior"],
        loss_weight=float(numbers["loss_weight"]),
        scale=float(numbers["scale"]),
        dropout=0.0,
    )
    with torch.no_grad():
        ceco.reduction.weight.copy_(numbers["reduce_conv"])
        ceco.projection.weight.copy_(numbers["gain_weight"])
        ceco.projection.bias.copy_(numbers["gain_bias"])
        ceco.etf.copy_(numbers["etf"])
    return ceco


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_loss_and_gradient_of_the_release(memory_format: torch.memory_format) -> None:
    numbers = oracle("ceco_official.npz")
    features = numbers["features"].clone(memory_format=memory_format).requires_grad_()
    loss = ceco_of_release(numbers)(features, numbers["labels"])
    loss.backward()
    torch.testing.assert_close(loss.double(), numbers["loss"], rtol=2e-6, atol=0)
    torch.testing.assert_close(features.grad, numbers["dfeatures"], rtol=1e-4, atol=1e-7)


def naive_loss(
    ceco: ao.CeCo, features: Tensor, labels: Tensor, per_image: bool, upsample: bool
) -> Tensor:
    """Every center from its own mask, image by image or over the batch."""
    reduced = ceco.norm(ceco.reduction(features))
    if upsample:
        reduced = F.interpolate(reduced, labels.shape[1:], mode="bilinear", align_corners=True)
    else:
        labels = F.interpolate(labels[:, None].float(), features.shape[2:])[:, 0].long()
    rows = reduced.movedim(1, -1)
    losses = []
    for images in range(len(labels)) if per_image else [slice(None)]:
        for k in range(ceco.num_classes):
            mask = labels[images] == k
            if not mask.any():
                continue
            hidden = ceco.projection(rows[images][mask].mean(0)).relu()
            hidden = hidden / hidden.norm()
            logits = ceco.scale * ceco.etf @ hidden + (ceco.prior + 1e-12).log()
            losses.append(-logits.log_softmax(0)[k])
    return ceco.loss_weight * torch.stack(losses).mean()


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("resolution", ["label", "feature"])
@pytest.mark.parametrize("freeze", [False, True])
def test_options_against_the_naive_computation(
    per_image: bool, resolution: str, freeze: bool
) -> None:
    torch.manual_seed(0)
    ceco = ao.CeCo(
        5,
        6,
        reduced_dim=7,
        center_dim=9,
        prior=torch.tensor([5.0, 1.0, 1.0, 0.0, 3.0]),
        dropout=0.0,
        resolution=resolution,
        per_image=per_image,
        freeze_projection=freeze,
    )
    features = torch.randn(2, 6, 5, 6, requires_grad=True)
    labels = torch.randint(0, 4, (2, 10, 12))  # class 4 is absent
    labels[:, :3] = 255
    inputs = [features, *(p for p in ceco.parameters() if p.requires_grad)]
    assert len(inputs) == (4 if freeze else 6)
    loss = ceco(features, labels)
    expected = naive_loss(ceco, features, labels, per_image, resolution == "label")
    check_loss(loss, expected, *inputs, rtol=1e-4, atol=1e-6)
    assert ceco.terms["present"] == (
        sum(len(im[im < 255].unique()) for im in labels) if per_image else 4
    )


def test_dropout_only_in_training() -> None:
    torch.manual_seed(0)
    ceco = ao.CeCo(5, 6, dropout=0.5).eval()
    features, labels = torch.randn(2, 6, 4, 4), torch.randint(0, 5, (2, 8, 8))
    assert ceco(features, labels) == ceco(features, labels)
    ceco.train()
    assert ceco(features, labels) != ceco(features, labels)


def test_synchronized_batch_norm_of_one_process() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(2, 6, 4, 4), torch.randint(0, 5, (2, 8, 8))
    ceco = ao.CeCo(5, 6, dropout=0.0)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ceco))
    assert isinstance(synchronized.norm, nn.SyncBatchNorm)
    torch.testing.assert_close(synchronized(features, labels), ceco(features, labels))
    torch.testing.assert_close(synchronized.state_dict(), ceco.state_dict())


@pytest.mark.parametrize("pixels", [0, 1, 2])
def test_ranks_with_few_pixels(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without two pixels on all ranks there is no variance: the running statistics stay."""
    monkeypatch.setattr("anchorops.losses.batch_norm.all_reduce", lambda x, group: x)
    norm = nn.BatchNorm2d(3)
    mean = torch.full((3,), 2.0 if pixels else torch.nan)
    variance = torch.full((3,), float(pixels == 2) if pixels else torch.nan)
    now = batch_norm("CeCo", norm, mean, variance, pixels, "the world")
    expected = (0.2, 1.1) if pixels == 2 else (0.0, 1.0)
    assert norm.running_mean is not None and norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, torch.full((3,), expected[0]))
    torch.testing.assert_close(norm.running_var, torch.full((3,), expected[1]))
    assert now.of(torch.ones(3)).isfinite().all()


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.BatchNorm2d(128, momentum=None), "running statistics and a momentum that is a number"),
        (nn.BatchNorm2d(128, track_running_stats=False), "running statistics and a momentum"),
        (nn.BatchNorm2d(128, affine=False), "a BatchNorm2d or SyncBatchNorm with affine=True"),
        (nn.BatchNorm2d(64), "a batch norm of 128 channels"),
        (nn.GroupNorm(4, 128), "a BatchNorm2d or SyncBatchNorm"),
        (nn.Identity(), "a BatchNorm2d or SyncBatchNorm"),
    ],
    ids=repr,
)
def test_replaced_batch_norm(norm: nn.Module, expected: str) -> None:
    ceco = ao.CeCo(5, 6)
    ceco.add_module("norm", norm)
    message = f"^CeCo: norm: expected .*{expected}.*, got {re.escape(repr(norm))}$"
    with pytest.raises(ValueError, match=message):
        ceco(torch.randn(2, 6, 4, 4), torch.zeros(2, 8, 8, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 6, 9), (8, 6)])
def test_batch_norm_keeps_torchs_statistics(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    features = 3 + torch.randn(shape)
    labels = torch.randint(0, 5, shape[:1] + shape[2:])
    ceco = ao.CeCo(5, 6)
    norm, ceco.norm.momentum = copy.deepcopy(ceco.norm), 0.3
    norm.momentum = 0.3
    for _ in range(2):
        ceco(features, labels)
        norm(ceco._reduce_channels(features))
    torch.testing.assert_close(ceco.norm.state_dict(), norm.state_dict())


def test_memory() -> None:
    """The reduced features have 16 MiB; normalised features would have as much. The gradient of the
    features has 64 MiB, and a convolution would copy the features, in a buffer of its own."""
    features = torch.randn(2, 512, 128, 128, requires_grad=True)
    labels = torch.randint(0, 150, (2, 64, 64)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    ceco = ao.CeCo(150, 512)

    def step() -> Tensor:
        return torch.autograd.grad(ceco(features, labels), features)[0]

    step()
    assert peak_allocated_bytes(lambda: ceco(features, labels)) < 24 << 20
    assert peak_allocated_bytes(step) < 84 << 20
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    assert not [event.key for event in profiler.key_averages() if "conv" in event.key]

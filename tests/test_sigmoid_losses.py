"""Losses of sigmoid logits, one channel or several, compared with torch."""

import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao

both_backends = pytest.mark.on("cpu", "reference")


def inputs(channels: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2, C, 5, 7), the upsampled logits, and labels (2, C, 20, 21)."""
    logits = (2 * torch.randn(2, channels, 5, 7, dtype=dtype)).requires_grad_()
    labels = torch.randint(0, 2, (2, channels, 20, 21))
    return logits, F.interpolate(logits, (20, 21), mode="bilinear"), labels


@both_backends
def test_bools_with_bytes_of_255(backend):
    """NumPy's of a bilevel image of Pillow."""
    logits, _, labels = inputs()
    clean, raw = labels.bool(), labels.byte().mul(255).view(torch.bool)
    for call in (
        ao.BinaryCrossEntropy(),
        ao.Dice(sigmoid=True),
        ao.Lovasz(sigmoid=True),
        lambda *x: ao.pixel_confusion(*x, sigmoid=True),
        lambda z, y: ao.pixel_kl_divergence(z, z.flip(1), (20, 21), valid=y[:, 0]),
    ):
        assert torch.equal(call(logits, raw), call(logits, clean))
    for predictions, truth in ((raw, clean), (clean, raw)):
        metric = ao.MeanIoU(3, sigmoid=True)
        metric.update(predictions, truth)
        assert metric.compute() == 1 and metric.confusion.sum() == labels.numel()


def test_parts_are_of_sigmoids():
    """And have the corners and the ignored label of the whole."""
    pair = ao.CrossEntropyDice(dice=ao.Dice(sigmoid=True, align_corners=True))
    assert (
        isinstance(pair.cross_entropy, ao.BinaryCrossEntropy) and pair.cross_entropy.align_corners
    )
    pair = ao.CrossEntropyDice(ao.BinaryCrossEntropy(align_corners=True))
    assert pair.dice.sigmoid and pair.dice.align_corners
    logits, _, labels = inputs()
    whole = ao.CrossEntropyDice(dice=ao.Dice(sigmoid=True), ignore_index=0)
    assert whole.dice.ignore_index == whole.cross_entropy.ignore_index == whole.ignore_index == 0
    expected = ao.BinaryCrossEntropy(ignore_index=0)(logits, labels)
    expected = expected + ao.Dice(sigmoid=True, ignore_index=0)(logits, labels)
    torch.testing.assert_close(whole(logits, labels), expected)


@pytest.mark.parametrize("shape", [(6, 1), (2, 1, 8, 9)])
def test_the_axis_of_one_channel_may_be_absent(shape):
    logits, labels = torch.randn(shape), torch.randint(0, 2, shape)
    each = partial(ao.pixel_binary_cross_entropy, logits, reduction="none")
    assert torch.equal(each(labels[:, 0]), each(labels)[:, 0])


def test_channels_last_in_batched_gradients_traces_and_compiled_code():
    logits = torch.randn(2, 3, 6, 8).to(memory_format=torch.channels_last).requires_grad_()
    labels = torch.randint(0, 2, (2, 3, 24, 32))

    def losses(x: torch.Tensor) -> torch.Tensor:
        return ao.pixel_binary_cross_entropy(x, labels, reduction="none").mean((0, 2, 3))

    actual, expected = (
        torch.autograd.grad(losses(x), x, torch.eye(3), is_grads_batched=True)[0]
        for x in (logits, logits.detach().contiguous().requires_grad_())
    )
    assert torch.equal(actual, expected)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(logits).sum(), logits)
    torch.testing.assert_close(actual, expected.sum(0))
    traced, buffer = torch.jit.trace(losses, logits.detach()), io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(logits.detach()), losses(logits.detach()))
    nothing = torch.randn(2, 6, 4, 3)[:, :3, :0].requires_grad_()
    assert ao.BinaryCrossEntropy()(nothing, labels[:, :, :0]) == 0


WHOLE = torch.tensor([1.0, 3.0, 2.0])


@pytest.mark.parametrize(
    "form",
    [
        WHOLE.double(),
        WHOLE.view(3, 1, 1),
        WHOLE.view(1, 3, 1, 1),
        tuple(WHOLE.tolist()),
        WHOLE.numpy(),
        WHOLE.long(),
        WHOLE.long().tolist(),
    ],
    ids=str,
)
def test_forms_of_pos_weight(form):
    """The function and the module take all forms, and give one result."""
    z, y = torch.randn(2, 3, 4, 5), torch.randint(0, 2, (2, 3, 8, 10))
    expected = ao.pixel_binary_cross_entropy(z, y, pos_weight=WHOLE)
    torch.testing.assert_close(ao.pixel_binary_cross_entropy(z, y, pos_weight=form), expected)
    torch.testing.assert_close(ao.BinaryCrossEntropy(form)(z, y), expected)


@pytest.mark.parametrize("wrong", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("margin", [0.01, 1.0, 16.0, 80.0])
def test_sums_of_tiny_and_large_losses(margin, wrong):
    """The logarithms of a class are added as one of a product, which must not lose those near 0."""
    labels = torch.randint(0, 2, (1, 40, 1000))
    z = margin * (0.5 + torch.rand(1, 1, 40, 1000)) * (2 * labels[:, None] - 1)
    z[torch.rand(z.shape) < wrong] *= -1
    z.clamp_(-80, 80)
    loss = ao.pixel_binary_cross_entropy(z, labels)
    expected = F.softplus(z.double() * (1 - 2 * labels[:, None])).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=5e-7, atol=0)


@both_backends
@pytest.mark.parametrize("ignored", [0, 1])
def test_one_of_both_labels_may_be_ignored(ignored: int, backend: str) -> None:
    logits, labels = torch.randn(2, 3, 8, 9), torch.randint(0, 2, (2, 3, 8, 9))
    losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    actual = ao.BinaryCrossEntropy(ignore_index=ignored)(logits, labels)
    torch.testing.assert_close(actual, losses[labels != ignored].mean())


def test_loss_of_one_channel_equals_segformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(num_labels=1, depths=[1, 1, 1, 1])
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    labels = torch.randint(0, 2, (2, 64, 64))
    labels[:, :8] = 255  # semantic_loss_ignore_index
    outputs = model(torch.randn(2, 3, 64, 64), labels=labels)
    loss = (labels != 255).float().mean() * ao.pixel_binary_cross_entropy(outputs.logits, labels)
    torch.testing.assert_close(loss, outputs.loss)


def test_the_default_device_moves_no_weight() -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 2, (2, 3, 8, 9))
    weight, loss = torch.rand(3), ao.BinaryCrossEntropy(2.0)

    def losses() -> list[torch.Tensor]:
        of_tensor = ao.pixel_binary_cross_entropy(logits, labels, pos_weight=weight)
        return [of_tensor, loss(logits, labels)]

    with torch.device("meta"):
        there = losses()
    torch.testing.assert_close(there, losses())

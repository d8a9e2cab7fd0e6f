"""pixel_argmax: dtypes, sigmoids and thresholds. Its values are tested in test_confusion.py, with
the confusion matrices."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao
from tests.helpers.memory import peak_allocated_bytes

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64)
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "×4": ((9, 18), (36, 72)),
    "same size": ((9, 13), (9, 13)),
    "down": ((21, 30), (8, 11)),
    "volume": ((4, 5, 6), (9, 11, 13)),
}


def upsampled(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear" if len(size) == 2 else "trilinear")


@pytest.mark.on("reference", "cpu")
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [2, 19])
@pytest.mark.parametrize("shape", SHAPES)
def test_dtypes(shape: str, num_classes: int, dtype: torch.dtype):
    low, size = SHAPES[shape]
    for logits_dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = torch.randn(2, num_classes, *low).to(logits_dtype)
        logits[0, :, 0, 0] = torch.nan  # these pixels are computed one by one
        classes = ao.pixel_argmax(logits, size, dtype=dtype)
        assert classes.dtype == dtype and classes.is_contiguous()
        assert torch.equal(classes.long(), ao.pixel_argmax(logits, size))


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.uint8, 256), (torch.int8, 128), (torch.int16, 32768)]
)
def test_largest_class(dtype: torch.dtype, most: int):
    logits = torch.zeros(1, most, 2, 3)
    logits[:, -1] = 1
    assert (ao.pixel_argmax(logits, (4, 9), dtype=dtype) == most - 1).all()
    with pytest.raises(ValueError, match=f"^pixel_argmax: dtype: expected .*{most + 1} classes"):
        ao.pixel_argmax(torch.zeros(1, most + 1, 2, 3), (4, 9), dtype=dtype)


@pytest.mark.on("reference", "cpu", "simulated_triton")
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("channels", "threshold"), [(1, 0.5), (3, 0.3), (3, 0.9)])
@pytest.mark.parametrize("shape", SHAPES)
def test_sigmoids(shape: str, channels: int, threshold: float):
    """Of logits whose channels are last, and of none."""
    low, size = SHAPES[shape]
    logits = 3 * torch.randn(2, *low, channels).movedim(-1, 1)
    options: dict[str, Any] = {"sigmoid": True, "threshold": threshold, "dtype": torch.uint8}
    inside, probabilities = ao.pixel_argmax(logits, size, **options, confidence=True)
    p = upsampled(logits, size).sigmoid()
    assert inside.shape == p.shape and inside.dtype == torch.uint8
    differ = inside != (p > threshold)
    assert ((p - threshold).abs()[differ] < 1e-6).all()
    torch.testing.assert_close(probabilities, torch.where(inside == 1, p, 1 - p))
    assert torch.equal(inside, ao.pixel_argmax(logits, size, **options))
    assert ao.pixel_argmax(logits[:0], size, sigmoid=True).shape == (0, channels, *size)
    nothing = (0, *size[1:])
    assert ao.pixel_argmax(logits, nothing, sigmoid=True).shape == (2, channels, *nothing)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("logits", "labels"), [(2, 2**23 + 1), (2**23 + 1, 2)])
def test_axes_whose_coordinates_float32_would_round(logits: int, labels: int):
    z = torch.zeros(1, 1, 1, 1).expand(1, 2, 1, logits)
    expected = rf"expected axes of at most 2\^23 logits and labels, got {logits} and {labels}$"
    y = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, 1, labels)
    calls = {
        "pixel_argmax": lambda: ao.pixel_argmax(z, (1, labels), dtype=torch.uint8),
        "pixel_cross_entropy": lambda: ao.pixel_cross_entropy(z, y),
        "Dice": lambda: ao.Dice()(z, y),
        "Lovasz": lambda: ao.Lovasz()(z, y),
        "pixel_kl_divergence": lambda: ao.pixel_kl_divergence(z, z, (1, labels)),
    }
    for function, call in calls.items():
        with pytest.raises(ValueError, match=f"^{function}: logits: {expected}"):
            call()


@pytest.mark.parametrize("dims", [2, 3])
def test_no_int64_map(dims: int):
    low, size = ((32, 32), (256, 256)) if dims == 2 else ((8, 8, 8), (64, 64, 64))
    logits = torch.randn(1, 4, *low)
    most = peak_allocated_bytes(lambda: ao.pixel_argmax(logits, size, dtype=torch.uint8))
    assert most < 2 * size[0] ** dims + 20 * logits.nbytes

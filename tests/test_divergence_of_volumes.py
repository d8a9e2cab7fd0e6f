"""pixel_kl_divergence of volumes, compared with F.interpolate(mode="trilinear") and F.kl_div in
float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory import peak_allocated_bytes
from torch import Tensor

import anchorops as ao
from anchorops._ops import volumes

K = 3
SIZES = [  # of the student, the teacher and the labels
    ((4, 5, 6), (4, 5, 6), (16, 20, 24)),
    ((4, 5, 6), (2, 3, 9), (9, 11, 13)),
    ((7, 5, 6), (3, 10, 9), (3, 10, 9)),  # the teacher at the labels' size
    ((4, 5, 6), (8, 5, 6), (4, 5, 6)),  # the student
    ((1, 5, 6), (4, 5, 6), (4, 10, 12)),
]


@pytest.fixture(autouse=True, params=[2**22, 4 * K * 5 * 6])
def slab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """All volumes at once, or a few slices at a time."""
    monkeypatch.setattr(volumes, "SLAB", request.param)
    return request.param


def inputs(sizes: tuple, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, size = sizes
    logits = (2 * torch.randn(2, K, *student)).to(dtype).requires_grad_()
    return logits, (2 * torch.randn(2, K, *teacher)).to(dtype), torch.rand(2, *size) < 0.8


def formula(
    logits: Tensor,
    teacher: Tensor,
    valid: Tensor,
    temperature: float = 1.0,
    align_corners: bool = False,
) -> Tensor:
    def upsampled(x: Tensor) -> Tensor:
        size = valid.shape[1:]
        z = F.interpolate(x.double(), size, mode="trilinear", align_corners=align_corners)
        return z / temperature

    target = upsampled(teacher).softmax(1)
    terms = F.kl_div(upsampled(logits).log_softmax(1), target, reduction="none")
    return torch.where(valid, temperature**2 * terms.sum(1), 0)


def assert_same(found: Tensor, expected: Tensor, logits: Tensor) -> None:
    """The same value and the same gradient."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (found, expected)]
    scale = gradients[1].abs().max().item()
    close = {"rtol": 1e-2, "atol": 1e-2 * scale} if logits.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(gradients[0], gradients[1], **close)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 2.5}, {"align_corners": True}], ids=str)
def test_is_torchs(backend: str, sizes: tuple, options: dict[str, Any]) -> None:
    logits, teacher, valid = inputs(sizes)
    expected, weights = (
        formula(logits, teacher, valid, **options),
        torch.randn(valid.shape).double(),
    )
    size = valid.shape[1:]
    by_pixel = ao.pixel_kl_divergence(
        logits, teacher, size, valid=valid, reduction="none", **options
    )
    assert by_pixel.shape == valid.shape and not by_pixel[~valid].any()
    torch.testing.assert_close(by_pixel.double(), expected, rtol=1e-5, atol=1e-5)
    assert_same((by_pixel.double() * weights).sum(), (expected * weights).sum(), logits)
    expected = formula(logits, teacher, valid, **options).sum()
    total = ao.pixel_kl_divergence(logits, teacher, size, valid=valid, reduction="sum", **options)
    assert_same(total, expected, logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mean_dtypes_and_layouts(backend: str, dtype: torch.dtype) -> None:
    logits, teacher, valid = inputs(SIZES[1], dtype)
    logits = logits.detach().to(memory_format=torch.channels_last_3d).requires_grad_()
    size = valid.shape[1:]
    for mask in (valid, None):
        found = ao.pixel_kl_divergence(logits, teacher, size, valid=mask)
        assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
        everywhere = valid if mask is not None else torch.ones_like(valid)
        expected = formula(logits, teacher, everywhere).sum() / everywhere.sum()
        assert_same(found, expected, logits)
        if backend == "cpu":
            (gradient,) = torch.autograd.grad(
                ao.pixel_kl_divergence(logits, teacher, size, valid=mask), logits
            )
            assert gradient.stride() == logits.stride()


def test_pixels_that_are_not_valid_change_nothing(backend: str) -> None:
    logits, teacher, valid = inputs(((4, 5, 6), (4, 5, 6), (4, 5, 6)))
    with torch.no_grad():
        logits.masked_fill_(~valid[:, None], torch.nan)
    found = ao.pixel_kl_divergence(logits, teacher, valid.shape[1:], valid=valid)
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.isfinite() and gradient.isfinite().all()
    assert not gradient.movedim(1, -1)[~valid].any()


@pytest.mark.parametrize("size", [(0, 4, 4), (4, 0, 4)])
def test_nothing_to_compare(backend: str, size: tuple[int, ...]) -> None:
    logits = torch.randn(2, K, 2, 3, 3, requires_grad=True)
    found = ao.pixel_kl_divergence(logits, torch.randn(2, K, 2, 3, 3), size)
    (gradient,) = torch.autograd.grad(found, logits)
    assert found == 0 and not gradient.any()


def test_slabs_bound_the_memory(slab: int) -> None:
    """The maps of lse and divergences, and a slab: not the upsampled logits of the two."""
    logits = torch.randn(1, 14, 8, 24, 24, requires_grad=True)
    teacher, size = torch.randn(1, 14, 8, 24, 24), (64, 96, 96)

    def step() -> None:
        ao.pixel_kl_divergence(logits, teacher, size).backward()

    lse, of_slice = 4 * 64 * 96 * 96, 2 * 14 * 24 * 24
    in_slab = 4 * of_slice * min(64, max(1, slab // of_slice))
    assert peak_allocated_bytes(step) < 2.1 * lse + 3 * in_slab + 4 * logits.nbytes


def test_torch(slab: int) -> None:
    logits, teacher, valid = inputs(SIZES[1])
    options = (*valid.shape[1:], 2.0, False)
    operator = torch.ops.anchorops.volume_kl_divergence.cpu
    torch.library.opcheck(operator, (logits, teacher, valid, *options, True, True))

    def loss(logits: Tensor) -> Tensor:
        return ao.pixel_kl_divergence(logits, teacher, valid.shape[1:], valid=valid)

    compiled = torch.compile(loss, fullgraph=True)
    gradients = [torch.autograd.grad(f(logits), logits)[0] for f in (loss, compiled)]
    torch.testing.assert_close(*gradients)
    many = torch.stack([logits, logits.flip(2)]).detach()
    torch.testing.assert_close(torch.func.vmap(loss)(many), torch.stack([loss(x) for x in many]))


def test_messages() -> None:
    volume, image = torch.randn(1, K, 2, 3, 3), torch.randn(1, K, 3, 3)
    with pytest.raises(ValueError, match=r"teacher_logits: expected a tensor \(1, 3, d, h, w\)"):
        ao.pixel_kl_divergence(volume, image, (4, 4, 4))
    with pytest.raises(ValueError, match=r"size: expected \(D, H, W\), three ints"):
        ao.pixel_kl_divergence(volume, volume, (4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"size: expected \(H, W\), two ints"):
        ao.pixel_kl_divergence(image, image, (4, 4, 4))
    with pytest.raises(ValueError, match=r"valid: expected a bool tensor \(1, 4, 4, 4\)"):
        ao.pixel_kl_divergence(
            volume, volume, (4, 4, 4), valid=torch.ones(1, 4, 4, dtype=torch.bool)
        )

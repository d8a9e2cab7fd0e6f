"""pixel_kl_divergence of each backend, compared with F.interpolate, F.log_softmax and F.kl_div in
float64. `make proofs` runs the cases that take `backend` again, with Triton's kernels."""

from typing import Any, NamedTuple

import pytest
import torch
from cpu_kernels import in_layout, same_for_all_threads
from torch import Tensor

import anchorops as ao
from anchorops._ops import volumes
from anchorops.catalogue.budget import error_and_limit
from anchorops.catalogue.formulas import kl_divergence, upsampled

F32, F64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FLOOR = 2**-22
pytestmark = pytest.mark.on("reference", "cpu", "simulated_triton", "triton")


class Case(NamedTuple):
    size: tuple[int, ...]  # of volumes with a depth
    pixels: tuple[int, ...]
    teacher: tuple[int, ...] | None = None  # its pixels; None: those of the student
    align_corners: bool = False
    dtype: torch.dtype = F32
    teacher_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    temperature: float = 1.0
    masked: bool = True
    scale: float = 3.0

    @property
    def options(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "align_corners": self.align_corners}


CASES = [
    Case((2, 19, 4, 6), (16, 24)),  # ratio 4
    Case((2, 5, 4, 6), (16, 24), masked=False, temperature=4.0),
    Case((1, 5, 6, 9), (12, 18), temperature=0.5),  # 2
    Case((2, 3, 9, 8), (9, 8)),  # 1
    Case((1, 2, 9, 17), (9, 40)),  # 1 along the rows only
    Case((1, 7, 3, 5), (24, 45), masked=False),  # 8 and 9
    Case((2, 7, 7, 9), (16, 31)),  # no integers
    Case((2, 7, 7, 9), (16, 31), align_corners=True),
    Case((1, 4, 5, 5), (17, 17), align_corners=True),  # rows of weight 0
    Case((1, 3, 12, 13), (5, 7)),  # down
    Case((1, 3, 12, 40), (5, 6), align_corners=True),
    Case((1, 6, 1, 1), (5, 3), (2, 1)),
    Case((2, 5, 8, 6), (32, 24), (4, 12)),  # the teacher is smaller and larger
    Case((1, 5, 4, 6), (16, 24), (4, 9)),  # of the same height
    Case((1, 5, 5, 4), (20, 16), (20, 16), temperature=2.0),  # full resolution
    Case((1, 5, 20, 16), (20, 16), (5, 4)),  # the student at full resolution
    Case((1, 5, 7, 9), (13, 20), (5, 3), align_corners=True),
    Case((2, 6, 4, 6), (16, 24), dtype=BF16),
    Case((2, 6, 4, 6), (16, 24), (8, 8), dtype=FP16, teacher_dtype=F32, temperature=2.0),
    Case((2, 6, 4, 6), (16, 24), dtype=BF16, layout="channels_last"),
    Case((2, 5, 4, 6), (16, 24), layout="transposed"),
    Case((2, 5, 4, 6), (16, 24), (5, 5), layout="every other"),
    Case((1, 7, 4, 6), (16, 24), scale=40.0),  # steep: sums of powers would underflow
    Case((1, 7, 4, 6), (9, 13), (2, 3), scale=200.0, temperature=2.0),
    Case((2, 3, 6, 10), (6, 10), dtype=BF16, masked=False),  # lanes of four pixels
]
VOLUMES = [
    Case((2, 3, 4, 5, 6), (16, 20, 24)),
    Case((2, 3, 4, 5, 6), (9, 11, 13), (2, 3, 9), temperature=2.5),
    Case((2, 3, 4, 5, 6), (9, 11, 13), dtype=BF16, layout="channels_last", masked=False),
    Case((2, 3, 7, 5, 6), (3, 10, 9), (3, 10, 9), align_corners=True),  # full resolution
    Case((2, 3, 4, 5, 6), (4, 5, 6), (8, 5, 6)),  # the student at full resolution
    Case((2, 3, 1, 5, 6), (4, 10, 12), (4, 5, 6)),
]


class Inputs(NamedTuple):
    logits: Tensor
    teacher: Tensor
    valid: Tensor | None
    weights: Tensor  # of the divergences of the pixels


def make_inputs(case: Case) -> Inputs:
    teacher_size = (*case.size[:2], *(case.teacher or case.size[2:]))
    pixels_size = (case.size[0], *case.pixels)
    logits = (case.scale * torch.randn(case.size)).to(case.dtype)
    teacher = (case.scale * torch.randn(teacher_size)).to(case.teacher_dtype or case.dtype)
    valid = None
    if case.masked:
        valid = (torch.rand(pixels_size[::-1]) < 0.7).permute(*reversed(range(len(pixels_size))))
    logits, teacher = (in_layout(x, case.layout)[0] for x in (logits, teacher))
    return Inputs(logits, teacher, valid, torch.randn(pixels_size, dtype=F64))


def formula(case: Case, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """D of each pixel, and the gradient of Σ weights·D, by torch."""
    x = inputs.logits.detach().to(dtype, memory_format=torch.contiguous_format).requires_grad_()
    valid = torch.ones(inputs.weights.shape) > 0 if inputs.valid is None else inputs.valid
    divergences = kl_divergence(
        x, inputs.teacher.to(dtype), valid, reduction="none", **case.options
    )
    (gradient,) = torch.autograd.grad((divergences * inputs.weights.to(dtype)).sum(), x)
    return [divergences.detach().double(), gradient.double()]


def ours(case: Case, inputs: Inputs, reduction: str = "none") -> list[Tensor]:
    x = inputs.logits.detach().requires_grad_()
    actual = ao.pixel_kl_divergence(
        x, inputs.teacher, case.pixels, valid=inputs.valid, reduction=reduction, **case.options
    )
    weights = inputs.weights.to(actual.dtype) if reduction == "none" else torch.ones_like(actual)
    return [actual.detach(), *torch.autograd.grad(actual, x, weights)]


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor, floor: float, eps: float = 0.0):
    """floor: of the largest number, or of 1."""
    largest = float(exact.abs().max())
    error, limit = error_and_limit(actual, exact, plain, floor * max(largest, 1) / largest, eps)
    assert error <= limit


@pytest.mark.parametrize("case", CASES, ids=str)
def test_divergences_and_gradients(backend: str, case: Case) -> None:
    inputs = make_inputs(case)
    actual, gradient = ours(case, inputs)
    exact, plain = formula(case, inputs, F64), formula(case, inputs, F32)
    assert actual.dtype == F32 and actual.is_contiguous()
    assert gradient.dtype == case.dtype
    if backend != "reference":
        assert gradient.stride() == torch.empty_like(inputs.logits, device="meta").stride()
    largest = max(float(x.abs().max()) for x in inputs[:2]) / case.temperature
    floor = FLOOR * (1 + largest) * max(case.temperature, 1)
    assert_close(actual, exact[0], plain[0], floor * max(case.temperature, 1))
    eps = 0.0 if case.dtype == F32 else torch.finfo(case.dtype).eps / 2
    tiny = 2**-24 if case.dtype == FP16 else 0.0
    assert_close(gradient, exact[1], plain[1], floor + tiny, eps)


@pytest.mark.on("simulated_triton")
@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[8]], ids=str)
def test_lanes_of_one_pixel(backend: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from anchorops.kernels import upsampling

    monkeypatch.setattr(upsampling, "MOST_ROWS", 1)
    monkeypatch.setattr(upsampling, "MOST_COLUMNS", 1)
    test_divergences_and_gradients(backend, case)


@pytest.mark.on("reference", "cpu")
@pytest.mark.parametrize("slab", [2**22, 4 * 3 * 5 * 6])  # all volumes at once, or a few slices
@pytest.mark.parametrize("case", VOLUMES, ids=str)
def test_volumes(backend: str, case: Case, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "SLAB", slab)
    test_divergences_and_gradients(backend, case)


@pytest.mark.parametrize(
    "case", [CASES[0], CASES[3], CASES[8], CASES[9], CASES[12]], ids=lambda case: str(case.size)
)
def test_invalid_pixels_change_nothing(backend: str, case: Case) -> None:
    """Logits that only invalid pixels read; a pixel reads only logits of weight > 0."""
    inputs = make_inputs(case._replace(masked=False))
    values = torch.tensor([torch.nan, torch.inf, -torch.inf])  # of one row each
    for spoil_teacher in (False, True):
        x = (inputs.teacher if spoil_teacher else inputs.logits).clone()
        marked = torch.zeros_like(x[:1, :1]).index_fill_(3, torch.tensor(1), 1.0)
        read = upsampled(marked, case.pixels, case.align_corners)[0, 0] > 0
        valid = ~read.expand(case.size[0], -1, -1)
        expected = ours(case, inputs._replace(valid=valid))
        x[..., 1] = values[torch.arange(x.shape[2]) % 3]
        spoiled = inputs._replace(valid=valid, **{"teacher" if spoil_teacher else "logits": x})
        actual = ours(case, spoiled)
        assert valid.any() and not valid.all()
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert not actual[0][~valid].any()


def test_classes_of_probability_0(backend: str) -> None:
    """0 where the teacher has none; inf where only the student has none."""
    logits, teacher = torch.randn(2, 1, 5, 3, 4)
    expected = ao.pixel_kl_divergence(logits[:, :4], teacher[:, :4], (12, 16), reduction="none")
    teacher[:, 4] = -torch.inf
    logits.requires_grad_()
    actual = ao.pixel_kl_divergence(logits, teacher, (12, 16), reduction="none")
    (gradient,) = torch.autograd.grad(actual.sum(), logits)
    assert actual.isfinite().all() and gradient.isfinite().all() and (gradient[:, 4] > 0).all()
    masked = logits.detach().clone()
    masked[:, 4] = -torch.inf
    masked.requires_grad_()
    actual = ao.pixel_kl_divergence(masked, teacher, (12, 16), reduction="none")
    (gradient,) = torch.autograd.grad(actual.sum(), masked)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all() and not gradient[:, 4].any()
    teacher = torch.randn(1, 5, 3, 4)
    assert (ao.pixel_kl_divergence(masked, teacher, (12, 16), reduction="none") == torch.inf).all()


def test_nan_is_never_lost(backend: str) -> None:
    for place in ("logits", "teacher"):
        inputs = {"logits": torch.randn(2, 5, 3, 4), "teacher": torch.randn(2, 5, 3, 4)}
        inputs[place][0, 2, 1, 1] = torch.nan
        x = inputs["logits"].requires_grad_()
        actual = ao.pixel_kl_divergence(x, inputs["teacher"], (12, 16), reduction="none")
        (gradient,) = torch.autograd.grad(actual.sum(), x)
        assert actual[0].isnan().any() and gradient[0].isnan().any()
        assert actual[1].isfinite().all() and gradient[1].isfinite().all()


def test_equal_logits(backend: str) -> None:
    """Divergence and gradient are 0."""
    x = (5 * torch.randn(2, 7, 5, 6)).requires_grad_()
    actual = ao.pixel_kl_divergence(x, x, (20, 24), temperature=2.0, reduction="none")
    (gradient,) = torch.autograd.grad(actual.sum(), x)
    assert (actual >= 0).all() and actual.max() < 1e-5 and gradient.abs().max() < 1e-4


@pytest.mark.on("reference", "cpu")
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("spread", [100, 1000, 10_000])
def test_logits_that_spread_widely(backend: str, spread: int, near: bool) -> None:
    """Errors of the gradient, relative to its largest entry."""
    logits, teacher = (spread * (torch.rand(2, 5, 16, 16) - 0.5) for _ in range(2))
    if near:
        teacher = logits + torch.randn(logits.shape)
    gradients = []
    for x, on in ((logits, backend), (logits.double(), "reference")):
        x.requires_grad_()
        with ao.use_backend(on):
            loss = ao.pixel_kl_divergence(x, teacher.to(x.dtype), (64, 64))
        gradients.append(torch.autograd.grad(loss, x)[0].double())
    error = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
    limit = {100: (5e-7, 5e-6), 1000: (4e-6, 2e-4), 10_000: (3e-5, 5e-3)}[spread][near]
    assert error < (1e-7 if backend == "reference" else 2 * limit)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_compare(backend: str, reduction: str) -> None:
    """No pixel of the labels."""
    for size, pixels in (
        ((2, 5, 3, 4), (0, 16)),
        ((2, 3, 2, 3, 3), (0, 4, 4)),
        ((2, 3, 2, 3, 3), (4, 0, 4)),
    ):
        x = torch.randn(size, requires_grad=True)
        valid = torch.zeros(size[0], *pixels, dtype=torch.bool)
        options = {"valid": valid, "reduction": reduction}
        actual = ao.pixel_kl_divergence(x, torch.randn(size), pixels, **options)
        assert not actual.any() and actual.shape == (valid.shape if reduction == "none" else ())
        (gradient,) = torch.autograd.grad(actual.sum(), x)
        assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.on("cpu")
@pytest.mark.parametrize(
    "case",
    [
        Case((3, 19, 33, 40), (132, 160), (17, 40)),
        Case((1, 150, 40, 90), (160, 360), dtype=BF16),
        Case((2, 4, 1, 2000), (1, 4001), masked=False),
    ],
    ids=str,
)
def test_the_same_bits_for_any_number_of_threads(backend: str, case: Case) -> None:
    inputs = make_inputs(case)
    same_for_all_threads(lambda: [*ours(case, inputs), *ours(case, inputs, "sum")])


@pytest.mark.on("cpu")
@pytest.mark.parametrize("num_classes", [300, 65_536])
def test_many_classes(backend: str, num_classes: int) -> None:
    case = Case((1, num_classes, 2, 3), (8, 9), (2, 2))
    inputs = make_inputs(case)
    for value, exact in zip(ours(case, inputs), formula(case, inputs, F64), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)


LOGITS, VALID = torch.zeros(2, 5, 4, 6), torch.ones(2, 16, 24, dtype=torch.bool)
VOLUME = {"logits": LOGITS[:, :, None], "teacher_logits": LOGITS[:, :, None], "size": (4, 16, 24)}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"logits": None}, r"logits: expected a tensor .*, got None of type NoneType"),
    (
        {"logits": LOGITS[0]},
        r"logits: expected a tensor \(B, K, h, w\) or \(B, K, d, h, w\), got .*\(5, 4, 6\) on cpu",
    ),
    ({"logits": LOGITS[:, :1]}, r"logits: expected at least 2 classes .*torch.cat.*, got shape"),
    ({"logits": LOGITS.int()}, "logits: expected float32, .*, got torch.int32"),
    ({"logits": LOGITS[:, :, :0]}, "logits: expected at least one pixel per image, got shape"),
    ({"teacher_logits": None}, r"teacher_logits: expected a tensor \(2, 5, h, w\), .*, got None"),
    (
        {"teacher_logits": LOGITS[:1]},
        r"teacher_logits: expected a tensor \(2, 5, h, w\), as logits",
    ),
    (
        {"teacher_logits": LOGITS[:, :4]},
        r"teacher_logits: expected .*\(2, 5, h, w\).*\(2, 4, 4, 6\)",
    ),
    ({"teacher_logits": LOGITS.to_sparse()}, "teacher_logits: expected a strided tensor, got"),
    ({"teacher_logits": LOGITS.long()}, "teacher_logits: expected float32 or .*, got torch.int64"),
    (
        {"teacher_logits": LOGITS.double()},
        "teacher_logits: expected float32 or bfloat16 or float16, got torch.float64 with logits in",
    ),
    (
        {"logits": LOGITS.double()},
        "teacher_logits: expected float64, got torch.float32 with logits",
    ),
    ({"teacher_logits": LOGITS.to("meta")}, "teacher_logits: expected device cpu, as logits, got"),
    ({"teacher_logits": LOGITS[..., :0]}, "teacher_logits: expected at least one pixel per image"),
    ({"size": 16}, r"size: expected \(H, W\), two ints of at least 0, got 16 of type int"),
    ({"size": (16, -1)}, r"size: expected \(H, W\), two ints of at least 0, got \(16, -1\)"),
    (
        {"valid": VALID[:1]},
        r"valid: expected a bool tensor \(2, 16, 24\), or None, got .*\(1, 16, 24",
    ),
    ({"valid": VALID.int()}, r"valid: expected a bool tensor .*, got torch.int32 tensor"),
    ({"valid": [True]}, r"valid: expected a bool tensor .*, got \[True\] of type list"),
    ({"valid": VALID.to("meta")}, "valid: expected device cpu, as logits, got meta"),
    ({"temperature": 0.0}, "temperature: expected a finite float or int, above 0, got 0.0"),
    ({"temperature": "1"}, "temperature: expected a finite float or int, above 0, got '1'"),
    ({"temperature": 1e-40}, "temperature: expected a normal number of float32, .*, got 1e-40"),
    ({"align_corners": 1}, "align_corners: expected True or False, got 1 of type int"),
    ({"reduction": "batchmean"}, "reduction: expected 'mean' or 'sum' or 'none', got 'batchmean'"),
    (
        VOLUME | {"teacher_logits": LOGITS},
        r"teacher_logits: expected a tensor \(2, 5, d, h, w\)",
    ),
    (VOLUME | {"size": (16, 24)}, r"size: expected \(D, H, W\), three ints"),
    ({"size": (4, 16, 24)}, r"size: expected \(H, W\), two ints"),
    (VOLUME | {"valid": VALID}, r"valid: expected a bool tensor \(2, 4, 16, 24\)"),
]


@pytest.mark.on("cpu", "reference")
@pytest.mark.parametrize(("changed", "message"), WRONG, ids=lambda v: str(v)[:50])
def test_messages(backend: str, changed: dict[str, Any], message: str) -> None:
    arguments = {"logits": LOGITS, "teacher_logits": LOGITS, "size": (16, 24)} | changed
    with pytest.raises(ValueError, match=f"^pixel_kl_divergence: {message}"):
        ao.pixel_kl_divergence(**arguments)

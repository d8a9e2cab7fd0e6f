"""pixel_kl_divergence of each backend, compared with torch's functions in float64. `make proofs`
runs the cases that take `backend` again, with Triton's kernels."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import anchorops as ao
from anchorops._ops import volumes
from anchorops.doctor.catalogue import Case, Entry, Inputs, Sample, formulas
from anchorops.doctor.catalogue.budget import FLOOR
from anchorops.doctor.catalogue.pixels import Pixels
from tests.helpers.cpu_kernels import in_layout
from tests.helpers.operators import check, gradient_errors, gradient_of, results

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.on("reference", "cpu", "simulated_triton", "triton")
cpu = pytest.mark.on("cpu")


def ours(logits: Tensor, teacher: Tensor, valid: Tensor, *, masked: bool, **options: Any) -> Tensor:
    options = {"valid": valid if masked else None, "reduction": "none"} | options
    return ao.pixel_kl_divergence(logits, teacher, valid.shape[1:], **options)


def formula(
    logits: Tensor, teacher: Tensor, valid: Tensor, *, masked: bool, **options: Any
) -> Tensor:
    valid = valid if masked else torch.ones_like(valid)
    return formulas.kl_divergence(logits, teacher, valid, reduction="none", **options)


DIVERGENCE = Entry("divergences", ("pixel_kl_divergence",), ours, formula)


def make(
    pixels: Pixels, teacher_dtype: torch.dtype | None, layout: str, n: int, random: Generator
) -> Inputs:
    inputs = pixels(n, random)
    inputs["teacher"] = inputs["teacher"].to(teacher_dtype or pixels.dtype)
    valid = inputs["valid"]
    transposed = valid.permute(*reversed(range(valid.dim()))).contiguous()
    inputs["valid"] = transposed.permute(*reversed(range(valid.dim())))
    return inputs | {name: in_layout(inputs[name], layout)[0] for name in ("logits", "teacher")}


def divergences(
    size: tuple[int, ...],
    pixels: tuple[int, ...],
    teacher: tuple[int, ...] = (),
    align_corners: bool = False,
    dtype: torch.dtype = F32,
    *,
    teacher_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    temperature: float = 1.0,
    masked: bool = True,
    scale: float = 3.0,
) -> Case:
    """size: of the logits. pixels: of the divergences. teacher: of its logits, without batch and
    classes; (): that of the student's. scale: of the logits."""
    maker = Pixels(size[1], size[2:], pixels, align_corners, dtype=dtype, teacher=teacher)
    maker = maker._replace(batch=size[0], scale=scale)
    options = {"temperature": temperature, "align_corners": align_corners, "masked": masked}
    name = ", ".join(
        map(str, (size, pixels, teacher, dtype, teacher_dtype, layout, scale, options))
    )
    made = partial(make, maker, teacher_dtype, layout)
    return Case(DIVERGENCE, Sample(name, made, options, (), FLOOR * max(1.0, scale)))


CASES = [
    divergences((2, 19, 4, 6), (16, 24)),  # ratio 4
    divergences((2, 5, 4, 6), (16, 24), masked=False, temperature=4.0),
    divergences((1, 5, 6, 9), (12, 18), temperature=0.5),  # 2
    divergences((2, 3, 9, 8), (9, 8)),  # 1
    divergences((1, 2, 9, 17), (9, 40)),  # 1 along the rows only
    divergences((1, 7, 3, 5), (24, 45), masked=False),  # 8 and 9
    divergences((2, 7, 7, 9), (16, 31)),  # no integers
    divergences((2, 7, 7, 9), (16, 31), align_corners=True),
    divergences((1, 4, 5, 5), (17, 17), align_corners=True),  # rows of weight 0
    divergences((1, 3, 12, 13), (5, 7)),  # down
    divergences((1, 3, 12, 40), (5, 6), align_corners=True),
    divergences((1, 6, 1, 1), (5, 3), (2, 1)),
    divergences((2, 5, 8, 6), (32, 24), (4, 12)),  # the teacher is smaller and larger
    divergences((1, 5, 4, 6), (16, 24), (4, 9)),  # of the same height
    divergences((1, 5, 5, 4), (20, 16), (20, 16), temperature=2.0),  # full resolution
    divergences((1, 5, 20, 16), (20, 16), (5, 4)),  # the student at full resolution
    divergences((1, 5, 7, 9), (13, 20), (5, 3), align_corners=True),
    divergences((2, 6, 4, 6), (16, 24), dtype=BF16),
    divergences((2, 6, 4, 6), (16, 24), (8, 8), dtype=FP16, teacher_dtype=F32, temperature=2.0),
    divergences((2, 6, 4, 6), (16, 24), dtype=BF16, layout="channels_last"),
    divergences((2, 5, 4, 6), (16, 24), layout="transposed"),
    divergences((2, 5, 4, 6), (16, 24), (5, 5), layout="every other"),
    divergences((1, 7, 4, 6), (16, 24), scale=40.0),  # steep: sums of powers would underflow
    divergences((1, 7, 4, 6), (9, 13), (2, 3), scale=200.0, temperature=2.0),
    divergences((2, 3, 6, 10), (6, 10), dtype=BF16, masked=False),  # lanes of four pixels
]
VOLUMES = [
    divergences((2, 3, 4, 5, 6), (16, 20, 24)),
    divergences((2, 3, 4, 5, 6), (9, 11, 13), (2, 3, 9), temperature=2.5),
    divergences((2, 3, 4, 5, 6), (9, 11, 13), dtype=BF16, layout="channels_last", masked=False),
    divergences((2, 3, 7, 5, 6), (3, 10, 9), (3, 10, 9), align_corners=True),  # full resolution
    divergences((2, 3, 4, 5, 6), (4, 5, 6), (8, 5, 6)),  # the student at full resolution
    divergences((2, 3, 1, 5, 6), (4, 10, 12), (4, 5, 6)),
]


MANY_CLASSES = [divergences((1, n, 2, 3), (8, 9), (2, 2), scale=1.0) for n in (300, 65_536)]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=cpu) for case in MANY_CLASSES)], ids=str
)
def test_divergences_and_gradients(backend: str, case: Case) -> None:
    check(case, backend)


@pytest.mark.on("simulated_triton")
@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[8]], ids=str)
def test_lanes_of_one_pixel(backend: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOST_ROWS", "MOST_COLUMNS"):
        monkeypatch.setattr(f"anchorops.kernels.upsampling.{name}", 1)
    check(case, backend)


@pytest.mark.on("reference", "cpu")
@pytest.mark.parametrize("slab", [2**22, 4 * 3 * 5 * 6])  # all volumes at once, or a few slices
@pytest.mark.parametrize("case", VOLUMES, ids=str)
def test_volumes(backend: str, case: Case, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "SLAB", slab)
    check(case, backend)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[8], CASES[9], CASES[12]], ids=str)
def test_invalid_pixels_change_nothing(backend: str, case: Case) -> None:
    """The teacher's logits that only invalid pixels read; test_guarantees.py has the student's. A
    pixel reads only logits of weight > 0."""
    inputs = case.sample.inputs()
    x, valid = inputs["teacher"].clone(), inputs["valid"]
    marked = torch.zeros_like(x[:1, :1]).index_fill_(3, torch.tensor(1), 1.0)
    corners = case.sample.options["align_corners"]
    read = formulas.upsampled(marked, valid.shape[1:], corners)[0, 0] > 0
    inputs["valid"] = valid = ~read.expand_as(valid)
    expected = results(case.ours, inputs)
    values = torch.tensor([torch.nan, torch.inf, -torch.inf])  # of one row each
    x[..., 1] = values[torch.arange(x.shape[2]) % 3]
    actual = results(case.ours, inputs | {"teacher": x})
    assert valid.any() and not valid.all()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not actual[0][~valid].any()


def test_classes_of_probability_0(backend: str) -> None:
    """0 where the teacher has none; inf where only the student has none."""
    each = partial(ao.pixel_kl_divergence, size=(12, 16), reduction="none")
    logits, teacher = torch.randn(2, 1, 5, 3, 4)
    expected = each(logits[:, :4], teacher[:, :4])
    teacher[:, 4] = -torch.inf
    gradient = gradient_of(each, logits, teacher)
    assert each(logits, teacher).isfinite().all()
    assert gradient.isfinite().all() and (gradient[:, 4] > 0).all()
    masked = logits.clone()
    masked[:, 4] = -torch.inf
    gradient = gradient_of(each, masked, teacher)
    torch.testing.assert_close(each(masked, teacher), expected, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all() and not gradient[:, 4].any()
    assert (each(masked, torch.randn(1, 5, 3, 4)) == torch.inf).all()


def test_nan_is_never_lost(backend: str) -> None:
    for place in ("logits", "teacher"):
        inputs = {"logits": torch.randn(2, 5, 3, 4), "teacher": torch.randn(2, 5, 3, 4)}
        inputs[place][0, 2, 1, 1] = torch.nan
        each = partial(ao.pixel_kl_divergence, size=(12, 16), reduction="none")
        found = each(*inputs.values()), gradient_of(each, *inputs.values())
        assert all(x[0].isnan().any() and x[1].isfinite().all() for x in found)


def errors(student: Tensor, teacher: Tensor, size: tuple[int, ...], **options: Any) -> Any:
    """Of our gradient and of torch's."""
    valid = torch.ones(len(student), *size, dtype=torch.bool)
    return gradient_errors(
        lambda x: ao.pixel_kl_divergence(x, teacher, size, **options),
        lambda x: formulas.kl_divergence(x, teacher.to(x), valid, **options),
        student,
    )


@pytest.mark.on("reference", "cpu")
@pytest.mark.parametrize("temperature", [1.0, 1e-3, 50.0])
@pytest.mark.parametrize("size", [(64, 64), (24, 20), (16, 16)])
@pytest.mark.parametrize("spread", [1e2, 1e3, 1e4, 1e6, 1e10])
def test_logits_that_spread_widely(
    backend: str, spread: float, size: tuple[int, int], temperature: float
) -> None:
    logits, teacher = (spread * (torch.rand(2, 5, 16, 16) - 0.5) for _ in range(2))
    ours, plain = errors(logits, teacher, size, temperature=temperature)
    assert ours <= 2 * plain + FLOOR


@pytest.mark.on("reference", "cpu")
@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("spread", [1e2, 1e3, 1e4, 1e5])
def test_logits_that_spread_widely_near_the_teacher(backend: str, spread: float, stride: int):
    """A small difference of large numbers. Only pixels in which two classes are almost equal have
    an error: of few images, torch may have no bad one."""
    logits = spread * (torch.rand(256, 2, 16, 16) - 0.5)
    teacher = logits + torch.randn(logits.shape)
    ours, plain = errors(logits, teacher, (16 * stride, 16 * stride))
    assert ours <= 2 * plain + FLOOR


@pytest.mark.on("reference", "cpu")
@pytest.mark.parametrize("spread", [40, 60])
def test_gradients_of_all_classes_cancel(backend: str, spread: int):
    """Both passes round the exponents alike: a pixel's probabilities add up to 1."""
    logits = spread * (torch.rand(8, 2, 16, 16) - 0.5)
    teacher = logits + torch.randn(logits.shape)
    valid = torch.ones(8, 64, 64, dtype=torch.bool)
    plain = gradient_of(formulas.kl_divergence, logits, teacher, valid)
    ours = gradient_of(ao.pixel_kl_divergence, logits, teacher, (64, 64))
    limit = 2 * plain.sum(1).abs().max() + FLOOR / 4 * plain.abs().max()
    assert ours.sum(1).abs().max() <= limit


@pytest.mark.on("reference", "simulated_triton", "triton")
@pytest.mark.parametrize("stride", [1, 3, 4])
@pytest.mark.parametrize("spread", [1e4, 1e6, 1e10])
def test_gradients_of_logits_far_apart(spread: float, stride: int, backend: str) -> None:
    """Probabilities are 0 or 1, however large the logits of which exponents are differences."""
    size = 1, 3, 3, 4
    logits, teacher = spread * torch.randn(2, *size)
    ours, plain = errors(logits, teacher, (3 * stride, 4 * stride), reduction="none")
    assert ours <= 2 * plain + FLOOR


@pytest.mark.on("reference", "simulated_triton", "triton")
def test_a_class_far_from_zero(backend: str) -> None:
    """lse·log2(e) has a rounding error beyond the range of exponents."""
    logits, teacher = torch.randn(2, 1, 3, 3, 4)
    logits[:, 0] = teacher[:, 1] = 1e10
    ours, plain = errors(logits, teacher, (12, 16), reduction="none")
    assert ours <= 2 * plain + FLOOR


@pytest.mark.parametrize("scale", [3.0, 1e10])
@pytest.mark.parametrize("pixels", [(8, 12), (16, 24), (9, 13), (4, 6)])
def test_equal_logits(pixels: tuple[int, int], scale: float, backend: str) -> None:
    """Divergence and gradient are 0; on GPUs there is not even a rounding error, which Adam would
    scale up. z·log2(e) of large logits has a rounding error beyond the range of exponents."""
    x = scale * torch.randn(2, 5, 4, 6)
    each = partial(ao.pixel_kl_divergence, size=pixels, temperature=2.0, reduction="none")
    assert (each(x, x) >= 0).all() and each(x, x).max() < 1e-5
    largest = gradient_of(each, x, x).abs().max()
    assert largest < 1e-4 if backend in ("reference", "cpu") else largest == 0


@pytest.mark.parametrize("gradient", [math.inf, math.nan])
def test_gradients_that_are_not_finite(gradient: float, backend: str):
    """They stay in the image that has valid pixels."""
    student, teacher = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randn(2, 5, 4, 6)
    valid = torch.tensor([True, False])[:, None, None].expand(2, 16, 24)
    loss = ao.pixel_kl_divergence(student, teacher, (16, 24), valid=valid)
    loss.backward(torch.tensor(gradient))
    assert student.grad is not None and not student.grad[1].any()


@pytest.mark.parametrize("of_student", [None, -1e6, -1e9])
def test_terms_of_a_row_that_may_be_lost(of_student: float | None, backend: str):
    """The largest logits are those of class 0 in the upper row, and e^t of class 1 rises along the
    rows: computed from its first pixel, it would be lost in the lower row."""
    teacher = torch.zeros(1, 2, 2, 2)
    teacher[0, 0, 1], teacher[0, 1] = -62, torch.tensor([-95.0, -40])
    student = teacher.flip(1)
    if of_student is not None:
        teacher[0, 0, 1], teacher[0, 1] = -22, torch.tensor([-95.0, -39.7])
        student = teacher.clone()
        student[0, 1] = of_student
    values = ao.pixel_kl_divergence(student, teacher, (8, 8), reduction="none").double()
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    exact = formulas.kl_divergence(student.double(), teacher.double(), valid, reduction="none")
    torch.testing.assert_close(values, exact, rtol=1e-5, atol=5e-5)

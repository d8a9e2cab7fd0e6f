"""Softmax moments on the CPU and of the reference, compared with torch's upsampling and softmax."""

import pytest
import torch
import torch.nn.functional as F
from cpu_kernels import passes_with, same_for_all_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from softmax_formulas import (
    BF16,
    EVERYTHING,
    F16,
    F32,
    F64,
    Case,
    check,
    fused,
    make_labels,
    make_logits,
    unfused,
    weights_of,
)
from torch import Tensor

import anchorops as ao

CASES = [
    Case((5, 6), (20, 24), 7),
    Case((5, 6), (20, 24), 7, F64),
    Case((5, 6), (17, 25), 7, F64, True, per_image=True),
    Case((1, 1), (4, 3), 7, F64),
    Case((9, 8), (3, 5), 7, F64),
    Case((20, 33), (80, 132), 19, F32, labels="coherent"),
    Case((20, 33), (80, 132), 19, F32, True, labels="coherent"),
    Case((18, 16), (72, 64), 150, BF16),
    Case((7, 17), (56, 136), 21, F16, labels="coherent"),
    Case((17, 17), (129, 129), 21, F32, True),
    Case((17, 17), (129, 129), 21, F32),
    Case((33, 33), (129, 129), 3, F32, True, labels="coherent"),
    Case((33, 33), (129, 129), 3, BF16),
    Case((13, 10), (31, 29), 5),
    Case((13, 10), (31, 29), 5, F32, True),
    Case((6, 40), (90, 121), 4),
    Case((6, 5), (200, 165), 4, F32, True),
    Case((6, 5), (96, 80), 4, F16),
    Case((9, 20), (13, 27), 6),
    Case((9, 20), (9, 20), 6, F32, True),
    Case((9, 20), (9, 50), 6, BF16),
    Case((21, 30), (8, 11), 6, F32),
    Case((21, 30), (8, 11), 6, F32, True),
    Case((3, 4), (1, 1), 6, F32, True),
    Case((1, 1), (4, 3), 2),
    Case((1, 40), (1, 160), 2),
    Case((4, 6), (16, 24), 1200, F32, scale=1.0),
    Case((1, 60), (4, 240), 1200, BF16, scale=1.0),
    Case((3, 5), (12, 20), 5000, scale=1.0, per_image=True),
    Case((9, 12), (36, 48), 19, F32, layout="channels_last"),
    Case((9, 18), (36, 72), 19, BF16, layout="channels_last", labels="coherent"),
    Case((9, 12), (36, 48), 5, F16, layout="every other"),
    Case((9, 12), (36, 48), 5, F32, layout="cropped"),
    Case((9, 12), (36, 48), 20, BF16, layout="channels_last cropped"),
    Case((9, 12), (36, 48), 5, F64, layout="transposed"),
    Case((9, 12), (36, 48), 5, F32, layout="expanded batch"),
    Case((9, 12), (36, 48), 150, labels="one class"),
    Case((9, 12), (36, 48), 150, labels="ignored"),
    Case((20, 9), (80, 36), 8, scale=80.0),
    Case((20, 9), (80, 36), 8, scale=1e4, labels="coherent"),
    Case((70, 9), (280, 36), 3, batch=1, per_image=True),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, backend: str, poisoned: None):
    (logits, buffer), labels = make_logits(case), make_labels(case)
    before = buffer.clone()
    check(case, logits, labels, backend)
    torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)


STEEP = [
    Case((9, 20), (18, 40), 19),
    Case((9, 20), (36, 80), 19, labels="coherent"),
    Case((9, 20), (36, 80), 150, F32, True),
    Case((9, 17), (72, 129), 21),
    Case((9, 17), (65, 131), 2, F32, True),
    Case((9, 20), (9, 20), 19),
]


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("case", STEEP, ids=str)
def test_steep_logits(case: Case, scale: float):
    """Neighbours that differ by up to twice the scale, and many pixels with equal logits: errors
    are those of torch's formula, however large the logits."""
    labels = make_labels(case)
    size = (case.batch, case.num_classes, *case.size)
    for logits in (torch.randn(size), torch.randint(0, 2, size) * 2.0 - 1):
        results = []
        for function, dtype in ((fused, F32), (unfused, F64), (unfused, F32)):
            x = (logits * scale).to(dtype).requires_grad_()
            arguments = (case, x, labels) if function is fused else (case, x, labels, dtype)
            losses = function(*arguments)[0]
            assert losses is not None
            results.append((losses, torch.autograd.grad(losses.sum(), x)[0]))
        for ours, exact, plain in zip(*results, strict=True):
            error, of_torch = (ours - exact).abs().max(), (plain - exact).abs().max()
            assert error <= 2 * of_torch + 16 * torch.finfo(F32).eps * exact.abs().max()


@pytest.mark.parametrize(("num_classes", "allowed"), [(2, 5.0), (4, 3.0)])
def test_rounding_errors_of_many_factors(num_classes: int, allowed: float):
    """In cells of 8 × 8 labels, where all cells have the same slopes, so that their errors do not
    cancel: allowed times torch's."""
    case = Case((9, 17), (72, 136), num_classes)
    labels = make_labels(case)
    logits = torch.randn(2, num_classes, 9, 17) * 0.1 + torch.arange(9)[:, None] / 10
    gradients = []
    for function, dtype in ((fused, F32), (unfused, F64), (unfused, F32)):
        x = logits.to(dtype).requires_grad_()
        arguments = (case, x, labels) if function is fused else (case, x, labels, dtype)
        losses = function(*arguments)[0]
        assert losses is not None
        gradients.append(torch.autograd.grad(losses.sum(), x)[0].double())
    ours, exact, plain = gradients
    error, of_torch = ((x - exact).square().mean().sqrt() for x in (ours, plain))
    assert error <= allowed * of_torch


def even_logits(kind: str, case: Case) -> Tensor:
    """The same logits everywhere, different for each class; or slow waves."""
    of_classes = torch.arange(case.num_classes)[:, None, None] * 0.3
    rows, columns = (torch.linspace(0, 1, n) for n in case.size)
    waves = (1 + 10 * of_classes + 2 * rows[:, None] + columns).sin()
    values = of_classes.expand(waves.shape) if kind == "uniform" else waves
    return values.expand(case.batch, *waves.shape).contiguous()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["uniform", "smooth"])
@pytest.mark.parametrize(
    "case",
    [
        Case((16, 32), (512, 2048), 4, batch=1),
        Case((2, 16), (16, 65_536), 2, batch=1),
        Case((32, 64), (128, 512), 19, batch=1),
        Case((64, 64), (256, 256), 50, per_image=True),
        Case((150, 300), (150, 300), 4, batch=1),
        Case((1, 100_000), (1, 100_000), 3, batch=1),
        Case((200, 150), (131, 120), 3),
    ],
    ids=str,
)
def test_rounding_errors_of_even_regions(case: Case, kind: str, backend: str):
    """Where many pixels have the same probability, the rounding errors of a long sum do not cancel:
    at most twice those of masked sums, plus two roundings."""
    logits, labels = even_logits(kind, case), make_labels(case)
    labels[..., : case.label_size[1] // 2] = 1
    own = labels[:, None] == torch.arange(case.num_classes)[:, None, None]
    valid = own.any(1, keepdim=True)
    axes = (2, 3) if case.per_image else (0, 2, 3)

    def masked_sums(dtype: torch.dtype) -> list[Tensor]:
        z = F.interpolate(logits.to(dtype), case.label_size, mode="bilinear")
        log_p = z.log_softmax(1)
        p = torch.where(valid, log_p.exp(), 0)
        of_terms = [torch.where(own, -log_p, 0), torch.where(own, p, 0), p, p.square()]
        return [terms.sum(axes) for terms in of_terms]

    with ao.use_backend(backend):
        ours = fused(case, logits, labels)[:4]
    for found, right, plain in zip(ours, masked_sums(F64), masked_sums(F32), strict=True):
        assert found is not None
        largest = right.abs().max()
        allowed = 2 * (plain - right).abs().max() + 2 * torch.finfo(F32).eps * largest
        error = (found - right).abs().max()
        assert error <= allowed, f"{error / largest:.2g} of the largest, {allowed / largest:.2g}"


@pytest.mark.parametrize("scale", [10.0, 20.0])
@pytest.mark.parametrize("case", STEEP, ids=str)
def test_losses_are_never_negative(case: Case, scale: float):
    """Where the label has almost all of the probability, rounding could make them so."""
    logits = scale * torch.randn(case.batch, case.num_classes, *case.size)
    labels = ao.pixel_argmax(logits, case.label_size, align_corners=case.align_corners)
    losses = fused(case, logits, labels)[4]
    assert losses is not None and (losses >= 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("asked", [{}, {"masses": False, "hits": False}, {"squares": True}])
def test_what_is_not_asked_for_changes_nothing(asked: dict[str, bool], backend: str):
    case = Case((9, 12), (36, 48), 19)
    logits, labels = make_logits(case)[0], make_labels(case)
    with ao.use_backend(backend):
        everything = ao.ops.softmax_moments(logits, labels, **EVERYTHING)
        found = ao.ops.softmax_moments(logits, labels, **asked)
    for name, value in found._asdict().items():
        default = name in ("hits", "masses", "overlaps", "counts", "losses")
        flag = {"overlaps": "masses"}.get(name, name)
        assert (value is not None) == asked.get(flag, default)
        if value is not None:
            torch.testing.assert_close(value, getattr(everything, name), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_lesser_instruction_sets(instructions: str):
    """The same in a process that uses a lower instruction set than this processor has."""
    tests = "cpu and (values_and_gradients or not_finite or even_regions) or threads"
    passes_with(instructions, __file__, tests)


def outputs_and_gradient(case: Case, logits: Tensor, labels: Tensor, weights: list[Tensor]):
    logits = logits.detach().requires_grad_()
    outputs = fused(case, logits, labels)
    gradient = torch.autograd.grad(outputs[:6], logits, weights)  # pyright: ignore
    return [*(x.detach() for x in outputs), *gradient]


NOT_FINITE = [
    Case((9, 20), (36, 80), 7, labels="coherent"),
    Case((9, 20), (36, 80), 7, BF16, True, layout="channels_last"),
    Case((9, 20), (31, 67), 7, F32, True),
    Case((9, 20), (72, 160), 3, F16),
    Case((9, 20), (9, 20), 7, F32),
    Case((9, 20), (5, 11), 7, F64),
    Case((5, 6), (20, 24), 2),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", NOT_FINITE, ids=str)
def test_not_finite_ignored_pixels_change_nothing(case: Case, backend: str):
    logits, labels, weights = make_logits(case)[0], make_labels(case), weights_of(case)
    labels[:, : case.label_size[0] * 2 // 3] = 255  # no pixel reads the upper rows
    with ao.use_backend(backend):
        clean = outputs_and_gradient(case, logits, labels, weights)
        for value in (torch.nan, torch.inf, -torch.inf):
            logits[:, :, : case.size[0] // 2] = value
            for ours, expected in zip(
                outputs_and_gradient(case, logits, labels, weights), clean, strict=True
            ):
                assert torch.equal(ours, expected)
    assert not clean[-1][:, :, : case.size[0] // 2].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", NOT_FINITE, ids=str)
def test_not_finite_logits_are_as_in_the_reference(case: Case, value: float):
    """One logit, all classes of a position, and a whole class."""
    logits, labels, weights = make_logits(case)[0], make_labels(case), weights_of(case)
    logits[0, 0, 2, 3] = logits[1, :, 4, 4] = value
    if case.num_classes > 2:
        logits[1, 2] = value
    results = []
    for backend in ("cpu", "reference"):
        with ao.use_backend(backend):
            results.append(outputs_and_gradient(case, logits, labels, weights))
    for ours, expected in zip(*results, strict=True):
        rtol = 1e-2 if expected.dtype in (BF16, F16) else 1e-5
        atol = rtol * float(torch.where(expected.isfinite(), expected, 0).abs().max())
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_class_of_minus_infinity_is_no_class(backend: str):
    case = Case((9, 20), (36, 80), 6)
    logits, labels, weights = make_logits(case)[0], make_labels(case), weights_of(case)
    labels[labels == 3] = 255
    logits[:, 3] = -torch.inf
    kept = torch.tensor([0, 1, 2, 4, 5])
    fewer = Case((9, 20), (36, 80), 5)
    with ao.use_backend(backend):
        ours = outputs_and_gradient(case, logits, labels, weights)
        others = outputs_and_gradient(
            fewer,
            logits[:, kept],
            torch.where(
                (labels > 3) & (labels < 6), labels - 1, torch.where(labels > 5, 5, labels)
            ),
            [w[kept] if w.dim() == 1 else w for w in weights],
        )
    for found, expected in zip(ours, others, strict=True):
        if found.dim() == 3:
            torch.testing.assert_close(found, expected)
            continue
        axis = 0 if found.dim() == 1 else 1
        torch.testing.assert_close(found.index_select(axis, kept), expected)
        assert not found.select(axis, 3).any()


def test_threads_and_repetition_do_not_matter():
    for case in (
        Case((40, 33), (160, 132), 19, labels="coherent", batch=1),
        Case((40, 33), (129, 129), 5, BF16, True, layout="channels_last"),
        Case((18, 70), (72, 280), 1200, F16, batch=1, per_image=True),
        Case((1, 9000), (1, 9000), 40),
    ):
        arguments = case, make_logits(case)[0], make_labels(case), weights_of(case)
        same_for_all_threads(lambda arguments=arguments: outputs_and_gradient(*arguments))


def test_offsets_are_64_bit():
    """Strides of 2^30 elements and more; few pages of the 4 GB buffer are touched."""
    buffer = torch.empty(2**31 + 2**11, dtype=F16)
    for size, stride in (
        ((3, 2, 3, 20), (2**30, 60, 20, 1)),
        ((1, 3, 2, 17), (0, 2**30, 17, 1)),
        ((1, 17, 3, 16), (0, 16, 2**30, 1)),
        ((1, 17, 2, 3), (0, 1, 17, 2**30)),
    ):
        case = Case(size[2:], (4 * size[2], 4 * size[3]), size[1], F16, batch=size[0])
        view, labels, weights = buffer.as_strided(size, stride), make_labels(case), weights_of(case)
        view.copy_(torch.randn(size))
        ours = outputs_and_gradient(case, view, labels, weights)
        copied = outputs_and_gradient(case, view.contiguous(), labels, weights)
        assert all(torch.equal(a, b) for a, b in zip(ours, copied, strict=True))
    labels = torch.empty(2**31 + 2**11, dtype=torch.uint8).as_strided((2, 8, 2), (2, 2, 2**31))
    case = Case((2, 2), (8, 2), 3)
    labels.copy_(torch.randint(0, 3, labels.shape))
    arguments = make_logits(case)[0], labels, weights_of(case)
    copied = (arguments[0], labels.contiguous(), arguments[2])
    for a, b in zip(
        outputs_and_gradient(case, *arguments), outputs_and_gradient(case, *copied), strict=True
    ):
        assert torch.equal(a, b)


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    sides = draw(st.lists(st.integers(1, 37), min_size=2, max_size=2))
    up = draw(st.sampled_from([None, 2, 3, 4, 6, 8]))
    labels = [up * n for n in sides] if up else draw(st.lists(st.integers(1, 90), min_size=2))[:2]
    return Case(
        (sides[0], sides[1]),
        (labels[0], labels[1]),
        draw(st.sampled_from([2, 3, 5, 33])),
        draw(st.sampled_from([F32, BF16, F16, F64])),
        draw(st.booleans()),
        draw(st.sampled_from(["contiguous", "channels_last", "cropped", "every other"])),
        draw(st.sampled_from(["random", "coherent", "one class"])),
        draw(st.sampled_from([1.0, 10.0])),
        draw(st.booleans()),
        draw(st.integers(1, 3)),
    )


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(drawn_cases())
def test_any_shape(case: Case):
    torch.manual_seed(0)
    check(case, make_logits(case)[0], make_labels(case), "cpu")

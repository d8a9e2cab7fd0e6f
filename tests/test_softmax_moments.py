"""Values and gradients of softmax moments on every backend, with all options."""

import math
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import anchorops as ao
from anchorops.doctor.catalogue import Case, Inputs, Sample, formulas
from anchorops.doctor.catalogue.budget import FLOOR, error_and_limit
from tests.helpers.operators import check, gradient_errors, gradient_of, results
from tests.helpers.softmax_cases import (
    ALL,
    BF16,
    CE,
    F16,
    F32,
    F64,
    MOMENTS,
    moments,
    run,
    run_reference,
)
from tests.helpers.softmax_cases import ours as statistics_of

cpu = pytest.mark.on("cpu")
on_cpu = pytest.mark.on("cpu", "reference")
on_gpu = pytest.mark.on("triton")

CASES = [
    # ×4: one cell, several tiles of cells, many classes
    moments((1, 3, 1, 1), (4, 4)),
    moments((2, 19, 3, 5), (12, 20)),
    moments((2, 2, 3, 37), (12, 148), statistics=("probability_sums",), per_image=True),
    moments((1, 7, 9, 2), (36, 8), BF16, layout="channels_last", label_dtype=torch.uint8),
    moments((1, 150, 1, 3), (4, 12), BF16, statistics=CE),
    moments((1, 37, 2, 3), (8, 12), F16, layout="every other", statistics=("probability_sums",)),
    # ×8
    moments((1, 8, 3, 4), (24, 32), layout="channels_last", statistics=CE),
    moments((2, 5, 2, 3), (16, 24), BF16, layout="cropped", label_dtype=torch.int16),
    # ×2 and ×3, and another ratio along each axis
    moments((1, 7, 4, 5), (8, 10), statistics=("correct", "probability_sums")),
    moments((1, 4, 3, 9), (9, 9)),
    moments((1, 4, 9, 3), (3, 24), label_dtype=torch.uint16),
    # odd ratios, both ways to place the corners
    moments((1, 5, 9, 9), (33, 33)),
    moments((1, 5, 9, 9), (33, 33), F32, True),
    moments((2, 6, 4, 6), (17, 25), BF16, True, label_dtype=torch.int8),
    moments((1, 9, 4, 5), (16, 20), F32, True, layout="channels_last", statistics=CE),
    moments((1, 3, 5, 4), (7, 9), F16, layout="channels_last", statistics=("squares",)),
    # the same size, down, one logit, one label
    moments((2, 6, 7, 5), (7, 5), BF16, layout="channels_last"),
    moments((1, 2, 4, 3), (4, 3)),
    moments((2, 5, 6, 10), (6, 10), F16, per_image=True),  # lanes of four pixels; also the next one
    moments((1, 3, 8, 40), (8, 40), BF16),
    moments((2, 5, 4, 12), (4, 12), layout="cropped"),
    moments((2, 2, 3, 2), (12, 8), per_image=True),
    moments((1, 7, 9, 8), (3, 5)),
    moments((1, 7, 9, 8), (4, 2), F32, True, statistics=("probability_sums",)),
    moments((2, 3, 1, 1), (5, 3), F32, True),
    # cells of many pixels, which a program of the gradient takes in blocks
    moments((1, 3, 2, 1), (80, 3)),
    moments((1, 2, 1, 2), (5, 37), BF16, layout="channels_last", statistics=CE),
    moments((2, 4, 3, 5), (1, 1), F32, True),
    # points and volumes
    moments((70, 37), (), layout="every other", label_dtype=torch.int32),
    moments((150, 19), (), BF16, statistics=CE),
    moments((600, 5), ()),
    moments((2, 3, 300), (300,), per_image=True),
    moments((1, 3, 1, 90), (1, 810), statistics=("correct", "probability_sums")),
    # one row of pixels in geometric sequences: the shifts of one row, of several small images
    moments((2, 5, 1, 40), (1, 160), F32, True),
    moments((20, 3, 1, 1), (1, 4), F32, True),
    moments((3, 5, 40), (40,), per_image=True, label_dtype=torch.uint32),
    moments((2, 4, 3, 2, 5), (3, 2, 5), label_dtype=torch.uint64),
    # neighbours that differ by up to 80, and by up to 1e4
    *(
        moments((1, 5, 4, 6), pixels, scale=scale)
        for pixels in ((16, 24), (33, 48), (7, 9))
        for scale in (81.0, 9e3)
    ),
    moments((5, 300), (), statistics=CE),
    # negative labels, which as unsigned numbers would be classes
    moments((1, 300, 2, 1), (8, 4), label_dtype=torch.int8),
]
CASES_OF_CPU = [  # beside those of test_any_shape
    moments((2, 5, 3, 15), (12, 60)),  # as many cells as the lanes of a vector, in a row
    # a tile of logits that no label reads
    moments((1, 2, 3, 12_400), (2, 1), statistics=("probability_sums",)),
    moments((2, 7, 5, 6), (17, 25), F64, True, per_image=True),
    moments((2, 19, 20, 33), (80, 132), coherent=True),
    moments((2, 150, 18, 16), (72, 64), BF16),
    moments((2, 21, 7, 17), (56, 136), F16, coherent=True),
    moments((2, 3, 33, 33), (129, 129), F32, True, coherent=True),
    moments((2, 4, 6, 5), (200, 165), F32, True),
    moments((2, 1200, 1, 60), (4, 240), BF16, scale=1.0),
    moments((2, 5000, 3, 5), (12, 20), scale=1.0, per_image=True),
    moments((2, 19, 9, 18), (36, 72), BF16, layout="channels_last", coherent=True),
    moments((2, 20, 9, 12), (36, 48), BF16, layout="channels_last cropped"),
    moments((2, 5, 9, 12), (36, 48), F64, layout="transposed"),
    moments((2, 5, 9, 12), (36, 48), F32, layout="expanded batch"),
    moments((2, 8, 20, 9), (80, 36), scale=80.0),
    moments((2, 8, 20, 9), (80, 36), scale=1e4, coherent=True),
]
GPUS = {"floor": 2e-5}
CASES_OF_GPUS = [
    moments((2, 150, 32, 32), (128, 128), BF16, **GPUS),
    moments((2, 19, 32, 64), (128, 256), layout="channels_last", **GPUS),
    moments((2, 21, 17, 17), (129, 129), F16, True, **GPUS),
    moments((1, 1200, 9, 11), (40, 31), **GPUS),
    moments((2, 7, 30, 40), (9, 13), BF16, **GPUS),
    moments((2, 4, 1, 4000), (1, 4000), **GPUS),
    # 65 pixels for each logit
    moments((2, 5, 3, 2), (200, 129), F16, layout="channels_last", **GPUS),
    moments((1, 16_384, 4, 4), (16, 16), BF16, **GPUS),
]


SHAPES: list[dict[str, Any]] = [
    {"statistics": CE, "weights_by": "class"},
    {"statistics": CE, "focal_gamma": 2.0},
    {"statistics": CE, "focal_gamma": 0.5},
    {"statistics": CE, "focal_gamma": 1.7},
    {"statistics": CE, "min_loss": 0.8},
    {"weights_by": "class", "focal_gamma": 3.0, "min_loss": 0.5},
    {"statistics": ("probability_sums",), "weights_by": "image and class", "per_image": True},
    {"statistics": CE, "pixel_weights": True},
    {"weights_by": "class", "focal_gamma": 3.0, "min_loss": 0.5, "pixel_weights": True},
]
SHAPED = [
    # label smoothing, focal factor, smallest loss: each alone, two, and all of them
    moments((2, 19, 3, 5), (12, 20), weights_by="class"),
    moments((1, 2, 4, 3), (4, 3), **SHAPES[0]),
    moments((1, 6, 4, 5), (8, 10), **SHAPES[1]),
    moments((1, 4, 5, 4), (7, 9), F16, True, statistics=("probability_sums",), focal_gamma=0.5),
    moments((2, 5, 3, 4), (12, 16), min_loss=1.0, per_image=True),
    moments((70, 37), (), layout="every other", statistics=CE, weights_by="class", min_loss=3.0),
    moments((3, 4, 3, 4), (9, 7), F32, True, weights_by="class", focal_gamma=1.5),
    moments((2, 150, 2, 3), (4, 6), BF16, layout="channels_last", **SHAPES[5]),
    moments((2, 3, 2, 1), (40, 3), weights_by="image and class", focal_gamma=2.0),
    # the factor of losses near 0 and far above
    moments((1, 5, 4, 6), (16, 24), scale=27.0, weights_by="class", focal_gamma=1.2),
    moments((2, 5, 3, 4), (12, 16), per_image=True, pixel_weights=True),
    moments((30, 4), (), statistics=CE, pixel_weights=True, min_loss=1.0),
    moments((2, 3, 3, 4), (7, 9), weights_by="class", min_loss=1.0, pixel_weights=True),
    # no pixel is used
    moments((2, 4, 5, 5), (10, 10), statistics=CE, min_loss=1e9, focal_gamma=1.0),
]
GRADIENTS_OF_SOME = [
    moments((1, 6, 3, 4), *sizes, through=through)
    for sizes in (((12, 16),), ((8, 9), BF16, True))
    for through in (
        ("losses",),
        ("probability_sums",),
        ("intersections", "pixel_losses"),
        ("squares",),
    )
]
SHAPED_OF_CPU = [
    moments(*sizes, scale=2.0, **shape)
    for shape in SHAPES
    for sizes in (
        ((3, 19, 9, 17), (36, 68)),
        ((3, 2, 31, 40), (31, 40)),
        ((3, 150, 6, 5), (13, 9), BF16, True, "channels_last"),
        ((3, 5, 7, 9), (20, 33), F64),
        ((3, 19, 13, 21), (13, 21), BF16, True, "channels_last"),
        ((3, 1, 8, 12), (32, 48)),
        ((3, 1, 33, 70), (33, 70), BF16),
    )
]
# Runs of one class, and cells that are processed pixel by pixel.
STEEP_AND_SHAPED = [
    moments(*sizes, coherent=True, scale=scale, statistics=("pixel_losses",), **shape)
    for scale in (1.0, 30.0, 1e3)
    for sizes in (
        ((2, 2, 9, 20), (36, 80)),
        ((2, 150, 6, 9), (24, 36), F16),
        ((1, 19, 9, 20), (144, 320)),
        ((2, 1, 9, 20), (72, 160)),
        ((2, 1, 9, 70), (9, 70), F16),
        ((2, 7, 9, 70), (9, 70)),
    )
    for shape in (
        {"weights_by": "class"},
        {"weights_by": "class", "focal_gamma": 2.0},
        {"focal_gamma": 1.5},
        {"focal_gamma": 1.5, "pixel_weights": True},
    )
]


EVERY_STATISTIC = [  # Triton would compile each one
    moments((2, 7, 3, 5), (12, 20), statistics=statistics)
    for n in range(5)
    for statistics in combinations(ALL, n)
]


def marked(cases: list[Case], mark: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(case, marks=mark) for case in cases]


@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        *SHAPED,
        *GRADIENTS_OF_SOME,
        *marked(CASES_OF_CPU + SHAPED_OF_CPU + EVERY_STATISTIC, on_cpu),
        *marked(STEEP_AND_SHAPED, cpu),
        *marked(CASES_OF_GPUS, on_gpu),
    ],
    ids=str,
)
def test_values_and_gradients(case: Case, backend: str, poisoned: None):
    check(case, backend)


BLOCKS: dict[str, dict[str, int]] = {  # constants of anchorops.kernels
    # cells have more parts, and for the gradient some have several blocks of them
    "lanes_of_one_pixel": {"upsampling.MOST_ROWS": 1, "upsampling.MOST_COLUMNS": 1},
    # as with many classes and pixels, for which partials of each tile would need too much memory
    "several_tiles_of_a_program": {"softmax_moments.PARTIALS_IN_CACHE": 0},
}
OF_BLOCKS = {
    "lanes_of_one_pixel": [
        moments((1, 3, 2, 3), (8, 12)),
        moments((1, 3, 2, 2), (24, 18)),
        moments((1, 3, 3, 2), (6, 16), dtype=BF16),
        moments((1, 3, 2, 3), (7, 13), F32, True, statistics=("probability_sums",)),
        moments((1, 3, 2, 3), (8, 12), weights_by="class", focal_gamma=2.0, min_loss=0.5),
    ],
    "several_tiles_of_a_program": [
        moments((2, 2, 3, 37), (12, 148), statistics=("probability_sums",), per_image=True),
        moments((1, 5, 9, 9), (33, 33), F32, True),
        moments((2, 5, 13, 10), (31, 29), pixel_weights=True),
        moments((2, 5, 4, 12), (4, 12), layout="cropped", min_loss=0.5),
    ],
}


@pytest.mark.on("simulated_triton")
@pytest.mark.parametrize(
    ("blocks", "case"), [(name, case) for name in BLOCKS for case in OF_BLOCKS[name]], ids=str
)
def test_blocks(blocks: str, case: Case, backend: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in BLOCKS[blocks].items():
        monkeypatch.setattr(f"anchorops.kernels.{name}", value)
    check(case, backend)


@cpu
def test_equal_gradients_of_two_probability_sums_cancel_out(backend: str):
    """The sum of probability_sums is the number of pixels."""
    logits, labels = torch.randn(1, 2, 4, 6), torch.randint(0, 2, (1, 12, 12))

    def gradient(weight: float) -> Tensor:
        x = logits.clone().requires_grad_()
        moments = ao.ops.softmax_moments(x, labels)
        assert moments.intersections is not None and moments.probability_sums is not None
        intersections = moments.intersections * torch.tensor([0.3, 0.7])
        return torch.autograd.grad(
            intersections.sum() + weight * moments.probability_sums.sum(), x
        )[0]

    torch.testing.assert_close(gradient(1e7), gradient(0.0))


STEEP = [
    moments(*sizes, coherent=coherent, statistics=CE)
    for *sizes, coherent in (
        ((2, 19, 9, 20), (18, 40), F32, False, False),
        ((2, 19, 9, 20), (36, 80), F32, False, True),
        ((2, 150, 9, 20), (36, 80), F32, True, False),
        ((2, 21, 9, 17), (72, 129), F32, False, False),
        ((2, 2, 9, 17), (65, 131), F32, True, False),
        ((2, 19, 9, 20), (9, 20), F32, False, False),
    )
]


def three_runs(case: Case, logits: Tensor) -> list[list[Tensor]]:
    """Ours, the formula in float64, and that in float32."""
    inputs = case.sample.inputs() | {"logits": logits}
    wide = inputs | {"logits": logits.double()}
    return [
        results(call, x)
        for call, x in ((case.ours, inputs), (case.formula, wide), (case.formula, inputs))
    ]


@cpu
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("case", STEEP, ids=str)
def test_steep_logits(case: Case, scale: float, backend: str):
    """Neighbours that differ by up to twice the scale, and many pixels with equal logits: errors
    are those of torch's formula, however large the logits."""
    size = case.sample.inputs()["logits"].shape
    for logits in (torch.randn(size), torch.randint(0, 2, size) * 2.0 - 1):
        for ours, exact, plain in zip(*three_runs(case, scale * logits), strict=True):
            error, limit = error_and_limit(ours, exact, plain, 16 * torch.finfo(F32).eps)
            assert error <= limit


def as_reference(case: Case, **changed: Tensor) -> None:
    torch.testing.assert_close(run(case, **changed), run_reference(case, **changed))


@pytest.mark.on("reference", "simulated_triton")
def test_largest_logits(backend: str):
    """Neighbours whose difference is not finite in float32, and equal ones for which z·log2(e) is
    not: p is 0 or 1, the gradient finite."""
    case = moments((1, 4, 3, 4), (12, 16), statistics=("correct", "probability_sums"))
    size = 1, 4, 3, 4
    as_reference(case, logits=torch.where(torch.randn(size) > 0, 3e38, -3e38) * torch.rand(size))
    as_reference(case, logits=torch.tensor([3e38, 0, -3e38, 0])[:, None, None].expand(size))
    logits = torch.zeros(size)
    logits[:, 0] = torch.tensor([3e38, -3e38, -3e38])[:, None]  # two corners of a cell overflow
    labels = torch.where(torch.arange(12)[:, None] == 5, 1, -1).expand(1, 12, 16)
    as_reference(case, logits=logits, labels=labels)


@pytest.mark.on("reference", "simulated_triton", "cpu")
@pytest.mark.parametrize("value", [1e10, -1e10, 1e20, -1e30])
def test_a_class_far_from_zero(value: float, backend: str):
    """z·log2(e) has a rounding error beyond the range of exponents."""
    logits = torch.randn(1, 3, 3, 4)
    logits[:, 0] = value
    as_reference(moments((1, 3, 3, 4), (12, 16), statistics=("probability_sums",)), logits=logits)


@pytest.mark.on("reference", "simulated_triton", "cpu")
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_equal_logits_far_from_zero(stride: int, backend: str):
    """log 3 is less than the rounding of such logits: a loss may be 0."""
    logits = torch.full((2, 3, 3, 4), -1e10)
    logits[1] = 3e10
    labels = torch.zeros((2, 3 * stride, 4 * stride), dtype=torch.int64)
    losses = ao.pixel_cross_entropy(logits, labels, reduction="none")
    assert (losses >= 0).all() and (losses < 1.1).all()
    assert gradient_of(ao.pixel_cross_entropy, logits, labels).abs().max() <= 1


@pytest.mark.on("reference", "simulated_triton", "cpu")
def test_slopes_as_large_as_the_inverse_of_a_probability(backend: str):
    """log-Dice of a class whose probabilities are 2^-46, in a cell with one of another class."""
    z = torch.zeros(1, 2, 3, 4)
    column, row = torch.tensor([0.0, 1, 0, 1]), torch.tensor([0.0, 1, 0])[:, None]
    z[:, 0] = -(column + row) * 39.5 * math.log(2)
    z[:, 1] = (column * 39.5 - 150) * math.log(2)
    labels = torch.full((1, 12, 16), 255)
    labels[0, 2, 2], labels[0, 5, 2:6] = 0, 1
    ours = gradient_of(ao.Dice(log=True), z, labels)
    with ao.use_backend("reference"):
        expected = gradient_of(ao.Dice(log=True), z, labels)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.on("reference", "simulated_triton")
def test_a_row_that_begins_below_the_smallest_number(backend: str):
    """Class 0 has e^-175 of the largest logit in the first pixel of a row of a cell, e^-25 in the
    last one, where class 1 has e^-24; or the same from right to left."""
    case = moments((1, 2, 3, 8), (12, 32), statistics=("probability_sums",))
    logits = torch.full((1, 2, 3, 8), -24.0)
    logits[:, 0] = torch.tensor([-200.0, 0.0]).repeat(4)
    as_reference(case, logits=logits)


@pytest.mark.on("reference", "simulated_triton")
@pytest.mark.parametrize(
    ("of_label", "of_others"), [([-300, 0], [-400, -400]), ([0, 0], [-100, 200])]
)
def test_ignored_rows_far_above_a_valid_one(of_label: list, of_others: list, backend: str):
    """In a cell, e^z of the last row of pixels is e^225 times that of the first one, which alone is
    valid."""
    case = moments((1, 2, 8, 3), (32, 12), statistics=CE)
    rows = torch.tensor([of_label, of_others], dtype=F32).repeat(1, 4)
    logits = rows[None, :, :, None].expand(1, 2, 8, 3)
    labels = torch.where(torch.arange(32)[:, None] % 8 == 2, 0, -1).expand(1, 32, 12)
    as_reference(case, logits=logits, labels=labels)


@cpu
@pytest.mark.parametrize(("num_classes", "allowed"), [(2, 5.0), (4, 3.0)])
def test_rounding_errors_of_many_factors(num_classes: int, allowed: float, backend: str):
    """In cells of 8 × 8 labels, where all cells have the same slopes, so that their errors do not
    cancel: allowed times torch's."""
    size = 2, num_classes, 9, 17
    case = moments(size, (72, 136), statistics=CE, through=("losses",))
    logits = torch.randn(size) * 0.1 + torch.arange(9)[:, None] / 10
    ours, exact, plain = (found[-1].double() for found in three_runs(case, logits))
    error, torch_error = ((x - exact).square().mean().sqrt() for x in (ours, plain))
    assert error <= allowed * torch_error


def confident(kind: str, stride: int, n: int, random: torch.Generator) -> Inputs:
    """Logits of one class 10 above the others, or in the right half of another one, 16 with smaller
    differences, far apart, or with an offset; and the labels of the largest."""
    size = 2, 5, 6, 8
    logits, margin = torch.randn(size) / 2, 10.0
    classes = torch.randint(0, 5, (2, 1, 1, 1)).expand(2, 1, 6, 8).clone()
    if kind != "one class":
        classes[..., 4:] = (classes[..., :1] + 1) % 5
    if kind == "two classes":
        logits, margin = logits / 10, 16.0
    logits = logits.scatter_add(1, classes, torch.full(classes.shape, margin))
    if kind == "far apart":
        logits = 10 * torch.randn(size)
    if kind == "offset":
        logits = torch.randn(size) + 1000
    z = formulas.upsampled(logits.double(), (6 * stride, 8 * stride))
    return {"logits": logits, "labels": z.argmax(1)}


@pytest.mark.parametrize(
    "options",
    [
        {"statistics": ("pixel_losses",)},
        pytest.param({"statistics": ALL, "focal_gamma": 1.5}, marks=on_cpu),
    ],
    ids=["losses", "all"],
)
@pytest.mark.parametrize("kind", ["one class", "a border", "two classes", "far apart", "offset"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_confident_pixels(stride: int, kind: str, options: dict[str, Any], backend: str):
    """Losses and gradients may be far below those of ordinary logits, to which errors are
    relative."""
    check(Case(MOMENTS, Sample(kind, partial(confident, kind, stride), options)), backend)


@cpu
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-24, 1e-28])
@pytest.mark.parametrize("options", [{"squared": True}, {}], ids=str)
def test_dice_of_tiny_gradients(options: dict[str, bool], scale: float, backend: str):
    """Products of slopes and of powers of e would underflow."""
    size, pixels = (1, 5, 8, 8), (32, 32)
    logits = 25.0 * torch.randint(0, 2, size) + torch.randn(size) / 10
    labels = torch.randint(0, 5, (1, *pixels))
    ours, formula = (
        lambda x, y, call=call: scale * call(x, y)
        for call in (ao.Dice(**options), partial(formulas.dice, **options))
    )
    error, torch_error = gradient_errors(ours, formula, logits, labels)
    assert error <= 2 * torch_error + FLOOR


def even_logits(kind: str, size: tuple[int, ...]) -> Tensor:
    """Logits [B, K, h, w] that are equal everywhere, different for each class; or slow waves."""
    class_offsets = torch.arange(size[1])[:, None, None] * 0.3
    rows, columns = (torch.linspace(0, 1, n) for n in size[2:])
    waves = (1 + 10 * class_offsets + 2 * rows[:, None] + columns).sin()
    values = class_offsets.expand(waves.shape) if kind == "uniform" else waves
    return values.expand(size).contiguous()


@on_cpu
@pytest.mark.parametrize("kind", ["uniform", "smooth"])
@pytest.mark.parametrize(
    ("size", "pixels", "per_image"),
    [
        ((1, 4, 16, 32), (512, 2048), False),
        ((1, 2, 2, 16), (16, 65_536), False),
        ((1, 19, 32, 64), (128, 512), False),
        ((2, 50, 64, 64), (256, 256), True),
        ((1, 4, 150, 300), (150, 300), False),
        ((1, 3, 1, 100_000), (1, 100_000), False),
        ((2, 3, 200, 150), (131, 120), False),
    ],
)
def test_rounding_errors_of_even_regions(size, pixels, per_image: bool, kind: str, backend: str):
    """Where many pixels have the same probability, the rounding errors of a long sum do not cancel:
    at most twice those of masked sums, plus two roundings."""
    labels = torch.randint(0, size[1], (size[0], *pixels))
    labels[..., : pixels[1] // 2] = 1
    options = {"statistics": ("probability_sums", "squares"), "per_image": per_image}
    case, inputs = moments(size, pixels, **options), {"logits": even_logits(kind, size)}
    with torch.no_grad():
        ours, exact, plain = (
            call(logits=inputs["logits"].to(dtype), labels=labels)
            for call, dtype in ((case.ours, F32), (case.formula, F64), (case.formula, F32))
        )
    for one, right, other in zip(ours, exact, plain, strict=True):
        error, limit = error_and_limit(one, right, other, 2 * torch.finfo(F32).eps)
        assert error <= limit


@pytest.mark.parametrize(
    ("size", "pixels", "align_corners"),
    [
        ((1, 5, 4, 6), (32, 48), False),
        ((1, 5, 4, 6), (7, 9), False),
        pytest.param((2, 150, 9, 20), (36, 80), True, marks=cpu),
        pytest.param((2, 21, 9, 17), (72, 129), False, marks=cpu),
        pytest.param((2, 2, 9, 17), (65, 131), True, marks=cpu),
        pytest.param((2, 19, 9, 20), (9, 20), False, marks=cpu),
    ],
)
def test_losses_are_never_negative(size, pixels, align_corners: bool, backend: str):
    """Where the label has almost all of the probability, rounding could make them so."""
    for scale in (10, 10, 20, 20):
        logits = scale * torch.randn(size)
        labels = ao.pixel_argmax(logits, pixels, align_corners=align_corners)
        moments = ao.ops.softmax_moments(
            logits,
            labels,
            align_corners=align_corners,
            correct=False,
            probability_sums=False,
            pixel_losses=True,
        )
        assert moments.pixel_losses is not None
        assert (moments.pixel_losses >= 0).all() and (moments.losses >= 0).all()


@pytest.mark.on("reference", "simulated_triton", "cpu")
@pytest.mark.parametrize("masked", [900.0, 1e9])
def test_a_valid_pixel_inside_a_cell_of_masked_classes(masked: float, backend: str):
    logits = torch.tensor([-masked, -masked, 1.0, 3.0])[:, None, None].expand(1, 4, 2, 2)
    labels = F.pad(torch.full((1, 1, 1), 2), (3, 4, 3, 4), value=-1)
    as_reference(moments((1, 4, 2, 2), (8, 8), statistics=CE), logits=logits, labels=labels)


@pytest.mark.parametrize("stride", [1, 4])
def test_what_is_not_used_is_exactly_0(stride: int, backend: str):
    """Images that are ignored, of weight 0, or of losses below the smallest; the last is used."""
    logits, labels = torch.randn(4, 3, 4, 4), torch.ones(4, 4 * stride, 4 * stride).long()
    weights = torch.ones(labels.shape)
    labels[0], weights[1], logits[2, 1] = -1, 0, 30
    options: dict[str, Any] = {"ohem_threshold": 0.9, "focal_gamma": 0.5, "label_smoothing": 0.1}
    loss = ao.CrossEntropy(**options, ignore_index=-1)
    gradient = gradient_of(loss, logits, labels, weights)
    assert not gradient[:3].any() and gradient[3].any()
    assert loss(logits[:3], labels[:3], weights[:3]) == 0


def test_sums_do_not_drift(backend: str):
    """The mean of a million equal pixels is the loss of one."""
    logits = torch.tensor([0.3, 1.7, -0.9]).view(1, 3, 1, 1)
    labels = torch.zeros((1, 1000, 1000), dtype=torch.int64)
    one = ao.pixel_cross_entropy(logits, labels[:, :1, :1])
    mean = ao.pixel_cross_entropy(logits.expand(1, 3, 250, 250), labels)
    torch.testing.assert_close(mean, one, rtol=2.0**-19, atol=0)


def test_losses_are_not_negative_beside_a_larger_class(backend: str):
    logits, labels = torch.zeros(64, 2, 2, 2), torch.full((64, 8, 8), 255)
    logits[:, 0, :, 0] = 20 + 20 * torch.rand(64, 1)
    logits[:, 1, :, 1] = 20 + 30 * torch.rand(64, 1)
    labels[:, 3:5, 2:4] = 0
    assert ao.pixel_cross_entropy(logits, labels, reduction="none").min() == 0


@pytest.mark.on("simulated_triton", "triton", "cpu")
def test_both_directions_use_the_same_pixels(backend: str):
    """The smallest loss is that of a pixel; cells have labels of a class far below."""
    logits = 0.3 * torch.randn(1, 3, 4, 4) + torch.tensor([-20.0, -27, -1e4])[:, None, None]
    labels = torch.zeros((1, 12, 12), dtype=torch.int64)
    labels[:, 1::3, 1::3] = 2
    losses = ao.pixel_cross_entropy(logits, labels, reduction="none")
    for smallest in losses[labels == 0][::4]:
        pixels = {"statistics": ("pixel_losses",), "min_loss": smallest.item()}
        found = statistics_of(logits.requires_grad_(), labels, **pixels)
        (used,) = (x[losses == smallest] for x in found if x.shape == labels.shape)
        assert (used > 0).all() and torch.autograd.grad(used.sum(), logits)[0].any()


@pytest.mark.parametrize(("lowest", "label"), [(-95.0, 1), (-120.0, 2)])
def test_terms_of_a_row_that_may_be_lost(lowest: float, label: int, backend: str):
    """The largest logits are those of class 0 in the upper row, and e^z of class 1 rises along the
    rows: computed from its first pixel, it would be lost in the lower row. label: of a pixel, that
    of class 1 or of one whose logits are far below."""
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 0, 1], logits[0, 1], logits[0, 2] = -62, torch.tensor([lowest, -40]), -2000
    labels = torch.full((1, 8, 8), 255)
    labels[0, 2:6, 2:6], labels[0, 5, 2] = 1, label
    upsampled = F.interpolate(logits.double(), (8, 8), mode="bilinear")
    exact = F.cross_entropy(upsampled, labels, reduction="none", ignore_index=255)
    losses = ao.pixel_cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=2e-5)


def test_statistics_by_default():
    moments = ao.ops.softmax_moments(torch.zeros(4, 2).bfloat16(), torch.zeros(4).long())
    given = {name: x.dtype for name, x in moments._asdict().items() if x is not None}
    numbers = dict.fromkeys(("counts", "correct", "divisor"), torch.int64)
    floats = dict.fromkeys(("losses", "intersections", "probability_sums"), torch.float32)
    assert given == numbers | floats


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    height, width = draw(st.lists(st.integers(1, 37), min_size=2, max_size=2))
    up = draw(st.sampled_from([None, 2, 3, 4, 6, 8]))
    drawn = draw(st.lists(st.integers(1, 90), min_size=2, max_size=2))
    return moments(
        (draw(st.integers(1, 3)), draw(st.sampled_from([2, 3, 5, 33])), height, width),
        (up * height, up * width) if up else (drawn[0], drawn[1]),
        draw(st.sampled_from([F32, BF16, F16, F64])),
        draw(st.booleans()),
        draw(st.sampled_from(["contiguous", "channels_last", "cropped", "every other"])),
        coherent=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 10.0])),
        per_image=draw(st.booleans()),
    )


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(drawn_cases())
def test_any_shape(case: Case):
    with ao.use_backend("cpu"):
        check(case, "cpu")


@pytest.mark.on("simulated_triton")
@pytest.mark.usefixtures("backend")
def test_only_the_first_axis_of_a_grid_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have at most 65,535 programs."""
    from anchorops.kernels import softmax_moments

    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *_, **__: None

    for name in ("_softmax_moments_kernel", "_sums_of_programs_kernel"):
        monkeypatch.setattr(softmax_moments, name, Kernel())
    images = 2**16
    logits, labels = torch.zeros(images, 2, 1, 1), torch.zeros(images, 1, 1).long()
    ao.ops.softmax_moments(logits, labels, per_image=True)
    assert [grid[0] for grid in grids] == [images, images]
    assert all(size < 2**16 for grid in grids for size in grid[1:])

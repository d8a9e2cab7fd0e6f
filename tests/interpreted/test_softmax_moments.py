"""Values and all gradients of softmax moments within the error budget.

The exact values are those of the reference, float64 with coordinates in float32. The error is at
most twice that of the float32 formula (upsample, log-softmax, a masked sum for each class), plus
FLOOR of the largest value, times 1 + max|z| for the rounding of logits.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from emulator import BACKEND

import anchorops as ao
from anchorops import reference

FLOOR = 2**-22
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLOATING = ("losses", "overlaps", "masses", "squares", "pixel_losses", "lse")
ALL = ("hits", "masses", "squares", "pixel_losses", "lse")


class Case(NamedTuple):
    size: tuple[int, ...]
    pixels: tuple[int, ...]  # of the labels, without the batch
    align_corners: bool = False
    dtype: torch.dtype = FP32
    layout: str = "contiguous"
    label_dtype: torch.dtype = torch.int64
    asked: tuple[str, ...] = ALL
    per_image: bool = False
    scale: float = 1.0

    @property
    def labels_size(self):
        return (*self.size[:1], *self.pixels)

    @property
    def ignore_index(self):
        return 255 if self.size[1] <= 255 else -1

    @property
    def options(self):
        asked = {name: name in self.asked for name in ALL}
        options = {"align_corners": self.align_corners, "per_image": self.per_image}
        return asked | options | {"ignore_index": self.ignore_index}


CE = ()  # the cross-entropy needs only counts and losses
CASES = [
    # ×4: one cell, several tiles of cells, many classes
    Case((1, 3, 1, 1), (4, 4)),
    Case((2, 19, 3, 5), (12, 20)),
    Case((2, 2, 3, 37), (12, 148), asked=("masses",), per_image=True),
    Case((1, 7, 9, 2), (36, 8), False, BF16, "channels_last", torch.uint8),
    Case((1, 150, 1, 3), (4, 12), False, BF16, asked=CE),
    Case((1, 37, 2, 3), (8, 12), False, FP16, "sliced", asked=("masses", "lse")),
    # ×8
    Case((1, 8, 3, 4), (24, 32), False, FP32, "channels_last", asked=CE),
    Case((2, 5, 2, 3), (16, 24), False, BF16, "cropped", torch.int16),
    # ×2 and ×3, and another ratio along each axis
    Case((1, 7, 4, 5), (8, 10), asked=("hits", "masses")),
    Case((1, 4, 3, 9), (9, 9)),
    Case((1, 4, 9, 3), (3, 24), label_dtype=torch.uint16),
    # odd ratios, both ways to place the corners
    Case((1, 5, 9, 9), (33, 33)),
    Case((1, 5, 9, 9), (33, 33), True),
    Case((2, 6, 4, 6), (17, 25), True, BF16, label_dtype=torch.int8),
    Case((1, 9, 4, 5), (16, 20), True, FP32, "channels_last", asked=CE),
    Case((1, 3, 5, 4), (7, 9), False, FP16, "channels_last", asked=("squares",)),
    # the same size, down, one logit, one label
    Case((2, 6, 7, 5), (7, 5), False, BF16, "channels_last"),
    Case((1, 1, 4, 3), (4, 3)),
    Case((2, 1, 3, 2), (12, 8), per_image=True),
    Case((1, 7, 9, 8), (3, 5)),
    Case((1, 7, 9, 8), (4, 2), True, asked=("masses",)),
    Case((1, 3, 1, 1), (5, 3), True),
    Case((2, 4, 3, 5), (1, 1), True),
    # points and volumes
    Case((70, 37), (), False, FP32, "sliced", torch.int32),
    Case((150, 19), (), False, BF16, asked=CE),
    Case((3, 5, 40), (40,), per_image=True, label_dtype=torch.uint32),
    Case((2, 4, 3, 2, 5), (3, 2, 5), label_dtype=torch.uint64),
    # more classes than a block of any size has
    Case((5, 1100 if BACKEND == "cuda" else 300), (), asked=CE),
]


def make_logits(case: Case) -> torch.Tensor:
    """Random logits of this layout; the memory around a view is NaN."""
    values = (case.scale * 3 * torch.randn(case.size)).to(case.dtype)
    if case.layout == "contiguous":
        return values
    if case.layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if case.layout == "sliced":
        view = torch.full([2 * n + 1 for n in case.size], torch.nan, dtype=case.dtype)
        view = view[tuple(slice(1, 2 * n + 1, 2) for n in case.size)]
    else:
        view = torch.full([n + 3 for n in case.size], torch.nan, dtype=case.dtype)
        view = view[tuple(slice(1, n + 1) for n in case.size)]
    return view.copy_(values)


def make_labels(case: Case) -> torch.Tensor:
    """Random classes, without class 1 if there are three. A fifth of the labels is ignored, and
    three labels are not classes."""
    num_classes = case.size[1]
    labels = torch.randint(0, num_classes, case.labels_size)
    if num_classes > 2:
        labels[labels == 1] = 0
    labels[torch.rand(labels.shape) < 0.2] = case.ignore_index
    none = torch.tensor([-1, num_classes, case.ignore_index])
    labels.view(-1)[:3] = none[: labels.numel()]
    if case.label_dtype in (torch.int8, torch.uint8):
        labels[labels > 127] = -1  # as uint8: 255
    return labels.to(case.label_dtype)


def is_valid(case: Case, labels) -> torch.Tensor:
    labels = labels.long()
    return (labels >= 0) & (labels < case.size[1]) & (labels != case.ignore_index)


def moments_of(case: Case, logits, labels) -> dict[str, torch.Tensor]:
    moments = ao.softmax_moments(logits, labels, **case.options)
    return {name: x for name, x in moments._asdict().items() if x is not None}


def values_and_gradient(case: Case, logits, labels, weights, through=FLOATING):
    """All statistics, and the gradient of a weighted sum of those named in `through`."""
    logits = logits.detach().requires_grad_()
    moments = moments_of(case, logits, labels)
    asked = [k for k in FLOATING if k in through and k in moments]
    total = torch.stack([(moments[k] * weights[k]).sum() for k in asked]).sum()
    (dlogits,) = torch.autograd.grad(total, logits)
    return {name: x.detach() for name, x in moments.items()}, dlogits


def exact_values_and_gradient(case: Case, logits, labels, weights, through=FLOATING):
    with ao.use_backend("reference"):
        return values_and_gradient(case, logits.detach().float(), labels, weights, through)


def straightforward(case: Case, logits, labels, weights, through=FLOATING):
    """The same as `values_and_gradient` by the float32 formula, if all logits are finite."""
    x = logits.detach().float().contiguous().requires_grad_()
    z, shape = x, labels.shape
    if x.dim() == 2:
        z, labels = x.t()[None], labels[None]
    elif x.dim() == 4:
        align = case.align_corners
        z = F.interpolate(x, case.pixels, mode="bilinear", align_corners=align)
    z, labels, num_classes = z.flatten(2), labels.flatten(1).long(), case.size[1]
    valid = is_valid(case, labels)
    own = torch.where(valid, labels, 0)
    one_hot = (own[:, None] == torch.arange(num_classes)[:, None]) & valid[:, None]
    log_p = z.log_softmax(1)
    pixel_losses = torch.where(valid, -log_p.gather(1, own[:, None])[:, 0], 0)
    p = torch.where(valid[:, None], log_p.exp(), 0)
    by_class = (2,) if case.per_image else (0, 2)
    moments = {
        "losses": (one_hot * pixel_losses[:, None]).sum(by_class),
        "overlaps": (one_hot * p).sum(by_class),
        "masses": p.sum(by_class),
        "squares": p.square().sum(by_class),
        "pixel_losses": pixel_losses.view(shape),
        "lse": torch.where(valid, z.logsumexp(1), 0).view(shape),
    }
    asked = {"losses", "overlaps" if "masses" in case.asked else "losses", *case.asked}
    used = asked & set(through) & set(FLOATING)
    total = torch.stack([(moments[k] * weights[k]).sum() for k in used]).sum()
    (dlogits,) = torch.autograd.grad(total, x)
    return {name: moment.detach() for name, moment in moments.items()}, dlogits


def make_weights(case: Case) -> dict[str, torch.Tensor]:
    by_class = (case.size[0], case.size[1]) if case.per_image else (case.size[1],)
    of_pixels = ("pixel_losses", "lse")
    shapes = {name: case.labels_size if name in of_pixels else by_class for name in FLOATING}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def assert_within_budget(name, ours, exact, formula, eps=0.0, floor=FLOOR):
    assert ours.shape == exact.shape, name
    error = (ours.double() - exact.double()).abs()
    size = exact.abs().max().clamp(min=1)
    allowed = 2 * (formula.double() - exact.double()).abs().max() + floor * size
    assert (error <= eps * exact.double().abs() + allowed).all(), (name, error.max(), allowed)


def check(case: Case, through=FLOATING):
    logits, labels, weights = make_logits(case), make_labels(case), make_weights(case)
    ours, dlogits = values_and_gradient(case, logits, labels, weights, through)
    exact, exact_gradient = exact_values_and_gradient(case, logits, labels, weights, through)
    formula, formula_gradient = straightforward(case, logits, labels, weights, through)

    assert ours.keys() == exact.keys()
    assert torch.equal(ours["counts"], exact["counts"])
    floor = FLOOR * (1 + float(logits.float().abs().max()))
    for name in FLOATING:
        if name in ours:
            assert ours[name].dtype == FP32
            assert_within_budget(name, ours[name], exact[name], formula[name], floor=floor)
    if "hits" in ours:
        check_hits(case, logits, labels, ours["hits"], floor)
    for name in ("pixel_losses", "lse"):
        if name in ours:
            assert not ours[name][~is_valid(case, labels)].any(), f"{name}: ignored pixels are 0"
    layout = torch.empty_like(logits, device="meta").stride()
    assert dlogits.dtype == case.dtype and dlogits.stride() == layout
    # float32 arithmetic, then one rounding to the logits' dtype
    eps = torch.finfo(case.dtype).eps * (1 if case.dtype == BF16 and BACKEND == "triton" else 0.5)
    if case.dtype == FP16:
        formula_gradient = formula_gradient + 2**-24  # its smallest number
    assert_within_budget("dlogits", dlogits, exact_gradient, formula_gradient, eps, floor)


def check_hits(case: Case, logits, labels, hits, floor):
    """Exact, except for pixels where the two largest logits are equal up to rounding."""
    if logits.dim() == 2:
        logits, labels = logits.t()[None], labels[None]
    if logits.dim() != 4:
        logits, labels = logits.flatten(2)[:, :, None], labels.flatten(1)[:, None]
    z = reference.upsample(logits.float(), tuple(labels.shape[1:]), case.align_corners)
    labels, num_classes = labels.long(), case.size[1]
    valid = is_valid(case, labels)
    own = torch.where(valid, labels, 0)
    others = z.scatter(1, own[:, None], -torch.inf).amax(1)
    lead = z.gather(1, own[:, None])[:, 0] - others
    image = torch.arange(labels.shape[0])[:, None, None] * num_classes
    bounds = []
    for at_least in (floor, -floor):
        keys = (own + image)[valid & (lead > at_least)]
        counts = keys.bincount(minlength=labels.shape[0] * num_classes).view(-1, num_classes)
        bounds.append(counts if case.per_image else counts.sum(0))
    assert ((bounds[0] <= hits) & (hits <= bounds[1])).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case):
    check(case)


@pytest.mark.skipif(BACKEND != "triton", reason="the interpreter's lanes have one pixel")
@pytest.mark.parametrize(
    "case",
    [
        Case((1, 3, 2, 3), (8, 12)),
        Case((1, 3, 3, 2), (6, 16), dtype=BF16),
        Case((1, 3, 2, 3), (7, 13), True, asked=("masses",)),
    ],
    ids=str,
)
def test_lanes_of_several_pixels(case: Case, monkeypatch):
    """As on a GPU."""
    from anchorops.kernels import upsampling

    monkeypatch.setattr(upsampling, "MAX_SLOTS", 4)
    upsampling.axis_of.cache_clear()
    check(case)
    upsampling.axis_of.cache_clear()


@pytest.mark.parametrize("through", [("losses",), ("masses",), ("overlaps", "lse"), ("squares",)])
def test_gradient_through_some(through):
    check(Case((1, 6, 3, 4), (12, 16)), through)
    check(Case((1, 6, 3, 4), (8, 9), True, BF16), through)


@pytest.mark.parametrize("scale", [27.0, 3e3])  # neighbours differ by up to 80 and 1e4
@pytest.mark.parametrize("pixels", [(16, 24), (33, 48), (7, 9)])
def test_steep_neighbours(scale, pixels):
    check(Case((1, 5, 4, 6), pixels, scale=scale))


def test_largest_logits():
    """Neighbours whose difference is not finite in float32: p is 0 or 1, the gradient finite."""
    case = Case((1, 4, 3, 4), (12, 16), asked=("hits", "masses"))
    logits = torch.where(make_logits(case) > 0, 3e38, -3e38) * torch.rand(case.size)
    labels, weights = make_labels(case), make_weights(case)
    ours, dlogits = values_and_gradient(case, logits, labels, weights)
    exact, exact_gradient = exact_values_and_gradient(case, logits, labels, weights)
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(dlogits, exact_gradient)


def test_far_from_zero():
    """A constant that all classes share changes nothing but lse."""
    case = Case((1, 5, 3, 4), (12, 16))
    logits, labels, weights = make_logits(case).round(), make_labels(case), make_weights(case)
    through = ("losses", "masses", "squares")
    ours, dlogits = values_and_gradient(case, logits + 4096, labels, weights, through)
    exact, exact_gradient = exact_values_and_gradient(case, logits, labels, weights, through)
    for name in ("overlaps", "masses", "squares", "pixel_losses"):
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dlogits, exact_gradient, rtol=1e-3, atol=1e-3)


RATIOS = [((3, 4), (12, 16), False), ((3, 4), (9, 13), True), ((3, 4), (3, 4), False)]


def read_by(size, pixels, align_corners, row, column):
    """bool [H, W]: the pixels that read the logit at (row, column)."""
    x = torch.zeros(1, 1, *size)
    x[0, 0, row, column] = 1
    return reference.upsample(x, pixels, align_corners)[0, 0] != 0


def bitwise(x):
    return x.view(torch.int32) if x.is_floating_point() else x


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("size", "pixels", "align_corners"), RATIOS)
def test_not_finite_logit_spoils_the_pixels_that_read_it(size, pixels, align_corners, value):
    case = Case((2, 5, *size), pixels, align_corners)
    logits, labels, weights = (
        make_logits(case),
        torch.randint(0, 5, (2, *pixels)),
        make_weights(case),
    )
    spoilt = read_by(size, pixels, align_corners, 1, 2)
    labels[1, spoilt] %= 2
    clean, clean_gradient = values_and_gradient(case, logits, labels, weights)
    logits[1, 3, 1, 2] = value
    ours, dlogits = values_and_gradient(case, logits, labels, weights)
    for name in ("pixel_losses", "lse"):
        assert torch.equal(ours[name][0], clean[name][0])
        torch.testing.assert_close(ours[name][1][~spoilt], clean[name][1][~spoilt])
        assert not ours[name][1][spoilt].isfinite().any()
    assert not ours["masses"][3].isfinite()
    assert not ours["losses"][labels[1, spoilt]].isfinite().any()
    torch.testing.assert_close(ours["losses"][2:], clean["losses"][2:])
    # positions that no affected pixel reads keep their gradient; that of the logit is not finite
    reached = torch.tensor(
        [
            [(read_by(size, pixels, align_corners, i, j) & spoilt).any() for j in range(size[1])]
            for i in range(size[0])
        ]
    )
    assert not dlogits[1, 3, 1, 2].isfinite()
    assert torch.equal(dlogits[0], clean_gradient[0])
    torch.testing.assert_close(dlogits[1][:, ~reached], clean_gradient[1][:, ~reached])
    if torch.isnan(torch.tensor(value)):
        assert dlogits[1][:, reached].isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("size", "pixels", "align_corners"), RATIOS)
def test_ignored_pixels_change_nothing(size, pixels, align_corners):
    """If every pixel that reads a NaN or an Inf is ignored, the results are as with finite logits,
    except for rounding, because another maximum may be subtracted."""
    case = Case((1, 5, *size), pixels, align_corners)
    logits, labels, weights = (
        make_logits(case),
        torch.randint(0, 5, (1, *pixels)),
        make_weights(case),
    )
    labels[0, read_by(size, pixels, align_corners, 1, 2)] = 255
    expected = values_and_gradient(case, logits, labels, weights)
    for value in (torch.nan, torch.inf, -torch.inf):
        logits[0, 3, 1, 2] = value
        ours = values_and_gradient(case, logits, labels, weights)
        torch.testing.assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("size", "pixels", "align_corners"), RATIOS)
def test_minus_infinity_masks_a_class(size, pixels, align_corners):
    """p = 0 and gradient 0, in a whole plane and at single positions; no NaN arises."""
    case = Case((1, 5, *size), pixels, align_corners)
    logits, weights = make_logits(case), make_weights(case)
    labels = torch.randint(0, 2, (1, *pixels))
    logits[0, 2] = -torch.inf
    logits[0, 4, 0, 1] = -torch.inf
    logits[0, 3, 1:, 2:] = -torch.inf
    ours, dlogits = values_and_gradient(case, logits, labels, weights)
    exact, exact_gradient = exact_values_and_gradient(case, logits, labels, weights)
    for name in ours:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dlogits, exact_gradient, rtol=1e-5, atol=1e-5)
    assert not dlogits[0, 2].any() and not dlogits[0, 4, 0, 1].any()
    labels[0, 1, 1] = 2  # a masked class is not expected: its loss is infinite
    ours, _ = values_and_gradient(case, logits, labels, weights)
    assert ours["losses"][2] == torch.inf and ours["pixel_losses"][0, 1, 1] == torch.inf
    assert ours["losses"].isfinite().sum() == 4 and ours["overlaps"][2] == 0


@pytest.mark.parametrize("case", [
    Case((2, 7, 3, 20), (12, 80)),
    Case((2, 7, 3, 5), (10, 11), True, BF16, "channels_last"),
], ids=str)  # fmt: skip
def test_reproducible(case):
    logits, labels, weights = make_logits(case), make_labels(case), make_weights(case)
    first = values_and_gradient(case, logits, labels, weights)
    second = values_and_gradient(case, logits, labels, weights)
    assert all(torch.equal(bitwise(first[0][k]), bitwise(second[0][k])) for k in first[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("labels_size", [(2, 12, 16), (2, 7, 9)])
def test_nothing_valid(labels_size, dtype):
    logits = torch.full((2, 5, 3, 4), torch.nan, dtype=dtype, requires_grad=True)
    labels = torch.full(labels_size, 255)
    moments = ao.softmax_moments(logits, labels, squares=True, pixel_losses=True, lse=True)
    assert not any(x.any() for x in moments)
    torch.stack([x.sum() for x in moments[2:]]).sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("size", "labels_size"), [((0, 4), (0,)), ((0, 4, 3, 3), (0, 12, 12)), ((2, 4, 0), (2, 0))]
)
def test_empty(size, labels_size):
    logits = torch.empty(size, requires_grad=True)
    labels = torch.empty(labels_size, dtype=torch.int64)
    moments = ao.softmax_moments(logits, labels, squares=True, pixel_losses=True, lse=True)
    assert not any(x.any() for x in moments)
    torch.stack([x.sum() for x in moments[2:]]).sum().backward()
    assert logits.grad.shape == size


def test_no_labels_of_logits():
    logits = torch.randn(2, 4, 3, 3, requires_grad=True)
    moments = ao.softmax_moments(logits, torch.empty(2, 0, 5, dtype=torch.int64))
    moments.losses.sum().backward()
    assert not moments.losses.any() and not logits.grad.any()


def test_strides_of_labels_and_gradients():
    case = Case((2, 4, 3, 5), (12, 20))
    logits, labels, weights = make_logits(case), make_labels(case), make_weights(case)
    for name in ("losses", "pixel_losses"):
        weights[name] = torch.randn(1).expand(weights[name].shape)
    expected = values_and_gradient(case, logits, labels, weights)
    for strided in (
        labels.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([labels, torch.full_like(labels, 3)], -1)[..., 0],
    ):
        ours = values_and_gradient(case, logits, strided, weights)
        assert all(torch.equal(ours[0][name], expected[0][name]) for name in ours[0])
        assert torch.equal(ours[1], expected[1])
    row = labels[:1, :1].expand(2, 12, 20)
    ours = values_and_gradient(case, logits, row, weights)
    assert torch.equal(ours[1], values_and_gradient(case, logits, row.clone(), weights)[1])


def test_offsets_are_64_bit():
    """Strides of 2^30 elements: the last ones are beyond 2^31. Few pages are touched."""
    torch.use_deterministic_algorithms(False)  # otherwise torch.empty would write all of it
    buffer = torch.empty(2**32 + 64, dtype=FP16)
    for size, stride in (
        ((4, 2, 3, 4), (2**30, 12, 4, 1)),
        ((1, 4, 3, 4), (0, 2**30, 4, 1)),
        ((1, 3, 4, 4), (0, 4, 2**30, 1)),
        ((1, 3, 3, 4), (0, 1, 3, 2**30)),
    ):
        case = Case(size, (5, 7) if stride[2] == 2**30 else (12, 16), dtype=FP16)
        far = buffer.as_strided(size, stride)
        near = far.copy_(torch.randn(size)).clone()
        labels, weights = make_labels(case), make_weights(case)
        ours = values_and_gradient(case, far, labels, weights)
        expected = values_and_gradient(case, near, labels, weights)
        assert all(torch.equal(ours[0][name], expected[0][name]) for name in ours[0])
        assert torch.equal(ours[1].contiguous(), expected[1].contiguous())


def test_offsets_of_labels_are_64_bit():
    torch.use_deterministic_algorithms(False)
    far = torch.empty(2**32 + 64, dtype=torch.uint8).as_strided((3, 8, 8), (2**31, 8, 1))
    case = Case((3, 4, 2, 2), (8, 8), label_dtype=torch.uint8)
    logits, weights = make_logits(case), make_weights(case)
    near = far.copy_(make_labels(case)).clone()
    ours = values_and_gradient(case, logits, far, weights)
    expected = values_and_gradient(case, logits, near, weights)
    assert all(torch.equal(ours[0][name], expected[0][name]) for name in ours[0])
    assert torch.equal(ours[1], expected[1])


def test_compiles_as_one_graph():
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def loss(logits, labels):
        moments = ao.softmax_moments(logits, labels, align_corners=True)
        return moments.losses.sum() / moments.counts.sum() + moments.masses.square().sum()

    for width in (3, 5):
        logits, labels = torch.randn(1, 4, 2, width), torch.randint(0, 4, (1, 7, 2 * width))
        grads = []
        for function in (loss, loss._torchdynamo_orig_callable):
            leaf = logits.clone().requires_grad_()
            function(leaf, labels).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


def test_operators_are_registered_as_torch_expects():
    operators = torch.ops.anchorops
    logits, labels = torch.randn(2, 5, 2, 3), torch.randint(0, 5, (2, 8, 12))
    asked = (True, True, True, True, True)
    forward = (logits.requires_grad_(), labels, 255, False, False, *asked)
    torch.library.opcheck(getattr(operators.softmax_moments, BACKEND), forward)
    gradients = [torch.randn(5) for _ in range(4)] + [torch.randn(2, 8, 12) for _ in range(2)]
    backward = (logits.detach(), labels, torch.randn(2, 8, 12), *gradients, 255, False)
    torch.library.opcheck(getattr(operators.softmax_moments_backward, BACKEND), backward)


def test_float64_is_refused():
    with pytest.raises(ValueError, match=rf"softmax_moments: backend {BACKEND} .* float64"):
        ao.softmax_moments(torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4).long())
    with pytest.raises(ValueError, match="at most 16384 classes"):
        ao.softmax_moments(torch.zeros(4, 20_000), torch.zeros(4).long(), ignore_index=-1)

"""Sliding windows: against the formula with logits of the whole image and against MONAI; memory,
what is read back to the host, and messages."""

import itertools
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao
from anchorops import _windows
from tests.helpers.memory import peak_allocated_bytes
from tests.helpers.operators import Operators

Size = tuple[int, ...]
Pairs = list[tuple[Size, Tensor]]


@pytest.fixture(autouse=True, params=[2**20, 500])
def band(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once, or few."""
    monkeypatch.setattr(_windows, "BAND", request.param)


def resized(z: Tensor, size: Size, align_corners: bool) -> Tensor:
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(z, size, mode=mode, align_corners=align_corners)


def formula(
    windows: Pairs,
    image_size: Size,
    window_size: Size,
    size: Size | None = None,
    *,
    weights: Tensor | None = None,
    softmax: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """Logits (B, K, *size), in float64, of an image with a border as wide as a window."""
    border = [slice(n, n + length) for n, length in zip(window_size, image_size, strict=True)]
    padded = [2 * n + length for n, length in zip(window_size, image_size, strict=True)]
    sums = torch.zeros(*windows[0][1].shape[:2], *padded, dtype=torch.float64)
    total = torch.zeros(padded, dtype=torch.float64)
    w = torch.ones(window_size) if weights is None else weights
    for origin, logits in windows:
        there = tuple(slice(o + n, o + 2 * n) for o, n in zip(origin, window_size, strict=True))
        sums[(..., *there)] += w * resized(logits.double(), window_size, align_corners)
        total[there] += w
    z = (sums / total)[(..., *border)]
    z = z.softmax(1) if softmax else z
    return z if size is None else resized(z, size, align_corners)


class Example(NamedTuple):
    windows: Pairs
    sizes: tuple[Size, Size, Size | None]
    options: dict[str, Any]
    sigmoid: bool

    @classmethod
    def of(cls, seed: int) -> "Example":
        rng = random.Random(seed)
        axes, sigmoid = rng.choice((2, 2, 3)), rng.random() < 0.2
        classes = rng.choice((1, 3, 9)) if sigmoid else rng.choice((2, 5, 9))
        image = tuple(rng.randint(5, 40 if axes == 2 else 17) for _ in range(axes))
        window = tuple(rng.randint(4, n + 5) for n in image)
        whole = rng.random() < 0.3
        low = tuple(n if whole else max(n // rng.choice((1, 2, 3, 4)), 1) for n in window)
        stride = tuple(max(n * rng.choice((1, 2, 3)) // 3, 1) for n in window)
        origins = ao.window_origins(image, window, stride)
        if rng.random() < 0.3:  # around the image, as with padding on all sides
            larger = tuple(n + 3 for n in image)
            origins = [tuple(o - 2 for o in x) for x in ao.window_origins(larger, window, stride)]
            inside = [
                all(-n < o < m for o, n, m in zip(x, window, image, strict=True)) for x in origins
            ]
            origins = [*itertools.compress(origins, inside)]
        dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
        logits = 2 * torch.randn(len(origins), rng.choice((1, 2)), classes, *low)
        size = (
            None
            if rng.random() < 0.4
            else tuple(rng.choice((n, rng.randint(3, 50))) for n in image)
        )
        options = {
            "weights": torch.rand(window) + 0.1 if rng.random() < 0.4 else None,
            "softmax": not sigmoid and rng.random() < 0.3,
            "align_corners": rng.random() < 0.3,
        }
        return cls(
            [*zip(origins, logits.to(dtype), strict=True)], (image, window, size), options, sigmoid
        )


@pytest.mark.parametrize("seed", range(30))
def test_the_formula(seed: int) -> None:
    example = Example.of(seed)
    expected = formula(example.windows, *example.sizes, **example.options)
    pieces, first = [], 0
    for row, z in ao.window_rows(iter(example.windows), *example.sizes, **example.options):
        assert row == first
        first += z.shape[2]
        pieces.append(z)
    rows = torch.cat(pieces, 2)
    double = example.windows[0][1].dtype == torch.float64
    assert rows.dtype == (torch.float64 if double else torch.float32)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=2e-5)
    options: dict[str, Any] = {"dtype": torch.uint8}
    if example.sigmoid:
        options |= {"sigmoid": True, "threshold": 0.3}
    labels = ao.window_argmax(iter(example.windows), *example.sizes, **example.options, **options)
    assert labels.dtype == torch.uint8
    if example.sigmoid:
        p = expected.sigmoid()
        assert labels.shape == p.shape
        assert ((p - 0.3).abs()[labels != (p > 0.3)] < 1e-5).all()
    else:
        chosen = expected.gather(1, labels[:, None].long())[:, 0]
        torch.testing.assert_close(chosen, expected.amax(1), rtol=0, atol=5e-5)


def example(
    image_size: Size, window_size: Size, stride: Size, low: Size, classes: int = 5
) -> Callable[[], Iterator[tuple[Size, Tensor]]]:
    """Calls give the windows one after the other, as a network does."""
    origins = ao.window_origins(image_size, window_size, stride)
    return lambda: ((o, torch.randn(1, classes, *low)) for o in origins)


def test_one_size_gives_the_same_pieces() -> None:
    """Of low or full resolution, of several image sizes, in 2D or as one window."""
    size = (37, 41)
    calls: list[Any] = [
        (example((64, 70), (32, 32), (20, 20), (8, 8)), (64, 70), (32, 32)),
        (example((23, 29), (16, 16), (8, 8), (16, 16)), (23, 29), (16, 16)),
        (example((37, 41), (37, 41), (37, 41), (10, 11)), (37, 41), (37, 41)),
    ]
    pieces = [
        [(row, z.shape) for row, z in ao.window_rows(windows(), image, window, size)]
        for windows, image, window in calls
    ]
    assert pieces[0] == pieces[1] == pieces[2]


def test_rows_are_computed_while_windows_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_windows, "BAND", 500)
    read = []

    def windows() -> Iterator[tuple[Size, Tensor]]:
        for origin, z in example((64, 64), (32, 32), (16, 16), (8, 8))():
            read.append(origin[0])
            yield origin, z

    for row, _ in ao.window_rows(windows(), (64, 64), (32, 32)):
        assert read[-1] <= row + 16 + 1 or read[-1] == 32


def test_float16_is_added_in_float32() -> None:
    """Of three windows, whose sum 4096 + 1 + 1 float16 would round."""
    windows = [((0, 0), torch.full((1, 2, 4, 4), x, dtype=torch.float16)) for x in (4096, 1, 1)]
    ((_, z),) = ao.window_rows(windows, (4, 4), (4, 4))
    assert z.dtype == torch.float32 and (z == 4098 / 3).all()


def test_classes_that_are_masked_out() -> None:
    """−∞ in one class, of low and of full resolution, resized along one axis and along both."""
    for low, size in itertools.product((6, 24), ((40, 60), (50, 60))):
        windows = [*example((40, 40), (24, 24), (16, 16), (low, low))()]
        for _, z in windows:
            z[:, 1] = -torch.inf
        labels = ao.window_argmax(windows, (40, 40), (24, 24), size)
        without = [(o, z[:, [0, 2, 3, 4]]) for o, z in windows]
        expected = ao.window_argmax(without, (40, 40), (24, 24), size)
        assert torch.equal(labels, torch.tensor([0, 2, 3, 4])[expected])
        for _, z in ao.window_rows(windows, (40, 40), (24, 24), size):
            assert z.isfinite()[:, 0].all() and (z[:, 1] < -1e29).all()


def test_windows_of_different_resolutions() -> None:
    """One above the other, and beside each other."""
    sizes = ((8, 12), (12, 6), (12, 12))
    windows = [
        ((y, x), torch.randn(1, 3, *sizes[(y + x) // 8 % 3])) for y in (0, 8) for x in (0, 8)
    ]
    rows = [z for _, z in ao.window_rows(windows, (20, 20), (12, 12))]
    expected = formula(windows, (20, 20), (12, 12))
    torch.testing.assert_close(torch.cat(rows, 2).double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("low", [(8, 8), (32, 32)])
def test_nothing_is_read_back(low: Size) -> None:
    """Not even of tensors on the CPU, except of `weights`."""
    waits = {"lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
    windows = example((64, 70), (32, 32), (20, 20), low)
    weights = ao.gaussian_weights((32, 32))
    with Operators() as operators:
        for options in ({}, {"weights": weights, "softmax": True}, {"sigmoid": True}):
            ao.window_argmax(windows(), (64, 70), (32, 32), (50, 60), **options)
    used = {name.split(".")[1] for name in operators.names}
    assert {"pixel_argmax", "add_", "addcmul_"} <= used and not used & waits


@pytest.mark.parametrize("low", [(8, 8), (32, 32)])
def test_a_network_inside_of_the_windows(low: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference mode, which a generator begins and ends; and the logits of a window are gone
    when the next are computed."""
    monkeypatch.setattr(_windows, "BAND", 2**10)
    made: list[weakref.ref[Tensor]] = []

    def windows() -> Iterator[tuple[Size, Tensor]]:
        with torch.inference_mode():
            for origin in ao.window_origins((64, 70), (32, 32), (20, 20)):
                assert all(x() is None for x in made)
                logits = torch.randn(1, 3, *low)
                made.append(weakref.ref(logits))
                yield origin, logits
                del logits

    assert ao.window_argmax(windows(), (64, 70), (32, 32)).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("low", [(24, 24), (96, 96)])
def test_memory(low: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    """At stride 4 a tenth of the formula's; of full resolution the rows of one window."""
    monkeypatch.setattr(_windows, "BAND", 2**14)
    sizes, classes = ((288, 640), (96, 96)), 40
    windows = example(*sizes, (64, 64), low, classes)

    def by_formula() -> Tensor:
        sums, total = torch.zeros(1, classes, *sizes[0]), torch.zeros(sizes[0])
        for (y, x), z in windows():
            sums[..., y : y + 96, x : x + 96] += F.interpolate(z, (96, 96), mode="bilinear")
            total[y : y + 96, x : x + 96] += 1
        return sums.div_(total).argmax(1).to(torch.uint8)

    def ours() -> Tensor:
        return ao.window_argmax(windows(), *sizes, dtype=torch.uint8)

    most = 4 * classes * (288 * 640 / 10 if low == (24, 24) else 1.2 * (96 * 640 + 96 * 96))
    ours()
    assert peak_allocated_bytes(ours) < most
    assert peak_allocated_bytes(by_formula) > 4 * classes * 288 * 640


def test_origins_and_weights_are_those_of_monai() -> None:
    utils = pytest.importorskip("monai.inferers.utils", reason="MONAI is not installed")
    for image, window, stride in (
        ((20, 31), (8, 9), (5, 9)),
        ((9, 17, 12), (4, 5, 12), (2, 3, 7)),
        ((8, 8), (8, 8), (3, 3)),
    ):
        theirs = utils.dense_patch_slices(image, window, stride)
        origins = [tuple(part.start for part in slices) for slices in theirs]
        assert ao.window_origins(image, window, stride) == origins
        theirs = utils.compute_importance_map(window, mode="gaussian", sigma_scale=0.125)
        torch.testing.assert_close(ao.gaussian_weights(window), theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("image_size", [(40, 45), (14, 15, 18)])
def test_monai(image_size: Size) -> None:
    """Its inferer with a Gaussian, and a network of full resolution."""
    inferers = pytest.importorskip("monai.inferers", reason="MONAI is not installed")
    window = tuple(16 if len(image_size) == 2 else 8 for _ in image_size)
    conv = torch.nn.Conv2d if len(image_size) == 2 else torch.nn.Conv3d
    model, image = conv(1, 5, 3, padding=1), torch.randn(1, 1, *image_size)
    stride = tuple(n // 2 for n in window)

    def windows() -> Iterator[tuple[Size, Tensor]]:
        for o in ao.window_origins(image_size, window, stride):
            there = tuple(slice(a, a + n) for a, n in zip(o, window, strict=True))
            yield o, model(image[(..., *there)])

    with torch.no_grad():
        theirs = inferers.sliding_window_inference(image, window, 1, model, 0.5, "gaussian")
        weights = ao.gaussian_weights(window)
        rows = [z for _, z in ao.window_rows(windows(), image_size, window, weights=weights)]
        labels = ao.window_argmax(windows(), image_size, window, weights=weights)
    torch.testing.assert_close(torch.cat(rows, 2), theirs)
    assert (labels != theirs.argmax(1)).float().mean() < 5e-6


ONE = ((0, 0), torch.zeros(1, 2, 4, 4))
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"windows": []}, r"windows: expected at least one pair \(origin, logits\), got none"),
    ({"windows": [ONE[1]]}, r"windows\[0\]: expected \(origin, logits\), got torch.float32 tensor"),
    ({"windows": [ONE, ((4,), ONE[1])]}, r"windows\[1\]: origin: expected 2 ints, got \(4,\)"),
    ({"windows": [((4, 0), ONE[1]), ONE]}, r"windows\[1\]: origin: expected a first coordinate"),
    (
        {"windows": [((8, 0), ONE[1])]},
        r"windows\[0\]: origin: expected a window that meets",
    ),
    (
        {"windows": [((0, -4), ONE[1])]},
        r"windows\[0\]: origin: expected a window that meets",
    ),
    ({"windows": [ONE]}, r"windows\[0\]: expected every pixel before row .*the pixel \(4, 0\)"),
    (
        {"windows": [ONE, ((5, 0), ONE[1])]},
        r"windows\[1\]: expected every pixel before row .*the pixel \(4, 0\)",
    ),
    (
        {"windows": [((0, 1), ONE[1])]},
        r"windows\[0\]: expected every .* the pixel \(0, 0\)",
    ),
    ({"windows": [((0, 0), None)]}, r"windows\[0\]: logits: expected a tensor .*, got None"),
    ({"windows": [((0, 0), ONE[1][:, :1])]}, r"windows\[0\]: logits: expected at least 2 classes"),
    ({"windows": [((0, 0), ONE[1][..., None])]}, r"windows\[0\]: logits: expected .* of 4 axes"),
    (
        {"windows": [((0, 0), torch.zeros(1, 2, 4, 5))]},
        r"windows\[0\]: logits: expected at most",
    ),
    (
        {"windows": [ONE, ((4, 0), ONE[1].double())]},
        r"windows\[1\]: logits: expected images,",
    ),
    (
        {"windows": [ONE, ((4, 0), ONE[1].repeat(2, 1, 1, 1))]},
        r"windows\[1\]: logits: expected images",
    ),
    ({"image_size": (8,)}, r"image_size: expected two or three ints of at least 1, got \(8,\)"),
    ({"window_size": (4, 0)}, r"window_size: expected two ints of at least 1, got \(4, 0\)"),
    ({"size": (8, 8, 8)}, r"size: expected two ints of at least 1, got \(8, 8, 8\)"),
    ({"weights": torch.ones(4, 3)}, r"weights: expected a tensor of shape \(4, 4\) on the CPU"),
    ({"weights": torch.tensor([[1.0, 0], [1, 1]]).repeat(2, 2)}, "weights: expected .* above 0"),
    (
        {"weights": torch.full((4, 4), torch.nan)},
        "weights: expected .* got nan",
    ),
    ({"softmax": True, "sigmoid": True}, "softmax: expected False with sigmoid=True, got True"),
    ({"threshold": 0.3}, "threshold: expected 0.5 without sigmoid=True, got 0.3"),
    ({"dtype": torch.float32}, "dtype: expected uint8, .*, got torch.float32"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_messages(changed: dict[str, Any], message: str) -> None:
    arguments = {"windows": [ONE], "image_size": (8, 4), "window_size": (4, 4)} | changed
    with pytest.raises(ValueError, match=f"^window_argmax: {message}"):
        ao.window_argmax(**arguments)


def test_messages_of_origins_and_of_weights() -> None:
    with pytest.raises(ValueError, match=r"^window_origins: stride: expected at most the window's"):
        ao.window_origins((8, 8), (4, 4), (4, 5))
    with pytest.raises(ValueError, match=r"^window_rows: image_size: expected two or three ints"):
        ao.window_rows([], (8, True), (4, 4))
    with pytest.raises(ValueError, match=r"^gaussian_weights: floor: expected .* above 0, got 0"):
        ao.gaussian_weights((4, 4), floor=0)

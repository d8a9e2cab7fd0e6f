"""Sliding windows: window_argmax and window_rows against the formula with logits of the whole image,
memory, what is read back to the host, and messages."""

import itertools
import random
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
            inside = [all(-n < o < m for o, n, m in zip(x, window, image)) for x in origins]
            origins = [*itertools.compress(origins, inside)]
        dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
        logits = 2 * torch.randn(len(origins), rng.choice((1, 2)), classes, *low)
        size = None if rng.random() < 0.4 else tuple(rng.randint(3, 50) for _ in image)
        options = {
            "weights": torch.rand(window) + 0.1 if rng.random() < 0.4 else None,
            "softmax": not sigmoid and rng.random() < 0.3,
            "align_corners": rng.random() < 0.3,
        }
        return cls([*zip(origins, logits.to(dtype))], (image, window, size), options, sigmoid)


@pytest.mark.parametrize("seed", range(40))
def test_the_formula(seed: int) -> None:
    example = Example.of(seed)
    expected = formula(example.windows, *example.sizes, **example.options)
    pieces, first = [], 0
    for row, z in ao.window_rows(iter(example.windows), *example.sizes, **example.options):
        assert row == first
        first += z.shape[2]
        pieces.append(z)
    rows = torch.cat(pieces, 2)
    assert rows.dtype == (torch.float64 if example.windows[0][1].dtype == torch.float64 else torch.float32)
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

"""Labels of sliding windows, from the logits of each window, without logits of the whole image.

    z(p) = Σ_i w(p − o_i) · z_i(p − o_i) / Σ_i w(p − o_i)     over the windows i with pixel p

o_i is the origin of window i, z_i its upsampled logits, w the weights of its pixels. A band, some
rows of the image (slices of a volume), is computed when no later window can meet it. Windows of
low resolution are kept until then, and upsampled for one band after the other. Windows of full
resolution are added at once to all bands that they meet. Then z is resized, also some rows at once.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import (
    as_ints,
    check_axes,
    check_flags,
    check_floating,
    check_logits,
    check_number,
    check_threshold,
    describe,
    fail,
)
from ._moments import statistics_dtype
from ._ops.pixel_argmax import check_class_dtype, pixel_argmax
from ._shared.upsampling import bilinear_sources, rows_near

Windows = Iterable[tuple[Sequence[int], Tensor]]
Sources = tuple[Tensor, Tensor, Tensor]  # of bilinear_sources

# Numbers in a band: few, so that they stay in the caches of a CPU; on a GPU more, because small
# kernels take as long as their launches.
BAND, BAND_OF_GPU = 2**20, 2**24
LOWEST_LOGIT = -1e30  # instead of −∞, whose product with a weight of 0 would be NaN
MANY_CLASSES = 8  # from here on they are last in memory, where F.interpolate is then faster


def window_argmax(
    windows: Windows,
    image_size: Sequence[int],
    window_size: Sequence[int],
    size: Sequence[int] | None = None,
    *,
    weights: Tensor | None = None,
    softmax: bool = False,
    align_corners: bool = False,
    sigmoid: bool = False,
    threshold: float = 0.5,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """The predicted class of each pixel of an image whose logits are those of sliding windows.

    Equal to the usual formula, except for rounding where two classes are almost equal: the logits
    of each window are upsampled to its size and added, times `weights`, to logits of the whole
    image; these are divided by the sums of the weights and resized to `size`; then argmax(1). No
    logits of the whole image are stored, and `windows` is read as far as the next rows need it, so
    the network may run inside:

        size = image.shape[2:]  # at least (512, 512)
        origins = window_origins(size, (512, 512), (341, 341))
        windows = (((y, x), model(image[..., y : y + 512, x : x + 512])) for y, x in origins)
        labels = window_argmax(windows, size, (512, 512))

    Args:
        windows: pairs (origin, logits), in the order of the origins' first coordinate. origin: the
            window's first pixel in the image, (y, x) or (z, y, x); it may be negative, and the
            window may reach past the border: these pixels (padding) are dropped. logits: floating,
            (B, K, h, w) or (B, K, d, h, w), of the window in B images; any size up to the window's.
            −∞ is permitted. Every pixel must be in a window.
        image_size: (H, W) or (D, H, W) of the images that the windows cover.
        window_size: of a window, in pixels of the image.
        size: of the result, if the averages are resized once more: bilinear, of volumes trilinear.
        weights: floating [*window_size], on the CPU: of the pixels of a window, above 0. Without,
            each pixel is the mean over its windows.
        softmax: of the averages, before they are resized to `size`, as mmsegmentation does.
        align_corners: as in F.interpolate, of both resizes.
        sigmoid, threshold, dtype: as in `pixel_argmax`.

    Returns:
        The classes, of `dtype`, (B, *size); with `sigmoid` (B, K, *size) of 0 and 1.

    Float16 and bfloat16 are averaged in float32. Memory: windows of a lower resolution in one
    direction at least are kept until their last row: where n rows of windows meet in a pixel, some
    (n + 1) / 2 rows of windows, two if they overlap by half (beside each other, if the first axis
    has one window, all); of full resolution the sums of as many rows of the image as a window has.
    If windows overlap along the last axis alone, transpose the image. On a GPU nothing is read back
    to the host. torch.compile breaks the graph at the call.

    Raises:
        ValueError: wrong shape, dtype, device, size or option; windows that are not in order, that
            do not meet the image, or differ in B, K, dtype or device; a pixel without a window;
            weights that are not above 0. It names the window by its place in `windows`.
    """
    function = "window_argmax"
    check_flags(function, sigmoid=sigmoid)
    if softmax and sigmoid:
        fail(function, "softmax", "False with sigmoid=True", "True")
    if check_threshold(function, threshold) != 0.5 and not sigmoid:
        fail(function, "threshold", "0.5 without sigmoid=True", describe(threshold))
    check_class_dtype(function, dtype, 2)
    options = weights, softmax, align_corners, sigmoid
    merged = _Merged(function, image_size, window_size, size, *options)
    labels, axis = None, 2 if sigmoid else 1
    for rows, z in merged.blocks(windows):
        block_size = (rows.stop - rows.start, *merged.size[1:])
        if labels is None:
            check_class_dtype(function, dtype, 2 if sigmoid else z.shape[1])
            with torch.inference_mode(False):  # a generator may begin and end inference mode
                labels = z.new_empty((*z.shape[:axis], *merged.size), dtype=dtype)
        labels.narrow(axis, rows.start, block_size[0])[:] = pixel_argmax(
            z,
            block_size,
            align_corners=align_corners,
            dtype=dtype,
            sigmoid=sigmoid,
            threshold=threshold,
        )
    assert labels is not None
    return labels


def window_rows(
    windows: Windows,
    image_size: Sequence[int],
    window_size: Sequence[int],
    size: Sequence[int] | None = None,
    *,
    weights: Tensor | None = None,
    softmax: bool = False,
    align_corners: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """The averages whose argmax `window_argmax` takes, some rows at a time, for any other use: the
    number of the first row, and logits (B, K, rows, …) of the next rows (slices of a volume), in
    float32 (float64 of float64 logits). With `softmax` these are probabilities.

    For one `size`, B, K and device the rows come in the same pieces whatever the windows are, so
    several scales or networks can be added:

        for pairs in zip(*[window_rows(…, size) for … in scales], strict=True):
            mean = sum(z.softmax(1) for _, z in pairs) / len(pairs)

    Arguments, limits and errors are those of `window_argmax`.
    """
    options = weights, softmax, align_corners, True
    merged = _Merged("window_rows", image_size, window_size, size, *options)
    blocks = merged.blocks(windows)
    return ((rows.start, _stretched(z, merged.size[1:], align_corners)) for rows, z in blocks)


def window_origins(
    image_size: Sequence[int], window_size: Sequence[int], stride: Sequence[int]
) -> list[tuple[int, ...]]:
    """The origins of windows that cover an image, in the order that `window_argmax` needs. Along
    each axis they are multiples of the stride; the last window ends where the image ends. If the
    image is shorter than a window, the origin is 0; its crop is then smaller than the window: give
    `window_argmax` the crop's size as window_size, or pad the crop. They are those of
    mmsegmentation, DINOv3 and, with the stride int(window · (1 − overlap)), MONAI.

    Args:
        image_size, window_size, stride: (H, W) or (D, H, W), in pixels; no stride is longer than
            the window.

    Raises:
        ValueError: sizes or strides that are not such ints.
    """
    function = "window_origins"
    image_size = _check_lengths(function, "image_size", image_size)
    window_size = _check_lengths(function, "window_size", window_size, len(image_size))
    stride = _check_lengths(function, "stride", stride, len(image_size))
    if any(step > window for step, window in zip(stride, window_size, strict=True)):
        fail(function, "stride", f"at most the window's size, {window_size}", stride)
    axes = zip(image_size, window_size, stride, strict=True)
    return [*product(*([*range(0, n - window, s), max(0, n - window)] for n, window, s in axes))]


def gaussian_weights(
    window_size: Sequence[int], sigma_scale: float = 0.125, floor: float = 1e-3
) -> Tensor:
    """Weights of the pixels of a window, largest in its middle: those of MONAI's "gaussian".

        w(p) = max(Π_a exp(−(p_a − c_a)² / (2·σ_a²)), floor),  c = (n − 1) / 2,  σ = sigma_scale · n

    Args:
        window_size: n, (h, w) or (d, h, w).
        sigma_scale: above 0.
        floor: the smallest weight, above 0.

    Returns:
        float32 [*window_size], on the CPU.

    Raises:
        ValueError: sizes that are not ints of at least 1, or numbers that are not above 0.
    """
    function = "gaussian_weights"
    sigma_scale = check_number(function, "sigma_scale", sigma_scale, above=True)
    floor = check_number(function, "floor", floor, above=True)
    weights = torch.ones((), dtype=torch.float32, device="cpu")
    for n in _check_lengths(function, "window_size", window_size):
        x = torch.arange(n, dtype=torch.float32, device="cpu") - (n - 1) / 2
        weights = weights[..., None] * (x / (sigma_scale * n)).square().mul(-0.5).exp()
    return weights.clamp(min=floor)


def _check_lengths(
    function: str, argument: str, lengths: Any, axes: int | None = None
) -> tuple[int, ...]:
    ints = as_ints(lengths)
    if ints is None or len(ints) not in ((2, 3) if axes is None else (axes,)) or min(ints) < 1:
        count = {None: "two or three", 2: "two", 3: "three"}[axes]
        fail(function, argument, f"{count} ints of at least 1", describe(lengths))
    return ints


def _check_weights(function: str, weights: Any, window_size: tuple[int, ...]) -> None:
    axes = len(window_size)
    check_floating(function, "weights", weights, (axes,), f"of shape {window_size}")
    if weights.shape != window_size or weights.device.type != "cpu":
        expected = f"a tensor of shape {window_size} on the CPU"
        fail(function, "weights", expected, describe(weights))
    numbers = weights.detach().double().numpy()
    normal = torch.finfo(torch.float32)
    wrong = numbers[~((numbers >= normal.tiny) & (numbers <= normal.max / 2**32))]
    if wrong.size:
        fail(function, "weights", "numbers above 0, of 1.2e-38 to 7.9e28", wrong[0])


class _Window(NamedTuple):
    """place: in `windows`. logits: (B, K, …), of low resolution without the rows before `first`."""

    place: int
    origin: tuple[int, ...]
    logits: Tensor
    first: int = 0


class _Band:
    """Some rows of the image, and the sums of the windows in them."""

    def __init__(self, rows: slice) -> None:
        self.rows = rows
        self.sums: Tensor | None = None  # (B, K, rows, …), made for the first window
        self.total: Tensor | None = None  # of the weights, (rows, …)
        self.covered: np.ndarray | None = None  # the same on the host: has each pixel a window?


class _Merged:
    """The averages of windows; the arguments are those of `window_argmax`."""

    def __init__(
        self,
        function: str,
        image_size: Any,
        window_size: Any,
        size: Any,
        weights: Any,
        softmax: bool,
        align_corners: bool,
        one_class: bool,
    ) -> None:
        check_flags(function, softmax=softmax, align_corners=align_corners)
        self.function, self.one_class = function, one_class
        self.image_size = _check_lengths(function, "image_size", image_size)
        axes = len(self.image_size)
        self.window_size = _check_lengths(function, "window_size", window_size, axes)
        self.size = (
            self.image_size if size is None else _check_lengths(function, "size", size, axes)
        )
        if weights is not None:
            _check_weights(function, weights, self.window_size)
        self.weights = weights
        self.softmax, self.align_corners = softmax, align_corners
        self.sources: dict[int, Sources] = {}  # of windows with so many rows of logits

    def blocks(self, windows: Windows) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of the result, and their averages (B, K, rows, …): the first axis has been
        resized, the others not."""
        averages = self._averages(windows)
        parts = [next(averages)]  # rows of the image that are still needed, from `begin` on
        begin, end = 0, parts[0].shape[2]
        rows, source = self.size[0], self.image_size[0]
        sources = _sources(rows, source, self.align_corners, parts[0])
        for block in _pieces(rows, self.size[1:], parts[0]):
            near = block if rows == source else rows_near(block, rows, source)
            while end < near.stop:
                parts.append(next(averages))
                end += parts[-1].shape[2]
            while begin + parts[0].shape[2] <= near.start:
                begin += parts.pop(0).shape[2]
            parts[0], begin = parts[0][:, :, near.start - begin :], near.start
            z = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
            z = z[:, :, : near.stop - near.start]
            yield block, z if rows == source else _upsampled_rows(z, begin, block, sources)

    def _averages(self, windows: Windows) -> Iterator[Tensor]:
        """Those of the next rows of the image, (B, K, rows, …)."""
        bands: deque[_Band] = deque()
        kept: list[_Window] = []  # of low resolution, until their last row
        place = 0
        for window in self._checked(windows):
            if window.place == 0:
                pieces = _pieces(self.image_size[0], self.image_size[1:], window.logits)
                bands.extend(map(_Band, pieces))
                weights = self.weights
                if weights is not None:
                    weights = weights.detach().to(window.logits.device, _dtype(window.logits))
            place, top = window.place, window.origin[0]
            while bands[0].rows.stop <= top:
                yield self._average(bands.popleft(), kept, weights, place)
            if kept and top > kept[-1].origin[0]:
                for i in range(len(kept)):  # one by one, so that a single one exists twice
                    kept[i] = self._without_rows(kept[i], bands[0].rows.start)
                kept = [x for x in kept if x.logits.shape[2] > 0]
            if window.logits.shape[2:] == self.window_size:
                bottom = top + self.window_size[0]
                for band in bands:
                    if band.rows.start < bottom:
                        self._add(band, [window], weights)
            else:
                kept.append(self._without_rows(window, bands[0].rows.start))
            del window  # its logits are copied, or added
        while bands:
            yield self._average(bands.popleft(), kept, weights, place)

    def _checked(self, windows: Windows) -> Iterator[_Window]:
        like, known, before = None, "", None
        numbers = count()
        for window in windows:  # enumerate would keep the last window while the next is computed
            place = next(numbers)
            name = f"{self.function}: windows[{place}]"
            if not isinstance(window, tuple | list) or len(window) != 2:
                fail(self.function, f"windows[{place}]", "(origin, logits)", describe(window))
            origin, logits = as_ints(window[0]), window[1]
            axes = len(self.image_size)
            if origin is None or len(origin) != axes:
                fail(name, "origin", f"{axes} ints", describe(window[0]))
            check_logits(name, logits, sigmoid=self.one_class, points=False)
            if logits.dim() != axes + 2 or logits.numel() == 0:
                fail(name, "logits", f"a tensor of {axes + 2} axes, not empty", describe(logits))
            if any(n > most for n, most in zip(logits.shape[2:], self.window_size, strict=True)):
                fail(name, "logits", f"at most {self.window_size} pixels", describe(logits))
            check_axes(name, logits, self.window_size)
            kind = (logits.shape[:2], logits.dtype, logits.device)
            if like is None:
                like, known = kind, describe(logits)
            if kind != like:
                expected = f"images, classes, dtype and device of windows[0], {known}"
                fail(name, "logits", expected, describe(logits))
            if before is not None and origin[0] < before:
                expected = f"a first coordinate of at least {before}, that of the window before"
                fail(name, "origin", expected, origin)
            if any(
                o >= n or o + window <= 0
                for o, n, window in zip(origin, self.image_size, self.window_size, strict=True)
            ):
                expected = f"a window that meets the image of {self.image_size}"
                fail(name, "origin", expected, f"{origin}, size {self.window_size}")
            before = origin[0]
            checked = _Window(place, origin, logits.detach())
            del window, logits
            yield checked
            del checked
        if like is None:
            fail(self.function, "windows", "at least one pair (origin, logits)", "none")

    def _without_rows(self, window: _Window, start: int) -> _Window:
        """A copy, without the rows of logits that only rows before `start` of the image need."""
        begin, height = start - window.origin[0], self.window_size[0]
        z, source = window.logits, window.logits.shape[2] + window.first
        first = source
        if begin < height:
            first = rows_near(slice(max(begin, 0), height), height, source).start
        z, last = z[:, :, first - window.first :], z.shape[1] >= MANY_CLASSES
        z = z.movedim(1, -1) if last else z
        z = z.clone(memory_format=torch.contiguous_format)
        return window._replace(logits=z.movedim(-1, 1) if last else z, first=first)

    def _add(self, band: _Band, windows: Sequence[_Window], weights: Tensor | None) -> None:
        """Adds the pixels that windows have in the band: of one, or without weights of several of
        low resolution, one above the other. These are added before their columns are upsampled."""
        sizes = (band.rows.stop - band.rows.start, *self.image_size[1:])
        parts, places, there, inside = [], [], (), ()
        for window in windows:
            offsets = (window.origin[0] - band.rows.start, *window.origin[1:])
            axes = [*zip(offsets, sizes, self.window_size, strict=True)]
            there = tuple(slice(max(o, 0), min(o + n, most)) for o, most, n in axes)
            inside = tuple(slice(max(-o, 0), min(n, most - o)) for o, most, n in axes)
            if there[0].start < there[0].stop:
                parts.append(self._rows(window, inside[0]))
                places.append((there, inside))
        if not parts:
            return
        if band.sums is None or band.total is None or band.covered is None:
            with torch.inference_mode(False):  # a generator may begin and end inference mode
                band.sums = _zeros(parts[0], sizes)
                band.total = band.sums.new_zeros(sizes)
            band.covered = np.zeros(sizes, dtype=bool)
        z, rows = parts[0], places[0][0][0]
        if len(parts) > 1:
            z, rows = _zeros(z, (sizes[0], *z.shape[3:])), slice(None)
            for part, (there, _) in zip(parts, places, strict=True):
                z[:, :, there[0]].add_(part)
        z = _stretched(z, self.window_size[1:], self.align_corners)[(..., *inside[1:])]
        sums = band.sums[(..., rows, *there[1:])]
        sums.add_(z) if weights is None else sums.addcmul_(z.to(sums.dtype), weights[inside])
        for there, inside in places:
            band.total[there].add_(1 if weights is None else weights[inside])
            band.covered[there] = True

    def _rows(self, window: _Window, rows: slice) -> Tensor:
        """These rows of the upsampled window, (B, K, rows, …); the other axes as they are."""
        source = window.logits.shape[2] + window.first
        if window.logits.shape[2:] == self.window_size:
            return window.logits[:, :, rows]
        if source not in self.sources:
            axis = self.window_size[0], source, self.align_corners
            self.sources[source] = _sources(*axis, window.logits)
        return _upsampled_rows(window.logits, window.first, rows, self.sources[source])

    def _average(
        self, band: _Band, kept: list[_Window], weights: Tensor | None, place: int
    ) -> Tensor:
        """place: of the last window that was read."""
        columns: dict[Any, list[_Window]] = {}
        for window in kept:
            column = window.origin[1:], window.logits.shape[3:]
            columns.setdefault(column if weights is None else window.place, []).append(window)
        for one_above_the_other in columns.values():
            self._add(band, one_above_the_other, weights)
        if band.covered is None or not band.covered.all():
            row, *others = (0,) * len(self.size)
            if band.covered is not None:
                row, *others = np.argwhere(~band.covered)[0].tolist()
            pixel = (band.rows.start + row, *others)
            expected = f"every pixel before row {band.rows.stop} of the image in a window before"
            fail(self.function, f"windows[{place}]", expected, f"none with the pixel {pixel}")
        assert band.sums is not None and band.total is not None
        z = band.sums.div_(band.total)
        return z.softmax(1) if self.softmax else z


def _dtype(logits: Tensor) -> torch.dtype:
    return statistics_dtype(logits.dtype)


def _pieces(length: int, others: Sequence[int], logits: Tensor) -> list[slice]:
    """All rows, some at a time: as many as a band has. others: the sizes of the other axes."""
    row = math.prod(others) * logits.shape[0] * logits.shape[1]
    most = max(1, (BAND if logits.device.type == "cpu" else BAND_OF_GPU) // row)
    return [slice(first, min(first + most, length)) for first in range(0, length, most)]


def _zeros(z: Tensor, sizes: Sequence[int]) -> Tensor:
    """(B, K, *sizes), with the classes last in memory if those of z are."""
    batch, classes = z.shape[:2]
    if z.stride(1) != 1:
        return z.new_zeros((batch, classes, *sizes), dtype=_dtype(z))
    return z.new_zeros((batch, *sizes, classes), dtype=_dtype(z)).movedim(-1, 1)


def _sources(size: int, source: int, align_corners: bool, logits: Tensor) -> Sources:
    """`bilinear_sources`, but both rows are the first where the second has the weight 0: 0 · NaN
    would be NaN."""
    lower, upper, weight = bilinear_sources(
        size, source, align_corners, _dtype(logits), logits.device
    )
    return lower, torch.where(weight == 0, lower, upper), weight


def _upsampled_rows(z: Tensor, first: int, rows: slice, sources: Sources) -> Tensor:
    """These rows of an upsampled image, (B, K, rows, …), from those of z. first: of z in the image
    before. The classes stay where they are in memory."""
    lower, upper, weight = (x[rows] for x in sources)
    last = z.stride(1) == 1
    x, axis = (z.movedim(1, -1), 1) if last else (z, 2)
    low, high = (
        x.index_select(axis, index - first).to(weight.dtype).clamp_(min=LOWEST_LOGIT)
        for index in (lower, upper)
    )
    x = low.lerp_(high, weight.view(-1, *(1,) * (x.dim() - axis - 1)))
    return x.movedim(-1, 1) if last else x


def _stretched(z: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """The axes after the rows of z (B, K, rows, …) upsampled: the slices of a volume are images,
    and the rows of an image are images of one row."""
    if z.shape[3:] == (*size,):
        return z
    batch, _, rows = z.shape[:3]
    images = z.clamp(min=LOWEST_LOGIT).movedim(2, 1).flatten(0, 1)
    images = images if len(size) == 2 else images[:, :, None]
    new = size if len(size) == 2 else (1, *size)
    images = F.interpolate(images, new, mode="bilinear", align_corners=align_corners)
    images = images if len(size) == 2 else images[:, :, 0]
    return images.unflatten(0, (batch, rows)).movedim(1, 2)

"""Label maps for the time model, of street scenes and random, and the keys in their tiles."""

from functools import cache
from typing import NamedTuple

import numpy as np


class Group(NamedTuple):
    """Of 32 pixels, where runs begin. Of each time that totals go to a sink, and of pixels that
    are scattered: whether it is in shared memory."""

    two: tuple[bool, ...] = ()  # keys, in one go
    mixed: tuple[bool, ...] = ()  # whether each 8 pixels have both
    keys: tuple[bool, ...] = ()  # one after the other
    of_keys: tuple[tuple[int, ...], ...] = ()  # pixels of each in each 8 pixels
    scattered: tuple[bool, ...] = ()  # the pixels, and the key before them


@cache
def label_maps(kind: str, batch: int, height: int, width: int, classes: int) -> np.ndarray:
    """int [batch, height, width], 255 for ignored pixels.

    "images": each has four bands with uneven edges, like sky, buildings, ground and road; 16
    objects of 3 to 40 pixels in front of them, small ones at the horizon; three poles; and a border
    of ignored pixels. "random": each pixel drawn independently.
    """
    random = np.random.default_rng(0)
    if kind == "random":
        return random.integers(0, classes, (batch, height, width))
    maps = np.empty((batch, height, width), int)
    y, x = np.mgrid[:height, :width]
    for labels in maps:
        labels[:] = random.integers(classes)
        for level in (0.35, 0.55, 0.7):
            phases, periods = random.uniform(0, 6, 4), random.uniform(8, width / 2, 4)
            edge = level * height + sum(
                2 * np.sin(x[0] / period + phase)
                for phase, period in zip(phases, periods, strict=True)
            )
            labels[y > edge] = random.integers(classes)
        for _ in range(16):
            size = 3 + 37 * random.random() ** 3
            bottom, left = height * (0.5 + 0.4 * size / 40), random.integers(width)
            inside = (abs(x - left) < size / 2) & (y > bottom - 1.5 * size) & (y <= bottom)
            if random.random() < 0.5:  # round
                inside &= (x - left) ** 2 + (y - bottom + size / 2) ** 2 < size**2 / 3
            labels[inside] = random.integers(classes)
        for left in random.integers(width, size=3):
            labels[(x == left) & (y > 0.2 * height) & (y < 0.7 * height)] = random.integers(classes)
        labels[-height // 25 :] = 255
    return maps


def groups_of_chunk(keys: np.ndarray, rows: int, many: int = 12) -> list[Group | None]:
    """How class_moments_kernel takes the groups of 32 pixels of a chunk, given its keys in order
    (−1 where ignored) and the rows of its tables. None: no run begins."""
    here = {-1: True}  # whether the row of a key that was met is in shared memory
    held, groups = -1, []

    def add(key: int) -> bool:
        return here.setdefault(key, len(here) < rows)

    for group in keys.reshape(-1, 32).tolist():
        before = [held, *group[:-1]]
        runs = sum(key != last for key, last in zip(group, before, strict=True))
        others = set(group) - {held}
        if runs == 0:
            groups.append(None)
        elif len(others) == 1:
            sink = add(others.pop() if group[-1] == held else held)
            mixed = tuple(len(set(group[i : i + 8])) > 1 for i in range(0, 32, 8))
            groups.append(Group((sink,), mixed))
        elif runs > many:
            placed = [add(key) for key in group]
            groups.append(Group(scattered=(all(placed), add(held))))
        else:
            order = list(dict.fromkeys(key for key in group if key != held))
            turns = [held, *order]
            pixels = [tuple(group[i : i + 8].count(key) for i in range(0, 32, 8)) for key in turns]
            turns += [group[-1]] * (order[-1] != group[-1])
            groups.append(Group(keys=tuple(add(key) for key in turns[:-1]), of_keys=tuple(pixels)))
        held = group[-1]
    return groups


def rows_of_loads(keys: np.ndarray, pixels_per_lane: int) -> float:
    """Rows of a table that a warp's lanes read at once, with this number of pixels per lane."""
    warps = keys.reshape(-1)[: keys.size // (32 * pixels_per_lane) * 32 * pixels_per_lane]
    warps = warps.reshape(-1, 32, pixels_per_lane)
    some = warps[:: max(1, len(warps) // 500)]
    return float(np.mean([len(np.unique(warp[:, i])) for warp in some for i in (0, -1)]))

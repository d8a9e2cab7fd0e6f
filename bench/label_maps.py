"""Label maps for the time model: street scenes and random labels; the tiles of a chunk."""

from functools import cache
from typing import NamedTuple

import numpy as np

SLOTS = 32  # keys that a warp sums at a time, as in class_moments_slots.cuh


class Pass(NamedTuple):
    """A pass of a warp over a tile: it adds the pixels whose keys have a slot."""

    found: int = 0  # keys that get a slot
    lower: bool = True  # whether it has pixels with one of the first 16 slots, of the others
    upper: bool = False
    evicts: bool = False  # frees all slots afterwards, for other keys of the tile


class Uniform(NamedTuple):
    """A tile in which all pixels have the same key: one that has a slot, or none."""

    ignored: bool  # the pixels have no key
    ends_run: bool = False  # the last uniform tile had another key


Tile = tuple[Pass, ...] | Uniform


@cache
def label_maps(kind: str, batch: int, height: int, width: int, classes: int) -> np.ndarray:
    """int [batch, height, width], 255 for ignored pixels.

    "images": each image has four bands with uneven edges, like sky, buildings, ground and road; 16
    objects of 3 to 40 pixels in front of them, the small ones at the horizon; three poles; and a
    border of ignored pixels. "random": the label of each pixel is drawn independently.
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


def tiles_of_chunk(
    keys: np.ndarray, tile: int, uniform: bool, skips: bool, count: int = SLOTS
) -> list[Tile]:
    """What class_moments_kernel does with each tile of a chunk. keys: those of the chunk's pixels
    in order, −1 where ignored. uniform: whether the kernel has a path for uniform tiles. skips:
    whether it skips the products of the upper half of the slots where a tile does not need them.
    count: of the slots."""
    slots: dict[int, int] = {}  # of keys
    run: int | None = None  # the key of the last uniform tile
    tiles: list[Tile] = []
    for pixels in keys.reshape(-1, tile).tolist():
        key = pixels[0]
        if uniform and (key < 0 or key in slots) and pixels.count(key) == tile:
            tiles.append(Uniform(key < 0, key >= 0 and run is not None and key != run))
            run = run if key < 0 else key
            continue
        # a lane has two pixels, and all first pixels get their slots before the second ones
        passes, left = [], [key for key in dict.fromkeys(pixels[::2] + pixels[1::2]) if key >= 0]
        while left or not passes:
            unmet = [key for key in left if key not in slots]
            found = unmet[: count - len(slots)]
            slots |= {key: len(slots) + i for i, key in enumerate(found)}
            own = [slots[key] for key in left if key in slots]
            many = len(slots) > SLOTS // 2
            upper = many and (not skips or any(slot >= SLOTS // 2 for slot in own))
            lower = not (many and skips) or any(slot < SLOTS // 2 for slot in own)
            left = unmet[len(found) :]
            passes.append(Pass(len(found), lower, upper, bool(left)))
            if left:
                slots.clear()
                run = None
        tiles.append(tuple(passes))
    return tiles


def bank_cycles(keys: np.ndarray, pixels_per_lane: int, row_vectors: int) -> float:
    """Cycles in which a warp reads 16 bytes of a row for each lane from shared memory, on average.
    Eight lanes read at once; different rows that begin in the same four banks follow one another.
    row_vectors: of 16 bytes, from a row to the next."""
    size = 32 * pixels_per_lane
    warps = np.maximum(keys, 0).reshape(-1)[: keys.size // size * size]
    some = warps.reshape(-1, 32, pixels_per_lane)[:: max(1, keys.size // size // 500)]
    eights = some[:, :, [0, -1]].transpose(0, 2, 1).reshape(-1, 8)
    return 4 * float(np.mean([np.bincount(np.unique(x) * row_vectors % 8).max() for x in eights]))


def lines_of_loads(order: np.ndarray, itemsize: int) -> float:
    """How many lines of 128 bytes of a plane the lanes of a warp read at once, on average, if they
    read the pixels in this order."""
    warps = order[: order.size // 32 * 32].reshape(-1, 32)
    some = warps[:: max(1, len(warps) // 500)] * itemsize // 128
    return float(np.mean([len(np.unique(warp)) for warp in some]))

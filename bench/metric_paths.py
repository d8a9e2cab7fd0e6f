"""The paths of predictions and of the confusion matrix through their machine code, at the labels'
size. See softmax_paths.py for what determines a time."""

import math

from shapes import HRNET, SEGFORMER, Shape
from small_paths import MEMSET, RATIO, Launches, Row
from softmax_paths import Code, Library, Sweep, waiting
from time_model import MEMORY, Path

CLASSES, THREADS, PIXELS = 32, 256, 16  # staged at a time; of a block; of a thread
HEADS = 2  # assumed: pairs of classes in the last pixels of a warp's threads


def argmax_path(code: Code, num_classes: int) -> Path:
    loop = code.those(lambda b: b.count("LDS$") == 4 and b.count("FMUL") == 24)[:1]
    sweep = Sweep(code, CLASSES, loop, classes_of_loop=1)
    stored = code.those(lambda b: b.count(r"STG\.E\.64") == 15)
    *counts, last = sweep.counts(num_classes)
    path = sweep.enter()
    for i, count in enumerate(counts):
        path = path + sweep.staged(i == 0) + sweep.looped(count) + code.walk(loop, sweep.load)
    path = path + sweep.staged(not counts) + sweep.looped(last) + code.walk(loop, stored)
    return path + code.blocks[stored[0]].instructions


def confusion_path(code: Code) -> Path:
    """Labels of 64 bits. In a round, the labels and predictions of four pixels are loaded."""
    narrow = code.those(lambda b: b.count("LDG") > b.count(r"LDG\.E\.64"))
    reads = [[i] for i in code.those(lambda b: b.count("LDG") > 0, narrow[-1])]
    ends = code.those(lambda b: b.count("SHFL") == 1)
    sums = code.those(lambda b: b.count(r"SHFL\.BFLY") == 5)
    path = code.walk([0], *reads * (PIXELS // 4), ends, *[sums] * HEADS, code.exits[-1:])
    return waiting(path, MEMORY, 2)


def argmax_row(library: Library, shape: Shape, title: str) -> Row:
    launches, name = Launches(library), "pixel_argmax_kernel"
    path = argmax_path(launches.code(name), shape.classes)
    blocks = math.ceil(shape.batch * (shape.width + 2) / 32) * math.ceil((shape.height + 1) / 8)
    moved = (2 * shape.classes + 8 * RATIO**2) * shape.pixels
    launches.add(name, path, blocks, 9 * 33 * (12 + 4 * CLASSES), moved, THREADS)
    return Row("pixel argmax", f"{title}, bf16", launches.times)


def confusion_row(library: Library, shape: Shape, title: str) -> Row:
    launches, name = Launches(library), "confusion_kernel"
    launches.times = [("memset", MEMSET)]
    pixels = RATIO**2 * shape.pixels
    path, blocks = confusion_path(launches.code(name)), math.ceil(pixels / (THREADS * PIXELS))
    launches.add(name, path, blocks, 0, 16 * pixels, THREADS)
    return Row("confusion matrix", f"{title}, int64", launches.times)


def rows(library: Library) -> list[Row]:
    shapes = {"HRNet": HRNET, "SegFormer": SEGFORMER}
    shapes["SegFormer, 171 classes"] = SEGFORMER._replace(classes=171)
    found = [argmax_row(library, shape, title) for title, shape in shapes.items()]
    return found + [confusion_row(library, shape, title) for title, shape in shapes.items()]

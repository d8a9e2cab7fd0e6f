"""The paths of the operators on K rows or K numbers, and on the rows of random groups.

As in small_paths.py, the time of a kernel is the larger one of two times: that of its warps, and
that of moving its bytes. Inputs were written by the kernels before, so loads have the latency of
the second-level cache. Warps of a block do not wait for each other in the model.
"""

import math

from shapes import HRNET, SEGFORMER
from small_paths import (
    Launches,
    Row,
    gradient_paths,
    gradient_seconds,
    logits_path,
)
from softmax_paths import Code, Library, waiting
from time_model import CLOCK, L2, LAUNCH, MULTIPROCESSORS, Path, simulate

THREADS = 128  # of a block with a warp for each row
LANES, AT_ONCE = 32, 8  # row_lanes.cuh
REDUCED, CENTER = 128, 512  # channels of CeCo's reduced features and of its centers
FLOAT = r"LDG\.E$"


def rounds(numbers: int) -> int:
    """Of a lane that processes its part of a row."""
    return math.ceil(numbers / (LANES * AT_ONCE))


def singly(blocks: list[int]) -> list[list[int]]:
    """Stops at each of the blocks."""
    return [[i] for i in blocks]


# --- SAR ------------------------------------------------------------------------------------------


def cross_entropy_path(code: Code, classes: int) -> Path:
    """Loops over a row four numbers at a time, and over the rest."""
    four, one = divmod(math.ceil(classes / LANES), 4)
    loops = code.those(lambda b: b.count(FLOAT) in (1, 4))
    loops = [i for i in loops if i in code.blocks[i].next]
    ones = [i for i in loops if code.blocks[i].count(FLOAT) == 1]
    fours = [i for i in loops if i not in ones]
    path = [
        stop
        for pair in zip(ones, fours, strict=True)
        for stop in sorted(singly([pair[0]] * one + [pair[1]] * four))
    ]
    return code.walk([0], *path, code.exits[-1:])


def cross_entropy_backward_path(code: Code, classes: int) -> Path:
    """The same, and a loop whose divisions have branches."""
    four, one = divmod(math.ceil(classes / LANES), 4)
    loops = code.those(lambda b: b.count(FLOAT) > 0)
    loops = [i for i in loops if i in code.blocks[i].next]
    sums = [[i] for i in loops for _ in range(one if code.blocks[i].count(FLOAT) == 1 else four)]
    stores = code.those(lambda b: b.count("STG") == 1)
    each = singly(stores[:1]) * one + singly(stores[1:]) * four
    return code.walk([0], *sums, *each, code.exits[-1:])


def gated_average_path(code: Code, classes: int, dim: int) -> Path:
    """All gates are one, and the average is replaced."""
    four, one = divmod(math.ceil(classes / LANES), 4)
    flags = code.those(lambda b: b.count(r"LDG\.E\.U8") == 4)[:1]
    flag = code.those(lambda b: b.count(r"LDG\.E\.U8") == 1)[-1:]
    started = code.those(lambda b: b.count(FLOAT) == AT_ONCE)[:1]
    both = code.those(lambda b: b.count(FLOAT) == 2 * AT_ONCE)[:1]
    stored = singly(code.those(lambda b: b.count("STG") == 2, both[0]))
    read, moved = [started] * rounds(dim), [both, *stored] * rounds(dim)
    return code.walk([0], *[flags] * four, *[flag] * one, *read, *moved, code.exits[-1:])


def anchor_losses_path(code: Code, classes: int, of_anchors: bool) -> Path:
    """The warp of the anchors, which takes longer; otherwise that of the pixels, without gates."""
    lanes = math.ceil(classes / LANES)
    assert lanes <= AT_ONCE
    if not of_anchors:
        counts = code.those(lambda b: b.count(r"LDG\.E\.64") == AT_ONCE and not b.count(r"LDG.*U8"))
        slopes = code.those(lambda b: b.count("STG") == AT_ONCE, counts[0])
        return code.walk([0], counts[:1], slopes[-1:], code.exits)
    given = code.those(lambda b: b.count(FLOAT) == b.count(r"LDG\.E\.U8") == AT_ONCE)[:1]
    terms = code.those(lambda b: b.count(r"MUFU\.EX2") == 1 and b.count("FADD") == 3, given[0])
    again = code.those(lambda b: b.count(FLOAT) == AT_ONCE and not b.count("LDG.*U8"), terms[-1])
    # reweighted, with the gradient of the weights
    slopes = code.those(lambda b: b.count(r"MUFU\.RCP") == 1 and b.count("FADD") == 2, again[0])
    return code.walk([0], given, *singly(terms[:lanes]), again[:1], *singly(slopes[:lanes]),
                     code.exits)  # fmt: skip


# --- OCCL and MVSC --------------------------------------------------------------------------------


def unit_rows_path(code: Code, dim: int, groups: int, counts: bool) -> Path:
    """Of a warp that adds this number of rows."""
    start = code.those(lambda b: b.count(r"LDG\.E\.64") == 1)[:1] if counts else []
    loads = code.those(lambda b: b.count(FLOAT) == 2)
    stores = code.those(lambda b: b.count("STG") == 1 and b.count("FFMA") == 2)
    # in the code those with counts come first
    which = slice(0, AT_ONCE) if counts else slice(AT_ONCE, None)
    row = [*[start] * counts, *singly(loads[which] + stores[which]) * rounds(dim)]
    again = code.those(lambda b: b.count(FLOAT) == AT_ONCE, stores[-1])[:1]
    scaled = singly(code.those(lambda b: b.count("STG") == 2, again[0] - 1))
    present = code.those(lambda b: b.count(r"LDG\.E\.64") == 1)[-1:]
    of_groups = [present] * (groups if counts else 0)
    return code.walk([0], *row * groups, *[again, *scaled] * rounds(dim), *of_groups, code.exits)


def unit_rows_backward_path(code: Code, dim: int, counts: bool, means: bool) -> Path:
    products = code.those(lambda b: b.count(FLOAT) == 2 * AT_ONCE)[:1]
    start = code.those(lambda b: b.count(r"LDG\.E\.64") == 1) if counts else []
    after = products[0]
    loads = code.those(lambda b: b.count(FLOAT) > 0, after)
    # in the code those with the gradients of means come first
    of_both = next(n for n, i in enumerate(loads) if code.blocks[i].count(FLOAT) > 3)
    chosen = loads[:of_both] if means else loads[of_both : of_both + 2]
    stores = code.those(lambda b: b.count("STG") > 0 and b.count("FFMA") > 0, after)
    each = singly(chosen + stores) * rounds(dim)
    return code.walk([0], *[start] * counts, *[products] * rounds(dim), *each, code.exits[-1:])


def halves_start(code: Code) -> list[list[int]]:
    """Two random halves of up to four groups: each thread hashes all groups."""
    stored = code.those(lambda b: b.count(r"STS\.U8") == 1)[-1]
    loops = [i for i in range(stored) if i in code.blocks[i].next]
    hashes = [i for i in loops if not code.blocks[i].count("STS")]
    return [hashes[-1:], [stored]]


def prototype_halves_path(code: Code, dim: int, groups: int) -> Path:
    of_group = code.those(lambda b: b.count(FLOAT) == AT_ONCE and b.count("LDS") == 1)[:1]
    summed = code.those(lambda b: b.count("FFMA") == 4 * AT_ONCE)[:1]
    scaled, copied = code.those(lambda b: b.count(FLOAT) == b.count("STG") == AT_ONCE)
    sums = [*[of_group] * groups, summed] * rounds(dim)
    copies = [[copied]] * rounds(dim) * groups
    start = halves_start(code)
    return code.walk([0], *start, *sums, *[[scaled]] * rounds(dim), *copies, code.exits)


def prototype_halves_backward_path(code: Code, dim: int, groups: int) -> Path:
    products = code.those(lambda b: b.count(FLOAT) == 2 * AT_ONCE)
    of_group = code.those(lambda b: b.count(FLOAT) == AT_ONCE and b.count("LDS") == 1)[:1]
    stored = code.those(lambda b: b.count(FLOAT) == b.count("STG") == AT_ONCE)[:1]
    each = [*[of_group] * groups, products[1:], *[stored] * groups] * rounds(dim)
    start = halves_start(code)
    return code.walk([0], *start, *[products[:1]] * rounds(dim), *each, code.exits[-1:])


def sum_losses_path(code: Code, rows: int, chunks: int) -> Path:
    """Of each row, for both losses: the partials of its logits. 512 threads."""
    partials = code.those(lambda b: b.count(r"LDG\.E\.64") == 8)
    row = [[[i]] * math.ceil(chunks / 8) for i in partials]
    both = [stop for loop in row for stop in loop * math.ceil(rows / 512)]
    summed = code.those(lambda b: b.count(r"SHFL\.BFLY") >= 20)
    return code.walk([0], *both, summed, code.exits[-1:])


# --- CeCo -----------------------------------------------------------------------------------------


def center_loss_path(code: Code, classes: int, of_channels: bool) -> Path:
    """of_channels: whether the warp has channels, in the last loop."""
    center = code.those(lambda b: b.count(r"LDG\.E\.64") > 0 and b.count("MUFU") > 0)[:1]
    # eight rows of a matrix, 128 columns at a time; 16 rows of a column
    rows = code.those(lambda b: b.count(FLOAT) == b.count("FFMA") == 32)
    sums = code.those(lambda b: b.count(r"SHFL\.BFLY") == 40)
    columns = code.those(lambda b: b.count(FLOAT) == b.count("LDS$") == 16)[-2:]
    hidden = [[rows[0]], [sums[0]]] * math.ceil(CENTER / 64)
    logits = [*[[rows[1]]] * (CENTER // 128), [sums[1]]] * math.ceil(classes / 64)
    dquery = [[columns[0]]] * math.ceil(classes / 16) * (CENTER // 256)
    dcenter = [[columns[1]]] * (CENTER // 16 if of_channels else 0)
    return code.walk([0], center, *hidden, *logits, *dquery, *dcenter, code.exits[-1:])


def mean_path(code: Code, classes: int) -> Path:
    one = code.those(lambda b: b.count(r"LDG\.E\.64") == 1)[:1]
    return code.walk([0], *[one] * math.ceil(classes / 256), code.exits[-1:])


def center_loss_backward_path(code: Code, classes: int) -> Path:
    four, one = divmod(math.ceil(classes / LANES), 4)
    stores = singly(code.those(lambda b: b.count("STG") == 1 and b.count("LDG") != 1))
    sums = code.those(lambda b: b.count("SHFL") == 10)
    stores = [s for s in stores if s[0] < sums[0]]
    return code.walk([0], *stores[:1] * one, *stores[1:] * four, sums, code.exits[-1:])


# --- the launches of the operators ----------------------------------------------------------------


def row_blocks(rows: int) -> int:
    return math.ceil(rows * LANES / THREADS)


class Operators:
    """Adds the launches of each operator, with the arguments that its method gives to it."""

    def __init__(self, library: Library, classes: int, dim: int):
        self.launches, self.classes, self.dim = Launches(library), classes, dim

    def add(self, name: str, path: Path, blocks: float, threads: int = THREADS, shared: int = 0):
        self.launches.add(name, waiting(path, L2), blocks, shared, threads=threads)

    def code(self, name: str) -> Code:
        return self.launches.code(name)

    def next_seed(self) -> None:
        name = "next_seed_kernel"
        self.add(name, self.code(name).walk([0], self.code(name).exits[-1:]), 1, 32)

    def anchor_cross_entropy(self) -> None:
        name = "anchor_cross_entropy_kernel"
        path = cross_entropy_path(self.code(name), self.classes)
        self.add(name, path, row_blocks(self.classes))

    def anchor_cross_entropy_backward(self) -> None:
        name = "anchor_cross_entropy_backward_kernel"
        path = cross_entropy_backward_path(self.code(name), self.classes)
        self.add(name, path, row_blocks(self.classes))

    def gated_average(self) -> None:
        name = "gated_average_kernel<float>"
        path = gated_average_path(self.code(name), self.classes, self.dim)
        self.add(name, path, row_blocks(self.classes))

    def anchor_losses(self, of_anchors: bool = True) -> None:
        name = "anchor_losses_kernel"
        self.add(name, anchor_losses_path(self.code(name), self.classes, of_anchors), 1, 32)

    def anchor_losses_backward(self, of_anchors: bool = True) -> None:
        name, size = "anchor_losses_backward_kernel", (1 + of_anchors) * self.classes
        path = self.code(name).walk([0], self.code(name).exits[-1:])
        self.add(name, path + self.code(name).blocks[1].instructions, math.ceil(size / 256), 256)

    def unit_rows(self, groups: int = 1, counts: bool = False, centroids: bool = False) -> None:
        """groups: of each class. The warps of centroids take longest, and all blocks start."""
        name, rows = "unit_rows_kernel", (groups + centroids) * self.classes
        path = unit_rows_path(self.code(name), self.dim, groups if centroids else 1, counts)
        self.add(name, path, row_blocks(rows))

    def unit_rows_backward(
        self, groups: int = 1, counts: bool = False, means: bool = False
    ) -> None:
        name = "unit_rows_backward_kernel"
        path = unit_rows_backward_path(self.code(name), self.dim, counts, means)
        self.add(name, path, row_blocks(groups * self.classes))

    def prototype_halves(self, groups: int) -> None:
        name = "prototype_halves_kernel"
        path = prototype_halves_path(self.code(name), self.dim, groups)
        self.add(name, path, row_blocks(self.classes), shared=groups)

    def prototype_halves_backward(self, groups: int) -> None:
        name = "prototype_halves_backward_kernel"
        path = prototype_halves_backward_path(self.code(name), self.dim, groups)
        self.add(name, path, row_blocks(self.classes), shared=groups)

    def center_loss(self) -> None:
        name = "center_loss_kernel"
        warps, of_channels = 8, REDUCED // LANES
        paths = [
            waiting(center_loss_path(self.code(name), self.classes, warp < of_channels), L2)
            for warp in range(warps)
        ]
        here = math.ceil(self.classes / MULTIPROCESSORS)  # blocks of a multiprocessor
        self.launches.times.append((name, simulate(paths * here) / CLOCK + LAUNCH))
        self.launches.permitted = True
        self.add("mean_kernel", mean_path(self.code("mean_kernel"), self.classes), 1, 256, 32)

    def center_loss_backward(self) -> None:
        name = "center_loss_backward_kernel"
        path = center_loss_backward_path(self.code(name), self.classes)
        self.add(name, path, REDUCED / 8, 256)

    def centroid_losses(self, groups: int, mirrored: bool) -> None:
        """Two losses of the same rows. mirrored: the positive of a query is another query."""
        name, rows = "centroid_info_nce_kernel<16, 2>", groups * self.classes
        of_rows, chunks = math.ceil(rows / 16), math.ceil(self.classes / 16)
        path = logits_path(self.code(name), self.dim, groups)
        blocks = of_rows * (2 * chunks + 0.2 * mirrored)
        self.launches.add(name, path, blocks, 4 * 8 * 16 * 24)
        name = "sum_losses_kernel"
        self.add(name, sum_losses_path(self.code(name), rows, chunks), 1, 512, 16 * 20)

    def centroid_losses_backward(self, groups: int, mirrored: bool) -> None:
        """mirrored: as in OCCL. Its losses have the same queries, and the keys of one have no
        gradient."""
        name, rows = "centroid_info_nce_backward_kernel<16, 2>", groups * self.classes
        of_rows, of_keys = gradient_paths(self.code(name), rows, self.classes, groups)
        if mirrored:
            of_rows = [path + path for path in of_rows]
        channel_blocks = math.ceil(self.dim / 64) * (1 if mirrored else 2)
        blocks = [n * channel_blocks for n in (math.ceil(rows / 32), math.ceil(self.classes / 16))]
        time = gradient_seconds(self.launches.library, name, of_rows, of_keys, blocks)
        self.launches.times.append((name, time))


# --- the report -----------------------------------------------------------------------------------


def rows(library: Library) -> list[Row]:
    found = []
    for shape in (HRNET, SEGFORMER, SEGFORMER._replace(classes=171)):
        for operator, arguments in (
            ("next_seed", {}),
            ("anchor_cross_entropy", {}),
            ("anchor_cross_entropy_backward", {}),
            ("gated_average", {}),
            ("anchor_losses", {}),
            ("anchor_losses_backward", {}),
            ("unit_rows", {}),
            ("unit_rows", {"groups": 2, "counts": True, "centroids": True}),
            ("unit_rows", {"groups": 4, "counts": True}),
            ("unit_rows_backward", {}),
            ("unit_rows_backward", {"groups": 2, "counts": True}),
            ("unit_rows_backward", {"groups": 4, "counts": True, "means": True}),
            ("prototype_halves", {"groups": 4}),
            ("prototype_halves_backward", {"groups": 4}),
            ("center_loss", {}),
            ("center_loss_backward", {}),
            ("centroid_losses", {"groups": 2, "mirrored": True}),
            ("centroid_losses_backward", {"groups": 2, "mirrored": True}),
            ("centroid_losses", {"groups": 4, "mirrored": False}),
            ("centroid_losses_backward", {"groups": 4, "mirrored": False}),
        ):
            operators = Operators(library, shape.classes, shape.dim)
            getattr(operators, operator)(**arguments)
            given = [x if v is True else f"{x} {v}" for x, v in arguments.items() if v is not False]
            case = ", ".join([f"{shape.classes} classes", *given])
            found.append(Row(operator, case, operators.launches.times))
    return found

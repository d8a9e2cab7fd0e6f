"""The time of class moments for growing numbers of feature elements and of classes.

The byte model predicts: linear in N·D; constant in K until the K×D statistics, their gradients and
the anchors are as large as the features. With few elements, calls take longer than moving bytes.
"""

import torch
from bench_class_moments import BOTH, FORWARD, TRAINING, compare, our_names
from cases import Case, Shape, grid

BY_SIZE, BY_CLASSES = "growth with N·D", "growth with K"
EDGES = (6, 20, 62, 198, 625)  # 256 channels: 9.2·10^3 to 1.0·10^8 elements
CLASSES = (2, 8, 32, 128, 512, 2048, 8192, 16_384)
MOST_ONE_HOT = 2048  # classes: one-hot labels of int64 need 4 GB at 16,384


def names(case: Case, device: torch.device) -> list[str]:
    ours = our_names(case, device)
    if case.direction == FORWARD or case.labels != ("random" if by_classes(case) else "coherent"):
        return ours
    one_hot = ["one_hot bmm"] if case.shape.num_classes <= MOST_ONE_HOT else []
    return [*ours, "index_add", *one_hot]


def by_classes(case: Case) -> bool:
    return case.shape.name == BY_CLASSES


SIZES = [Shape(BY_SIZE, (1, 256, edge, edge), 19) for edge in EDGES]
KEYS = [Shape(BY_CLASSES, (2, 256, 128, 128), num_classes) for num_classes in CLASSES]


@grid(
    [Case(BOTH, TRAINING, shape) for shape in SIZES]
    + [Case(BOTH, FORWARD, shape) for shape in SIZES]
    + [Case(BOTH, TRAINING, shape, labels="random") for shape in KEYS]
    + [Case(BOTH, TRAINING, shape) for shape in KEYS],
    [
        Case(BOTH, FORWARD, shape, labels=labels)
        for shape in KEYS
        for labels in ("coherent", "random")
    ],
    names,
)
def test_growth(bench, case: Case, name: str):
    compare(bench, case, name)

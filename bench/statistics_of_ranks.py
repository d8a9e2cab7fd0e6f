"""The cost of statistics of all ranks: python bench/statistics_of_ranks.py prints the table.

With `process_group="world"` a method reduces the statistics of its classes over all ranks. The
bytes are counted (tests/test_statistics_of_ranks.py compares them with the calls of gloo ranks).
The times are NCCL's own estimates, with the constants of its source; nothing is measured.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from markdown_table import markdown_table

import anchorops as ao
from anchorops.losses import Regularizer

FLOAT, COUNT = 4, 8  # bytes: statistics are float32, counts int64
GROUPS, REDUCED = 4, 128  # the defaults of MVSC (groups) and CeCo (reduced_dim)
GPUS = (8, 1024)


class Network(NamedTuple):
    name: str
    classes: int
    dim: int
    parameters: float  # of which DDP reduces the gradients


NETWORKS = (
    # parameters: Table 20 of SAR (arXiv 2312.11872), Table 1 of SegFormer (arXiv 2105.15203)
    Network("HRNet-W48, Cityscapes", 19, 720, 65.86e6),
    Network("SegFormer-B5, ADE20K", 150, 768, 84.7e6),
)


class Transfers(NamedTuple):
    """Bytes of each all-reduce of a step."""

    forward: list[int]
    backward: list[int]


def transfers(method: str, classes: int, dim: int) -> Transfers:
    """The all-reduces of a method with default arguments and process_group="world"."""
    if method in ("SAR", "CR"):  # squared distances [K], counts [K]
        return Transfers([FLOAT * classes, COUNT * classes], [FLOAT * classes])
    if method == "CBP":  # update="ema": sums [K, D], counts [K]; without a gradient
        return Transfers([FLOAT * classes * dim, COUNT * classes], [])
    if method == "CeCo":  # sums [K, 128], counts [K]; batch norm: means and pixels, variances
        sums, means, variances = classes * REDUCED, REDUCED + 1, REDUCED
        forward = [FLOAT * sums, COUNT * classes, FLOAT * means, FLOAT * variances]
        return Transfers(forward, [FLOAT * sums, FLOAT * means, FLOAT * variances])
    # sums [K, G, D], counts [K, G]; OCCL has two views
    keys = classes * {"OCCL": 2, "MVSC": GROUPS}[method]
    return Transfers([FLOAT * keys * dim, COUNT * keys], [FLOAT * keys * dim])


METHODS: dict[str, Callable[[int, int], Regularizer]] = {
    "SAR": lambda k, d: ao.SAR(k, d, process_group="world"),
    "CR": lambda k, d: ao.SAR(k, d, embed=False, process_group="world"),
    "CBP": lambda k, d: ao.CBP(k, d, update="ema", process_group="world"),
    "OCCL": lambda k, d: ao.OCCL(k, d, process_group="world"),
    "CeCo": lambda k, d: ao.CeCo(k, d, process_group="world"),
    "MVSC": lambda k, d: ao.MVSC(k, d, process_group="world"),
}

# NCCL's model of an all-reduce in a binary tree with the protocol LL, which it takes for small
# messages: src/graph/tuning.cc of https://github.com/NVIDIA/nccl at commit b6475625, for Hopper.
BASE, NVLINK, NETWORK = 6.8, 0.6, 5.0  # µs: baseLat, hwLat
ONE_NODE, TWO_NODES, MORE_NODES = 87.7, 22.5, 19.0  # GB/s: llMaxBws (with CPUs of AMD)
# treeCorrectionFactor, for 64 bytes, 128 bytes, …
CORRECTION = (
    *(1.0, 1.0, 1.0, 1.0, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8),
    *(0.9, 1.0, 1.0, 1.0, 1.0),
)


def microseconds(size: int, gpus: int) -> float:
    """NCCL's estimate for an all-reduce of at least 64 bytes over nodes of 8 GPUs:
    latency + bytes / bandwidth. NCCL takes the fastest of several algorithms, so its own estimate
    is this or less."""
    nodes = gpus // 8
    latency = BASE + 2 * (7 * NVLINK + int(math.log2(nodes)) * NETWORK)
    bus = {1: ONE_NODE, 2: TWO_NODES}.get(nodes, MORE_NODES)  # GB/s = 1,000 bytes per µs
    return latency + size / (1000 * bus / 2 * CORRECTION[int(math.log2(size // 64))])


def table() -> str:
    """Markdown: a row for each method. SAR's is that of CR too."""
    header = ["method", "all-reduces"]
    for network in NETWORKS:
        name = f"{network.name}, K{network.classes} D{network.dim}"
        header += [f"{name}: KB", "of DDP's", *(f"µs, {gpus:,} GPUs" for gpus in GPUS)]
    lines = []
    for method in METHODS:
        if method == "CR":
            assert transfers("CR", 2, 3) == transfers("SAR", 2, 3)
            continue
        names = {"SAR": "SAR, CR", "CBP": 'CBP, `update="ema"`'}
        forward, backward = transfers(method, NETWORKS[0].classes, NETWORKS[0].dim)
        cells = [names.get(method, method), f"{len(forward)} + {len(backward)}"]
        for network in NETWORKS:
            sizes = [
                size for part in transfers(method, network.classes, network.dim) for size in part
            ]
            share = sum(sizes) / (FLOAT * network.parameters)
            cells += [f"{sum(sizes) / 1e3:,.1f}", f"{100 * share:.2g} %"]
            cells += [f"{sum(microseconds(size, gpus) for size in sizes):,.0f}" for gpus in GPUS]
        lines.append(cells)
    return markdown_table(header, lines)


if __name__ == "__main__":
    print(table())

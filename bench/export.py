"""Time and memory of labels of whole volumes at their original size, from the network's logits.

    python bench/export.py [--rows ROWS.json]

The ways are pixel_argmax, F.interpolate and argmax of torch, zoom and argmax of SciPy, and what
nnU-Net does by default, if `make build/nnunet` has made its environment. Each cell is a process of
its own: the fastest of some calls, after a first one for which the memory is measured. `memory` is
what the process needed at most beyond the logits and the labels. Nothing else may run.
"""
# pyright: reportMissingImports=false

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from record import ROOT, finish, parser_of, rows_of_ways
from torch import Tensor

import anchorops as ao

CPU = torch.device("cpu")
THREADS, SECONDS = 2, 5.0  # of the calls of a cell
NNUNET = ROOT / "build/nnunet/bin/python"
SIZES = {
    "5 classes, 128³ to 256³": (5, (128, 128, 128), (256, 256, 256)),
    "30 classes, 96³ to 160×170×150": (30, (96, 96, 96), (160, 170, 150)),
    "118 classes, 64³ to 128³": (118, (64, 64, 64), (128, 128, 128)),
}
TINY = {"5 classes, 16³ to 40³": (5, (16, 16, 16), (40, 40, 40))}
DTYPES = {"float32": torch.float32, "float16": torch.float16}
Size = tuple[int, ...]


def our_labels(logits: Tensor, size: Size) -> Tensor:
    return ao.pixel_argmax(logits, size, dtype=torch.uint8)


def torch_labels(logits: Tensor, size: Size) -> Tensor:
    return F.interpolate(logits, size, mode="trilinear").argmax(1).to(torch.uint8)


def scipy_labels(logits: Tensor, size: Size) -> Tensor:
    from scipy.ndimage import zoom

    factors = [new / old for new, old in zip(size, logits.shape[2:], strict=True)]
    options: Any = {"order": 1, "mode": "nearest", "grid_mode": True}
    volumes = [np.asarray(zoom(x, factors, **options)) for x in logits[0].float().numpy()]
    return torch.from_numpy(np.stack(volumes).argmax(0).astype(np.uint8))[None]


def nnunet_labels(logits: Tensor, size: Size) -> Tensor:
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    spacings = [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]
    resampled = resample_data_or_seg_to_shape(
        logits[0], size, *spacings, order=1, force_separate_z=None
    )
    return torch.from_numpy(resampled.argmax(0).astype(np.uint8))[None]


WAYS: dict[str, Callable[[Tensor, Size], Tensor]] = {
    "anchorops": our_labels,
    "torch": torch_labels,
    "SciPy": scipy_labels,
    "nnU-Net": nnunet_labels,
}


def cell(way: str, volume: str, dtype: str) -> dict[str, Any]:
    """Measures in this process."""
    torch.set_num_threads(THREADS)
    num_classes, low, size = (SIZES | TINY)[volume]
    run = WAYS[way]
    run(torch.randn(1, 2, 2, 2, 2).to(DTYPES[dtype]), (4, 4, 4))  # imports, threads
    logits = torch.randn(1, num_classes, *low).to(DTYPES[dtype])
    labels: list[Tensor] = []

    def call() -> Tensor:
        labels[:] = [run(logits, size)]
        return labels[0]

    case = {"volume": volume, "dtype": dtype}
    (row,) = rows_of_ways(case, {way: call}, CPU, rounds=1, seconds=SECONDS)
    return row | {"differ": (labels[0] != our_labels(logits, size)).double().mean().item()}


def main() -> None:
    parser = parser_of(__doc__, devices=("cpu",))
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(cell(*arguments.cell)))
        return
    pythons = {way: sys.executable for way in WAYS if way != "nnU-Net"}
    if NNUNET.exists():
        pythons["nnU-Net"] = str(NNUNET)
    rows = []
    for volume in TINY if arguments.dry_run else SIZES:
        for dtype in DTYPES:
            for way, python in pythons.items():
                command = [python, __file__, "--cell", way, volume, dtype]
                run = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
                rows.append(json.loads(run.stdout))
    finish(arguments, "export", rows)


if __name__ == "__main__":
    main()

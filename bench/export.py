"""Time and memory of labels of whole volumes at their original size, from the network's logits.

    python bench/export.py [--rows ROWS.json]

The ways are pixel_argmax, F.interpolate and argmax of torch, zoom and argmax of SciPy, and what
nnU-Net does by default, if it is installed: in the environment of `make build/nnunet`, with whose
Python run.py calls this program. A row has the fastest of some calls, which take turns. `memory` is
what a call needed at most beyond the logits and the labels. Nothing else may run.
"""
# pyright: reportMissingImports=false

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from record import Ways, finish, parser_of, rows_of_ways
from torch import Tensor

import anchorops as ao

CPU = torch.device("cpu")
SECONDS = 5.0  # of the calls of a case
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


def rows_of(volume: str, dtype: str) -> Iterator[dict[str, Any]]:
    num_classes, low, size = (SIZES | TINY)[volume]
    logits = torch.randn(1, num_classes, *low).to(DTYPES[dtype])
    there = {name: way for name, way in WAYS.items() if name != "nnU-Net" or find_spec("nnunetv2")}
    ways: Ways = {name: partial(way, logits, size) for name, way in there.items()}
    labels: Any = {name: way() for name, way in ways.items()}
    case = {"volume": volume, "dtype": dtype}
    for row in rows_of_ways(case, ways, CPU, rounds=1, seconds=SECONDS):
        differ = labels[row["name"]] != labels["anchorops"]
        yield row | {"differ": differ.double().mean().item()}


def main() -> None:
    arguments = parser_of(__doc__, devices=("cpu",)).parse_args()
    volumes = TINY if arguments.dry_run else SIZES
    cases = product(volumes, DTYPES)
    finish(arguments, "export", [row for case in cases for row in rows_of(*case)])


if __name__ == "__main__":
    main()

"""Time and memory of the run lengths of instance masks, from low-resolution mask logits.

    python bench/masks.py [--device cuda] [--out ROWS.json] [--quick]

The ways are mask_rle, F.interpolate and a comparison in chunks of 8 masks with pycocotools, and all
masks by pixel_argmax with pycocotools; with the logits of a GPU also mask_rle of their copy on the
CPU. They take turns, with one thread and with two; pycocotools has one. `memory` is what the device
needs at most beyond the logits, `differ` the share of masks whose code is not ours. Nothing else
may run; --quick is for small masks.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools.mask import encode
from record import head_of, save
from torch import Tensor

import anchorops as ao
from anchorops.measure import in_turns, peak_extra_bytes

CHUNK, ROUNDS = 8, 5
Size = tuple[int, int]
SIZES: dict[str, tuple[int, int, Size]] = {
    "100 masks, 192² to 1080×1920": (100, 192, (1080, 1920)),
    "20 masks, 288² to 6000×12000": (20, 288, (6000, 12000)),
}
ON_A_GPU: dict[str, tuple[int, int, Size]] = {
    "100 masks, 192² to 1080×1920": (100, 192, (1080, 1920)),
    "300 masks, 288² to 4000×6000": (300, 288, (4000, 6000)),
}
QUICK: dict[str, tuple[int, int, Size]] = {"10 masks, 24² to 50×60": (10, 24, (50, 60))}


def our_codes(logits: Tensor, size: Size) -> list[str]:
    return [code["counts"] for code in ao.mask_rle(logits, size).coco()]


def codes_of_copy(logits: Tensor, size: Size) -> list[str]:
    return our_codes(logits.cpu(), size)


def torch_codes(logits: Tensor, size: Size) -> list[str]:
    codes = []
    for some in logits.split(CHUNK):
        codes += encoded(F.interpolate(some[None], size, mode="bilinear")[0] > 0)
    return codes


def argmax_codes(logits: Tensor, size: Size) -> list[str]:
    return encoded(ao.pixel_argmax(logits[None], size, sigmoid=True, dtype=torch.uint8)[0])


def encoded(masks: Tensor) -> list[str]:
    columns = np.asfortranarray(masks.cpu().permute(1, 2, 0).numpy().view(np.uint8))
    codes: Any = encode(columns)
    return [code["counts"].decode() for code in codes]


WAYS = {
    "anchorops": our_codes,
    "torch, pycocotools": torch_codes,
    "pixel_argmax, pycocotools": argmax_codes,
}
COPY = {"copy to the CPU, anchorops": codes_of_copy}


def rows_of(device: torch.device, case: str, count: int, side: int, size: Size) -> list[dict]:
    ways = WAYS | (COPY if device.type == "cuda" else {})
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(1, count, 12, 12, generator=random)
    logits = F.interpolate(noise, (side, side), mode="bicubic")[0] * 4 - 4
    logits = logits.to(device)
    runs = [lambda way=way: way(logits, size) for way in ways.values()]
    memory = [peak_extra_bytes(run, device) for run in runs]
    codes, rows = [run() for run in runs], []
    differ = [np.mean([a != b for a, b in zip(x, codes[0], strict=True)]) for x in codes]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times, others = in_turns(runs, device, seconds=0, rounds=ROUNDS)
        for i, way in enumerate(ways):
            row = {"masks": case, "threads": threads, "name": way, "seconds": min(times[i])}
            row |= {"memory": memory[i], "differ": float(differ[i]), "others": others}
            print(row, file=sys.stderr)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sizes = SIZES if device.type == "cpu" else ON_A_GPU
    sizes = QUICK if arguments.quick else sizes
    rows = [row for case, numbers in sizes.items() for row in rows_of(device, case, *numbers)]
    if arguments.out:
        save(arguments.out, "masks", head_of(device), rows)


if __name__ == "__main__":
    main()

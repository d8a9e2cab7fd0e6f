"""Time and memory of labels of sliding windows, from the logits of the windows.

    python bench/windows.py [--rows ROWS.json]

The ways are window_argmax, the formula (the logits of each window are upsampled and added to those
of the whole image in place, then divided, resized and compared), and MONAI's inferer with argmax,
if it is installed. The network is a function that copies logits of a list. A row has the fastest of
some calls, which take turns. `memory` is what a call needed at most beyond the logits in the list.
`differ` is the share of labels other than the formula's. Nothing else may run.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from record import Ways, finish, parser_of, rows_of_ways
from torch import Tensor

import anchorops as ao

CPU = torch.device("cpu")
SECONDS = 5.0  # of the calls of a case
Size = tuple[int, ...]


class Slide(NamedTuple):
    """stride: of the logits of a window. size: of the labels, if they are resized."""

    classes: int
    image: Size
    window: Size
    step: Size
    stride: int
    size: Size | None = None
    gaussian: bool = False


SLIDES = {
    "19 classes, 1024×2048, windows of 768, output stride 4": Slide(
        19, (1024, 2048), (768, 768), (512, 512), 4
    ),
    "150 classes, 1024×2048, windows of 512, output stride 4": Slide(
        150, (1024, 2048), (512, 512), (341, 341), 4
    ),
    "150 classes, 512×683 to 1200×1600, windows of 512, output stride 8": Slide(
        150, (512, 683), (512, 512), (341, 341), 8, (1200, 1600)
    ),
    "14 classes, 192×160×160, windows of 96, output stride 1, Gaussian": Slide(
        14, (192, 160, 160), (96, 96, 96), (48, 48, 48), 1, None, True
    ),
}
TINY = {
    "5 classes, 32×40, windows of 16, output stride 4": Slide(5, (32, 40), (16, 16), (8, 8), 4),
    "5 classes, 24×20×20, windows of 8, output stride 1, Gaussian": Slide(
        5, (24, 20, 20), (8, 8, 8), (4, 4, 4), 1, None, True
    ),
}


def resized(z: Tensor, size: Size) -> Tensor:
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return z if z.shape[2:] == size else F.interpolate(z, size, mode=mode)


def ways_of(slide: Slide) -> Ways:
    origins = ao.window_origins(slide.image, slide.window, slide.step)
    low = tuple(n // slide.stride for n in slide.window)
    logits = resized(torch.randn(len(origins), slide.classes, *(5 for _ in low)), low)
    weights = ao.gaussian_weights(slide.window) if slide.gaussian else None
    sizes = slide.image, slide.window, slide.size

    def ours() -> Tensor:
        windows = ((o, z[None].clone()) for o, z in zip(origins, logits, strict=True))
        return ao.window_argmax(windows, *sizes, weights=weights, dtype=torch.uint8)

    def formula() -> Tensor:
        sums, total = torch.zeros(1, slide.classes, *slide.image), torch.zeros(slide.image)
        for origin, z in zip(origins, logits, strict=True):
            there = tuple(slice(o, o + n) for o, n in zip(origin, slide.window, strict=True))
            z = resized(z[None].clone(), slide.window)
            sums[(..., *there)] += z if weights is None else z.mul_(weights)
            total[there] += 1 if weights is None else weights
        return resized(sums.div_(total), slide.size or slide.image).argmax(1).to(torch.uint8)

    def monai() -> Tensor:
        from monai.inferers.inferer import SlidingWindowInferer

        overlap = [1 - (step + 0.5) / n for step, n in zip(slide.step, slide.window, strict=True)]
        inferer = SlidingWindowInferer(
            slide.window, 1, overlap, "gaussian" if slide.gaussian else "constant"
        )
        network = iter(logits)
        z: Any = inferer(
            torch.zeros(1, 1, *slide.image),
            lambda _: resized(next(network)[None].clone(), slide.window),
        )
        return resized(z, slide.size or slide.image).argmax(1).to(torch.uint8)

    ways: Ways = {"anchorops": ours, "the formula": formula}
    return ways | ({"MONAI": monai} if find_spec("monai") else {})


def rows_of(case: str, slide: Slide) -> Iterator[dict[str, Any]]:
    ways = ways_of(slide)
    labels: Any = {name: way() for name, way in ways.items()}
    for row in rows_of_ways({"windows": case}, ways, CPU, rounds=1, seconds=SECONDS):
        differ = labels[row["name"]] != labels["the formula"]
        yield row | {"differ": differ.double().mean().item()}


def main() -> None:
    arguments = parser_of(__doc__, devices=("cpu",)).parse_args()
    torch.manual_seed(0)
    slides = TINY if arguments.dry_run else SLIDES
    finish(arguments, "windows", [row for case in slides.items() for row in rows_of(*case)])


if __name__ == "__main__":
    main()

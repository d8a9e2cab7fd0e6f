"""Time and memory of the run lengths of instance masks.

    python bench/masks.py [--device cuda] [--rows ROWS.json]

Each section compares the ways from low-resolution mask logits to COCO's codes; `memory` is what the
device needs at most beyond the logits.

`masks`: by mask_rle, and by F.interpolate and a comparison in chunks of 8 masks with pycocotools,
with one thread and with two; pycocotools has one. `differ` is the share of different codes.

`masks_in_frameworks`: mask logits of ellipses, by the post-processing of Transformers and of
Ultralytics (if they are installed) with pycocotools, and by the functions of
examples/transformers_masks.py and ultralytics_validator.py. The pipeline of SAM 2 has codes of its
own.
"""
# pyright: reportMissingImports=false

import sys
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools.mask import encode
from record import ROOT, Ways, finish, parser_of, rows_of_ways
from torch import Tensor

import anchorops as ao

sys.path.insert(0, str(ROOT / "examples"))

CHUNK, CLASSES, ROUNDS = 8, 80, 3
OURS, BY_TORCH, THEIRS = "anchorops", "torch, pycocotools", "the library"
Size = tuple[int, int]
Rows = Iterator[dict[str, Any]]
SIZES: dict[str, tuple[int, int, Size]] = {
    "100 masks, 192² to 1080×1920": (100, 192, (1080, 1920)),
    "20 masks, 288² to 6000×12000": (20, 288, (6000, 12000)),
}
TINY: dict[str, tuple[int, int, Size]] = {"10 masks, 24² to 50×60": (10, 24, (50, 60))}


def our_codes(logits: Tensor, size: Size) -> list[str]:
    return [code["counts"] for code in ao.mask_rle(logits, size).coco()]


def torch_codes(logits: Tensor, size: Size) -> list[str]:
    codes = []
    for some in logits.split(CHUNK):
        codes += encoded(F.interpolate(some[None], size, mode="bilinear")[0] > 0)
    return codes


def encoded(masks: Tensor) -> list[str]:
    columns = np.asfortranarray(masks.cpu().permute(1, 2, 0).numpy().view(np.uint8))
    codes: Any = encode(columns)
    return [code["counts"].decode() for code in codes]


def masks(device: torch.device, tiny: bool) -> Rows:
    for case, (count, side, size) in (TINY if tiny else SIZES).items():
        noise = torch.randn(1, count, 12, 12)
        logits = F.interpolate(noise, (side, side), mode="bicubic")[0].to(device) * 4 - 4
        ours, theirs = (codes(logits, size) for codes in (our_codes, torch_codes))
        differ = float(np.mean([a != b for a, b in zip(ours, theirs, strict=True)]))
        ways: Ways = {
            OURS: partial(our_codes, logits, size),
            BY_TORCH: partial(torch_codes, logits, size),
        }
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for row in rows_of_ways({"masks": case, "threads": threads}, ways, device, ROUNDS):
                yield row | {"differ": differ}


def ellipses(count: int, size: Size, device: torch.device) -> Tensor:
    """Logits (N, *size) of random ellipses."""
    centers, radii = torch.rand(2, count, 2, 1, device=device)  # of y and x, of the sides
    y, x = (torch.linspace(0, 1, n, device=device) for n in size)
    y, x = ((a - centers[:, i]) / (0.05 + 0.2 * radii[:, i]) for i, a in enumerate((y, x)))
    return 10 - 10 * (y[:, :, None] ** 2 + x[:, None] ** 2)


def of_mask2former(logits: Tensor, size: Size) -> Ways:
    import transformers_masks as ours
    from transformers import Mask2FormerImageProcessor

    classes = 8 * torch.randn(len(logits), CLASSES + 1, device=logits.device)
    outputs = SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=logits[None])
    return {
        OURS: lambda: ours.of_mask2former(classes, logits, size)[0].coco(),
        THEIRS: lambda: codes_of_maps(Mask2FormerImageProcessor(), outputs, size),
    }


def of_rf_detr(logits: Tensor, size: Size) -> Ways:
    import transformers_masks as ours
    from transformers import RfDetrImageProcessor

    classes = 2 * torch.randn(len(logits), CLASSES, device=logits.device)
    outputs = SimpleNamespace(logits=classes[None], pred_masks=logits[None])
    return {
        OURS: lambda: ours.of_rf_detr(classes, logits, size)[0].coco(),
        THEIRS: lambda: codes_of_maps(RfDetrImageProcessor(), outputs, size),
    }


def codes_of_maps(processor: Any, outputs: Any, size: Size) -> list[str]:
    (result,) = processor.post_process_instance_segmentation(
        outputs, target_sizes=[size], return_binary_maps=True
    )
    return encoded(result["segmentation"].bool())


def of_sam2(logits: Tensor, size: Size) -> Ways:
    """A batch of 64 points, of three masks each."""
    import transformers_masks as ours
    from transformers import Sam2ImageProcessor

    scores, processor = torch.rand(len(logits), device=logits.device), Sam2ImageProcessor()

    def theirs() -> object:
        (masks,) = processor.post_process_masks(logits[None, None], [size], binarize=False)
        found = processor.filter_masks(masks, scores[None], size, [0, 0, *size[::-1]])
        return processor.post_process_for_mask_generation(*found, 0.7)

    return {OURS: lambda: ours.automatic_of_sam2(scores, logits, size)[0].coco(), THEIRS: theirs}


def of_ultralytics(logits: Tensor, size: Size) -> Ways:
    """Of a padded image: the logits of an object are one of 32 prototypes."""
    import ultralytics_validator as ours
    from ultralytics.utils import ops

    protos = logits[:32]
    coefficients = torch.eye(len(protos), device=logits.device)
    coefficients = coefficients[torch.randint(len(protos), (len(logits),))]
    gain = min(4 * n / m for n, m in zip(protos.shape[1:], size, strict=True))
    padding = [(4 * n - round(m * gain)) / 2 for n, m in zip(protos.shape[1:], size, strict=True)]

    def masks(boxes: Tensor) -> ao.MaskRLE:
        z = ours.mask_logits(protos, coefficients)
        return ours.masks_in_image(z, boxes, size, (gain, gain), padding)

    whole = torch.tensor([0.0, 0.0, size[1], size[0]], device=logits.device)
    boxes = masks(whole.expand(len(logits), 4)).boxes()
    return {
        OURS: lambda: masks(boxes).coco(),
        THEIRS: lambda: encoded(ops.process_mask_native(protos, coefficients, boxes, size).bool()),
    }


FRAMEWORKS: dict[str, tuple[Any, int, Size, Size]] = {
    "Mask2Former, 100 queries": (of_mask2former, 100, (200, 334), (800, 1333)),
    "RF-DETR, 200 queries": (of_rf_detr, 200, (108, 108), (1080, 1920)),
    "SAM 2, 64 points": (of_sam2, 192, (256, 256), (1080, 1920)),
    "Ultralytics, 100 objects": (of_ultralytics, 100, (96, 160), (1080, 1920)),
}


def masks_in_frameworks(device: torch.device, tiny: bool) -> Rows:
    for name, (make, count, low, size) in FRAMEWORKS.items():
        if tiny:
            count, low, size = 12, (16, 20), (64, 80)
        try:
            ways = make(ellipses(count, low, device), size)
        except ImportError as error:
            print(f"{name}: {error.name} is not installed", file=sys.stderr)
            continue
        case = f"{name}, {low[0]}×{low[1]} to {size[0]}×{size[1]}"
        yield from rows_of_ways({"case": case}, ways, device, ROUNDS)


SECTIONS = {x.__name__: x for x in (masks, masks_in_frameworks)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--section", choices=SECTIONS, help="only these rows")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    for section in [arguments.section] if arguments.section else SECTIONS:
        with torch.no_grad():
            rows = list(SECTIONS[section](device, arguments.dry_run))
        finish(arguments, section, rows)


if __name__ == "__main__":
    main()

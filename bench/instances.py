"""Time and memory of instance masks in frameworks, before and after; and of the steps of a COCO
evaluation.

    python bench/instances.py [--device cuda] [--out ROWS.json] [--quick]

`masks_in_frameworks`: from mask logits of ellipses to COCO's codes, by the post-processing of
Transformers and of Ultralytics (if it is installed) with pycocotools, and by the functions of
examples/transformers_masks.py and ultralytics_validator.py. The pipeline of SAM 2 has codes of its
own. `memory` is what the device needs at most beyond the logits.

`coco_steps`: seconds of each step for 5,000 generated images of 480 × 640 pixels. Each has 7
ellipses, and 20 predictions: each is one of these, moved and scaled by up to a tenth, with mask
logits of 120 × 160 and a random score. There are 80 classes. Nothing else may run; --quick is for
few and small masks.
"""
# pyright: reportMissingImports=false

import argparse
import contextlib
import io
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from masks import encoded
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from record import ROOT, head_of, save
from torch import Tensor
from transformers import Mask2FormerImageProcessor, RfDetrImageProcessor, Sam2ImageProcessor

import anchorops as ao
from anchorops.measure import duration, in_turns, peak_extra_bytes

sys.path.insert(0, str(ROOT / "examples"))
import transformers_masks as ours

ROUNDS, CLASSES = 3, 80
IMAGES, OBJECTS, PREDICTIONS = 5000, 7, 20
OURS, THEIRS = "anchorops", "the library"
Size = tuple[int, int]
Ways = dict[str, Callable[[], object]]


def ellipses(centers: Tensor, radii: Tensor, size: Size) -> Tensor:
    """Logits (N, *size). centers, radii: (N, 2) of y and x, as shares of the image's sides."""
    y, x = (torch.linspace(0, 1, n, device=centers.device) for n in size)
    y, x = (
        (a - b[:, None]) / c[:, None] for a, b, c in zip((y, x), centers.T, radii.T, strict=True)
    )
    return 10 - 10 * (y[:, :, None] ** 2 + x[:, None] ** 2)


def random_logits(count: int, size: Size, device: torch.device) -> Tensor:
    centers, radii = torch.rand(2, count, 2)
    return ellipses(centers.to(device), (0.05 + 0.2 * radii).to(device), size)


def of_mask2former(logits: Tensor, size: Size) -> Ways:
    classes = 8 * torch.randn(len(logits), CLASSES + 1, device=logits.device)
    outputs = SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=logits[None])
    return {
        OURS: lambda: ours.of_mask2former(classes, logits, size)[0].coco(),
        THEIRS: lambda: codes_of_maps(Mask2FormerImageProcessor(), outputs, size),
    }


def of_rf_detr(logits: Tensor, size: Size) -> Ways:
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
    scores, processor = torch.rand(len(logits), device=logits.device), Sam2ImageProcessor()

    def theirs() -> object:
        (masks,) = processor.post_process_masks(logits[None, None], [size], binarize=False)
        found = processor.filter_masks(masks, scores[None], size, [0, 0, *size[::-1]])
        return processor.post_process_for_mask_generation(*found, 0.7)

    return {
        OURS: lambda: ours.automatic_of_sam2(scores, logits, size)[0].coco(),
        THEIRS: theirs,
    }


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


def rows_of_frameworks(device: torch.device, quick: bool) -> list[dict]:
    rows = []
    for name, (make, count, low, size) in FRAMEWORKS.items():
        if quick:
            count, low, size = 12, (16, 20), (64, 80)
        try:
            ways = make(random_logits(count, low, device), size)
        except ImportError as error:
            print(f"{name}: {error.name} is not installed", file=sys.stderr)
            continue
        case = f"{name}, {low[0]}×{low[1]} to {size[0]}×{size[1]}"
        memory = [peak_extra_bytes(run, device) for run in ways.values()]
        times, others = in_turns([*ways.values()], device, seconds=0, rounds=ROUNDS)
        for i, way in enumerate(ways):
            row = {"case": case, "name": way, "seconds": min(times[i])}
            rows.append(row | {"memory": memory[i], "others": others})
    return rows


def rows_of_coco(device: torch.device, images: int) -> list[dict]:
    seconds: dict[str, float] = defaultdict(float)

    def timed(step: str, run: Callable[[], Any]) -> Any:
        results: list[Any] = []
        seconds[step] += duration(lambda: results.append(run()))
        return results[0]

    size, annotations, predictions = (480, 640), [], []
    for image in range(1, images + 1):
        centers, radii = torch.rand(2, OBJECTS, 2)
        radii = 0.05 + 0.2 * radii
        labels = torch.randint(1, CLASSES + 1, (OBJECTS,))
        masks = ao.mask_rle(ellipses(centers, radii, (120, 160)), size)
        objects = zip(masks.coco(), masks.areas().tolist(), labels.tolist(), strict=True)
        for code, area, label in objects:
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": label}
            annotations.append(annotation | {"segmentation": code, "area": area, "iscrowd": 0})
        chosen = torch.randint(0, OBJECTS, (PREDICTIONS,))
        moved = centers[chosen] + 0.1 * (torch.rand(PREDICTIONS, 2) - 0.5)
        scaled = radii[chosen] * (0.9 + 0.2 * torch.rand(PREDICTIONS, 2))
        logits = ellipses(moved, scaled, (120, 160)).to(device)
        codes = timed("codes, by mask_rle", lambda z=logits: ao.mask_rle(z, size).coco())
        scores = torch.rand(PREDICTIONS).tolist()
        for code, score, label in zip(codes, scores, labels[chosen].tolist(), strict=True):
            prediction = {"image_id": image, "category_id": label, "score": score}
            predictions.append(prediction | {"segmentation": code})
    truth: Any = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i, "height": 480, "width": 640} for i in range(1, images + 1)],
        "categories": [{"id": i} for i in range(1, CLASSES + 1)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = timed("COCO.loadRes", lambda: truth.loadRes(predictions))
        evaluation = COCOeval(truth, found, "segm")
        timed("COCOeval.evaluate", evaluation.evaluate)
        timed("COCOeval.accumulate", evaluation.accumulate)
        evaluation.summarize()
    precision = float(evaluation.stats[0])
    return [
        {"images": images, "step": step, "seconds": s, "mean average precision": precision}
        for step, s in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    with torch.no_grad():
        sections = {
            "masks_in_frameworks": rows_of_frameworks(device, arguments.quick),
            "coco_steps": rows_of_coco(device, 20 if arguments.quick else IMAGES),
        }
    for section, rows in sections.items():
        for row in rows:
            print(row, file=sys.stderr)
        if arguments.out:
            save(arguments.out, section, head_of(device), rows)


if __name__ == "__main__":
    main()

"""Ultralytics' validation and prediction of instance masks, with run lengths from the mask logits.

    YOLO("yolo26n-seg.pt").val(validator=ultralytics_validator.Validator, save_json=True)
    results = YOLO("yolo26n-seg.pt").predict(images, predictor=ultralytics_validator.Predictor)
    results[0].run_lengths.coco()

It needs ultralytics, of which 8.4.190 was tested. With `save_json`, Ultralytics upsamples all masks
to the input of the network, and these masks of 0 and 1 to the image, rounded down. The masks here
are those of `process_mask_native` at the size of the image, except for rounding; in the test fewer
than 5 of 1,000 pixels differ from Ultralytics' file: they are 1 here, at the borders that it rounds
down. What is printed is as without `save_json`, from masks of a quarter of the input's size.
`save_txt` needs Ultralytics' own validator.

The masks of the predictor are those of `retina_masks=True`, except for rounding. `result.masks`,
which has all pixels, is None.
"""
# pyright: reportMissingImports=false

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from ultralytics.engine.results import Results
from ultralytics.models.yolo.segment import SegmentationPredictor, SegmentationValidator
from ultralytics.utils import ops

import anchorops as ao


def mask_logits(protos: Tensor, coefficients: Tensor) -> Tensor:
    """(N, h, w), as in `process_mask`."""
    return (coefficients @ protos.float().flatten(1)).unflatten(1, protos.shape[1:])


def masks_in_image(
    z: Tensor, boxes: Tensor, shape: Sequence[int], gains: Sequence[float], padding: Sequence[float]
) -> ao.MaskRLE:
    """z: logits of a quarter of the padded input's size; boxes: in the image of this shape; gains:
    of the input's rows and columns to the image's; padding: at the top and at the left."""
    top, left = (round(x - 0.1) for x in padding)
    height, width = (max(round(n * gain), 1) for n, gain in zip(shape, gains, strict=True))
    stride = math.gcd(4, top, left, height, width)
    if stride < 4 and len(z):  # the padding ends between two logits
        z = F.interpolate(z[None], scale_factor=4 // stride, mode="bilinear")[0]
    top, left, height, width = (n // stride for n in (top, left, height, width))
    return ao.mask_rle(z[:, top : top + height, left : left + width], shape, boxes=boxes)


class Validator(SegmentationValidator):
    """Ultralytics' validator, whose file has the run lengths of `mask_rle`."""

    def postprocess(self, preds: list[Tensor]) -> list[dict[str, Any]]:
        logits = []

        def process(protos: Tensor, coefficients: Tensor, boxes: Tensor, shape: Any) -> Tensor:
            logits.append(mask_logits(protos, coefficients))
            return ops.process_mask(protos, coefficients, boxes, shape)

        self.process = process
        return [
            pred | {"logits": z} for pred, z in zip(super().postprocess(preds), logits, strict=True)
        ]

    def scale_preds(self, predn: dict[str, Any], pbatch: dict[str, Any]) -> dict[str, Any]:
        scaled = super(SegmentationValidator, self).scale_preds(predn, pbatch)
        gains, padding = pbatch["ratio_pad"]
        masks = masks_in_image(
            predn["logits"], scaled["bboxes"], pbatch["ori_shape"], gains, padding[::-1]
        )
        return scaled | {"codes": masks.coco()}

    def pred_to_json(self, predn: dict[str, Any], pbatch: dict[str, Any]) -> None:
        before = len(self.jdict)
        super(SegmentationValidator, self).pred_to_json(predn, pbatch)
        for entry, code in zip(self.jdict[before:], predn["codes"], strict=True):
            entry["segmentation"] = code


class Predictor(SegmentationPredictor):
    """Ultralytics' predictor, whose results have `run_lengths`, a MaskRLE, instead of masks."""

    def construct_result(
        self, pred: Tensor, img: Tensor, orig_img: Any, img_path: str, proto: Tensor
    ) -> Results:
        shape, size = orig_img.shape[:2], img.shape[2:]
        z, boxes = mask_logits(proto, pred[:, 6:]), pred[:, :6]
        boxes[:, :4] = ops.scale_boxes(size, boxes[:, :4], orig_img.shape)
        gain = min(n / m for n, m in zip(size, shape, strict=True))
        padding = [(n - round(m * gain)) / 2 for n, m in zip(size, shape, strict=True)]
        masks = masks_in_image(z, boxes[:, :4], shape, (gain, gain), padding)
        kept = masks.areas() > 0
        result = Results(orig_img, path=img_path, names=self.model.names, boxes=boxes[kept])
        result.run_lengths = masks[kept]
        return result

"""Ultralytics' validation of instance masks, with run lengths written from the mask logits.

    YOLO("yolo26n-seg.pt").val(validator=ultralytics_validator.Validator, save_json=True)

It needs ultralytics, of which 8.4.190 was tested. With `save_json`, Ultralytics upsamples all masks
to the input of the network, and these masks of 0 and 1 to the image, rounded down. The masks here
are those of `process_mask_native` at the size of the image, except for rounding; in the test fewer
than 5 of 1,000 pixels differ from Ultralytics' file: they are 1 here, at the borders that it rounds
down. What is printed is as without `save_json`, from masks of a quarter of the input's size.
`save_txt` needs Ultralytics' own validator.
"""
# pyright: reportMissingImports=false

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from ultralytics.models.yolo.segment import SegmentationValidator
from ultralytics.utils import ops

import anchorops as ao


class Validator(SegmentationValidator):
    """Ultralytics' validator, whose file has the run lengths of `mask_rle`."""

    def postprocess(self, preds: list[Tensor]) -> list[dict[str, Any]]:
        logits = []

        def process(protos: Tensor, coefficients: Tensor, boxes: Tensor, shape: Any) -> Tensor:
            z = coefficients @ protos.float().flatten(1)
            logits.append(z.unflatten(1, protos.shape[1:]))
            return ops.process_mask(protos, coefficients, boxes, shape)

        self.process = process
        return [
            pred | {"logits": z} for pred, z in zip(super().postprocess(preds), logits, strict=True)
        ]

    def scale_preds(self, predn: dict[str, Any], pbatch: dict[str, Any]) -> dict[str, Any]:
        scaled = super(SegmentationValidator, self).scale_preds(predn, pbatch)
        gains, (left, top) = pbatch["ratio_pad"]
        top, left = round(top - 0.1), round(left - 0.1)  # of the image in the padded input
        height, width = (
            max(round(n * gain), 1) for n, gain in zip(pbatch["ori_shape"], gains, strict=True)
        )
        stride, z = math.gcd(4, top, left, height, width), predn["logits"]
        if stride < 4 and len(z):  # the padding ends between two logits
            z = F.interpolate(z[None], scale_factor=4 // stride, mode="bilinear")[0]
        top, left, height, width = (n // stride for n in (top, left, height, width))
        z = z[:, top : top + height, left : left + width]
        masks = ao.mask_rle(z, pbatch["ori_shape"], boxes=scaled["bboxes"])
        return scaled | {"codes": masks.coco()}

    def pred_to_json(self, predn: dict[str, Any], pbatch: dict[str, Any]) -> None:
        before = len(self.jdict)
        super(SegmentationValidator, self).pred_to_json(predn, pbatch)
        for entry, code in zip(self.jdict[before:], predn["codes"], strict=True):
            entry["segmentation"] = code

"""Ultralytics' loss for semantic segmentation, from its head's logits of output stride 8.

    import ultralytics_loss
    ultralytics_loss.install()  # before the training begins
    YOLO("yolo26n-sem.yaml").train(data="cityscapes8.yaml")

It needs ultralytics, of which 8.4.190 was tested: the same value and gradient, if all labels are
classes or ignored (others are ignored here, and counted in the loss's terms). Ultralytics
upsamples the logits and those of the auxiliary head to full resolution; here they are read as they
are.
"""
# pyright: reportMissingImports=false

from typing import Any

from torch import Tensor, nn
from ultralytics.nn import tasks
from ultralytics.utils.loss import SemanticSegmentationLoss as TheirLoss

import anchorops as ao


class SemanticSegmentationLoss(nn.Module):
    """Cross-entropy + Dice of the logits + 0.4 · cross-entropy of the auxiliary logits.

    model: whose class weights, or those of Cityscapes, the cross-entropy uses.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        theirs = TheirLoss(model)
        binary = theirs.nc == 1
        self.ce = (
            ao.BinaryCrossEntropy(ignore_index=255)
            if binary
            else ao.CrossEntropy(theirs.ce.weight, ignore_index=255)
        )
        self.both = ao.CrossEntropyDice(
            self.ce, ao.Dice(sigmoid=binary, smooth=0.5, absent="keep", ignore_index=255)
        )

    def forward(
        self, preds: Tensor | tuple[Tensor, Tensor], batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """preds: logits (B, K, h, w), or these and auxiliary ones. batch["semantic_mask"]:
        (B, H, W), 255 is ignored. Returns the loss times B, and its parts."""
        logits, *auxiliary = preds if isinstance(preds, tuple) else (preds,)
        labels = batch["semantic_mask"].to(logits.device)
        total = self.both(logits, labels)
        terms = self.both.terms
        parts = {"ce_loss": terms["ce"], "dice_loss": terms["dice"], "aux_loss": terms["ce"] * 0}
        for aux_logits in auxiliary:
            loss = 0.4 * self.ce(aux_logits, labels)
            total = total + loss
            parts["aux_loss"] = loss.detach()
        return total * len(logits), parts


def install() -> None:
    """Models that Ultralytics builds from now on use this loss."""
    tasks.SemanticSegmentationLoss = SemanticSegmentationLoss

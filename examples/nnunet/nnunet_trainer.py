"""A trainer of nnU-Net with the losses of anchorops, equal to its own: cross-entropy + Dice.

    export nnUNet_extTrainer=examples/nnunet
    nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerAnchorops

It needs nnunetv2, of which 2.8.1 was tested. The loss is computed in one pass over the logits of
each level of deep supervision, and keeps no map of all classes. Labels, regions, ignored labels and
several GPUs work as in nnU-Net.
"""
# pyright: reportMissingImports=false

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

import anchorops as ao

SMOOTH = 1e-5
IGNORED = 255


class LabelLoss(nn.Module):
    """DC_and_CE_loss as nnUNetTrainer uses it: logits (B, K, …), labels (B, 1, …).

    class_weights: [K], of the cross-entropy.
    """

    def __init__(
        self,
        num_classes: int,
        batch_dice: bool,
        ignore_label: int | None = None,
        process_group: str | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        ignore_index = -1 if ignore_label is None else ignore_label
        self.loss = ao.CrossEntropyDice(
            ao.CrossEntropy(class_weights, ignore_index=ignore_index),
            ao.Dice(
                classes=range(1, num_classes),
                per_image=not batch_dice,
                smooth=SMOOTH / 2,  # nnU-Net's is of twice the numbers
                absent="keep",
                ignore_index=ignore_index,
                process_group=process_group,
            ),
        )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.loss(logits, target.to(torch.int16)) - 1  # nnU-Net's Dice loss is −score


class RegionLoss(nn.Module):
    """DC_and_BCE_loss as nnUNetTrainer uses it: logits (B, C, …), targets (B, C, …) of 0 and 1.

    ignored: targets have another channel, which is 1 where nothing is known.
    """

    def __init__(self, channels: int, batch_dice: bool, ignored: bool, process_group: str | None):
        super().__init__()
        self.ignored = ignored
        self.loss = ao.CrossEntropyDice(
            ao.BinaryCrossEntropy(ignore_index=IGNORED),
            ao.Dice(
                sigmoid=True,
                per_image=not batch_dice,
                smooth=SMOOTH / 2,
                absent="keep",
                ignore_index=IGNORED,
                process_group=process_group,
            ),
            # nnU-Net divides by the pixels that are not ignored, not by these times channels
            ce_weight=channels if ignored else 1,
        )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        labels = target.to(torch.uint8)
        if self.ignored:
            labels = labels[:, :-1].masked_fill(labels[:, -1:] == 1, IGNORED)
        return self.loss(logits, labels) - 1


class nnUNetTrainerAnchorops(nnUNetTrainer):
    def _build_loss(self) -> nn.Module:
        batch_dice = self.configuration_manager.batch_dice
        process_group = "world" if self.is_ddp and batch_dice else None
        heads, ignore_label = (
            self.label_manager.num_segmentation_heads,
            self.label_manager.ignore_label,
        )
        if self.label_manager.has_regions:
            loss = RegionLoss(heads, batch_dice, ignore_label is not None, process_group)
        else:
            loss = LabelLoss(heads, batch_dice, ignore_label, process_group)
        loss.to(self.device)
        theirs = super()._build_loss()
        if not isinstance(theirs, DeepSupervisionWrapper):
            return loss
        return DeepSupervisionWrapper(loss, theirs.weight_factors)

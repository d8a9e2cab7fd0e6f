"""Mean intersection over union, as a torchmetrics Metric."""

from typing import Any

import torch
from torch import Tensor

from ._checks import (
    check_choice,
    check_count,
    check_flags,
    check_ignore_index,
    check_integers,
    check_label_values,
    check_strided,
    clean_bools,
    describe,
    fail,
    missing_extra,
    without_channel,
)
from ._ops.confusion import check_matrix_classes, confusion_for, pixel_confusion_for

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    raise missing_extra("MeanIoU", error, extra="diagnostics") from error


class MeanIoU(Metric):
    """Mean intersection over union (IoU, Jaccard index) of all pixels that `update` received.

        IoU_k = n_kk / (Σ_j n_kj + Σ_j n_jk − n_kk),   n = the confusion matrix

    It equals torchmetrics' JaccardIndex(task="multiclass"), with sigmoid task="multilabel", for
    every average, except where no pixel is valid: it is 0 (theirs is then NaN for some averages).
    Before any `update` it is NaN, and torchmetrics warns. With "macro" it is also the mIoU of
    mmsegmentation. (torchmetrics.segmentation.MeanIoU computes a mean over images.) `update` reads
    low-resolution logits; the upsampled ones are never stored.

    Args:
        num_classes: K, 2 to 4,096; with sigmoid C, at least 1.
        sigmoid: each channel is a binary problem of its own; its IoU is that of the pixels that are
            1, or predicted as 1 (logit above 0).
        average: what `compute` returns. "macro": the mean over the classes that occur, in the
            labels or in the predictions; with sigmoid over all channels, and one that does not
            occur counts as 0. "micro": Σ_k n_kk / Σ_k union_k. "weighted": the mean over the
            classes, weighted by their number of labels. "none" or None: the IoU of each class,
            [K], 0 where it does not occur; for torchmetrics' ClasswiseWrapper.
        ignore_index: the label to ignore, 255 by default; with K > 255 it must be given. It may be
            a class: this class then has no IoU and is in no mean, but a pixel of another class that
            is predicted as this one is wrong. (JaccardIndex(task="multilabel") takes a label
            0 ≤ ignore_index < C also as the number of a channel, and leaves this channel out of its
            macro mean. Here it is a label alone.)
        align_corners: of the upsampling, as in F.interpolate.
        check_labels: as in `confusion`; a sigmoid has two classes, 0 and 1.
        metric_arguments: of torchmetrics.Metric, for example sync_on_compute.

    The state is `confusion`, int64 [K, K], truth × prediction, with sigmoid [C, 2, 2], also under
    float(), half() and set_dtype(). `compute` adds the states of all ranks.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    plot_lower_bound, plot_upper_bound, plot_legend_name = 0.0, 1.0, "Class"
    plot = Metric._plot
    confusion: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        sigmoid: bool = False,
        average: str | None = "macro",
        ignore_index: int | None = None,
        align_corners: bool = False,
        check_labels: bool = False,
        **metric_arguments: Any,
    ) -> None:
        super().__init__(**metric_arguments)
        flags = {"align_corners": align_corners, "check_labels": check_labels}
        check_flags("MeanIoU", sigmoid=sigmoid, **flags)
        self.average = "none" if average is None else average
        check_choice("MeanIoU", "average", self.average, ("macro", "micro", "weighted", "none"))
        check_classes = check_count if sigmoid else check_matrix_classes
        self.num_classes = num_classes = check_classes("MeanIoU", "num_classes", num_classes)
        self.sigmoid = sigmoid
        self.align_corners, self.check_labels = align_corners, check_labels
        classes = 2 if sigmoid else num_classes
        self.ignore_index = check_ignore_index("MeanIoU", ignore_index, classes)
        shape = (num_classes, 2, 2) if sigmoid else (num_classes, num_classes)
        self.add_state("confusion", torch.zeros(shape, dtype=torch.int64), "sum")
        # MetricCollection gives metrics of equal states one state for all later batches: this one
        # is constant, and equal where the arguments are.
        arguments = torch.tensor([self.ignore_index, align_corners, check_labels])
        self.add_state("arguments", arguments, "max")

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            predictions: logits (B, K, h, w) or (B, K, d, h, w), floating; or classes of the labels'
                shape, integer (a pixel whose prediction is not a class is ignored). With sigmoid
                logits of C channels, or 0 and 1 of the labels' shape, integer or bool.
            labels: integer, (B, H, W) or (B, D, H, W) of any size, also with a channel, (B, 1, …).
                With sigmoid 0 and 1, (B, C, …); if C = 1 also (B, H, W) or (B, D, H, W).

        Raises:
            ValueError: wrong shape, dtype, device or label.
        """
        label_options = {"ignore_index": self.ignore_index, "check_labels": self.check_labels}
        if not isinstance(predictions, Tensor):
            fail("MeanIoU", "predictions", "a tensor of logits or classes", describe(predictions))
        logits = predictions
        if self.sigmoid and not predictions.is_floating_point():
            check_strided("MeanIoU", "labels", labels)
            if self.num_classes == 1:
                labels = without_channel(labels, predictions.dim())
            if not isinstance(labels, Tensor) or predictions.shape != labels.shape:
                expected = "the labels' shape, or floating-point logits"
                fail("MeanIoU", "predictions", expected, describe(predictions))
            if labels.dtype == torch.bool:
                labels = clean_bools(labels)
            else:
                check_integers("MeanIoU", "labels", labels)
            if predictions.dtype == torch.bool:
                predictions = clean_bools(predictions)
            if self.check_labels:  # of the given labels, before some are ignored
                check_label_values("MeanIoU", labels, 2, self.ignore_index)
                label_options["check_labels"] = False
            known = (predictions == 0) | (predictions == 1)
            labels = torch.where(known, labels.long(), self.ignore_index)
            logits = (predictions == 1).float() - 0.5
            if self.num_classes == 1 and logits.dim() in (3, 4) and logits.shape[1] != 1:
                logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)  # (B, H, W), (B, D, H, W)
        if logits.is_floating_point():
            if logits.dim() < 2 or logits.shape[1] != self.num_classes:
                expected = f"{self.num_classes} channels in dimension 1, as num_classes"
                if not self.sigmoid and logits.shape[1:2] == (1,):
                    expected += " (one sigmoid: MeanIoU(1, sigmoid=True))"
                fail("MeanIoU", "predictions", expected, describe(predictions))
            if not self.sigmoid and logits.dim() not in (4, 5):
                expected = "logits (B, K, h, w) or (B, K, d, h, w), or integer classes"
                fail("MeanIoU", "predictions", expected, describe(predictions))
            options = {"sigmoid": self.sigmoid, "align_corners": self.align_corners}
            matrix = pixel_confusion_for("MeanIoU", logits, labels, **options, **label_options)
        else:
            check_integers("MeanIoU", "predictions", predictions)
            predictions = predictions.long()
            arguments = predictions, labels, self.num_classes
            matrix = confusion_for("MeanIoU", *arguments, **label_options)
        self.confusion = self.confusion + matrix  # new: a state may be a tensor of inference mode

    def _intersections_and_unions(self) -> tuple[Tensor, Tensor]:
        """n_kk and the union of each class, [K], int64; 0 for a class that is ignored."""
        if self.sigmoid:
            intersections = self.confusion[:, 1, 1]
            return intersections, self.confusion.sum((1, 2)) - self.confusion[:, 0, 0]
        intersections = self.confusion.diagonal()
        unions = self.confusion.sum(0) + self.confusion.sum(1) - intersections
        if 0 <= self.ignore_index < self.num_classes:
            unions[self.ignore_index] = 0
        return intersections, unions

    def per_class(self) -> Tensor:
        """The IoU of each class, [K], float32, whatever the average. A class that is ignored, or
        occurs neither in the labels nor in the predictions, has none: it is NaN here. The values
        are those of this rank; for those of all ranks call it inside
        `with metric.sync_context():`."""
        intersections, unions = self._intersections_and_unions()
        return intersections.float() / unions.float()

    def compute(self) -> Tensor:
        """The average, a float32 scalar, 0 if no class occurs; or each class, [K], float32. NaN
        before any `update`. torchmetrics keeps the tensor for the next call: do not change it."""
        intersections, unions = self._intersections_and_unions()
        if self.average == "micro":
            intersections, unions = intersections.sum(), unions.sum()
        iou = torch.where(unions > 0, intersections.float() / unions.float(), 0)
        if self.average in ("macro", "weighted"):
            if self.average == "weighted":
                weights = self.confusion[:, 1].sum(1) if self.sigmoid else self.confusion.sum(1)
            else:
                weights = torch.ones_like(unions) if self.sigmoid else unions > 0
            weights = weights.float()
            iou = (weights * iou).sum() / weights.sum().clamp(min=1)
        if self.update_called:
            return iou
        # another rank may have counted pixels, or a checkpoint
        return torch.where(self.confusion.any(), iou, torch.nan)

    def set_dtype(self, dst_type: str | torch.dtype) -> "MeanIoU":
        """Changes nothing, because the counts are integers."""
        return self

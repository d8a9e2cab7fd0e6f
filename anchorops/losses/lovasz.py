"""The Lovász losses, from histograms of the errors instead of sorted errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_choice, check_flags, check_int
from .._ops.hinges import hinge_loss
from .._ops.probability_histograms import count_labels_out_of_range, error_losses
from .._ops.sigmoid import contiguous
from .._ops.softmax_moments import as_images
from .pixel import PixelLoss, Terms, check_chosen_classes, chosen_classes


class Lovasz(PixelLoss):
    """The Lovász extension of the Jaccard loss (Berman et al., arXiv 1705.08790), without sorting.

    For a class with G pixels and errors e in [0, 1] (1 − p of its pixels, p of others), with F(t)
    and N(t) the pixels of the class and the others with e ≥ t:

        L = ∫ J(t) dt,    J(t) = (F(t) + N(t)) / (G + N(t))

    That is the loss that the released code computes from the sorted errors (their equation 9). J
    falls with t, so a histogram of n bins gives L within 1/(2n). The slope of L in an error is the
    mean of two orders of the pixels of its bin, those of the class first or last: a subgradient at
    errors that are rounded to bins.

    With sigmoid=True, the hinge max(0, 1 − z) of pixels that are 1, and max(0, 1 + z) of others
    (their section 3.2), of each channel. Hinges are not bounded: a bin is 1/512 of its error, up
    to errors of 2^40.

    Args:
        sigmoid: each channel is a binary problem of its own; labels are those of `Dice`. The
            full-resolution logits of one channel at a time are computed, in both passes.
        classes: the classes to use, of their softmax; all if not given.
        absent: a class (of an image) without pixels in the labels is omitted from the mean
            ("skip"), adds 0 to it ("zero"), or is treated as by the formula ("keep").
        per_image: the mean of the losses of the images.
        bins: n, from 2 to 65,536; not used with sigmoid=True. The tables need about 120·K·n bytes.
        ignore_index, align_corners, check_labels: as in `CrossEntropy`.

    Comparison with other libraries, for the same logits at full resolution: smp's
    LovaszLoss("multiclass") and mmsegmentation's LovaszLoss(classes="present", per_image=False,
    reduction="none") are Lovasz(); their modes of one sigmoid channel are
    Lovasz(sigmoid=True, absent="keep"). smp ranks all channels of "multilabel" together, here each
    channel is a loss of its own.

    Call it with (logits, labels). `terms`: lovasz, labels_out_of_range, labels_ignored. Derivatives
    of second order are not implemented, and raise an error. Where a logit is NaN or +∞, the error
    of the pixel's class is 1, and the gradient is NaN. Of sigmoids, NaN or an infinite error makes
    the loss and the logit's gradient NaN; so does a NaN or infinite logit that a valid pixel reads
    with weight 0.
    """

    def __init__(
        self,
        *,
        sigmoid: bool = False,
        classes: Sequence[int] | None = None,
        absent: str = "skip",
        per_image: bool = False,
        bins: int = 1024,
        ignore_index: int | None = None,
        align_corners: bool = False,
        check_labels: bool = False,
    ) -> None:
        super().__init__(ignore_index, align_corners, check_labels)
        check_flags("Lovasz", sigmoid=sigmoid, per_image=per_image)
        check_choice("Lovasz", "absent", absent, ("skip", "zero", "keep"))
        self.bins = check_int("Lovasz", "bins", bins, "an int from 2 to 65,536", 2, 2**16)
        self.sigmoid, self.per_image = sigmoid, per_image
        self.classes, self.absent = chosen_classes("Lovasz", classes), absent

    def loss(
        self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None
    ) -> tuple[Tensor, Terms]:
        if pixel_weights is not None:
            self._no_pixel_weights()
        ignore_index = self.ignored(logits)
        if self.classes is not None:
            check_chosen_classes("Lovasz", self.classes, logits.shape[1])
        whole = self._hinges if self.sigmoid else self._softmax
        if self.per_image and logits.dim() > 2 and logits.shape[0] > 0:
            images = zip(logits.split(1), labels.split(1), strict=True)
            losses, counts = zip(*(whole(x, y, ignore_index) for x, y in images), strict=True)
            loss, count = torch.stack(losses).mean(), torch.stack(counts).sum(0)
        else:
            loss, count = whole(logits, labels, ignore_index)
        labels_out_of_range = count_labels_out_of_range(labels, count, ignore_index)
        parts = {"lovasz": loss.detach()}
        return loss.clone(), Terms(parts, labels.numel(), count, labels_out_of_range)

    def _softmax(self, logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """The loss, and the number of labels of each class."""
        logits, by_image = as_images(logits, labels)
        arguments = self.bins, ignore_index, self.align_corners
        losses, counts = error_losses(logits, by_image(labels), *arguments)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return (losses * self._shares(counts)).sum().to(dtype), counts

    def _shares(self, counts: Tensor) -> Tensor:
        """The weight of each class in the mean. counts: its number of pixels."""
        used = torch.ones_like(counts, dtype=torch.float64)
        if self.classes is not None:
            # computed on the device, because copying numbers to it would synchronise
            one = used.new_ones(())
            used = torch.stack([one * (k in self.classes) for k in range(len(counts))])
        present = counts > 0
        total = (used * present if self.absent == "skip" else used).sum().clamp(min=1)
        return (used if self.absent == "keep" else used * present) / total

    def _hinges(self, logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        if logits.dim() > 3 and logits.stride(1) < logits.stride(-1):  # channels last
            logits = contiguous(logits)
        channels = zip(logits.split(1, 1), labels.unbind(1), strict=True)
        options = ignore_index, self.align_corners
        losses, counts = zip(*(hinge_loss(x, y, *options) for x, y in channels), strict=True)
        counts = torch.stack(counts)
        share = self._shares(counts[:, 0])
        return (torch.cat(losses) * share).sum().to(losses[0].dtype), counts.sum(0).flip(0)

"""The loss of matched masks: each has one channel of logits, and labels of its own or an id."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import (
    check_integers,
    check_number,
    check_pixels,
    check_share,
    check_strided,
    describe,
    fail,
)
from .._moments import Options, Wanted, as_scalar
from .._ops.softmax_moments import moments_of, weighted
from .._shared.sums import fixed_order_sum
from .._torch_state import has_values, in_transform
from .pixel import PixelLoss, Terms

# Bytes of a strip of rows of the maps of ids as int64, and of the copies for the masks. Copies of
# whole maps took 160 to 240 MiB more for 20 masks of 1024², and on a CPU, whose caches are small, 8
# times as long or more. A GPU launches some kernels for each strip.
STRIP_ON_CPU, STRIP = 2**23, 2**26


class MaskLoss(PixelLoss):
    """Cross-entropy and Dice of matched masks, from low-resolution logits and labels at their own
    size, as in MaskFormer and in the panoptic head of DETR.

        L = Σ_n (ce_weight·CE_n + dice_weight·(1 − score_n)) / num_masks
        CE_n    = Σ_q α_y·(1 − p_y)^γ·(−log p_y) / #{q}
        score_n = (2·Σ_{y = 1} p_1 + 1) / (Σ_q p_1 + #{y = 1} + 1)

    over the valid pixels q of mask n, with p_1 = sigmoid(z) of the upsampled logits, p_0 = 1 − p_1,
    α_1 = focal_alpha, α_0 = 1 − focal_alpha (both 1 if it is not given). A mask without valid
    pixels adds 0. The matching of queries and objects is the caller's.

    Args:
        ce_weight, dice_weight: the weights of the two terms, at least 0.
        focal_alpha: α of positive pixels, in [0, 1].
        focal_gamma: γ at least 0 (Lin et al., Focal Loss, arXiv 1708.02002, Eq. 5, with α). The
            factor's 1 − p_y is at least 2⁻²⁴.
        ignore_index: of masks the label to ignore, 255 by default; of maps the id of void pixels,
            which are ignored in all masks of their image; none by default.
        align_corners: of the upsampling, as in F.interpolate.
        check_labels: raise an error if a label of a mask is not 0, 1 or ignore_index, as in
            `CrossEntropy`; if an id is not in its map, or images or num_masks are out of range.
            This synchronises with the device.

    Shapes:
        logits: (N, h, w), those of the N matched queries: `mask_logits[images, queries]`.
            float32, bfloat16, float16 or float64.
        labels: (N, H, W) of any size, 0, 1 or ignore_index, integer or bool. With ids, maps
            (B, H, W) of the ids of instances, any integer dtype, one for each image: then masks of
            the instances are made with one byte for each label.
        ids: integer [N]: the mask of n are the pixels with this id in its map.
        images: integer [N]: the number of the map; may be left out if there is one map. Numbers on
            the CPU are always checked.
        num_masks: a number above 0, or a tensor of one number; N by default, but at least 1. On
            several GPUs it is the number of all ranks divided by that of the ranks: with DDP, the
            gradients are then those of one process.
        Returns a scalar, float32 (float64 for float64 logits). With N = 0 it is 0, and its gradient
        is empty.

    Raises ValueError for a wrong argument or input; the message names it.

    With ce_weight=20, focal_alpha=0.25 and focal_gamma=2 it is loss_mask and loss_dice of
    Transformers' MaskFormer, weighted (Cheng et al., arXiv 2107.06278); with ce_weight=1 that of
    DetrForSegmentation (Carion et al., arXiv 2005.12872). Mask2Former and its successors compute
    the two at sampled points: another loss.

    `terms`: ce, dice, labels_out_of_range, labels_ignored, of all masks.
    """

    sigmoid = True

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        focal_alpha: float | None = None,
        focal_gamma: float = 0.0,
        ignore_index: int | None = None,
        align_corners: bool = False,
        check_labels: bool = False,
    ) -> None:
        super().__init__(ignore_index, align_corners, check_labels)
        self.ce_weight = check_number("MaskLoss", "ce_weight", ce_weight)
        self.dice_weight = check_number("MaskLoss", "dice_weight", dice_weight)
        if focal_alpha is not None:
            focal_alpha = check_share("MaskLoss", "focal_alpha", focal_alpha)
        self.focal_alpha = focal_alpha
        self.focal_gamma = check_number("MaskLoss", "focal_gamma", focal_gamma)

    @torch.jit.unused
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        ids: Tensor | None = None,
        images: Tensor | None = None,
        *,
        num_masks: Tensor | float | None = None,
    ) -> Tensor:
        masks = "(N, H, W) of masks, or (B, H, W) of ids"
        for name, given, shape in (("logits", logits, "(N, h, w)"), ("labels", labels, masks)):
            check_strided("MaskLoss", name, given)
            if not isinstance(given, Tensor) or given.dim() != 3:
                fail("MaskLoss", name, f"a tensor {shape}", describe(given))
        ignore_index = self.ignore_index
        if ids is not None:
            labels = self._masks(logits, labels, ids, images)
            ignore_index = None
        elif images is not None:
            fail("MaskLoss", "images", "None without ids", describe(images))
        if labels.shape[0] != logits.shape[0]:
            expected = f"{logits.shape[0]} masks, as logits (or maps, with ids)"
            fail("MaskLoss", "labels", expected, describe(labels))
        given = logits[:, None], labels[:, None], ignore_index, self.check_labels and ids is None
        masks, ignore_index = check_pixels("MaskLoss", *given, sigmoid=True)
        focal_gamma = self.focal_gamma if self.focal_gamma > 0 else None
        options = Options(
            focal_gamma=focal_gamma, ignore_index=ignore_index, align_corners=self.align_corners
        )
        wanted = Wanted(per_image=True, probability_sums=True, labels_out_of_range=True)
        moments = moments_of("MaskLoss", given[0], masks, options, wanted, sigmoid=True)
        assert moments.intersections is not None and moments.probability_sums is not None
        assert moments.labels_out_of_range is not None
        losses, divisor = moments.losses, self._divisor(num_masks, moments.losses)
        if self.focal_alpha is not None:
            alphas = [as_scalar(x, losses) for x in (1 - self.focal_alpha, self.focal_alpha)]
            losses = weighted(losses, torch.stack(alphas))
        ce = losses.sum((1, 2)) / moments.counts.sum((1, 2)).clamp(min=1)
        intersections, sums, counts = (
            x[:, 0, 1] for x in (moments.intersections, moments.probability_sums, moments.counts)
        )
        dice = 1 - (2 * intersections + 1) / (sums + counts + 1)
        ce = self.ce_weight * fixed_order_sum(ce) / divisor
        dice = self.dice_weight * fixed_order_sum(dice) / divisor
        parts = {"ce": ce.detach(), "dice": dice.detach()}
        self._last = Terms(parts, masks.numel(), moments.counts, moments.labels_out_of_range)
        return ce + dice

    def _masks(self, logits: Tensor, maps: Tensor, ids: Tensor, images: Tensor | None) -> Tensor:
        """uint8 (N, H, W): 1 where the map has the id, 255 where it has ignore_index, else 0."""
        check_integers("MaskLoss", "labels", maps)
        for name, numbers in (("ids", ids), ("images", images)):
            if numbers is None:
                continue
            if not isinstance(numbers, Tensor) or numbers.shape != logits.shape[:1]:
                expected = f"a tensor [{len(logits)}], one number for each mask of logits"
                fail("MaskLoss", name, expected, describe(numbers))
            check_integers("MaskLoss", name, numbers)
        ids = ids.to(maps.device, torch.int64)
        if images is None:
            if len(maps) != 1:
                expected = f"the number of each mask's map, of {len(maps)} maps"
                fail("MaskLoss", "images", expected, "None")
            images = torch.zeros_like(ids)
        on_host = images.is_cpu and not in_transform(images) and has_values(images)
        images = images.to(maps.device, torch.int64)
        checked = self.check_labels or on_host  # index_select would raise an IndexError on the CPU
        if checked and ((images < 0) | (images >= len(maps))).any():
            expected = f"numbers from 0 to {len(maps) - 1}, as there are {len(maps)} maps"
            fail("MaskLoss", "images", expected, images.unique().tolist())
        masks = masks_of_ids(maps, ids, images, self.ignore_index)
        if self.check_labels and not (found := (masks == 1).flatten(1).any(1)).all():
            fail("MaskLoss", "ids", "ids that are in their maps", ids[~found].tolist())
        return masks

    def _divisor(self, num_masks: Tensor | float | None, losses: Tensor) -> Tensor | float:
        if num_masks is None:
            return max(losses.shape[0], 1)
        if not isinstance(num_masks, Tensor):
            return check_number("MaskLoss", "num_masks", num_masks, above=True)
        if num_masks.numel() != 1 or num_masks.is_complex() or num_masks.dtype == torch.bool:
            fail("MaskLoss", "num_masks", "one number", describe(num_masks))
        number = num_masks.to(losses).view(())
        if self.check_labels and not number > 0:
            fail("MaskLoss", "num_masks", "a number above 0", number.item())
        return number


def masks_of_ids(maps: Tensor, ids: Tensor, images: Tensor, void: int | None) -> Tensor:
    """uint8 (N, H, W): 1 where the map (B, H, W) of its image has the id, 255 where it has the id
    `void`, else 0. ids, images: int64 [N]."""
    masks = maps.new_empty((ids.shape[0], *maps.shape[1:]), dtype=torch.uint8)
    strips = 1  # compiled code copies no maps
    if not torch.compiler.is_compiling():
        labels = max(masks.numel(), maps.numel())
        strips = -(-8 * labels // (STRIP_ON_CPU if maps.is_cpu else STRIP))
    parts = (x.tensor_split(max(strips, 1), 1) for x in (maps, masks))
    for strip, mask in zip(*parts, strict=True):
        strip = strip.long()  # torch has no comparisons for uint16 to uint64
        mask.copy_(strip.index_select(0, images) == ids[:, None, None])
        if void is not None:
            ignored = (strip == void).to(torch.uint8).mul(255)
            mask.bitwise_or_(ignored.index_select(0, images))
    return masks

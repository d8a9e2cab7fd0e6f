"""The loss of matched masks, `ao.MaskLoss`, in Transformers' criteria of MaskFormer and of DETR for
segmentation, and in a loop of one's own, whose labels are maps of instance ids.

    python examples/mask_losses.py [--steps 40]

It compares the first two with the library's own loss, and trains a small network with the third.

    maskformer.criterion = LowResolutionMaskFormerLoss(maskformer.criterion)
    detr.loss_function = detr_loss

The sum of both mask losses, with their weights, is one entry of the losses. Classes, boxes and the
matching stay the library's. Mask2Former and OneFormer compute another loss, at sampled points.
"""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import (
    DetrConfig,
    DetrForSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    ResNetConfig,
)
from transformers.loss import loss_for_object_detection as of_detr
from transformers.models.maskformer.modeling_maskformer import MaskFormerLoss

import anchorops as ao

BACKBONE: dict[str, Any] = {  # of the models that are compared
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
CLASSES: dict[str, Any] = {"num_labels": 4}
FOCAL: dict[str, Any] = {"focal_alpha": 0.25, "focal_gamma": 2.0}
Pairs = list[tuple[Tensor, Tensor]]  # of each image, the queries and their targets


class LowResolutionMaskFormerLoss(MaskFormerLoss):
    """The criterion of a MaskFormer, whose mask logits stay at low resolution. Masks are 0 or 1."""

    def __init__(self, criterion: MaskFormerLoss) -> None:
        weights = criterion.weight_dict
        super().__init__(criterion.num_labels, criterion.matcher, weights, criterion.eos_coef)
        self.empty_weight = criterion.empty_weight
        mask, dice = weights["loss_mask"], weights["loss_dice"]
        self.masks = ao.MaskLoss(ce_weight=mask, dice_weight=dice, **FOCAL)

    def loss_masks(
        self, masks_queries_logits: Tensor, mask_labels: list[Tensor], indices: Any, num_masks: Any
    ) -> dict[str, Tensor]:
        padded, _ = self._pad_images_to_max_in_batch([x.to(torch.uint8) for x in mask_labels])
        logits = masks_queries_logits[self._get_predictions_permutation_indices(indices)]
        labels = padded[self._get_targets_permutation_indices(indices)]
        # a name that is not in weight_dict: the model multiplies the others by their weights
        return {"masks": self.masks(logits, labels, num_masks=num_masks)}


class LowResolutionDetrLoss(of_detr.ImageLoss):
    """The criterion of a DETR for segmentation, whose mask logits stay at low resolution. Masks are
    0 or 1."""

    def __init__(self, config: DetrConfig) -> None:
        matcher = of_detr.HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
        losses = ["labels", "boxes", "cardinality", "masks"]
        super().__init__(matcher, config.num_labels, config.eos_coefficient, losses)
        mask, dice = config.mask_loss_coefficient, config.dice_loss_coefficient
        self.masks = ao.MaskLoss(ce_weight=mask, dice_weight=dice, **FOCAL)

    def loss_masks(
        self, outputs: dict[str, Tensor], targets: list[dict], indices: Any, num_boxes: float
    ) -> dict[str, Tensor]:
        masks = [target["masks"].to(torch.uint8) for target in targets]
        padded, _ = of_detr.nested_tensor_from_tensor_list(masks).decompose()
        logits = outputs["pred_masks"][self._get_source_permutation_idx(indices)]
        labels = padded[self._get_target_permutation_idx(indices)]
        return {"masks": self.masks(logits, labels, num_masks=num_boxes)}


def detr_loss(
    logits: Tensor,
    labels: list[dict],
    device: torch.device,
    pred_boxes: Tensor,
    pred_masks: Tensor,
    config: DetrConfig,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """Transformers' ForSegmentationLoss, with `LowResolutionDetrLoss`."""
    outputs: dict[str, Any] = {"logits": logits, "pred_boxes": pred_boxes, "pred_masks": pred_masks}
    auxiliary = None
    if config.auxiliary_loss:
        auxiliary = of_detr._set_aux_loss(outputs_class, outputs_coord)
        outputs["auxiliary_outputs"] = auxiliary
    losses = LowResolutionDetrLoss(config).to(device)(outputs, labels)
    weights = {
        "loss_ce": 1.0,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
        "masks": 1.0,
    }
    names = {name: name.rstrip("_0123456789") for name in losses}  # without the layer
    total = sum(weights[names[x]] * loss for x, loss in losses.items() if names[x] in weights)
    assert isinstance(total, Tensor)
    return total, losses, auxiliary


# A loop of one's own. Labels are maps (B, H, W), and for each image the ids [T] and classes [T] of
# its instances.


def mask_costs(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The focal and the Dice cost [Q, T] of all pairs of logits (Q, h, w) and masks (T, h, w), by
    products of matrices, at the resolution of the logits: those of MaskFormer's matcher."""
    z, y = logits.flatten(1), masks.flatten(1).to(logits.dtype)
    p = z.sigmoid()
    positive, negative = 0.25 * (1 - p) ** 2 * F.softplus(-z), 0.75 * p**2 * F.softplus(z)
    focal = ((positive - negative) @ y.T + negative.sum(1, keepdim=True)) / z.shape[1]
    dice = 1 - (2 * p @ y.T + 1) / (p.sum(1, keepdim=True) + y.sum(1) + 1)
    return focal, dice


def number_of_masks(ids: Sequence[Tensor], device: torch.device) -> Tensor:
    """The mean over the ranks: with DDP, gradients are those of one process, if there are as many
    masks as ranks. At least 1, as in Transformers."""
    number = torch.tensor(float(sum(map(len, ids))), device=device)
    if dist.is_initialized():
        dist.all_reduce(number)
        number /= dist.get_world_size()
    return number.clamp(min=1)


class Criterion(nn.Module):
    """MaskFormer's loss, with labels as maps of ids."""

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        super().__init__()
        self.masks = ao.MaskLoss(ce_weight=20.0, ignore_index=ignore_index, **FOCAL)
        self.class_weight = nn.Buffer(torch.ones(num_classes + 1))
        self.class_weight[-1] = 0.1  # no object

    @torch.no_grad()
    def match(
        self, class_logits: Tensor, mask_logits: Tensor, maps: Tensor, ids: Any, classes: Any
    ) -> Pairs:
        pairs = []
        size = mask_logits.shape[2:]
        small = F.interpolate(maps[:, None].double(), size, mode="nearest")[:, 0].to(maps.dtype)
        for image, numbers in enumerate(ids):
            masks = small[image] == numbers[:, None, None]
            focal, dice = mask_costs(mask_logits[image], masks)
            cost = 20 * focal + dice - class_logits[image].softmax(1)[:, classes[image]]
            pairs.append(tuple(map(torch.as_tensor, linear_sum_assignment(cost.cpu()))))
        return pairs

    def forward(
        self, class_logits: Tensor, mask_logits: Tensor, maps: Tensor, ids: Any, classes: Any
    ) -> Tensor:
        pairs = self.match(class_logits, mask_logits, maps, ids, classes)
        images = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(pairs)])
        queries = torch.cat([queries for queries, _ in pairs])
        matched = torch.cat([x[targets] for x, (_, targets) in zip(ids, pairs, strict=True)])
        number = number_of_masks(ids, maps.device)
        loss = self.masks(mask_logits[images, queries], maps, matched, images, num_masks=number)

        wanted = torch.full(class_logits.shape[:2], len(self.class_weight) - 1, device=maps.device)
        wanted[images, queries] = torch.cat(
            [x[targets] for x, (_, targets) in zip(classes, pairs, strict=True)]
        )
        return loss + F.cross_entropy(class_logits.mT, wanted, self.class_weight)


class Queries(nn.Module):
    """A stand-in for a network: masks of output stride 4."""

    def __init__(self, num_queries: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, width, 5, 2, 2), nn.ReLU(), nn.Conv2d(width, width, 5, 2, 2), nn.ReLU())
        )
        self.masks = nn.Conv2d(width, num_queries, 1)
        self.classes = nn.Linear(width, num_queries * (num_classes + 1))
        self.num_queries = num_queries

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        classes = self.classes(features.mean((2, 3)))
        return classes.unflatten(1, (self.num_queries, -1)), self.masks(features)


def scenes(images: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, list, list]:
    """Images of rectangles, whose class is their colour; maps of their ids, 0 elsewhere, and −1,
    which is void, at their borders."""
    pixels, maps, ids = torch.zeros(images, 3, *size), torch.zeros(images, *size).int(), []
    for image in range(images):
        for k, x in enumerate(torch.randperm(3)):
            top, left = (int(torch.randint(0, n // 2, ())) for n in size)
            columns = slice(left, left + size[1] // 3)
            maps[image, top : top + size[0] // 3, columns] = 100 * (1 + k) + x.int()
            pixels[image, :, top : top + size[0] // 3, columns] = F.one_hot(x, 3)[:, None, None]
            maps[image, top, columns] = -1
        visible = maps[image].unique()
        ids.append(visible[visible > 0])
    return pixels + 0.1 * torch.randn_like(pixels), maps, ids, [x.long() % 100 for x in ids]


def train(steps: int) -> None:
    model, criterion = Queries(8, 3), Criterion(3, ignore_index=-1)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    images, maps, ids, classes = scenes(4, (64, 80))
    for step in range(steps):
        loss = criterion(*model(images), maps, ids, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            terms = {name: round(x.item(), 3) for name, x in criterion.masks.terms.items()}
            print(f"step {step + 1}: loss {loss.item():.3f}, {terms}")


def small_maskformer() -> MaskFormerForInstanceSegmentation:
    decoder = DetrConfig(num_queries=9, d_model=32, decoder_layers=2, decoder_ffn_dim=16)
    config = MaskFormerConfig(
        backbone_config=ResNetConfig(**BACKBONE),
        decoder_config=decoder,
        **dict.fromkeys(("fpn_feature_size", "mask_feature_size"), 32),
        use_auxiliary_loss=True,
        **CLASSES,
    )
    return MaskFormerForInstanceSegmentation(config)


def small_detr() -> DetrForSegmentation:
    layers: dict[str, int] = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    config = DetrConfig(
        backbone_config=ResNetConfig(**BACKBONE),
        num_queries=9,
        d_model=64,
        **layers,
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16),
        auxiliary_loss=True,
        **CLASSES,
    )
    return DetrForSegmentation(config)


def gradients(model: nn.Module, **batch: Any) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def differences(before: nn.Module, after: nn.Module, **batch: Any) -> tuple[float, float]:
    """Of the loss, and of its gradients in all parameters, relative."""
    (theirs, expected), (ours, found) = (gradients(model, **batch) for model in (before, after))
    expected, found = (torch.cat([x.flatten() for x in y]) for y in (expected, found))
    return abs(ours / theirs - 1), float((found - expected).norm() / expected.norm())


def with_our_loss(model: Any) -> Any:
    """A copy of the model."""
    after = copy.deepcopy(model)
    if isinstance(model, MaskFormerForInstanceSegmentation):
        after.criterion = LowResolutionMaskFormerLoss(model.criterion)
    else:
        after.loss_function = detr_loss
    return after


def batch_of(
    model: nn.Module, counts: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Padded images of these sizes, with so many instances: masks of each image's own size."""
    height, width = (max(x) for x in zip(*sizes, strict=True))
    pixel_mask = torch.zeros(len(sizes), height, width, dtype=torch.long)
    for mask, (h, w) in zip(pixel_mask, sizes, strict=True):
        mask[:h, :w] = 1
    masks = [(torch.rand(n, *size) < 0.3).float() for n, size in zip(counts, sizes, strict=True)]
    classes = [torch.randint(0, 4, (n,)) for n in counts]
    batch: dict[str, Any] = {
        "pixel_values": torch.randn(len(sizes), 3, height, width) * pixel_mask[:, None],
        "pixel_mask": pixel_mask,
    }
    if isinstance(model, MaskFormerForInstanceSegmentation):
        batch["output_hidden_states"] = True  # of Transformers 5, for the auxiliary loss
        return batch | {"mask_labels": masks, "class_labels": classes}
    boxes = [0.3 + 0.2 * torch.rand(n, 4) for n in counts]
    names = ("class_labels", "boxes", "masks")
    targets = [dict(zip(names, x, strict=True)) for x in zip(classes, boxes, masks, strict=True)]
    return batch | {"labels": targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for model in (small_maskformer().eval(), small_detr().eval()):
        batch = batch_of(model, [3, 5], [(64, 96), (90, 70)])
        loss, gradient = differences(model, with_our_loss(model), **batch)
        print(
            f"{type(model).__name__}: relative differences {loss:.1e}, of gradients {gradient:.1e}"
        )
    train(arguments.steps)


if __name__ == "__main__":
    main()

"""Labels and masks of Mask2Former, OneFormer, EoMT, RF-DETR and SAM 2 from their low-resolution
mask logits, as by the post-processing of Transformers. Each function is for one image.

    python examples/transformers_masks.py

Semantic and panoptic labels are those of Transformers, except for rounding. Classes whose segments
are fused (`label_ids_to_fuse`) are left out, and EoMT has other rules for its segments.

Instances are run lengths. Those of EoMT (and of lightly-train, with the same formulas), RF-DETR and
SAM 2 are equal, except for rounding. Mask2Former upsamples to 384 × 384, compares with 0, and takes
the nearest neighbours in the image; here the logits are upsampled once, so borders differ, and the
scores contain the mean probability of the low-resolution logits inside the mask.
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms
from transformers import (
    EomtConfig,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
    Mask2FormerImageProcessor,
    OneFormerImageProcessor,
    RfDetrImageProcessor,
    Sam2ImageProcessor,
)
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.mask2former import modeling_mask2former
from transformers.models.rf_detr.modeling_rf_detr import RfDetrInstanceSegmentationOutput

import anchorops as ao

Size = tuple[int, int]  # of the image
Instances = tuple[ao.MaskRLE, Tensor, Tensor]  # masks, labels, scores


def probabilities(masks: Tensor) -> Tensor:
    """(Q, 384, 384) of the mask logits (Q, h, w), as Mask2Former computes them. OneFormer does not
    upsample: its probabilities are `masks.sigmoid()`."""
    return F.interpolate(masks[None], (384, 384), mode="bilinear")[0].sigmoid()


def semantic(classes: Tensor, p: Tensor, size: Size) -> Tensor:
    """The classes (H, W), from class logits (Q, K + 1) and mask probabilities (Q, h, w)."""
    scores = torch.einsum("qk,qhw->khw", classes.softmax(1)[:, :-1], p)
    return ao.pixel_argmax(scores[None], size)[0]


def panoptic(
    classes: Tensor,
    p: Tensor,
    size: Size,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap: float = 0.8,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The number of each pixel's segment (H, W), 0 for none, and what is known of each segment."""
    scores, labels = classes.softmax(1).max(1)
    kept = (labels < classes.shape[1] - 1) & (scores > threshold)
    labels, scores = labels[kept], F.pad(scores[kept], (0, 2))
    p = F.pad(p[kept], (0, 0, 0, 0, 0, 2))  # and two of score 0, if no query is kept
    p = (p * scores[:, None, None])[None]
    owners = ao.pixel_argmax(p, size)[0]  # the query of each pixel
    inside = ao.pixel_argmax(p - mask_threshold, size, sigmoid=True, dtype=torch.uint8)[0]
    inside = torch.stack([mask.sum() for mask in inside])
    areas = owners.flatten().bincount(minlength=len(inside))
    valid = (inside > 0) & (areas > overlap * inside)
    numbers = valid.cumsum(0) * valid  # the last two are 0
    kept_queries = zip(numbers[:-2].tolist(), labels.tolist(), scores[:-2].tolist(), strict=True)
    segments = [
        {"id": i, "label_id": label, "was_fused": False, "score": round(score, 6)}
        for i, label, score in kept_queries
        if i
    ]
    return numbers[owners], segments


def of_mask2former(classes: Tensor, masks: Tensor, size: Size, threshold: float = 0.5) -> Instances:
    """Instances of one image, from class logits (Q, K + 1) and mask logits (Q, h, w)."""
    scores = classes.softmax(1)[:, :-1]
    scores, pairs = scores.flatten().topk(len(scores))  # a query may be an instance of two classes
    queries, labels = pairs // (classes.shape[1] - 1), pairs % (classes.shape[1] - 1)
    masks = masks[queries]
    inside = masks > 0
    scores = scores * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    kept = scores >= threshold
    return ao.mask_rle(masks[kept], size), labels[kept], scores[kept]


def of_eomt(
    classes: Tensor, masks: Tensor, size: Size, threshold: float = 0.8, side: int = 640
) -> Instances:
    """Instances of one image that was resized to a longer side of `side`, and padded to a square,
    from class logits (Q, K + 1) and mask logits (Q, h, w). Both upsample twice."""
    height, width = get_size_with_aspect_ratio(size, side, side)  # of the image in the input

    def in_image(masks: Tensor) -> Tensor:
        return F.interpolate(masks[None], (side, side), mode="bilinear")[0, :, :height, :width]

    scores, labels = classes.softmax(1)[:, :-1].max(1)
    means = torch.cat([mean_inside(in_image(some), size) for some in masks.split(4)])
    kept = scores * means >= threshold
    return ao.mask_rle(in_image(masks[kept]), size), labels[kept], (scores * means)[kept]


def mean_inside(masks: Tensor, size: Size) -> Tensor:
    """The mean probability [N] of the pixels inside of each mask, from logits (N, h, w): that of
    class 1 of two whose logits are 0 and z, over the pixels with the label 1."""
    inside = ao.pixel_argmax(masks[None], size, sigmoid=True, dtype=torch.uint8)[0]
    two = torch.stack([torch.zeros_like(masks), masks], 1)
    options: Any = {"ignore_index": 0, "per_image": True, "correct": False}
    moments = ao.ops.softmax_moments(two, inside, **options)
    assert moments.intersections is not None
    return moments.intersections[:, 1] / (moments.counts[:, 1] + 1e-6)


def semantic_of_eomt(classes: Tensor, masks: Tensor, size: Size, side: int = 640) -> Tensor:
    """The classes (H, W) of an image that was resized to a shorter side of `side`, from class
    logits (P, Q, K + 1) and mask logits (P, Q, h, w) of P square crops along the longer side."""
    height, width = get_size_with_aspect_ratio(size, side, None)
    wide, length = width > height, max(height, width)
    overlap = (len(masks) * side - length) / max(len(masks) - 1, 1)
    starts = [int(i * (side - overlap)) for i in range(len(masks))]
    starts[-1] = length - side  # rounding may leave it one less

    def windows() -> Iterator[tuple[Size, Tensor]]:
        """One below the other: of a wide image transposed."""
        for start, some_classes, some_masks in zip(starts, classes, masks, strict=True):
            p = F.interpolate(some_masks[None], (side, side), mode="bilinear")[0].sigmoid()
            scores = torch.einsum("qk,qhw->khw", some_classes.softmax(1)[:, :-1], p)
            yield (start, 0), (scores.mT if wide else scores)[None]

    shape = size[::-1] if wide else size
    labels = ao.window_argmax(windows(), (length, side), (side, side), shape)[0]
    return labels.mT if wide else labels


def of_rf_detr(classes: Tensor, masks: Tensor, size: Size, threshold: float = 0.5) -> Instances:
    """Instances of one image, from class logits (Q, K) and mask logits (Q, h, w)."""
    scores, pairs = classes.sigmoid().flatten().topk(len(classes))
    pairs, scores = pairs[scores > threshold], scores[scores > threshold]
    queries, labels = pairs // classes.shape[1], pairs % classes.shape[1]
    found = ao.mask_rle(masks[queries], size)
    kept = found.areas() > 0
    return found[kept], labels[kept], scores[kept]


def automatic_of_sam2(
    scores: Tensor,
    masks: Tensor,
    size: Size,
    score: float = 0.88,
    stability: float = 0.95,
    overlap: float = 0.7,
) -> tuple[ao.MaskRLE, Tensor]:
    """The masks of the pipeline "mask-generation", from scores (N,) and mask logits (N, h, w)."""
    masks, scores = masks[scores > score], scores[scores > score]
    one = 1 / (1 + math.exp(-1))  # the probability of logit 1
    inner, outer = (ao.mask_rle(masks, size, threshold=p).areas() for p in (one, 1 - one))
    stable = inner / outer > stability
    found, scores = ao.mask_rle(masks[stable], size), scores[stable]
    boxes = found.boxes().to(scores) - scores.new_tensor([0, 0, 1, 1])  # of the last pixels
    kept = nms(boxes, scores, overlap)
    return found[kept], scores[kept]


def compare_labels() -> None:
    """Compare the results for two images with 20 queries with those of transformers."""
    regions = torch.randint(0, 20, (2, 8, 8))
    outputs: Any = modeling_mask2former.Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=4 * torch.randn(2, 20, 8),
        masks_queries_logits=10.0 * F.one_hot(regions, 20).movedim(-1, 1) - 5,
    )
    sizes, processor = [(100, 90), (64, 80)], Mask2FormerImageProcessor()
    maps = processor.post_process_semantic_segmentation(outputs, sizes)
    scenes = processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
    oneformer = OneFormerImageProcessor()
    of_oneformer = oneformer.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
    for i, size in enumerate(sizes):
        classes, masks = outputs.class_queries_logits[i], outputs.masks_queries_logits[i]
        p = probabilities(masks)
        same = (semantic(classes, p, size) == torch.as_tensor(maps[i])).float().mean()
        numbers, segments = panoptic(classes, p, size)
        same_segments = (numbers == scenes[i]["segmentation"]).float().mean()
        assert segments == scenes[i]["segments_info"]
        print(f"semantic labels: {same:.2%} are equal, panoptic: {same_segments:.2%}")
        numbers, segments = panoptic(classes, masks.sigmoid(), size)
        same_segments = (numbers == of_oneformer[i]["segmentation"]).float().mean()
        assert segments == of_oneformer[i]["segments_info"]
        print(f"panoptic labels of OneFormer: {same_segments:.2%}")


def compare_instances() -> None:
    size = 120, 160
    small: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = EomtConfig(**small, num_blocks=1, num_queries=9, image_size=64)
    outputs: Any
    with torch.no_grad():
        outputs = EomtForUniversalSegmentation(config).eval()(torch.randn(1, 3, 64, 64))
    classes, masks = outputs.class_queries_logits[0], outputs.masks_queries_logits[0]
    _, labels, scores = of_eomt(classes, masks, size, 0.1, side=64)
    (result,) = EomtImageProcessor().post_process_instance_segmentation(
        outputs, [size], 0.1, size={"shortest_edge": 64, "longest_edge": 64}
    )
    segments = result["segments_info"]
    assert labels.tolist() == [segment["label_id"] for segment in segments]
    theirs = torch.tensor([segment["score"] for segment in segments])  # rounded to six digits
    torch.testing.assert_close(scores, theirs, rtol=0, atol=2e-6)

    outputs = SimpleNamespace(
        class_queries_logits=4 * torch.randn(3, 9, 8),
        masks_queries_logits=10 * torch.randn(3, 9, 16, 16),
        patch_offsets=[(0, 0, 64), (0, 48, 112), (0, 96, 160)],
    )
    edges: Any = {"shortest_edge": 64, "longest_edge": None}
    found: Any = EomtImageProcessor().post_process_semantic_segmentation(
        outputs, [(100, 251)], size=edges
    )
    crops = outputs.class_queries_logits, outputs.masks_queries_logits
    same = semantic_of_eomt(*crops, (100, 251), side=64).eq(found[0]).float().mean()
    print(f"semantic labels of EoMT: {same:.2%}")

    outputs = modeling_mask2former.Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=classes[None], masks_queries_logits=masks[None]
    )
    kept, _, _ = of_mask2former(classes, masks, size, 0.1)
    (result,) = Mask2FormerImageProcessor().post_process_instance_segmentation(
        outputs, 0.1, target_sizes=[size], return_binary_maps=True
    )
    differ = kept.dense().float().mean(0) - result["segmentation"].mean(0)
    print(f"instances of noise, which has many borders: {differ.abs().mean():.1%} differ")


def compare_masks() -> None:
    """Those of one upsampling: of RF-DETR and of SAM 2."""
    size = 90, 110
    masks = 50 * F.interpolate(torch.randn(1, 60, 4, 4), (24, 24), mode="bicubic")[0]
    outputs: Any = RfDetrInstanceSegmentationOutput(
        logits=2 * torch.randn(1, 60, 8), pred_masks=masks[None]
    )
    (result,) = RfDetrImageProcessor().post_process_instance_segmentation(
        outputs, target_sizes=[size], return_binary_maps=True
    )
    kept, labels, _ = of_rf_detr(outputs.logits[0], masks, size)
    assert labels.tolist() == [segment["label_id"] for segment in result["segments_info"]]
    same = (kept.dense() == result["segmentation"]).float().mean()
    print(f"masks of RF-DETR: {same:.2%}")

    scores, processor = torch.rand(60), Sam2ImageProcessor()
    options: dict[str, Any] = {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.9}
    (upsampled,) = processor.post_process_masks(masks[None, None], [size], binarize=False)
    found = processor.filter_masks(upsampled, scores[None], size, [0, 0, *size[::-1]], **options)
    theirs, their_scores, *_ = processor.post_process_for_mask_generation(*found, 0.7)
    kept, scores = automatic_of_sam2(scores, masks, size, score=0.5, stability=0.9)
    assert torch.equal(scores, their_scores)
    same = (kept.dense() == torch.stack([*map(torch.as_tensor, theirs)])).float().mean()
    print(f"masks of SAM 2: {same:.2%} of {len(kept)} masks")


if __name__ == "__main__":
    torch.manual_seed(0)
    compare_labels()
    compare_masks()
    compare_instances()

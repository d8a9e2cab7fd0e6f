"""Labels and masks of Mask2Former, OneFormer, EoMT, RF-DETR and SAM 2 from their low-resolution
mask logits, as by the post-processing of Transformers. Each function is for one image.

    python examples/transformers_masks.py

Semantic and panoptic labels are those of Transformers, except for rounding. Classes whose segments
are fused (`label_ids_to_fuse`) are left out, and EoMT has other rules for its segments.

Instances are run lengths, and their scores contain the mean probability of the low-resolution
logits inside the mask. Mask2Former upsamples to 384 × 384, compares with 0, and takes the nearest
neighbours in the image; here the logits are upsampled once, so borders differ. EoMT upsamples to
the padded input, and then to the image; if the padding ends between two logits, they are upsampled
to the input first. Those of RF-DETR and of SAM 2 are equal, except for rounding.
"""

import math
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


def instances(
    scores: Tensor, labels: Tensor, masks: Tensor, size: Size, threshold: float
) -> Instances:
    """Masks, labels and scores, from class scores and labels (N,) and mask logits (N, h, w)."""
    inside = masks > 0
    means = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    kept = scores * means >= threshold
    return ao.mask_rle(masks[kept], size), labels[kept], (scores * means)[kept]


def of_mask2former(classes: Tensor, masks: Tensor, size: Size, threshold: float = 0.5) -> Instances:
    """Instances of one image, from class logits (Q, K + 1) and mask logits (Q, h, w)."""
    scores = classes.softmax(1)[:, :-1]
    best, pairs = scores.flatten().topk(len(scores))  # a query may be an instance of two classes
    queries, labels = pairs // scores.shape[1], pairs % scores.shape[1]
    return instances(best, labels, masks[queries], size, threshold)


def of_eomt(
    classes: Tensor, masks: Tensor, size: Size, threshold: float = 0.8, side: int = 640
) -> Instances:
    """Instances of one image that was resized to a longer side of `side`, and padded to a
    square."""
    scores, labels = classes.softmax(1)[:, :-1].max(1)
    height, width = get_size_with_aspect_ratio(size, side, side)  # of the image in the input
    if height * masks.shape[1] % side or width * masks.shape[2] % side:
        masks = F.interpolate(masks[None], (side, side), mode="bilinear")[0]
    masks = masks[:, : height * masks.shape[1] // side, : width * masks.shape[2] // side]
    return instances(scores, labels, masks, size, threshold)


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
    kept, labels, _ = of_eomt(classes, masks, size, 0.1, side=64)
    (result,) = EomtImageProcessor().post_process_instance_segmentation(
        outputs, [size], 0.1, size={"shortest_edge": 64, "longest_edge": 64}
    )
    assert labels.tolist() == [segment["label_id"] for segment in result["segments_info"]]

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

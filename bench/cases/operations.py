"""What is compared: our call of each operation, and what people write instead.

Both are called with the inputs of a case by name, and return a tensor or several, which have to be
equal. The first alternative is torch's formula; others are the classes of libraries.
"""

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases.listed import BACKWARD, FORWARD, Case
from torch import Tensor

import anchorops as ao
from anchorops import reference
from anchorops._shared.pixels import feature_rows
from anchorops.doctor.catalogue import Inputs, usual
from anchorops.doctor.catalogue.formulas import upsampled

Formula = Callable[..., Any]
BOUND, GAMMA, SMOOTHING = 0.7, 2.0, 0.1


class Library(NamedTuple):
    """A loss of a library, of logits at full resolution. labels: as the loss takes them. added:
    another loss that is added to it."""

    package: str
    name: str
    options: dict[str, Any]
    labels: Callable[[Tensor], Tensor] = lambda labels: labels
    added: Formula = lambda logits, labels: 0.0

    def build(self) -> Formula:
        loss = getattr(importlib.import_module(f"{self.package}.losses"), self.name)
        module = loss(**self.options)

        def formula(logits: Tensor, labels: Tensor) -> Tensor:
            z = usual.upsampled(logits, labels)
            return module(z, self.labels(labels)) + self.added(z, labels)

        return formula


def smp(
    name: str, mode: str = "", labels: Callable[[Tensor], Tensor] = lambda y: y, **options: Any
) -> Library:
    """mode: of softmax or sigmoid, if the loss has one."""
    options |= {"mode": mode} if mode else {}
    return Library("segmentation_models_pytorch", name, options, labels)


def monai(name: str, **options: Any) -> Library:
    channel = options.get("to_onehot_y", False)
    return Library("monai", name, options, lambda labels: labels[:, None] if channel else labels)


# Pixel losses. Their formulas upsample in float32, as autocast does on a GPU.


def focal(logits: Tensor, labels: Tensor, of: Formula = usual.cross_entropy) -> Tensor:
    losses = of(logits, labels, reduction="none")
    return ((1 - (-losses).exp()) ** GAMMA * losses).mean()


def ohem(logits: Tensor, labels: Tensor, of: Formula = usual.cross_entropy) -> Tensor:
    losses = of(logits, labels, reduction="none")
    return losses[losses.detach() >= -math.log(BOUND)].mean()


def ohem_min_kept(logits: Tensor, labels: Tensor) -> Tensor:
    losses = usual.cross_entropy(logits, labels, reduction="none").flatten()
    return losses.topk(labels.numel() // 16).values.mean()


def our_ohem_min_kept(logits: Tensor, labels: Tensor) -> Tensor:
    return ao.CrossEntropy(ohem_min_kept=labels.numel() // 16)(logits, labels)


def class_weights(logits: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, logits.shape[1], device=logits.device)


def pixel_weights(labels: Tensor) -> Tensor:
    return (labels == 0).float() + 0.5


def weighted(logits: Tensor, labels: Tensor, of: Formula = usual.cross_entropy) -> Tensor:
    weights = pixel_weights(labels)
    return (of(logits, labels, reduction="none") * weights).sum() / weights.sum()


def binary_smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    soft = labels.float() * (1 - SMOOTHING) + SMOOTHING / 2
    return usual.binary_cross_entropy(logits, soft)


def binary_dice(logits: Tensor, labels: Tensor) -> Tensor:
    p, axes = usual.upsampled(logits, labels).sigmoid(), (0, 2, 3)
    sums = p.sum(axes) + labels.sum(axes)
    return 1 - (2 * (p * labels).sum(axes) / sums.clamp(min=1e-7)).mean()


def matched_masks(logits: Tensor, labels: Tensor) -> Tensor:
    """The weighted losses of MaskFormer."""
    z, y = (x.flatten(1) for x in (usual.upsampled(logits, labels), labels.float()))
    p, losses = z.sigmoid(), F.binary_cross_entropy_with_logits(z, y, reduction="none")
    losses = losses * (p * (1 - y) + (1 - p) * y) ** GAMMA * (0.75 - 0.5 * y)
    dice = 1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)
    return (20 * losses.mean(1) + dice).mean()


class MaskFormer(Library):
    """Its functions, which take masks of floats."""

    def build(self) -> Formula:
        module = importlib.import_module("transformers.models.maskformer.modeling_maskformer")

        def formula(logits: Tensor, labels: Tensor) -> Tensor:
            z, y = (x.flatten(1) for x in (usual.upsampled(logits, labels), labels.float()))
            focal, dice = (f(z, y, len(z)) for f in (module.sigmoid_focal_loss, module.dice_loss))
            return 20 * focal + dice

        return formula


def our_matched_masks(logits: Tensor, labels: Tensor) -> Tensor:
    loss = ao.MaskLoss(ce_weight=20.0, focal_alpha=0.25, focal_gamma=GAMMA)
    return loss(logits[:, 0], labels[:, 0])


def pseudo_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return usual.upsampled(logits, labels).softmax(1).max(1).values


def teacher_of(logits: Tensor) -> Tensor:
    """Logits of a teacher of the same size."""
    return logits.detach().flip(1)


def our_divergence(logits: Tensor, labels: Tensor) -> Tensor:
    return ao.pixel_kl_divergence(logits, teacher_of(logits), tuple(labels.shape[1:]))


def bincount_confusion(logits: Tensor, labels: Tensor) -> Tensor:
    num_classes = logits.shape[1]
    pairs = labels.flatten() * num_classes + usual.upsampled(logits, labels).argmax(1).flatten()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def torchmetrics_confusion(logits: Tensor, labels: Tensor) -> Tensor:
    functional = importlib.import_module("torchmetrics.functional.classification")
    predictions = usual.upsampled(logits, labels).argmax(1)
    return functional.multiclass_confusion_matrix(predictions, labels, logits.shape[1])


def aligned(logits: Tensor, labels: Tensor) -> Tensor:
    z = upsampled(logits.float(), labels.shape[1:], align_corners=True)
    return usual.cross_entropy(z, labels)


# Class statistics. An alternative takes features (B, D, P), keys int64 [B, P] in [0, num_keys]
# (num_keys if ignored) and the anchor of each key [num_keys, D] or None, and returns sums
# [num_keys, D] and sqdists [num_keys] or None.

Statistics = tuple[Tensor, Tensor | None]
Alternative = Callable[[Tensor, Tensor, int, Tensor | None], Statistics]


def index_add(features: Tensor, keys: Tensor, num_keys: int, anchors: Tensor | None) -> Statistics:
    """Rows by permute, sums by index_add, anchors by gather: the usual formula."""
    rows = features.transpose(1, 2).reshape(-1, features.shape[1]).float()
    keys = keys.flatten()
    sums = rows.new_zeros(num_keys + 1, rows.shape[1]).index_add(0, keys, rows)[:-1]
    if anchors is None:
        return sums, None
    anchors = torch.cat([anchors, anchors.new_zeros(1, anchors.shape[1])])
    squares = (rows - anchors[keys]).square().sum(1)
    return sums, squares.new_zeros(num_keys + 1).index_add(0, keys, squares)[:-1]


def scatter_add(
    features: Tensor, keys: Tensor, num_keys: int, anchors: Tensor | None
) -> Statistics:
    """Each number to its own sum, as torch_scatter does: without a permutation."""
    size, dim = features.shape[0], features.shape[1]
    index = keys[:, None].expand(-1, dim, -1)
    sums = torch.zeros(size, dim, num_keys + 1, device=features.device)
    sums = sums.scatter_add(2, index, features.float())[..., :-1].sum(0).T
    if anchors is None:
        return sums, None
    nearest = torch.cat([anchors, anchors.new_zeros(1, dim)]).T.expand(size, -1, -1)
    squares = (features.float() - nearest.gather(2, index)).square().sum(1).flatten()
    return sums, squares.new_zeros(num_keys + 1).scatter_add(0, keys.flatten(), squares)[:-1]


def one_hot_bmm(
    features: Tensor, keys: Tensor, num_keys: int, anchors: Tensor | None
) -> Statistics:
    """A product for each image, in the features' own dtype and layout: no permute. The squared
    distances are Σ‖f‖² − 2·a·Σf + n·‖a‖²: fast, but inaccurate if anchors are far away."""
    hot = F.one_hot(keys, num_keys + 1)[..., :-1].to(features.dtype)
    sums = torch.bmm(features, hot).float().sum(0).T
    if anchors is None:
        return sums, None
    squares, hot = features.float().square().sum(1).flatten(), hot.flatten(0, 1)
    square_sums, counts = squares @ hot.to(squares.dtype), hot.sum(0, dtype=torch.float32)
    return sums, square_sums - 2 * (sums * anchors).sum(1) + counts * anchors.square().sum(1)


STATISTICS: dict[str, Alternative] = {
    "index_add": index_add,
    "scatter_add": scatter_add,
    "one_hot bmm": one_hot_bmm,
}


def class_keys(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """int64 [B, P], num_classes if ignored; labels are resized by F.interpolate."""
    if features.dim() == 2:
        labels = labels[None]
    elif features.dim() == 4:
        labels = F.interpolate(labels[:, None].float(), features.shape[2:], mode="nearest").long()
    labels = labels.flatten(1)
    return torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)


def class_moments(
    alternative: Alternative,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    anchors: Tensor | None = None,
    groups: int = 1,
    seed: int = 0,
    ignore_index: int = -1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`anchorops.class_moments` from an alternative's statistics; random groups are the same."""
    keys = class_keys(features, labels, num_classes)
    flat_keys = keys.flatten()
    ones = torch.ones_like(flat_keys)
    counts = keys.new_zeros(num_classes + 1).scatter_add(0, flat_keys, ones)[:-1]
    if groups > 1:
        split = torch.where(keys < num_classes, keys, -1)
        split = reference.split_groups(split, counts, groups, seed)
        keys = torch.where(split >= 0, split, num_classes * groups)
        counts = reference.group_counts(counts, groups)
    flat = features.T[None] if features.dim() == 2 else features.flatten(2)
    sums, sqdists = alternative(flat, keys, counts.numel(), anchors)
    return counts, sums.reshape(*counts.shape, features.shape[1]), sqdists


Moments = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def with_anchors(moments: Moments, features: Tensor, labels: Tensor, anchors: Tensor) -> Any:
    return moments(features, labels, len(anchors), anchors=anchors, ignore_index=-1)[1:]


def sums(
    moments: Moments, features: Tensor, labels: Tensor, anchors: Tensor, **groups: int
) -> Tensor:
    return moments(features, labels, len(anchors), ignore_index=-1, **groups)[1]


def centroids(moments: Moments, features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    counts, sums, _ = moments(features, labels, len(anchors))
    return sums / counts.clamp(min=1)[:, None]


def gather_mse(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """The mean squared distance to anchors gathered for each pixel."""
    keys = class_keys(features, labels, len(anchors))
    valid = (keys < len(anchors)).flatten()
    rows = feature_rows(features).float()
    nearest = torch.cat([anchors, anchors.new_zeros(1, anchors.shape[1])])[keys.flatten()]
    squares = torch.where(valid[:, None], rows - nearest, 0).square()
    return squares.sum() / (features.shape[1] * valid.sum())


def our_centroids(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    return ao.class_centroids(features, labels, len(anchors), ignore_index=-1)[0]


def info_nce_with_masks(queries: Tensor, keys: Tensor) -> Tensor:
    """What absent classes need, as it is written by hand, where all are present."""
    present = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    queries, keys = (torch.where(present[:, None], x.float(), 0) for x in (queries, keys))
    own = torch.eye(len(keys), dtype=torch.bool, device=keys.device)
    logits = (queries @ keys.T / 0.07).masked_fill(~(present | own), -torch.inf)
    losses = torch.where(present, logits.logsumexp(1) - logits.diagonal(), 0)
    return losses.sum() / present.sum().clamp(min=1)


class Operation(NamedTuple):
    """An operation's implementations.

    Attributes:
        operator: the first of ours that it calls, which says what backends there are.
        ours, alternatives: formulas; an alternative may also be what builds one.
        compares: whether results are compared. Not if equal losses are chosen otherwise, or errors
            rounded to bins.
        rounds: of timing, at least.
    """

    operator: str
    ours: Formula
    alternatives: dict[str, Any]
    compares: bool = True
    rounds: int = 10


def pixel_loss(
    ours: Formula, torch: Formula, operator: str = "softmax_moments", **others: Any
) -> Operation:
    return Operation(operator, ours, {"torch": torch, **others})


def of_statistics(results: Formula, ours: Formula | None = None) -> Operation:
    """results: of an implementation of class moments."""
    alternatives = {
        name: partial(results, partial(class_moments, alternative))
        for name, alternative in STATISTICS.items()
    }
    return Operation("class_moments", ours or partial(results, ao.ops.class_moments), alternatives)


dice = ao.Dice(absent="keep")  # as the formula; smp and MONAI differ for absent classes
bce = usual.binary_cross_entropy
multiclass, multilabel = "multiclass", "multilabel"
OPERATIONS = {
    # the default, 255, is a class where there are more
    "cross-entropy": pixel_loss(ao.CrossEntropy(ignore_index=-1), usual.cross_entropy),
    "cross-entropy, aligned corners": pixel_loss(ao.CrossEntropy(align_corners=True), aligned),
    "class weights": pixel_loss(
        lambda logits, labels: ao.pixel_cross_entropy(logits, labels, weight=class_weights(logits)),
        lambda logits, labels: usual.cross_entropy(logits, labels, weight=class_weights(logits)),
    ),
    "label smoothing": pixel_loss(
        ao.CrossEntropy(label_smoothing=SMOOTHING),
        partial(usual.cross_entropy, label_smoothing=SMOOTHING),
        smp=smp("SoftCrossEntropyLoss", smooth_factor=SMOOTHING),
    ),
    "focal cross-entropy": pixel_loss(
        ao.CrossEntropy(focal_gamma=GAMMA),
        focal,
        smp=smp("FocalLoss", multiclass, gamma=GAMMA),
        MONAI=monai("FocalLoss", use_softmax=True, to_onehot_y=True, gamma=GAMMA),
    ),
    "OHEM, threshold": pixel_loss(ao.CrossEntropy(ohem_threshold=BOUND), ohem),
    "OHEM, largest": pixel_loss(our_ohem_min_kept, ohem_min_kept)._replace(compares=False),
    "pixel weights": pixel_loss(
        lambda logits, labels: ao.CrossEntropy()(logits, labels, pixel_weights(labels)), weighted
    ),
    "Dice": pixel_loss(
        dice,
        usual.dice,
        smp=smp("DiceLoss", multiclass),
        MONAI=monai("DiceLoss", softmax=True, to_onehot_y=True, batch=True),
    ),
    "Lovász": pixel_loss(
        ao.Lovasz(), usual.lovasz, "probability_histograms", smp=smp("LovaszLoss", multiclass)
    )._replace(compares=False, rounds=5),  # rounds of up to half a minute
    "cross-entropy + Dice": pixel_loss(
        ao.CrossEntropyDice(dice=dice),
        usual.cross_entropy_dice,
        smp=smp("DiceLoss", multiclass)._replace(added=usual.cross_entropy),
        MONAI=monai("DiceCELoss", softmax=True, to_onehot_y=True, batch=True),
    ),
    "pseudo-labels": pixel_loss(
        lambda logits, labels: ao.pixel_argmax(logits, labels.shape[1:], confidence=True)[1],
        pseudo_labels,
        "pixel_argmax",
    ),
    "divergence from a teacher": pixel_loss(
        our_divergence,
        lambda logits, labels: usual.mean_kl_divergence(logits, labels, teacher_of(logits)),
        "pixel_kl_divergence",
    ),
    "confusion matrix": Operation(
        "pixel_argmax",
        ao.pixel_confusion,
        {"bincount": bincount_confusion, "torchmetrics": torchmetrics_confusion},
    ),
    "sigmoid: cross-entropy": pixel_loss(
        ao.BinaryCrossEntropy(), bce, smp=smp("SoftBCEWithLogitsLoss", labels=Tensor.float)
    ),
    "sigmoid: pos_weight": pixel_loss(
        ao.BinaryCrossEntropy(2.0),
        lambda logits, labels: bce(logits, labels, pos_weight=logits.new_tensor(2.0)),
    ),
    "sigmoid: label smoothing": pixel_loss(
        ao.BinaryCrossEntropy(label_smoothing=SMOOTHING),
        binary_smoothed,
        smp=smp("SoftBCEWithLogitsLoss", "", Tensor.float, smooth_factor=SMOOTHING / 2),
    ),
    "sigmoid: OHEM, threshold": pixel_loss(
        ao.BinaryCrossEntropy(ohem_threshold=BOUND), partial(ohem, of=bce)
    ),
    "sigmoid: pixel weights": pixel_loss(
        lambda logits, labels: ao.BinaryCrossEntropy()(logits, labels, pixel_weights(labels)),
        partial(weighted, of=bce),
    ),
    "sigmoid: focal": pixel_loss(
        ao.BinaryCrossEntropy(focal_gamma=GAMMA),
        partial(focal, of=bce),
        smp=smp("FocalLoss", multilabel, gamma=GAMMA),
    ),
    "sigmoid: Dice": pixel_loss(
        ao.Dice(sigmoid=True, absent="keep"),
        binary_dice,
        smp=smp("DiceLoss", multilabel),
        MONAI=monai("DiceLoss", sigmoid=True, batch=True),
    ),
    "matched masks: focal + Dice": pixel_loss(
        our_matched_masks, matched_masks, transformers=MaskFormer("transformers", "MaskFormer", {})
    ),
    "class moments with anchors": of_statistics(with_anchors),
    "class moments": of_statistics(sums),
    "class moments in 4 groups": of_statistics(partial(sums, groups=4, seed=0)),
    "class centroids": of_statistics(centroids, our_centroids),
    "pixel-to-anchor MSE": Operation(
        "class_moments",
        partial(ao.pixel_to_anchor_mse, ignore_index=-1),
        {"gather + mse": gather_mse},
    ),
    "centroid InfoNCE": Operation(
        "centroid_info_nce",
        ao.ops.centroid_info_nce,
        {"cross_entropy": usual.centroid_info_nce, "torch, with masks": info_nce_with_masks},
    ),
}


def moments_bytes(
    features: Tensor, num_keys: int, direction: str, *, sums: bool = True, sqdists: bool = False
) -> int:
    """Bytes that class moments must move, without those of class keys, which are 1/D of it.

    forward:  features, a 4-byte key per pixel, anchors if sqdists are requested; the statistics.
    backward: keys, the statistics' gradients, anchors and features for sqdists; dfeatures.

    Args:
        num_keys: rows of the statistics: classes × images × groups.
        sums, sqdists: which statistics are requested.
    """
    keys = 4 * features.numel() // features.shape[1]
    statistics = 4 * num_keys * (sums * features.shape[1] + sqdists)
    anchors = 4 * num_keys * features.shape[1] * sqdists
    forward = features.nbytes + keys + anchors + statistics
    backward = (1 + sqdists) * features.nbytes + keys + anchors + statistics
    return forward * (direction != BACKWARD) + backward * (direction != FORWARD)


def counted_bytes(operation: str, direction: str, inputs: Inputs) -> int:
    """What must be moved if each input is read and each output written once.

    Pixel losses: forward reads logits and labels and writes lse; backward reads these three and
    writes the logits' gradient. The divergence reads two logits and labels, and writes two lse.
    Centroids are read once; for the gradients again, and these
    are written.
    """
    first, labels = next(iter(inputs.values())), inputs.get("labels", torch.empty(0))
    if operation == "centroid InfoNCE":
        return 2 * first.nbytes * (1 if direction == FORWARD else 3)
    if "features" in inputs:
        num_keys = len(inputs["anchors"]) * (4 if operation == "class moments in 4 groups" else 1)
        sqdists = operation in ("class moments with anchors", "pixel-to-anchor MSE")
        sums = operation != "pixel-to-anchor MSE"
        return moments_bytes(first, num_keys, direction, sums=sums, sqdists=sqdists)
    maps = 2 if operation == "divergence from a teacher" else 1
    forward = maps * (first.nbytes + 4 * labels.numel()) + labels.nbytes
    return forward if direction == FORWARD else 2 * forward + first.nbytes


def alternatives_of(case: Case, libraries: bool) -> dict[str, Any]:
    """By their names in tables. libraries: compile the losses of libraries too."""
    eager = dict(OPERATIONS[case.operation].alternatives)
    formula = eager.get("torch")
    upsamples = case.shape.stride != 1 and case.operation not in (
        "divergence from a teacher",
        "cross-entropy, aligned corners",
    )
    if formula is not None and upsamples and case.dtype != "fp32":
        eager[f"torch, upsampled in {case.dtype}"] = lambda logits, labels: formula(
            upsampled(logits, labels.shape[2 - logits.dim() :]), labels
        )
    if not case.compiled:
        return eager
    return eager | {
        f"compiled {name}": other
        for name, other in eager.items()
        if libraries or type(other) is not Library  # MaskFormer is compiled everywhere
    }

"""docs/loss-map.md: the rows with code on both sides are evaluated as they are written there, and
values and gradients are compared."""

import inspect
import re
import runpy
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai import losses as monai
from torch import Tensor, nn

import anchorops as ao
from tests.helpers import mmseg_stand_in
from tests.helpers.small_networks import NO_TORCHVISION

smp = pytest.importorskip("segmentation_models_pytorch", reason=NO_TORCHVISION).losses
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/loss-map.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
KINDS = {"softmax": "multiclass", "one channel": "binary", "channels": "multilabel"}
NUMBERS = {"a": 0.3, "b": 0.7, "e": 0.1, "g": 1.5, "n": 40, "r": 0.7, "s": 0.3, "t": 0.25}
DISTANCES = torch.tensor([[abs(i - j) / 4 for j in range(5)] for i in range(5)])


def rows() -> Iterator[Any]:
    seen = set()
    for section, text in SECTIONS.items():
        for cells in re.findall(r"^\| (.+) \| `([^`]+)` \| `([^`]+)` \|$", text, re.M):
            kinds, theirs, ours = cells[0].rpartition(" | ")[2], *cells[1:]
            for kind in KINDS if kinds == "all" else kinds.split(", "):
                row = section, kind, theirs, ours
                if row not in seen:
                    yield pytest.param(*row, id=f"{section}, {kind}: {theirs}")
                seen.add(row)


def example(kind: str, ratio: int, ignored: bool) -> SimpleNamespace:
    """Some classes are absent: class 3, all except class 0 in the last image, channel 1 there."""
    channels = {"softmax": 5, "one channel": 1, "channels": 3}[kind]
    size = (4 * ratio, 6 * ratio)
    logits = (2 * torch.randn(3, channels, 4, 6, dtype=torch.float64)).requires_grad_()
    z = F.interpolate(logits, size, mode="bilinear") if ratio > 1 else logits
    if kind == "softmax":
        labels = torch.randint(0, channels, (3, *size))
        labels[labels == 3] = 1
        labels[2] = 0
    else:
        labels = torch.randint(0, 2, (3, channels, *size))
        labels[2, 1:2] = 0
    if ignored:
        labels[torch.rand(labels.shape) < 0.2] = 255
    return SimpleNamespace(
        logits=logits, z=z, labels=labels, K=channels, mask=torch.rand(3, *size) > 0.3
    )


def names(kind: str, inputs: SimpleNamespace) -> dict[str, Any]:
    """What the page names, except the losses."""
    labels, sigmoid, one_hot = inputs.labels, kind != "softmax", None
    w = torch.tensor([1.0, 2.0, 3.0, 0.5, 1.5]).double()[: inputs.K]
    if not sigmoid:
        one_hot = torch.stack([labels == k for k in range(inputs.K)], 1).to(torch.uint8)
        one_hot[(labels == 255)[:, None].expand(one_hot.shape)] = 255
    return {
        "ao": ao,
        "torch": torch,
        "softmax": lambda x: x.softmax(1),
        "mode": KINDS[kind],
        "sigmoid": sigmoid,
        "act": {"sigmoid": True} if sigmoid else {"softmax": True, "to_onehot_y": True},
        "keep": {"sigmoid": sigmoid, "absent": "keep"},
        "share": (labels != 255).double().mean(),
        "one_hot": one_hot,
        "by_channel": w.view(-1, 1, 1).expand((labels if sigmoid else one_hot).shape),
        "distances": DISTANCES,
        "w": w,
        **NUMBERS,
        **vars(inputs),
    }


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize(("section", "kind", "theirs", "ours"), [*rows()])
@pytest.mark.filterwarnings("ignore:single channel prediction")
def test_row(section: str, kind: str, theirs: str, ours: str, ratio: int):
    inputs = example(kind, ratio, "ignore" in theirs)
    known = names(kind, inputs) | FEW_LINES
    loss: Any = eval(ours, known)
    if isinstance(loss, nn.Module):
        loss = loss(inputs.logits, inputs.labels)
    expected: Any = eval(theirs, {**known, **LIBRARIES[section]})
    if callable(expected):
        target = inputs.labels
        if kind != "softmax":
            target = target.double()
        elif section in ("MONAI", "nnU-Net"):
            target = target[:, None]
        expected = expected(inputs.z, target)
    if loss.dim() > 0:  # reduction="none"
        assert loss.shape == expected.shape
        loss, expected = (x.square().sum() for x in (loss, expected))
    # MONAI's focal loss computes in float32
    bounds = {"rtol": 1e-5, "atol": 1e-6} if section == "MONAI" and "Focal" in theirs else {}
    torch.testing.assert_close(loss.double(), expected.double(), **bounds)
    gradients = [
        torch.autograd.grad(x, inputs.logits, retain_graph=True)[0] for x in (loss, expected)
    ]
    assert gradients[0].abs().max() > 1e-6
    torch.testing.assert_close(*gradients, **bounds)


def documented_arguments(section: str) -> set[str]:
    table = SECTIONS[section].split("### Arguments")[1]
    cells = re.findall(r"^\| ([^|]+) \|", table, re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)[`=]", cell)}


ARGUMENTS_OF_MMSEGMENTATION = (  # of version 1.2.2
    "use_sigmoid use_mask reduction class_weight loss_weight loss_name avg_non_ignore "
    "activate naive_dice eps gamma alpha smooth beta ignore_index ignore_label thres min_kept"
)


@pytest.mark.parametrize(
    ("section", "library"),
    [("segmentation_models.pytorch", smp), ("MONAI", monai), ("mmsegmentation", None)],
)
def test_every_argument_has_a_row(section: str, library: Any):
    """Arguments of the losses that docs/loss-map.md computes."""
    named = re.findall(r"`(\w+Loss)\(", SECTIONS[section])
    losses = {name for name in named if hasattr(library, name)}
    arguments = {*ARGUMENTS_OF_MMSEGMENTATION.split()} if library is None else set()
    assert library is None or len(losses) > 5
    for name in losses:
        arguments |= {*inspect.signature(getattr(library, name).__init__).parameters}
    assert not arguments - documented_arguments(section) - {"self", "args", "kwargs"}


MMSEGMENTATION = (
    "CrossEntropyLoss DiceLoss FocalLoss LovaszLoss TverskyLoss OhemCrossEntropy BoundaryLoss "
    "HuasdorffDisstanceLoss SiLogLoss KLDivLoss Accuracy"
)
NNUNET = (
    "SoftDiceLoss MemoryEfficientSoftDiceLoss RobustCrossEntropyLoss TopKLoss DC_and_CE_loss "
    "DC_and_BCE_loss DC_and_topk_loss DeepSupervisionWrapper"
)


@pytest.mark.parametrize(
    ("section", "classes"),
    [
        ("segmentation_models.pytorch", [x for x in smp.__all__ if x.endswith("Loss")]),
        ("MONAI", [kind.__name__ for kind in vars(monai).values() if isinstance(kind, type)]),
        ("mmsegmentation", MMSEGMENTATION.split()),
        ("nnU-Net", NNUNET.split()),
    ],
)
def test_every_loss_has_a_row(section: str, classes: Collection[str]):
    table = "\n".join(re.findall(r"^\|.*", SECTIONS[section], re.M))
    assert len(classes) > 6
    assert not [name for name in classes if not re.search(rf"`{name}\b", table)]


# The formulas of mmsegmentation 1.2.2, mmseg/models/losses. loss_weight is 1.


def one_hot_of(labels: Tensor, classes: int) -> Tensor:
    """0 everywhere where the label is ignored."""
    return torch.stack([labels == k for k in range(classes)], 1).double()


def mmseg_ohem(ignore_label: int, thres: float, min_kept: int) -> Callable:
    """ohem_cross_entropy_loss.py"""

    def loss(score: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(score, target, ignore_index=ignore_label, reduction="none")
        mask = (target != ignore_label).flatten()
        p = score.softmax(1).gather(1, target.where(target != ignore_label, 0)[:, None])
        p, order = p.flatten()[mask].sort()
        threshold = max(p[min(min_kept, len(p) - 1)], torch.tensor(thres))
        return losses.flatten()[mask][order][p < threshold].mean()

    return loss


def mmseg_dice(use_sigmoid: bool, eps: float) -> Callable:
    """dice_loss.py"""
    assert not use_sigmoid

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        inputs = pred.softmax(1).flatten(1)
        targets = one_hot_of(target, pred.shape[1]).flatten(1)
        b, c = (inputs * inputs).sum(1) + eps, (targets * targets).sum(1) + eps
        return (1 - 2 * (inputs * targets).sum(1) / (b + c)).mean()

    return loss


def mmseg_tversky(
    smooth: float,
    alpha: float,
    beta: float,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
) -> Callable:
    """tversky_loss.py"""

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        p, valid = pred.softmax(1), (target != ignore_index).flatten(1)
        total = pred.new_zeros(())
        one_hot = one_hot_of(target, pred.shape[1])
        for i in range(pred.shape[1]):
            q, t = p[:, i].flatten(1), one_hot[:, i].flatten(1)
            tp, fp, fn = ((x * valid).sum(1) for x in (q * t, q * (1 - t), (1 - q) * t))
            class_loss = (1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)).mean()
            total = total + class_loss * (1 if class_weight is None else class_weight[i])
        return total / pred.shape[1]

    return loss


def mmseg_focal(
    gamma: float, alpha: float, ignore_index: int = 255, class_weight: Tensor | None = None
) -> Callable:
    """focal_loss.py: py_sigmoid_focal_loss"""

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        one_hot, p = one_hot_of(target, pred.shape[1]), pred.sigmoid()
        wrong = (1 - p) * one_hot + p * (1 - one_hot)
        weight = (alpha * one_hot + (1 - alpha) * (1 - one_hot)) * wrong**gamma
        losses = F.binary_cross_entropy_with_logits(pred, one_hot, reduction="none") * weight
        if class_weight is not None:
            losses = losses * class_weight.view(-1, 1, 1)
        return (losses * (target != ignore_index)[:, None]).mean()

    return loss


def mmseg_boundary() -> Callable:
    """boundary_loss.py"""

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        positive, total = target.sum(), target.numel()
        weight = torch.where(target == 1, (total - positive) / total, positive / total)
        return F.binary_cross_entropy_with_logits(pred, target, weight)

    return loss


# The formulas of nnU-Net 2.8.1, nnunetv2/training/loss, of one process.


def nnunet_dice(
    apply_nonlin: Callable[[Tensor], Tensor],
    batch_dice: bool = False,
    do_bg: bool = True,
    smooth: float = 1.0,
) -> Callable:
    """dice.py: SoftDiceLoss, and with the same values MemoryEfficientSoftDiceLoss"""

    def loss(x: Tensor, y: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        x = apply_nonlin(x)
        one_hot = y if x.shape == y.shape else torch.zeros_like(x).scatter_(1, y, 1)
        mask = torch.ones_like(x[:, :1]) if loss_mask is None else loss_mask
        axes = (0, 2, 3) if batch_dice else (2, 3)
        parts = (x * one_hot, x * (1 - one_hot), (1 - x) * one_hot)
        tp, fp, fn = ((part * mask).sum(axes) for part in parts)
        score = (2 * tp + smooth) / (2 * tp + fp + fn + smooth).clip(1e-8)
        return -(score if do_bg else score[..., 1:]).mean()

    return loss


def nnunet_cross_entropy(weight: Tensor | None = None, **options: Any) -> Callable:
    """robust_ce_loss.py: RobustCrossEntropyLoss"""
    return lambda x, y: F.cross_entropy(x, y[:, 0], weight, **options)


def nnunet_topk(k: float) -> Callable:
    """robust_ce_loss.py: TopKLoss"""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(x, y[:, 0], reduction="none").flatten()
        return losses.topk(int(losses.numel() * k / 100), sorted=False)[0].mean()

    return loss


def nnunet_dice_and(cross_entropy: Callable[..., Callable], nonlin: Callable) -> Callable:
    """compound_losses.py"""

    def build(
        first: dict[str, Any],
        second: dict[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        ignore_label: int | None = None,
    ) -> Callable:
        dice_options, ce_options = (second, first) if nonlin is torch.sigmoid else (first, second)
        ignored = {} if ignore_label is None else {"ignore_index": ignore_label}
        dice, ce = nnunet_dice(nonlin, **dice_options), cross_entropy(**ce_options, **ignored)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            mask = y != (-1 if ignore_label is None else ignore_label)
            overlap = dice(x, y.where(mask, 0), mask if ignored else None)
            return weight_ce * ce(x, y) + weight_dice * overlap

        return loss

    return build


FEW_LINES = runpy.run_path(str(ROOT / "examples/other_losses.py"))
LIBRARIES: dict[str, Mapping[str, Any]] = {
    "PyTorch": {"F": F, "nn": nn},
    "segmentation_models.pytorch": vars(smp),
    "MONAI": vars(monai),
    "mmsegmentation": {
        "CrossEntropyLoss": mmseg_stand_in.CrossEntropyLoss,
        "OhemCrossEntropy": mmseg_ohem,
        "DiceLoss": mmseg_dice,
        "TverskyLoss": mmseg_tversky,
        "FocalLoss": mmseg_focal,
        "BoundaryLoss": mmseg_boundary,
    },
    "nnU-Net": {
        "SoftDiceLoss": nnunet_dice,
        "MemoryEfficientSoftDiceLoss": nnunet_dice,
        "RobustCrossEntropyLoss": nnunet_cross_entropy,
        "TopKLoss": nnunet_topk,
        "DC_and_CE_loss": nnunet_dice_and(nnunet_cross_entropy, lambda x: x.softmax(1)),
        "DC_and_BCE_loss": nnunet_dice_and(nn.BCEWithLogitsLoss, torch.sigmoid),
        "DC_and_topk_loss": nnunet_dice_and(nnunet_topk, lambda x: x.softmax(1)),
    },
}

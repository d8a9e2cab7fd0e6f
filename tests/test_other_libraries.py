"""docs/loss-map.md: the rows with code on both sides are evaluated as they are written there, and
values and gradients are compared."""

import inspect
import re
import runpy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai import losses as monai
from torch import Tensor, nn

import anchorops as ao
from tests.helpers.small_networks import NO_TORCHVISION

smp = pytest.importorskip("segmentation_models_pytorch", reason=NO_TORCHVISION).losses
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/loss-map.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
KINDS = {"softmax": "multiclass", "one channel": "binary", "channels": "multilabel"}
NUMBERS = {"a": 0.3, "b": 0.7, "e": 0.1, "g": 1.5, "n": 40, "r": 0.7, "s": 0.3, "t": 0.25}
DISTANCES = torch.tensor([[abs(i - j) / 4 for j in range(5)] for i in range(5)])


def softmax(z: Tensor) -> Tensor:
    return z.softmax(1)


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
        "softmax": softmax,
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


@pytest.mark.parametrize(
    ("section", "library"), [("segmentation_models.pytorch", smp), ("MONAI", monai)]
)
def test_every_loss_and_argument_has_a_row(section: str, library: Any):
    """Every loss of the library, and the arguments of those that docs/loss-map.md computes."""
    table = "\n".join(re.findall(r"^\|.*", SECTIONS[section], re.M))
    losses = [x for x, kind in vars(library).items() if isinstance(kind, type) and "Loss" in x]
    assert len(losses) > 6
    assert not [name for name in losses if not re.search(rf"`{name}\b", table)]
    computed = {*re.findall(r"`(\w+Loss)\(", SECTIONS[section])} & {*losses}
    arguments = {x for name in computed for x in inspect.signature(vars(library)[name]).parameters}
    assert len(computed) > 5
    assert not arguments - documented_arguments(section) - {"args", "kwargs"}


# The formulas of mmsegmentation 1.2.2, mmseg/models/losses. loss_weight is 1.


def one_hot_of(labels: Tensor, classes: int) -> Tensor:
    """0 everywhere where the label is ignored."""
    return torch.stack([labels == k for k in range(classes)], 1).double()


def mmseg_cross_entropy(
    pred: Tensor,
    target: Tensor,
    use_sigmoid: bool = False,
    class_weight: Tensor | None = None,
    avg_non_ignore: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy_loss.py"""
    valid = target != 255
    if use_sigmoid:
        one_hot = target.clamp(max=1)
        if pred.shape[1] > 1:
            one_hot, valid = one_hot_of(target, pred.shape[1]), valid[:, None].expand(pred.shape)
        losses = F.binary_cross_entropy_with_logits(pred, one_hot, reduction="none") * valid
    else:
        losses = F.cross_entropy(pred, target, class_weight, ignore_index=255, reduction="none")
    if reduction == "sum":
        return losses.sum()
    if class_weight is not None:
        return losses.sum() / class_weight[target].sum()
    return losses.sum() / (valid.sum() if avg_non_ignore else valid.numel())


def mmseg_ohem(
    score: Tensor, target: Tensor, ignore_label: int, thres: float, min_kept: int
) -> Tensor:
    """ohem_cross_entropy_loss.py"""
    losses = F.cross_entropy(score, target, ignore_index=ignore_label, reduction="none")
    mask = (target != ignore_label).flatten()
    p = score.softmax(1).gather(1, target.where(target != ignore_label, 0)[:, None])
    p, order = p.flatten()[mask].sort()
    threshold = max(p[min(min_kept, len(p) - 1)], torch.tensor(thres))
    return losses.flatten()[mask][order][p < threshold].mean()


def mmseg_dice(pred: Tensor, target: Tensor, use_sigmoid: bool, eps: float) -> Tensor:
    """dice_loss.py"""
    assert not use_sigmoid
    inputs = pred.softmax(1).flatten(1)
    targets = one_hot_of(target, pred.shape[1]).flatten(1)
    b, c = (inputs * inputs).sum(1) + eps, (targets * targets).sum(1) + eps
    return (1 - 2 * (inputs * targets).sum(1) / (b + c)).mean()


def mmseg_tversky(
    pred: Tensor,
    target: Tensor,
    smooth: float,
    alpha: float,
    beta: float,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
) -> Tensor:
    """tversky_loss.py"""
    p, valid = pred.softmax(1), (target != ignore_index).flatten(1)
    total = pred.new_zeros(())
    one_hot = one_hot_of(target, pred.shape[1])
    for i in range(pred.shape[1]):
        q, t = p[:, i].flatten(1), one_hot[:, i].flatten(1)
        tp, fp, fn = ((x * valid).sum(1) for x in (q * t, q * (1 - t), (1 - q) * t))
        class_loss = (1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)).mean()
        total = total + class_loss * (1 if class_weight is None else class_weight[i])
    return total / pred.shape[1]


def mmseg_focal(
    pred: Tensor,
    target: Tensor,
    gamma: float,
    alpha: float,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
) -> Tensor:
    """focal_loss.py: py_sigmoid_focal_loss"""
    one_hot, p = one_hot_of(target, pred.shape[1]), pred.sigmoid()
    wrong = (1 - p) * one_hot + p * (1 - one_hot)
    weight = (alpha * one_hot + (1 - alpha) * (1 - one_hot)) * wrong**gamma
    losses = F.binary_cross_entropy_with_logits(pred, one_hot, reduction="none") * weight
    if class_weight is not None:
        losses = losses * class_weight.view(-1, 1, 1)
    return (losses * (target != ignore_index)[:, None]).mean()


def mmseg_boundary(pred: Tensor, target: Tensor) -> Tensor:
    """boundary_loss.py"""
    positive, total = target.sum(), target.numel()
    weight = torch.where(target == 1, (total - positive) / total, positive / total)
    return F.binary_cross_entropy_with_logits(pred, target, weight)


# The formulas of nnU-Net 2.8.1, nnunetv2/training/loss, of one process.


def nnunet_dice(
    apply_nonlin: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    loss_mask: Tensor | None = None,
    batch_dice: bool = False,
    do_bg: bool = True,
    smooth: float = 1.0,
) -> Tensor:
    """dice.py: SoftDiceLoss, and with the same values MemoryEfficientSoftDiceLoss"""
    x = apply_nonlin(x)
    one_hot = y if x.shape == y.shape else torch.zeros_like(x).scatter_(1, y, 1)
    mask = torch.ones_like(x[:, :1]) if loss_mask is None else loss_mask
    axes = (0, 2, 3) if batch_dice else (2, 3)
    parts = (x * one_hot, x * (1 - one_hot), (1 - x) * one_hot)
    tp, fp, fn = ((part * mask).sum(axes) for part in parts)
    score = (2 * tp + smooth) / (2 * tp + fp + fn + smooth).clip(1e-8)
    return -(score if do_bg else score[..., 1:]).mean()


def nnunet_cross_entropy(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """robust_ce_loss.py: RobustCrossEntropyLoss"""
    return F.cross_entropy(x, y[:, 0], **options)


def nnunet_topk(x: Tensor, y: Tensor, k: float) -> Tensor:
    """robust_ce_loss.py: TopKLoss"""
    losses = F.cross_entropy(x, y[:, 0], reduction="none").flatten()
    return losses.topk(int(losses.numel() * k / 100), sorted=False)[0].mean()


def nnunet_dice_and(
    cross_entropy: Callable[..., Tensor],
    first: dict[str, Any],
    second: dict[str, Any],
    x: Tensor,
    y: Tensor,
    weight_ce: float = 1,
    weight_dice: float = 1,
    ignore_label: int | None = None,
) -> Tensor:
    """compound_losses.py"""
    of_sigmoids = cross_entropy is F.binary_cross_entropy_with_logits
    of_dice, of_ce = (second, first) if of_sigmoids else (first, second)
    mask, ignored = None, {}
    if ignore_label is not None:
        mask, ignored = y != ignore_label, {"ignore_index": ignore_label}
    labels = y if mask is None else y.where(mask, 0)
    dice = nnunet_dice(torch.sigmoid if of_sigmoids else softmax, x, labels, mask, **of_dice)
    return weight_ce * cross_entropy(x, y, **of_ce, **ignored) + weight_dice * dice


FEW_LINES = runpy.run_path(str(ROOT / "examples/other_losses.py"))
FORMULAS = {
    "mmsegmentation": {
        "CrossEntropyLoss": mmseg_cross_entropy,
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
        "DC_and_CE_loss": partial(nnunet_dice_and, nnunet_cross_entropy),
        "DC_and_BCE_loss": partial(nnunet_dice_and, F.binary_cross_entropy_with_logits),
        "DC_and_topk_loss": partial(nnunet_dice_and, nnunet_topk),
    },
}
LIBRARIES: dict[str, Mapping[str, Any]] = {
    "PyTorch": {"F": F, "nn": nn},
    "segmentation_models.pytorch": vars(smp),
    "MONAI": vars(monai),
}
for section, formulas in FORMULAS.items():  # with its options, a formula is a loss
    LIBRARIES[section] = {name: partial(partial, x) for name, x in formulas.items()}

"""docs/loss-map.md: the rows with code on both sides are evaluated as they are written there, and
values and gradients are compared. Of libraries that are not installed, only our side is evaluated:
`make check-nnunet` installs nnU-Net; mmsegmentation does not support this torch."""

import inspect
import re
import runpy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anchorops as ao
from tests.helpers.operators import check_loss
from tests.helpers.ranks import process_group

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/loss-map.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
NNUNET = "nnunetv2.training.loss"
LIBRARIES = {  # the modules of their losses
    "PyTorch": [],
    "segmentation_models.pytorch": ["segmentation_models_pytorch.losses"],
    "MONAI": ["monai.losses"],
    "mmsegmentation": ["mmseg.models.losses"],
    "Linear probes": [],
    "nnU-Net": [f"{NNUNET}.dice", f"{NNUNET}.robust_ce_loss", f"{NNUNET}.compound_losses"],
}
FEW_LINES = runpy.run_path(str(ROOT / "examples/other_losses.py"))
KINDS = {"softmax": "multiclass", "one channel": "binary", "channels": "multilabel"}
NUMBERS = {"a": 0.3, "b": 0.7, "e": 0.1, "g": 1.5, "n": 40, "r": 0.7, "s": 0.3, "t": 0.25}
DISTANCES = torch.tensor([[abs(i - j) / 4 for j in range(5)] for i in range(5)])


def losses_of(section: str) -> dict[str, Any]:
    found = {}
    for module in LIBRARIES[section]:
        found |= vars(pytest.importorskip(module, reason=f"{section} is not installed"))
    return found


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
        "nn": nn,
        "F": F,
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


@pytest.fixture
def processes(section: str, tmp_path: Path) -> Iterator[None]:
    """A group of one process: nnU-Net's scores of a batch are those of all processes."""
    with process_group(tmp_path) if section == "nnU-Net" else nullcontext():
        yield


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize(("section", "kind", "theirs", "ours"), [*rows()])
@pytest.mark.filterwarnings("ignore:single channel prediction")
def test_row(section: str, kind: str, theirs: str, ours: str, ratio: int, processes: None):
    inputs = example(kind, ratio, "ignore" in theirs)
    known = names(kind, inputs)
    loss: Any = eval(ours, known | FEW_LINES)
    if isinstance(loss, nn.Module):
        loss = loss(inputs.logits, inputs.labels)
    (gradient,) = torch.autograd.grad(loss.sum(), inputs.logits, retain_graph=True)
    assert gradient.abs().max() > 1e-6
    expected: Any = eval(theirs, known | losses_of(section))
    if callable(expected):
        target = inputs.labels
        if kind != "softmax":
            target = target.double()
        elif section in ("MONAI", "nnU-Net"):
            target = target[:, None]
        expected = expected(inputs.z, target)
    # MONAI's focal loss computes in float32
    bounds = {"rtol": 1e-5, "atol": 1e-6} if "Focal" in theirs and section == "MONAI" else {}
    check_loss(loss.to(expected.dtype), expected, inputs.logits, **bounds)


def test_formulas_of_two_examples():
    """dice_of_all_classes and balanced_cross_entropy, whose library is not installed."""
    inputs = example("softmax", 4, False)
    p = inputs.z.softmax(1).flatten(1)
    t = F.one_hot(inputs.labels, inputs.K).movedim(-1, 1).flatten(1)
    scores = 2 * (p * t).sum(1) / (p.square().sum(1) + t.sum(1) + 2 * 0.3)
    actual = FEW_LINES["dice_of_all_classes"](inputs.logits, inputs.labels, eps=0.3)
    torch.testing.assert_close(actual.double(), (1 - scores).mean())
    inputs = example("one channel", 4, False)
    labels = inputs.labels.double()
    weights = (1 - labels.mean()).where(labels == 1, labels.mean())
    expected = F.binary_cross_entropy_with_logits(inputs.z, labels, weights)
    actual = FEW_LINES["balanced_cross_entropy"](inputs.logits, inputs.labels)
    torch.testing.assert_close(actual.double(), expected)


@pytest.mark.parametrize("batch", [False, True])
def test_skeleton_recall(batch: bool):
    """Its formula, because its library is not installed."""
    inputs = example("softmax", 4, True)
    on_skeleton = torch.stack([inputs.labels == k for k in range(1, inputs.K)], 1).double()
    axes = (0, 2, 3) if batch else (2, 3)
    right = (inputs.z.softmax(1)[:, 1:] * on_skeleton).sum(axes)
    expected = 1 - ((right + 0.3) / (on_skeleton.sum(axes) + 0.3)).mean()
    actual = FEW_LINES["skeleton_recall"](inputs.logits, inputs.labels, batch=batch, smooth=0.3)
    check_loss(actual, expected, inputs.logits)


def documented_arguments(section: str) -> set[str]:
    table = SECTIONS[section].split("### Arguments")[1]
    cells = re.findall(r"^\| ([^|]+) \|", table, re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)[`=]", cell)}


@pytest.mark.parametrize("section", ["segmentation_models.pytorch", "MONAI"])
def test_every_loss_and_argument_has_a_row(section: str):
    """Every loss of the library, and the arguments of those that docs/loss-map.md computes."""
    kinds = {x: kind for x, kind in losses_of(section).items() if x.endswith("Loss")}
    table = "\n".join(re.findall(r"^\|.*", SECTIONS[section], re.M))
    assert not [name for name in kinds if not re.search(rf"`{name}\b", table)]
    computed = kinds.keys() & {*re.findall(r"`(\w+Loss)\(", SECTIONS[section])}
    assert len(computed) > 5
    arguments = {x for name in computed for x in inspect.signature(kinds[name]).parameters}
    assert not arguments - documented_arguments(section) - {"args", "kwargs"}

"""Image classification with and without SAR, also long-tailed (its appendix A).

    python examples/long_tailed_classification.py                         # digits: a minute
    python examples/long_tailed_classification.py --setting cifar-100-lt --root data --out runs/lt
    python examples/long_tailed_classification.py --setting folder --root FOLDER --imbalance 100

Trains a network with and without SAR, whose embedding has two layers, for each seed. Prints the
accuracy on all test images, and on the classes with the most training images (head), the fewest
(tail) and those between (body). With --out, each epoch is saved, and the same command continues a
run that was stopped; results.json has the accuracies.

Settings, each with SAR's own weights, which are those of segmentation. Options override them:

- digits: a small network on 100 images of scikit-learn's digit 0, and geometrically fewer of each
  following digit, down to 3 of digit 9. It only shows how to use SAR: here plain and SAR
  differ by less than their standard deviation.
- cifar-100 (Table 8), cub-200 (Table 9): MMPretrain's settings. The short side of CUB-200's images
  is scaled, not both sides; the ImageNet weights are timm's.
- cifar-100-lt (Table 10, stage 1): the setting of MiSLAS, imbalance 100, with mixup. The paper does
  not say how to combine SAR and mixup. Here the anchors of both labels attract the features of a
  mixed image, in the proportions of the mixture. MiSLAS's second stage is not in this script.
- folder: your own images, from random weights.

--root contains train/CLASS/… and val/CLASS/…, images of any size, or the directory
cifar-100-python of the CIFAR-100 archive. --imbalance F keeps geometrically fewer images of each
following class, 1/F of the last one.
"""

import argparse
import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import anchorops as ao
from anchorops.train.saving import save_atomically

GROUPS = ("all", "head", "body", "tail")
CALL_OPTIONS = ("out", "seeds", "device", "root")  # options that do not affect a run
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and standard deviation
CIFAR = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
_CIFAR: dict[str, Any] = {"size": 32, "padding": 4, "epochs": 200, "batch_size": 128, "lr": 0.1}
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {
        "epochs": 200,
        "batch_size": 64,
        "optimizer": "adamw",
        "lr": 1e-3,
        "imbalance": 100 / 3,
    },
    "cifar-100": _CIFAR | {"network": "cifar-resnet18", "milestones": [60, 120, 160], "gamma": 0.2},
    "cifar-100-lt": _CIFAR
    | {"network": "cifar-resnet32", "milestones": [160, 180], "gamma": 0.1, "warmup": 5}
    | {"weight_decay": 2e-4, "mixup": 1.0, "imbalance": 100.0, "groups": [36, 35]},
    "cub-200": {"network": "resnet18", "pretrained": True, "size": 448, "resize": 600}
    | {"epochs": 100, "batch_size": 64, "lr": 0.01, "nesterov": True, "warmup": 5},
    "folder": {"network": "resnet18", "size": 64, "resize": 73, "epochs": 100, "batch_size": 64}
    | {"lr": 0.05, "warmup": 5},
}


class Task(NamedTuple):
    train: Dataset
    test: Dataset
    counts: list[int]
    """Training images of each class."""
    network: Callable[[], nn.Module]
    """Creates a network that ends in a linear classifier."""


def kept(labels: Tensor, most: Tensor, imbalance: float) -> Tensor:
    """Indices of the images that are kept: the first most[k]·imbalance^(−k/(K−1)) of class k."""
    classes = len(most)
    shares = [imbalance ** (-k / max(1, classes - 1)) for k in range(classes)]
    counts = [max(1, int(int(n) * share + 1e-9)) for n, share in zip(most, shares, strict=True)]
    return torch.cat([(labels == k).nonzero().flatten()[:n] for k, n in enumerate(counts)])


def digit_task(imbalance: float) -> Task:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits)
    train = kept(labels, torch.full((10,), 100), imbalance)
    rows_by_digit = [(labels == k).nonzero().flatten() for k in range(10)]  # at least 174 each
    test = torch.cat([rows[100:170] for rows in rows_by_digit])

    def network() -> nn.Module:
        hidden = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        return nn.Sequential(*hidden, nn.Linear(64, 10))

    return Task(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        labels[train].bincount().tolist(),
        network,
    )


def image_task(options: argparse.Namespace) -> Task:
    from torchvision.datasets import CIFAR100, ImageFolder
    from torchvision.transforms import v2

    root, size = options.root, options.size
    cifar = (root / "cifar-100-python").is_dir()
    resize = [v2.Resize(options.resize)] if options.resize else []
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    mean, std = CIFAR if cifar else IMAGENET
    end.append(v2.Normalize(mean, std))
    crop = v2.RandomCrop(size, padding=options.padding, pad_if_needed=True)
    augmented = v2.Compose([*resize, crop, v2.RandomHorizontalFlip(), *end])
    whole = v2.Compose([*resize, v2.CenterCrop(size), *end])
    if cifar:
        train, test = CIFAR100(root, transform=augmented), CIFAR100(root, False, whole)
    else:
        train, test = ImageFolder(root / "train", augmented), ImageFolder(root / "val", whole)
    if train.classes != test.classes:
        raise SystemExit(f"--root {root}: train and val have different classes")
    labels, classes = torch.tensor(train.targets), len(train.classes)
    rows = kept(labels, labels.bincount(), options.imbalance)
    counts = labels[rows].bincount(minlength=classes).tolist()
    network = partial(build_network, options.network, classes, options.pretrained)
    return Task(Subset(train, rows.tolist()), test, counts, network)


def build_network(name: str, classes: int, pretrained: bool = False) -> nn.Module:
    """cifar-resnet32; cifar-NAME, a ResNet of timm with a stem for small images; NAME of timm."""
    if name == "cifar-resnet32":
        return cifar_resnet32(classes)
    import timm

    network = timm.create_model(
        name.removeprefix("cifar-"), pretrained=pretrained, num_classes=classes
    )
    if name.startswith("cifar-"):
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network


def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    return [layer, nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """Two convolutions and a shortcut, whose new channels are 0 (arXiv 1512.03385, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first, second = convolution(inputs, outputs, stride), convolution(outputs, outputs)
        self.body = nn.Sequential(*first, nn.ReLU(), *second)
        self.stride, self.new = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        same = x[:, :, :: self.stride, :: self.stride]
        return (self.body(x) + F.pad(same, (0, 0, 0, 0, self.new, self.new))).relu()


def cifar_resnet32(classes: int) -> nn.Module:
    blocks: list[nn.Module] = []
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        blocks.append(Block(inputs, outputs, outputs // inputs))
        blocks += [Block(outputs, outputs, 1) for _ in range(4)]
    start, classifier = nn.Sequential(*convolution(3, 16), nn.ReLU()), nn.Linear(64, classes)
    nn.init.kaiming_normal_(classifier.weight)
    return nn.Sequential(start, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)


def lr_factor(options: argparse.Namespace, epoch: int) -> float:
    """The factor of the learning rate in this epoch, counted from 0: a linear warm-up, then steps
    at the milestones, or a cosine if there are none."""
    if epoch < options.warmup:
        return (epoch + 1) / options.warmup
    if options.milestones:
        return options.gamma ** sum(epoch >= milestone for milestone in options.milestones)
    return float(torch.cos(torch.tensor(torch.pi * epoch / options.epochs)) + 1) / 2


def loss_of_batch(
    model: nn.Module, sar: ao.Attachment | None, images: Tensor, labels: Tensor, mixup: float
) -> Tensor:
    others, share = labels, 1.0  # of mixed images: the second labels, the share of the first
    if mixup:
        share = float(torch.distributions.Beta(mixup, mixup).sample())
        order = torch.randperm(len(images), device=images.device)
        images, others = share * images + (1 - share) * images[order], labels[order]
    logits = model(images)
    loss = share * F.cross_entropy(logits, labels)
    if mixup:
        loss = loss + (1 - share) * F.cross_entropy(logits, others)
    if sar is None:
        return loss
    features = sar.features
    loss = loss + sar(labels)  # 2. the labels of the images
    if mixup:  # the anchors of both labels attract the features
        method = sar.regularizer
        assert isinstance(method, ao.SAR) and features is not None
        term, other = (
            ao.pixel_to_anchor_mse(features, y, method.semantic_anchors, ignore_index=-1)
            for y in (labels, others)
        )
        loss = loss + (1 - share) * method.loss_weight * sar.terms["gate"] * (other - term)
    return loss


def train(task: Task, options: argparse.Namespace, name: str, seed: int) -> list[float]:
    """The accuracies of the groups, in %."""
    classes, device = len(task.counts), torch.device(options.device)
    torch.manual_seed(seed)
    model, sar = task.network(), None
    if name == "SAR":
        *_, classifier = (m for m in model.modules() if isinstance(m, nn.Linear))
        method = ao.SAR(classes, classifier.in_features, layers=2, ignore_index=-1)
        sar = ao.attach(model, method)  # 1. two layers: appendix A
    model.to(device)
    decay = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), **decay)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), momentum=0.9, nesterov=options.nesterov, **decay
        )
    saved = options.out and options.out / f"{name}-seed{seed}.pt"
    settings = {k: repr(v) for k, v in vars(options).items() if k not in CALL_OPTIONS}
    first = 0
    if saved and saved.exists():
        state = torch.load(saved, weights_only=True)
        if state["settings"] != settings:
            raise SystemExit(f"{saved} is of a run with other options")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epochs"]
    size = options.batch_size
    one_left = len(task.train) % size == 1  # type: ignore[arg-type]  # no batch norm of one image
    loader = DataLoader(
        task.train, size, shuffle=True, drop_last=one_left, num_workers=options.workers
    )
    for epoch in range(first, options.epochs):
        torch.manual_seed(zlib.crc32(repr((seed, epoch)).encode()))  # as if it had never stopped
        for group in optimizer.param_groups:
            group["lr"] = options.lr * lr_factor(options, epoch)
        model.train()
        for batch, labels in loader:
            loss = loss_of_batch(model, sar, batch.to(device), labels.to(device), options.mixup)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if options.root and (epoch + 1) % max(1, options.epochs // 10) == 0:
            print(f"{name} seed {seed}: epoch {epoch + 1} of {options.epochs}, loss {loss:.3f}")
        if saved:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically({**state, "epochs": epoch + 1, "settings": settings}, saved)
    return accuracies(model, task, options)


@torch.no_grad()
def accuracies(model: nn.Module, task: Task, options: argparse.Namespace) -> list[float]:
    classes, device = len(task.counts), torch.device(options.device)
    model.eval()
    hits, totals = torch.zeros(classes), torch.zeros(classes)
    for batch, labels in DataLoader(task.test, 256, num_workers=options.workers):
        correct = model(batch.to(device)).argmax(1).cpu() == labels
        hits += labels[correct].bincount(minlength=classes)
        totals += labels.bincount(minlength=classes)
    order = torch.tensor(task.counts).argsort(descending=True, stable=True)
    head, body = options.groups or [max(1, classes // 3), classes - 2 * max(1, classes // 3)]
    members = (order, order[:head], order[head : head + body], order[head + body :])
    return [100 * float(hits[rows].sum() / totals[rows].sum().clamp(min=1)) for rows in members]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--setting", choices=SETTINGS, default="digits")
    add("--root", type=Path, help="directory of the images")
    add("--imbalance", type=float, default=1.0, help="images of the first class to the last's")
    add("--groups", type=int, nargs=2, help="numbers of head and body classes (default: thirds)")
    add("--network", default="resnet18", help="a name of timm, cifar-NAME or cifar-resnet32")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="ImageNet weights of timm")
    add("--resize", type=int, help="the short side of the images, before they are cropped")
    add("--size", type=int, default=32, help="height and width of the crops, in pixels")
    add("--padding", type=int, default=0, help="added to training images before they are cropped")
    add("--mixup", type=float, default=0.0, help="α of mixup; 0: none")
    add("--epochs", type=int, default=100)
    add("--batch-size", type=int, default=64)
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="sgd has momentum 0.9")
    add("--nesterov", action=argparse.BooleanOptionalAction, default=False)
    add("--lr", type=float, default=0.1)
    add("--weight-decay", type=float, default=5e-4)
    add("--warmup", type=int, default=0, help="epochs of linear warm-up")
    add("--milestones", type=int, nargs="*", help="epochs where the rate falls (default: a cosine)")
    add("--gamma", type=float, default=0.1, help="factor of the learning rate at each milestone")
    add("--seeds", type=int, default=5, help="runs with and without SAR")
    add("--workers", type=int, default=0, help="processes that load images; it affects the crops")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--deterministic", action=argparse.BooleanOptionalAction, default=False)
    add("--out", type=Path, help="directory of checkpoints and results.json")
    setting = parser.parse_known_args()[0].setting
    parser.set_defaults(**SETTINGS[setting])
    options = parser.parse_args()
    if setting != "digits" and options.root is None:
        parser.error(f"--setting {setting} needs --root")
    for name in ("seeds", "batch_size", "imbalance"):
        if getattr(options, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option}: expected at least 1, got {getattr(options, name)}")
    if options.root and not any((options.root / x).is_dir() for x in ("train", "cifar-100-python")):
        parser.error(f"--root {options.root}: expected the directory train or cifar-100-python")
    return options


def main() -> None:
    options = parse()
    torch.use_deterministic_algorithms(options.deterministic, warn_only=True)
    task = digit_task(options.imbalance) if options.setting == "digits" else image_task(options)
    print(f"{len(task.counts)} classes with {max(task.counts)} to {min(task.counts)} images")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        if any(options.out.iterdir()) and not any(options.out.glob("plain-seed*.pt")):
            raise SystemExit(f"{options.out} contains files of another program: use another --out")
    results = []
    for name in ("plain", "SAR"):
        runs = [train(task, options, name, seed) for seed in range(options.seeds)]
        results += [
            {"method": name, "seed": seed, **dict(zip(GROUPS, run, strict=True))}
            for seed, run in enumerate(runs)
        ]
        groups = [
            f"{group} {fmean(values):.1f}{f' ± {stdev(values):.1f}' if len(values) > 1 else ''} %"
            for group, values in zip(GROUPS, zip(*runs, strict=True), strict=True)
        ]
        print(f"{name:5}  {', '.join(groups)}")
    if options.out:
        save_atomically(json.dumps(results, indent=1) + "\n", options.out / "results.json")


if __name__ == "__main__":
    main()

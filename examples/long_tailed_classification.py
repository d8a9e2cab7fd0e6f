"""Long-tailed classification with SAR: scikit-learn's digits, or a folder of images.

    python examples/long_tailed_classification.py [--seeds 5] [--steps 500]
    python examples/long_tailed_classification.py --root FOLDER [--imbalance 100]
        [--network resnet18] [--size 32]

Trains a network with and without SAR for each seed. SAR's embedding has two layers, as in the
paper's appendix A. Prints the accuracy of the third of the classes with the most training images
(head), of the third with the fewest (tail), and of the other classes (body).

Without --root, a small network is trained on 100 images of digit 0, and geometrically fewer of each
following digit, down to 3 of digit 9. FOLDER contains train/CLASS/… and val/CLASS/…, with images of
any size. --imbalance F keeps geometrically fewer images of each following class: of the last class,
the share 1/F (the paper's CIFAR-100-LT uses F = 100). With the defaults, SAR does not improve the
tail accuracy of the small network. The script shows how to use SAR and compare results.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset

import anchorops as ao

GROUPS = ("head", "body", "tail")


class Task(NamedTuple):
    train: Dataset
    test: Dataset
    counts: list[int]
    """Training images of each class."""
    network: Callable[[], nn.Module]
    dim: int
    """Inputs of the network's classifier."""


def kept(labels: Tensor, most: Tensor, imbalance: float) -> Tensor:
    """Indices of the images that are kept: the first most[k]·imbalance^(−k/(K−1)) of class k."""
    classes = len(most)
    counts = [max(1, round(int(n) * imbalance ** (-k / (classes - 1)))) for k, n in enumerate(most)]
    return torch.cat([(labels == k).nonzero().flatten()[:n] for k, n in enumerate(counts)])


def digits() -> Task:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits)
    train = kept(labels, torch.full((10,), 100), imbalance=100 / 3)
    of_digit = [(labels == k).nonzero().flatten() for k in range(10)]  # at least 174 each
    test = torch.cat([rows[100:170] for rows in of_digit])

    def network() -> nn.Module:
        hidden = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        return nn.Sequential(*hidden, nn.Linear(64, 10))

    return Task(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        labels[train].bincount().tolist(),
        network,
        dim=64,
    )


def folder(root: Path, name: str, size: int, imbalance: float) -> Task:
    import timm
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25])]
    crop = [v2.RandomResizedCrop(size, (0.5, 1.0)), v2.RandomHorizontalFlip()]
    train = ImageFolder(root / "train", v2.Compose([*tensor, *crop]))
    whole = v2.Compose([*tensor, v2.Resize(size), v2.CenterCrop(size)])
    test = ImageFolder(root / "val", whole)
    if train.classes != test.classes:
        raise SystemExit(f"--root {root}: train and val have other classes")
    labels = torch.tensor(train.targets)
    rows = kept(labels, labels.bincount(), imbalance)
    classes = len(train.classes)

    def network() -> nn.Module:
        return timm.create_model(name, num_classes=classes)

    counts = labels[rows].bincount(minlength=classes).tolist()
    classifier: nn.Linear = network().get_classifier()  # type: ignore[operator]
    return Task(Subset(train, rows.tolist()), test, counts, network, classifier.in_features)


def accuracies(task: Task, with_sar: bool, seed: int, steps: int) -> list[float]:
    """The accuracy of head, body and tail, in %."""
    classes = len(task.counts)
    torch.manual_seed(seed)
    model = task.network()
    sar = None
    if with_sar:
        sar = ao.attach(
            model, ao.SAR(classes, task.dim, layers=2, ignore_index=-1)
        )  # 1. appendix A
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draws = torch.Generator().manual_seed(seed)  # the same with and without SAR
    sampler = RandomSampler(
        task.train,  # type: ignore[arg-type]
        replacement=True,
        num_samples=64 * steps,
        generator=draws,
    )
    for images, labels in DataLoader(task.train, batch_size=64, sampler=sampler):
        loss = F.cross_entropy(model(images), labels)
        if sar is not None:
            loss = loss + sar(labels)  # 2. the labels of the images
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    hits, totals = torch.zeros(classes), torch.zeros(classes)
    with torch.no_grad():
        for images, labels in DataLoader(task.test, batch_size=256):
            correct = model(images).argmax(1) == labels
            hits += labels[correct].bincount(minlength=classes)
            totals += labels.bincount(minlength=classes)
    order = torch.tensor(task.counts).argsort(descending=True, stable=True)
    third = max(1, classes // 3)
    members = (order[:third], order[third : classes - third], order[classes - third :])
    return [100 * float(hits[rows].sum() / totals[rows].sum().clamp(min=1)) for rows in members]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="train/CLASS/… and val/CLASS/… (default: digits)")
    parser.add_argument("--imbalance", type=float, default=1.0, help="of the folder: first to last")
    parser.add_argument("--network", default="resnet18", help="of timm, for the folder")
    parser.add_argument("--size", type=int, default=32, help="of the folder's images, in pixels")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    if arguments.root is None:
        task = digits()
    else:
        task = folder(arguments.root, arguments.network, arguments.size, arguments.imbalance)
    print(f"{len(task.counts)} classes with {max(task.counts)} to {min(task.counts)} images")
    for name, with_sar in (("plain", False), ("SAR", True)):
        runs = [
            accuracies(task, with_sar, seed, arguments.steps) for seed in range(arguments.seeds)
        ]
        groups = [
            f"{group} {fmean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f} %"
            for group, values in zip(GROUPS, zip(*runs, strict=True), strict=True)
        ]
        print(f"{name:5}  {', '.join(groups)}")


if __name__ == "__main__":
    main()

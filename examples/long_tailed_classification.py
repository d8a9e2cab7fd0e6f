"""Long-tailed classification with SAR: scikit-learn's digits with few images of the high digits.

    python examples/long_tailed_classification.py [--seeds 5] [--steps 500]

Trains a small network with and without SAR, for each seed. There are 100 training images of digit
0, and geometrically fewer of each following digit, down to 3 of digit 9. The test images are
balanced. Prints the accuracy on the first three digits (head) and the last three (tail). With the
defaults SAR does not improve the tail accuracy of this small network: the script shows how to use
and compare it, not a gain.
"""

import argparse
from statistics import fmean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import anchorops as ao

K, D = 10, 64
COUNTS = [round(100 * 0.03 ** (k / 9)) for k in range(K)]  # 100, 68, …, 3


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 64) in [0, 1] and labels (N,), then test images and labels."""
    pixels, digits = load_digits(return_X_y=True)
    of_digit = [np.flatnonzero(digits == k) for k in range(K)]  # at least 174 each
    train = np.concatenate([rows[:n] for rows, n in zip(of_digit, COUNTS, strict=True)])
    test = np.concatenate([rows[100:170] for rows in of_digit])
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits)
    return images[train], labels[train], images[test], labels[test]


def accuracy(with_sar: bool, seed: int, steps: int) -> tuple[float, float]:
    """Accuracy in % on head and tail: the first and the last three digits."""
    images, labels, test_images, test_labels = load()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, D), nn.ReLU())
    model.append(nn.Linear(D, K))
    sar = ao.attach(model, ao.SAR(K, D, layers=2)) if with_sar else None  # 1. layers: appendix A
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = torch.Generator().manual_seed(seed)  # the same with and without
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=batches)
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        if sar is not None:
            loss = loss + sar(labels[rows])  # 2. the labels of the images
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        hits = model.eval()(test_images).argmax(1) == test_labels
    head, tail = hits[test_labels < 3], hits[test_labels >= 7]
    return 100 * head.float().mean().item(), 100 * tail.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    for name, with_sar in (("plain", False), ("SAR", True)):
        runs = [accuracy(with_sar, seed, arguments.steps) for seed in range(arguments.seeds)]
        head, tail = (
            f"{fmean(group):.1f} ± {stdev(group) if len(group) > 1 else 0:.1f}"
            for group in zip(*runs, strict=True)
        )
        print(f"{name:5}  head {head} %, tail {tail} %")


if __name__ == "__main__":
    main()

"""Long-tailed classification of images, features (N, D), with and without SAR.

    python examples/long_tailed_classification.py [--epochs 200]

Of scikit-learn's digits there are 100 training images of digit 0, and geometrically fewer of each
following one, down to 3 of digit 9. The script prints the accuracy on test images of all digits, of
the first five and of the last five. It only shows how to use SAR: a comparison needs several seeds.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import anchorops as ao

K, D = 10, 64
PIXELS, DIGITS = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
IMAGES = PIXELS.float() / 16


def split() -> tuple[Tensor, Tensor]:
    """Indices of the training images, and of 70 test images of each digit."""
    rows = [DIGITS.eq(k).nonzero().flatten() for k in range(K)]
    counts = [round(100 * 0.03 ** (k / (K - 1))) for k in range(K)]
    train = torch.cat([images[:n] for images, n in zip(rows, counts, strict=True)])
    return train, torch.cat([images[100:170] for images in rows])


def trained(with_sar: bool, train: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, D), nn.ReLU()]
    model, sar = nn.Sequential(*hidden, nn.Linear(D, K)), None
    if with_sar:  # two layers: appendix A of the paper
        sar = ao.attach(model, ao.SAR(K, D, layers=2))  # 1. before the optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(64):
            loss = F.cross_entropy(model(IMAGES[batch]), DIGITS[batch])
            if sar is not None:
                loss = loss + sar(DIGITS[batch])  # 2. the labels of the images, (N,)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=200)
    arguments = parser.parse_args()
    train, test = split()
    for name in ("plain", "SAR"):
        model = trained(name == "SAR", train, arguments.epochs)
        with torch.no_grad():
            predicted = model(IMAGES[test]).argmax(1)
        recall = ao.confusion(predicted, DIGITS[test], K).diagonal() / 70
        groups = {"all": recall, "head": recall[:5], "tail": recall[5:]}
        print(f"{name:5}", *(f"{group} {100 * x.mean():.1f} %" for group, x in groups.items()))


if __name__ == "__main__":
    main()

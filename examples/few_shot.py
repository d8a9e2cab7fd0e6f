"""Few-shot segmentation: masked average pooling of a support image, and cosines to a query.

    python examples/few_shot.py [--steps 300]

An image shows two different digits. The mask of the support image marks one of them, and the
network must find the same digit in the query image. It is trained on episodes with seven of
scikit-learn's digits. The script prints the IoU on the digits 7, 8 and 9, which are not in the
training data, before and after training. The prototypes are those of PANet (arXiv 1908.06391).
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import anchorops as ao

PIXELS, DIGITS = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
DIGIT_IMAGES = [PIXELS[k == DIGITS].float().view(-1, 8, 8) / 16 for k in range(10)]
Pictures = tuple[Tensor, Tensor]


def picture(kinds: list[int]) -> Pictures:
    """An image (1, 16, 32) of two digits side by side in random order, and a mask (16, 32), which
    is 1 on the strokes of the first digit."""
    first, second = (DIGIT_IMAGES[k][torch.randint(len(DIGIT_IMAGES[k]), ())] for k in kinds)
    image = torch.stack([torch.cat([first, second], 1), torch.cat([first, 0 * second], 1)])
    image = image.roll(8 * int(torch.randint(2, ())), dims=2)
    image = F.interpolate(image[None], scale_factor=2)[0]
    return image[:1], (image[1] > 0.3).long()


def episodes(count: int, digits: list[int]) -> tuple[Pictures, Pictures]:
    """Support and query, each with images (B, 1, 16, 32) and masks (B, 16, 32)."""
    chosen = [torch.randperm(len(digits))[:2].tolist() for _ in range(count)]
    pairs = [[digits[i] for i in pair] for pair in chosen]
    columns = [zip(*map(picture, pairs), strict=True) for _ in range(2)]
    support, query = (tuple(torch.stack(x) for x in column) for column in columns)
    return support, query  # pyright: ignore[reportReturnType]


def query_logits(model: nn.Module, support: Pictures, images: Tensor) -> Tensor:
    """Cosines to the prototypes of background and digit, over a temperature: (B, 2, 8, 16)."""
    features = model(torch.cat([support[0], images]))
    support_features, query_features = features.chunk(2)
    prototypes, _ = ao.class_centroids(support_features, support[1], 2, per_image=True)  # (B, 2, D)
    cosines = torch.einsum(
        "bkd,bdhw->bkhw", F.normalize(prototypes, dim=2), F.normalize(query_features, dim=1)
    )
    return cosines / 0.05


@torch.no_grad()
def iou(model: nn.Module, episode: tuple[Pictures, Pictures]) -> float:
    support, (images, masks) = episode
    matrix = ao.pixel_confusion(query_logits(model.eval(), support, images), masks)
    return (matrix[1, 1] / (matrix.sum() - matrix[0, 0])).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, stride in ((1, 1), (32, 2), (32, 1)):
        convolution = nn.Conv2d(inputs, 32, 5, stride=stride, padding=2)
        layers += [convolution, nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(32, 32, 1))
    unseen = episodes(200, [7, 8, 9])
    print(f"IoU on unseen digits, before training: {iou(model, unseen):.3f}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(arguments.steps):
        support, (images, masks) = episodes(16, [0, 1, 2, 3, 4, 5, 6])
        loss = ao.pixel_cross_entropy(query_logits(model.train(), support, images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"after {arguments.steps} steps: {iou(model, unseen):.3f}")


if __name__ == "__main__":
    main()

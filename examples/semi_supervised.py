"""Semi-supervised segmentation: a mean teacher gives labels to images without labels.

    python examples/semi_supervised.py [--steps 300]

An image shows discs, squares and crosses in varying colours. Four images have labels, 64 have none.
The teacher is the moving average of the student's weights (Tarvainen & Valpola, arXiv 1703.01780).
Its predictions of an image are the labels for the student, which sees the image with noise and
another brightness. Only confident predictions count, as in FixMatch (arXiv 2001.07685). The script
prints the mIoU on new images, first of a network that is trained with the four images alone.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import anchorops as ao

K, SIZE = 4, 32
COLOURS = torch.tensor([[0.2, 0.2, 0.2], [0.9, 0.4, 0.4], [0.4, 0.9, 0.4], [0.4, 0.4, 0.9]])


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 32) and labels: 0 background, 1 disc, 2 square, 3 cross."""
    rows, columns = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    images, labels = torch.empty(count, 3, SIZE, SIZE), torch.zeros(count, SIZE, SIZE).long()
    for image, label in zip(images, labels, strict=True):
        image[:] = 0.4 * torch.rand(3, 1, 1)
        for k in (1, 2, 3):
            y, x = (
                (rows - torch.randint(5, 27, ())).abs(),
                (columns - torch.randint(5, 27, ())).abs(),
            )
            shapes = y**2 + x**2 < 36, y.maximum(x) < 6, (y.minimum(x) < 2) & (y.maximum(x) < 8)
            label[shapes[k - 1]] = k
            image[:, shapes[k - 1]] = (COLOURS[k] + 0.5 * torch.rand(3) - 0.25)[:, None]
    return images + 0.1 * torch.randn_like(images), labels


def network() -> nn.Module:
    """Logits (B, K, 8, 8) of images (B, 3, 32, 32)."""
    layers: list[nn.Module] = []
    for inputs, stride in ((3, 2), (16, 2), (16, 1)):
        convolution = nn.Conv2d(inputs, 16, 3, stride=stride, padding=1)
        layers += [convolution, nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, K, 1))


@torch.no_grad()
def miou(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    matrix = ao.pixel_confusion(model.eval()(images), labels)
    hits, union = matrix.diag(), matrix.sum(0) + matrix.sum(1) - matrix.diag()
    return (hits / union.clamp(min=1))[union > 0].mean().item()  # of the classes that occur


def train(steps: int, labelled: tuple[Tensor, Tensor], unlabelled: Tensor | None) -> nn.Module:
    """Returns the teacher. Without unlabelled images it is only an average."""
    torch.manual_seed(1)
    student = network()
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    loss_of_pixels = ao.CrossEntropy()
    for step in range(steps):
        student.train()
        loss = loss_of_pixels(student(labelled[0]), labelled[1])
        if unlabelled is not None and step >= steps // 4:
            images = unlabelled[torch.randperm(len(unlabelled))[:16]]
            with torch.no_grad():
                logits = teacher.eval()(images)
            labels, probabilities = ao.pixel_argmax(logits, (SIZE, SIZE), confidence=True)
            confident = (probabilities > 0.95).float()
            noisy = images * (0.7 + 0.6 * torch.rand(16, 1, 1, 1)) + 0.2 * torch.randn_like(images)
            loss = loss + confident.mean() * loss_of_pixels(student(noisy), labels, confident)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update_parameters(student)
    return teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    labelled, (unlabelled, _), new = pictures(4), pictures(64), pictures(64)
    for name, images in (("4 labelled images", None), ("and 64 without labels", unlabelled)):
        print(f"{name}: mIoU {miou(train(arguments.steps, labelled, images), *new):.3f}")


if __name__ == "__main__":
    main()

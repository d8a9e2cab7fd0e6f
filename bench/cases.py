"""The measured cases: shapes, labels, dtypes, and the exact results for every formula."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import anchorops as ao
from anchorops._backend import TRITON_ON_HOST
from anchorops.measure import example_labels

IGNORE_INDEX = 255  # in the labels of pixel losses
STEPS, WIDTH, NOISE = 100, 64, 0.5  # of the trained network: Adam's, channels, in its images
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Shape(NamedTuple):
    """A feature map (B, D, H, W) or points (N, D), with K classes. On CPU the batch is smaller."""

    name: str
    size: tuple[int, ...]
    num_classes: int
    cpu_batch: int = 2

    def on(self, device: torch.device, tiny: bool = False) -> "Shape":
        size = list(self.size)
        if device.type == "cpu":
            size[0] = min(self.cpu_batch, size[0])
        if tiny:
            largest = (2, 24, 8, 12) if len(size) == 4 else (500, 24)
            size = [min(pair) for pair in zip(size, largest, strict=True)]
        return self._replace(size=tuple(size))

    @property
    def pixels(self) -> tuple[int, ...]:
        return (self.size[0], *self.size[2:])

    @property
    def sizes(self) -> str:
        axes = "BDHW" if len(self.size) == 4 else "ND"
        sizes = " ".join(f"{axis}{size:,}" for axis, size in zip(axes, self.size, strict=True))
        return f"{sizes} K{self.num_classes:,}"


HRNET = Shape("HRNet-W48, Cityscapes", (8, 720, 128, 256), 19)
OCRNET = Shape("OCRNet, Cityscapes", (8, 512, 128, 256), 19)
SEGFORMER = Shape("SegFormer-B5, ADE20K", (16, 768, 128, 128), 150)
COCO = Shape("SegFormer-B5, COCO-Stuff", (16, 768, 128, 128), 171)
POINTS = Shape("points, ScanNet200", (1_000_000, 96), 200, cpu_batch=100_000)
IMAGENET = Shape("images, ImageNet", (1024, 2048), 1000, cpu_batch=1024)
MANY = Shape("1,200 classes", (8, 512, 128, 128), 1200, cpu_batch=1)


class Case(NamedTuple):
    """One comparison: every implementation does the same on the same inputs."""

    operation: str
    direction: str
    shape: Any  # a Shape, or another type of a benchmark file
    dtype: str = ""  # float32 on CPU, bfloat16 on GPU
    labels: str = "coherent"
    compiled: bool = False  # also compile the alternatives, which takes about 10 s each

    def __str__(self) -> str:
        parts = (self.operation, self.direction, self.shape.name, self.dtype, self.labels)
        return ", ".join(parts)


def grid(quick: list[Case], full: list[Case], names: Callable[[Case, torch.device], list[str]]):
    """Parametrises a test by case and by the name of an implementation; conftest.py does it."""

    def decorate(test: Callable) -> Callable:
        test.grid = quick, full, names
        return test

    return decorate


def backends(device: torch.device) -> dict[str, str]:
    """Our implementations on the device, by their name in tables, fastest first."""
    kinds = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}[device.type]
    usable = [kind for kind in kinds if ao.backends()[kind] is None and not TRITON_ON_HOST]
    return {f"anchorops ({kind})": kind for kind in usable or ["reference"]}


def labels_of(size: tuple[int, ...], classes: int, kind: str, device: torch.device) -> Tensor:
    """Those of pixel losses."""
    labels = example_labels(size, classes, kind)
    return torch.where(labels < 0, IGNORE_INDEX, labels).to(device)


class Inputs:
    """Features, labels (of maps at four times the size) and anchors."""

    def __init__(self, shape: Shape, dtype: str, labels: str, device: torch.device) -> None:
        self.shape, self.device = shape, device
        generator = torch.Generator(device).manual_seed(0)
        self.features = torch.randn(
            shape.size, dtype=DTYPES[dtype], device=device, generator=generator
        )
        self.labels = example_labels(shape.pixels, shape.num_classes, labels).to(device)
        if len(shape.size) == 4:
            self.labels = self.labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
        matrix = (shape.num_classes, shape.size[1])
        self.anchors = torch.randn(matrix, device=device, generator=generator)
        # the gradients of sums and sqdists
        self.dsums = torch.randn(matrix, device=device, generator=generator)
        self.dsqdists = torch.rand(shape.num_classes, device=device, generator=generator)


def trained_logits(labels: Tensor, num_classes: int, ratio: int) -> Tensor:
    """Logits of a network that was trained on images of low resolution, whose noisy colours are
    those of the classes."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(num_classes, 3, generator=generator)
    images = colours[labels[:, ::ratio, ::ratio]].movedim(-1, 1)
    images = images + NOISE * torch.randn(images.shape, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()),
            nn.Conv2d(WIDTH, num_classes, 1),
        )
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        ao.pixel_cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network(images).detach().requires_grad_()


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖."""
    exact = exact.double() if exact.numel() < 1 << 20 else exact
    exact = exact.detach()
    difference = ours.detach().to(exact.dtype) - exact
    return float(difference.norm() / exact.norm())

"""Sizes of inputs, and the inputs.

They are random numbers; logits may also be those of a small network that was trained on the labels:
few errors, and steep between classes. No label of a pixel loss is ignored, because MONAI cannot
ignore any.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao
from anchorops.doctor.catalogue import Inputs
from anchorops.measure import example_labels

STEPS, WIDTH, NOISE = 100, 64, 0.5  # of the trained network: Adam's, channels, in its images
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Features(NamedTuple):
    """A feature map (B, D, H, W), points (N, D) or centroids [K, D], with K classes. On CPU the
    batch is smaller. Labels of a map have four times its height and width."""

    name: str
    size: tuple[int, ...]
    num_classes: int
    cpu_batch: int = 2

    stride = None

    def on(self, device: torch.device, tiny: bool = False) -> "Features":
        size, num_classes = list(self.size), self.num_classes
        if device.type == "cpu":
            size[0] = min(self.cpu_batch, size[0])
        if tiny:
            largest = (2, 24, 8, 12) if len(size) == 4 else (20, 24)
            size = [min(pair) for pair in zip(size, largest, strict=True)]
            num_classes = min(num_classes, 20)
        return self._replace(size=tuple(size), num_classes=num_classes)

    @property
    def sizes(self) -> str:
        axes = "BDHW" if len(self.size) == 4 else "ND"
        sizes = " ".join(f"{axis}{size:,}" for axis, size in zip(axes, self.size, strict=True))
        return f"{sizes} K{self.num_classes:,}"

    def inputs(self, dtype: str, labels: str, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        features = torch.randn(self.size, dtype=DTYPES[dtype], device=device, generator=generator)
        anchors = (self.num_classes, self.size[1])
        anchors = torch.randn(anchors, device=device, generator=generator)
        if self.name == "centroids":
            queries, keys = (F.normalize(x, dim=1) for x in (features, anchors))
            return {"queries": queries, "keys": keys}
        pixels = (self.size[0], *self.size[2:])
        classes = example_labels(pixels, self.num_classes, labels).to(device)
        if len(self.size) == 4:
            classes = classes.repeat_interleave(4, 1).repeat_interleave(4, 2)
        return {"features": features, "labels": classes, "anchors": anchors}


class Logits(NamedTuple):
    """Logits (B, K, h, w), or a volume (B, K, d, h, w), and the size of their labels.
    sigmoid: labels have the logits' channels, 0 or 1."""

    name: str
    size: tuple[int, ...]
    label_size: tuple[int, ...]
    channels_last: bool = False
    cpu_batch: int = 2
    sigmoid: bool = False

    @property
    def num_classes(self) -> int:
        return self.size[1]

    @property
    def stride(self) -> int:
        return round(self.label_size[-1] / self.size[-1])

    @property
    def sizes(self) -> str:
        axes = "BKhw" if len(self.size) == 4 else "BKdhw"
        sizes = " ".join(f"{axis}{size:,}" for axis, size in zip(axes, self.size, strict=True))
        return f"{sizes}, labels {'×'.join(map(str, self.label_size))}"

    def on(self, device: torch.device, tiny: bool = False) -> "Logits":
        (batch, num_classes, *space), labels = self.size, self.label_size
        if device.type == "cpu":
            batch = min(self.cpu_batch, batch)
        if tiny:
            batch, num_classes = min(batch, 2), min(num_classes, 20 if num_classes <= 255 else 256)
            space = [max(4, 32 // self.stride) if len(space) == 2 else 5] * len(space)
            labels = tuple(n * self.stride for n in space)
        return self._replace(size=(batch, num_classes, *space), label_size=labels)

    def inputs(self, dtype: str, labels: str, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(self.size, dtype=DTYPES[dtype], device=device, generator=generator)
        if self.channels_last:
            logits = logits.contiguous(memory_format=torch.channels_last)
        batch = self.size[0] * (self.num_classes if self.sigmoid else 1)
        flat = (batch, math.prod(self.label_size[:-1]), self.label_size[-1])
        num_classes = 2 if self.sigmoid else self.num_classes
        kind = "random" if labels == "random" else "coherent"
        classes = example_labels(flat, num_classes, kind).clamp(min=0)
        channels = [self.num_classes] if self.sigmoid else []
        classes = classes.view(self.size[0], *channels, *self.label_size)
        if labels == "trained":
            logits = trained_logits(classes, num_classes, self.stride)
        classes = classes.to(device, torch.uint8 if labels == "uint8" else torch.int64)
        return {"logits": logits.to(device), "labels": classes}


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
    return network(images).detach()

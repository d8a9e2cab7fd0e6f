"""Logits that are cosines to anchors: text embeddings, a simplex, or class means.

    python examples/cosine_head.py [--steps 30]

The features are normalised and multiplied by unit anchors: a 1×1 convolution, divided by a
temperature. Upsampling is linear, so cosines of low resolution, upsampled inside the loss, are the
products of upsampled unit features with the anchors. Full-resolution features, D numbers for
each pixel, never exist. torch's F.linear_cross_entropy would need them.

text: as in LSeg (Li et al., arXiv 2201.03546). Random vectors stand for the embeddings of CLIP.
simplex: a fixed classifier whose anchors have equal angles (Zhu et al., arXiv 2105.02375).
means: the moving average of each class's mean feature, as the prototypes of SePiCo (arXiv
2204.08808) and ProtoSeg (arXiv 2203.15102), which take more than one loss or prototype.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao

COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
K, D = len(COLOURS), 64


class CosineHead(nn.Module):
    """Logits (B, K, h, w) of features (B, D, h, w): their cosines to anchors [K, D], divided by the
    temperature."""

    anchors: Tensor

    def __init__(self, anchors: Tensor, temperature: float = 0.07) -> None:
        super().__init__()
        self.register_buffer("anchors", F.normalize(anchors, dim=1))
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        cosines = F.conv2d(F.normalize(features, dim=1), self.anchors[:, :, None, None])
        return cosines / self.temperature

    @torch.no_grad()
    def average(self, features: Tensor, labels: Tensor, momentum: float = 0.9) -> None:
        """Move the anchors of the present classes towards their mean unit features."""
        means, counts = ao.class_centroids(F.normalize(features, dim=1), labels, len(self.anchors))
        moved = F.normalize(momentum * self.anchors + (1 - momentum) * means, dim=1)
        self.anchors.copy_(torch.where(counts[:, None] > 0, moved, self.anchors))


def anchors_of(kind: str) -> Tensor:
    return ao.anchors.simplex_etf(K, D) if kind == "simplex" else torch.randn(K, D)


def scenes(size: int) -> tuple[Tensor, Tensor]:
    """Noisy images of squares; the last rows of the labels are ignored."""
    coarse = torch.randint(0, K, (4, size // 16, size // 16))
    labels = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    images = COLOURS[labels].movedim(-1, 1) + 0.3 * torch.randn(4, 3, size, size)
    labels[:, -4:] = 255
    return images, labels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    for kind in ("text", "simplex", "means"):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 64, 4, stride=4), nn.ReLU(), nn.Conv2d(64, D, 3, padding=1)
        )
        head = CosineHead(anchors_of(kind))
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        for step in range(arguments.steps):
            images, labels = scenes(64)
            features = network(images)  # (B, D, h, w), of output stride 4
            loss = ao.pixel_cross_entropy(head(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if kind == "means":
                head.average(features, labels)
            if step == 0:
                first = loss.item()
        images, labels = scenes(64)
        with torch.no_grad():
            matrix = ao.pixel_confusion(head(network(images)), labels)
        accuracy = matrix.diag().sum() / matrix.sum()
        print(f"{kind}: loss {first:.2f} to {loss.item():.2f}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()

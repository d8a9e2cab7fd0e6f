"""What is measured: shapes, labels, and the rivals, each the best that people write by hand."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Moments = tuple[Tensor, Tensor]  # sums [K, D], sqdists [K]


class Shape(NamedTuple):
    """A feature map (B, D, H, W) with K classes; labels come at four times the size."""

    name: str
    batch: int
    dim: int
    height: int
    width: int
    num_classes: int

    def features(self, dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(0)
        return torch.randn(self.batch, self.dim, self.height, self.width, dtype=dtype)

    def labels(self, kind: str) -> Tensor:
        """ "coherent": rectangles of 37×24 pixels of the features, at odd offsets; "random": each
        pixel drawn alone. One in K + 1 is ignored (255)."""
        generator = torch.Generator().manual_seed(1)
        size = (self.batch, self.height, self.width)
        if kind == "random":
            labels = torch.randint(self.num_classes + 1, size, generator=generator)
        else:
            coarse = (self.batch, self.height // 24 + 2, self.width // 37 + 2)
            labels = torch.randint(self.num_classes + 1, coarse, generator=generator)
            labels = labels.repeat_interleave(24, 1).repeat_interleave(37, 2)
            labels = labels[:, 5 : 5 + self.height, 11 : 11 + self.width]
        labels = torch.where(labels == self.num_classes, 255, labels)
        return labels.repeat_interleave(4, 1).repeat_interleave(4, 2).contiguous()

    def anchors(self) -> Tensor:
        return torch.randn(self.num_classes, self.dim, generator=torch.Generator().manual_seed(2))


HRNET = Shape("HRNet B2 D720 128x256 K19", 2, 720, 128, 256, 19)


def _rows(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    labels = F.interpolate(labels[:, None].float(), features.shape[2:], mode="nearest").long()
    labels = torch.where(labels < num_classes, labels, num_classes).flatten()
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]), labels


def index_add(features: Tensor, labels: Tensor, anchors: Tensor) -> Moments:
    """Rows by permute, sums by index_add_, anchors by gather: the usual formula."""
    num_classes, dim = anchors.shape
    rows, labels = _rows(features, labels, num_classes)
    sums = rows.new_zeros(num_classes + 1, dim).index_add(0, labels, rows)
    nearest = torch.cat([anchors, anchors.new_zeros(1, dim)])[labels]
    squares = (rows - nearest).square().sum(1)
    sqdists = rows.new_zeros(num_classes + 1).index_add(0, labels, squares)
    return sums[:-1], sqdists[:-1]


def one_hot(features: Tensor, labels: Tensor, anchors: Tensor) -> Moments:
    """One-hot matmul for the sums; the squared distances of all classes by the expanded square,
    which is fast and loses accuracy where anchors are far."""
    num_classes = anchors.shape[0]
    labels = F.interpolate(labels[:, None].float(), features.shape[2:], mode="nearest").long()
    labels = torch.where(labels < num_classes, labels, num_classes).flatten(1)
    hot = F.one_hot(labels, num_classes + 1)[..., :-1].to(features.dtype)
    flat = features.flatten(2)
    sums = torch.einsum("bdn,bnk->kd", flat, hot)
    squares = torch.einsum("bn,bnk->k", flat.square().sum(1), hot)
    norms = hot.sum((0, 1)) * anchors.square().sum(1)
    return sums, squares - 2 * (sums * anchors).sum(1) + norms


def class_loop(features: Tensor, labels: Tensor, anchors: Tensor) -> Moments:
    """A mask for each class, as the released code of SAR and CeCo does."""
    rows, labels = _rows(features, labels, anchors.shape[0])
    members = [rows[labels == k] for k in range(anchors.shape[0])]
    sums = torch.stack([rows.sum(0) for rows in members])
    sqdists = [
        (rows - anchor).square().sum() for rows, anchor in zip(members, anchors, strict=True)
    ]
    return sums, torch.stack(sqdists)


RIVALS: dict[str, Callable[[Tensor, Tensor, Tensor], Moments]] = {
    "index_add": index_add,
    "one_hot": one_hot,
    "class_loop": class_loop,
    "compiled index_add": torch.compile(index_add),
    "compiled one_hot": torch.compile(one_hot),
}

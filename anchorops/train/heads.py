"""The heads of FCN, OCRNet and SegFormer, as in mmsegmentation. Their input is the list of a
backbone's maps, the finest first; their output is the features before the last classifier."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm_relu(inputs: int, outputs: int, kernel: int = 1) -> nn.Sequential:
    """A convolution without bias that keeps the size, then batch norm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def at_first_size(maps: Sequence[Tensor]) -> Tensor:
    """(B, ΣC, H, W): the maps, resized to the size of the first one and concatenated."""
    size = maps[0].shape[2:]
    resized = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps[1:]]
    return torch.cat([maps[0], *resized], dim=1)


class FCNHead(nn.Module):
    """Two 3×3 convolutions of the last map, and a third one of that map and their result
    (arXiv 1411.4038)."""

    dim = 512

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        last = channels[-1]
        self.convolutions = nn.Sequential(
            conv_norm_relu(last, self.dim, 3), conv_norm_relu(self.dim, self.dim, 3)
        )
        self.mix = conv_norm_relu(last + self.dim, self.dim, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        last = maps[-1]
        return self.mix(torch.cat([last, self.convolutions(last)], dim=1))


class SegFormerHead(nn.Module):
    """Every map is reduced to 256 channels and resized to the size of the first one; a 1×1
    convolution mixes them (arXiv 2105.15203). As in the papers' baselines, batch norm and ReLU
    follow each linear layer."""

    dim = 256

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(conv_norm_relu(width, self.dim) for width in channels)
        self.mix = conv_norm_relu(len(channels) * self.dim, self.dim)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        reduced = [linear(x) for linear, x in zip(self.linears, maps, strict=True)]
        return self.mix(at_first_size(reduced))


class SoftRegions(nn.Sequential):
    """The logits of OCRNet's regions. In training they have their own loss."""

    def __init__(self, inputs: int, hidden: int, kernel: int, dropout: float, num_classes: int):
        super().__init__(
            conv_norm_relu(inputs, hidden, kernel),
            nn.Dropout2d(dropout) if dropout else nn.Identity(),
            nn.Conv2d(hidden, num_classes, 1),
        )
        self._logits: Tensor | None = None

    def forward(self, maps: Tensor) -> Tensor:
        logits = super().forward(maps)
        self._logits = logits if self.training else None
        return logits

    def logits(self) -> Tensor:
        """The logits (B, K, h, w) of the last training forward; they can be read once."""
        kept, self._logits = self._logits, None
        assert kept is not None, "the model has not run in training mode"
        return kept


class OCRHead(nn.Module):
    """Object-contextual representations (arXiv 1909.11065): each pixel attends to the classes'
    soft regions.

    joined: whether regions and pixels are computed from all maps, resized to the size of the first
    one (as for HRNet). Otherwise the regions are computed from the second last map, and the pixels
    from the last one (as for ResNet).
    """

    dim, inner_dim = 512, 256

    def __init__(self, channels: Sequence[int], num_classes: int, *, joined: bool) -> None:
        super().__init__()
        self.joined, dim, inner = joined, self.dim, self.inner_dim
        if joined:
            inputs = sum(channels)
            self.regions = SoftRegions(inputs, inputs, 1, 0.0, num_classes)
        else:
            inputs = channels[-1]
            self.regions = SoftRegions(channels[-2], 256, 3, 0.1, num_classes)
        self.pixels = conv_norm_relu(inputs, dim, 3)
        self.query = nn.Sequential(conv_norm_relu(dim, inner), conv_norm_relu(inner, inner))
        self.key = nn.Sequential(conv_norm_relu(dim, inner), conv_norm_relu(inner, inner))
        self.value = conv_norm_relu(dim, inner)
        self.context = conv_norm_relu(inner, dim)
        self.mix = conv_norm_relu(2 * dim, dim)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        last = at_first_size(maps) if self.joined else maps[-1]
        pixels = self.pixels(last)  # (B, D, h, w)
        logits = self.regions(last if self.joined else maps[-2])  # (B, K, h, w)
        shares = logits.flatten(2).softmax(2)  # of the pixels in each region
        regions = (pixels.flatten(2) @ shares.transpose(1, 2))[..., None]  # (B, D, K, 1)
        query, key, value = (
            x.flatten(2).transpose(1, 2)
            for x in (self.query(pixels), self.key(regions), self.value(regions))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        context = self.context(attended.reshape(len(pixels), -1, *pixels.shape[2:]))
        return self.mix(torch.cat([context, pixels], dim=1))

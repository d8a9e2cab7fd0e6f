"""Rows, or means of rows, of length 1."""

import torch.nn.functional as F
from torch import Tensor


def unit_rows(rows: Tensor, counts: Tensor | None = None, *, eps: float) -> Tensor:
    """m / max(‖m‖, eps) with m = rows / max(counts, 1), or m = rows without counts.

    rows: [..., D]; counts: int64 [...].
    """
    if counts is not None:
        rows = rows / counts.clamp(min=1)[..., None]
    return F.normalize(rows, dim=-1, eps=eps)


def unit_views(
    sums: Tensor, counts: Tensor, eps: float, with_means: bool, with_centroids: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """units, means m = sums / max(counts, 1), for each class the unit row of the mean of its views,
    without a gradient, and which views are present, bool [K, G]: those with a pixel; with
    centroids, those of classes with a pixel in each view. Means and centroids that are not wanted
    are (0,).

    sums: [K, G, D]; counts: int64 [K, G].
    """
    nothing, means = sums.new_empty(0), sums / counts.clamp(min=1)[..., None]
    units = F.normalize(means, dim=-1, eps=eps)
    centroids = F.normalize(means.detach().mean(1), dim=-1, eps=eps) if with_centroids else nothing
    present = counts.all(1)[:, None].expand(counts.shape) if with_centroids else counts > 0
    return units, means if with_means else nothing, centroids, present

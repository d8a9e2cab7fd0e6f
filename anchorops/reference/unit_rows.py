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

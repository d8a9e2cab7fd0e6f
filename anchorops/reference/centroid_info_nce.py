"""InfoNCE between the centroids of classes."""

import torch
from torch import Tensor


def centroid_info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    positives: Tensor | None = None,
    present: Tensor | None = None,
    present_keys: Tensor | None = None,
    temperature: float = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """−log [ e^{q_i·p_i/τ} / ( e^{q_i·p_i/τ} + Σ_{j≠i} e^{q_i·k_j/τ} ) ] for each present query i,
    with p_i = k_i unless positives are given.

    queries, positives: [K, D] or [K, G, D]; keys: [K, D]; present: bool [K] or [K, G];
    present_keys: bool [K], by default the classes with a present query.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    if present is None:
        present = torch.ones(queries.shape[:-1], dtype=torch.bool, device=queries.device)
    if present_keys is None:
        present_keys = present if present.dim() == 1 else present.any(1)
    own = torch.eye(keys.shape[0], dtype=torch.bool, device=keys.device)
    if queries.dim() == 3:
        own = own[:, None]
    with torch.autocast(queries.device.type, enabled=False):
        # Absent classes are removed by selection, because their centroids may be NaN.
        queries = torch.where(present[..., None], queries.to(dtype), 0)
        used = present_keys
        if positives is None:
            used = used | (present if present.dim() == 1 else present.any(1))
        keys = torch.where(used[:, None], keys.to(dtype), 0)
        logits = queries @ keys.T / temperature
        if positives is not None:
            positives = torch.where(present[..., None], positives.to(dtype), 0)
            logits = torch.where(
                own, ((queries * positives).sum(-1) / temperature)[..., None], logits
            )
        positive = torch.where(own, logits, 0).sum(-1)
        lse = torch.where(present_keys | own, logits, -torch.inf).logsumexp(-1)
        losses = torch.where(present, lse - positive, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / present.sum().clamp(min=1)

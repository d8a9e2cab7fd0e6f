"""InfoNCE between the centroids of classes."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._checks import in_transform

LOGITS_AT_ONCE = 2**23  # 32 MiB in float32; more are computed in parts, and again for the gradient
LOGITS_OF_PART = 2**20  # the formula needs a few copies of them


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
    """−log [ e^{q_i·p_i/τ} / ( e^{q_i·p_i/τ} + Σ_{j≠i} e^{q_i·k_j/τ} ) ] for each present query i;
    j: the present keys; p_i = k_i if no positives are given.

    queries, positives: [K, D] or [K, G, D]; keys: [K, D]; present: bool [K] or [K, G];
    present_keys: bool [K], by default the classes with a present query.
    """
    num_classes, shape = keys.shape[0], queries.shape[:-1]
    dtype = torch.promote_types(queries.dtype, torch.float32)
    if present is None:
        present = torch.ones(shape, dtype=torch.bool, device=queries.device)
    has_query = present if present.dim() == 1 else present.any(1)
    if present_keys is None:
        present_keys = has_query
    # There is no autocast for the device "meta".
    with torch.autocast("cpu" if queries.is_meta else queries.device.type, enabled=False):
        # Absent classes are removed by selection, because their centroids may be NaN.
        used = present_keys if positives is not None else present_keys | has_query
        keys = torch.where(used[:, None], keys.to(dtype), 0)
        own_class = torch.arange(num_classes, device=keys.device).repeat_interleave(
            shape[1:].numel()
        )
        flat = None if positives is None else positives.flatten(0, -2)
        rows = queries.flatten(0, -2), flat, present.flatten(), own_class
        arguments = keys, present_keys, temperature
        # torch.func's transforms do not support torch.utils.checkpoint.
        transformed = any(x is not None and in_transform(x) for x in (queries, keys, flat))
        if transformed or shape.numel() * num_classes <= LOGITS_AT_ONCE:
            losses = _losses(rows, *arguments)
        else:
            most = max(LOGITS_OF_PART // num_classes, 1)
            count = -(-shape.numel() // most)
            parts = ([None] * count if x is None else x.split(most) for x in rows)
            losses = torch.cat(
                [
                    checkpoint(
                        _losses, part, *arguments, use_reentrant=False, preserve_rng_state=False
                    )
                    for part in zip(*parts, strict=True)
                ]
            )
    losses = losses.view(shape)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / present.sum().clamp(min=1)


def _losses(
    rows: tuple[Tensor, Tensor | None, Tensor, Tensor],
    keys: Tensor,
    present_keys: Tensor,
    temperature: float,
) -> Tensor:
    """Losses [R] of rows: queries, positives [R, D]; present bool [R]; their own class [R]."""
    queries, positives, present, own_class = rows
    queries = torch.where(present[:, None], queries.to(keys.dtype), 0)
    is_own_key = own_class[:, None] == torch.arange(len(keys), device=keys.device)
    logits = queries @ keys.T / temperature
    if positives is not None:
        positives = torch.where(present[:, None], positives.to(keys.dtype), 0)
        product = (queries * positives).sum(-1, keepdim=True)
        logits = torch.where(is_own_key, product / temperature, logits)
    positive = torch.where(is_own_key, logits, 0).sum(-1)
    lse = torch.where(present_keys | is_own_key, logits, -torch.inf).logsumexp(-1)
    return torch.where(present, lse - positive, 0)

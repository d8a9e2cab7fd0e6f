"""InfoNCE between the centroids of classes: a cross-entropy over products of queries and keys."""

import torch
import torch.nn.functional as F
from torch import Tensor


def centroid_info_nce(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    bias: Tensor | None,
    present: Tensor,
    present_keys: Tensor | None,
    first: int,
    temperature: float,
    normalize: float | None,
) -> Tensor:
    """L_i = −log [ e^{q_i·p_i/τ} / ( e^{q_i·p_i/τ} + Σ_{j≠i} e^{q_i·k_j/τ} ) ] as [C, G], of the
    queries [C, G, D] of the classes i from `first` on, and their positives p_i, by default k_i.

    j are the classes with `present_keys`, bool [K]; with a bias [K], which is added to the logits
    of keys, they are all classes. L is 0 where not `present`, bool [C, G].
    Products and sums are in float32 (float64 for float64). What is absent may be NaN, so it is
    removed by selection. normalize: the eps of F.normalize, for all rows.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    classes = torch.arange(keys.shape[0], device=keys.device)
    # A mask, not gather or index_select: on a GPU, their gradients are added in any order.
    is_own_key = classes == classes[first : first + queries.shape[0], None]  # [C, K]
    if present_keys is None:
        present_keys = classes >= 0
    used_keys = present_keys
    if positives is None:
        used_keys = used_keys | (is_own_key & present.any(1)[:, None]).any(0)

    def rows(x: Tensor, used: Tensor) -> Tensor:
        x = torch.where(used[..., None], x.to(dtype), 0)
        return x if normalize is None else F.normalize(x, dim=-1, eps=normalize)

    queries, keys, is_own_key = rows(queries, present), rows(keys, used_keys), is_own_key[:, None]
    logits = queries @ keys.T / temperature
    if bias is not None:
        logits = logits + bias.to(dtype)
    if positives is not None:
        product = (queries * rows(positives, present)).sum(-1, keepdim=True)
        logits = torch.where(is_own_key, product / temperature, logits)
    positive = torch.where(is_own_key, logits, 0).sum(-1)
    lse = torch.where(present_keys | is_own_key, logits, -torch.inf).logsumexp(-1)
    return torch.where(present, lse - positive, 0)

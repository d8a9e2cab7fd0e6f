"""Cross-entropy of the anchors: row k of the logits belongs to the anchor of class k."""

import torch
from torch import Tensor


def anchor_cross_entropy(logits: Tensor, *, delta: float) -> tuple[Tensor, Tensor]:
    """−log p_k of each anchor, and whether it is recognised: k is its argmax, and p_k > delta.

    logits: [K, K]. Returns [K], and bool [K].
    """
    losses = -logits.log_softmax(1).diagonal()
    own = torch.arange(logits.shape[0], device=logits.device)
    return losses, (logits.argmax(1) == own) & ((-losses.detach()).exp() > delta)

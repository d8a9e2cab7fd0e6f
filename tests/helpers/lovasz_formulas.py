"""The Lovász losses from sorted errors, as in the released code of Berman et al."""

import torch
from torch import Tensor


def jaccard_slopes(is_class: Tensor) -> Tensor:
    """∆J of sorted errors, as lovasz_grad of the released code."""
    is_class = is_class.double()
    total = is_class.sum()
    jaccard = 1 - (total - is_class.cumsum(0)) / (total + (1 - is_class).cumsum(0))
    return torch.cat([jaccard[:1], jaccard.diff()])


def sorted_loss(errors: Tensor, is_class: Tensor) -> Tensor:
    errors, order = errors.sort(descending=True)
    return (errors.clamp(min=0) * jaccard_slopes(is_class[order])).sum()


def softmax_losses(z: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """The loss of each class [K], from full-resolution logits."""
    valid = labels != ignored
    p, labels = z.softmax(1).movedim(1, -1)[valid], labels[valid]
    losses = []
    for k in range(z.shape[1]):
        is_class = labels == k
        losses.append(sorted_loss((is_class.to(p.dtype) - p[:, k]).abs(), is_class))
    return torch.stack(losses)


def hinge_loss(z: Tensor, labels: Tensor, ignored: int) -> Tensor:
    valid = labels != ignored
    z, ones = z[valid], labels[valid] == 1
    return sorted_loss(1 - torch.where(ones, z, -z), ones)

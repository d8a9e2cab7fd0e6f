"""Centroids of learnable prototypes, and how well two halves of their groups agree."""

import torch
import torch.nn.functional as F
from torch import Tensor


def prototype_halves(
    prototypes: Tensor, half: Tensor, eps: float, loss_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of the means over the groups [K, D]; loss_weight·(1 − cos(a, b)) [K], where a and b
    are the sums of the groups with half 1 and 0; and the prototypes in the order [K, G, D].

    prototypes: [G, K, D]; half: int [G], 0 or 1.
    """
    # Autograd adds the gradient of the first use last. The other ones are contiguous, so their sum
    # is, and it becomes the parameter's gradient without a copy.
    rows = prototypes.transpose(0, 1)
    centroids = F.normalize(prototypes.mean(0), dim=-1, eps=eps)
    halves = torch.stack((half, 1 - half)).to(prototypes.dtype)
    sums = (halves @ prototypes.flatten(1)).view(2, *prototypes.shape[1:])
    a, b = F.normalize(sums, dim=-1, eps=eps)
    return centroids, loss_weight * (1 - (a * b).sum(-1)), rows

"""Softmax moments of upsampled logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from .class_keys import sum_by_key
from .class_moments import statistics_dtype
from .upsampling import upsample


class SoftmaxMoments(NamedTuple):
    """Statistics of each class, from p = the softmax of the logits upsampled to the labels' size.

    `counts`, `hits`, `losses`, `overlaps`, `masses`, `squares` and `used` are [K], with per_image
    [B, K].
    `pixel_losses` and `lse` (log-sum-exp) have the labels' shape, `outside` is a scalar. What was
    not requested is None.
    """

    counts: Tensor
    hits: Tensor | None
    losses: Tensor
    overlaps: Tensor | None
    masses: Tensor | None
    squares: Tensor | None
    pixel_losses: Tensor | None
    lse: Tensor | None
    used: Tensor | None = None
    outside: Tensor | None = None


def softmax_moments(
    logits: Tensor,
    labels: Tensor,
    *,
    smoothing: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    min_loss: float | None = None,
    focal_gamma: float = 0.0,
    ignore_index: int,
    align_corners: bool = False,
    per_image: bool = False,
    hits: bool = True,
    masses: bool = True,
    squares: bool = False,
    pixel_losses: bool = False,
    lse: bool = False,
    outside: bool = False,
) -> SoftmaxMoments:
    """Let z be the upsampled logits, p = softmax z, V the valid pixels q:

    counts[k] = #{q ∈ V : y = k}                 hits[k] = #{q ∈ V : y = k = argmax z}
    losses[k] = Σ_{q ∈ V, y = k} w_q·L_q         overlaps[k] = Σ_{q ∈ V, y = k} p_k(q)
    masses[k] = Σ_{q ∈ V} p_k(q)                 squares[k] = Σ_{q ∈ V} p_k(q)²
    pixel_losses[q] = L_q                        lse[q] = log Σ_k e^{z_k(q)};  0 where ignored
    used[k] = Σ_{q ∈ V, y = k, not c < min_loss} w_q
    outside = #{q : y is neither a class nor ignore_index}

    L_q = m·(a_y·c + Σ_k v_k·(−log p_k)), c = −log p_y, m = (1 − e^{−c})^γ, 0 where not used

    logits: (B, K, h, w); labels: (B, H, W); or volumes (B, K, d, h, w) and (B, D, H, W);
    smoothing: (a, v) as [2, K] or [B, 2, K]; pixel_weights: w, of the labels' shape, 1 if not
    given. A pixel of weight 0 adds nothing, even if its loss is ∞.
    """
    dtype = statistics_dtype(logits.dtype)
    (batch, num_classes), size = logits.shape[:2], labels.shape[1:]
    labels = labels.long()
    is_class, ignored = (labels >= 0) & (labels < num_classes), labels == ignore_index
    valid = is_class & ~ignored
    own = torch.where(valid, labels, 0)
    # Ignored pixels are removed by selection, because NaN · 0 would be NaN.
    z = torch.where(valid[:, None], upsample(logits, size, align_corners), 0)
    all_lse = z.logsumexp(1)
    own_losses = torch.where(valid, all_lse - z.gather(1, own[:, None])[:, 0], 0)
    losses, used = own_losses, valid
    if smoothing is not None:
        weights, priors = smoothing.expand(batch, 2, num_classes).to(z.dtype).unbind(1)
        weights = weights.gather(1, own.flatten(1)).view_as(own)
        priors = priors.view(batch, num_classes, *(1,) * len(size))
        # By selection, because 0 · ∞ would be NaN.
        others = torch.where(priors == 0, 0, priors * (all_lse[:, None] - z))
        losses = torch.where(weights == 0, 0, weights * losses) + others.sum(1)
    if focal_gamma > 0:
        finite = own_losses.isfinite()  # where not, the factor is 1 and has no derivative
        miss = -torch.expm1(-torch.where(finite, own_losses, 1))
        # Kept above 0, where the derivative of a power below 1 is infinite.
        miss = miss.clamp(min=torch.finfo(dtype).tiny)
        losses = losses * torch.where(finite, miss**focal_gamma, 1)
    if min_loss is not None:
        used = valid & ~(own_losses < min_loss)
    losses = torch.where(used, losses, 0)
    weighted, shares = losses, used
    if pixel_weights is not None:
        shares = torch.where(used, pixel_weights, 0)
        # An infinite loss adds no gradient of its weight: it could be 0 · ∞.
        finite, constant = losses.isfinite(), shares.detach()
        infinite = constant * torch.where(constant == 0, 0, losses)
        weighted = torch.where(finite, shares * torch.where(finite, losses, 0), infinite)
    image = torch.arange(batch, device=labels.device).view(-1, *(1,) * len(size))
    keys = torch.where(valid, image * num_classes + own, -1).flatten()

    def by_class(values: Tensor) -> Tensor:
        values = values.double() if values.is_floating_point() else values
        sums = sum_by_key(keys, values.flatten(), batch * num_classes).view(batch, num_classes)
        return over_images(sums)

    def over_images(sums: Tensor) -> Tensor:
        sums = sums if per_image else sums.sum(0)
        return sums.to(dtype) if sums.is_floating_point() else sums

    p = torch.where(valid[:, None], (z - all_lse[:, None]).exp(), 0) if masses or squares else None
    return SoftmaxMoments(
        counts=by_class(valid.long()),
        hits=by_class((valid & (z.argmax(1) == own)).long()) if hits else None,
        losses=by_class(weighted),
        overlaps=by_class(p.gather(1, own[:, None])) if masses and p is not None else None,
        masses=over_images(p.flatten(2).sum(2)) if masses and p is not None else None,
        squares=over_images(p.square().flatten(2).sum(2)) if squares and p is not None else None,
        pixel_losses=losses.to(dtype) if pixel_losses else None,
        lse=torch.where(valid, all_lse, 0).to(dtype) if lse else None,
        used=None
        if min_loss is None and pixel_weights is None
        else by_class(shares.long() if pixel_weights is None else shares),
        outside=(~is_class & ~ignored).sum() if outside else None,
    )

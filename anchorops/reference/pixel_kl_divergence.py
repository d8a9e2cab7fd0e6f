"""Kullback-Leibler divergence of upsampled logits from those of a teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._moments import statistics_dtype
from .._shared.upsampling import upsample


def pixel_kl_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    size: Sequence[int],
    valid: Tensor | None,
    temperature: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """The sum of the divergences D_q, and each, (B, *size). With s and t the upsampled logits of
    student and teacher divided by the temperature T:

    D_q = T²·Σ_k p_k·(log p_k − log_softmax_k s),  p = softmax t;  0 where p_k = 0 or not valid

    logits: (B, K, h, w); teacher_logits: (B, K, h', w'); or volumes, (B, K, d, h, w) and
    (B, K, d', h', w'); valid: bool (B, *size).
    """
    student, teacher = (
        upsample(x, size, align_corners) / temperature for x in (logits, teacher_logits.detach())
    )
    if valid is not None:  # removed by selection, because NaN · 0 would be NaN
        student, teacher = (torch.where(valid[:, None], z, 0) for z in (student, teacher))
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
    p = log_p.exp()
    divergences = temperature**2 * torch.where(p == 0, 0, p * (log_p - log_q)).sum(1)
    dtype = statistics_dtype(logits.dtype)
    return divergences.sum().to(dtype), divergences.to(dtype)

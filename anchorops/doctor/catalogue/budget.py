"""The error budget: an error against float64 is at most twice that of torch's formula, plus a floor
of the largest number, and the rounding of each result.

Where all pixels are confident, the gradient of a loss is 1e-3 or 1e-7, and the rounding of p ≈ 1
would be an error. Errors of pixel losses are therefore relative to the largest number that the same
result also has with ordinary logits, and their floor is that of a softmax of such logits.
"""

import torch
from torch import Tensor

FLOOR = 2.0**-20
HALF = (torch.bfloat16, torch.float16)


def ordinary(logits: Tensor) -> Tensor:
    """Divided until no finite one exceeds 1."""
    finite = logits.detach().nan_to_num(0, 0, 0).abs().flatten()
    return logits / torch.cat([finite, finite.new_ones(1)]).max()


def roundings(*logits: Tensor) -> float:
    """The floor of pixel losses, in units of eps: 32; or, if that is more, two roundings of the
    largest finite |logit| of each pixel's largest class: a loss is a difference of two numbers."""
    largest = [x.amax(1).abs().double().nan_to_num(0, 0, 0).flatten() for x in logits]
    return 2 * float(torch.cat([*largest, largest[0].new_tensor([16.0])]).max())


def error_and_limit(
    ours: Tensor,
    exact: Tensor,
    plain: Tensor,
    floor: float,
    rounding: float | None = None,
    also: Tensor | None = None,
) -> tuple[float, float]:
    """The largest error and its limit, both relative to the largest number.

    Args:
        exact: the formula in float64.
        plain: the formula in the dtype of the arithmetic.
        rounding: of each number, relative to it; None: what numbers of half precision are rounded.
        also: the formula in float64 of other inputs, whose largest number counts too.
    """
    if ours.shape != exact.shape:
        return torch.inf, floor
    exact, difference = exact.double(), (ours.double() - exact.double()).abs()
    if rounding is None:
        rounding = torch.finfo(ours.dtype).eps / 2 if ours.dtype in HALF else 0.0
    if rounding:
        smallest = torch.finfo(ours.dtype).smallest_normal
        difference = (difference - rounding * exact.abs().clamp(min=smallest)).clamp(min=0)
    if exact.numel() == 0:
        return 0.0, floor
    numbers = exact if also is None else torch.cat([exact.flatten(), also.flatten()])
    largest = max(float(numbers.abs().max()), torch.finfo(torch.float32).tiny)
    if not all(x.isfinite().all() for x in (difference, plain, numbers)):
        return torch.inf, floor
    limit = 2 * float((plain.double() - exact).abs().max()) / largest + floor
    return float(difference.max()) / largest, limit

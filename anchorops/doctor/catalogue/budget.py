"""The error budget: an error against float64 is at most twice that of torch's formula, plus a floor
of the largest number, and the rounding of each result."""

import torch
from torch import Tensor

FLOOR = 2.0**-20
HALF = (torch.bfloat16, torch.float16)


def error_and_limit(
    ours: Tensor, exact: Tensor, plain: Tensor, floor: float, rounding: float | None = None
) -> tuple[float, float]:
    """The largest error and its limit, both relative to the largest number.

    Args:
        exact: the formula in float64.
        plain: the formula in the dtype of the arithmetic.
        rounding: of each number, relative to it; None: what numbers of half precision are rounded.
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
    largest = max(float(exact.abs().max()), torch.finfo(torch.float32).tiny)
    if not (difference.isfinite().all() and plain.isfinite().all()):
        return torch.inf, floor
    limit = 2 * float((plain.double() - exact).abs().max()) / largest + floor
    return float(difference.max()) / largest, limit

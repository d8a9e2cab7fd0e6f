"""The divergence of low-resolution logits from a teacher's, at full resolution.

Let s and t be the logits of student and teacher, upsampled bilinearly and divided by the
temperature T, p = softmax t, V the valid pixels q:

    D_q  = T²·(Σ_k p_k·(t_k − s_k) + lse s − lse t),  0 where p_k = 0, and where not valid
    ds_k = T·(e^(s_k − lse s) − p_k)·(dtotal + dD_q),  0 where not valid
    dlogits = the transpose of the upsampling, of ds

The backward pass computes both softmaxes again, from the logits and the two lse.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import (
    FLOATING,
    check_axes,
    check_choice,
    check_device,
    check_flags,
    check_logits,
    check_not_empty,
    check_size,
    check_strided,
    check_temperature,
    clean_bools,
    describe,
    fail,
    without_channel,
)
from .._moments import as_scalar, statistics_dtype
from .._torch_state import savable
from .registration import Gradient, define, run
from .triton_launch import launcher

# logits (B, K, h, w), teacher_logits (B, K, h', w'), valid bool (B, H, W), of any strides;
# temperature (), of the results' dtype (why a tensor: as_scalar of _moments.py). Results
# are float32, for float64 logits float64: total = Σ D is a scalar, the others are (B, H, W),
# contiguous, or empty (0,) if they were not requested. lse and teacher_lse are for the backward
# pass of the same backend, which may subtract one number from all logits of a pixel first. Those of
# the CPU are the sums of the exponentials, Triton's are to base 2.
SCHEMA = (
    "(Tensor logits, Tensor teacher_logits, Tensor? valid, SymInt height, SymInt width, "
    "Tensor temperature, bool align_corners, bool with_divergences, bool with_lse) "
    "-> (Tensor total, Tensor divergences, Tensor lse, Tensor teacher_lse)"
)

BACKWARD_SCHEMA = (
    "(Tensor logits, Tensor teacher_logits, Tensor? valid, Tensor lse, Tensor teacher_lse, "
    "Tensor? dtotal, Tensor? ddivergences, Tensor temperature, bool align_corners) -> Tensor"
)

TENSORS = ("logits", "teacher_logits", "valid", "temperature")


def forward_fake(
    logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *size, _, _, with_divergences, with_lse = arguments  # of an image, or of a volume
    dtype = statistics_dtype(logits.dtype)

    def pixel_map(requested: bool) -> Tensor:
        shape = (logits.shape[0], *size) if requested else (0,)
        return logits.new_empty(shape, dtype=dtype)

    requested = with_divergences, with_lse, with_lse
    return logits.new_empty((), dtype=dtype), *map(pixel_map, requested)


def setup_context(ctx: Any, inputs: Any, results: Any) -> None:
    lse = results.lse, results.teacher_lse
    ctx.mark_non_differentiable(*lse)
    tensors = {name: getattr(inputs, name) for name in TENSORS}
    ctx.save_for_backward(*tensors.values(), *lse)
    ctx.inputs = inputs._replace(**dict.fromkeys(TENSORS))


def backward(operator: Any, ctx: Any, grads: Any) -> dict[str, Tensor | None]:
    *tensors, lse, teacher_lse = ctx.saved_tensors
    inputs = ctx.inputs._replace(**dict(zip(TENSORS, tensors, strict=True)))
    # The gradient of an absent (empty) output is an empty tensor, not None.
    ddivergences = grads.divergences if inputs.with_divergences else None
    if not ctx.needs.logits or (grads.total is None and ddivergences is None):
        return {}
    if not inputs.with_lse:
        # torch.vmap and traces without gradients hide that a gradient will be requested
        again = inputs._replace(with_divergences=False, with_lse=True)
        _, _, lse, teacher_lse = ctx.forward(*again)
    images = inputs.logits, inputs.teacher_logits, inputs.valid
    options = inputs.temperature, inputs.align_corners
    dlogits = operator(*images, lse, teacher_lse, grads.total, ddivergences, *options)
    return {"logits": dlogits}


GRADIENT = Gradient(
    BACKWARD_SCHEMA, setup_context, backward, triton=launcher("pixel_kl_divergence_backward")
)
define(
    "pixel_kl_divergence",
    SCHEMA,
    forward_fake,
    gradient=GRADIENT,
    triton=launcher("pixel_kl_divergence"),
    any_strides=True,
)


def _check_inputs(
    function: str, logits: Tensor, teacher_logits: Tensor, size: Sequence[int], valid: object
) -> tuple[int, ...]:
    """Returns the size."""
    check_logits(function, logits, points=False)
    check_strided(function, "teacher_logits", teacher_logits)
    batch, num_classes = logits.shape[:2]
    same = isinstance(teacher_logits, Tensor) and teacher_logits.dim() == logits.dim()
    if not same or teacher_logits.shape[:2] != logits.shape[:2]:
        axes = "h, w" if logits.dim() == 4 else "d, h, w"
        expected = f"a tensor ({batch}, {num_classes}, {axes}), as logits"
        fail(function, "teacher_logits", expected, describe(teacher_logits))
    dtypes = [x for x in FLOATING if (x == torch.float64) == (logits.dtype == torch.float64)]
    if teacher_logits.dtype not in dtypes:
        expected = " or ".join(str(x).removeprefix("torch.") for x in dtypes)
        got = f"{teacher_logits.dtype} with logits in {logits.dtype}"
        fail(function, "teacher_logits", expected, got)
    check_device(function, "teacher_logits", teacher_logits, logits, "logits")
    size = check_size(function, size, logits.dim() - 2)
    for argument, x in (("logits", logits), ("teacher_logits", teacher_logits)):
        check_not_empty(function, argument, x, batch * math.prod(size))
    if valid is not None:
        shape = (batch, *size)
        if not isinstance(valid, Tensor) or valid.shape != shape or valid.dtype != torch.bool:
            fail(function, "valid", f"a bool tensor {shape}, or None", describe(valid))
        check_device(function, "valid", valid, logits, "logits")
    return size


def pixel_kl_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    size: Sequence[int],
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    align_corners: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Kullback-Leibler divergence of a teacher's low-resolution logits and a student's, compared at
    a larger size: distillation, mean teacher, soft labels.

    D_q = T²·KL(softmax(t/T) ‖ softmax(s/T)),   L = Σ_q D_q / (number of valid pixels) for "mean"

    (Hinton et al., arXiv:1503.02531, section 2) where s and t are logits and teacher_logits,
    upsampled to `size` as by F.interpolate(x.float(), size, mode="bilinear",
    align_corners=align_corners), and T is the temperature. Equal to T²·F.kl_div(log_softmax(s/T),
    softmax(t/T), reduction="none").sum(1), but it never stores the upsampled logits.

    Args:
        logits: images or volumes as in `softmax_moments`.
        teacher_logits: (B, K, h', w') or (B, K, d', h', w'), of its own size and strides; float32,
            bfloat16 or float16, with float64 logits float64. Constants: no gradient flows to it, as
            if it were detached. Logarithms of probabilities are logits too. It may be a tensor of
            torch.inference_mode, as may every input of anchorops that needs no gradient (but
            torch.compile can save none for a backward pass).
        size: (H, W), of volumes (D, H, W).
        valid: bool (B, *size) or (B, 1, *size), any strides: the pixels to compare; by default all.
            Other pixels change nothing, even if their logits are NaN or Inf, and have no gradient.
        temperature: T > 0, a normal number of float32 (at least 2⁻¹²⁶).
        align_corners: of the upsampling, as in F.interpolate.
        reduction: "mean" over the valid pixels (0 if there is none), "sum", or "none".

    Returns:
        A scalar, or (B, *size) for "none", 0 where not valid; float32 (float64 for float64 logits).
        A class to which the teacher gives probability 0 (a logit of −inf) adds 0. The result is
        inf where the student's logit is −inf and the teacher's is not, and NaN where all upsampled
        logits of the teacher are −inf, as between two pixels that have no class in common.
        The gradient is a difference of two softmaxes in float32. So its error grows with the spread
        of logits/T, as that of torch's formula.

    Raises:
        ValueError: wrong shape, dtype, device or value; a chosen backend that does not support the
            call.
        RuntimeError: a second or a forward-mode derivative was requested from a fused backend.
    """
    function = "pixel_kl_divergence"
    check_strided(function, "valid", valid)
    if isinstance(valid, Tensor) and isinstance(logits, Tensor):
        valid = without_channel(valid, logits.dim() - 1)
    size = _check_inputs(function, logits, teacher_logits, size, valid)
    valid = None if valid is None else clean_bools(valid)
    temperature = check_temperature(function, temperature)
    check_flags(function, align_corners=align_corners)
    check_choice(function, "reduction", reduction, ("mean", "sum", "none"))
    check_axes(function, logits, size)
    check_axes(function, teacher_logits, size, "teacher_logits")
    backend = select(function, logits, logits.shape[1])
    if backend == "reference":
        given = logits, teacher_logits, size, savable(valid), temperature, align_corners
        total, divergences = reference.pixel_kl_divergence(*given)
    else:
        name = "pixel_kl_divergence" if logits.dim() == 4 else "volume_kl_divergence"
        images = logits, teacher_logits.detach(), valid
        with_lse = logits.requires_grad and torch.is_grad_enabled()
        options = as_scalar(temperature, logits), align_corners, reduction == "none", with_lse
        total, divergences, _, _ = run(name, backend, *images, *size, *options)
    if reduction == "none":
        return divergences
    if reduction == "sum":
        return total
    if valid is None:
        return total / max(logits.shape[0] * math.prod(size), 1)
    return total / valid.sum().clamp(min=1)

"""Volumes whose labels have another size than the logits: trilinear upsampling.

Trilinear upsampling is linear upsampling along the depth, then bilinear upsampling of each slice.
So a volume (K, d, h, w) with labels (D, H, W) is D images (K, h, w), which the operators of images
read. They are computed some at a time, a slab, and computed again in the backward pass.

    z_q = (1 − t_q)·x_l(q) + t_q·x_u(q)     dx_l(q) += (1 − t_q)·dz_q     dx_u(q) += t_q·dz_q

for each slice q of the labels, with l and u the two slices of the logits around it. The arguments
are those of the operators of images.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._moments import (
    GRADIENTS,
    RESULTS,
    SCHEMA,
    Options,
    Results,
    split_options,
    statistics_dtype,
)
from .._shared.upsampling import bilinear_sources
from . import pixel_kl_divergence as kl
from .pixel_argmax import fake as argmax_fake
from .registration import define
from .softmax_moments import GRADIENT, forward_fake

SLAB = 2**22  # logits in a slab, unless one slice has more: 16 MiB


class _Slab(NamedTuple):
    """Some slices of one volume, or all slices of some volumes: N images."""

    volumes: slice
    slices: slice

    def select_pixels(self, maps: Tensor) -> Tensor:
        """(N, H, W), from (B, D, H, W)."""
        return maps[self.volumes, self.slices].flatten(0, 1)

    def repeat_values(self, values: Tensor) -> Tensor:
        """[N, …], from [B, …]."""
        return values[self.volumes].repeat_interleave(self.slices.stop - self.slices.start, 0)

    def by_slice(self, images: Tensor) -> Tensor:
        """[volumes, slices, …], from [N, …]."""
        return images.unflatten(0, (-1, self.slices.stop - self.slices.start))


def _slabs(depth: int, *logits: Tensor) -> Iterator[_Slab]:
    batch = logits[0].shape[0]
    slice_size = sum(x.shape[1] * x.shape[3] * x.shape[4] for x in logits)
    images = max(1, SLAB // max(slice_size, 1))
    volumes = max(1, images // max(depth, 1))
    for first in range(0, batch, volumes):
        for start in range(0, depth, images):
            yield _Slab(
                slice(first, min(first + volumes, batch)), slice(start, min(start + images, depth))
            )


def _sources(depth: int, logits: Tensor, align_corners: bool) -> list[tuple[int, int, float]]:
    """l, u and t of each slice: numbers, so that nothing is copied to or from a GPU. u = l where
    t = 0, because 0 · ∞ would be NaN."""
    dtype = statistics_dtype(logits.dtype)
    cpu = torch.device("cpu")
    lower, upper, weight = bilinear_sources(depth, logits.shape[2], align_corners, dtype, cpu)
    upper = torch.where(weight == 0, lower, upper)
    return list(zip(lower.tolist(), upper.tolist(), weight.tolist(), strict=True))


def _images(logits: Tensor, slab: _Slab, sources: list[tuple[int, int, float]]) -> Tensor:
    """The images (N, K, h, w) of a slab, in the statistics' dtype."""
    dtype = statistics_dtype(logits.dtype)
    x, sources = logits[slab.volumes].transpose(1, 2), sources[slab.slices]
    z = x.new_empty((x.shape[0], len(sources), *x.shape[2:]), dtype=dtype)
    around: dict[int, Tensor] = {}  # the slices l and u: the next q often reads them too
    for q, (lower, upper, weight) in enumerate(sources):
        if lower == upper:
            z[:, q] = x[:, lower]
            continue
        around = {i: around[i] if i in around else x[:, i].to(dtype) for i in (lower, upper)}
        torch.mul(around[lower], 1 - weight, out=z[:, q]).add_(around[upper], alpha=weight)
    return z.flatten(0, 1)


def _slab_options(slab: _Slab, options: Options) -> Options:
    return options.convert(slab.select_pixels, slab.repeat_values)


def _moments(backend: str, logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    operator = getattr(torch.ops.anchorops.softmax_moments, backend)
    options, wanted = split_options(arguments)
    results = [x.zero_() for x in forward_fake(logits, labels, *arguments)]
    if labels.numel() == 0:
        return Results(*results)._replace(divisor=results[0].new_ones((), dtype=torch.int64))
    axes = [result.axes for result in RESULTS.values()]
    totals = [
        x if axis == "pixels" or not x.is_floating_point() else x.double()
        for x, axis in zip(results, axes, strict=True)
    ]
    sources = _sources(labels.shape[1], logits, options.align_corners)
    for slab in _slabs(labels.shape[1], logits):
        slab_results = operator(
            _images(logits, slab, sources),
            slab.select_pixels(labels),
            *_slab_options(slab, options),
            *wanted,
        )
        for total, part, axis in zip(totals, slab_results, axes, strict=True):
            if axis == "pixels" and part.numel() > 0:
                total[slab.volumes, slab.slices] = slab.by_slice(part)
            elif axis == "classes" and wanted.per_image and part.numel() > 0:
                total[slab.volumes] += slab.by_slice(part).sum(1, dtype=total.dtype)
            elif axis != "pixels":
                total += part
    totals = Results(*(total.to(x.dtype) for total, x in zip(totals, results, strict=True)))
    return totals._replace(divisor=totals.counts.sum().clamp(min=1))


def _moments_backward(
    backend: str, logits: Tensor, labels: Tensor, lse: Tensor, *arguments: Any
) -> Tensor:
    operator = getattr(torch.ops.anchorops.softmax_moments_backward, backend)
    grads = arguments[: len(GRADIENTS)]
    options, wanted = split_options(arguments[len(GRADIENTS) :])
    depth = labels.shape[1]
    if labels.numel() == 0:
        return torch.zeros_like(logits)

    def slab_gradient(slab: _Slab, images: Tensor) -> Tensor:
        def select(grad: Tensor | None) -> Tensor | None:  # None, [], [K], [B, K], (B, D, H, W)
            if grad is None or grad.dim() < 2:
                return grad
            return (
                slab.repeat_values(grad)
                if grad.dim() == 2
                else slab.select_pixels(grad).contiguous()
            )

        return operator(
            images,
            slab.select_pixels(labels),
            slab.select_pixels(lse).contiguous() if lse.numel() > 0 else lse,
            *map(select, grads),
            *_slab_options(slab, options),
            *wanted,
        )

    return _dlogits(logits, depth, options.align_corners, _slabs(depth, logits), slab_gradient)


def _dlogits(
    logits: Tensor,
    depth: int,
    align_corners: bool,
    slabs: Iterator[_Slab],
    slab_gradient: Callable[[_Slab, Tensor], Tensor],
) -> Tensor:
    """The gradient of the volumes. slab_gradient(slab, images): that of the images of a slab."""
    sources = _sources(depth, logits, align_corners)
    dlogits = torch.zeros_like(logits)
    dx: dict[int, Tensor] = {}  # of the slices l and u, to which the next q often adds
    for slab in slabs:
        dz = slab.by_slice(slab_gradient(slab, _images(logits, slab, sources)))
        for q, (lower, upper, weight) in enumerate(sources[slab.slices]):
            for i in [i for i in dx if i < lower]:
                dlogits[slab.volumes, :, i] = dx.pop(i)
            shares = [(lower, 1.0)] if lower == upper else [(lower, 1 - weight), (upper, weight)]
            for i, share in shares:
                dx[i] = dx[i].add_(dz[:, q], alpha=share) if i in dx else dz[:, q] * share
        del dz  # before the next slab
        if slab.slices.stop == depth:
            for i in list(dx):
                dlogits[slab.volumes, :, i] = dx.pop(i)
    return dlogits


def _argmax(backend: str, logits: Tensor, depth: int, *arguments: Any) -> Tensor:
    operator = getattr(torch.ops.anchorops.pixel_argmax, backend)
    classes = argmax_fake(logits, depth, *arguments)
    if classes.numel() == 0:
        return classes
    sources = _sources(depth, logits, align_corners=arguments[2])
    for slab in _slabs(depth, logits):
        part = operator(_images(logits.detach(), slab, sources), *arguments)
        classes[slab.volumes, slab.slices] = slab.by_slice(part)
    return classes


def _divergences(backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    logits, teacher_logits, valid, depth, *options = arguments
    operator = getattr(torch.ops.anchorops.pixel_kl_divergence, backend)
    results = [x.zero_() for x in kl.forward_fake(*arguments)]
    align_corners, total, maps = options[3], results[0].double(), results[1:]
    both = logits, teacher_logits
    if logits.shape[0] * depth * options[0] * options[1] == 0:
        return tuple(results)
    sources = [_sources(depth, x, align_corners) for x in both]
    for slab in _slabs(depth, *both):
        images = (_images(x, slab, at) for x, at in zip(both, sources, strict=True))
        slab_valid = None if valid is None else slab.select_pixels(valid)
        part, *slab_maps = operator(*images, slab_valid, *options)
        total += part
        for target, slab_map in zip(maps, slab_maps, strict=True):
            if slab_map.numel() > 0:
                target[slab.volumes, slab.slices] = slab.by_slice(slab_map)
    return total.to(results[0].dtype), *maps


def _divergences_backward(backend: str, *arguments: Any) -> Tensor:
    logits, teacher_logits, valid, lse, teacher_lse, dtotal, ddivergences, *options = arguments
    operator = getattr(torch.ops.anchorops.pixel_kl_divergence_backward, backend)
    if lse.numel() == 0:
        return torch.zeros_like(logits)
    depth, align_corners = lse.shape[1], options[1]
    sources = _sources(depth, teacher_logits, align_corners)

    def slab_gradient(slab: _Slab, images: Tensor) -> Tensor:
        return operator(
            images,
            _images(teacher_logits, slab, sources),
            None if valid is None else slab.select_pixels(valid),
            slab.select_pixels(lse).contiguous(),
            slab.select_pixels(teacher_lse).contiguous(),
            dtotal,
            None if ddivergences is None else slab.select_pixels(ddivergences).contiguous(),
            *options,
        )

    slabs = _slabs(depth, logits, teacher_logits)
    return _dlogits(logits, depth, align_corners, slabs, slab_gradient)


define(
    "volume_argmax",
    "(Tensor logits, SymInt depth, SymInt height, SymInt width, bool align_corners, "
    "ScalarType dtype) -> Tensor",
    argmax_fake,
    in_python=_argmax,
)
define(
    "volume_kl_divergence",
    kl.SCHEMA.replace("SymInt height", "SymInt depth, SymInt height"),
    kl.forward_fake,
    gradient=kl.GRADIENT._replace(in_python=_divergences_backward),
    in_python=_divergences,
)
define(
    "volume_moments",
    SCHEMA,
    forward_fake,
    gradient=GRADIENT._replace(in_python=_moments_backward),
    in_python=_moments,
)

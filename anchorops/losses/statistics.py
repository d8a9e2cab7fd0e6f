"""Class moments for several methods, in as few passes over the features as possible."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .._moments import ClassMoments
from .._ops.class_moments import unchecked_moments


class Request(NamedTuple):
    """The arguments of `class_moments` for a method."""

    anchors: Tensor | None = None
    with_sums: bool = True
    groups: int = 1
    per_image: bool = False
    seed: Tensor | None = None


def _fold(moments: ClassMoments, made: Request, request: Request) -> ClassMoments:
    """The requested statistics, from those of a pass with finer keys.

    A pixel's group is its rank in its class mod G. If g divides G, its group of g is group mod g.
    These are the same groups as those of a separate pass with the same seed.
    """

    def fold(statistic: Tensor, rest: tuple[int, ...]) -> Tensor:
        axis = statistic.dim() - len(rest) - 1  # of the groups, the last of the key axes
        if made.groups > request.groups:
            shape = (*statistic.shape[:axis], made.groups // request.groups, request.groups)
            statistic = statistic.view(*shape, *rest).sum(axis)
            statistic = statistic if request.groups > 1 else statistic.squeeze(axis)
        return statistic.sum(0) if made.per_image and not request.per_image else statistic

    counts, sums, sqdists = moments
    return ClassMoments(
        fold(counts, ()),
        fold(sums, sums.shape[-1:]) if request.with_sums else sums.new_empty((0,)),
        fold(sqdists, ()) if request.anchors is not None and sqdists is not None else None,
    )


def _passes(requests: Sequence[Request]) -> list[list[int]]:
    """Which requests share a pass. At most one may have anchors. per_image and groups cannot share
    a pass: it would split each image's pixels."""
    passes: list[list[int]] = []
    for i, request in enumerate(requests):
        for members in passes:
            group = [*(requests[j] for j in members), request]
            anchored = sum(r.anchors is not None for r in group)
            mixed = any(r.per_image for r in group) and any(r.groups > 1 for r in group)
            if anchored <= 1 and not mixed:
                members.append(i)
                break
        else:
            passes.append([i])
    return passes


def class_statistics(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    requests: Sequence[Request],
    ignore_index: int,
) -> list[ClassMoments]:
    """The class moments of each request. All random groups are drawn with the first seed."""
    seed = next((request.seed for request in requests if request.seed is not None), None)
    results: dict[int, ClassMoments] = {}
    for members in _passes(requests):
        pass_requests = [requests[i] for i in members]
        groups = math.lcm(*(r.groups for r in pass_requests))
        per_image = any(r.per_image for r in pass_requests)
        moments = unchecked_moments(
            features,
            labels,
            num_classes,
            anchors=next((r.anchors for r in pass_requests if r.anchors is not None), None),
            groups=groups,
            per_image=per_image,
            seed=seed,
            ignore_index=ignore_index,
            with_sums=any(r.with_sums for r in pass_requests),
        )
        made = Request(groups=groups, per_image=per_image)
        results.update((i, _fold(moments, made, requests[i])) for i in members)
    return [results[i] for i in range(len(requests))]

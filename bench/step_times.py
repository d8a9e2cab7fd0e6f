"""The predicted time of a training step of each method: its own launches, forward and backward, as
launches.py finds them on fake tensors, without the layers.

An operator of ATen counts as a launch with almost no work: there are few, on K rows or one number.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import launches
import small_paths
from paths import Row
from row_paths import Operators
from shapes import RESIDUALS, SHAPES, SQDISTS, SUMS, Shape
from softmax_paths import Library
from time_model import COPY_BANDWIDTH, LAUNCH

ITEMSIZE = 2  # bfloat16
Times = list[tuple[str, float]]  # launches, or passes over the features, and their seconds


def shares_of(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """The predicted shares of the copy bandwidth, by kernel and case."""
    return {(row.kernel, row.case): row.estimate.share for row in rows}


class Step:
    """Predicts the launches of operators, at one shape. Features are planes."""

    def __init__(self, library: Library, shares: Mapping[tuple[str, str], float], title: str):
        self.library, self.shares, self.title = library, shares, title
        self.shape: Shape = SHAPES[title]

    def times(self, name: str, args: tuple[Any, ...]) -> Times:
        """args: of the operator."""
        if name.startswith("aten."):
            return [(name, LAUNCH)]
        if found := getattr(self, name, None):
            return found(*args)
        rows = Operators(self.library, self.shape.classes, self.shape.dim)
        getattr(rows, name)(**arguments(name, args))
        return rows.launches.times

    def class_keys(self, labels: Any, height: int, *_: Any) -> Times:
        if labels.shape[1] == height:
            return small_paths.label_keys(self.library, self.shape)
        return small_paths.key_rows(self.library, self.shape, "")[0].kernels

    def group_keys(self, *_: Any) -> Times:
        return small_paths.key_rows(self.library, self.shape, "")[1].kernels

    def upsampled_sums(self, *_: Any) -> Times:
        return small_paths.upsampled_rows(self.library, self.shape, "")[0].kernels

    def upsampled_sums_backward(self, *_: Any) -> Times:
        return small_paths.upsampled_rows(self.library, self.shape, "")[1].kernels

    def class_moments(
        self,
        features: Any,
        keys: Any,
        anchors: Any,
        num_keys: int,
        groups: int,
        with_sums: bool,
        with_residuals: bool,
    ) -> Times:
        """All launches; a share contains only the last one."""
        statistics = SUMS * with_sums | SQDISTS * (anchors is not None)
        statistics |= RESIDUALS * with_residuals
        time = self._pass(f"class_moments_kernel<BFloat16, {statistics}, false, false>", groups)
        return [("class_moments_kernel", time + LAUNCH)]

    def class_moments_backward(
        self,
        features: Any,
        keys: Any,
        anchors: Any,
        dsums: Any,
        dsqdists: Any,
        groups: int,
        *_: Any,
    ) -> Times:
        given = [str(x is not None).lower() for x in (dsums, dsqdists)]
        name = f"class_moments_backward_planes_kernel<BFloat16, {', '.join(given)}, true>"
        passes = 1 + (features is not None)
        return [("class_moments_backward_planes_kernel", passes * self._pass(name, groups))]

    def _pass(self, kernel: str, groups: int) -> float:
        """Seconds of a kernel that reads or writes the features once."""
        title = self.title if groups == 1 else f"{self.title}, {groups} groups"
        moved = ITEMSIZE * self.shape.pixels * self.shape.dim
        return moved / COPY_BANDWIDTH / self.shares[kernel, f"{title}, images"]


def arguments(name: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """Those of Operators, from those of the operator."""
    if name == "unit_rows":
        rows, counts, _, _, centroids = args
        groups = rows.shape[1] if rows.dim() == 3 else 1
        return {"groups": groups, "counts": counts is not None, "centroids": centroids}
    if name == "unit_rows_backward":
        _, dmeans, units, _, counts, _ = args
        groups = units.shape[1] if units.dim() == 3 else 1
        return {"groups": groups, "counts": counts is not None, "means": dmeans is not None}
    if name == "prototype_halves":
        return {"groups": args[0].shape[0]}
    if name == "prototype_halves_backward":
        return {"groups": args[3].shape[0]}
    if name == "anchor_losses":
        return {"of_anchors": args[3] is not None}
    if name == "anchor_losses_backward":
        return {"of_anchors": args[2].shape[0] == 2}
    if name == "centroid_losses":
        return {"groups": args[0].shape[1], "mirrored": args[7]}
    if name == "centroid_losses_backward":
        return {"groups": args[1].shape[1], "mirrored": args[11]}
    return {}


def print_times(library: Library, rows: Iterable[Row]) -> None:
    """Prints a table of microseconds. rows: those of paths.py."""
    shares = shares_of(rows)
    steps = [Step(library, shares, title) for title in SHAPES]
    print("\nA method's whole step, without layers, bf16: predicted µs, not measured\n")
    print("| method | launches |", " | ".join(SHAPES), "|\n|---|---|" + "---|" * len(SHAPES))
    for method, build in launches.METHODS.items():
        totals = [0.0] * len(steps)
        columns = [
            [step.times(*call) for call in launches.count(build, step.shape, "cuda").calls]
            for step in steps
        ]
        for calls in zip(*columns, strict=True):
            for parts in zip(*calls, strict=True):
                (name, _), times = parts[0], [time for _, time in parts]
                totals = [a + b for a, b in zip(totals, times, strict=True)]
                cells = [f"{1e6 * time:.1f}" for time in times]
                print("|", " | ".join([method, name.partition("<")[0], *cells]), "|")
        cells = [f"**{1e6 * total:.0f}**" for total in totals]
        print("|", " | ".join([method, "**all**", *cells]), "|", flush=True)

"""The least time of our large passes on a GPU, from what they must move and issue: a roofline.

    python bench/time_model.py

A pass takes at least as long as its bytes at the copy bandwidth, and as long as its instructions
at one for each scheduler and cycle; a launch is added for each kernel. Nothing here is measured on
a GPU, and the model knows neither latencies nor caches: bench/gpu_kernels.py prints measured times
as shares of these. There are three paths: class moments forward, class moments backward, softmax
moments (cross-entropy forward and backward).
"""

from typing import NamedTuple

import bench_pixel_losses
import cases
import torch
from markdown_table import markdown_table
from torch import Tensor

from anchorops.measure import moments_bytes

LAUNCH = 3e-6  # seconds from the end of a kernel to the start of the next; assumed
# Instructions of a warp for each class of 32 cells of 4×4 labels, as `make cuda-report` counts them
# in the loops over classes, with those that copy the logits to shared memory and store the result.
CELL_LABELS, FORWARD_INSTRUCTIONS, BACKWARD_INSTRUCTIONS = 16, 67, 125


class GPU(NamedTuple):
    """copy_bandwidth: bytes a second, read and written together."""

    name: str
    copy_bandwidth: float
    multiprocessors: int
    clock: float

    @property
    def instructions(self) -> float:
        """A second, of warps: four schedulers on each multiprocessor."""
        return 4 * self.multiprocessors * self.clock


H100, H200 = GPU("H100", 3.0e12, 132, 1.75e9), GPU("H200", 4.3e12, 132, 1.75e9)


class Pass(NamedTuple):
    """instructions: of warps, in the hot loops alone."""

    bytes: int
    launches: int
    instructions: float = 0

    def limits(self, gpu: GPU) -> dict[str, float]:
        """Seconds, by what they are needed for."""
        bytes_moved, issued = self.bytes / gpu.copy_bandwidth, self.instructions / gpu.instructions
        return {"bytes": bytes_moved, "instructions": issued}

    def seconds(self, gpu: GPU) -> float:
        return max(self.limits(gpu).values()) + self.launches * LAUNCH


def class_moments(features: Tensor, num_keys: int, direction: str) -> Pass:
    """With squared distances. Forward there are two launches: the pass over the features, and the
    sum of its partials."""
    counted = moments_bytes(features, num_keys, direction, sqdists=True)
    return Pass(counted, 2 if direction == "forward" else 1)


def softmax_moments(logits: Tensor, labels: Tensor, direction: str) -> Pass:
    """Of the cross-entropy. Each direction first computes the shifts of the logits; forward there
    are lse and losses, and the sum of the partials, backward the gradient."""
    forward, both = (
        bench_pixel_losses.counted_bytes(logits, labels, x)
        for x in (bench_pixel_losses.FORWARD, bench_pixel_losses.TRAINING)
    )
    warps = logits.shape[1] * labels.numel() / CELL_LABELS / 32
    if direction == bench_pixel_losses.FORWARD:
        return Pass(forward, 3, warps * FORWARD_INSTRUCTIONS)
    return Pass(both - forward, 2, warps * BACKWARD_INSTRUCTIONS)


def passes() -> dict[str, Pass]:
    """The three paths at the shapes of the benchmarks, in bfloat16."""
    passes_by_name: dict[str, Pass] = {}
    for shape in (cases.HRNET, cases.SEGFORMER):
        features = torch.empty(shape.size, dtype=torch.bfloat16, device="meta")
        for direction in ("forward", "backward"):
            name = f"class_moments, {direction}: {shape.name}"
            passes_by_name[name] = class_moments(features, shape.num_classes, direction)
    for shape in (bench_pixel_losses.HRNET, bench_pixel_losses.SEGFORMER):
        logits = torch.empty(shape.size, dtype=torch.bfloat16, device="meta")
        labels = torch.empty(shape.size[:1] + shape.label_size, dtype=torch.int64, device="meta")
        for direction in ("forward", "backward"):
            name = f"softmax_moments, {direction}: {shape.name}"
            passes_by_name[name] = softmax_moments(logits, labels, direction)
    return passes_by_name


def main() -> None:
    gpus = H100, H200
    print("At least, in µs, computed and not measured:\n")
    rows = []
    for name, path in passes().items():
        cells = [name, f"{path.bytes / 1e6:.0f}", str(path.launches)]
        for gpu in gpus:
            limits = path.limits(gpu)
            cells += [f"{1e6 * path.seconds(gpu):.0f}", max(limits, key=lambda x: limits[x])]
        rows.append(cells)
    header = ["pass", "MB", "launches", *(x for gpu in gpus for x in (gpu.name, "limit"))]
    print(markdown_table(header, rows, words=(0, 4, 6)))


if __name__ == "__main__":
    main()

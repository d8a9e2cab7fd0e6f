"""Global memory that each kernel moves at a small shape, counted by the machine for sm_80:

    PYTHONPATH=tests/proofs:bench python -m ptx.traffic [--out bench/results/counted-traffic.json]

It prints the table of the rows. Without --out they are compared with those of the file,
if it was written with this torch, and the exit status is 1 if they differ. Where the CUDA sources
cannot be compiled, their rows are left out."""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cuda_launches, machine, triton_launches
from .machine import Traffic

triton_launches.install(80)  # before anchorops is imported
cuda_launches.install(80)

from cost_tables import COUNTED_TRAFFIC, traffic_table  # noqa: E402
from record import save_counts  # noqa: E402

import anchorops as ao  # noqa: E402
from anchorops._ops.upsampled_sums import upsampled_sums  # noqa: E402

K, D, LOW, HIGH = 19, 64, (32, 32), (128, 128)
SECTOR = 32  # bytes
operands: Counter[str] = Counter()  # bytes of all tensors that launches are given, by kernel


def run(launch: machine.Launch, *options: Any) -> int:
    """Instead of machine.run."""
    operands[launch.program.kernel.name] += sum(x.end - x.begin for x in launch.regions)
    return machine.run(launch, *options)


def labels(num_classes: int = K) -> Tensor:
    """Squares of one class, 16 × 16 pixels; a tenth of them is ignored."""
    small = torch.randint(0, num_classes, (2, *(n // 16 for n in HIGH)))
    small[torch.rand(small.shape) < 0.1] = 255
    return small.repeat_interleave(16, 1).repeat_interleave(16, 2)


def features(
    dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format
) -> Tensor:
    return torch.randn(2, D, *LOW).to(dtype).contiguous(memory_format=layout).requires_grad_()


def class_moments(x: Tensor, num_classes: int = K, **options: Any) -> None:
    anchors, y = torch.randn(num_classes, D), labels(min(num_classes, 255))
    options |= {"anchors": anchors, "ignore_index": 255}
    _, sums, sqdists = ao.ops.class_moments(x, y, num_classes, **options)
    assert sqdists is not None
    (sums.sum() + sqdists.sum()).backward()


def pixel_loss(loss: Callable[..., Tensor]) -> None:
    loss(torch.randn(2, K, *LOW, requires_grad=True), labels()).backward()


def divergence() -> None:
    student, teacher = torch.randn(2, 2, K, *LOW)
    ao.pixel_kl_divergence(student.requires_grad_(), teacher, HIGH).backward()


def info_nce() -> None:
    queries, keys = torch.randn(2, K, D)
    ao.ops.centroid_info_nce(queries.requires_grad_(), keys).backward()


def sums_of_upsampled() -> None:
    options = {"per_image": True, "upsample": True, "ignore_index": 255}
    sums = upsampled_sums(features(), labels(), K, **options).sums
    sums.sum().backward()


CASES: dict[str, Callable[[], object]] = {
    "class moments": lambda: class_moments(features()),
    "bfloat16, channels last": lambda: class_moments(features(torch.bfloat16, torch.channels_last)),
    "2 groups": lambda: class_moments(features(), groups=2, seed=1),
    "16,000 classes": lambda: class_moments(features(), 16_000),
    "InfoNCE": info_nce,
    "CeCo's sums": sums_of_upsampled,
    "cross-entropy": lambda: pixel_loss(partial(ao.pixel_cross_entropy, ignore_index=255)),
    "cross-entropy + Dice": lambda: pixel_loss(ao.CrossEntropyDice(ignore_index=255)),
    "Lovász": lambda: pixel_loss(ao.Lovasz(ignore_index=255)),
    "divergence": divergence,
    "predictions": lambda: ao.pixel_confusion(torch.randn(2, K, *LOW), labels()),
}


WITH_CUDA = ("class moments", "bfloat16, channels last", "2 groups")


def rows_of(case: str, backend: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    operands.clear()
    triton_launches.traffic = {}
    with ao.use_backend(backend):
        CASES[case]()
    rows = []
    for kernel, counted in triton_launches.traffic.items():
        row: dict[str, Any] = {"backend": backend, "case": case}
        row |= {"kernel": kernel.partition("<")[0], "operands": operands[kernel]}
        for what, traffic in counted.items():
            row[what] = {"asked": traffic.asked, "sectors": SECTOR * traffic.sectors}
        row["moved"] = SECTOR * Traffic.moved(*counted.values())
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    arguments = parser.parse_args()
    obstacle = cuda_launches.obstacle()
    if arguments.out and obstacle is not None:
        parser.error(f"--out: {obstacle}")
    torch.set_num_threads(1)
    triton_launches.run = cuda_launches.run = run
    rows = [row for case in CASES for row in rows_of(case, "triton")]
    if obstacle is None:
        rows += [row for case in WITH_CUDA for row in rows_of(case, "cuda")]
    else:
        print(obstacle)
    print(traffic_table(rows))
    if arguments.out:
        save_counts(arguments.out, rows)
        return 0
    committed = json.loads(COUNTED_TRAFFIC.read_text())
    counted = {row["backend"] for row in rows}
    expected = [row for row in committed["rows"] if row["backend"] in counted]
    if committed["torch"] == torch.__version__ and expected != rows:
        print(f"These are not the rows of {COUNTED_TRAFFIC}: write them with --out.")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

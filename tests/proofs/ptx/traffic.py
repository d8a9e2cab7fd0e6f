"""Global memory that each kernel moves at a small shape, counted by the machine for sm_80:

    PYTHONPATH=tests/proofs:bench python -m ptx.traffic [--out bench/results/counted-traffic.json]

It prints the table of the rows. Without --out they are compared with those of the file,
if it was written with this torch, and the exit status is 1 if they differ. Where the CUDA sources
cannot be compiled, their rows are left out."""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from . import cuda_launches, machine, triton_launches
from .machine import Traffic

triton_launches.install(80)  # before anchorops is imported
cuda_launches.install()

from record import ROOT, markdown_table, save_counts  # noqa: E402

import anchorops as ao  # noqa: E402
from anchorops.doctor.catalogue import ENTRIES, Case, Sample  # noqa: E402
from anchorops.doctor.catalogue.entry import evaluate  # noqa: E402
from anchorops.doctor.catalogue.features import Features  # noqa: E402
from anchorops.doctor.catalogue.masks import objects  # noqa: E402
from anchorops.doctor.catalogue.pixels import Pixels  # noqa: E402

ROWS_OF_TRAFFIC = ROOT / "bench/results/counted-traffic.json"
REQUESTS = ("loads", "stores", "atomics")
K, SECTOR = 19, 32  # classes, bytes
operands: Counter[str] = Counter()  # bytes of all tensors that launches are given, by kernel
FEATURES = Features(K, (2, 64, 32, 32), ratio=4)
LOGITS = Pixels(K, (32, 32), (128, 128))
ROWS = FEATURES._replace(dtype=torch.bfloat16, layout="channels last")


def run(launch: machine.Launch, *options: Any) -> None:
    """Instead of machine.run."""
    operands[launch.program.kernel.name] += sum(x.end - x.begin for x in launch.regions)
    machine.run(launch, *options)


def case(name: str, entry: str, make: Any, **options: Any) -> Case:
    return Case(ENTRIES[entry], Sample(name, make, options))


MANY = FEATURES._replace(num_classes=16_000)
MANY_CLASSES = case("16,000 classes", "class_moments", MANY, num_classes=16_000)
CASES = [
    case("class moments", "class_moments", FEATURES, num_classes=K),
    case("bfloat16, channels last", "class_moments", ROWS, num_classes=K),
    case("2 groups", "class_moments of groups", FEATURES, num_classes=K, groups=2, seed=1),
    MANY_CLASSES,
    case("CeCo's sums", "upsampled_sums", FEATURES._replace(anchors=False), num_classes=K),
    case("cross-entropy", "pixel_cross_entropy", LOGITS),
    case("cross-entropy + Dice", "CrossEntropyDice", LOGITS),
    case("Lovász", "Lovasz", LOGITS),
    case("divergence", "pixel_kl_divergence", LOGITS._replace(teacher=())),
    case("predictions", "pixel_confusion", LOGITS),
    case("masks", "mask_rle", objects, ratios=(5, 5)),
]


def rows_of(case: Case, backend: str) -> list[dict[str, Any]]:
    """Forward and backward."""
    operands.clear()
    triton_launches.traffic = {}
    with ao.use_backend(backend):
        evaluate(case.ours, case.sample.inputs())
    rows = []
    for kernel, counted in triton_launches.traffic.items():
        row: dict[str, Any] = {"backend": backend, "case": str(case)}
        row |= {"kernel": kernel.partition("<")[0], "operands": operands[kernel]}
        for what, traffic in counted.items():
            row[what] = {"asked": traffic.asked, "sectors": SECTOR * traffic.sectors}
        row["moved"] = SECTOR * Traffic.moved(*counted.values())
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """KB of each kernel: of its operands; of the different sectors that it moves; of the sectors of
    all requests, and which part of them the lanes asked for."""
    lines = []
    for row in rows:
        found = [row.get(what) for what in REQUESTS]
        requests = [
            f"{x['sectors'] / 1000:,.0f} ({x['asked'] / x['sectors']:.2f})" if x else ""
            for x in found
        ]
        sizes = [f"{row[name] / 1000:,.0f}" for name in ("operands", "moved")]
        lines.append([row["backend"], row["case"], row["kernel"], *sizes, *requests])
    header = ["backend", "operation", "kernel", "operands, KB", "moved, KB", *REQUESTS]
    return markdown_table(header, lines, words=(0, 1, 2))


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
        with_cuda = [x for x in CASES if "cuda" in x.entry.backends and x is not MANY_CLASSES]
        rows += [row for case in with_cuda for row in rows_of(case, "cuda")]
    else:
        print(obstacle)
    print(table(rows))
    if arguments.out:
        save_counts(arguments.out, rows)
        return 0
    committed = json.loads(ROWS_OF_TRAFFIC.read_text())
    counted = {row["backend"] for row in rows}
    expected = [row for row in committed["rows"] if row["backend"] in counted]
    if committed["torch"] == torch.__version__ and expected != rows:
        print(f"These are not the rows of {ROWS_OF_TRAFFIC}: write them with --out.")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

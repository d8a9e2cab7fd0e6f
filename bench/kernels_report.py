"""A report of the machine code of the Triton kernels, without a GPU: `make kernels-report`.

Entries of the catalogue are called with tensors of the CPU and a driver that names a GPU; Triton
then compiles what it would launch there, and the table is read off the machine code. Its columns:
- stack: bytes of a thread for spilled registers, on AMD GPUs its scratch memory;
- shared: bytes of a program;
- warps: how many of a multiprocessor the registers allow;
- loops: of each innermost loop that loads from memory, in the order of the code: instructions,
  exponentials and logarithms, loads, and the fewest instructions from a load to its first use;
- seconds: the processor's time for compiling it, ptxas included. On a GPU about half a second of
  gcc is added for the launcher.
The report fails on spills, and if users would wait too long for the first step of a loss: SECONDS
for the kernels of one variant, OF_CROSS_ENTROPY for those of plain cross-entropy.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat
from multiprocessing import get_context

import triton
from record import markdown_table
from without_gpu.machine_code import TARGETS, Row, compiled, measure, variants
from without_gpu.variants import jobs, launch, launch_loss, native_sizes

SECONDS, OF_CROSS_ENTROPY = 12, 4.5
# Of an older Triton: its default is 48 registers there; and what only steep logits load again.
KNOWN_SPILLS = {
    ("3.6.0", "sm_100", "_class_moments_bwd_kernel"): 8,
    ("3.6.0", "sm_80", "_softmax_moments_bwd_kernel"): 8,
    # with all options of the loss, once a program, outside of its loops
    ("3.8.0", "sm_120", "_softmax_moments_bwd_kernel"): 24,
}


def rows_of(name: str, quick: bool) -> list[tuple[str, str, Row]]:
    """Kernel, variant and what was measured, for that GPU; each machine code once."""
    rows = {}
    for case in jobs(quick and name != "sm_90"):
        for key, (kernel, seconds) in compiled(name, partial(launch, case)).items():
            if key not in rows:
                rows[key] = kernel.metadata.name, str(case), measure(kernel, seconds)
    return list(rows.values())


def seconds_of(name: str, variant: str) -> float:
    """For compiling a variant's kernels again."""
    case = next(case for case in jobs(False) if str(case) == variant)
    return sum(seconds for _, seconds in compiled(name, partial(launch, case)).values())


def faults_of(name: str, rows: list[tuple[str, str, Row]], pool: ProcessPoolExecutor) -> list[str]:
    """pool: of processes that have nothing else to do."""
    faults = [
        f"{name} {kernel}: {row.stack} B of spills"
        for kernel, _, row in rows
        if row.stack > KNOWN_SPILLS.get((triton.__version__, name, kernel), 0)
    ]
    waits: dict[str, float] = {}
    for _, variant, row in rows:
        waits[variant] = waits.get(variant, 0) + row.seconds
    for variant, seconds in waits.items():
        most = OF_CROSS_ENTROPY if variant.endswith(", cross-entropy") else SECONDS
        if seconds > most and (seconds := pool.submit(seconds_of, name, variant).result()) > most:
            faults.append(f"{name} {variant}: {seconds:.1f} s to compile, more than {most}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--quick", action="store_true", help="a choice of the variants, except for sm_90"
    )
    args = parser.parse_args()
    print(f"Triton {triton.__version__}")
    os.environ["ANCHOROPS_TRITON_ON_HOST"] = "1"  # which anchorops asks when it is imported
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = [
            *zip(args.targets, pool.map(rows_of, args.targets, repeat(args.quick)), strict=True)
        ]
        faults = [fault for name, rows in found for fault in faults_of(name, rows, pool)]
    lines = [
        (name, kernel, variant, *row._replace(seconds=round(row.seconds, 1)))
        for name, rows in found
        for kernel, variant, row in rows
    ]
    print(markdown_table(("GPU", "kernel", "variant", *Row._fields), lines, words=(0, 1, 2)))
    for stride in (4, 8):
        counts = variants("sm_90", native_sizes(stride, launch_loss, False))
        print(f"variants for 40 sizes, logits of stride {stride}: {counts}")
    if faults:
        sys.exit("kernels_report:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()

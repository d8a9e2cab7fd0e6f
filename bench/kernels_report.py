"""A report of the machine code of the Triton kernels, without a GPU: `make kernels-report`.

Entries of the catalogue are called with tensors of the CPU and a driver that names a GPU; Triton
then compiles what it would launch there, and the table is read off the machine code. Its columns:
- stack: bytes of a thread for spilled registers, on AMD GPUs its scratch memory;
- shared: bytes of a program;
- warps: how many of a multiprocessor the registers allow;
- loops: of each innermost loop that loads from memory, in the order of the code: instructions,
  exponentials and logarithms, loads, and the fewest instructions from a load to its first use
  (not with --quick);
- instructions: of the whole kernel, for NVIDIA's GPUs;
- seconds: the processor's time for compiling it, ptxas included. On a GPU about half a second of
  gcc is added for the launcher.
The report fails on spills, on more shared memory than the GPU has, and if a kernel has more than
INSTRUCTIONS, one of plain cross-entropy more than OF_CROSS_ENTROPY: users wait for it to be
compiled.
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

INSTRUCTIONS, OF_CROSS_ENTROPY = 7000, 4200
# sm_86 and sm_89 have sm_80's instructions and registers, and as much shared memory as sm_120
QUICK = [name for name in TARGETS if name not in ("sm_86", "sm_89")]
# Of an older Triton: its default is 48 registers there; and what only steep logits load again.
KNOWN_SPILLS = {
    ("3.6.0", "sm_100", "_class_moments_bwd_kernel"): 8,
    ("3.6.0", "sm_80", "_softmax_moments_bwd_kernel"): 8,
}


def rows_of(name: str, quick: bool) -> list[tuple[str, str, Row]]:
    """Kernel, variant and what was measured, for that GPU; each machine code once."""
    rows = {}
    for case in jobs(quick):
        for key, (kernel, seconds) in compiled(name, partial(launch, case)).items():
            if key not in rows:
                rows[key] = kernel.metadata.name, str(case), measure(kernel, seconds, not quick)
    return list(rows.values())


def faults_of(name: str, kernel: str, variant: str, row: Row) -> list[str]:
    faults = []
    if row.stack > KNOWN_SPILLS.get((triton.__version__, name, kernel), 0):
        faults.append(f"{name} {kernel}: {row.stack} B of spills")
    most = OF_CROSS_ENTROPY if variant.endswith(", cross-entropy") else INSTRUCTIONS
    if row.instructions > most:
        faults.append(
            f"{name} {kernel}, {variant}: {row.instructions} instructions, more than {most}"
        )
    shared = 64 << 10 if name in ("sm_75", "gfx942") else 99 << 10  # that every such GPU has
    if row.shared > shared:
        faults.append(f"{name} {kernel}, {variant}: {row.shared} B of shared memory")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="*", choices=TARGETS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a choice of the targets and of the variants, without the loops",
    )
    args = parser.parse_args()
    targets = args.targets or (QUICK if args.quick else TARGETS)
    print(f"Triton {triton.__version__}")
    os.environ["ANCHOROPS_TRITON_ON_HOST"] = "1"  # which anchorops asks when it is imported
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = [*zip(targets, pool.map(rows_of, targets, repeat(args.quick)), strict=True)]
    faults = [fault for name, rows in found for row in rows for fault in faults_of(name, *row)]
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

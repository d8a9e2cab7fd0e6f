"""The checks of `anchorops-doctor --verify --all`, with Triton's or CUDA's PTX in the machine, at
the sizes of a GPU:

    PYTHONPATH=tests/proofs python -m ptx.verify 80 [--backend=cuda] [--only=TEXT] [--part=0/2]

The last lines name source lines of kernels that were compiled, and that nothing has run."""

import argparse
from collections import Counter
from collections.abc import Iterator

from . import triton_launches


def uncovered() -> Iterator[str]:
    """kernel file:line, of which no variant of the kernel has run any instruction."""
    ran: dict[str, set[str]] = {}
    compiled: dict[str, set[str]] = {}
    for program in triton_launches.programs.values():
        name = program.kernel.name
        for block, hits in zip(program.kernel.blocks, program.hits, strict=True):
            lines = {i.source for i in block.instructions if i.source}
            compiled.setdefault(name, set()).update(lines)
            ran.setdefault(name, set()).update(lines if hits else ())
    for name, lines in sorted(compiled.items()):
        yield from (f"{name} {line}" for line in sorted(lines - ran[name]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("arch", type=int)
    parser.add_argument("--backend", default="triton", choices=["triton", "cuda"])
    parser.add_argument("--only", default="", help="checks whose names contain this")
    parser.add_argument("--part", default="0/1", help="the checks i, i + n, … for i/n")
    options = parser.parse_args()
    if options.backend == "cuda":
        from . import cuda_launches

        cuda_launches.install(options.arch)
    else:
        triton_launches.install(options.arch)
    import torch

    from anchorops import _backend

    _backend.TRITON_INTERPRETED = False  # images as large as on a GPU, and bfloat16
    from anchorops import verify

    # tensors of the CPU
    if options.backend == "triton":
        _backend.TRITON_INTERPRETED = verify.TRITON_INTERPRETED = True  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    part, parts = map(int, options.part.split("/"))
    results: Counter[bool | None] = Counter()
    for check in verify.checks()[part::parts]:
        if options.only in check.name:
            row = verify.run(check, options.backend, torch.device("cpu"))
            print(row, f"{row.seconds:.0f} s", flush=True)
            results[row.right if row.right is not None or not row.note else False] += 1
    launches = sum(triton_launches.launches.values())
    executed = sum(triton_launches.instructions.values())
    print(
        f"sm_{options.arch}: {results[True]} right, {results[False]} WRONG, "
        f"{results[None]} not served; {launches} launches of {len(triton_launches.programs)} "
        f"variants, {executed:.3g} instructions of warps"
    )
    print(*(f"not run: {line}" for line in uncovered()), sep="\n")
    if options.backend == "triton":  # it serves everything
        results[False] += results[None]
    return int(results[True] == 0 or results[False] > 0)


if __name__ == "__main__":
    raise SystemExit(main())

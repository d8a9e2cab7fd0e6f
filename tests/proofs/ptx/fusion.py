"""The instructions that warps execute in the kernels compiled with enable_fp_fusion=False, and with
fused multiply-adds, where lanes may store unequal copies of a sum:

    PYTHONPATH=tests/proofs python -m ptx.fusion 80
"""

import sys
from typing import Any

from triton.runtime.jit import JITFunction

from . import triton_launches
from .memory import Fault, Region

# how the names of the checks begin that launch kernels compiled without them
CHECKS = ("sums, distances, ", "InfoNCE, rows")


def main() -> None:
    triton_launches.install(int(sys.argv[1]))
    import torch

    from anchorops.verify import run as verify

    compile_, store = JITFunction.run, Region.store
    unfused: set[str] = set()
    options_of_all = {"enable_fp_fusion": False}

    def compile_as_chosen(kernel: Any, *args: Any, **options: Any) -> Any:
        if not options["enable_fp_fusion"]:
            unfused.add(kernel.__name__)
        return compile_(kernel, *args, **options | options_of_all)

    def store_unequal_copies(region: Region, *args: Any) -> None:
        try:
            store(region, *args)
        except Fault as fault:
            if fault.what != "unequal copies":
                raise

    JITFunction.run, Region.store = compile_as_chosen, store_unequal_copies  # type: ignore
    print(f"sm_{sys.argv[1]}: instructions of warps without and with fused multiply-adds")
    for check in verify.checks():
        if not check.name.startswith(CHECKS):
            continue
        counts = []
        for options_of_all["enable_fp_fusion"] in (False, True):
            triton_launches.instructions.clear()
            verify.run(check, "triton", torch.device("cpu"))
            counts.append(dict(triton_launches.instructions))
        for name in sorted(unfused & counts[0].keys()):
            one, other = (count[name] for count in counts)
            print(f"{check.name:<48}{name:<32}{one:>9}{other:>9} {one / other - 1:+.1%}")


if __name__ == "__main__":
    main()

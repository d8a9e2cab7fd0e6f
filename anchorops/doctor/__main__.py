"""anchorops-doctor shows which backends are usable here, and why others are not.

`anchorops-doctor --verify` also checks values and gradients of the operators on each usable
backend, within two minutes on a CPU. `anchorops-doctor --benchmark` also times losses on each
backend, beside torch's own formulas; it takes a minute on a CPU.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import __version__
from .._backend import NAMES, backends
from .._libraries import CPU_LIBRARY, build_info, unusable
from ..measure import environment
from .benchmark import benchmark
from .verify import report


def _tool(command: list[str], line: int) -> str:
    """One line of the output of a tool's --version."""
    path = shutil.which(command[0])
    if path is None:
        return f"not found ({command[0]})"
    answer = subprocess.run([*command, "--version"], capture_output=True, text=True)
    lines = (answer.stdout + answer.stderr).strip().splitlines() or ["no output"]
    return f"{lines[min(line, len(lines) - 1)]} ({path})"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "torch sees none"
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return ", ".join(
        f"{gpu.name} ({gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus
    )


def _extension() -> list[str]:
    if reason := unusable()["cpu"]:
        return [f"not loaded: {reason}"]
    info = build_info()
    cuda = f"CUDA {info['cuda']} for {info['cuda_arch_list']}" if info["cuda"] else "no CUDA"
    compiler = f"{info['compiler']}, C++{info['cxx_standard'][2:4]}"
    return [
        str(CPU_LIBRARY),
        f"version {info['version']} for torch {info['torch_target']} and later, {cuda}",
        f"compiled by {compiler}, with torch {info['torch']}",
    ]


def _machine() -> dict[str, list[str]]:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return {
        "anchorops": [f"{__version__} ({Path(__file__).parents[1]})"],
        "extension": _extension(),
        "Python": [f"{platform.python_version()} ({sys.executable})"],
        "torch": [f"{torch.__version__}, {cuda}"],
        "triton": [str(environment(torch.device("cpu"))["triton"])],
        "GPU": [_gpus()],
        "compiler": [_tool(shlex.split(compiler), 0)],
        "nvcc": [_tool([nvcc], 3)],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="anchorops-doctor", description=__doc__)
    parser.add_argument("--benchmark", action="store_true", help="time losses and torch's formulas")
    parser.add_argument("--verify", action="store_true", help="check values and gradients")
    parser.add_argument("--all", action="store_true", help="--verify: all checks of Triton, too")
    parser.add_argument("--backend", choices=NAMES, help="--verify: only this backend")
    parser.add_argument("--json", type=Path, metavar="FILE", help="--verify: write the rows to it")
    options = parser.parse_args(arguments)
    if not options.verify and (options.all or options.backend or options.json):
        parser.error("--all, --backend and --json belong to --verify")
    for name, lines in _machine().items():
        for i, line in enumerate(lines):
            print(f"{'' if i else name:<11}{line}")
    print(f"\n{'backend':<11}usable")
    reasons, shown = unusable(), backends()
    for name, reason in reasons.items():
        print(f"{name:<11}{f'no: {reason}' if reason else shown[name] or 'yes'}")
    right = True
    if options.verify:
        right = report(options.backend, options.all, options.json)
    if options.benchmark:
        right = benchmark() and right
    fused = any(not why for name, why in reasons.items() if name != "reference")
    return 0 if fused and right else 1


if __name__ == "__main__":
    sys.exit(main())

"""anchorops-doctor: what anchorops can use on this machine, why not the rest, and how to get it."""

import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from ._backend import backends

REMEDIES = {
    "cuda": "an NVIDIA GPU, a CUDA build of torch, nvcc of the same CUDA major version; then "
    "reinstall with ANCHOROPS_CUDA=1",
    "triton": "a GPU, and triton, which the GPU builds of torch for Linux bring along",
    "cpu": "a C++20 compiler and Python's headers (Debian, Ubuntu: apt install g++ python3-dev); "
    "then reinstall",
}


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _tool(command: list[str], line: int) -> str:
    """One line of what a tool says of its version."""
    path = shutil.which(command[0])
    if path is None:
        return f"not found ({command[0]})"
    answer = subprocess.run([*command, "--version"], capture_output=True, text=True)
    lines = (answer.stdout + answer.stderr).strip().splitlines() or ["says nothing"]
    return f"{lines[min(line, len(lines) - 1)]} ({path})"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "torch sees none"
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return ", ".join(
        f"{gpu.name} ({gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus
    )


def _extension() -> list[str]:
    try:
        extension = importlib.import_module("anchorops._C")
    except ImportError as error:
        return [f"not loaded: {error}"]
    info = extension.build_info()
    cuda = f"CUDA {info['cuda']} for {info['cuda_arch_list']}" if info["cuda"] else "no CUDA"
    compiler = f"{info['compiler']}, C++{info['cxx_standard'] // 100 % 100}"
    return [
        str(extension.__file__),
        f"version {info['version']} for torch {info['torch_target']} and later, {cuda}",
        f"compiled by {compiler}, with torch {info['torch']}",
    ]


def _machine() -> dict[str, list[str]]:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return {
        "anchorops": [f"{_package('anchorops')} ({os.path.dirname(__file__)})"],
        "extension": _extension(),
        "Python": [f"{platform.python_version()} ({sys.executable})"],
        "torch": [f"{torch.__version__}, {cuda}"],
        "triton": [_package("triton")],
        "GPU": [_gpus()],
        "compiler": [_tool(shlex.split(compiler), 0)],
        "nvcc": [_tool([nvcc], 3)],
    }


def main() -> int:
    for name, lines in _machine().items():
        for i, line in enumerate(lines):
            print(f"{'' if i else name:<11}{line}")
    print(f"\n{'backend':<11}usable")
    reasons = backends()
    for name, reason in reasons.items():
        print(f"{name:<11}{f'no: {reason}' if reason else 'yes'}")
        if reason:
            print(f"{'':<11}needs {REMEDIES[name]}")
    return 0 if any(not why for name, why in reasons.items() if name != "reference") else 1


if __name__ == "__main__":
    sys.exit(main())

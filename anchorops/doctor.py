"""anchorops-doctor shows which backends are usable here, why others are not, and what they need.

`anchorops-doctor --verify` also checks values and gradients of every operator and loss on each
usable backend, within two minutes. `anchorops-doctor --benchmark` checks and times a few calls on
each backend, within a minute.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import __version__
from ._backend import (
    CPU_LIBRARY,
    NAMES,
    OLDEST_GPU,
    TRITON_INTERPRETED,
    backends,
    build_info,
    triton_obstacle,
    use_backend,
)
from ._ops.centroid_info_nce import centroid_info_nce
from ._ops.class_moments import class_moments, pixel_to_anchor_mse
from ._verdicts import ON_GPU, VERIFY, device_name, verified, wrong
from .measure import DISTURBED, bandwidth, environment, example_labels, measure, moments_bytes
from .verify import device_of, verify


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


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


def _remedy(backend: str) -> str:
    """What an unusable backend needs on this machine."""
    if backend == "cpu":
        return "a C++20 compiler (Debian, Ubuntu: apt install g++); then reinstall"
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    new = any(torch.cuda.get_device_properties(i).major >= OLDEST_GPU for i in gpus)
    needs = [] if new else [f"a GPU of compute capability {OLDEST_GPU}.0 or later"]
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            needs.append("triton, which the GPU builds of torch for Linux include")
        elif triton_obstacle():
            packages = "Debian, Ubuntu: apt install gcc python3-dev"
            needs.append(f"a C compiler and the headers of Python ({packages})")
        return ", ".join(needs)
    if torch.version.cuda is None:
        needs.append("a CUDA build of torch")
    if not build_info().get("cuda"):
        if shutil.which(_nvcc()) is None:
            needs.append("nvcc of the CUDA major version of torch")
        needs.append("a reinstallation with ANCHOROPS_CUDA=1")
    return ", ".join(needs) or "a reinstallation on this machine"


def _extension() -> list[str]:
    if reason := backends()["cpu"]:
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
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return {
        "anchorops": [f"{__version__} ({os.path.dirname(__file__)})"],
        "extension": _extension(),
        "Python": [f"{platform.python_version()} ({sys.executable})"],
        "torch": [f"{torch.__version__}, {cuda}"],
        "triton": [str(environment(torch.device("cpu"))["triton"])],
        "GPU": [_gpus()],
        "compiler": [_tool(shlex.split(compiler), 0)],
        "nvcc": [_tool([_nvcc()], 3)],
    }


CPU_SIZE, GPU_SIZE = (1, 256, 128, 256), (4, 512, 128, 256)
Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]  # of features, labels, anchors


def _moments(features: Tensor, labels: Tensor, anchors: Tensor) -> tuple[Tensor, ...]:
    _, sums, sqdists = class_moments(
        features, labels, len(anchors), anchors=anchors, ignore_index=-1
    )
    assert sqdists is not None
    return sums, sqdists


def _gradient(features: Tensor, labels: Tensor, anchors: Tensor) -> tuple[Tensor, ...]:
    features = features.detach().requires_grad_()
    outputs = _moments(features, labels, anchors)
    return torch.autograd.grad(outputs, features, [torch.ones_like(x) for x in outputs])


CALLS: dict[str, Call] = {
    "class moments": lambda f, y, a: class_moments(f, y, len(a), ignore_index=-1)[1:2],
    "with anchors": _moments,
    "with anchors, training": _gradient,
    "pixel-to-anchor MSE": lambda f, y, a: (pixel_to_anchor_mse(f, y, a, ignore_index=-1),),
    "centroid InfoNCE": lambda f, y, a: (centroid_info_nce(a, a.flip(1), reduction="sum"),),
}


def _bytes(name: str, features: Tensor, num_classes: int) -> int:
    if name == "centroid InfoNCE":
        return 8 * num_classes * features.shape[1]
    training = "forward + backward" if name.endswith("training") else "forward"
    sums, sqdists = name != "pixel-to-anchor MSE", name != "class moments"
    return moments_bytes(features, num_classes, training, sums=sums, sqdists=sqdists)


def _benchmark() -> bool:
    """Prints errors and times of every usable fused backend; True if all results are correct."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    on_device = ("cuda", "triton") if cuda else ("cpu",)
    usable = [name for name in on_device if backends()[name] is None and not TRITON_INTERPRETED]
    size, dtype = (GPU_SIZE, torch.bfloat16) if cuda else (CPU_SIZE, torch.float32)
    torch.manual_seed(0)
    features = torch.randn(size, device=device).to(dtype)
    speeds = bandwidth(features)
    print(f"\n{device.type}, features {' × '.join(map(str, size))}, 19 classes, {dtype}")
    print(f"copy {speeds['copy_gbps']:.0f} GB/s, read {speeds['read_gbps']:.0f} GB/s")
    print(
        f"{'backend':<10}{'call':<24}{'labels':<10}{'error':>8}{'ms':>9}{'GB/s':>8}{'of copy':>9}"
    )
    right, disturbed = True, 0.0
    anchors = torch.randn(19, size[1], device=device) / size[1] ** 0.25
    for kind in ("coherent", "random"):
        labels = example_labels((size[0], *size[2:]), 19, kind).to(device)
        for name, call in CALLS.items():
            if name == "centroid InfoNCE" and kind == "random":  # it has no labels
                continue
            with use_backend("reference"):
                exact = call(features, labels, anchors)
            for backend in usable or ["reference"]:
                with use_backend(backend):
                    error = max(map(_error, call(features, labels, anchors), exact))
                    counted = _bytes(name, features, 19)
                    measured, _ = measure(
                        lambda call=call, labels=labels: call(features, labels, anchors),
                        counted,
                        device,
                        beside=None if name == "centroid InfoNCE" else features,
                    )
                # sums are float32; a gradient in bfloat16 may be rounded differently
                tolerance = 1e-2 if name.endswith("training") and dtype != torch.float32 else 1e-4
                right &= error <= tolerance
                disturbed = max(disturbed, measured.others or 0)
                share = "" if measured.copy_share is None else f"{measured.copy_share:.0%}"
                print(
                    f"{backend:<10}{name:<24}{kind:<10}{error:>8.0e}{measured.median * 1e3:>9.3f}"
                    f"{measured.gbps:>8.1f}{share:>9}{'' if error <= tolerance else '  WRONG'}"
                )
    if disturbed > DISTURBED:
        print(f"disturbed: other processes kept up to {disturbed:.1f} cores busy at the same time")
    return right


def _error(ours: Tensor, exact: Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖."""
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


def _verify(backend: str | None, everything: bool, path: Path | None) -> bool:
    """Prints a line for each check; True if no usable backend, or the named one, is wrong."""
    usable = [name for name, reason in backends().items() if reason is None]
    if backend is not None and backend not in usable:
        print(f"\n{backend} is not usable here: {backends()[backend]}")
        return False
    print(f"\n{'operator':<21}{'backend':<10}{'check':<46}{'error':>7}{'limit':>9}")
    report, found = [], []
    for name in usable if backend is None else [backend]:
        start, rows, operators = time.monotonic(), [], {}
        for row in verify(name, everything):
            print(row, flush=True)
            rows.append(row)
            for operator in row.operators.split() if row.right is not None else ():
                operators[operator] = operators.get(operator, True) and row.right
        found += rows
        right = sum(row.right is True for row in rows)
        faults = [row for row in rows if row.right is False]
        refused = sum(row.right is None for row in rows)
        report.append(
            f"{name}: {right} right, {len(faults)} WRONG, {refused} not served, "
            f"{time.monotonic() - start:.0f} s"
        )
        report += map(str, faults)
    versions = environment(device_of(found[0].backend))
    report = [", ".join(f"{k} {v}" for k, v in versions.items()), *report]
    print("\nAbove all else this tells us what your device computes: please paste it into an issue")
    print("if anything is WRONG, or if your GPU is not in docs/gpu.md.\n")
    print("\n".join(report))
    if path is not None:
        path.write_text(
            json.dumps({**versions, "rows": [row._asdict() for row in found]}, indent=1)
        )
    return all(row.right is not False for row in found)


def _usable(backend: str) -> str:
    """That the backend is usable here, and what `--verify` found."""
    devices = [torch.device("cpu")]
    if backend in ON_GPU:
        gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        devices = [torch.device("cuda", i) for i in gpus]
    found = []
    for device in devices:
        if operators := sorted(wrong(backend, device)):
            found.append(f"WRONG on {device_name(device)}: {', '.join(operators)}")
        elif verified(backend, device):
            found.append(f"verified on {device_name(device)}")
        elif backend in ON_GPU:
            found.append(f"never verified on {device_name(device)} ({VERIFY})")
    return ", ".join(dict.fromkeys(["yes", *found]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="anchorops-doctor", description=__doc__)
    parser.add_argument("--benchmark", action="store_true", help="check and time, within a minute")
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
    reasons = backends()
    for name, reason in reasons.items():
        print(f"{name:<11}{f'no: {reason}' if reason else _usable(name)}")
        if reason:
            print(f"{'':<11}needs {_remedy(name)}")
    right = True
    if options.verify:
        right = _verify(options.backend, options.all, options.json)
    if options.benchmark:
        right = _benchmark() and right
    fused = any(not why for name, why in reasons.items() if name != "reference")
    return 0 if fused and right else 1


if __name__ == "__main__":
    sys.exit(main())

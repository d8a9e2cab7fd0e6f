"""Does `anchorops-doctor --verify` notice wrong kernels? It is run with one fault after the other.

    python tests/proofs/planted_faults.py [NAME ...]

Each fault replaces a piece of a source file, in a copy of the package. The C++ kernels are compiled
again; the Triton kernels run in Triton's interpreter. The list was fixed before the checks were
written. It prints one line for each fault, and fails if more than two are not noticed.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MOST_UNNOTICED = 2


class Fault(NamedTuple):
    name: str
    backend: str
    gradient: bool  # whether only gradients are wrong
    file: str
    right: str  # occurs once in the file
    wrong: str


FAULTS = (
    Fault(
        "slope of squared probabilities",
        "triton",
        True,
        "kernels/softmax_moments_backward.py",
        "dsquare = 2 * _of_class(gradients.dsquares, image, k)\n            p = [",
        "dsquare = _of_class(gradients.dsquares, image, k)\n            p = [",
    ),
    Fault(
        "slope of the focal factor",
        "triton",
        True,
        "kernels/loss_options.py",
        "by_c = tl.where((e == 0) | (x == _SMALLEST), 0.0, growth) + by_u * a",
        "by_c = by_u * a",
    ),
    Fault(
        "gradients before the first logit",
        "triton",
        True,
        "kernels/upsampling_transposed.py",
        "tl.where(first, lower + upper, upper)",
        "upper",
    ),
    Fault(
        "squared distances in tiles of several keys",
        "triton",
        True,
        "kernels/class_moments_backward.py",
        "out = 2 * dsqdists[None, :] * (x - a)",
        "out = dsqdists[None, :] * (x - a)",
    ),
    Fault(
        "temperature of the divergence",
        "triton",
        True,
        "kernels/pixel_kl_divergence_backward.py",
        "factors = [x * temperature for x in factors]",
        "factors = [x for x in factors]",
    ),
    Fault(
        "slope of the variance",
        "triton",
        True,
        "kernels/upsampled_sums_backward.py",
        "2 * dvariance[:, None] * (x - mean[:, None])",
        "2 * dvariance[:, None] * x",
    ),
    Fault(
        "absent keys",
        "triton",
        True,
        "kernels/centroid_info_nce_backward.py",
        "used = present & are_present(problem.keys, k) & (r // problem.sizes.groups != k)",
        "used = present & (r // problem.sizes.groups != k)",
    ),
    Fault(
        "sums that underflow",
        "triton",
        False,
        "kernels/softmax.py",
        "_SMALLEST_SUM = tl.constexpr(2.0**-100)",
        "_SMALLEST_SUM = tl.constexpr(0.0)",
    ),
    Fault(
        "float32 rounded to bfloat16",
        "triton",
        False,
        "kernels/class_moments.py",
        "sums = _product(low, member) + _product(middle, member) + _product(high, member)",
        "sums = _product(high, member)",
    ),
    Fault(
        "transposed confusion matrix",
        "triton",
        False,
        "kernels/confusion.py",
        "label * num_classes + prediction",
        "prediction * num_classes + label",
    ),
    Fault(
        "slope of squared probabilities in C++",
        "cpu",
        True,
        "csrc/cpu/softmax_cells_backward.h",
        "rest -= (totals[n] + 2 * q * squares[n]) * q;",
        "rest -= (totals[n] + q * squares[n]) * q;",
    ),
    Fault(
        "last column of a tile",
        "cpu",
        True,
        "csrc/cpu/softmax_cells_backward.h",
        "        below[column + L] += sums.right_below[L - 1];\n",
        "",
    ),
    Fault(
        "both gradients of a tile of one key",
        "cpu",
        True,
        "csrc/cpu/class_moments_kernel.h",
        "if (dsums) plane[i] += dsums[k * dim + c + i];",
        "if (dsums) plane[i] = Vec{} + dsums[k * dim + c + i];",
    ),
    Fault(
        "temperature of the divergence in C++",
        "cpu",
        True,
        "csrc/cpu/pixel_kl_divergence_kernel.h",
        "is_valid ? divergence.temperature * of_pixels : Vec{}",
        "is_valid ? of_pixels : Vec{}",
    ),
    Fault(
        "slope of the focal factor in C++",
        "cpu",
        True,
        "csrc/cpu/softmax_losses.h",
        "alpha = m.factor * alpha + (c - c == 0 ? by_factor : Vec{});",
        "alpha = m.factor * alpha + (c - c == 0 ? Vec{} : by_factor);",
    ),
    Fault(
        "number of hard examples",
        "cpu",
        False,
        "csrc/cpu/softmax_cells_forward.h",
        "V::load(losses + n) < losses_of.shape.least ? Floats{} : share",
        "share",
    ),
    Fault(
        "rank of the k-th largest",
        "cpu",
        False,
        "csrc/cpu/kth_largest.cpp",
        "counts[digit] < k",
        "counts[digit] <= k",
    ),
    Fault(
        "slices that are not mixed",
        "cpu",
        False,
        "anchorops/_ops/volumes.py",
        ".add_(around[upper], alpha=weight)",
        ".add_(around[lower], alpha=weight)",
    ),
    Fault(
        "gradient of pixel weights",
        "cpu",
        True,
        "anchorops/_ops/softmax_moments.py",
        "torch.where(losses.isfinite(), losses, 0)",
        "torch.ones_like(losses)",
    ),
    Fault(
        "gradient of anchors",
        "cpu",
        True,
        "anchorops/_ops/class_moments.py",
        "torch.where(counts > 0, -2 * dsqdists * differences, 0)",
        "torch.where(counts > 0, -dsqdists * differences, 0)",
    ),
)


def _copy(folder: Path) -> None:
    """What a build needs, with what was built."""
    for name in ("anchorops", "kernels", "csrc", "build"):
        if (ROOT / name).exists():
            shutil.copytree(
                ROOT / name,
                folder / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", "on_host", "torch", "abi", "bench"),
            )
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)


def _build(folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | {"ANCHOROPS_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        sys.exit(run.stdout[-2000:] + run.stderr[-4000:])


def _first_wrong(folder: Path, backend: str) -> str | None:
    """The first line of `--verify` that says WRONG."""
    command = [sys.executable, "-m", "anchorops.doctor", "--verify", "--backend", backend]
    environment = os.environ | {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder)}
    if backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("WRONG\n"):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                return " ".join(line.split())
    if process.returncode != 0:
        sys.exit(f"--verify ends with {process.returncode}, and nothing is wrong")
    return None


def main(names: list[str]) -> int:
    faults = [fault for fault in FAULTS if not names or fault.name in names]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy(folder)
        compiles = any(fault.file.startswith("csrc") for fault in faults)
        if compiles:
            _build(folder)
        for backend in sorted({fault.backend for fault in faults}):
            if wrong := _first_wrong(folder, backend):
                sys.exit(f"without a fault: {wrong}")
        for fault in faults:
            path, start = folder / fault.file, time.monotonic()
            source = path.read_text()
            assert source.count(fault.right) == 1, fault.name
            path.write_text(source.replace(fault.right, fault.wrong))
            if fault.file.startswith("csrc"):
                _build(folder)
            wrong = _first_wrong(folder, fault.backend)
            unnoticed += wrong is None
            print(
                f"{'NOT NOTICED' if wrong is None else 'noticed':<12}"
                f"{time.monotonic() - start:5.0f} s  {fault.backend:<8}{fault.name}: {wrong}",
                flush=True,
            )
            path.write_text(source)
    print(f"{len(faults) - unnoticed} of {len(faults)} faults noticed")
    return int(unnoticed > MOST_UNNOTICED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

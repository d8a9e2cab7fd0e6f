"""A report of the machine code of the Triton kernels, without a GPU: `make kernels-report`.

The launchers are called with tensors on the meta device and a driver that names a GPU; Triton then
compiles what it would launch there, and the table is read off the machine code. Its columns:
- stack: bytes of a thread for spilled registers, on AMD GPUs its scratch memory;
- shared: bytes of a program;
- seconds: the processor's time for compiling it, ptxas included. On a GPU about half a second of
  gcc is added for the launcher.
The report fails on spills, and if users would wait too long for the first step of a loss: SECONDS
for the kernels of one variant, OF_CROSS_ENTROPY for those of plain cross-entropy.
"""

import argparse
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from record import markdown_table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from anchorops._moments import GRADIENTS, Options
from anchorops.kernels import (
    centroid_info_nce,
    centroid_info_nce_backward,
    class_keys,
    class_moments,
    class_moments_backward,
    confusion,
    error_loss_backward,
    pixel_argmax,
    pixel_kl_divergence,
    pixel_kl_divergence_backward,
    probability_histograms,
    softmax_moments,
    softmax_moments_backward,
    split_groups,
    upsampled_sums,
    upsampled_sums_backward,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_86": GPUTarget("cuda", 86, 32),  # RTX 30
    "sm_89": GPUTarget("cuda", 89, 32),  # L4, RTX 40
    "sm_90": GPUTarget("cuda", 90, 32),  # H100, H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "sm_120": GPUTarget("cuda", 120, 32),  # RTX 50
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}
SECONDS, OF_CROSS_ENTROPY = 12, 4


class MomentsVariant(NamedTuple):
    dtype: torch.dtype
    layout: str
    anchors: bool

    def __str__(self) -> str:
        extra = " + anchors" * self.anchors
        return f"{str(self.dtype).removeprefix('torch.')} {self.layout}: sums{extra}"


MANY = 16_381  # classes, sorted by key; like 19 not a multiple of 16, for Triton's constants
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUICK = [
    MomentsVariant(BF16, "NCHW", True),
    MomentsVariant(BF16, "NHWC", True),
    MomentsVariant(FP32, "NCHW", True),
    MomentsVariant(FP16, "cropped", True),
]


def moments_variants() -> Iterator[MomentsVariant]:
    for dtype in (BF16, FP16, FP32):
        for layout in ("NCHW", "NHWC", "cropped"):
            for anchors in (False, True):
                yield MomentsVariant(dtype, layout, anchors)


def launch_info_nce(groups: int, with_positives: bool) -> None:
    """Both directions of centroid InfoNCE, K = 150. The positives are given, or the keys."""
    products = torch.empty((150 * groups, 150), device="meta")
    positives = products.new_empty(len(products)) if with_positives else None
    present = torch.empty(len(products), dtype=torch.bool, device="meta")
    inputs = products, positives, present, None
    losses, lse = centroid_info_nce.centroid_info_nce(*inputs, 0.07)
    centroid_info_nce_backward.centroid_info_nce_backward(losses, *inputs, lse, 0.07)


def launch_moments(variant: MomentsVariant, classes: int) -> None:
    """Everything that class moments launch, at the HRNet shape."""
    batch, dim, height, width = 8, 720, 128, 256
    size = (batch, dim, height, width)
    features = torch.empty(size, dtype=variant.dtype, device="meta")
    if variant.layout == "NHWC":
        features = features.contiguous(memory_format=torch.channels_last)
    elif variant.layout == "cropped":
        features = features.new_empty((batch, dim, height + 2, width + 2))[:, :, 1:-1, 1:-1]
    labels = torch.empty((batch, 512, 1024), dtype=torch.uint8, device="meta")
    keys, _ = class_keys.class_keys(labels, height, width, classes, False, 255)
    anchors = torch.empty((classes, dim), device="meta") if variant.anchors else None
    sums, sqdists = class_moments.class_moments(features, keys, anchors, classes, 1, True)
    class_moments_backward.class_moments_backward(
        features if variant.anchors else None,
        keys,
        anchors,
        sums,
        sqdists if variant.anchors else None,
        1,
        list(size),
        list(torch.empty_like(features).stride()),
        variant.dtype,
    )


def launch_groups() -> None:
    """Everything that random groups launch."""
    keys = torch.empty((8, 128 * 256), dtype=torch.int32, device="meta")
    counts, seed = (torch.empty(n, dtype=torch.int64, device="meta") for n in (19, 1))
    split_groups.split_groups(keys, counts, seed, 2)


def launch_upsampled(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Sums of upsampled features and their gradient, as in CeCo at the HRNet shape."""
    features = torch.empty((8, 128, 128, 256), dtype=dtype, device="meta", memory_format=layout)
    keys = torch.empty((8, 512, 1024), dtype=torch.uint8, device="meta")
    sums, mean, variance = upsampled_sums.upsampled_sums(features, keys, 19, 19)
    for moments in ((mean, variance), (None, None)):
        upsampled_sums_backward.upsampled_sums_backward(features, keys, sums, mean, *moments, 19)


class PixelVariant(NamedTuple):
    """Upsampled logits; with `dice` probability_sums, squares, correct and all gradients, otherwise
    only the cross-entropy. `shaped`: with label smoothing, a focal factor, a smallest loss, pixel
    weights.
    `dice` and `shaped` also count the labels out of range, as the modules do."""

    dtype: torch.dtype
    size: tuple[int, ...]
    labels: tuple[int, int]
    align_corners: bool
    dice: bool
    shaped: str = ""

    def __str__(self) -> str:
        what = "all statistics of Dice, and maps" if self.dice else "cross-entropy"
        what += f" with {self.shaped}" if self.shaped else ""
        corners = ", corners aligned" if self.align_corners else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}: {self.size} to {self.labels}{corners}, {what}"


# Channels last are copied, and other numbers of classes give the same code.
ADE20K, DEEPLAB, FEW = (16, 150, 128, 128), (16, 21, 65, 65), (16, 21, 8, 8)
EVERYTHING = "smoothing, focal factor, smallest loss, pixel weights"
QUICK_PIXELS = [
    PixelVariant(BF16, ADE20K, (512, 512), False, False),
    PixelVariant(BF16, ADE20K, (512, 512), False, False, EVERYTHING),
]
PIXELS = [
    *QUICK_PIXELS,
    PixelVariant(BF16, ADE20K, (512, 512), False, True),
    PixelVariant(FP32, DEEPLAB, (513, 513), True, True),
    PixelVariant(FP16, DEEPLAB, (513, 513), False, False),
    PixelVariant(BF16, ADE20K, (512, 512), True, False),  # cells of 4 or 5 pixels
    PixelVariant(BF16, FEW, (512, 512), False, True),  # 64 pixels for each logit
    PixelVariant(BF16, (16, 21, 64, 4096), (64, 4096), False, True),  # not upsampled
    PixelVariant(BF16, ADE20K, (512, 512), False, False, "smoothing"),
    PixelVariant(BF16, ADE20K, (512, 512), False, False, "focal factor"),
    PixelVariant(FP32, DEEPLAB, (513, 513), True, False, "smallest loss"),
    PixelVariant(BF16, ADE20K, (512, 512), False, False, "pixel weights"),
    PixelVariant(BF16, ADE20K, (512, 512), False, True, EVERYTHING),
    PixelVariant(FP32, DEEPLAB, (513, 513), True, True, EVERYTHING),
    PixelVariant(BF16, (16, 21, 64, 4096), (64, 4096), False, False, EVERYTHING),
]


def launch_pixels(variant: PixelVariant) -> None:
    """Everything that softmax moments, argmax and confusion launch."""
    logits = torch.empty(variant.size, dtype=variant.dtype, device="meta")
    labels = torch.empty((variant.size[0], *variant.labels), dtype=torch.uint8, device="meta")
    dice, align_corners = variant.dice, variant.align_corners
    smooth = torch.empty(variant.size[1], device="meta") if "smoothing" in variant.shaped else None
    weights = torch.empty(labels.shape, device="meta")
    options = Options(
        true_weights=smooth,
        all_weights=smooth,
        pixel_weights=weights if "weights" in variant.shaped else None,
        min_loss=1.0 if "smallest" in variant.shaped else -math.inf,
        focal_gamma=2.0 if "focal" in variant.shaped else 0.0,
        align_corners=align_corners,
        correct=dice,
        probability_sums=dice,
        squares=dice,
        pixel_losses=dice,
        with_lse=True,
        labels_out_of_range=dice or variant.shaped != "",
    )
    moments = softmax_moments.softmax_moments(logits, labels, options)
    gradients = {f"d{name}": moments.get(name) for name in GRADIENTS}
    softmax_moments_backward.softmax_moments_backward(
        logits, labels, moments["lse"], **gradients, options=options
    )
    if dice:
        predictions = pixel_argmax.pixel_argmax(logits, *variant.labels, align_corners, torch.int64)
        confusion.confusion(predictions, labels, variant.size[1], 255)


class DivergenceVariant(NamedTuple):
    """Logits of student and teacher; with `maps` a mask, and a gradient of each pixel."""

    dtype: torch.dtype
    size: tuple[int, ...]
    teacher: tuple[int, ...]
    labels: tuple[int, int]
    align_corners: bool
    maps: bool

    def __str__(self) -> str:
        what = "mask, divergence of each pixel" if self.maps else "sum of all pixels"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}: {self.size} and {self.teacher} to {self.labels}, {what}"


QUICK_DIVERGENCES = [DivergenceVariant(BF16, ADE20K, ADE20K, (512, 512), False, False)]
DIVERGENCES = [
    *QUICK_DIVERGENCES,
    DivergenceVariant(FP32, ADE20K, (16, 150, 64, 64), (512, 512), False, True),
    DivergenceVariant(FP16, DEEPLAB, DEEPLAB, (513, 513), True, True),
    DivergenceVariant(BF16, ADE20K, ADE20K, (128, 128), False, True),
    DivergenceVariant(BF16, FEW, DEEPLAB, (512, 512), False, False),
]


def launch_divergence(variant: DivergenceVariant) -> None:
    logits = torch.empty(variant.size, dtype=variant.dtype, device="meta")
    teacher = torch.empty(variant.teacher, dtype=variant.dtype, device="meta")
    valid = torch.empty((variant.size[0], *variant.labels), dtype=torch.bool, device="meta")
    inputs = logits, teacher, valid if variant.maps else None
    options = 2.0, variant.align_corners
    total, divergences, lse, teacher_lse = pixel_kl_divergence.pixel_kl_divergence(
        *inputs, *variant.labels, *options, variant.maps, True
    )
    gradients = (None, divergences) if variant.maps else (total, None)
    pixel_kl_divergence_backward.pixel_kl_divergence_backward(
        *inputs, lse, teacher_lse, *gradients, *options
    )


class ErrorsVariant(NamedTuple):
    """Lovász of a softmax."""

    dtype: torch.dtype
    size: tuple[int, ...]
    labels: tuple[int, int]
    align_corners: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}: {self.size} to {self.labels}, Lovász"


QUICK_ERRORS = [ErrorsVariant(BF16, ADE20K, (512, 512), False)]
ERRORS = [
    *QUICK_ERRORS,
    ErrorsVariant(FP32, DEEPLAB, (513, 513), True),
    ErrorsVariant(FP16, FEW, (512, 512), False),
    ErrorsVariant(BF16, (16, 21, 64, 4096), (64, 4096), False),
]


def launch_errors(variant: ErrorsVariant) -> None:
    logits = torch.empty(variant.size, dtype=variant.dtype, device="meta")
    labels = torch.empty((variant.size[0], *variant.labels), dtype=torch.uint8, device="meta")
    slopes = torch.empty((variant.size[1], 2, 1024), device="meta")
    options = 255, variant.align_corners
    probability_histograms.probability_histograms(logits, labels, 1024, *options)
    error_loss_backward.error_loss_backward(logits, labels, slopes, *options)


def native_sizes(stride: int) -> Iterator[Callable[[], None]]:
    """Both directions of cross-entropy, of a batch of each of 40 sizes, with a network that gives a
    logit for stride² pixels."""
    sizes = random.Random(0)
    for _ in range(40):
        labels = sizes.randint(200, 1000), sizes.randint(200, 1000)
        low = (math.ceil(n / stride) for n in labels)
        variant = PixelVariant(BF16, (2, 21, *low), labels, False, False)
        yield partial(launch_pixels, variant)


def jobs(quick: bool) -> list[tuple[Any, ...]]:
    """Launcher, title of the variant, arguments of the launcher."""
    launches: list[tuple[Any, ...]] = [
        (launch_moments, f"{variant}, {classes} classes", variant, classes)
        for variant in (QUICK if quick else moments_variants())
        for classes in (19, MANY)
    ]
    launches.append((launch_info_nce, "the positives are the keys", 1, False))
    launches.append((launch_info_nce, "two queries of a class, with positives", 2, True))
    for pixels in QUICK_PIXELS if quick else PIXELS:
        launches.append((launch_pixels, str(pixels), pixels))
    for divergence in QUICK_DIVERGENCES if quick else DIVERGENCES:
        launches.append((launch_divergence, str(divergence), divergence))
    for errors in QUICK_ERRORS if quick else ERRORS:
        launches.append((launch_errors, str(errors), errors))
    for dtype in (BF16,) if quick else (BF16, FP16, FP32):
        for layout in (torch.contiguous_format, torch.channels_last):
            title = f"upsampled sums: {str(dtype).removeprefix('torch.')}, {layout}"
            launches.append((launch_upsampled, title, dtype, layout))
    launches.append((launch_groups, "any number of groups"))
    return launches


class Driver(NamedTuple):
    """The parts of a Triton driver that compilation needs."""

    name: str

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def instead_of_launches(name: str, do: Callable[..., None]) -> Iterator[None]:
    """Where a kernel would be launched on that GPU, do(kernel, its arguments) is called."""

    def getitem(self: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: do(self, *args, **kwargs)

    patch = mock.patch.object
    with patch(jit.JITFunction, "__getitem__", getitem), patch(driver, "_active", Driver(name)):
        yield


def _processor_seconds() -> float:
    """Processor time of this process and of ptxas, which it runs."""
    return sum(os.times()[:4])


def compiled(name: str, launch: Callable[..., None], *args: Any) -> dict[str, tuple[Any, float]]:
    """The kernels by name, as Triton would launch them on that GPU, and the seconds for each."""
    kernels = {}

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        start = _processor_seconds()
        kernel = self.run(*args, grid=None, warmup=True, **kwargs)
        kernels[kernel.metadata.name] = kernel, _processor_seconds() - start

    with instead_of_launches(name, compile_only), knobs.compilation.scope():
        knobs.compilation.always_compile = True
        launch(*args)
    return kernels


def variants(name: str, calls: Iterable[Callable[[], object]]) -> dict[str, int]:
    """How many variants of each kernel Triton would compile for these calls."""
    keys: dict[str, set[str]] = {}

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        _, keys_so_far, *_, binder = self.device_caches[name]
        _, specialization, options = binder(*args, **kwargs)
        key = jit.compute_cache_key(keys_so_far, specialization, options)
        keys.setdefault(self.fn.__name__, set()).add(key)

    with instead_of_launches(name, count):
        for call in calls:
            call()
    return {kernel: len(variants) for kernel, variants in keys.items()}


class Row(NamedTuple):
    registers: int
    stack: int
    shared: int
    seconds: float


def measure(kernel: Any, seconds: float) -> Row:
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        counts = dict(re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"]))
        # scalar registers spill into vector registers, and are not counted
        stack = int(counts["private_segment_fixed_size"])
        return Row(int(counts["vgpr_count"]), stack, shared, seconds)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    return Row(registers, stack, shared, seconds)


COLUMNS = ("GPU", "kernel", "variant", *Row._fields)


def rows_of(name: str, quick: bool) -> list[tuple[str, str, Row]]:
    """Kernel, variant and what was measured, for that GPU; each machine code once."""
    rows = {}
    for launch, title, *rest in jobs(quick):
        for kernel_name, (kernel, seconds) in compiled(name, launch, *rest).items():
            if kernel.hash not in rows:
                rows[kernel.hash] = kernel_name, title, measure(kernel, seconds)
    return list(rows.values())


def seconds_alone(name: str, variant: str) -> float:
    """For compiling a variant's kernels again, when the other processes have ended."""
    launch, _, *rest = next(job for job in jobs(False) if job[1] == variant)
    return sum(seconds for _, seconds in compiled(name, launch, *rest).values())


def faults_of(name: str, rows: list[tuple[str, str, Row]]) -> list[str]:
    faults = [f"{name} {kernel}: {row.stack} B of spills" for kernel, _, row in rows if row.stack]
    waits: dict[str, float] = {}
    for _, variant, row in rows:
        waits[variant] = waits.get(variant, 0) + row.seconds
    for variant, seconds in waits.items():
        most = OF_CROSS_ENTROPY if variant.endswith(", cross-entropy") else SECONDS
        if seconds > most and (seconds := seconds_alone(name, variant)) > most:
            faults.append(f"{name} {variant}: {seconds:.1f} s to compile, more than {most}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="a choice of the variants")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}")
    faults: list[str] = []
    lines: list[tuple[object, ...]] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        pending = pool.map(rows_of, args.targets, repeat(args.quick))
        compiled_rows = dict(zip(args.targets, pending, strict=True))
    for name, rows in compiled_rows.items():
        faults += faults_of(name, rows)
        for kernel, variant, row in rows:
            *counts, seconds = row
            lines.append((name, kernel, variant, *counts, f"{seconds:.1f}"))
    print(markdown_table(COLUMNS, lines, words=(0, 1, 2)))
    for stride in (4, 8):
        print(
            f"variants for 40 sizes, logits of stride {stride}:",
            variants("sm_90", native_sizes(stride)),
        )
    if faults:
        sys.exit("kernels_report:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()

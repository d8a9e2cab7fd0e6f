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
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from record import markdown_table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

import anchorops as ao
from anchorops._moments import GRADIENTS, Options, Results, Wanted
from anchorops.doctor.catalogue import ENTRIES, Case, Sample
from anchorops.doctor.catalogue.entry import evaluate
from anchorops.doctor.catalogue.features import Features, centroids, keys_of_classes
from anchorops.doctor.catalogue.masks import Masks
from anchorops.doctor.catalogue.pixels import Pixels
from anchorops.kernels import class_keys, softmax_moments, softmax_moments_backward

PROGRAMS = Path(triton.__file__).parent / "backends/nvidia/bin"
CUOBJDUMP, NVDISASM = PROGRAMS / "cuobjdump", PROGRAMS / "nvdisasm"
# A label, or an instruction without its condition.
CODE = re.compile(r"^(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([^;]+?)\s*;", re.MULTILINE)
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
# Of an older Triton: its default is 48 registers there; and what only steep logits load again.
KNOWN_SPILLS = {
    ("3.6.0", "sm_100", "_class_moments_bwd_kernel"): 8,
    ("3.6.0", "sm_80", "_softmax_moments_bwd_kernel"): 8,
    # with all options of the loss, once a program, outside of its loops
    ("3.8.0", "sm_120", "_softmax_moments_bwd_kernel"): 24,
}
MANY = 16_381  # classes, sorted by key; like 19 not a multiple of 16, for Triton's constants
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Channels last are copied, and other numbers of classes give the same code.
UINT8 = torch.uint8
ADE20K = Pixels(150, (128, 128), (512, 512), dtype=BF16, label_dtype=UINT8)
EIGHT_TIMES = ADE20K._replace(logits=(64, 64))
DEEPLAB = Pixels(21, (65, 65), (513, 513), dtype=FP16, label_dtype=UINT8)
ALIGNED = DEEPLAB._replace(dtype=FP32, align=True)
FEW = DEEPLAB._replace(logits=(8, 8), labels=(512, 512), dtype=BF16)  # 64 pixels for each logit
SAME_SIZE = DEEPLAB._replace(logits=(64, 256), labels=(64, 256), dtype=BF16)
UPSAMPLED = Features(19, (2, 128, 32, 64), ratio=4, label_dtype=UINT8, anchors=False)
SMOOTHING: dict[str, Any] = {"label_smoothing": 0.1}
EVERYTHING: dict[str, Any] = {**SMOOTHING, "focal_gamma": 2.0, "ohem_threshold": 0.3}


def variant(entry: str, name: str, make: Any, quick: bool = False, **options: Any) -> Case:
    """make: the inputs; the name of the case says what they are."""
    if isinstance(make, Pixels):
        options |= {"align_corners": True} if make.align else {}
        size, label_size = ("×".join(map(str, x)) for x in (make.logits, make.labels))
        name = f"{make.num_classes} classes, {size} to {label_size}, {name}"
    if isinstance(make, (Features, Pixels)):
        name = f"{str(make.dtype).removeprefix('torch.')}, {make.layout}: {name}"
    return Case(ENTRIES[entry], Sample(name, make, options, ("quick",) if quick else ()))


def moments_variants() -> Iterator[Case]:
    """Everything that class moments launch, at the channels of HRNet."""
    few = [(BF16, "planes"), (BF16, "channels last"), (FP32, "planes"), (FP16, "cropped")]
    for dtype in (BF16, FP16, FP32):
        for layout in ("planes", "channels last", "cropped"):
            for anchors, classes in product((False, True), (19, MANY)):
                name = f"sums{' + anchors' * anchors}, {classes} classes"
                make = Features(classes, (2, 720, 32, 64), layout, dtype, label_dtype=UINT8)
                quick = anchors and (dtype, layout) in few
                make = make._replace(anchors=anchors)
                yield variant("class_moments", name, make, quick, num_classes=classes)
    for classes in (19, MANY):  # HRNet-W18: rows that are not aligned
        make = Features(classes, (2, 270, 32, 64), "channels last", BF16, label_dtype=UINT8)
        name = f"sums + anchors, {classes} classes, 270 channels"
        yield variant("class_moments", name, make, True, num_classes=classes)


def variants_of_images() -> Iterator[Case]:
    """Everything that the losses of logits and predictions launch."""
    for name, make, quick, options in (
        ("cross-entropy", ADE20K, True, {}),
        ("cross-entropy with all options", ADE20K._replace(weights=True), True, EVERYTHING),
        ("cross-entropy", EIGHT_TIMES, False, {}),
        ("cross-entropy", ADE20K._replace(logits=(16, 16)), False, {}),
        ("cross-entropy", DEEPLAB, False, {}),
        ("cross-entropy", ADE20K._replace(align=True), False, {}),  # cells of 4 or 5 pixels
        ("cross-entropy with smoothing", ADE20K, False, SMOOTHING),
        ("cross-entropy with a focal factor", ADE20K, False, {"focal_gamma": 2.0}),
        ("cross-entropy with a smallest loss", ALIGNED, False, {"ohem_threshold": 0.3}),
        ("cross-entropy with pixel weights", ADE20K._replace(weights=True), False, {}),
        ("cross-entropy with all options", SAME_SIZE._replace(weights=True), False, EVERYTHING),
    ):
        yield variant(
            "CrossEntropy" if options or make.weights else "pixel_cross_entropy",
            name,
            make,
            quick,
            **options,
        )
    for make in (ADE20K, EIGHT_TIMES):
        yield variant("CrossEntropyDice", "cross-entropy + Dice", make)
    for make in (ADE20K, ALIGNED):
        options = EVERYTHING | {"squared": True}
        yield variant("CrossEntropyDice", "cross-entropy + Dice with all options", make, **options)
    for make in (ADE20K, ALIGNED, FEW, SAME_SIZE):
        yield variant("softmax_moments", "all statistics", make)
        yield variant("pixel_confusion", "confusion", make)
    for make, quick in ((ADE20K, True), (ALIGNED, False), (FEW, False), (SAME_SIZE, False)):
        yield variant("Lovasz", "Lovász", make, quick)
    for make, quick, options in (
        (ADE20K._replace(teacher=()), True, {}),
        (ADE20K._replace(teacher=(64, 64), dtype=FP32), False, {"reduction": "none"}),
        (DEEPLAB._replace(teacher=(), align=True), False, {"reduction": "none"}),
        (ADE20K._replace(teacher=(), labels=(128, 128)), False, {"reduction": "none"}),
        (FEW._replace(teacher=(65, 65)), False, {}),
    ):
        name = f"divergence, {options.get('reduction', 'mean')}, teacher {make.teacher}"
        yield variant("pixel_kl_divergence", name, make, quick, temperature=2.0, **options)


def in_dtype(make: Any, dtype: torch.dtype, n: int, random: Any) -> dict[str, torch.Tensor]:
    inputs = make(n, random)
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def variants_to_compile() -> Iterator[Case]:
    yield from moments_variants()
    yield from variants_of_images()
    for dtype, layout in product((BF16, FP16, FP32), ("planes", "channels last")):
        make = UPSAMPLED._replace(dtype=dtype, layout=layout)
        case = variant("upsampled_sums", "upsampled sums", make, dtype == BF16, num_classes=19)
        yield case
        alone = case.entry._replace(ours=lambda call=case.entry.ours, **x: call(**x).sums)
        yield Case(alone, case.sample._replace(name=f"{case}, without mean and variance"))
    make = UPSAMPLED._replace(shape=(2, 128, 32, 65), ratio=16)
    yield variant("upsampled_sums", "upsampled sums, 65 columns", make, True, num_classes=19)
    for dtype, align, boxes in ((FP32, False, True), (BF16, True, False), (FP16, False, False)):
        name = f"{dtype}, {'aligned' if align else 'not aligned'}, {'boxes' if boxes else 'no box'}"
        make = Masks((100, 192, 192), dtype=dtype, boxes=boxes)
        options = {"ratios": (5.625, 10), "align_corners": align}
        yield variant("mask_rle", f"masks, {name}", make, boxes, **options)
    for (classes, groups, dim), dtype, positives in (
        ((19, 2, 512), FP32, True),
        ((150, 1, 768), BF16, False),
        ((150, 4, 2048), FP32, True),
        ((1000, 1, 2048), FP32, False),
    ):
        name = f"InfoNCE, {dtype}, {classes} × {groups} × {dim}{', positives' * positives}"
        make = partial(centroids, (classes, groups, dim), positives)
        of_type = partial(in_dtype, make, dtype)
        for eps, quick in ((None, False), (1e-6, True)):
            yield variant("centroid_info_nce", f"{name}, {eps}", of_type, quick, normalize=eps)
    options: dict[str, Any] = {"groups": 2, "seed": 7}
    yield variant("split_groups", "any number of groups", keys_of_classes, True, **options)


def launch(case: Case) -> None:
    """Forward and backward. Anchors get no gradient: torch would compute it from keys that no
    kernel has written."""
    inputs = case.sample.inputs()
    constant = {name: inputs.pop(name) for name in ("anchors",) if name in inputs}
    with ao.use_backend("triton"):
        evaluate(partial(case.ours, **constant), inputs)


def launch_loss(size: tuple[int, ...], labels: tuple[int, int], sums: bool) -> None:
    """Both directions of plain cross-entropy, without memory; with the sums of probabilities that
    Dice needs."""
    logits = torch.empty(size, dtype=BF16, device="meta")
    classes = torch.empty((size[0], *labels), dtype=UINT8, device="meta")
    options = Options()
    wanted = Wanted(with_lse=True, probability_sums=sums)
    moments = Results(*softmax_moments.softmax_moments(logits, classes, options, wanted))
    gradients = {f"d{name}": getattr(moments, name) for name in GRADIENTS}
    softmax_moments_backward.softmax_moments_backward(
        logits, classes, moments.lse, **gradients, options=options
    )


def launch_keys(size: tuple[int, ...], labels: tuple[int, int]) -> None:
    """Class keys of features of this size, without memory."""
    batch, num_classes, height, width = size
    classes = torch.empty((batch, *labels), dtype=UINT8, device="meta")
    class_keys.class_keys(classes, height, width, num_classes, False, 255)


def native_sizes(
    stride: int, launch: Callable[..., None], *options: bool
) -> Iterator[Callable[[], None]]:
    """What launches the kernels for an image of each of 40 sizes, with a network that gives a logit
    for stride² pixels."""
    sizes = random.Random(0)
    for _ in range(40):
        labels = sizes.randint(200, 1000), sizes.randint(200, 1000)
        low = (math.ceil(n / stride) for n in labels)
        yield partial(launch, (1, 21, *low), labels, *options)


def jobs(quick: bool) -> list[Case]:
    return [x for x in variants_to_compile() if not quick or x.sample.tags]


@contextmanager
def instead_of_launches(name: str, do: Callable[..., None]) -> Iterator[None]:
    """Where a kernel would be launched on that GPU, do(kernel, its arguments) is called."""

    def getitem(self: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: do(self, *args, **kwargs)

    needed = SimpleNamespace(  # by compilation
        get_current_target=lambda: TARGETS[name],
        get_current_device=lambda: name,
        get_current_stream=lambda device: 0,
    )
    patch = mock.patch.object
    with patch(jit.JITFunction, "__getitem__", getitem), patch(driver, "_active", needed):
        yield


def _processor_seconds() -> float:
    """Processor time of this process and of ptxas, which it runs."""
    return sum(os.times()[:4])


def compiled(name: str, case: Case) -> dict[str, tuple[Any, float]]:
    """The kernels by their hash, as Triton would launch them on that GPU, and the seconds for
    each."""
    kernels = {}

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        start = _processor_seconds()
        kernel = self.run(*args, grid=None, warmup=True, **kwargs)
        kernels[kernel.hash] = kernel, _processor_seconds() - start

    with instead_of_launches(name, compile_only), knobs.compilation.scope():
        knobs.compilation.always_compile = True
        launch(case)
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


class Loop(NamedTuple):
    instructions: int
    exponentials: int
    loads: int
    distance: int


def _distance(body: list[str], load: int) -> int:
    """The number of instructions to the first use, which may be in the next iteration."""
    opcode, register = re.match(r"(\S+) R(\d+)", body[load]).groups()  # type: ignore[union-attr]
    count = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    loaded = {f"R{int(register) + i}" for i in range(count)}
    for distance in range(1, len(body)):
        opcode, _, operands = body[(load + distance) % len(body)].partition(" ")
        read = operands if opcode.startswith("ST") else operands.partition(",")[2]
        if loaded & set(re.findall(r"\bR\d+", read)):
            return distance
    return len(body)


def loops_of(sass: str) -> list[Loop]:
    """sass: machine code as nvdisasm -c prints it."""
    labels, code = {}, []
    for label, instruction in CODE.findall(sass):
        if label:
            labels[label] = len(code)
        else:
            code.append(instruction)
    jumps = ((re.search(r"^BRA.*`\((\.L_x_\d+)\)", x), i + 1) for i, x in enumerate(code))
    spans = [(labels[jump[1]], end) for jump, end in jumps if jump and labels[jump[1]] < end]
    loops = [x for x in spans if any(line.startswith("LDG.") for line in code[slice(*x)])]
    found = []
    for begin, end in loops:
        if not any(begin <= b and e <= end for b, e in loops if (b, e) != (begin, end)):
            body = code[begin:end]
            loads = [i for i, x in enumerate(body) if x.startswith("LDG.")]
            distance = min(_distance(body, load) for load in loads)
            exponentials = sum(x.startswith("MUFU") for x in body)
            found.append(Loop(len(body), exponentials, len(loads), distance))
    return found


class Row(NamedTuple):
    registers: int
    stack: int
    shared: int
    warps: int | str
    loops: str
    seconds: float


def measure(kernel: Any, seconds: float) -> Row:
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        counts = dict(re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"]))
        # scalar registers spill into vector registers, and are not counted
        stack = int(counts["private_segment_fixed_size"])
        return Row(int(counts["vgpr_count"]), stack, shared, "", "", seconds)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        command = [NVDISASM, "-c", file.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    loops = "; ".join(" ".join(map(str, loop)) for loop in loops_of(sass))
    most = 64 if kernel.metadata.target.arch in (80, 90, 100) else 48
    warps = min(2**16 // (32 * triton.cdiv(registers, 8) * 8), most)
    warps -= warps % kernel.metadata.num_warps
    return Row(registers, stack, shared, warps, loops, seconds)


COLUMNS = ("GPU", "kernel", "variant", *Row._fields)


def rows_of(name: str, quick: bool) -> list[tuple[str, str, Row]]:
    """Kernel, variant and what was measured, for that GPU; each machine code once."""
    rows = {}
    for case in jobs(quick and name != "sm_90"):
        for key, (kernel, seconds) in compiled(name, case).items():
            if key not in rows:
                rows[key] = kernel.metadata.name, str(case), measure(kernel, seconds)
    return list(rows.values())


def seconds_of(name: str, variant: str) -> float:
    """For compiling a variant's kernels again."""
    case = next(case for case in jobs(False) if str(case) == variant)
    return sum(seconds for _, seconds in compiled(name, case).values())


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
    faults: list[str] = []
    lines: list[tuple[object, ...]] = []
    os.environ["ANCHOROPS_TRITON_ON_HOST"] = "1"  # which anchorops asks when it is imported
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        pending = pool.map(rows_of, args.targets, repeat(args.quick))
        compiled_rows = dict(zip(args.targets, pending, strict=True))
        for name, rows in compiled_rows.items():
            faults += faults_of(name, rows, pool)
    for name, rows in compiled_rows.items():
        for kernel, variant, row in rows:
            *counts, seconds = row
            lines.append((name, kernel, variant, *counts, f"{seconds:.1f}"))
    print(markdown_table(COLUMNS, lines, words=(0, 1, 2)))
    for stride in (4, 8):
        print(
            f"variants for 40 sizes, logits of stride {stride}:",
            variants("sm_90", native_sizes(stride, launch_loss, False)),
        )
    if faults:
        sys.exit("kernels_report:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()

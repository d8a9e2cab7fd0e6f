"""Our kernels on a GPU: are the values right, what does the memory give, and how long does each
kernel take, next to the least time that time_model.py computes.

    python bench/gpu_kernels.py PART [--rows FILE] …

- values: versions, and class moments and cross-entropy of each backend compared with float64;
- bandwidth: of a copy, of a sum, and of reading 32 planes in pieces of 128 bytes, as the kernels of
  class moments do;
- compile: each call of `kernels` once, in several processes, which fills Triton's cache;
- kernels: the duration of each kernel in torch.profiler, by shape, dtype and memory layout;
- compiled: the kernels of a compiled training step with SAR (is a layout copied?);
- once: a few calls without a profiler of torch, for ncu;
- largest: prints a regular expression for the kernels of FILE that take longest, for ncu.

Each result is printed and appended to FILE at once, as a line of JSON.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench_pixel_losses
import cases
import time_model
import torch
from cases import DTYPES, IGNORE_INDEX, labels_of, relative_error
from record import head_of
from torch import Tensor, nn
from torch.autograd import grad
from torch.profiler import ProfilerActivity, profile

import anchorops as ao
from anchorops.measure import bandwidth, measure

UNALIGNED = cases.Shape("HRNet, 129×129", (16, 720, 129, 129), 19)
LAYOUTS = {"planes": torch.contiguous_format, "channels last": torch.channels_last}
TOLERANCE = 1e-3
CALLS = 5  # in the profiler
LARGEST = 7
MOST_PROCESSES = 12
LARGE = 2**28  # numbers, more than a cache holds


class Report:
    def __init__(self, path: Path | None) -> None:
        self.path = path

    def add(self, **row: Any) -> None:
        line = json.dumps(row, ensure_ascii=False)
        print(line, flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(line + "\n")


class Call(NamedTuple):
    """An operation on one input; `least` is what it must move and issue, where it is known.
    without_cuda: whether `cuda` leaves it to `triton`."""

    title: str
    run: Callable[[], object]
    least: time_model.Pass | None = None
    without_cuda: bool = False


def class_moments(
    shape: cases.Shape, dtype: str, layout: str, labels: str, device: torch.device
) -> Iterator[Call]:
    """Sums and squared distances to anchors, forward and backward."""
    features = torch.randn(shape.size, device=device).to(DTYPES[dtype])
    features = features.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    classes = shape.num_classes
    pixel_labels = labels_of(shape.pixels, classes, labels, device)
    anchors = torch.randn(classes, shape.size[1], device=device)

    def forward() -> Tensor:
        _, sums, sqdists = ao.ops.class_moments(features, pixel_labels, classes, anchors=anchors)
        assert sqdists is not None
        return sums.sum() + sqdists.sum()

    loss = forward()
    title = f"class moments, {shape.name}, {dtype}, {layout}, {labels} labels"
    backward = lambda: grad(loss, features, retain_graph=True)  # noqa: E731
    for direction, run in (("forward", forward), ("backward", backward)):
        least = time_model.class_moments(features, classes, direction)
        yield Call(f"{title}, {direction}", run, least)


def pixel_losses(
    shape: bench_pixel_losses.Logits, dtype: str, device: torch.device
) -> Iterator[Call]:
    """Cross-entropy, cross-entropy with Dice, confusion matrix."""
    logits = torch.randn(shape.size, device=device).to(DTYPES[dtype]).requires_grad_()
    size = shape.size[:1] + shape.label_size
    labels = labels_of(size, shape.num_classes, "coherent", device)
    losses = {"cross-entropy": ao.CrossEntropy(), "cross-entropy + Dice": ao.CrossEntropyDice()}
    for name, module in losses.items():
        loss = module(logits, labels)
        for direction, run in (
            ("forward", lambda module=module: module(logits, labels)),
            ("backward", lambda loss=loss: grad(loss, logits, retain_graph=True)),
        ):
            least = time_model.softmax_moments(logits, labels, direction)
            title = f"{name}, {shape.name}, {dtype}, {direction}"
            yield Call(title, run, None if "Dice" in name else least)
    yield Call(
        f"confusion matrix, {shape.name}, {dtype}",
        lambda: ao.pixel_confusion(logits.detach(), labels, ignore_index=IGNORE_INDEX),
        without_cuda=True,
    )


def methods(shape: cases.Shape, device: torch.device) -> Iterator[Call]:
    """Forward and backward of each method, with its layers, in bfloat16."""
    classes, dim = shape.num_classes, shape.size[1]
    features = torch.randn(shape.size, device=device).bfloat16().requires_grad_()
    labels = labels_of(shape.pixels, classes, "coherent", device)
    classifier = nn.Conv2d(dim, classes, 1).to(device)
    for build in (ao.SAR, ao.CBP, ao.OCCL, ao.CeCo, ao.MVSC):
        method = build(classes, dim).to(device)

        def step(method: Callable[..., Tensor] = method) -> None:
            loss = method(features, labels, classifier)
            if loss.requires_grad:
                loss.backward()

        yield Call(f"{build.__name__}, {shape.name}, bf16", step, without_cuda=build is ao.CeCo)


def groups_of_calls(device: torch.device, tiny: bool) -> list[Callable[[], Iterator[Call]]]:
    """Calls of one input each."""
    hrnet, segformer, unaligned = (
        shape.on(device, tiny) for shape in (cases.HRNET, cases.SEGFORMER, UNALIGNED)
    )
    moments = [
        (shape, dtype, layout, "coherent")
        for shape in (hrnet, segformer)
        for dtype in ("bf16", "fp32")
        for layout in LAYOUTS
    ]
    for dtype in ("bf16", "fp32"):
        moments += [
            (unaligned, dtype, "planes", "coherent"),
            (segformer, dtype, "planes", "random"),
        ]
    logits = [
        (shape.on(device, tiny), dtype)
        for shape in (bench_pixel_losses.SEGFORMER, bench_pixel_losses.HRNET)
        for dtype in ("bf16", "fp32")
    ]
    return [
        *(partial(class_moments, *some, device) for some in moments),
        *(partial(pixel_losses, *some, device) for some in logits),
        partial(methods, hrnet, device),
    ]


def every_call(device: torch.device, tiny: bool) -> Iterator[Call]:
    return (call for group in groups_of_calls(device, tiny) for call in group())


def compile_all(backend: str, device: torch.device, tiny: bool, share: str) -> None:
    """Each group of calls once, in several processes: Triton takes up to half a minute for one
    kernel. share: i/n, of one of them."""
    if not share:
        count = min(os.cpu_count() or 1, MOST_PROCESSES)
        command = [sys.executable, __file__, "compile", "--backend", backend, *["--tiny"] * tiny]
        running = [subprocess.Popen([*command, "--share", f"{i}/{count}"]) for i in range(count)]
        if any([process.wait() for process in running]):
            sys.exit("gpu_kernels: a kernel does not compile")
        return
    first, count = map(int, share.split("/"))
    with ao.use_backend(backend):
        for group in groups_of_calls(device, tiny)[first::count]:
            for call in group():
                start = time.perf_counter()
                call.run()
                print(f"{call.title}: {time.perf_counter() - start:.1f} s", flush=True)


def gpu_of(device: torch.device) -> time_model.GPU:
    """Its name and bandwidth are those of this GPU, because an H100 and an H200 differ by little
    else; the clock is the model's."""
    if device.type != "cuda":
        return time_model.H200
    properties = torch.cuda.get_device_properties(device)
    copied = bandwidth(torch.randn(LARGE, device=device))["copy_gbps"]
    return time_model.GPU(
        properties.name, 1e9 * copied, properties.multi_processor_count, time_model.H200.clock
    )


def profiled(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of each kernel (on the CPU, operator) in one call; the first calls are left out."""
    for _ in range(2):
        run()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(CALLS):
            run()
        if cuda:
            torch.cuda.synchronize()
    times = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total)
        for event in profiler.key_averages()
    }
    return {name: 1e-6 * time / CALLS for name, time in times.items() if time}


def kernels(report: Report, backend: str, device: torch.device, tiny: bool) -> None:
    gpu = gpu_of(device)
    with ao.use_backend(backend):
        for title, run, least, without_cuda in every_call(device, tiny):
            if without_cuda and backend == "cuda":
                continue
            times = profiled(run, device)
            total = sum(times.values())
            least_seconds = least and least.seconds(gpu) - least.launches * time_model.LAUNCH
            report.add(
                call=title,
                backend=backend,
                seconds=total,
                at_least=least_seconds,
                share=least_seconds and least_seconds / total,
                gpu=gpu.name,
                copy_gbps=gpu.copy_bandwidth / 1e9,
                kernels=times,
            )


def values(report: Report, device: torch.device) -> bool:
    """False if a value or a gradient is wrong, or if a backend of the device cannot be used."""
    unusable = ao.backends()
    report.add(**head_of(device), backends=unusable)
    shape = cases.Shape("values", (2, 96, 24, 40), 19)
    inputs = cases.Inputs(shape, "fp32", "coherent", device)
    logits = torch.randn(2, 19, 24, 40, device=device)
    losses = {}
    with ao.use_backend("reference"):
        exact_logits = logits.double().requires_grad_()
        labels = torch.where(inputs.labels < 0, IGNORE_INDEX, inputs.labels)
        loss = ao.pixel_cross_entropy(exact_logits, labels)
        losses["exact"] = loss, *grad(loss, exact_logits)
    right = device.type == "cpu" or not (unusable["cuda"] or unusable["triton"])
    for backend in cases.backends(device).values():
        with ao.use_backend(backend):
            _, sums, sqdists = ao.ops.class_moments(
                inputs.features, inputs.labels, 19, anchors=inputs.anchors, ignore_index=-1
            )
            leaf = logits.detach().requires_grad_()
            loss = ao.pixel_cross_entropy(leaf, labels)
            results = sums, sqdists, loss, *grad(loss, leaf)
        exact = inputs.exact.sums, inputs.exact.sqdists, *losses["exact"]
        names = "sums", "sqdists", "cross-entropy", "its gradient"
        for name, ours, truth in zip(names, results, exact, strict=True):
            assert ours is not None and truth is not None
            error = relative_error(ours, truth)
            right = right and error < TOLERANCE
            report.add(check=name, backend=backend, error=error, right=error < TOLERANCE)
    return right


def bandwidths(report: Report, device: torch.device, tiny: bool) -> None:
    size = 2**16 if tiny else LARGE
    report.add(**bandwidth(torch.randn(size, device=device)))
    if device.type != "cuda":
        return
    from planes import read_planes

    planes, pixels = 32 * 180, 128 * 256
    x = torch.randn(planes, pixels, device=device, dtype=torch.bfloat16)
    read_planes(x)  # compiles
    measured, _ = measure(lambda: read_planes(x), x.nbytes, device, rounds=5)
    report.add(read_planes_gbps=measured.gbps)


def compiled(report: Report, device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, 4, 1),
        nn.ReLU(),
        nn.Conv2d(64, 256, 1),
        nn.ReLU(),
        nn.Conv2d(256, 19, 1),
    ).to(device, memory_format=torch.channels_last)  # pyright: ignore
    sar = ao.attach(model, ao.SAR(19, 256).to(device))
    network = torch.compile(model)
    images = torch.randn(2, 3, 256, 256, device=device)
    labels = labels_of((2, 256, 256), 19, "coherent", device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = ao.pixel_cross_entropy(network(images), labels) + sar(labels)
        loss.backward()

    report.add(call="a compiled step with SAR", kernels=profiled(step, device))


def once(device: torch.device, tiny: bool) -> None:
    features, logits = cases.HRNET.on(device, tiny), bench_pixel_losses.HRNET.on(device, tiny)
    for call in (
        *class_moments(features, "bf16", "planes", "coherent", device),
        *pixel_losses(logits, "bf16", device),
    ):
        call.run()


def base_name(kernel: str) -> str:
    """Without return type, namespaces and template arguments, as ncu wants it."""
    return re.sub(r"^void ", "", kernel).partition("<")[0].partition("(")[0].split("::")[-1]


def largest(rows: Path) -> str:
    """Of our kernels: the names of those of torch have no suffix `_kernel` or belong to at::."""
    slowest: dict[str, float] = {}
    for line in rows.read_text().splitlines():
        for name, seconds in json.loads(line).get("kernels", {}).items():
            base = base_name(name.replace("(anonymous namespace)::", ""))
            if base.endswith("_kernel") and "at::" not in name:
                slowest[base] = max(slowest.get(base, 0.0), seconds)
    names = sorted(slowest, key=lambda name: -slowest[name])[:LARGEST]
    return f"^({'|'.join(names)})$"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("values", "bandwidth", "compile", "kernels", "compiled", "once", "largest")
    parser.add_argument("part", choices=parts)
    parser.add_argument("--rows", type=Path, help="append the results to this file")
    parser.add_argument("--backend", default="auto", help="of `compile`, `kernels` (default auto)")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)  # of a process of `compile`
    parser.add_argument("--tiny", action="store_true", help="tiny tensors on the CPU")
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.tiny
    device, report = torch.device("cuda" if cuda else "cpu"), Report(args.rows)
    if args.part == "values" and not values(report, device):
        sys.exit("gpu_kernels: a value is wrong, or a backend of this GPU cannot be used")
    if args.part == "bandwidth":
        bandwidths(report, device, args.tiny)
    if args.part == "compile":
        compile_all(args.backend, device, args.tiny, args.share)
    if args.part == "kernels":
        kernels(report, args.backend, device, args.tiny)
    if args.part == "compiled":
        compiled(report, device)
    if args.part == "once":
        once(device, args.tiny)
    if args.part == "largest":
        print(largest(args.rows))


if __name__ == "__main__":
    main()

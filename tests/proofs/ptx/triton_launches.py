"""Launches of Triton kernels, run by the machine: Triton compiles for a GPU that is not there, and
the PTX runs on the memory of CPU tensors."""

import importlib
import inspect
import os
import pkgutil
import struct
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from .machine import Launch, Traffic, run
from .memory import CANARY, MOST_TRACKED, Region, bytes_at
from .program import Program, Step
from .text import Address, Kernel, Register, Symbol, Unsupported, kernels

programs: dict[str, Program] = {}  # by the hash of what was compiled
launches: Counter[str] = Counter()  # by kernel
calls: set[tuple[str, str]] = set()  # operators, and dtypes of features or logits
traffic: dict[str, dict[str, Traffic]] | None = None  # by kernel, where it is counted
seed: int | None = None  # of a random order of the warps
_new: dict[int, int] = {}  # tensors that launchers allocated: address -> bytes


class _Driver(NamedTuple):
    """What Triton's compiler asks of a driver."""

    arch: int

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0


def install(arch: int) -> None:
    """From now on launches are for this GPU. anchorops registers its Triton operators for CPU
    tensors too if the variable is set, which it asks once."""
    import triton.language  # noqa: F401

    os.environ["ANCHOROPS_TRITON_ON_HOST"] = "1"
    import anchorops._libraries  # noqa: F401

    del os.environ["ANCHOROPS_TRITON_ON_HOST"]
    import torch
    from triton import knobs
    from triton.runtime import driver, jit

    driver._active = _Driver(arch)  # type: ignore[assignment]
    knobs.runtime.add_stages_inspection_hook = _without_machine_code  # type: ignore[assignment]
    jit.JITFunction.__getitem__ = _launcher  # type: ignore[method-assign]
    plain = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = plain(self, *args, **kwargs)
        if type(result) is torch.Tensor and result.device.type == "cpu" and result.numel():
            _mark_new(result.data_ptr(), result.numel() * result.element_size())
        return result

    torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]
    _note_calls()


def _without_machine_code(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str]:
    """A hook of Triton's compiler, which need not call ptxas. Without arguments it is asked for the
    name of the change, for keys of caches."""
    if stages is not None:
        stages["cubin"] = lambda ptx, metadata: b""
    return "PTX alone", "PTX alone"


def _note_calls() -> None:
    """anchorops looks the launcher of an operator up in its module at each call."""
    from anchorops import kernels

    for _, name, _ in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"anchorops.kernels.{name}")
        launcher = getattr(module, name, None)
        if inspect.isfunction(launcher):
            setattr(module, name, _noted(name, launcher))


def _noted(name: str, launcher: Any) -> Any:
    def launch(*args: Any, **named: Any) -> Any:
        note_call(name, [*args, *named.values()])
        return launcher(*args, **named)

    return launch


def note_call(operator: str, args: Sequence[Any]) -> None:
    """The dtype is that of the result, where it is an argument, or of the first floating tensor."""
    import torch

    dtypes = [x for x in args if isinstance(x, torch.dtype)]
    dtypes += [x.dtype for x in args if isinstance(x, torch.Tensor)]
    dtypes = [x for x in dtypes if x.is_floating_point]
    calls.add((operator, str(dtypes[0]).removeprefix("torch.") if dtypes else "integers"))


def _mark_new(address: int, size: int) -> None:
    """Fills a new tensor with CANARY, unless it is one of gigabytes."""
    if size > 4 * MOST_TRACKED:
        return
    bytes_at(address, size)[:] = np.full(-(-size // 4), CANARY, np.uint32).view(np.uint8)[:size]
    _new.pop(address, None)
    if len(_new) > 4096:  # the oldest, which is probably freed
        _new.pop(next(iter(_new)))
    _new[address] = size


def _flat(signature: Any, value: Any) -> list[tuple[str, Any]]:
    """Types and values of the parameters of the machine code."""
    if isinstance(signature, tuple | list):
        return [x for s, v in zip(signature, value, strict=True) for x in _flat(s, v)]
    return [] if signature == "constexpr" else [(signature, value)]


def _packed(kernel: Kernel, values: list[tuple[str, Any]]) -> np.ndarray:
    data = np.zeros(kernel.params.end, np.uint8)
    names = list(kernel.params.offsets)
    assert len(names) == len(values) + 2, (kernel.name, names, values)  # two are Triton's own
    for name, (kind, value) in zip(names, values, strict=False):
        begin, size = kernel.params.offsets[name], kernel.params.sizes[name]
        if kind.startswith("*"):
            raw = struct.pack("<Q", value.data_ptr())
        elif kind == "fp32":
            raw = struct.pack("<f", value)
        elif kind.startswith(("i", "u")):
            raw = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        else:
            raise Unsupported(f"{kernel.name}: the PTX machine does not know the type {kind}")
        data[begin : begin + size] = np.frombuffer(raw, np.uint8)
    return data


@cache
def stored_params(program: Program) -> set[int]:
    """The bytes of the parameters that addresses of stores and atomics may come from: backwards
    through all that computes them, as far as loads."""
    makers: dict[Register, list[Step]] = {}
    work: list[Register] = []
    for step in (step for steps in program.steps for step in steps):
        for register in step.writes:
            makers.setdefault(register, []).append(step)
        if step.is_method("store_global", "atomic:global"):
            work += step.bases
    seen, found = set(work), set()
    while work:
        for step in makers.get(work.pop(), ()):
            if step.is_method("load_param"):
                address = step.operation.arguments[0][0]
                assert isinstance(address, Address)
                if isinstance(address.base, Symbol):
                    found.add(program.kernel.offset(address.base) + address.offset)
                else:  # any part of any parameter
                    found.update(range(0, program.kernel.params.end, 8))
                continue
            if not step.is_method("load_global", "load_shared"):
                new = step.reads - seen
                seen |= new
                work += new
    return found


def regions_of(tensors: list[tuple[Any, bool]], threads: int) -> list[Region]:
    """What a kernel may access: from the first to the last element of each tensor. Those that it
    may store to are tracked."""
    spans: list[list[int]] = []
    for x, stored in sorted(tensors, key=lambda pair: pair[0].data_ptr()):
        if x.numel() == 0:
            continue
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        begin, item = x.data_ptr(), x.element_size()
        end = begin + extent * item
        if spans and begin < spans[-1][1]:  # views of one tensor
            last = spans[-1]
            last[1:] = max(last[1], end), min(last[2], item), last[3] | stored
        else:
            spans.append([begin, end, item, stored])
    regions = []
    for begin, end, item, stored in spans:
        region = Region(begin, end, item)
        if stored:
            region.track(threads, replicas=True)
        _find_unwritten(region)
        regions.append(region)
    return regions


def _find_unwritten(region: Region) -> None:
    for address, size in _new.items():
        if address >= region.end or region.begin >= address + size:
            continue
        words = region.bytes.view(np.uint32) == CANARY
        words[: max(address - region.start, 0) // 4] = False
        words[-(-(address + size - region.start) // 4) :] = False
        if words.any():
            bytes_ = np.repeat(words, 4)[:: 1 << region.shift]
            region.unwritten = bytes_ if region.unwritten is None else region.unwritten | bytes_


def program_of(key: str, ptx: str, name: str) -> Program:
    if key not in programs:
        (kernel,) = kernels(ptx, name)
        programs[key] = Program(kernel)
    return programs[key]


def _device() -> str:
    from triton.runtime import driver

    active: Any = driver.active
    return active.get_current_device()


def _launcher(function: Any, grid: Any) -> Any:
    """function[grid], which is called with the arguments of the kernel."""
    return partial(_run, function, grid)


def _run(function: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
    """Compiles a JITFunction as before a launch, and runs it in the machine."""
    compiled = function.run(*args, grid=None, warmup=True, **kwargs)
    binder = function.device_caches[_device()][4]
    bound = binder(*args, **kwargs)[0]
    grid = grid(bound) if callable(grid) else grid
    x, y, z = (*grid, 1, 1)[:3]
    name, metadata = compiled.metadata.name, compiled.metadata
    assert not metadata.global_scratch_size and not metadata.profile_scratch_size
    program = program_of(compiled.hash, compiled.asm["ptx"], name)
    values = [v for key, s in compiled.src.signature.items() for v in _flat(s, bound[key])]
    offsets = list(program.kernel.params.offsets.values())
    stored = stored_params(program)
    tensors = [
        (value, offset in stored)
        for (kind, value), offset in zip(values, offsets, strict=False)
        if kind.startswith("*")
    ]
    threads = 32 * metadata.num_warps
    params, regions = _packed(program.kernel, values), regions_of(tensors, threads)
    launch = Launch(program, (x, y, z), (threads, 1, 1), params, metadata.shared, regions)
    counted = None if traffic is None else traffic.setdefault(name, {})
    if x * y * z:
        order = None if seed is None else seed + sum(launches.values())
        run(launch, order, counted)
    launches[name] += 1

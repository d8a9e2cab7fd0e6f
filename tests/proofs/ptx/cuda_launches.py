"""Launches of the CUDA kernels, run by the machine. nvcc compiles csrc/cuda: the host code runs as
on a GPU, but with the CUDA runtime of cuda/runtime.cpp, which calls this module; the PTX runs on
the memory of CPU tensors.

    PTX_BACKEND=cuda PTX_ARCH=80 pytest tests/test_class_moments.py
    PTX_BACKEND=cuda PTX_ARCH=80 pytest tests/test_verify.py

The first call compiles what has changed, into build/ptx. In Python, before any tensor:

    from ptx import cuda_launches
    cuda_launches.install()
    with anchorops.use_backend("cuda"): …  # of CPU tensors

`hardware` sets other multiprocessors and shared memory, `triton_launches.seed` a random order of
the warps.
"""

import ctypes
import fcntl
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import triton_launches as shared
from .machine import Launch, run
from .memory import bytes_at
from .program import Program
from .text import kernels
from .triton_launches import regions_of, stored_params

HERE = Path(__file__).parent
BUILD = HERE.parents[2] / "build/ptx"
# the arguments of CUDA's cudaDeviceGetAttribute and cudaFuncSetAttribute
MULTIPROCESSORS, SHARED_OF_MULTIPROCESSOR, RESERVED_OF_BLOCK = 16, 81, 111
DYNAMIC_SHARED_OF_BLOCK = 8
MOST_SHARED = 99 << 10  # of a block, on every GPU from sm_80 on
MOST_WITHOUT_REQUEST = 48 << 10
NEW = ("new_empty", "new_empty_strided", "empty_like")


class Gpu(NamedTuple):
    multiprocessors: int
    shared_kilobytes: int  # of a multiprocessor


# Usually two multiprocessors, so that a block of a small input has several tiles.
SMALL = Gpu(2, 228)


def readable(names: Iterable[str]) -> list[str]:
    """Readable names of C++ functions, without result, namespaces and arguments."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    text = re.sub(r"\(anonymous namespace\)::|\b(anchorops|cuda|c10)::", "", text)
    return [line.removeprefix("void ").partition("(")[0] for line in text.splitlines()]


class Machine:
    """What the CUDA runtime asks."""

    def __init__(self, sources: Any):
        self.mangled: dict[int, str] = sources.kernels()  # by the address of the host's function
        self.names = dict(zip(self.mangled, readable(self.mangled.values()), strict=True))
        self.texts = {
            name: text
            for text in sources.modules()
            for name in re.findall(r"\.entry\s+([\w$]+)", text)
        }
        self.gpus = [SMALL]  # by the number of the device: host code asks once for each device
        self.device = 0
        self.most_shared: dict[int, int] = {}  # of kernels, where they were given more
        self.tensors: list[Tensor] = []  # of the operator that runs
        self.error: BaseException | None = None

    def attribute(self, which: int, device: int) -> int:
        gpu = self.gpus[device]
        return {
            MULTIPROCESSORS: gpu.multiprocessors,
            SHARED_OF_MULTIPROCESSOR: gpu.shared_kilobytes << 10,
            RESERVED_OF_BLOCK: 1 << 10,
        }[which]

    def set_attribute(self, kernel: int, attribute: int, value: int) -> bool:
        if attribute == DYNAMIC_SHARED_OF_BLOCK:
            self.most_shared[kernel] = value
            return value <= MOST_SHARED
        return True

    def fill(self, address: int, value: int, size: int) -> bool:
        for x in self.tensors:
            begin = x.data_ptr()
            if begin <= address and address + size <= begin + _extent(x):
                bytes_at(address, size)[:] = value
                return True
        self.error = IndexError(f"cudaMemsetAsync of {size} bytes outside of every tensor")
        return False

    def launch(
        self,
        kernel: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: int,
    ) -> bool:
        try:
            self._launch(kernel, tuple(grid), tuple(block), shared_bytes, arguments)
        except BaseException as error:  # it may not pass through C
            self.error = error
        return self.error is None

    def _launch(self, kernel: int, grid: Any, block: Any, shared_bytes: int, arguments: int):
        name = self.names[kernel]
        most = self.most_shared.get(kernel, MOST_WITHOUT_REQUEST)
        if shared_bytes > most:
            raise ValueError(f"{name}: {shared_bytes} bytes of shared memory, more than {most}")
        if name not in shared.programs:
            mangled = self.mangled[kernel]
            (found,) = kernels(self.texts[mangled], mangled)
            shared.programs[name] = Program(found._replace(name=name))
        program = shared.programs[name]
        own = program.kernel.shared.end
        if self.most_shared.get(kernel, 0) + own > MOST_SHARED:
            raise ValueError(f"{name}: {most} bytes of shared memory beside its own {own}")
        params = self._params(program, arguments)
        launch = Launch(
            program,
            grid,
            block,
            params,
            own + shared_bytes,
            regions_of(self._pointed_to(program, params), int(np.prod(block))),
        )
        counted = None if shared.traffic is None else shared.traffic.setdefault(name, {})
        order = None if shared.seed is None else shared.seed + sum(shared.launches.values())
        run(launch, order, counted)
        shared.launches[name] += 1

    def _params(self, program: Program, arguments: int) -> np.ndarray:
        params = program.kernel.params
        data = np.zeros(params.end, np.uint8)
        pointers = (ctypes.c_void_p * len(params.offsets)).from_address(arguments)
        for pointer, name in zip(pointers, params.offsets, strict=True):
            begin, size = params.offsets[name], params.sizes[name]
            data[begin : begin + size] = bytes_at(pointer, size)
        return data

    def _pointed_to(self, program: Program, params: np.ndarray) -> list[tuple[Tensor, bool]]:
        """The tensors of which a parameter, or a part of one, is an address; and whether the
        kernel may store there."""
        words = params[: len(params) // 8 * 8].view(np.uint64).tolist()
        stored, found = stored_params(program), []
        for x in self.tensors:
            begin = x.data_ptr()
            offsets = [8 * i for i, word in enumerate(words) if begin <= word < begin + _extent(x)]
            if offsets:
                found.append((x, not stored.isdisjoint(offsets)))
        return found


class _NewTensors(TorchDispatchMode):
    """Notes the tensors that host code creates."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.tensors = tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel():
            if func._opname in NEW:
                shared._mark_new(result.data_ptr(), _extent(result))
            self.tensors.append(result)
        return result


def _extent(x: Tensor) -> int:
    """Bytes from the first to the last element."""
    steps = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return (1 + steps) * x.element_size() if x.numel() else 0


machine: Machine  # since `install`


def obstacle() -> str | None:
    """Why the CUDA sources cannot be compiled here, or None."""
    for program in ("nvcc", "make", os.environ.get("CXX", "g++"), "c++filt"):
        if shutil.which(program) is None:
            return f"compiling the CUDA sources for the PTX machine needs {program}"
    if importlib.util.find_spec("pybind11") is None:
        return "the CUDA runtime of the PTX machine needs pybind11"
    return None


def build(csrc: Path = HERE.parents[2] / "csrc", out: Path = BUILD) -> Path:
    """Compiles what has changed."""
    command = ["make", "-s", "-j", str(os.cpu_count()), "-C", str(HERE / "cuda")]
    command += [f"PYTHON={sys.executable}", f"CSRC={csrc}", f"OUT={out}"]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:  # of several processes one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(made.stderr[-4000:])
    return out / "cuda_sources.so"


def install(library: Path | None = None) -> None:
    """From now on the backend `cuda` runs in the machine, for sm_80, on CPU tensors. Where the
    sources cannot be compiled, it is not usable, for this reason."""
    global machine
    import anchorops._ops  # noqa: F401  the schemas
    from anchorops import _libraries

    _libraries.ON_HOST["cuda"], _libraries.MISSING["cuda"] = True, obstacle()
    if _libraries.MISSING["cuda"] is not None:
        return
    path = str(library or build())
    loader = importlib.machinery.ExtensionFileLoader("cuda_sources", path)
    spec = importlib.util.spec_from_file_location("cuda_sources", path, loader=loader)
    assert spec is not None
    sources = importlib.util.module_from_spec(spec)
    loader.exec_module(sources)
    machine = Machine(sources)
    sources.connect(
        machine.launch,
        machine.fill,
        machine.set_attribute,
        machine.attribute,
        lambda: machine.device,
    )
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("anchorops::") and schema.overload_name == "cuda":
            _serve(schema.name.removeprefix("anchorops::"))


_library = torch.library.Library("anchorops", "IMPL")


def _serve(name: str) -> None:
    operator = getattr(torch.ops.anchorops, name).cuda
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def call(*arguments: Any) -> Any:
        shared.note_call(name, arguments)
        machine.tensors = [x for x in arguments if isinstance(x, Tensor)]
        machine.error = None
        try:
            with _NewTensors(machine.tensors):
                return operator.redispatch(cuda, *arguments)
        except RuntimeError:
            if machine.error is None:
                raise
            raise machine.error from None
        finally:
            machine.tensors = []

    _library.impl(f"{name}.cuda", call, "CPU")


def hardware(multiprocessors: int, shared_kilobytes: int) -> None:
    """Set the hardware of the GPU that the machine is from now on."""
    gpu = Gpu(multiprocessors, shared_kilobytes)
    if gpu not in machine.gpus:
        machine.gpus.append(gpu)
    machine.device = machine.gpus.index(gpu)

import numpy as np
import pytest
import torch
from emulator import BACKEND, EMULATED, controls

import anchorops as ao

# These tests need the interpreter or the emulator: tests/proofs/test_triton_interpreter.py and
# tests/proofs/test_cuda_on_host.py start processes with one of them.
collect_ignore_glob = [] if EMULATED else ["test_*.py"]


@pytest.fixture(autouse=True)
def backend():
    torch.manual_seed(0)
    with ao.use_backend(BACKEND):
        yield


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty contains NaN, or the largest integers, so that a test fails if a result was not
    written."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def patched_once(monkeypatch):
    """The interpreter patches triton.language at each call of a function by another function. For
    our own functions the launch of the kernel has already done this. It takes half of the time of
    kernels with many functions."""
    if BACKEND != "triton":
        return
    from triton.runtime.interpreter import InterpretedFunction

    patching = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("anchorops."):
            return self.rewrite()(*args, **kwargs)
        return patching(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)


@pytest.fixture
def set_hardware():
    """The emulator's number of multiprocessors, and KB of shared memory of each; otherwise those of
    an H200."""
    if BACKEND != "cuda":
        pytest.skip("Triton's plans depend on shapes alone")
    set_hardware = controls().set_hardware
    yield set_hardware
    set_hardware(132, 228)


@pytest.fixture
def set_order():
    """The order in which the emulator's threads run: a seed, or 0 for the usual one."""
    if BACKEND != "cuda":
        pytest.skip("programs of the interpreter have no threads")
    set_order = controls().set_order
    yield set_order
    set_order(0)


@pytest.fixture(params=[(7, 228), (58, 100)], ids=["7 multiprocessors", "L4"])
def other_gpu(request, set_hardware) -> None:
    set_hardware(*request.param)


@pytest.fixture
def sorted_by_numpy(monkeypatch):
    """NumPy sorts, because Triton's sorting network takes four fifths of the interpreter's time."""
    if BACKEND != "triton":
        return
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def sort(x):
        return tl.tensor(TensorHandle(np.sort(x.handle.data), x.handle.dtype), x.type)

    monkeypatch.setattr(tl, "sort", sort)


@pytest.fixture(params=["tiles", "sorted"] if BACKEND == "triton" else ["tiles"])
def path(request, monkeypatch):
    """Makes Triton sum pixels tile by tile, or sorted by key, for any shape."""
    if BACKEND != "triton":
        return
    from anchorops.kernels import class_moments, launch

    chunks_of = {"tiles": lambda *args: max(1, launch.chunks_of(*args)), "sorted": lambda *args: 0}
    monkeypatch.setattr(class_moments, "chunks_of", chunks_of[request.param])

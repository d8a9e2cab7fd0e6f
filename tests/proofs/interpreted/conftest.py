import pytest
from emulator import BACKEND, EMULATED

# These tests need the interpreter or the emulator: tests/proofs/test_triton_interpreter.py and
# tests/proofs/test_cuda_on_host.py start processes with one of them.
collect_ignore_glob = [] if EMULATED else ["test_*.py"]


@pytest.fixture(autouse=True)
def emulated(backend: str) -> None:
    """Every test is of kernels."""


@pytest.fixture(params=["tiles", "sorted"] if BACKEND == "triton" else ["tiles"])
def path(request, monkeypatch):
    """Makes Triton sum pixels tile by tile, or sorted by key, for any shape."""
    if BACKEND != "triton":
        return
    from anchorops.kernels import class_moments, launch

    chunks_of = {"tiles": lambda *args: max(1, launch.chunks_of(*args)), "sorted": lambda *args: 0}
    monkeypatch.setattr(class_moments, "chunks_of", chunks_of[request.param])

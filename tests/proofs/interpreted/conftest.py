import pytest
from emulator import EMULATED

# These tests need the interpreter or the emulator: tests/proofs/test_triton_interpreter.py and
# tests/proofs/test_cuda_on_host.py start processes with one of them.
collect_ignore_glob = [] if EMULATED else ["test_*.py"]


@pytest.fixture(autouse=True)
def emulated(backend: str) -> None:
    """Every test is of kernels."""

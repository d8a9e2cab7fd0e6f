import ctypes
from collections.abc import Iterator

import pytest
import torch

M_PERTURB = -6  # glibc's <malloc.h>


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised tensors of torch contain NaN, and other new memory the bytes 0x7f (as float32
    3e38), so that a test fails if a result was not written."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("poisoned memory needs glibc's mallopt")
    libc.mallopt(M_PERTURB, 0x7F ^ 0xFF)
    assert (torch.empty(4096, dtype=torch.uint8) == 0x7F).all()
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    libc.mallopt(M_PERTURB, 0)

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
    """Tensors torch leaves uninitialised hold NaN, all other new memory the bytes 0x7f (as float32
    3e38), so that nothing unwritten passes for a result."""
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

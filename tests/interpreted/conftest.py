import pytest
import torch

import anchorops as ao


@pytest.fixture(autouse=True)
def triton_backend():
    torch.manual_seed(0)
    with ao.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty holds NaN, integers their maximum: nothing unwritten passes for a result."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)

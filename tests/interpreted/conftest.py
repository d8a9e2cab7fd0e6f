import numpy as np
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


@pytest.fixture
def sorted_by_numpy(monkeypatch):
    """Triton's sorting network takes four fifths of the interpreter's time: for class_keys.py."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def sort(x):
        return tl.tensor(TensorHandle(np.sort(x.handle.data), x.handle.dtype), x.type)

    monkeypatch.setattr(tl, "sort", sort)

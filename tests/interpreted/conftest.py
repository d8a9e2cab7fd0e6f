import numpy as np
import pytest
import torch
from emulator import BACKEND

import anchorops as ao


@pytest.fixture(autouse=True)
def backend():
    torch.manual_seed(0)
    with ao.use_backend(BACKEND):
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
    if BACKEND != "triton":
        return
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def sort(x):
        return tl.tensor(TensorHandle(np.sort(x.handle.data), x.handle.dtype), x.type)

    monkeypatch.setattr(tl, "sort", sort)


@pytest.fixture(params=["tiles", "sorted"])
def path(request, monkeypatch):
    """Triton sums tiles of pixels, or pixels sorted by key: it goes this way, whatever the shapes.
    Gives the kind of anchors to take: with learnable ones the pixels are always sorted."""
    if BACKEND != "triton":
        if request.param == "sorted":
            pytest.skip("Triton alone sorts pixels by key")
        return "learnable"
    from anchorops.kernels import class_moments, launch

    chunks_of = {"tiles": lambda *args: max(1, launch.chunks_of(*args)), "sorted": lambda *args: 0}
    monkeypatch.setattr(class_moments, "chunks_of", chunks_of[request.param])
    return {"tiles": "fixed", "sorted": "learnable"}[request.param]

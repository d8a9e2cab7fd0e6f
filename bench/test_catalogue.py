"""The calls of `anchorops-doctor --benchmark`, by pytest-benchmark. For comparing two versions of a
kernel:

    pytest bench --benchmark-autosave
    pytest bench --benchmark-compare -k cross-entropy
"""

from typing import Any

import pytest
import torch

import anchorops as ao
from anchorops.doctor.benchmark import TINY, Call, calls

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("call", list(calls(DEVICE)), ids=str)
def test_call(call: Call, benchmark: Any) -> None:
    """With --benchmark-disable the inputs are tiny, and each call runs once."""
    benchmark.group = str(call.case)
    step = call.step(call.inputs(1 if benchmark.enabled else TINY, DEVICE))

    def run() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with ao.use_backend("auto" if call.backend == "torch" else call.backend):
        benchmark(run)

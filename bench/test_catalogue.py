"""Each operator and loss of the catalogue beside torch's formula, forward and backward, by
pytest-benchmark. For comparing two versions of a kernel:

    pytest bench --benchmark-autosave
    pytest bench --benchmark-compare -k cross-entropy
"""

from typing import Any

import pytest
import torch

import anchorops as ao
from anchorops._libraries import unusable
from anchorops.doctor.benchmark import TINY, inputs_of, step_of
from anchorops.doctor.catalogue import Case, cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = ("cuda", "triton") if DEVICE.type == "cuda" else ("cpu",)


@pytest.mark.parametrize("backend", ["torch", *FUSED])
@pytest.mark.parametrize("case", cases("bench"), ids=str)
def test_case(case: Case, backend: str, benchmark: Any) -> None:
    """With --benchmark-disable the inputs are tiny, and each call runs once."""
    if backend != "torch" and backend not in case.entry.backends:
        pytest.skip(f"{backend} has no kernel of it")
    if backend != "torch" and (why := unusable()[backend]):
        pytest.skip(why)
    benchmark.group = str(case)
    inputs = inputs_of(case, 1 if benchmark.enabled else TINY, DEVICE)
    step = step_of(case.formula if backend == "torch" else case.ours, inputs)

    def run() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with ao.use_backend("auto" if backend == "torch" else backend):
        benchmark(run)

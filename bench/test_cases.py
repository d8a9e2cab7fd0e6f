"""The cases of users in cases/listed.py, by pytest-benchmark. For comparing two versions of a
kernel:

    pytest bench --benchmark-autosave
    pytest bench --benchmark-compare -k cross-entropy
"""

from typing import Any

import pytest
import torch
from cases.listed import IMAGES, VOLUMES, Case, cases_on
from cases.operations import Library
from operator_times import Implementation, implementations, run_of, usable

import anchorops as ao

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("case", "one"),
    [
        pytest.param(case, one, id=f"{case}, {one.name}")
        for case in cases_on(DEVICE.type)
        if case.shape.name not in (IMAGES, VOLUMES)
        for one in implementations(DEVICE.type, case, usable(DEVICE))
        if not one.compiled and not isinstance(one.formula, Library)
    ],
)
def test_call(case: Case, one: Implementation, benchmark: Any) -> None:
    """With --benchmark-disable the inputs are tiny, and each call runs once."""
    benchmark.group = str(case)
    case = case._replace(shape=case.shape.on(DEVICE, not benchmark.enabled))

    with ao.use_backend(one.backend or "auto"):
        call = run_of(one.formula, case.inputs(DEVICE), case.direction)

        def run() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark(run)

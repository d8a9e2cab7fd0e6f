"""The host's work of a call: operators that torch dispatches, and that profilers see; launches."""

import json
from pathlib import Path

import host_time
import pytest
import torch

from tests.helpers.operators import Operators

CALLS = {name: loss for _, group in host_time.calls("cpu") for name, loss in group.items()}
MOST = {  # operators, forward and backward
    "pixel_cross_entropy": 8,
    "CrossEntropy": 10,
    "CrossEntropyDice": 30,
    "pixel_to_anchor_mse": 12,
}


@pytest.mark.on("cpu")
@pytest.mark.parametrize("name", MOST)
def test_operators(name: str, backend: str) -> None:
    with Operators() as operators:
        CALLS[name]().backward()
    assert len(operators.names) <= MOST[name], operators.names
    assert any(operator.startswith("anchorops.") for operator in operators.names)


def names_of_profiler(**options: bool) -> set[str]:
    config = torch._C._profiler._ExperimentalConfig(**options)  # pyright: ignore
    with torch.profiler.profile(experimental_config=config) as profile:
        CALLS["CrossEntropy"]().backward()
    return {event.name for event in profile.events() or ()}


def names_of_trace(path: Path) -> set[str]:
    observer = torch.profiler.ExecutionTraceObserver().register_callback(str(path))
    observer.start()
    CALLS["CrossEntropy"]().backward()
    observer.unregister_callback()
    return {node["name"] for node in json.loads(path.read_text())["nodes"]}


@pytest.mark.on("cpu", "simulated_triton")
@pytest.mark.parametrize("profiler", ["profile", "profile_all_threads", "ExecutionTraceObserver"])
def test_profilers_name_the_operators(profiler: str, backend: str, tmp_path: Path) -> None:
    if profiler == "ExecutionTraceObserver":
        names = names_of_trace(tmp_path / "trace.json")
    else:
        names = names_of_profiler(profile_all_threads=profiler == "profile_all_threads")
    assert {"anchorops::softmax_moments", "anchorops::softmax_moments_backward"} <= names


@pytest.mark.on("cpu")
@pytest.mark.parametrize("name", MOST)
def test_kernels_make_their_outputs_without_the_dispatcher(name: str, backend: str) -> None:
    with torch.autograd.profiler.profile() as profile:
        CALLS[name]().backward()
    events = profile.function_events or ()
    operators = [event for event in events if event.name.startswith("anchorops::")]
    inside = {part.name for event in operators for part in event.cpu_children}
    assert operators and not any("empty" in x or "zeros" in x for x in inside), inside


@pytest.mark.on("simulated_triton")
@pytest.mark.parametrize("name", MOST)
def test_launches(name: str, backend: str) -> None:
    from ptx.triton_launches import launches

    before = launches.total()
    CALLS[name]().backward()
    # the moments, their sums and gradient; those of classes also make keys and list them by tile
    assert launches.total() - before == (5 if name == "pixel_to_anchor_mse" else 3)

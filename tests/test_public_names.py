"""Public names: those that have moved warn, and no function hides a module."""

import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import anchorops as ao

MOVED = [(module, name) for module in (ao.ops, ao.anchors) for name in module.__all__]


@pytest.mark.parametrize(("module", "name"), MOVED, ids=[name for _, name in MOVED])
def test_old_names_warn(module: ModuleType, name: str) -> None:
    message = f"^anchorops.{name} is removed in version 0.2; use {module.__name__}.{name}$"
    with pytest.warns(DeprecationWarning, match=message) as caught:
        actual = getattr(ao, name)
    assert actual is getattr(module, name)
    assert caught[0].filename == __file__
    assert name not in ao.__all__


def test_old_names_compile() -> None:
    features, labels = torch.randn(8, 3), torch.arange(8) % 2

    @torch.compile(fullgraph=True, backend="eager")
    def sums() -> torch.Tensor:
        return ao.class_moments(features, labels, 2).sums  # type: ignore[attr-defined]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        actual = sums()
    assert torch.equal(actual, ao.ops.class_moments(features, labels, 2).sums)


def test_present_names_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(getattr(ao, name) for name in ao.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ao.nothing  # type: ignore[attr-defined]


NAMES = """
import sys
sys.modules.update({without})
import anchorops as ao
names = set(dir(ao))
print({{"MeanIoU", "diagnostics", "measure", "plots", "SAR"}} - names, "MeanIoU" in ao.__all__)
print(ao.measure.measure.__module__)
from anchorops import *
print("MeanIoU" in globals())
"""


@pytest.mark.parametrize("without", ["", "matplotlib=None, torchmetrics=None"])
def test_names_that_are_imported_at_first_use(without: str) -> None:
    """They are listed, also without their packages, but a star does not import what is missing."""
    if not without:
        pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    code = NAMES.format(without=without)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    known = str(not without)
    assert run.stdout.splitlines() == [f"set() {known}", "anchorops.measure", known]


def test_no_function_hides_a_module() -> None:
    modules = {path.stem for path in Path(ao.__file__).parent.iterdir()}
    assert "_attach" in modules and not modules & set(ao.__all__)

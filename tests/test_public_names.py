"""Public names: they can be imported, and no function hides a module."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import anchorops as ao


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

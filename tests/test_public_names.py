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


IMPORTED_AGAIN = """
import sys

import torch

import anchorops as first

logits, labels = torch.randn(2, 4, 5, 6, requires_grad=True), torch.randint(0, 4, (2, 10, 12))
for name in [name for name in sys.modules if name.split(".")[0] == "anchorops"]:
    del sys.modules[name]
import anchorops as second

assert first is not second
losses = [ao.CrossEntropyDice()(logits, labels) for ao in (first, second)]
assert torch.equal(*losses)
gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
assert torch.equal(*gradients)
compiled = torch.compile(second.pixel_cross_entropy, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(logits, labels), first.pixel_cross_entropy(logits, labels))
"""


def test_a_second_import() -> None:
    """Of a program that removes modules from sys.modules. The operators remain."""
    subprocess.run([sys.executable, "-c", IMPORTED_AGAIN], check=True)

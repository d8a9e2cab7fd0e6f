"""torch.jit.script of changed models: an error that says what to do, and what it says works."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anchorops as ao
from anchorops.doctor.catalogue.features import METHODS
from tests.helpers.calls import LOSSES, SIGMOIDS

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = nn.Conv2d(3, 64, 3, 8, 1), nn.Conv2d(64, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.interpolate(self.body(x), size=[32, 32], mode="bilinear")
        return torch.nn.functional.interpolate(self.classifier(x), size=[64, 64], mode="bilinear")


OTHERS = LOSSES | SIGMOIDS | {"MaskLoss": ao.MaskLoss}
CHANGES = {
    "low_resolution": lambda model, x: ao.low_resolution(model, x).remove,
    "late_upsampling": lambda model, x: ao.late_upsampling(model, x).remove,
    "SAR": lambda model, x: ao.attach(model, ao.SAR(5, 64)).detach,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a part of it"])
def test_script_is_refused(name: str, inside: bool) -> None:
    model, x = Net().eval(), torch.randn(1, 3, 64, 64)
    expected = model(x)
    undo: Callable[[], None] = CHANGES[name](model, x)
    whole = nn.Sequential(model) if inside else model
    with pytest.raises(RuntimeError, match=rf"torch.jit.script: .*{name}.* is no TorchScript"):
        torch.jit.script(whole)
    traced: Any = torch.jit.trace(whole.eval(), x)
    torch.testing.assert_close(traced(x), expected)
    program = torch.export.export(whole.eval(), (x,))
    torch.testing.assert_close(program.module()(x), expected)
    undo()
    torch.testing.assert_close(torch.jit.script(whole)(x), expected)


@pytest.mark.parametrize("name", METHODS | OTHERS)
def test_a_loss_that_the_model_does_not_call(name: str) -> None:
    model, x = Net().eval(), torch.randn(1, 3, 64, 64)
    model.loss = METHODS[name](5, 64) if name in METHODS else OTHERS[name]()
    scripted: Any = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    assert scripted.state_dict().keys() == model.state_dict().keys()

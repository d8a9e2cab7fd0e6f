"""attach and torch.ao.quantization, which is deprecated: it replaces layers, and registers their
hooks again without with_kwargs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from torch import Tensor, nn

import anchorops as ao
from anchorops.doctor.catalogue.features import METHODS

K, D = 5, 8
IMAGES, LABELS = torch.randn(2, 3, 6, 6), torch.randint(0, K, (2, 16))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.relu = nn.Conv2d(3, D, 3), nn.ReLU()
        self.dropout, self.classifier = nn.Dropout(), nn.Linear(D, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(self.quant(x))).flatten(2).mT
        return self.dequant(self.classifier(self.dropout(x)))


def fuse_modules(model: nn.Module) -> nn.Module:
    return quantization.fuse_modules(model.eval(), [["conv", "relu"]])


def prepare_qat(model: nn.Module) -> nn.Module:
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # pyright: ignore
    return quantization.prepare_qat(model.train())


def convert(model: nn.Module) -> nn.Module:
    model.qconfig = quantization.get_default_qconfig("fbgemm")  # pyright: ignore
    model = quantization.prepare(model.eval())
    model(IMAGES)
    return quantization.convert(model)


def quantize_dynamic(model: nn.Module) -> nn.Module:
    return quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore")  # of what is deprecated
@pytest.mark.parametrize("change", [fuse_modules, prepare_qat, convert, quantize_dynamic])
@pytest.mark.parametrize("method", ["SAR", "CBP"])
def test_the_method_stays(method: str, change: Callable[[nn.Module], nn.Module]) -> None:
    """Training goes on, or evaluation does and training says what to do."""
    model: Any = Net()
    ao.attach(model, METHODS[method](K, D))
    expected = copy.deepcopy(model).eval()(IMAGES)
    if change is prepare_qat and method == "CBP":
        with pytest.raises(TypeError, match="as parameter 'weight'"):  # as the docstring says
            change(model)
        return
    model = change(model)
    attachment = model.regularizer.attachment
    if method == "SAR":  # its layers are not quantised
        assert type(model.regularizer.embedding[0]) is nn.Linear
    if change in (fuse_modules, prepare_qat):
        loss = model.train()(IMAGES).mean() + attachment(LABELS)
        loss.backward()
        assert loss.isfinite() and attachment.classifier is model.classifier
        return
    torch.testing.assert_close(model.eval()(IMAGES), expected, rtol=0.1, atol=0.1)
    model.train()
    with pytest.raises(ValueError, match=r"not quantised: call detach|features: expected float32"):
        model(IMAGES)
        attachment(LABELS)

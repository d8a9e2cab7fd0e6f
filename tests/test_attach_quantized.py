"""attach and torch.ao.quantization, which replaces layers and registers their hooks again."""

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
IMAGES, LABELS = torch.randn(2, 3, 6, 6), torch.randint(0, K, (2, 6, 6))
# CBP has a parameter there, in "CBP" a buffer
PARAMETERS = ("SAR", "OCCL", "CeCo", "MVSC", "CBP, penalty")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.relu, self.dropout = nn.Conv2d(3, D, 3, padding=1), nn.ReLU(), nn.Dropout()
        self.classifier = nn.Conv2d(D, K, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.relu(self.conv(self.quant(x))))
        return self.dequant(self.classifier(x))


def fuse(model: nn.Module) -> nn.Module:
    return quantization.fuse_modules(model.eval(), [["conv", "relu"]])


def prepare_qat(model: nn.Module) -> nn.Module:
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # pyright: ignore
    return quantization.prepare_qat(model.train())


def convert(model: nn.Module) -> nn.Module:
    model.qconfig = quantization.get_default_qconfig("fbgemm")  # pyright: ignore
    model = quantization.prepare(fuse(model))
    model(IMAGES)
    return quantization.convert(model)


def convert_qat(model: nn.Module) -> nn.Module:
    model = prepare_qat(model)
    model(IMAGES)
    return quantization.convert(model.eval())


@pytest.mark.parametrize("change", [fuse, prepare_qat])
@pytest.mark.parametrize("method", PARAMETERS)
def test_training_goes_on(method: str, change: Callable[[nn.Module], nn.Module]):
    model = Net()
    ao.attach(model, METHODS[method](K, D))
    model: Any = change(model).train()
    attachment = model.regularizer.attachment
    for _ in range(2):
        model(IMAGES)
        loss = attachment(LABELS)
        loss.backward()
        assert loss.isfinite()
    assert attachment.classifier is model.classifier
    if method == "SAR":  # its layers are not quantised
        assert type(model.regularizer.embedding[0]) is nn.Linear
        assert all(x.grad is not None for x in model.regularizer.parameters())
    attachment.detach()
    model(IMAGES)
    assert attachment.features is None and not hasattr(model, "regularizer")


@pytest.mark.parametrize("change", [convert, convert_qat])
@pytest.mark.parametrize("method", [*PARAMETERS, "CBP"])
def test_evaluation_goes_on(method: str, change: Callable[[nn.Module], nn.Module]):
    model = Net()
    if method == "CBP" and change is convert_qat:
        pytest.skip("prepare_qat refuses a buffer: test_cbp_after_prepare_qat")
    ao.attach(model, METHODS[method](K, D))
    expected = copy.deepcopy(model).eval()(IMAGES)
    model: Any = change(model).eval()
    assert "Quantized" in repr(model.classifier)
    torch.testing.assert_close(model(IMAGES), expected, rtol=0.1, atol=0.1)
    model.train()
    with pytest.raises(ValueError, match=r"not quantised: call detach|features: expected float32"):
        model(IMAGES)
        model.regularizer.attachment(LABELS)


def test_cbp_after_prepare_qat():
    """It makes a buffer of the weight."""
    model = Net()
    cbp = ao.attach(model, ao.CBP(K, D))
    with pytest.raises(TypeError, match="as parameter 'weight'"):  # as the docstring says
        prepare_qat(model)
    cbp.detach()
    model: Any = prepare_qat(model)
    cbp = ao.attach(model, ao.CBP(K, D))
    model(IMAGES)
    cbp(LABELS)
    assert torch.equal(model.classifier.weight.flatten(1), cbp.regularizer.basis)
    quantised: Any = quantization.convert(model.eval())
    weight = quantised.classifier.weight().dequantize().flatten(1)
    torch.testing.assert_close(weight, cbp.regularizer.basis, rtol=0.02, atol=0.02)


def test_a_layer_with_the_method_inside():
    """A Sequential would call the method, which is therefore a part of the classifier."""
    net = Net()
    model = nn.Sequential(net.quant, net.conv, net.classifier, net.dequant)
    attachment = ao.attach(model, ao.SAR(K, D))
    changed = prepare_qat(model)
    with pytest.raises(RuntimeError, match=r"^SAR: layer 2, .* first replace the layer, then att"):
        changed(IMAGES)
    assert changed.eval()(IMAGES).isfinite().all()
    attachment.detach()
    attachment = ao.attach(prepare_qat(model), ao.SAR(K, D))
    attachment.classifier.train()

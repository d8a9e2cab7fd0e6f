"""attach: CBP replaces a classifier's weight; weights that are computed, shared or quantised."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized import dynamic
from torch.nn.utils import parametrizations, prune

import anchorops as ao
from tests.helpers.small_networks import D, K, Net, backward, batch

REPARAMETRIZED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", REPARAMETRIZED)
def test_a_weight_that_is_computed(how: str) -> None:
    """CBP does not replace it. The loss of another method, and the gradient of the features, are
    those of a classifier with these values."""
    model = Net()
    REPARAMETRIZED[how](model.classifier)
    state = copy.deepcopy(model.state_dict())
    for method in (ao.CBP(K, D), ao.Combined(ao.OCCL(K, D), ao.CBP(K, D))):
        with pytest.raises(ValueError, match=r"CBP: classifier: .* a parameter: .*remove_param"):
            ao.attach(model, method)
    assert model.classifier.bias is not None
    assert not model.classifier._forward_pre_hooks or "old" in how or how in ("pruned", "bias")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    attached, alone = ao.attach(model, ao.OCCL(K, D)), ao.OCCL(K, D)
    x, labels = batch()
    model(x)
    weight, bias = (t.detach().clone() for t in (model.classifier.weight, model.classifier.bias))
    plain = nn.Conv2d(D, K, 1)
    plain.load_state_dict({"weight": weight, "bias": bias})
    features = attached.features
    assert features is not None
    want = features.detach().requires_grad_()
    expected = alone(want, labels, plain)
    loss = attached(labels)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, want)[0])


def test_cbp_does_not_replace_a_weight_of_two_modules() -> None:
    model = Net()
    model.aux_head.weight = model.classifier.weight
    with pytest.raises(ValueError, match=r"attach: module: .* got classifier, .* aux_head shares"):
        ao.attach(model, ao.CBP(K, D))
    ao.attach(model, ao.OCCL(K, D))  # reads it


def test_cbp_does_not_replace_a_quantised_weight() -> None:
    model = Net()
    weight = nn.Parameter(torch.zeros(K, D, 1, 1, dtype=torch.int8), requires_grad=False)
    model.classifier.weight = weight
    with pytest.raises(ValueError, match="CBP: classifier: expected a weight that is not quantis"):
        ao.attach(model, ao.CBP(K, D))
    with pytest.raises(ValueError, match="OCCL: classifier: expected a weight that is not quant"):
        ao.OCCL(K, D)(torch.zeros(2, D, 4, 4), torch.zeros(2, 4, 4).long(), model.classifier)
    layer = dynamic.Linear(D, K)
    with pytest.raises(ValueError, match=r"OCCL: classifier: .* not quantised: call detach"):
        ao.OCCL(K, D)(torch.zeros(2, D, 4, 4), torch.zeros(2, 4, 4).long(), layer)


def test_lora() -> None:
    """PEFT puts the layer inside a module with the adapter; loralib adds parameters to it."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Conv2d(D, K, 1)
            self.lora_A, self.lora_B = nn.Conv2d(D, 2, 1), nn.Conv2d(2, K, 1)

    for classifier in (Inside(), nn.Conv2d(D, K, 1)):
        model: Any = Net()
        model.aux_head = nn.Identity()
        model.classifier = classifier
        if isinstance(classifier, nn.Conv2d):
            classifier.register_parameter("lora_A", nn.Parameter(torch.zeros(2, D)))
        for method in (ao.OCCL(K, D), ao.SAR(K, D), ao.CBP(K, D)):
            with pytest.raises(ValueError, match=r"attach: module: .* without an adapter"):
                ao.attach(model, method)
        ao.attach(model, ao.SAR(K, D, embed=False))


def test_checkpoints_of_models_without_cbp_do_not_replace_its_rows() -> None:
    plain, model = Net(), Net()
    cbp = ao.attach(model, ao.CBP(K, D))
    rows = model.classifier.weight.clone()
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"CBP: state_dict: .* one with classifier.bias$"):
            copied.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(copied.classifier.weight, rows)
    other = Net()
    ao.attach(other, ao.CBP(K, D))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.classifier.weight, rows)
    cbp.detach()
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got rows of lengths"),
        ({"length": None}, "got rows with cosines of up to"),
        ({"orthogonalize": False}, "got rows of lengths"),
    ],
    ids=str,
)
def test_checkpoints_without_cbp_of_a_classifier_without_bias(
    options: dict[str, Any], message: str
) -> None:
    plain, model, other = (nn.Sequential(nn.Conv2d(D, K, 1, bias=False)) for _ in range(3))
    for each in (model, other):
        ao.attach(each, ao.Combined(ao.CBP(K, D, **options)) if options else ao.CBP(K, D))
    classifier: Any = model[0]
    rows = classifier.weight.clone()
    with pytest.raises(ValueError, match=rf"CBP: state_dict: .*{message}"):
        model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(classifier.weight, rows)
    for dtype in (torch.float32, torch.bfloat16):
        saved = {name: x.to(dtype) for name, x in model.state_dict().items()}
        other.load_state_dict(saved)
        assert torch.equal(other[0].weight, rows.to(dtype).float())


@pytest.mark.parametrize("update", ["ema", "penalty", "gradient", "frozen"])
def test_cbp_that_moves_no_rows_warns_once(update: str, recwarn: pytest.WarningsRecorder) -> None:
    features, labels = torch.randn(2, D, 4, 4), torch.randint(0, K, (2, 4, 4))
    cbp, classifier = ao.CBP(K, D, update=update), nn.Conv2d(D, K, 1)
    cbp.eval()(features, labels, classifier)
    model = Net()
    attached = ao.attach(model, ao.CBP(K, D, update=update))
    backward(model, attached)
    attached.detach()
    assert not recwarn
    warnings.simplefilter("always")
    for method in (cbp, cbp, attached.regularizer):
        method.train()(features, labels, classifier)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == 2
    assert all("was not attached: call anchorops.attach" in message for message in messages)


def test_penalty_needs_its_parameter() -> None:
    model = Net()
    cbp = ao.attach(model, ao.CBP(K, D, update="penalty"), model.classifier)
    copies: Any = (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    for copied in copies:
        backward(copied, copied.regularizer.attachment)
    model.to(torch.float64).float()
    backward(model, cbp)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(ValueError, match=r'for update="penalty" .* assign=False'):
        model(batch()[0])


def test_a_frozen_basis_stays_frozen_and_detach_restores_the_order() -> None:
    classifier = nn.Conv2d(D, K, 1)
    model = nn.Sequential(nn.Conv2d(3, D, 1), classifier)
    before = [name for name, _ in model.named_parameters()]
    attachment = ao.attach(model, ao.CBP(K, D))
    model.requires_grad_(True)  # as after the warm-up of a backbone
    basis = classifier.weight.clone()
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.step()
    assert torch.equal(classifier.weight, basis)
    attachment.detach()
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.parametrize("update", ["frozen", "gradient", "ema", "penalty"])
@pytest.mark.parametrize("bias", [False, True])
def test_installed_and_uninstalled_twice(update: str, bias: bool) -> None:
    model, cbp = Net(), ao.CBP(K, D, update=update)
    classifier = model.classifier = nn.Conv2d(D, K, 1, bias=bias)
    before = {name: x.clone() for name, x in classifier.state_dict().items()}
    attached = ao.attach(model, cbp)
    with pytest.raises(ValueError, match=r"^CBP: classifier: expected the first one: call unins"):
        cbp.install(classifier)
    backward(model, attached)
    attached.detach()
    cbp.uninstall(classifier)
    assert isinstance(classifier.weight, nn.Parameter) and (classifier.bias is not None) == bias
    assert all(torch.equal(x, before[name]) for name, x in classifier.state_dict().items())

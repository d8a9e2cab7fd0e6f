"""Methods in models that peft trains: it freezes all parameters but those of its adapters."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import anchorops as ao
from tests.helpers.small_networks import D, K, Net

pytestmark = pytest.mark.filterwarnings("error")  # but for those that a test expects
METHODS = {"SAR": ao.SAR, "CeCo": ao.CeCo}


def with_lora(model: nn.Module, modules_to_save: list[str] | None = None) -> nn.Module:
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["body"], modules_to_save=modules_to_save)
    ).train()


def gradients(model: nn.Module, method: Callable[[Tensor], Tensor]) -> set[str]:
    """The parameters that get a gradient from the method."""
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, K, (2, 32, 32))
    model(images)
    method(labels).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_frozen_parameters_are_told_once(name: str) -> None:
    model = Net()
    method = ao.attach(model, METHODS[name](K, D))
    model = with_lora(model)
    with pytest.warns(UserWarning, match=f"{name}: its parameters are frozen.*modules_to_save"):
        trained = gradients(model, method)
    assert all("lora" in x for x in trained)
    gradients(model, method)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("modules_to_save", [None, ["classifier"]])
def test_attached_afterwards(name: str, modules_to_save: list[str] | None) -> None:
    model = with_lora(Net(), modules_to_save)
    method = ao.attach(model, METHODS[name](K, D))
    trained = gradients(model, method)
    assert any(x.startswith("regularizer.") for x in trained)
    assert any("lora" in x for x in trained)


@pytest.mark.parametrize("name", METHODS)
def test_modules_to_save(name: str) -> None:
    model = Net()
    method = ao.attach(model, METHODS[name](K, D))
    model = with_lora(model, ["regularizer"])
    trained = gradients(model, method)
    assert any("regularizer.modules_to_save" in x for x in trained)
    method_copies = [x for x in model.modules() if isinstance(x, METHODS[name])]
    assert [x.attachment for x in method_copies] == [method, None]  # the model is not copied
    assert method.terms
    saved = peft.get_peft_model_state_dict(model)
    assert any("regularizer" in x for x in saved)


def test_a_merged_model_keeps_its_method() -> None:
    model: Any = with_lora(Net())
    method = ao.attach(model.get_base_model(), ao.SAR(K, D))
    gradients(model, method)
    merged = model.merge_and_unload()
    merged.requires_grad_().zero_grad()  # LoRA had frozen the network
    assert any(x.startswith("regularizer.") for x in gradients(merged, method))


def test_a_method_without_parameters_tells_nothing() -> None:
    model = Net()
    method = ao.attach(model, ao.OCCL(K, D))
    gradients(with_lora(model), method)


def test_evaluation_tells_nothing() -> None:
    method = ao.SAR(K, D).requires_grad_(False).eval()
    method(torch.randn(2, D, 8, 8), torch.randint(0, K, (2, 8, 8)), nn.Conv2d(D, K, 1))

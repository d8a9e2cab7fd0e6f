"""PyTorch's own test cases of CrossEntropyLoss and BCEWithLogitsLoss: values and gradients.

torch.testing._internal has the inputs; the expected result is that of torch's module. Not ours, and
therefore left out: targets that are probabilities, inputs without a batch axis, and weights of
BCEWithLogitsLoss that are not those of single labels (`pixel_weights`).
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import anchorops as ao


def module_cases(name: str) -> list[Any]:
    (info,) = [info for info in module_db if info.name == name]
    return list(
        info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=True, training=True
        )
    )


def operator_cases(name: str) -> list[Any]:
    (info,) = [info for info in op_db if info.name == name]
    return list(info.sample_inputs("cpu", torch.float64, requires_grad=True))


def check(ours: Tensor, theirs: Tensor, logits: Tensor) -> None:
    if theirs.isnan().any():  # the mean over no pixels: documented as 0
        assert ours == 0
        return
    torch.testing.assert_close(ours, theirs)
    weights = torch.rand_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits, weights)[0],
        torch.autograd.grad(theirs, logits, weights)[0],
    )


def flat(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """More than three axes of pixels become one."""
    return (logits, labels) if logits.dim() < 6 else (logits.flatten(2), labels.flatten(1))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_cross_entropy_loss(backend):
    seen = 0
    for case in module_cases("nn.CrossEntropyLoss"):
        logits, labels = case.forward_input.args
        options = dict(case.constructor_input.kwargs)
        if labels.is_floating_point() or labels.dim() == 0:
            continue
        if "weight" in options:  # random numbers; a negative weight is an error of ao.CrossEntropy
            options["weight"] = options["weight"].detach().abs()
        theirs = torch.nn.CrossEntropyLoss(**options)(logits, labels)
        options.setdefault("ignore_index", -100)
        with ao.use_backend(backend):
            ours = ao.pixel_cross_entropy(*flat(logits, labels), **options)
            if options.get("reduction", "mean") == "mean":
                options.pop("reduction", None)
                check(ao.CrossEntropy(**options)(*flat(logits, labels)), theirs, logits)
                theirs = torch.nn.CrossEntropyLoss(**options)(logits, labels)
            check(ours.view_as(theirs), theirs, logits)
        seen += 1
    assert seen >= 40


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bce_with_logits_loss(backend):
    seen = 0
    cases = [
        (case.forward_input.args, case.constructor_input.kwargs)
        for case in module_cases("nn.BCEWithLogitsLoss")
    ] + [
        ((case.input, *case.args), case.kwargs)
        for case in operator_cases("nn.functional.binary_cross_entropy_with_logits")
    ]
    for (logits, target), options in cases:
        if logits.dim() < 2:
            continue
        target = target.detach().round().clamp(0, 1)  # hard labels
        weight, reduction = options.get("weight"), options.get("reduction", "mean")
        theirs = torch.nn.BCEWithLogitsLoss(**options)(logits, target)
        pos_weight = options.get("pos_weight")
        pos_weight = None if pos_weight is None else pos_weight.detach()
        labels = target.long()
        with ao.use_backend(backend):
            if weight is None:
                ours = ao.pixel_binary_cross_entropy(
                    logits, labels, pos_weight=pos_weight, reduction=reduction
                )
            elif reduction == "mean":  # torch divides by the number of labels
                weight = weight.detach().expand_as(logits)
                ours = ao.BinaryCrossEntropy(pos_weight)(logits, labels, weight) * weight.mean()
            else:
                continue
            check(ours, theirs, logits)
        seen += 1
    assert seen >= 10

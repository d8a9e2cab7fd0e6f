"""torch.compile: losses compile twice for all numbers; inductor copies no outputs of convolutions.
A compiled package can be loaded. test_guarantees_of_torch.py compiles the operators,
test_losses_common.py the methods."""

import re
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.export import ExportedProgram
from torch.torch_version import TorchVersion

import anchorops as ao
from tests.test_settings import ARGUMENTS, NUMBER, SHARE

K, D = 4, 6
ANCHORS = torch.linspace(-1, 1, K * D).view(K, D).cos()
LOGITS, TEACHER, SIGMOID = (torch.randn(2, k, 5, 6, requires_grad=True) for k in (K, K, 1))
LABELS, FEATURES = torch.randint(0, K, (2, 10, 12)), torch.randn(2, D, 5, 6, requires_grad=True)
SHARES, POSITIVE, INTS = (0.2, 0.3, 0.6, 0.9), (0.5, 1.5, 3.0, 4.0), (251, 252, 253, 254)
# Functions of a number, and the numbers.
NUMBERS: dict[str, tuple[Callable[[Any], Tensor], Sequence[float]]] = {
    "pixel_kl_divergence: temperature": (
        lambda n: ao.pixel_kl_divergence(LOGITS, TEACHER, (10, 12), temperature=n),
        POSITIVE,
    ),
    "pixel_argmax: threshold": (
        lambda n: ao.pixel_argmax(LOGITS, (10, 12), sigmoid=True, threshold=n, confidence=True)[1],
        SHARES,
    ),
    "pixel_cross_entropy: label_smoothing": (
        lambda n: ao.pixel_cross_entropy(LOGITS, LABELS, label_smoothing=n),
        SHARES,
    ),
    "pixel_cross_entropy: ignore_index": (
        lambda n: ao.pixel_cross_entropy(LOGITS, LABELS, ignore_index=n),
        INTS,
    ),
    "pixel_binary_cross_entropy: pos_weight": (
        lambda n: ao.pixel_binary_cross_entropy(SIGMOID, LABELS, pos_weight=n),
        POSITIVE,
    ),
    "pixel_confusion: ignore_index": (
        lambda n: ao.pixel_confusion(LOGITS, LABELS, ignore_index=n),
        INTS,
    ),
    "pixel_to_anchor_mse: ignore_index": (
        lambda n: ao.pixel_to_anchor_mse(FEATURES, LABELS, ANCHORS, ignore_index=n),
        INTS,
    ),
    "centroid_info_nce: temperature": (
        lambda n: ao.ops.centroid_info_nce(ANCHORS, ANCHORS, temperature=n),
        POSITIVE,
    ),
}
# Modules with a number.
MODULES: dict[str, tuple[Callable[[Any], Callable], Sequence[float]]] = {
    **{
        f"{make.__name__}: {name}": (
            lambda n, make=make, name=name: make(**{name: n}),
            SHARES if wrong is SHARE else POSITIVE,
        )
        for make in (ao.CrossEntropy, ao.Dice, ao.CrossEntropyDice)
        for name, wrong in ARGUMENTS[make].items()
        if wrong is SHARE or wrong is NUMBER
    },
    "ohem_threshold": (lambda n: ao.CrossEntropy(ohem_threshold=n), SHARES),
    "at least 9": (lambda n: ao.CrossEntropy(ohem_threshold=n, ohem_min_kept=9), SHARES),
    "beta, absent": (lambda n: ao.Dice(beta=n, absent="zero"), POSITIVE),
    "smooth_denominator": (lambda n: ao.Dice(smooth_denominator=n, absent="keep"), POSITIVE),
}


def compiles_twice(
    function: Callable[[Any], Tensor],
    numbers: Sequence[float],
    argument_of: Callable[[Any], Any] = lambda n: n,
) -> None:
    """Once for the first number, and once for all others. So do torch's formulas."""
    if numbers is SHARES and TorchVersion(torch.__version__) < "2.13":
        pytest.skip("torch 2.10 to 2.12 compile again for each number that 1 is reduced by")
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for i, argument in enumerate(map(argument_of, numbers)):
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            result = compiled(argument)
        torch.testing.assert_close(result, function(argument))
        if result.requires_grad:
            result.backward()


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    function, numbers = NUMBERS[name]
    compiles_twice(function, numbers)


@pytest.mark.parametrize("name", MODULES)
def test_numbers_of_modules(name: str) -> None:
    make, numbers = MODULES[name]
    compiles_twice(lambda loss: loss(LOGITS, LABELS), numbers, make)


def test_images_with_pixel_weights() -> None:
    """One number of images, and all others; the weights have a gradient."""

    def loss(weights: Tensor) -> Tensor:
        logits, labels = (x[:1].expand(weights.shape[0], *x.shape[1:]) for x in (LOGITS, LABELS))
        return ao.CrossEntropy()(logits, labels, weights)

    compiles_twice(
        loss, range(2, 6), lambda n: torch.rand(n, *LABELS.shape[1:], requires_grad=True)
    )


class Exported(torch.nn.Module):
    """Losses and predictions with each kind of option."""

    def __init__(self) -> None:
        super().__init__()
        hard = ao.CrossEntropy(ohem_threshold=0.7, focal_gamma=2.0, label_smoothing=0.1)
        losses = ao.CrossEntropy(), hard, ao.CrossEntropyDice(), ao.Lovasz()
        self.losses = torch.nn.ModuleList(losses)

    def forward(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        size = labels.shape[1:]
        losses = [loss(logits, labels) for loss in self.losses]
        divergence = ao.pixel_kl_divergence(logits, teacher, size, temperature=2.0)
        classes, confidence = ao.pixel_argmax(logits, size, confidence=True)
        return torch.stack([*losses, divergence]), classes, confidence


@torch.no_grad()
def exported() -> tuple[ExportedProgram, tuple[Tensor, ...]]:
    inputs = LOGITS.detach(), TEACHER.detach(), LABELS
    return torch.export.export(Exported(), inputs), inputs


def test_exported_operators_have_finite_arguments() -> None:
    """Files of models are JSON, which has no infinite numbers."""
    nodes = [x for x in exported()[0].graph.nodes if "anchorops" in str(x.target)]
    assert len(nodes) > 6
    numbers = [x for node in nodes for x in node.args if isinstance(x, float | int)]
    assert numbers and all(map(isfinite, numbers))


@pytest.mark.slow
def test_compiled_package(tmp_path: Path) -> None:
    program, inputs = exported()
    path = aoti_compile_and_package(program, package_path=str(tmp_path / "losses.pt2"))
    with torch.no_grad():
        torch.testing.assert_close(aoti_load_package(path)(*inputs), Exported()(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class_moments", "softmax_moments"])
def test_outputs_of_convolutions_are_not_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor makes them channels last. The operator and its gradient have them as they are."""
    monkeypatch.setenv("CI", "1")  # it then refuses operators for which torch has a decomposition
    model = torch.nn.Conv2d(3, K, 3, padding=1)
    anchors = torch.randn(K, K)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        if name == "softmax_moments":
            return ao.pixel_cross_entropy(model(images), labels)
        return ao.pixel_to_anchor_mse(model(images), labels, anchors)

    images, labels = torch.randn(2, 3, 6, 8), torch.randint(0, K, (2, 12, 16))
    torch._dynamo.reset()
    with ao.use_backend("cpu"), inductor_config.patch(force_disable_caches=True):
        compiled = torch.compile(loss, fullgraph=True)
        _, codes = run_and_get_code(lambda: compiled(images, labels).backward())
    forward, backward = (code[code.index("def call") :] for code in codes)
    output = re.findall(r"(\w+) = extern_kernels\.convolution\(", forward)[-1]
    assert f"anchorops.{name}.cpu({output}," in forward
    ours = backward.index(f"anchorops.{name}_backward.cpu(convolution")
    assert "cpp_fused" not in backward[ours : backward.index("aten.convolution_backward", ours)]
    compiled_gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss(images, labels).backward()
    for ours, eager in zip(compiled_gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, eager.grad)

"""torch.compile: losses and methods compile once for all batch sizes; inductor copies no outputs of
convolutions. test_guarantees_of_torch.py compiles the operators."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from slow import slow_but
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import anchorops as ao

K, D = 4, 6
SEED = torch.tensor(3)
ANCHORS = torch.linspace(-1, 1, K * D).view(K, D).cos()
WEIGHT = torch.linspace(0.5, 2, K)
WITHOUT_CLASSIFIER = ao.SAR(K, D, embed=False)

# of logits (B, K, 5, 6) and labels (B, 10, 12)
LOGITS_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "pixel_cross_entropy": lambda x, y: ao.pixel_cross_entropy(x, y, weight=WEIGHT),
    "label_smoothing": lambda x, y: ao.pixel_cross_entropy(x, y, label_smoothing=0.1),
    "CrossEntropy": ao.CrossEntropy(
        WEIGHT, ohem_threshold=0.5, ohem_min_kept=7, focal_gamma=2.0, accuracy=True
    ),
    "pixel_weights": lambda x, y: ao.CrossEntropy()(x, y, torch.ones_like(y, dtype=torch.float)),
    "Dice": ao.Dice(per_image=True, weight=WEIGHT),
    "CrossEntropyDice": ao.CrossEntropyDice(),
    "confusion": lambda x, y: ao.confusion(y, y, K),
}
# of features (B, D, 5, 6), the labels and a classifier
FEATURES_FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "groups": lambda f, y, _: ao.ops.class_moments(f, y, K, groups=2, seed=SEED)[:2],
    "SAR": lambda f, y, _: WITHOUT_CLASSIFIER(f, y),
    "OCCL": ao.OCCL(K, D),
    "OCCL of images": ao.OCCL(K, D, split="images"),
    "MVSC": ao.MVSC(K, D),
    "CeCo": ao.CeCo(K, D, reduced_dim=3, center_dim=4),
    "CBP": ao.CBP(K, D),
    "Combined": ao.Combined(ao.SAR(K, D), ao.OCCL(K, D)),
}


@pytest.mark.parametrize(
    "name",
    slow_but(
        *("pixel_cross_entropy", "CrossEntropyDice", "confusion", "groups", "SAR", "CBP"),
        of={name: name for name in LOGITS_FUNCTIONS | FEATURES_FUNCTIONS},
    ),
)
def test_batch_sizes(name: str) -> None:
    if name in LOGITS_FUNCTIONS:
        function, channels = LOGITS_FUNCTIONS[name], K
    else:
        function, channels = lambda f, y: FEATURES_FUNCTIONS[name](f, y, ANCHORS), D
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in range(2, 12):
            x = torch.randn(batch, channels, 5, 6, requires_grad=True)
            labels = torch.randint(0, K, (batch, 10, 12))
            for tensor in (x, labels):
                torch._dynamo.mark_dynamic(tensor, 0)
            results = compiled(x, labels)
            results = results if isinstance(results, tuple) else (results,)
            losses = [y.sum() for y in results if isinstance(y, Tensor) and y.requires_grad]
            if losses:  # predictions have no gradient
                torch.stack(losses).sum().backward()
                assert x.grad is not None and x.grad.isfinite().all()


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

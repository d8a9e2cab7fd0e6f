"""Every method on every backend: its loss, all gradients and its state, as with the reference.

The images of a GPU are as large as those for which its kernels are made; on the CPU they are small.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import anchorops as ao
from anchorops.doctor.catalogue import features as catalogue
from tests.helpers.cpu_kernels import in_layout

BF16, F32 = torch.bfloat16, torch.float32


CONSTANT = ("CBP, penalty", "SAR, one gate")  # in the features, here
METHODS: dict[str, Callable[[int, int], nn.Module]] = {
    **{name: x for name, x in catalogue.METHODS.items() if name not in CONSTANT},
    "OCCL, sum": partial(
        ao.OCCL, normalize=False, reduction="sum", temperature=1.0, centroid_weight=0.01
    ),
    "MVSC, three groups": partial(ao.MVSC, groups=3, enhance=False),
    "MVSC, one group": partial(ao.MVSC, groups=1),
}


class Images(NamedTuple):
    """Sizes of the features on the CPU and on a GPU. Labels have twice their height and width on
    the CPU, four times on a GPU."""

    dtype: torch.dtype
    layout: str
    on_cpu: tuple[int, int, int, int]
    on_gpu: tuple[int, int, int, int]


IMAGES = {
    "bfloat16": Images(BF16, "contiguous", (2, 12, 4, 8), (2, 720, 32, 64)),
    "channels last": Images(F32, "channels_last", (2, 12, 6, 5), (2, 720, 32, 64)),
    "odd planes": Images(F32, "contiguous", (2, 12, 5, 5), (2, 64, 129, 129)),
    "crop": Images(F32, "cropped", (2, 12, 4, 6), (2, 96, 34, 46)),  # of odd strides
}


def labels_of(features: Tensor, num_classes: int, ratio: int) -> Tensor:
    """Some ignored; the last class is absent, and class 2 has fewer pixels than groups."""
    batch, _, height, width = features.shape
    labels = torch.randint(0, num_classes - 1, (batch, height, width))
    labels[labels == 2] = 0
    labels[0, 0], labels[1, -1, :3] = 255, 2
    return labels.repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)


def classifier_of(method: nn.Module, num_classes: int, dim: int) -> nn.Conv2d:
    """It recognises SAR's embedded anchors, but is not sure of them."""
    classifier = nn.Conv2d(dim, num_classes, 1)
    for module in method.modules():
        if isinstance(module, ao.SAR) and module.embed:
            embedded = copy.deepcopy(module.embedding)(module.anchors)
            classifier.weight.data = 0.01 * embedded.detach()[..., None, None]
    return classifier


def loss_gradients_and_state(
    method: nn.Module, features: Tensor, labels: Tensor, classifier: nn.Conv2d
) -> dict[str, Tensor | None]:
    method, features = copy.deepcopy(method), features.detach().requires_grad_()
    leaves = {"features": features, **dict(method.named_parameters())}
    leaves |= {f"classifier.{name}": x for name, x in classifier.named_parameters()}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    loss = method(features, labels, classifier)
    gradients = [None] * len(leaves)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    state = {name: x.detach() for name, x in method.named_buffers()}
    terms = {f"terms.{name}": x for name, x in getattr(method, "terms", {}).items()}
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True)), **state, **terms}


def places(name: str, kind: str) -> pytest.MarkDecorator:
    """Where a method runs: CUDA has no sums of upsampled features (CeCo), and no InfoNCE. In the
    machine for PTX Triton has two kinds of images; the other layouts are those of class moments."""
    without = any(x in name for x in ("CeCo", "OCCL", "MVSC", "SAR", "combined"))
    cuda = () if without else ("simulated_cuda", "cuda")
    triton = ("triton", "simulated_triton") if kind in ("bfloat16", "crop") else ("triton",)
    return pytest.mark.on("cpu", *triton, *cuda)


CASES = [
    pytest.param(name, images, id=f"{name}-{kind}", marks=places(name, kind))
    for name in METHODS
    for kind, images in IMAGES.items()
]


@pytest.mark.parametrize(("name", "images"), CASES)
def test_losses_gradients_and_state(backend: str, name: str, images: Images) -> None:
    on_gpu = torch.get_default_device().type == "cuda"
    size, num_classes = (images.on_gpu, 19) if on_gpu else (images.on_cpu, 5)
    method = METHODS[name](num_classes, size[1])
    features, _ = in_layout(torch.randn(size).to(images.dtype), images.layout)
    labels = labels_of(features, num_classes, ratio=4 if on_gpu else 2)
    arguments = method, features, labels, classifier_of(method, num_classes, size[1])
    actual = loss_gradients_and_state(*arguments)
    with ao.use_backend("reference"):
        expected = loss_gradients_and_state(*arguments)
    if name == "CBP":  # it learns nothing from the features, but remembers their centroids
        assert expected["features"] is None and expected["centroids"].any()
    else:
        assert expected["features"].any()
        assert actual["features"].stride() == torch.empty_like(features).stride()
    assert actual.keys() == expected.keys()
    for what, right in expected.items():
        if right is None:
            assert actual[what] is None, what
        elif what.endswith(("embedding.0.bias", "embedding.3.bias")):
            # a batch norm follows: the gradient is 0, but for rounding
            weight = expected[what.replace("bias", "weight")]
            assert actual[what].abs().max() <= 1e-5 * weight.abs().max()
        else:
            # CeCo reduces the channels in the features' dtype, so all else has its rounding errors
            rounded = [right.dtype, images.dtype] if "CeCo" in name else [right.dtype]
            assert_equal_but_for_rounding(what, actual[what], right, rounded)


def assert_equal_but_for_rounding(
    what: str, actual: Tensor | None, right: Tensor, rounded: list[torch.dtype]
) -> None:
    """rounded: the dtypes of the result, and of what it was computed from."""
    eps = max(torch.finfo(x).eps if x.is_floating_point else 0 for x in rounded)
    floor = 1e-4 if right.is_cuda else 2e-5  # of the largest element; tensor cores truncate sums
    floor = max(floor, 2 * eps) if len(rounded) > 1 else floor
    torch.testing.assert_close(
        actual,
        right,
        rtol=max(1e-4, 2 * eps),
        atol=floor * float(right.abs().max()),
        msg=lambda text: f"{what}: {text}",
    )

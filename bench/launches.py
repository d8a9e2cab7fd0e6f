"""Launches of GPU kernels in a training step of each method, counted without a GPU.

The methods run on fake tensors, which have shapes but no memory. An ATen operator that computes
something counts as one launch; a view or new memory counts as none. LAUNCHES contains the
exceptions, according to ATen's CUDA sources. OWN contains the launches of our own operators;
tests/interpreted/test_launches.py counts these in the emulator and in Triton's interpreter. Filling
memory with a number is a launch too.

The table counts forward and backward of the method alone, for features in bfloat16 and a float32
classifier. It counts neither the gradient of the total loss, nor the addition of the method's
gradients to those of other losses, nor the optimizer, nor logging. Layers that a method trains or
applies (matrix products, batch norm, ReLU) are those of torch; their launches have their own
column.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from random_paths import is_used
from shapes import RESIDUALS, SHAPES, SQDISTS, SUMS, Shape
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import anchorops as ao
from anchorops import _backend
from anchorops.losses import Regularizer

BACKENDS = ("cuda", "triton")
# Operators whose number of launches is not one. Batch norm: statistics, running statistics, result
# (its step counter is a separate operator). Backward of a convolution: gradients of its input and
# of its weight.
LAUNCHES = {
    "empty": 0,
    "empty_like": 0,
    "empty_strided": 0,
    "new_empty": 0,
    "new_empty_strided": 0,
    "_unsafe_view": 0,
    "promote_types": 0,
    "native_batch_norm": 3,
    "convolution_backward": 2,
}
# Launches with each of BACKENDS. Class moments: with anchors (without them, Triton has one launch
# less) and at most 1,024 keys (pixels are not sorted). CUDA has one more where random labels have a
# kernel of their own (with many more pixels than here, also a memset).
OWN = {
    "next_seed": (1, 1),
    "class_keys": (2, 2),
    "split_groups": (3, 4),
    "group_keys": (4,),  # "cuda" alone
    "upsampled_sums": (2, 2),
    "upsampled_sums_backward": (1, 1),
    "class_moments": (2, 5),
    "class_moments_backward": (1, 1),
    "unit_rows": (1, 1),
    "unit_rows_backward": (1, 1),
    "prototype_halves": (1, 1),
    "prototype_halves_backward": (1, 1),
    "anchor_cross_entropy": (1, 1),
    "anchor_cross_entropy_backward": (1, 1),
    "gated_average": (1, 1),
    "anchor_losses": (1, 1),
    "anchor_losses_backward": (1, 1),
    "center_loss": (2, 2),
    "center_loss_backward": (1, 1),
    "centroid_losses": (2,),  # "cuda" alone
    "centroid_losses_backward": (1,),
    "centroid_info_nce": (2, 2),
    "centroid_info_nce_backward": (1, 1),
}
# The operators of layers (add_: the counter of batch norm), and the autograd nodes of their
# gradients.
LAYERS = {"addmm", "mm", "bmm", "convolution", "native_batch_norm", "add_", "relu"}
LAYERS |= {"AddmmBackward0", "MmBackward0", "BmmBackward0", "ConvolutionBackward0"}
LAYERS |= {"NativeBatchNormBackward0", "ReluBackward0"}


class Counts(TorchDispatchMode):
    """Counts launches by operator; `layers` are those of layers. calls: the other operators that
    launch something, and their arguments."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend, self.launches, self.layers = BACKENDS.index(backend), Counter(), 0
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "anchorops":
            self.launches[name] += OWN[name][self.backend]
            self.calls.append((name, args))
            if name == "class_moments" and BACKENDS[self.backend] == "cuda":
                features, _, anchors, num_keys, groups, with_sums, with_residuals = args
                statistics = SUMS * with_sums | SQDISTS * (anchors is not None)
                statistics |= RESIDUALS * with_residuals
                self.launches[name] += is_used(
                    num_keys, groups, features.element_size(), statistics
                )
        elif func.namespace == "aten" and not func.is_view:
            started = LAUNCHES.get(name, 1)
            self.launches[name] += started
            node = torch._C._current_autograd_node()
            of_layer = (node.name() if node else name) in LAYERS
            self.layers += started * of_layer
            if started and not of_layer:
                self.calls.append((f"aten.{name}", args))
        return func(*args, **kwargs or {})


@contextmanager
def pretended(backend: str) -> Iterator[None]:
    """Operators on CPU tensors use this backend. With fake tensors its kernels never run."""
    on_host, chosen = _backend._ON_HOST[backend], _backend._choice.backend
    _backend._ON_HOST[backend], _backend._choice.backend = True, backend
    try:
        yield
    finally:
        _backend._ON_HOST[backend], _backend._choice.backend = on_host, chosen


METHODS: dict[str, Callable[[int, int], Regularizer]] = {
    "SAR": ao.SAR,
    "CR": lambda classes, dim: ao.SAR(classes, dim, embed=False),
    "CBP": ao.CBP,
    "OCCL": ao.OCCL,
    "CeCo": ao.CeCo,
    "MVSC": ao.MVSC,
}
GOAL = 15  # launches of `cuda`, without those of layers; the report fails above it


def fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces the parameters and buffers by fake tensors."""
    for part in module.modules():
        stores: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = mode.from_tensor(tensor)


def count(build: Callable[[int, int], Regularizer], shape: Shape, backend: str) -> Counts:
    """The launches of one step."""
    method, classifier = build(shape.classes, shape.dim), nn.Conv2d(shape.dim, shape.classes, 1)
    with pretended(backend), FakeTensorMode() as mode:
        for module in (method, classifier):
            fake(module, mode)
        size = (shape.batch, shape.dim, shape.height, shape.width)
        features = torch.empty(size, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros((shape.batch, 4 * shape.height, 4 * shape.width), dtype=torch.int64)
        dloss, counts = torch.ones(()), Counts(backend)
        with counts:
            loss = method(features, labels, classifier)
            if loss.requires_grad:
                loss.backward(dloss)
    return counts


def print_launches() -> list[str]:
    """Prints a table of all methods. Returns a message for each count above the goal."""
    print("\nLaunches in a training step, forward and backward; those of layers are in addition")
    print("| method | shape | cuda | triton | layers | goal |\n|---|---|---|---|---|---|")
    faults = []
    for name, build in METHODS.items():
        for title, shape in SHAPES.items():
            both = [count(build, shape, backend) for backend in BACKENDS]
            cuda, triton = (counts.launches.total() - counts.layers for counts in both)
            cells = name, title, cuda, triton, both[0].layers, GOAL
            print("|", " | ".join(map(str, cells)), "|", flush=True)
            if cuda > GOAL:
                faults.append(f"{name}, {title}: {cuda} launches, expected {GOAL} at most")
    return faults

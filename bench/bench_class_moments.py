"""Class moments and functions that use them, compared with the formulas people write by hand.

Bytes are counted, not measured. Forward reads the features once. Forward and backward together
read them twice and write their gradient once; without squared distances they read and write once.

On CPU large outputs are new memory in each call, as in training, and their page faults are part of
the time: a gradient of 189 MB has 46,000 page faults with pages of 4 KB, and 600 with huge pages.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import alternatives
import torch
from cases import (
    COCO,
    HRNET,
    IMAGENET,
    MANY,
    OCRNET,
    POINTS,
    SEGFORMER,
    Case,
    Inputs,
    backends,
    grid,
)
from torch import Tensor

import anchorops as ao
from anchorops import reference
from anchorops._backend import CUDA_MAX_KEYS
from anchorops._moments import ClassMoments
from anchorops._ops.class_keys import class_keys
from anchorops.measure import keys_bytes, moments_bytes

BOTH = "class moments with anchors"
SUMS = "class moments"
GROUPS = "class moments in 4 groups"
CENTROIDS = "class centroids"
MSE = "pixel-to-anchor MSE"
KEYS = "class keys"
FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward + backward"

QUICK = [
    Case(BOTH, FORWARD, HRNET, compiled=True),
    Case(BOTH, BACKWARD, HRNET),
    Case(BOTH, TRAINING, HRNET, compiled=True),
    Case(SUMS, FORWARD, HRNET),
    Case(SUMS, TRAINING, HRNET),
    Case(MSE, FORWARD, HRNET),
    Case(MSE, TRAINING, HRNET, compiled=True),
    Case(BOTH, FORWARD, HRNET, labels="random"),
    Case(BOTH, TRAINING, HRNET, labels="random"),
    Case(BOTH, TRAINING, HRNET, "bf16"),
    Case(BOTH, TRAINING, HRNET, "fp32"),
    Case(CENTROIDS, TRAINING, OCRNET),
    Case(GROUPS, TRAINING, OCRNET),
    Case(BOTH, TRAINING, SEGFORMER, compiled=True),
    Case(BOTH, TRAINING, POINTS, labels="random"),
    Case(BOTH, TRAINING, IMAGENET, labels="random"),
    Case(BOTH, TRAINING, MANY),
]
FULL = [
    Case(operation, direction, shape, dtype, labels)
    for shape in (HRNET, SEGFORMER)
    for dtype in ("bf16", "fp32")
    for labels in ("coherent", "random")
    for operation in (BOTH, SUMS, MSE, GROUPS)
    for direction in (FORWARD, TRAINING)
] + [
    Case(BOTH, direction, shape, dtype, labels)
    for shape in (OCRNET, COCO, POINTS, IMAGENET, MANY)
    for dtype in ("bf16", "fp32")
    for labels in ("coherent", "random")
    for direction in (FORWARD, TRAINING)
]

Formula = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def outputs(operation: str, moments: Callable[..., ClassMoments]) -> Formula:
    """The results of the operation for (features, labels, anchors), with one implementation."""

    def formula(features: Tensor, labels: Tensor, anchors: Tensor) -> tuple[Tensor, ...]:
        options = {
            BOTH: {"anchors": anchors},
            GROUPS: {"groups": 4, "seed": 0},
        }.get(operation, {})
        counts, sums, sqdists = moments(features, labels, len(anchors), ignore_index=-1, **options)
        if operation == CENTROIDS:
            return (sums / counts.clamp(min=1)[:, None],)
        return (sums,) if sqdists is None else (sums, sqdists)

    return formula


def ours(operation: str) -> Formula:
    if operation == MSE:
        return lambda f, y, a: (ao.pixel_to_anchor_mse(f, y, a, ignore_index=-1),)
    if operation == CENTROIDS:
        return lambda f, y, a: ao.class_centroids(f, y, len(a), ignore_index=-1)[:1]
    return outputs(operation, ao.ops.class_moments)


def alternative_formulas(case: Case) -> dict[str, Formula]:
    if case.operation == MSE:
        formulas: dict[str, Formula] = {
            "gather + mse": lambda f, y, a: (alternatives.gather_mse(f, y, a),),
        }
        if case.direction == FORWARD:
            formulas["class loop"] = lambda f, y, a: (alternatives.loop_mse(f, y, a),)
        compiled = ["gather + mse"]
    else:
        formulas = {
            name: outputs(case.operation, partial(alternatives.class_moments, alternative))
            for name, alternative in alternatives.FORMULAS.items()
        }
        compiled = ["index_add", "one_hot bmm"]
        # Its backward takes seconds, because it writes the gradient of all rows for each class.
        if (case.operation, case.shape) != (BOTH, HRNET) or case.direction == BACKWARD:
            del formulas["class loop"]
    if case.compiled:
        for name in compiled:
            formulas[f"compiled {name}"] = torch.compile(formulas[name], dynamic=False)
    return formulas


def num_keys_of(case: Case) -> int:
    return case.shape.num_classes * (4 if case.operation == GROUPS else 1)


def our_names(case: Case, device: torch.device) -> list[str]:
    """The backends that support the case."""
    many = num_keys_of(case) > CUDA_MAX_KEYS
    return [name for name, kind in backends(device).items() if not (many and kind == "cuda")]


def names(case: Case, device: torch.device) -> list[str]:
    return [*our_names(case, device), *alternative_formulas(case)]


@lru_cache(1)  # consecutive cases have the same inputs
def make_inputs(*args) -> Inputs:
    return Inputs(*args)


def upstream(operation: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """The gradients of the operation's outputs."""
    if operation == MSE:
        return (torch.ones((), device=inputs.device),)
    if operation == GROUPS:
        return (inputs.dsums[:, None].expand(-1, 4, -1),)
    return (inputs.dsums, inputs.dsqdists)[: 1 + (operation == BOTH)]


@lru_cache(1)
def exact(operation: str, inputs: Inputs, direction: str) -> Sequence[Tensor]:
    """The results, or the gradient of the features, of the reference in float64."""
    wide = inputs.features.double().requires_grad_(direction != FORWARD)
    anchors = inputs.anchors.double()
    with ao.use_backend("reference"):
        results = ours(operation)(wide, inputs.labels, anchors)
    if direction == FORWARD:
        return results
    gradients = [x.double() for x in upstream(operation, inputs)]
    return [x.float() for x in torch.autograd.grad(results, wide, gradients)]


@grid(QUICK, FULL, names)
def test_class_moments(bench, case: Case, name: str):
    shape = case.shape.on(bench.device, bench.tiny)
    inputs = make_inputs(shape, case.dtype, case.labels, bench.device)
    features, labels, anchors = inputs.features.detach(), inputs.labels, inputs.anchors
    formula = (
        ours(case.operation) if name in backends(bench.device) else alternative_formulas(case)[name]
    )
    gradients = upstream(case.operation, inputs)

    def forward() -> tuple[Tensor, ...]:
        return formula(features, labels, anchors)

    def training() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), features, gradients)

    with bench.backend(name):
        features.requires_grad_(case.direction != FORWARD)
        run = forward if case.direction == FORWARD else training
        if case.direction == BACKWARD:
            made = forward()
            run = lambda: torch.autograd.grad(made, features, gradients, retain_graph=True)  # noqa: E731
        bench.check(run(), exact(case.operation, inputs, case.direction), case.dtype)
        counted = moments_bytes(
            features,
            num_keys_of(case._replace(shape=shape)),
            case.direction,
            sums=case.operation != MSE,
            sqdists=case.operation in (BOTH, MSE),
        )
        bench.record(run, case._replace(shape=shape), name, counted, beside=features)


def label_names(case: Case, device: torch.device) -> list[str]:
    ours = [*backends(device), "interpolate + scatter_add"]
    return ours + [f"{name}, CUDA graph" for name in ours if device.type == "cuda"]


@grid(
    [Case(KEYS, FORWARD, HRNET, "fp32", labels) for labels in ("coherent", "random")],
    [Case(KEYS, FORWARD, shape, "fp32") for shape in (SEGFORMER, POINTS, MANY)],
    label_names,
)
def test_class_keys(bench, case: Case, name: str):
    shape = case.shape.on(bench.device, bench.tiny)
    inputs = make_inputs(shape, case.dtype, case.labels, bench.device)
    features, labels, num_classes = inputs.features, inputs.labels, shape.num_classes
    implementation = name.removesuffix(", CUDA graph")
    backend = backends(bench.device).get(implementation)

    def run() -> tuple[Tensor, Tensor]:
        if backend in (None, "reference"):
            keys = alternatives.class_keys(features, labels, num_classes)
            return keys, alternatives.class_counts(keys, num_classes)
        return class_keys(features, labels, num_classes, ignore_index=-1, backend=backend)

    keys, counts = run()
    exact, exact_counts = reference.class_keys(features, labels, num_classes, False, -1)
    assert torch.equal(torch.where(keys < num_classes, keys, -1).long(), exact)
    assert torch.equal(counts, exact_counts)
    counted = keys_bytes(exact.numel(), num_classes)
    bench.record(run, case._replace(shape=shape), name, counted)

"""InfoNCE between the centroids of K classes, compared with cross-entropy of a similarity matrix.

Bytes: queries and keys are read once; for the gradients they are read again and written once. The
launches determine its time, so on a GPU it is also timed as a CUDA graph.
"""

import torch
import torch.nn.functional as F
from cases import Case, Shape, backends, grid

import anchorops as ao
from anchorops import reference
from anchorops.catalogue.usual import centroid_info_nce as usual

OPERATION, TAU = "centroid InfoNCE", 0.07
FORWARD, TRAINING = "forward", "forward + backward"


def shape(num_classes: int, dim: int) -> Shape:
    return Shape("centroids", (num_classes, dim), num_classes, cpu_batch=num_classes)


def names(case: Case, device: torch.device) -> list[str]:
    ours = [*backends(device), "cross_entropy", "compiled cross_entropy"]
    return ours + [f"{name}, CUDA graph" for name in ours if device.type == "cuda"]


@grid(
    [
        Case(OPERATION, direction, shape(*size), "fp32")
        for size in ((19, 720), (150, 768), (1000, 2048))
        for direction in (FORWARD, TRAINING)
    ],
    [
        Case(OPERATION, TRAINING, shape(*size), "fp32")
        for size in ((171, 768), (200, 96), (1200, 512))
    ],
    names,
)
def test_centroid_info_nce(bench, case: Case, name: str):
    sizes = case.shape.on(bench.device, bench.tiny)
    num_classes, dim = min(sizes.size[0], sizes.num_classes), sizes.size[1]
    generator = torch.Generator(bench.device).manual_seed(0)
    queries, keys = (
        F.normalize(torch.randn(num_classes, dim, device=bench.device, generator=generator))
        for _ in range(2)
    )
    queries.requires_grad_(case.direction == TRAINING)
    keys.requires_grad_(case.direction == TRAINING)
    formula = ao.ops.centroid_info_nce
    if not name.startswith("anchorops"):
        compiled = name.startswith("compiled")
        formula = torch.compile(usual, dynamic=False) if compiled else usual

    def run() -> tuple[torch.Tensor, ...]:
        loss = formula(queries, keys)
        return torch.autograd.grad(loss, (queries, keys)) if queries.requires_grad else (loss,)

    exact_inputs = [x.detach().double().requires_grad_() for x in (queries, keys)]
    loss = reference.centroid_info_nce(*exact_inputs, temperature=TAU)
    exact = torch.autograd.grad(loss, exact_inputs) if queries.requires_grad else (loss,)
    with bench.backend(name):
        bench.check(run(), exact, case.dtype)
        counted = 8 * num_classes * dim * (3 if queries.requires_grad else 1)
        bench.record(run, case._replace(shape=sizes), name, counted)

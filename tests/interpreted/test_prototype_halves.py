import pytest
import torch
from emulator import BACKEND

from anchorops import reference
from anchorops.ops.prototype_halves import prototype_halves

EPS = 1e-6


@pytest.mark.parametrize(
    ("groups", "classes", "dim", "used"),
    [
        (4, 5, 40, "all"),
        (2, 1, 1, "all"),
        (7, 6, 33, "centroids"),
        (3, 9, 16, "distances"),
        (4, 5, 33, "rows"),
    ],
)
def test_values_and_gradients(groups, classes, dim, used):
    seed, offset = torch.tensor(7 + (3 << 32)), 1 << 31
    weights = torch.randn(classes, dim), torch.rand(1).expand(classes)
    weights = *weights, torch.randn(groups, classes, dim).transpose(0, 1)
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(1)
        prototypes = torch.randn(groups, classes, dim).to(dtype)
        prototypes[:, 0] *= 1e-8  # shorter than EPS
        prototypes.requires_grad_()
        if dtype == torch.float32:
            found = prototype_halves(prototypes, seed, offset, eps=EPS, loss_weight=0.3)
        else:
            one_key = torch.zeros((1, groups), dtype=torch.int32), torch.tensor([groups])
            half = reference.split_groups(*one_key, 2, seed + offset).flatten()
            assert half.sum() == groups // 2
            found = reference.prototype_halves(prototypes, half, EPS, 0.3)
        parts = {"centroids": (0,), "distances": (1,), "rows": (2,), "all": (0, 1, 2)}[used]
        loss = torch.stack([(found[i] * weights[i].to(dtype)).sum() for i in parts]).sum()
        results.append((*found, *torch.autograd.grad(loss, prototypes)))
    for ours, expected in zip(*results, strict=True):
        scale = torch.ones(()).double()
        if expected.shape == (groups, classes, dim):
            # a gradient; that of class 0 is 1/EPS times as large
            scale = expected.abs().amax((0, 2), keepdim=True).clamp(min=1)
        torch.testing.assert_close(ours.double() / scale, expected / scale, rtol=1e-5, atol=2e-6)


def test_operators_are_registered_as_torch_expects():
    prototypes, options = torch.randn(4, 3, 6, requires_grad=True), (1 << 31, EPS, 0.5)
    forward = getattr(torch.ops.anchorops.prototype_halves, BACKEND)
    backward = getattr(torch.ops.anchorops.prototype_halves_backward, BACKEND)
    torch.library.opcheck(forward, (prototypes, torch.tensor(5), *options))
    prototypes = prototypes.detach()
    centroids, distances, rows, products = forward(prototypes, torch.tensor(5), *options)
    saved = prototypes, torch.tensor(5), centroids, products, *options
    torch.library.opcheck(backward, (centroids, distances, rows, *saved))

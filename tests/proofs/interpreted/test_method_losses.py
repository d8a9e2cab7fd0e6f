"""OCCL and MVSC with the kernels: losses and gradients as with the reference."""

import pytest
import torch
from emulator import BACKEND

import anchorops as ao

K, D = 5, 12


@pytest.mark.parametrize(
    "method",
    [
        lambda: ao.OCCL(K, D),
        lambda: ao.OCCL(K, D, normalize=False, reduction="sum", temperature=1.0),
        lambda: ao.OCCL(K, D, split="images"),
        lambda: ao.MVSC(K, D),
        lambda: ao.MVSC(K, D, groups=3, enhance=False),
        lambda: ao.MVSC(K, D, groups=1),
    ],
)
def test_losses_and_gradients(method):
    torch.manual_seed(0)
    labels = torch.randint(0, K - 1, (2, 6, 5))  # class K − 1 is absent
    labels[labels == 2] = 0
    labels[1, 2, :3] = 2  # fewer pixels than groups
    labels[0, 0] = 255
    features, classifier, method = torch.randn(2, D, 6, 5), torch.nn.Conv2d(D, K, 1), method()
    results = []
    for backend in (BACKEND, "reference"):
        given = features.clone().requires_grad_()
        leaves = [given, *method.parameters(), classifier.weight]
        leaves += [classifier.bias] * isinstance(method, ao.MVSC)
        method.step.zero_()
        with ao.use_backend(backend):
            loss = method(given, labels, classifier)
            gradients = torch.autograd.grad(loss, leaves)
        results.append((loss.detach(), method.terms["present"], *gradients))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)

"""CUDA: the bits of a result do not depend on the order in which threads run."""

import masked_sums as moments
import pytest
import torch
from masked_sums import BF16, F32

import anchorops as ao

ORDERS = 0, 1, 2  # the usual one, and two random ones

CLASS_MOMENTS = [
    moments.Case((2, 40, 5, 136), 30, F32, labels="long runs"),
    moments.Case((2, 40, 5, 136), 40, BF16, labels="few ignored"),  # more keys than slots
    moments.Case((700, 17), 9, F32, "transposed"),
    moments.Case((2, 20, 9, 30), 6, F32, "channels_last", groups=3, per_image=True),
    moments.Case((900, 5), 7, labels="mixed"),
]
METHODS = {
    "SAR": lambda: ao.SAR(5, 12, delta=0.0, gate="per_class"),
    "OCCL": lambda: ao.OCCL(5, 12),
    "MVSC": lambda: ao.MVSC(5, 12),
}


def check(set_order, run) -> None:
    results = []
    for order in ORDERS:
        set_order(order)
        results.append(run())
    for other in results[1:]:
        for expected, ours in zip(results[0], other, strict=True):
            assert ours is expected is None or torch.equal(ours, expected)


@pytest.mark.parametrize("case", CLASS_MOMENTS, ids=str)
def test_class_moments(set_order, case: moments.Case):
    inputs = moments.make_inputs(case)
    check(set_order, lambda: moments.run(case, *inputs))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_methods(set_order, method):
    labels = torch.randint(0, 4, (2, 24, 20))
    labels[0, :3] = 255
    method, classifier = method(), torch.nn.Conv2d(12, 5, 1)
    features = torch.randn(2, 12, 6, 5, requires_grad=True)
    state = {name: value.clone() for name, value in method.state_dict().items()}

    def run():
        method.load_state_dict(state)
        loss = method(features, labels, classifier)
        leaves = [features, *(p for p in method.parameters() if p.requires_grad)]
        return loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)

    check(set_order, run)

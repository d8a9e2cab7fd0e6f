import pytest
import torch
from emulator import BACKEND

from anchorops import reference
from anchorops.ops.gated_average import gated_average


def check(average, anchors, recognised, *, per_class, momentum=0.9, rtol=1e-6):
    options = {"momentum": momentum, "per_class": per_class}
    before = average.clone()
    expected, gate = reference.gated_average(
        before.double(), anchors.double(), recognised, **options
    )
    for update in (False, True):
        updated, opened = gated_average(average, anchors, recognised, **options, update=update)
        assert updated.dtype == torch.float32 and opened.tolist() == gate.tolist()
        torch.testing.assert_close(updated.double(), expected, rtol=1e-6, atol=1e-7)
        state = expected if update else before.double()
        torch.testing.assert_close(average.double(), state, rtol=rtol, atol=1e-7)


def some(classes, dim):
    """An average of which some classes have not started; not every anchor is recognised."""
    average, anchors = torch.randn(classes, dim), torch.randn(classes, dim)
    average[::3] = 0
    return average, anchors, torch.arange(classes) % 4 != 1


@pytest.mark.parametrize("shape", [(2, 1), (5, 12), (7, 33), (40, 70)])
def test_gates(shape):
    average, anchors, recognised = some(*shape)
    check(average.clone(), anchors, recognised, per_class=True)
    check(average.clone(), anchors, recognised, per_class=False)
    check(average, anchors, torch.ones_like(recognised), per_class=False)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_of_momentum(momentum):
    check(*some(6, 10), per_class=True, momentum=momentum)


def test_strides_and_dtypes():
    average, anchors, recognised = some(6, 10)
    check(average.T.contiguous().T, anchors.T.contiguous().T, recognised, per_class=True)
    # Triton's interpreter truncates to bfloat16.
    check(average.bfloat16(), anchors.bfloat16(), recognised, per_class=True, rtol=2**-7)
    check(average.half(), anchors.half(), recognised, per_class=True, rtol=2**-11)


def test_with_torch():
    average, anchors, recognised = some(6, 10)
    options = {"momentum": 0.9, "per_class": True}
    saved = (torch.ones((), requires_grad=True) * average).square().sum()
    gated_average(average, anchors, recognised, **options, update=False)
    saved.backward(retain_graph=True)
    gated_average(average, anchors, recognised, **options, update=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    operator = getattr(torch.ops.anchorops.gated_average, BACKEND)
    for update in (True, False):
        torch.library.opcheck(operator, (average, anchors, recognised, 0.9, True, update))

    def step(average, anchors):
        return gated_average(average, anchors, recognised, **options, update=True)

    states = average.clone(), average.clone()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(states[0], anchors), step(states[1], anchors))
        torch.testing.assert_close(*states)

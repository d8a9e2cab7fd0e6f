"""Loss and all gradients of centroid InfoNCE within the error budget: the error against float64 is
at most twice that of the reference in float32, plus four roundings of a term."""

import pytest
import torch
from emulator import BACKEND
from torch.utils._python_dispatch import TorchDispatchMode

import anchorops as ao
from anchorops._ops import centroid_info_nce as operator
from anchorops._ops.centroid_info_nce import unchecked_info_nce

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=["kept", "in parts"])
def logits(request, monkeypatch):
    """The logits are kept for the gradient, or computed again for 16 rows at a time (CUDA: 64)."""
    if request.param == "in parts":
        monkeypatch.setattr(operator, "LOGITS_AT_ONCE", 1)


def loss_and_gradients(queries, keys, positives, bias=None, **options):
    given = {"queries": queries, "keys": keys, "positives": positives, "bias": bias}
    leaves = {k: t.detach().requires_grad_() for k, t in given.items() if t is not None}
    loss = unchecked_info_nce(**leaves, **options)
    inputs = list(leaves.values())
    weights = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), inputs)]


def check(queries, keys, positives=None, bias=None, temperature=0.07, **options):
    options["temperature"] = temperature
    ours = loss_and_gradients(queries, keys, positives, bias, **options)
    with ao.use_backend("reference"):
        tensors = queries, keys, positives, bias
        formula = loss_and_gradients(
            *(None if t is None else t.float() for t in tensors), **options
        )
        exact = loss_and_gradients(*(None if t is None else t.double() for t in tensors), **options)
    finite = torch.cat([t[t.isfinite()].flatten().float() for t in tensors if t is not None])
    term = float(finite.abs().max()) / temperature * options.get("loss_weight", 1)
    given = [t for t in tensors if t is not None]
    for i, like in enumerate([None, *given]):
        dtype = torch.float32 if like is None else like.dtype
        assert ours[i].dtype == dtype and ours[i].shape == exact[i].shape
        assert ours[i].isfinite().all()
        allowed = 2 * (formula[i].double() - exact[i]).abs().max() + 2**-21 * term
        if dtype != torch.float32:  # one more rounding
            allowed = allowed + torch.finfo(dtype).eps * exact[i].abs()
        assert ((ours[i].double() - exact[i]).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("num_classes", "dim", "dtype", "reduction"),
    [(1, 3, FP32, "mean"), (19, 40, FP32, "sum"), (37, 130, BF16, "mean"), (33, 64, FP16, "none")],
)
@pytest.mark.parametrize("with_positives", [False, True])
def test_values_and_gradients(num_classes, dim, dtype, reduction, with_positives):
    queries, keys, positives = torch.randn(3, num_classes, dim).to(dtype) / 4
    check(queries, keys, positives if with_positives else None, reduction=reduction)


@pytest.mark.usefixtures("other_gpu")
def test_several_tiles_in_a_chunk():
    check(*torch.randn(2, 200, 20))


@pytest.mark.parametrize("dtype", [FP16, torch.float64])
def test_keys_and_positives_of_another_dtype(dtype):
    queries, keys, positives = torch.randn(3, 20, 9)
    check(queries, keys.to(dtype))
    check(queries, keys.to(dtype), positives.to(dtype))
    check(queries.to(BF16), keys, positives.to(dtype))


@pytest.mark.parametrize("with_positives", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_groups(with_positives, reduction, logits):
    queries, positives = torch.randn(2, 21, 3, 20) / 2
    present = torch.rand(21, 3) < 0.6
    positives = positives if with_positives else None
    check(queries, torch.randn(21, 20), positives, present=present, reduction=reduction)


@pytest.mark.parametrize("with_positives", [False, True])
@pytest.mark.parametrize("with_keys", [False, True])
def test_absent_classes_may_hold_nan(with_positives, with_keys, logits):
    queries, keys, positives = torch.randn(3, 40, 24) / 2
    present = torch.rand(40) < 0.5
    present_keys = torch.rand(40) < 0.7 if with_keys else None
    queries[~present] = torch.nan
    positives[~present] = torch.inf
    unused = ~present if present_keys is None else ~present & ~present_keys
    keys[unused] = torch.nan
    check(
        queries,
        keys,
        positives if with_positives else None,
        present=present,
        present_keys=present_keys,
    )


@pytest.mark.parametrize("groups", [2, 3])
def test_a_positive_is_another_query(groups, logits):
    queries, present = torch.randn(35, groups, 20) / 2, torch.rand(35, groups) < 0.8
    check(queries, torch.randn(35, 20), mirrored=True, present=present, reduction="none")


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_classifier(dtype, logits):
    """Logits with a bias, from all keys, whether their class is present or not."""
    queries, bias = torch.randn(70, 2, 24).to(dtype), torch.randn(70)
    present = torch.rand(70, 2) < 0.3
    keys = torch.randn(70, 24).to(dtype)
    options = {"present": present, "all_keys": True, "temperature": 1.0, "loss_weight": 0.3}
    check(queries, keys, bias=bias, **options)
    check(queries, keys, bias=bias, positives=queries.flip(0), **options)
    given = torch.arange(70) % 2 == 0
    options = {"present": present, "present_keys": given, "temperature": 1.0}
    check(queries, keys, bias=bias, **options)


def test_a_classifier_without_channels(logits):
    given = torch.randn(40, 2, 0), torch.randn(40, 0), None, torch.randn(40)
    options = {"all_keys": True, "temperature": 1.0}
    ours = loss_and_gradients(*given, **options)
    with ao.use_backend("reference"):
        torch.testing.assert_close(ours, loss_and_gradients(*given, **options))


def test_no_class_present():
    none = torch.zeros(5, dtype=torch.bool)
    check(torch.full((5, 8), torch.nan), torch.randn(5, 8), present=none)


def test_strides_and_temperature():
    queries = torch.randn(50, 2, 33)[:, 1, ::2]
    keys = torch.randn(17, 33).T[:17].T[::1][:, :17]
    check(queries[:17], keys, temperature=0.5)
    check(torch.randn(20, 9).T, torch.randn(1, 20).expand(9, 20), temperature=2.0)
    present, present_keys = (torch.rand(2, 40) < 0.6)[:, ::2].unbind()
    check(torch.randn(20, 9), torch.randn(20, 9), present=present, present_keys=present_keys)


def test_offsets_are_64_bit():
    """Strides of 2^30 elements: the last channels are beyond 2^31. Few pages are touched."""
    torch.use_deterministic_algorithms(False)  # otherwise torch.empty would write all of it
    far = torch.empty(2**32, dtype=FP16).as_strided((2, 2, 4), (2, 1, 2**30))
    near = far.copy_(torch.randn(far.shape)).clone()
    masks, options = (None,) * 4, (False, False, 0.5)
    forward = getattr(torch.ops.anchorops.centroid_info_nce, BACKEND)
    backward = getattr(torch.ops.anchorops.centroid_info_nce_backward, BACKEND)
    results = []
    for queries, keys in (far, near):
        loss, *saved = forward(queries, keys, *masks, *options, 1.0, "sum", 100)
        results.append((loss, *backward(loss, queries, keys, *masks, *saved, *options, 100)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_large_logits():
    check(30 * torch.randn(20, 16), 30 * torch.randn(20, 16), temperature=0.07, reduction="sum")


def test_more_keys_than_a_chunk(logits):
    check(torch.randn(259, 4), torch.randn(259, 4), present=torch.rand(259) < 0.9)


class Allocated(TorchDispatchMode):
    """The largest number of elements of a new tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "empty" in func.overloadpacket.__name__:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("rows", [64, 300])
def test_no_more_logits_than_allowed(rows):
    """The logits of 300 rows are kept if these are allowed. With fewer, no new tensor is larger
    than the logits of 64 rows."""
    queries, keys = torch.randn(2, 300, 4)
    at_once, width = rows * 304, 304
    options = (False, False, 0.5)
    operators = torch.ops.anchorops
    on_cpu = torch._C.DispatchKey.CPU
    with Allocated() as forward:
        loss, *saved = getattr(operators.centroid_info_nce, BACKEND)._op_dk(
            on_cpu, queries, keys, *(None,) * 4, *options, 1.0, "mean", at_once
        )
    with Allocated() as backward:
        getattr(operators.centroid_info_nce_backward, BACKEND)._op_dk(
            on_cpu, loss, queries, keys, *(None,) * 4, *saved, *options, at_once
        )
    if rows == 300:
        assert forward.largest == 300 * width and backward.largest == 300 * 4
    else:
        assert 0 < forward.largest < 64 * width and backward.largest == 64 * width


@pytest.mark.skipif(BACKEND != "cuda", reason="Triton has tiles of one size")
@pytest.mark.parametrize("with_positives", [False, True])
def test_large_tiles(with_positives):
    queries, keys, positives = torch.randn(3, 760, 9)
    check(queries, keys, positives if with_positives else None, present=torch.rand(760) < 0.8)


def test_operators_are_registered_as_torch_expects():
    operators = torch.ops.anchorops
    forward = getattr(operators.centroid_info_nce, BACKEND)
    backward = getattr(operators.centroid_info_nce_backward, BACKEND)
    queries, keys, positives = torch.randn(3, 6, 5)
    present, options = torch.rand(6) < 0.7, (False, False, 0.1)
    for given, at_once in ((positives, 100), (None, 1)):
        bias = None if given is not None else torch.randn(6)
        inputs = queries.requires_grad_(), keys, bias, given, present, None
        arguments = *inputs, *options, 0.5, "mean", at_once
        torch.library.opcheck(forward, arguments)
        _, *saved = forward(*arguments)
        assert saved[-1].shape == ((6, 8) if at_once == 100 else (0,))
        inputs = torch.tensor(1.0), queries.detach(), *inputs[1:]
        torch.library.opcheck(backward, (*inputs, *saved, *options, at_once))


def test_second_derivatives_raise():
    queries, keys = torch.randn(2, 6, 5)
    loss = ao.ops.centroid_info_nce(queries.requires_grad_(), keys)
    (dqueries,) = torch.autograd.grad(loss, queries, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dqueries.sum().backward()

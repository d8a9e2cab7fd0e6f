"""What torch needs of every operator: its registration (opcheck), torch.compile, traces, vmap,
autocast, meta tensors; derivatives that a backend has not raise an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion

from anchorops.doctor.catalogue import Case, Inputs
from anchorops.doctor.catalogue.entry import as_dtype
from tests.helpers.operators import Calls, each, results, strided
from tests.test_guarantees import same_bits

F64 = torch.float64
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of torch.jit: deprecated; of vmap: slow
]


Function = Callable[..., Tensor]


def weighted_sum(case: Case, inputs: Inputs) -> tuple[Function, tuple[Tensor, ...]]:
    """A weighted sum of the results, as a function of the floating inputs; and these."""
    floating = {name: x for name, x in inputs.items() if x.is_floating_point()}

    def function(*values: Tensor) -> Tensor:
        results = case.ours(**(inputs | dict(zip(floating, values, strict=True))))
        results = [results] if isinstance(results, Tensor) else results
        terms = [y for y in results if y.is_floating_point()] or [y.float() for y in results]
        weights = [torch.linspace(0.5, 1.5, y.numel()).view(y.shape).to(y) for y in terms]
        return torch.stack([(y * w).sum() for y, w in zip(terms, weights, strict=True)]).sum()

    return function, tuple(floating.values())


@each("reference", "cpu", differentiable=True, exact=True)
def test_gradcheck(case: Case, backend: str):
    function, (x, *others) = weighted_sum(case, as_dtype(case.sample.inputs(1), F64))
    leaves = (x.requires_grad_(), *others)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@each("reference", differentiable=True, exact=True)
def test_transforms_of_the_reference(case: Case, backend: str):
    old = TorchVersion(torch.__version__) < TorchVersion("2.14")
    if str(case) == "CrossEntropy of the hardest" and old:
        pytest.skip("torch 2.12 has no batching rule of view(dtype), with which its rank is found")
    function, (x, *others) = weighted_sum(case, as_dtype(case.sample.inputs(1), F64))
    direction, leaf = torch.randn_like(x), x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf, *others), leaf)
    torch.testing.assert_close(grad(function)(x, *others), expected)
    torch.testing.assert_close(vmap(grad(lambda x: function(x, *others)))(x[None])[0], expected)
    along = jvp(lambda x: function(x, *others), (x,), (direction,))[1]
    torch.testing.assert_close(along, (expected * direction).sum())


@each("cpu", "simulated_triton", "simulated_cuda", few_in_machine=True, differentiable=True)
def test_other_derivatives_raise(case: Case, backend: str):
    """Second derivatives, forward mode, torch.func's."""
    whole, (x, *others) = weighted_sum(case, case.sample.inputs(1))

    def function(x: Tensor) -> Tensor:
        return whole(x, *others)

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).square(), leaf, create_graph=True)
    instead = "not implemented"
    if case.entry.exact:
        instead += r' in the fused operators; use .*use_backend\("reference"\) for them'
    with pytest.raises(RuntimeError, match=rf"^\w+: second derivatives are {instead}$"):
        gradient.square().sum().backward()
    if str(case) == "upsampled_sums":  # in a transform it is the reference
        return
    with pytest.raises(RuntimeError, match=rf"^\w+: forward-mode derivatives are {instead}$"):
        jvp(function, (x,), (x,))
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=rf"^\w+: forward-mode derivatives are {instead}$"),
    ):
        function(forward_ad.make_dual(x, x))
    for transformed, argument in (
        (grad(function), x),
        (vmap(grad(function)), x[None]),
        (grad(lambda x: vmap(function)(x[None]).sum()), x),
    ):
        with pytest.raises(RuntimeError, match=rf"^\w+: torch.func's derivatives are {instead}$"):
            transformed(argument)


@each("cpu", "simulated_triton", "simulated_cuda", slow=True, few_in_machine=True)
def test_compiles_as_one_graph(case: Case, backend: str):
    """Also for other sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, recompiles in ((2, True), (3, False)):
        inputs = case.sample.inputs(n)
        with torch._dynamo.config.patch(error_on_recompile=not recompiles):
            actual = results(compiled, inputs)
        torch.testing.assert_close(actual, results(case.ours, inputs))


def exported(function: Function, arguments: tuple[Tensor, ...]) -> Function:
    class Loss(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return function(*arguments)

    with torch.no_grad():
        return torch.export.export(Loss(), arguments).module()


def mapped(function: Function) -> Function:
    return lambda *arguments: vmap(function)(*(x[None] for x in arguments))[0]


# Each makes, from a function and inputs without gradient, a function with the same gradients.
TRACES: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "vmap": lambda f, arguments: mapped(f),
    "compiled vmap": lambda f, arguments: torch.compile(
        mapped(f), backend="aot_eager", fullgraph=True
    ),
    "make_fx": lambda f, arguments: make_fx(f)(*arguments),
    "jit.trace": lambda f, arguments: torch.jit.trace(f, arguments, check_trace=False),
    "export": exported,
}


@each("cpu", slow=True)
@pytest.mark.parametrize("trace", TRACES)
def test_gradients_that_the_call_does_not_see(trace: str, case: Case, backend: str):
    if trace == "jit.trace" and str(case).startswith(("pixel_kl", "pixel_argmax")):
        pytest.skip("jit.trace makes a tensor of each number of a shape, which is no size")
    torch._dynamo.reset()
    function, arguments = weighted_sum(case, case.sample.inputs(1))
    traced = TRACES[trace](function, arguments)
    leaves = [x.clone().requires_grad_() for x in arguments]
    actual, expected = traced(*leaves), function(*leaves)
    torch.testing.assert_close(actual, expected)
    if case.entry.differentiable:
        gradients = [torch.autograd.grad(y, leaves, allow_unused=True) for y in (actual, expected)]
        for ours, right in zip(*gradients, strict=True):
            assert ours is right is None or torch.allclose(ours, right, rtol=1e-5, atol=1e-6)


@each(few_in_machine=True)
def test_autocast_changes_nothing(case: Case, backend: str):
    if str(case) == "upsampled_sums":
        pytest.skip("CeCo, which alone calls it, leaves autocast")

    def run(**inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return case.ours(**inputs)

    inputs = case.sample.inputs(1)
    assert same_bits(results(run, inputs), results(case.ours, inputs))


@each("reference")
def test_meta_tensors(case: Case, backend: str):
    """The results are meta tensors, of the shapes that real tensors would give."""
    inputs = case.sample.inputs(1)
    meta = results(case.ours, {name: x.to("meta") for name, x in inputs.items()})
    for ours, real in zip(meta, results(case.ours, inputs), strict=True):
        assert ours.is_meta and ours.shape == real.shape and ours.dtype == real.dtype


@each("cpu", "simulated_triton", "simulated_cuda", slow=True, few_in_machine=True)
def test_opcheck(case: Case, backend: str):
    """In the machine for PTX, where each run takes long, without what is no part of a kernel: how
    gradients are registered, and compiled functions, which test_compiles_as_one_graph has."""
    inputs = case.sample.inputs(1)
    of_kernels = ("test_schema", "test_faketensor")
    with Calls() as calls:
        results(case.ours, inputs)
    assert calls.recorded
    for call, arguments in calls.recorded:
        which = {"test_utils": of_kernels} if backend.startswith("simulated") else {}
        torch.library.opcheck(call, arguments, **which)


# Outputs of other operators, which no compiler lays out: their kernels read them as contiguous.
OPERATOR_RESULTS = {"keys", "lse", "teacher_lse"}


@each("cpu", "simulated_triton", "simulated_cuda", few_in_machine=True)
def test_strides_that_a_compiler_chooses(case: Case, backend: str):
    """A call has other strides of half of the arguments. Each argument has them in one call at
    least, and of two arguments in one call one of them alone."""
    inputs = case.sample.inputs(1)
    with Calls() as calls:
        results(case.ours, inputs)
    for call, arguments in calls.recorded:
        if torch.Tag.flexible_layout not in call.tags:
            continue
        expected = call(*arguments)
        changed = {
            argument.name: strided(x.detach())
            for argument, x in zip(call._schema.arguments, arguments, strict=True)
            if isinstance(x, Tensor) and x.numel() > 1 and argument.name not in OPERATOR_RESULTS
        }
        for bit in range(len(changed).bit_length()):
            half = {name: x for n, (name, x) in enumerate(changed.items(), 1) if n >> bit & 1}
            named = zip(call._schema.arguments, arguments, strict=True)
            actual = call(*(half.get(argument.name, x) for argument, x in named))
            torch.testing.assert_close(actual, expected, msg=lambda m, a=[*half]: f"{a}: {m}")

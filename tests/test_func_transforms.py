"""torch.func and traces: vmap of the fused operators, all transforms of the reference, messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import anchorops as ao

K, D = 4, 5
LABELS, ANCHORS = torch.arange(9) % (K + 1), torch.linspace(-1, 1, K * D).view(K, D).cos()
OCCL = ao.OCCL(K, D).eval()

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "class_moments": lambda f: ao.ops.class_moments(f, LABELS, K, anchors=ANCHORS)[2].sum(),
    "pixel_to_anchor_mse": lambda f: ao.pixel_to_anchor_mse(f, LABELS, ANCHORS),
    "class_centroids": lambda f: ao.class_centroids(f, LABELS, K)[0].square().sum(),
    "SAR": lambda f: ao.SAR(K, D, embed=False, anchors=ANCHORS)(f, LABELS),
    "OCCL": lambda f: OCCL(f, LABELS, ANCHORS),
    "centroid_info_nce": lambda f: ao.ops.centroid_info_nce(f[:K], ANCHORS, temperature=1.0),
}
fused = [name for name in FUNCTIONS if name != "centroid_info_nce"]  # on CPU the reference
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@each_function
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_vmap(name: str, backend: str) -> None:
    function, features = FUNCTIONS[name], torch.randn(3, 9, D)
    with ao.use_backend(backend):
        expected = torch.stack([function(f) for f in features])
        torch.testing.assert_close(vmap(function)(features), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_vmap_of_confusion(backend: str) -> None:
    logits, labels = torch.randn(3, 2, K, 2, 3), torch.randint(0, K, (2, 4, 6))

    def confusion(logits: Tensor) -> Tensor:
        return ao.pixel_confusion(logits, labels)

    with ao.use_backend(backend):
        expected = torch.stack([confusion(x) for x in logits])
        assert torch.equal(vmap(confusion)(logits), expected)


PIXEL_LABELS = torch.arange(2 * 8 * 9).view(2, 8, 9) % (K + 1)
PIXEL_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda x: ao.pixel_cross_entropy(x, PIXEL_LABELS),
    "label_smoothing": lambda x: ao.pixel_cross_entropy(x, PIXEL_LABELS, label_smoothing=0.1),
    "pixel_losses": lambda x: ao.pixel_cross_entropy(x, PIXEL_LABELS, reduction="none"),
    "focal": lambda x: ao.CrossEntropy(focal_gamma=2.0)(x, PIXEL_LABELS),
    "ohem": lambda x: ao.CrossEntropy(ohem=0.5)(x, PIXEL_LABELS),
    "ohem_kept": lambda x: ao.CrossEntropy(ohem_kept=30)(x, PIXEL_LABELS),
    "pixel_weights": lambda x: ao.CrossEntropy()(x, PIXEL_LABELS, PIXEL_LABELS.float()),
    "dice": lambda x: ao.Dice(squared=True)(x, PIXEL_LABELS),
    "pixel_to_anchor_mse": lambda x: ao.pixel_to_anchor_mse(x, PIXEL_LABELS, torch.eye(K)),
}


def _exported(function: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    class Loss(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    with torch.no_grad():
        return torch.export.export(Loss(), (example,)).module()


# Each makes, from a function and an input without gradient, a function with the same gradient.
TRACES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda f, x: lambda x: vmap(f)(x[None])[0],
    "compiled vmap": lambda f, x: torch.compile(
        lambda x: vmap(f)(x[None])[0], backend="aot_eager", fullgraph=True
    ),
    "make_fx": lambda f, x: make_fx(f)(x),
    "jit.trace": lambda f, x: torch.jit.trace(f, (x,), check_trace=False),
    "export": _exported,
}


@pytest.mark.filterwarnings("ignore")  # of torch.jit: deprecated; of vmap: slow
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", PIXEL_LOSSES)
def test_gradients_that_the_call_does_not_see(name: str, trace: str) -> None:
    torch._dynamo.reset()
    function, x = PIXEL_LOSSES[name], torch.randn(2, K, 3, 4)
    traced = TRACES[trace](function, x)
    leaf = x.clone().requires_grad_()
    direction = torch.randn_like(function(x))
    (expected,) = torch.autograd.grad(function(leaf), leaf, direction)
    (found,) = torch.autograd.grad(traced(leaf), leaf, direction)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_exported_number_of_hard_examples_is_not_that_of_pixels(backend: str) -> None:
    class Loss(torch.nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            with ao.use_backend(backend):
                return ao.CrossEntropy(ohem_kept=100)(logits, labels)

    def inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, K, 3, 4), torch.randint(0, K, (batch, height, width))

    auto = torch.export.Dim.AUTO
    shapes = {"logits": {0: auto}, "labels": {0: auto, 1: auto, 2: auto}}
    exported = torch.export.export(Loss(), inputs(2, 12, 13), dynamic_shapes=shapes).module()
    for shape in ((4, 24, 11), (2, 5, 8)):  # the last one has fewer pixels
        given = inputs(*shape)
        torch.testing.assert_close(exported(*given), Loss()(*given))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("options", [{}, {"ohem": 0.5, "focal_gamma": 1.0, "label_smoothing": 0.1}])
def test_gradients_of_pixel_weights_that_the_call_does_not_see(options: Any, trace: str) -> None:
    torch._dynamo.reset()
    logits = torch.randn(2, K, 3, 4)
    leaf = torch.rand(PIXEL_LABELS.shape).where(PIXEL_LABELS != 1, 0).requires_grad_()

    def function(weights: Tensor) -> Tensor:
        return ao.CrossEntropy(**options)(logits, PIXEL_LABELS, weights)

    traced = TRACES[trace](function, leaf.detach())
    (found,) = torch.autograd.grad(traced(leaf), leaf)
    with ao.use_backend("reference"):
        (expected,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")  # of torch.jit: deprecated
def test_traced_confusion() -> None:
    def confusion(x: Tensor) -> Tensor:
        return ao.pixel_confusion(x, PIXEL_LABELS)

    x, others = torch.randn(2, 2, K, 3, 4)
    traced: Any = torch.jit.trace(confusion, (x,))
    assert torch.equal(traced(others), confusion(others))


FEATURES = torch.linspace(-2, 3, 9 * D).view(9, D).sin()
ANCHOR_LOSSES: dict[str, Callable[[Tensor], Any]] = {
    "class_moments": lambda a: ao.ops.class_moments(FEATURES, LABELS, K, anchors=a)[2],
    "pixel_to_anchor_mse": lambda a: ao.pixel_to_anchor_mse(FEATURES, LABELS, a),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", ANCHOR_LOSSES)
def test_gradients_of_anchors_that_the_call_does_not_see(name: str, trace: str) -> None:
    torch._dynamo.reset()
    function = ANCHOR_LOSSES[name]
    traced = TRACES[trace](function, ANCHORS)
    leaf = ANCHORS.clone().requires_grad_()
    direction = torch.randn_like(function(ANCHORS))
    (found,) = torch.autograd.grad(traced(leaf), leaf, direction)
    with ao.use_backend("reference"):
        (expected,) = torch.autograd.grad(function(leaf), leaf, direction)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_with_learnable_anchors() -> None:
    features, anchors = torch.randn(3, 9, D).requires_grad_(), ANCHORS.clone().requires_grad_()

    def loss(features: Tensor) -> Tensor:
        _, sums, sqdists = ao.ops.class_moments(features, LABELS, K, anchors=anchors)
        assert sqdists is not None
        return (
            sqdists.square().sum() + sums.sum() + ao.pixel_to_anchor_mse(features, LABELS, anchors)
        )

    found = torch.autograd.grad(vmap(loss)(features).sum(), (features, anchors))
    with ao.use_backend("reference"):
        total = torch.stack([loss(f) for f in features]).sum()
        expected = torch.autograd.grad(total, (features, anchors))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_ensemble_of_models() -> None:
    models = [torch.nn.Conv2d(3, K, 1) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    images = torch.randn(2, 3, 3, 4)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        logits = functional_call(models[0], (parameters, buffers), (images,))
        return ao.pixel_cross_entropy(logits, PIXEL_LABELS)

    vmap(loss)(parameters, buffers).sum().backward()
    for i, model in enumerate(models):
        ao.pixel_cross_entropy(model(images), PIXEL_LABELS).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[name].grad[i], parameter.grad)


@pytest.mark.parametrize("trace", ["none", "compiled", "fullgraph", "make_fx"])
@pytest.mark.parametrize("name", ["cross_entropy", "dice"])
def test_forward_mode_raises(name: str, trace: str) -> None:
    torch._dynamo.reset()
    function, x = PIXEL_LOSSES[name], torch.randn(2, K, 3, 4)
    whole = trace == "fullgraph"
    if trace == "make_fx":
        function = make_fx(function)(x)
    elif trace != "none":
        function = torch.compile(function, backend="aot_eager", fullgraph=whole)
    message = r"^softmax_moments: forward-mode derivatives"
    if whole:  # Dynamo of torch 2.14 refuses dual tensors; that of 2.12 traces them
        message += "|forward-mode AD tangent"
    with pytest.raises(RuntimeError, match=message), forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))
    function(x)

    def derivative(x: Tensor) -> Tensor:
        return jvp(PIXEL_LOSSES[name], (x,), (x,))[1]

    if trace == "make_fx":
        with pytest.raises(RuntimeError, match=message):
            jvp(function, (x,), (x,))
    elif trace != "none":
        with pytest.raises(RuntimeError, match="forward-mode derivatives"):
            torch.compile(derivative, backend="aot_eager", fullgraph=whole)(x)


@each_function
def test_derivatives_of_the_reference(name: str) -> None:
    function, features = FUNCTIONS[name], torch.randn(3, 9, D)
    leaf = features[0].clone().requires_grad_()
    with ao.use_backend("reference"):
        (expected,) = torch.autograd.grad(function(leaf), leaf)
        torch.testing.assert_close(grad(function)(features[0]), expected)
        torch.testing.assert_close(vmap(grad(function))(features)[0], expected)
        along = jvp(function, (features[0],), (features[1],))[1]
        expected = (expected * features[1]).sum()
        torch.testing.assert_close(along, expected, check_dtype=False)  # torch widens tangents
        assert hessian(function)(features[0]).shape == (9, D, 9, D)


@pytest.mark.parametrize("name", fused)
def test_derivatives_of_the_fused_operators_raise(name: str) -> None:
    function, features = FUNCTIONS[name], torch.randn(3, 9, D)
    message = r"^class_moments: .*torch.func's derivatives.*use_backend\(\"reference\"\) for them$"
    for run, inputs in (
        (grad(function), features[0]),
        (vmap(grad(function)), features),
        (grad(lambda f: vmap(function)(f).sum()), features),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(inputs)
    with pytest.raises(RuntimeError, match=r"^class_moments: forward-mode derivatives .* them$"):
        jvp(function, (features[0],), (features[1],))


@pytest.mark.parametrize(
    "method",
    [
        ao.SAR(K, D),
        ao.OCCL(K, D),
        ao.MVSC(K, D),
        ao.CeCo(K, D, reduced_dim=3, center_dim=4),
        ao.CBP(K, D, update="ema"),
        ao.Combined(ao.OCCL(K, D)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_state_does_not_move_in_a_transform(method: Any) -> None:
    features = torch.randn(2, 9, D)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    message = rf"^{type(method).__name__}: .*call eval\(\).*use_backend\(\"reference\"\)$"

    def loss(features: Tensor) -> Tensor:
        return method(features, LABELS, ANCHORS)

    for transformed in (vmap(loss), vmap(grad(loss))):
        with pytest.raises(RuntimeError, match=message):
            transformed(features)
    with ao.use_backend("reference"):
        method.eval()
        if not isinstance(method, ao.CBP):  # a constant 0
            assert grad(loss)(features[0]).isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())

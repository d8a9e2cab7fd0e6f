"""Tests of every method: dtypes, layouts, compilation, state, composition, averages of models."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import anchorops as ao
from anchorops._ops import class_moments as class_moments_module
from anchorops.doctor.catalogue import features as catalogue
from anchorops.losses import Regularizer
from anchorops.losses.statistics import Request, class_statistics
from tests.helpers.methods import METHODS, D, K, batch, each_method, each_on_pixels, open_gate
from tests.helpers.operators import Operators, check_loss
from tests.helpers.slow import slow_but


@each_method
def test_terms_sum_to_the_loss_and_settings_show(build: Callable[[], Regularizer]) -> None:
    features, labels, classifier = batch()
    method = build()
    loss = method(features, labels, classifier)
    assert loss.shape == () and loss.dtype == torch.float32
    logs = ("gate", "unsure", "present")
    parts = [v for name, v in method.terms.items() if not name.endswith(logs)]
    torch.testing.assert_close(loss.detach(), torch.stack(parts).sum())
    before = {name: value.clone() for name, value in method.terms.items()}
    with torch.no_grad():
        loss += 1  # as in an accumulated loss
    given = method.terms
    for value in given.values():
        value += 1  # as a mean over ranks in place
    given.clear()
    assert method.terms == before
    for value in method.terms.values():
        assert not value.requires_grad and value.is_floating_point() and value.dim() == 0
    for module in method.modules():
        if isinstance(module, Regularizer) and not isinstance(module, ao.Combined):
            assert all(f"{name}=" in repr(module) for name in ("num_classes", "check_labels"))


def test_a_weight_that_learns() -> None:
    features, labels, classifier = batch()
    method: Any = ao.OCCL(K, D)
    method.category_weight = weight = torch.tensor(0.5, requires_grad=True)
    method(features, labels, classifier).backward()
    terms = method.terms
    torch.testing.assert_close(weight.grad, terms["category"] / 0.5)
    assert not terms["category"].requires_grad


@each_on_pixels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_loss_in_float32(
    build: Callable[[], Regularizer], dtype: torch.dtype
) -> None:
    features, labels, classifier = batch()
    method = open_gate(build())
    low = features.detach().to(dtype).requires_grad_()
    expected = copy.deepcopy(method)(low.float(), labels, classifier)
    with torch.autocast("cpu", dtype=dtype):
        loss = method(low, labels, classifier)
    assert loss.dtype == torch.float32
    # Only CeCo computes in the features' dtype: its projection.
    tolerance = 0.03 if isinstance(method, ao.CeCo) else 1e-5
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    loss.backward()
    assert low.grad is not None and low.grad.dtype == dtype and low.grad.isfinite().all()
    assert low.grad.abs().sum() > 0


@each_method
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("module_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_dtype_of_module_and_features(
    build: Callable[[], Regularizer], module_dtype: torch.dtype, features_dtype: torch.dtype
) -> None:
    """`model.to(dtype)` also converts the regulariser."""
    features, labels, classifier = batch()
    method, classifier = open_gate(build()).to(module_dtype), classifier.to(module_dtype)
    low = features.detach().to(features_dtype).requires_grad_()
    exact, exact_classifier = (copy.deepcopy(module).double() for module in (method, classifier))
    expected = exact(low.detach().double(), labels, exact_classifier)
    loss = method(low, labels, classifier)
    assert loss.dtype == (torch.float64 if features_dtype == torch.float64 else torch.float32)
    # SAR's embedding and CeCo's projection compute in their own dtype.
    coarse = torch.bfloat16 in (module_dtype, features_dtype)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3 if coarse else 1e-5, atol=1e-5)
    if loss.requires_grad:
        loss.backward()
    if low.grad is not None:
        assert low.grad.dtype == features_dtype and low.grad.isfinite().all()


@each_method
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_waits_for_the_device(build: Callable[[], Regularizer], backend: str) -> None:
    """On a GPU each of these operators would synchronise with the host, or forbid a CUDA graph."""
    features, labels, classifier = batch()
    method = open_gate(build())
    with ao.use_backend(backend), Operators() as operators:
        method(features, labels, classifier).backward()
    waits = {"lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
    called = {name.split(".")[1] for name in operators.names}
    assert called and not called & waits


@each_method
def test_nothing_valid_is_finite(build: Callable[[], Regularizer]) -> None:
    features, labels, classifier = batch()
    method = build()
    loss = method(features, torch.full_like(labels, 255), classifier)
    assert loss.isfinite()
    terms = {name.rpartition(".")[2]: term for name, term in method.terms.items()}
    need_no_features = terms.keys() & {"aux", "cos", "penalty"}  # as docs/methods.md says
    assert {name for name in terms if terms[name] != 0} - {"unsure", "gate"} == need_no_features
    loss.backward()
    for parameter in (features, *method.parameters()):
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all()
    assert features.grad is None or features.grad.abs().max() == 0


@pytest.mark.parametrize("build", [METHODS[n] for n in ("SAR", "CR", "OCCL", "MVSC", "combined")])
def test_ignored_pixels_may_be_nan(build: Callable[[], Regularizer]) -> None:
    features, labels, classifier = batch()
    method = open_gate(build())
    spoiled = features.detach().clone()
    spoiled[:, :, 0] = torch.nan  # rows 0-3 of the labels are ignored
    spoiled.requires_grad_()
    expected = copy.deepcopy(method)(features, labels, classifier)
    loss = method(spoiled, labels, classifier)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert spoiled.grad is not None and spoiled.grad.isfinite().all()


@each_on_pixels
def test_any_ignore_index(build: Callable[[], Regularizer]) -> None:
    features, labels, classifier = batch()
    method = open_gate(build())
    expected = copy.deepcopy(method)(features, labels, classifier)
    for ignored in (-1, 2**31):
        for module in method.modules():
            if isinstance(module, Regularizer):
                module.ignore_index = ignored
        other = torch.where(labels == 255, ignored, labels)
        loss = copy.deepcopy(method)(features, other, classifier)
        torch.testing.assert_close(loss, expected)


FEW: dict[str, tuple[Tensor, Tensor]] = {
    "no point": (torch.zeros(0, D), torch.zeros(0, dtype=torch.long)),
    "one image of one class": (torch.randn(1, D, 6, 7), torch.full((1, 24, 28), 3)),
}


@each_on_pixels
@pytest.mark.parametrize("few", FEW)
def test_few_pixels(few: str, build: Callable[[], Regularizer]) -> None:
    method, classifier = open_gate(build()), batch()[2]
    if "images" in getattr(method, "split", ""):
        pytest.skip("halves of the batch's images need two of them")
    features = FEW[few][0].clone().requires_grad_()
    loss = method(features, FEW[few][1], classifier)
    loss.backward()
    assert loss.isfinite() and features.grad is not None
    assert all(value.isfinite().all() for value in method.state_dict().values())


@each_on_pixels
def test_points(build: Callable[[], Regularizer]) -> None:
    """(N, D) and (B, D, N) are other views of (B, D, H, W)."""
    features, labels, classifier = batch()
    labels = labels[:, ::4, ::4]
    method = open_gate(build())
    as_points = [features.flatten(2), labels.flatten(1)]
    as_rows = [features.movedim(1, -1).flatten(0, 2), labels.flatten()]
    loss = copy.deepcopy(method)(*as_points, classifier)
    if getattr(method, "resolution", "") == "label":
        features = features.detach()  # at the features' size the labels need no upsampling
    torch.testing.assert_close(copy.deepcopy(method)(features, labels, classifier), loss)
    if getattr(method, "split", "") != "images":
        torch.testing.assert_close(copy.deepcopy(method)(*as_rows, classifier), loss)
    else:
        with pytest.raises(ValueError, match="at least 2 images"):
            method(*as_rows, classifier)
        assert method.step == 0


@each_method
def test_weight_tensor_in_place_of_the_module(build: Callable[[], Regularizer]) -> None:
    features, labels, classifier = batch()
    nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]
    method = build()
    expected = copy.deepcopy(method)(features, labels, classifier)
    for weight in (classifier.weight, classifier.weight.flatten(1)):
        loss = copy.deepcopy(method)(features, labels, weight)
        torch.testing.assert_close(loss, expected)


@each_method
def test_state_round_trip_and_copies(build: Callable[[], Regularizer]) -> None:
    features, labels, classifier = batch()
    method = open_gate(build())
    for _ in range(2):
        method(features, labels, classifier)
    buffer = io.BytesIO()
    torch.save(method.state_dict(), buffer)
    buffer.seek(0)
    restored = open_gate(build())
    restored.load_state_dict(torch.load(buffer))
    copied = copy.deepcopy(method)
    for _ in range(2):
        loss = method(features, labels, classifier)
        torch.testing.assert_close(restored(features, labels, classifier), loss)
        torch.testing.assert_close(copied(features, labels, classifier), loss)
    torch.testing.assert_close(restored.state_dict(), method.state_dict())


def every_loss() -> Regularizer:
    ceco, cbp = METHODS["CeCo"](), METHODS["CBP, penalty"]()
    return ao.Combined(ao.SAR(K, D), ao.OCCL(K, D), ao.MVSC(K, D), ceco, cbp)


@pytest.mark.parametrize(
    "build",
    slow_but(
        "SAR", "OCCL", "CeCo", "CBP, penalty", "inductor", of=METHODS | {"inductor": every_loss}
    ),
)
def test_compiles_as_one_graph(build: Callable[[], Regularizer]) -> None:
    """Once for all numbers of images."""
    torch.compiler.reset()
    backend = "inductor" if build is every_loss else "aot_eager"
    method = open_gate(build())
    eager = copy.deepcopy(method)
    compiled = torch.compile(method, fullgraph=True, backend=backend)
    for images in (3, 2, 4):
        features, labels, classifier = batch(images)
        for tensor in (features, labels):
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch._dynamo.config.patch(error_on_recompile=images != 3):
            loss = compiled(features, labels, classifier)
        expected = eager(features, labels, classifier)
        torch.testing.assert_close(loss, expected)
        inputs, others = ([features, *x.parameters()] for x in (method, eager))
        for got, want in zip(
            torch.autograd.grad(loss, [p for p in inputs if p.requires_grad], allow_unused=True),
            torch.autograd.grad(
                expected, [p for p in others if p.requires_grad], allow_unused=True
            ),
            strict=True,
        ):
            if want is None or got is None:
                assert (got is None or not got.any()) and (want is None or not want.any())
            else:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.state_dict(), eager.state_dict())
    assert method.terms.keys() == eager.terms.keys()


def test_gradient_of_ceco_in_evaluation() -> None:
    """It does not use the mean and the variance of the features."""
    torch.manual_seed(0)
    features = torch.randn(2, D, 1, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, K, (2, 1, 3))
    ceco = METHODS["CeCo"]().double().eval()
    assert torch.autograd.gradcheck(lambda f: ceco(f, labels), features)


def methods_of(together: Regularizer) -> nn.ModuleList:
    assert isinstance(together, ao.Combined)
    return together.methods


def test_combined_equals_its_parts_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, classifier = batch()
    together = open_gate(METHODS["combined"]())
    apart = [copy.deepcopy(method) for method in methods_of(together)]
    passes = []
    moments = class_moments_module.unchecked_moments

    def counted(*args: object, **kwargs: object) -> ao.ops.ClassMoments:
        passes.append(kwargs["groups"])
        return moments(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("anchorops.losses.statistics.unchecked_moments", counted)
    for _ in range(2):
        loss = together(features, labels, classifier)
        assert passes == [4]  # OCCL's views are pairs of MVSC's groups
        expected = torch.stack([method(features, labels, classifier) for method in apart]).sum()
        passes.clear()
        check_loss(loss, expected, features, rtol=1e-5, atol=1e-7)


def test_sums_only_for_methods_that_request_them() -> None:
    """Statistics that SAR does not request are not reduced over the ranks."""
    features, labels, _ = batch()
    anchored = Request(anchors=torch.randn(K, D), with_sums=False)
    views = Request(groups=2, seed=torch.zeros((), dtype=torch.int64))
    for requests in ([anchored], [anchored, views]):
        moments = class_statistics(features, labels, K, requests, 255)[0]
        assert moments.sums.numel() == 0 and moments.sqdists.shape == (K,)


def test_combined_with_images_and_two_sets_of_anchors() -> None:
    features, labels, classifier = batch()
    together = ao.Combined(
        ao.SAR(K, D, gate="per_class", delta=0.0),
        ao.SAR(K, D, embed=False),
        ao.OCCL(K, D, split="images"),
        ao.MVSC(K, D, groups=3),
        ao.CeCo(K, D, reduced_dim=7, center_dim=9, dropout=0.0, resolution="feature"),
    )
    apart = [copy.deepcopy(method) for method in methods_of(together)]
    expected = torch.stack([method(features, labels, classifier) for method in apart]).sum()
    torch.testing.assert_close(together(features, labels, classifier), expected)
    assert {"sar1.aux", "sar1.p2a", "sar2.p2a", "occl.centroid"} < set(together.terms)


def test_combined_refuses_what_does_not_fit() -> None:
    for other, message in (
        (ao.OCCL(K + 1, D), "num_classes"),
        (ao.OCCL(K, D + 1), "dim"),
        (ao.OCCL(K, D, ignore_index=0), "ignore_index"),
        (ao.OCCL(K, D, seed=1), "seed"),
    ):
        with pytest.raises(ValueError, match=f"Combined: regularizers: expected one {message}"):
            ao.Combined(ao.MVSC(K, D), other)
    for regularizers, message in (
        ((), "at least one"),
        ((ao.CBP(K, D), ao.CBP(K, D, update="ema")), "at most one CBP"),
    ):
        with pytest.raises(ValueError, match=f"Combined: regularizers: expected {message}"):
            ao.Combined(*regularizers)


DECAY = 0.75
AVERAGES = {  # that Lightning's callbacks use
    "swa": {},
    "ema": {"avg_fn": swa_utils.get_ema_avg_fn(DECAY)},
    "multi_ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)},
}


def average(model: nn.Module, name: str) -> swa_utils.AveragedModel:
    return swa_utils.AveragedModel(model, use_buffers=True, **AVERAGES[name])


def model_and_loss(method: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, D, 1), nn.Conv2d(D, K, 1))
    return model, ao.attach(model, catalogue.METHODS[method](K, D))


def train(model: nn.Module, loss: Any, steps: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(torch.randn(2, 4, 6, 5))
        (logits.square().mean() + loss(torch.randint(0, K, (2, 6, 5)))).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("method", ao.losses.METHODS)
def test_the_average_of_a_model(method: str, kind: str) -> None:
    model, loss = model_and_loss(method)
    averaged = average(model, kind)
    expected: dict[str, Tensor] = {}
    for n in range(4):
        train(model, loss)
        averaged.update_parameters(model)
        for name, value in model.state_dict().items():
            share = 1 / (n + 1) if n == 0 or kind == "swa" else 1 - DECAY
            before = expected.get(name, torch.zeros_like(value))
            expected[name] = before + share * (value - before)
    state = averaged.module.state_dict()
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype and value.dtype != torch.bool
        if value.is_floating_point():
            torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=1e-6)
        else:
            assert 0 <= state[name] <= value == 4
    averaged.eval()(torch.randn(1, 4, 6, 5))
    other, its_loss = model_and_loss(method)  # training continues from the average
    other.load_state_dict(state)
    train(other, its_loss, 2)
    assert all(value.isfinite().all() for value in other.state_dict().values())


def test_the_average_has_the_classes_that_have_started() -> None:
    model, loss = model_and_loss("SAR")
    averaged = average(model, "multi_ema")
    sar = loss.regularizer
    sar.delta = 1.0  # no class is recognised
    train(model, loss)
    averaged.update_parameters(model)
    (copied,) = (m for m in averaged.modules() if isinstance(m, ao.SAR))
    assert not copied.started.any()
    sar.delta = 0.0
    train(model, loss, 5)
    averaged.update_parameters(model)
    assert sar.started.any() and torch.equal(copied.started, sar.started)

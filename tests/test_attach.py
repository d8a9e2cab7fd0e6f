"""attach: the model before, during and after it, when the features are available, several forwards
before a call of the method, and the chosen classifier and features in common models."""

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao
from anchorops import Attachment
from anchorops.doctor.catalogue.features import METHODS
from anchorops.losses import Regularizer
from tests.helpers.small_networks import (
    NO_TORCHVISION,
    D,
    K,
    Net,
    backward,
    batch,
    smp_model,
    torchvision_model,
    transformers_segformer,
)


class Keyword(Net):
    """It calls its layers by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(input=self.dropout(input=self.body(x).relu()))


@pytest.mark.parametrize("network", [Net, Keyword])
def test_features_are_the_classifiers_input_before_dropout(network: type[Net]) -> None:
    model = network(dropout=0.5)
    cr = ao.attach(model, ao.SAR(K, D, embed=False))
    assert cr.classifier_name == "classifier"  # not the auxiliary head
    x, labels = batch()
    assert cr.features is None
    model(x)
    features = model.body(x).relu()
    torch.testing.assert_close(cr.features, features)
    torch.testing.assert_close(cr(labels), cr.regularizer(features, labels))
    assert cr.features is None  # taken


def test_evaluation_is_the_bare_model() -> None:
    model = Net(dropout=0.5).eval()
    x, labels = batch()
    bare = torch.export.export(model, (x,))
    logits = model(x)
    sar = ao.attach(model, ao.SAR(K, D))
    model.train()(x)  # eval() drops its features
    model.eval()
    state = copy.deepcopy(model.state_dict())
    assert torch.equal(model(x), logits)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="SAR: no features: in eval mode"):
        sar(labels)
    exported = torch.export.export(model, (x,))
    operators = [
        [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        for program in (bare, exported)
    ]
    assert operators[0] == operators[1]


@pytest.mark.parametrize("strict", [False, True])
def test_export_in_training_keeps_no_features(strict: bool) -> None:
    model = Net().train()
    x, labels = batch()
    sar = ao.attach(model, ao.SAR(K, D))
    torch.export.export(model, (x,), strict=strict)
    with pytest.raises(RuntimeError, match="SAR: no features"):
        sar(labels)


def test_copies_have_features_of_their_own() -> None:
    model = Net()
    sar = ao.attach(model, ao.SAR(K, D))
    x, labels = batch()
    model(x)
    copies: Any = (
        copy.deepcopy(model),
        torch.optim.swa_utils.AveragedModel(model).module,
        pickle.loads(pickle.dumps(model)),
    )
    losses = []
    for copied in copies:
        copied_method = copied.regularizer.attachment
        assert isinstance(copied_method, Attachment) and copied_method is not sar
        assert (
            copied_method.classifier is copied.classifier
            and copied_method.regularizer is copied.regularizer
        )
        with pytest.raises(RuntimeError, match="no features"):
            copied_method(labels)
        kept = sar._features
        copied(x)
        assert sar._features is kept is not None
        losses.append(copied_method(labels))
        copied_method.detach()
        assert not hasattr(copied, "regularizer") and hasattr(model, "regularizer")
    torch.testing.assert_close(losses, [sar(labels)] * len(losses))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_parts(copied: Callable[[Any], Any]) -> None:
    """A method alone is copied without the model. A detached attachment stays so."""
    model = Net()
    sar = ao.attach(model, ao.SAR(K, D))
    alone = copied(sar.regularizer)
    assert alone.attachment is None
    ao.attach(Net(), alone)
    assert len(pickle.dumps(sar.regularizer)) < len(pickle.dumps(model))
    for parts in ((model, sar), (sar, model), (sar.regularizer, sar, model)):
        others = copied(parts)
        other, attachment = (others[parts.index(part)] for part in (model, sar))
        assert other.regularizer.attachment is attachment is not sar
    shallow = copy.copy(sar)
    x, labels = batch()
    model(x)
    sar(labels)
    sar.detach()
    shallow.detach()
    second = ao.attach(model, sar.regularizer)  # type: ignore[arg-type]
    for detached in (sar, shallow, copied(sar)):
        detached.detach()
    assert second.regularizer.attachment is second and hasattr(model, "regularizer")


def test_a_copy_gets_its_own_classifier_back() -> None:
    """A copy has its own replaced classifier, so detaching it does not change the original."""
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cbp = ao.attach(model, ao.CBP(K, D))
    copies: Any = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    for copied in copies:
        copied.to(torch.float64)
        copied.regularizer.attachment.detach()
        state = copied.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], value.double()) for name, value in before.items())
    assert cbp.classifier.bias is None and not torch.equal(
        model.classifier.weight, before["classifier.weight"]
    )


@pytest.mark.parametrize("build", [lambda: ao.SAR(K, D), lambda: ao.OCCL(K, D)])
def test_compiled_after_attach(build: Callable[[], Regularizer]) -> None:
    """The model, and the whole step, as one graph."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Net()
    attached = ao.attach(model, build())
    eager, eager_attached = copy.deepcopy((model, attached))
    x, labels = batch()

    def step(model: Any, attached: Attachment) -> Tensor:
        return F.cross_entropy(model(x), labels[:, ::2, ::2]) + attached(labels)

    compiled_model = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = [step(eager, eager_attached) for _ in range(4)]
    torch._dynamo.utils.counters.clear()
    for want in expected[:2]:
        torch.testing.assert_close(step(compiled_model, attached), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    for want in expected[2:]:
        loss = compiled_step(model, attached)
        torch.testing.assert_close(loss, want)
    loss.backward()
    expected[-1].backward()
    assert model.body.weight.grad is not None
    torch.testing.assert_close(model.body.weight.grad, eager.body.weight.grad)


def test_errors() -> None:
    x, labels = batch()
    model, occl, wider = Net(), ao.OCCL(K, D), Net()
    wider.aux_head = nn.Conv2d(D + 1, K, 1)  # an auxiliary head is not taken
    others = r"none like it; layers with 5 outputs: classifier \(16 → 5\), aux_head"
    a_module = "module: expected a module of the model"
    of_volumes = nn.Sequential(nn.Conv3d(3, D, 1), nn.Conv3d(D, K, 1))
    patches = nn.Sequential(nn.ConvTranspose2d(D, K, 4, stride=4))
    instead = (
        r"make it a 1×1 convolution, or call the method with features \(B, D, N\), .* \(K, D\)"
    )
    arguments: list[tuple[tuple[Any, ...], str]] = [
        ((model, ao.OCCL(K, D + 1)), others),
        ((wider, ao.OCCL(K, D + 1)), r'no "aux", or module, .* aux_head \(17 → 5\)$'),
        ((wider, ao.OCCL(K + 1, D)), r"got none like it$"),
        ((model, occl, "head"), f"{a_module} or its name, got 'head'"),
        ((model, occl, nn.Conv2d(D, K, 1)), f"attach: {a_module}"),
        ((model, occl, "body"), r"attach: module: .* 16 → 5, got body"),
        ((model, nn.ReLU()), "attach: regularizer"),
        ((nn.DataParallel(model), occl), r"attach: model: .* threads"),
        ((of_volumes, occl), rf"none like it; of another kind: 1 \(Conv3d 16 → 5\): {instead}"),
        ((of_volumes, occl, "1"), rf"module: .* \(for a layer of another kind {instead}\), got 1:"),
        ((patches, occl), r"another kind: 0 \(ConvTranspose2d 16 → 5\): make it a 1×1 convolution"),
    ]
    for given, message in arguments:
        with pytest.raises(ValueError, match=message):
            ao.attach(*given)
    attached = ao.attach(model, occl)
    with pytest.raises(ValueError, match="not attached, got one on classifier"):
        ao.attach(Net(), occl)
    with pytest.raises(RuntimeError, match="OCCL: no features: layer classifier has not run"):
        attached(labels)
    with torch.no_grad():
        model(x)
    with pytest.raises(RuntimeError, match="in training mode, with gradients"):
        attached(labels)
    model(x)
    attached(labels)
    with pytest.raises(RuntimeError, match="it was already called after this forward"):
        attached(labels)
    whole = nn.Sequential(nn.Conv2d(3, D, 1), nn.Conv2d(D, K, 1))  # the method is in its layer 1
    ao.attach(whole, ao.OCCL(K, D))
    other = nn.Conv2d(D, K, 1)
    other._forward_pre_hooks = whole[1]._forward_pre_hooks  # as torch.ao.quantization
    with pytest.raises(RuntimeError, match=r"^OCCL: layer 1, .* first replace the layer, then att"):
        nn.Sequential(whole[0], other)(x)


@pytest.mark.parametrize("name", ao.losses.METHODS)
@pytest.mark.parametrize("sequential", [False, True])
def test_a_method_twice_is_refused(name: str, sequential: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, D, 1), nn.Conv2d(D, K, 1)) if sequential else Net()
    handle = ao.attach(model, METHODS[name](K, D))
    for again in (METHODS[name](K, D), ao.Combined(METHODS[name](K, D))):
        keys = model.state_dict().keys()
        message = rf"^attach: regularizer: expected .* first detach\(\) .*, got a second {name}$"
        with pytest.raises(ValueError, match=message):
            ao.attach(model, again)
        assert model.state_dict().keys() == keys
    if not sequential:
        ao.attach(model, METHODS[name](K, D), "aux_head")  # another classifier
    handle.detach()
    ao.attach(model, METHODS[name](K, D))


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_methods_are_detached_in_any_order(order: tuple[int, ...]) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    x, labels = batch()
    logits = model(x)
    methods = ao.Combined(ao.CBP(K, D)), ao.OCCL(K, D), ao.MVSC(K, D)
    handles = [ao.attach(model, method) for method in methods]
    for i in order:
        model(x)
        for handle in handles:
            if handle.regularizer.attachment is not None:
                handle(labels)
        handles[i].detach()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(model(x), logits)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_detached_attachment_changes_and_shows_nothing_of_its_successor() -> None:
    model = Net()
    x, labels = batch()
    mvsc = ao.MVSC(K, D)
    first = ao.attach(model, mvsc)
    model(x)
    first(labels)
    shown = repr(first)
    first.detach()
    second = ao.attach(model, ao.OCCL(K, D))
    model(x)
    first.forget()
    first.detach()
    assert {"fca", "cos", "visual"} < first.terms.keys()
    assert first.features is None and repr(first) == shown
    second(labels).backward()
    third = ao.attach(model, mvsc)  # and may be attached again
    first.detach()
    model(x)
    (second(labels) + third(labels)).backward()
    with pytest.raises(RuntimeError, match="MVSC: no features: it was detached"):
        first(labels)


def test_functional_transforms_of_a_model_with_a_method() -> None:
    x, _ = batch()
    model = Net()
    ao.attach(model, ao.OCCL(K, D))
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    gradients = torch.func.grad(loss)(parameters, x)
    loss(parameters, x).backward()
    torch.testing.assert_close(gradients["body.weight"], model.body.weight.grad)
    each = torch.func.vmap(loss, (None, 0))(parameters, x[:, None])
    torch.testing.assert_close(each.mean(), loss(parameters, x))


def test_meta_models() -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"SAR: torch.device: expected .* outside of .*, got meta"),
    ):
        ao.SAR(K, D)
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match=r"CBP: classifier: expected .* to_empty\(\) before attac"):
        ao.attach(model, ao.CBP(K, D))
    sar = ao.attach(model, ao.SAR(K, D))
    x, labels = batch()
    model.to("meta")
    loss = model(x.to("meta")).mean() + sar(labels.to("meta"))
    assert loss.is_meta and loss.shape == ()


@pytest.mark.parametrize("name", ["SAR", "CR", "OCCL", "MVSC", "CeCo", "CBP, penalty", "combined"])
def test_memory_that_to_empty_has_not_filled(name: str) -> None:
    model = Net()
    attached = ao.attach(model, METHODS[name](K, D))
    state = copy.deepcopy(model.state_dict())
    backward(model, attached)
    model.load_state_dict(state)
    torch.manual_seed(0)
    expected = backward(model, attached)
    x, labels = batch()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)
    model(x)
    with pytest.raises(ValueError, match=r"state: expected values: .* to_empty\(\)"):
        attached(labels)
    model.load_state_dict({k: v for k, v in state.items() if "regularizer" not in k}, strict=False)
    if not isinstance(attached.regularizer, ao.CBP):  # its rows are the classifier's
        attached.forget()
        model(x)
        with pytest.raises(ValueError, match="state: expected values"):
            attached(labels)
    model.load_state_dict(state)
    attached.forget()
    torch.manual_seed(0)
    torch.testing.assert_close(backward(model, attached), expected)


def test_the_labels_of_several_forwards_are_refused() -> None:
    """Two views, and a classifier that runs twice in one forward."""
    x, labels = batch()
    model = Net()
    occl = ao.attach(model, ao.OCCL(K, D))
    model(x)
    model(x.flip(3))
    for _ in range(2):  # the error does not take the features
        with pytest.raises(RuntimeError, match=r"OCCL: features of several forwards: .* once"):
            occl(labels)
    occl.forget()
    model(x)
    occl(labels)

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[..., ::2, ::2]).mean() + super().forward(x)

    model = Twice()
    occl = ao.attach(model, ao.OCCL(K, D))
    model(x)
    with pytest.raises(RuntimeError, match="use_last=True"):
        occl(labels)
    occl.detach()
    occl = ao.attach(model, ao.OCCL(K, D), use_last=True)
    model(x)
    assert occl.features is not None and occl.features.shape == (2, D, 4, 4)  # of the last run
    occl(labels)
    with pytest.raises(ValueError, match="attach: use_last: expected True or False, got 1"):
        ao.attach(model, ao.OCCL(K, D), use_last=1)  # type: ignore[arg-type]


def test_forwards_whose_features_nobody_can_mean_do_not_count() -> None:
    x, labels = batch()
    model = Net()
    occl = ao.attach(model, ao.OCCL(K, D))
    for _ in range(2):  # gradient accumulation: a loss after each forward
        (model(x).mean() + occl(labels)).backward()
    for _ in range(2):  # steps without the method's loss
        model(x).mean().backward()
    (model(x).mean() + occl(labels)).backward()
    first, last = model(x), model(x.flip(3))
    first.mean().backward()  # it has not gone through the last features
    model(x)
    with pytest.raises(RuntimeError, match="several forwards"):
        occl(labels)
    last.mean().backward()
    occl.forget()
    with torch.no_grad():
        model(x)
    model(x)
    with torch.no_grad():
        model(x.flip(3))
    model.train()
    occl(labels)
    model(x)
    model.eval()
    model(x)
    model.train()
    model(x)
    assert occl(labels).isfinite()


def test_several_forwards_of_a_compiled_model() -> None:
    torch.compiler.reset()
    x, labels = batch()
    compiled: Any = torch.compile(Net(), fullgraph=True, backend="aot_eager")
    occl = ao.attach(compiled, ao.OCCL(K, D))
    for _ in range(2):
        (compiled(x).mean() + occl(labels)).backward()
    compiled(x)
    compiled(x)
    with pytest.raises(RuntimeError, match=r"several forwards.*forget\(\)"):
        occl(labels)
    occl.forget()
    compiled(x)
    occl(labels)


def timm_classifier() -> nn.Module:
    timm = pytest.importorskip("timm", reason=NO_TORCHVISION)
    return timm.create_model("resnet18", pretrained=False, num_classes=K, drop_rate=0.5)


@pytest.mark.parametrize(
    ("build", "dim", "name"),
    [
        (smp_model("Unet"), 16, "segmentation_head.0"),  # 3×3
        (torchvision_model("deeplabv3_resnet50"), 256, "classifier.4"),  # its auxiliary is alike
        (transformers_segformer, D, "decode_head.classifier"),
        (timm_classifier, 512, "fc"),
    ],
)
def test_finds_the_classifier(build: Callable[[], nn.Module], dim: int, name: str) -> None:
    model = build()
    occl = ao.attach(model, ao.OCCL(K, dim))
    assert occl.classifier_name == name and name in repr(occl)
    x, labels = batch(32, images=4)
    labels[0], labels[1] = labels[2], labels[3]
    model(x)
    assert occl._features is not None and occl._features.requires_grad
    assert occl._features.shape[:2] == (4, dim)
    assert occl(labels[:, 0, 0] if name == "fc" else labels) > 0


def test_dropout_elsewhere_is_passed_over_too() -> None:
    """FPN of segmentation-models-pytorch ends its decoder, not its head, with a dropout."""
    model = smp_model("FPN")()
    occl = ao.attach(model, ao.OCCL(K, 128))
    inputs: list[Tensor] = []
    dropout = model.get_submodule("decoder.dropout")
    hook = dropout.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(batch(32)[0])
    assert occl._features is inputs[0]
    hook.remove()
    occl.detach()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_linear_classifier_on_tokens() -> None:
    """(B, N, D) into a linear layer: a view as (B, D, N)."""
    model = nn.Sequential(nn.Linear(D, K))
    occl = ao.attach(model, ao.OCCL(K, D))
    x, labels = torch.randn(2, 30, D, requires_grad=True), torch.randint(0, K, (2, 30))
    model(x)
    assert occl.features is x
    expected = copy.deepcopy(occl.regularizer)(x.transpose(1, 2), labels, model[0])
    torch.testing.assert_close(occl(labels), expected)
    model(x)
    message = r"OCCL: labels: expected \(B, N\), .* of layer 0 .* 1×1 convolution .* \(2, 5, 6\)"
    with pytest.raises(ValueError, match=message):
        occl(labels.view(2, 5, 6))


def test_frozen_features_are_told_once() -> None:
    model = Net()
    model.body.requires_grad_(False)
    both = ao.attach(model, ao.Combined(ao.SAR(K, D), ao.OCCL(K, D)))
    x, labels = batch()
    model(x)
    with pytest.warns(UserWarning, match=r"^SAR \+ OCCL: the features that reach layer classifier"):
        both(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        both(labels)

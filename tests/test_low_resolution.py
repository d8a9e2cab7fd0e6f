"""low_resolution: the same loss and gradients as the model that upsamples, the unchanged model in
eval mode (unless always=True), and errors if this is not possible."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anchorops as ao
from tests.helpers.small_networks import K, smp_model, torchvision_model

D = 8


def batch(size: tuple[int, int] = (64, 64), images: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(images, 3, *size), torch.randint(0, K, (images, *size))


class Net(nn.Module):
    """A body with an upsampling inside, batch norm and dropout, a classifier and `after`."""

    def __init__(self, after: Callable[[Tensor, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, D, 3, stride=8, padding=1)
        self.norm, self.dropout = nn.BatchNorm2d(D), nn.Dropout(0.5)
        self.classifier = nn.Conv2d(D, K, 1)
        self.after = after

    def logits(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.body(x)).relu())
        return self.classifier(F.interpolate(x, scale_factor=2, mode="bilinear"))

    def forward(self, x: Tensor) -> Any:
        logits = self.logits(x)
        if self.after is not None:
            return self.after(logits, x)
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)


def upsampled(x: Tensor, size: Any = None, **options: Any) -> Tensor:
    return F.interpolate(x, size, **{"mode": "bilinear", "align_corners": False} | options)


class TrainingHeads(Net):
    """In training mode only: a tuple with an auxiliary head and a score of the image."""

    def forward(self, x: Tensor) -> Any:
        logits = self.logits(x)
        up = nn.Upsample(scale_factor=(4, 4), mode="bilinear", align_corners=True)
        if not self.training:
            return up(logits)
        return up(logits), [up(logits * 2)], logits.mean((2, 3))


def upernet() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[D] * 4, depths=[1] * 4, out_features=stages
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, num_labels=K, hidden_size=D, auxiliary_channels=D
    )
    return transformers.UperNetForSemanticSegmentation(config)


def model_output() -> nn.Module:
    outputs = pytest.importorskip("transformers.modeling_outputs", reason="it is not installed")
    return Net(lambda z, x: outputs.SemanticSegmenterOutput(logits=upsampled(z, x.shape[2:])))


def maps(output: Any) -> list[Tensor]:
    """The logits of every head."""
    if isinstance(output, Tensor):
        return [output] if output.dim() == 4 else []
    items = output.values() if isinstance(output, Mapping) else output
    return [logits for item in items for logits in maps(item)]


def step(model: nn.Module, x: Tensor, labels: Tensor, align_corners: bool) -> tuple[Tensor, Any]:
    """Loss of all heads and the logits' size, from the same random numbers each time."""
    torch.manual_seed(1)
    model.train().zero_grad()
    heads = maps(model(x))
    full = [upsampled(z, labels.shape[1:], align_corners=align_corners) for z in heads]
    loss = torch.stack([F.cross_entropy(z, labels) for z in full]).sum()
    loss.backward()
    return loss.detach(), tuple(heads[0].shape[2:])


def check_step(plain: nn.Module, model: nn.Module, x: Tensor, labels: Tensor, **how: Any) -> None:
    """One step of both: the same loss, gradients and statistics, from logits of `low`."""
    bare, align_corners, low = how.get("bare", model), how.get("corners", False), how["low"]
    expected, size = step(plain, x, labels, align_corners)
    assert size == labels.shape[1:]
    loss, size = step(model, x, labels, align_corners)
    assert size == low
    torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(plain.named_parameters(), bare.parameters(), strict=True):
        if p.grad is None:  # the unchanged model has no gradient there either
            assert q.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    for p, q in zip(plain.buffers(), bare.buffers(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize(
    ("build", "places", "corners", "stride"),
    [
        (Net, ["the output"], False, 4),
        (TrainingHeads, ["[0]", "[1][0]"], True, 4),
        (torchvision_model("deeplabv3_mobilenet_v3_large"), ["['out']", "['aux']"], False, 16),
        (smp_model("Segformer"), ["the output"], True, 4),
        (upernet, ["['logits']"], False, 4),
    ],
    ids=["net", "training-heads", "deeplab", "segformer", "upernet"],
)
def test_trains_as_the_plain_model(
    build: Callable[[], nn.Module], places: list[str], corners: bool, stride: int, always: bool
) -> None:
    model = build()
    plain = copy.deepcopy(model)
    handle = ao.low_resolution(model, batch(images=1)[0], always=always)
    assert (handle.outputs, handle.align_corners) == (places, corners)
    x, labels = batch((96, 64))  # another size than in the dry run
    low = (96 // stride, 64 // stride)
    check_step(plain, model, x, labels, corners=corners, low=low)
    for full, found in zip(maps(plain.eval()(x)), maps(model.eval()(x)), strict=True):
        assert (found.shape != full.shape) == always
        found = upsampled(found, (96, 64), align_corners=corners) if always else found
        torch.testing.assert_close(found, full)
    assert type(model).__name__ == type(plain).__name__ and isinstance(model, type(plain))
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.state_dict().keys() == plain.state_dict().keys()
    handle.remove()
    handle.remove()
    assert type(model) is type(plain) and vars(model).keys() == vars(plain).keys()


def test_the_dry_run_leaves_no_trace() -> None:
    """Not even of a model that changes its images."""
    model = Net().train()
    x, labels = batch()
    step(model, x, labels, False)
    model.eval()
    before, given = copy.deepcopy(model), x.clone()
    hook = model.register_forward_pre_hook(lambda _, args: (args[0].sub_(1),))
    gradients = [parameter.grad for parameter in model.parameters()]
    numbers = torch.get_rng_state()
    ao.low_resolution(model, x)
    hook.remove()
    assert torch.equal(x, given) and torch.equal(torch.get_rng_state(), numbers)
    assert not model.training
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("build", "corners"),
    [
        (Net, False),
        (TrainingHeads, True),
        pytest.param(model_output, False, marks=pytest.mark.slow),
    ],
    ids=["net", "training-heads", "model-output"],
)
def test_fullgraph(build: Callable[[], nn.Module], corners: bool) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = build()
    plain = copy.deepcopy(model)
    x, labels = batch()
    ao.low_resolution(model, x)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_step(plain, compiled, x, labels, bare=model, corners=corners, low=(16, 16))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(maps(compiled.eval()(x)), maps(plain.eval()(x)))


class OtherInEvaluation(Net):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.logits(x)
        if self.training:
            return upsampled(logits, x.shape[2:])
        return self.evaluate(logits)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("evaluate", "got"),
    [
        (lambda z: upsampled(z, (64, 64)).softmax(1), "in evaluation mode: .* of an upsampled"),
        (lambda z: upsampled(z, (64, 64), mode="bicubic"), "evaluation mode: the output: mode="),
        (
            lambda z: upsampled(z, (64, 64), align_corners=True),
            "one align_corners .* the output: False, the output in evaluation mode: True",
        ),
    ],
    ids=range(3),
)
def test_always_refuses(evaluate: Callable[[Tensor], Tensor], got: str) -> None:
    model = OtherInEvaluation()
    model.evaluate = evaluate  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"low_resolution: model: expected .*{got}"):
        ao.low_resolution(model, batch()[0], always=True)
    assert type(model) is OtherInEvaluation
    ao.low_resolution(model, batch()[0])  # training mode alone


def test_other_modules_of_its_class() -> None:
    """A replica of DataParallel uses its own parameters; another model, as from_pretrained of a
    class makes one, is bare."""
    model = Net().train()
    x, _ = batch()
    ao.low_resolution(model, x)
    replica: Any = model._replicate_for_data_parallel()
    replica.classifier = nn.Conv2d(D, 7, 1)
    assert replica(x).shape == (2, 7, 16, 16)
    other = type(model)()
    assert other.train()(x).shape == (2, K, 64, 64)
    handle = ao.low_resolution(other, x)
    assert other(x).shape == (2, K, 16, 16)
    handle.remove()
    assert type(other) is Net and other(x).shape == (2, K, 64, 64)


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Any:
        def tail(features: Tensor) -> Tensor:
            features = self.dropout(self.norm(features).relu())
            logits = self.classifier(F.interpolate(features, scale_factor=2, mode="bilinear"))
            return upsampled(logits, x.shape[2:]) if self.whole else logits

        output = checkpoint(tail, self.body(x), use_reentrant=self.reentrant)
        return output if self.whole else upsampled(output, x.shape[2:])  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_gradient_checkpointing(reentrant: bool, whole: bool) -> None:
    """An upsampling inside of a reentrant checkpoint raises."""
    model = Checkpointed().train()
    model.reentrant, model.whole = reentrant, whole  # type: ignore[assignment]
    plain = copy.deepcopy(model)
    x, labels = batch()
    ao.low_resolution(model, x)
    if reentrant and whole:
        with pytest.raises(RuntimeError, match="Mismatch in shape"):
            model(x).sum().backward()
    else:
        check_step(plain, model, x, labels, low=(16, 16))


def test_layout_and_dtype_are_those_of_the_classifier() -> None:
    model = smp_model("Segformer")().to(memory_format=torch.channels_last).train()
    x = batch()[0].to(memory_format=torch.channels_last)
    ao.low_resolution(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16 and logits.shape == (2, K, 16, 16)
    assert logits.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("after", "got"),
    [
        (lambda z, x: upsampled(z, x.shape[2:])[:, :, 1:], "__getitem__ of an upsampled"),
        (lambda z, x: upsampled(z, x.shape[2:]).relu_(), "a result that is changed in place"),
        (  # the size is a value of the upsampled tensor
            lambda z, x: (y := upsampled(z, x.shape[2:]), F.interpolate(z[:, :1], y.shape[2:])),
            "shape.__get__ also reads \\(take the size from the model's input\\)",
        ),
        (
            lambda z, x: (upsampled(z, x.shape[2:]), upsampled(z.relu_(), x.shape[2:])),
            r"\[0\]: low-resolution logits that are changed in place",
        ),
        (
            lambda z, x: {"out": z},  # Net upsamples before the classifier
            r"\['out'\] of shape \(2, 5, 16, 16\) from .*conv2d of an upsampled .*; logits made of",
        ),
        (lambda z, x: x.mean(1), "Tensor.mean; an output that was not upsampled can be passed to"),
        (
            lambda z, x: upsampled(z, x.shape[2:]) + upsampled(2 * z, x.shape[2:]),
            "add of an upsampled tensor; logits made .* if logits are added at one low size",
        ),
        (
            lambda z, x: 2 * upsampled(z, x.shape[2:]) + 3 * upsampled(2 * z, x.shape[2:]),
            "Tensor.add; logits made of upsampled tensors",
        ),
        (lambda z, x: None, "got a NoneType, in which no tensor"),
        (lambda z, x: F.interpolate(z, x.shape[2:]), "got the output: mode='nearest'"),
        (lambda z, x: upsampled(z, x.shape[2:], antialias=True), "antialias=True"),
        (lambda z, x: upsampled(z, scale_factor=3.9), "scale_factor=3.9, whose grid"),
        (
            lambda z, x: (upsampled(z, (9, 9)), upsampled(z, (9, 9), align_corners=True)),
            r"one align_corners for all outputs, got \[0\]: False, \[1\]: True",
        ),
        # what does not commute with the upsampling
        *(
            (
                lambda z, x, change=change: change(upsampled(z, x.shape[2:])),
                f"return the upsampled logits, and call .*{name} outside",
            )
            for change, name in (
                (lambda y: y.softmax(1), "Tensor.softmax"),
                (lambda y: y.float()[..., :8, :8], "__getitem__"),
                (lambda y: y.long(), "Tensor.long"),
                (lambda y: y.flatten(2), "Tensor.flatten"),
                (lambda y: y[:, :, [*range(63, -1, -1)]], "__getitem__"),
            )
        ),
    ],
    ids=range(18),
)
def test_models_it_refuses(after: Callable[[Tensor, Tensor], Any], got: str) -> None:
    model = Net(after)
    with pytest.raises(ValueError, match=f"^low_resolution: model: expected .*{got}"):
        ao.low_resolution(model, batch()[0])
    assert type(model) is Net and not hasattr(model, "_forward_changes")


def test_volumes() -> None:
    up = nn.Upsample(scale_factor=2, mode="trilinear")
    model, images = nn.Sequential(nn.Conv3d(1, K, 2, stride=2), up), torch.randn(1, 1, 8, 6, 4)
    labels = torch.randint(0, K, (1, 8, 6, 4))
    expected = F.cross_entropy(model(images), labels)
    handle = ao.low_resolution(model, images)
    logits = model.train()(images)
    assert logits.shape == (1, K, 4, 3, 2)
    actual = ao.pixel_cross_entropy(logits, labels, align_corners=handle.align_corners)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (
            lambda z, x: upsampled(upsampled(z, scale_factor=2), x.shape[2:]),
            "3 calls of F.interpolate, where the dry run had 2",
        ),
        (lambda z, x: upsampled(z, x.shape[2:]) * 2, "torch.Tensor.mul reads the upsampled tensor"),
        (
            lambda z, x: (upsampled(z, x.shape[2:]), z.clone())[1],
            "the output is not the input of the last upsampling",
        ),
        (
            lambda z, x: (upsampled(z, x.shape[2:]), z.relu_())[0],
            "the logits are changed in place after the upsampling",
        ),
        (
            lambda z, x: upsampled(z, x.shape[2:], align_corners=True),
            "the upsampling has another align_corners",
        ),
        (
            lambda z, x: upsampled(z, scale_factor=3.9),
            "the upsampling has scale_factor=3.9, whose grid",
        ),
    ],
    ids=range(6),
)
def test_a_forward_unlike_the_dry_run_raises(
    after: Callable[[Tensor, Tensor], Any], why: str
) -> None:
    model = Net().train()
    x, _ = batch()
    ao.low_resolution(model, x)
    model.after = after
    with pytest.raises(RuntimeError, match=f"low_resolution: Net: {why}.*: remove"):
        model(x)
    model.after = None
    assert model(x).shape == (2, K, 16, 16)


def test_a_forward_hook_that_upsamples_is_refused() -> None:
    model = Net(lambda z, x: z)
    hook = model.register_forward_hook(lambda _, args, z: upsampled(z, args[0].shape[2:]))
    with pytest.raises(ValueError, match="got a forward hook of the model that changes its output"):
        ao.low_resolution(model, batch()[0])
    hook.remove()
    model = Net()
    model.register_forward_hook(lambda *_: None)  # changes nothing
    ao.low_resolution(model, batch()[0])


def test_models_that_deepcopy_refuses() -> None:
    """torch.nn.utils.weight_norm keeps a weight with a graph; MONAI's DynUNet keeps its heads."""
    model = Net().train()
    with pytest.warns(FutureWarning, match="is deprecated"):
        nn.utils.weight_norm(model.classifier)
    x, labels = batch()
    model.heads = [model(x)]  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    handle = ao.low_resolution(model, x)
    assert step(model, x, labels, False)[1] == (16, 16)
    handle.remove()

    class Uncopied(Net):
        def __deepcopy__(self, memo: object) -> Any:
            raise TypeError("cannot pickle this")

    match = "one that copy.deepcopy can copy.*got Uncopied: TypeError: cannot pickle"
    with pytest.raises(ValueError, match=f"low_resolution: model: expected {match}"):
        ao.low_resolution(Uncopied(), x)


def test_bad_input() -> None:
    model, (x, _) = Net(), batch()
    with pytest.raises(ValueError, match=r"low_resolution: model: expected an nn.Module"):
        ao.low_resolution(len, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"low_resolution: args: .* low_resolution\(model, images"):
        ao.low_resolution(model)
    with pytest.raises(ValueError, match="low_resolution: always: expected True or False, got 1"):
        ao.low_resolution(model, x, always=1)  # type: ignore[arg-type]
    ao.low_resolution(model, x)
    with pytest.raises(ValueError, match="got Net after low_resolution"):
        ao.low_resolution(model, x)


def view_as_itself(x: Tensor) -> Tensor:
    return x.view_as(x)


AFTER = {
    "float": lambda z, x: upsampled(z.bfloat16(), x.shape[2:]).float(),
    "to": lambda z, x: upsampled(z.bfloat16(), x.shape[2:]).to(torch.float32),
    "type as": lambda z, x: upsampled(z.bfloat16(), x.shape[2:]).type_as(x),
    "layout": lambda z, x: upsampled(z, x.shape[2:]).contiguous(memory_format=torch.channels_last),
    "scale": lambda z, x: upsampled(z, scale_factor=3.9, recompute_scale_factor=True),
    "two scales": lambda z, x: upsampled(z, scale_factor=[4.0, 2.0]),
    "keywords": lambda z, x: F.interpolate(input=z, size=x.shape[2:], mode="bilinear"),
    "corners": lambda z, x: upsampled(z, scale_factor=3.9, align_corners=True),
    "module": lambda z, x: nn.UpsamplingBilinear2d(scale_factor=4)(z),
    "clone, in a dictionary": lambda z, x: {"out": torch.clone(upsampled(z, x.shape[2:])).float()},
    "as another": lambda z, x: view_as_itself(upsampled(z, x.shape[2:])),
    "axes": lambda z, x: upsampled(z, x.shape[2:])[:, None].squeeze(1).unsqueeze(1)[:, 0],
    "all of an axis": lambda z, x: upsampled(z, x.shape[2:])[..., : x.shape[2], :],
    "one class": lambda z, x: upsampled(z[:, :1], x.shape[2:]).squeeze(1),
    "one class, selected": lambda z, x: torch.select(upsampled(z[:, :1], x.shape[2:]), 1, 0),
    "one class, sizes": lambda z, x: upsampled(z[:, :1], (64, 64)).view(-1, 64, 64),
    "one class, another": lambda z, x: upsampled(z[:, :1], scale_factor=4).reshape_as(x[:, 0]),
    "one class, flat": lambda z, x: upsampled(z[:, :1], x.shape[2:]).float().flatten(0, 1)[None],
}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("after", AFTER)
def test_what_commutes_with_the_upsampling_passes(after: str, images: int) -> None:
    torch.manual_seed(0)
    model, (x, _) = Net(AFTER[after]), batch()
    for module in (model.norm, model.dropout):
        module.eval()
    plain = copy.deepcopy(model)
    corners = ao.low_resolution(model, x).align_corners
    x = x[:images]
    low, full = model(x), plain(x)
    low, full = (y["out"] if isinstance(y, dict) else y for y in (low, full))
    assert low.shape[-2:] == (16, 16)
    assert low.shape[:-2] == full.shape[:-2]
    assert low.dtype == full.dtype == torch.float32
    maps = low.reshape(images, -1, 16, 16)
    again = upsampled(maps, full.shape[-2:], align_corners=corners).reshape(full.shape)
    torch.testing.assert_close(again, full, rtol=1e-2, atol=2e-2)  # bfloat16 upsampled before


@pytest.mark.parametrize("after", ["float", "axes", "one class, sizes", "keywords"])
def test_compiled_and_exported(after: str) -> None:
    model, (x, _) = Net(AFTER[after]).eval(), batch()
    ao.low_resolution(model, x, always=True)
    expected = model(x)
    assert expected.shape[-2:] == (16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(model, (x,), strict=True)
    torch.testing.assert_close(program.module()(x), expected)

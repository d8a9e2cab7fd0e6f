"""late_upsampling: the outputs and gradients of the unchanged model, with fewer operations, and
errors or the unchanged order where this is not possible."""

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import anchorops as ao
from tests.helpers.ranks import process_group
from tests.helpers.small_networks import NO_TORCHVISION, K, smp_model, transformers_segformer

smp = pytest.importorskip("segmentation_models_pytorch", reason=NO_TORCHVISION)
torchvision = pytest.importorskip("torchvision", reason=NO_TORCHVISION)
up = functools.partial(F.interpolate, mode="bilinear", align_corners=False)
WIDTHS = (8, 16, 24)


class Body(nn.Module):
    """Three maps, at a half, a quarter and an eighth of the image's size."""

    def __init__(self) -> None:
        super().__init__()
        sizes = zip((3, *WIDTHS), WIDTHS, strict=False)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x).tanh()
            maps.append(x)
        return maps


class MLP(nn.Module):
    """A linear layer of tokens, as SegFormer's."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.linear(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x.shape[0], tokens.shape[2], *x.shape[2:])


def mixed(head: Any, maps: list[Tensor]) -> Tensor:
    return head.mix(cat(head, maps)).relu()


class Head(nn.Module):
    """Maps of 32 channels. linear: they are linear layers of tokens, otherwise, as in
    mmsegmentation's SegformerHead, batch norm and ReLU follow a convolution. `after` makes the
    features from the head and the maps."""

    def __init__(self, linear: bool = True, after: Callable[..., Any] = mixed) -> None:
        super().__init__()
        layers = [
            MLP(width, 32)
            if linear
            else nn.Sequential(nn.Conv2d(width, 32, 1), nn.BatchNorm2d(32), nn.ReLU())
            for width in WIDTHS
        ]
        self.layers = nn.ModuleList(layers)
        self.mix = nn.Conv2d(3 * 32, 16, 1)
        self.after = after

    def reduced(self, maps: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, maps, strict=True)]

    def upsampled(self, maps: list[Tensor]) -> list[Tensor]:
        return [up(x, maps[0].shape[2:]) for x in self.reduced(maps)]

    def forward(self, maps: list[Tensor]) -> Any:
        return self.after(self, maps)


def cat(head: Any, maps: list[Tensor]) -> Tensor:
    return torch.cat(head.upsampled(maps), dim=1)


class Net(nn.Module):
    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.body = Body()
        self.head: Any = Head() if head is None else head
        self.classifier = nn.Conv2d(16, K, 1)

    def forward(self, x: Tensor) -> Tensor:
        return up(self.classifier(self.head(self.body(x))), x.shape[2:])


class Flat(Net):
    """One module that does everything."""

    def forward(self, x: Tensor) -> Tensor:
        return up(self.classifier(mixed(self.head, self.body(x))), x.shape[2:])


class Pyramid(nn.Module):
    """One map of few channels is upsampled, joined with another one, the images themselves, and
    mixed, as in HRNet."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, channels, 4, stride=4)
        self.mix = nn.Conv2d(3 + channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([x, up(self.body(x), x.shape[2:])], 1))


class Checkpointed(Net):
    """The head is computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        def head(*maps: Tensor) -> Tensor:
            return self.head(list(maps))

        features: Any = checkpoint(head, *self.body(x), use_reentrant=self.reentrant)
        return up(self.classifier(features), x.shape[2:])


def images(size: tuple[int, ...] = (32, 48), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size)


def operations(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def outputs(output: Any) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else [output]


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs, and gradients of a scalar of them, of one step in training mode, from the same
    random numbers each time."""
    torch.manual_seed(1)
    model.train().zero_grad()
    maps = [z for z in outputs(model(x)) if z.is_floating_point()]
    if x.numel() > 0:
        torch.stack([z.tanh().square().sum() for z in maps]).sum().backward()
    return [z.detach() for z in maps]


def check(plain: nn.Module, model: nn.Module, x: Tensor, **tolerance: float) -> None:
    """One step of both, and evaluation: equal outputs, gradients and statistics."""
    close = functools.partial(torch.testing.assert_close, **tolerance)
    for expected, actual in zip(step(plain, x), step(model, x), strict=True):
        close(actual, expected)
    pairs = zip(plain.named_parameters(), model.named_parameters(), strict=True)
    for (name, p), (same_name, q) in pairs:
        assert name == same_name and (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            close(q.grad, p.grad)
    for p, q in zip(plain.buffers(), model.buffers(), strict=True):
        close(q, p)
    with torch.no_grad():
        pairs = zip(outputs(plain.eval()(x)), outputs(model.eval()(x)), strict=True)
        for expected, actual in pairs:
            close(actual, expected)


def moved(model: nn.Module, *args: Any) -> tuple[nn.Module, ao.LateUpsampling]:
    """The unchanged copy, and the handle."""
    plain = copy.deepcopy(model)
    return plain, ao.late_upsampling(model, *(args or (images(),)))


def lraspp() -> nn.Module:
    build = torchvision.models.segmentation.lraspp_mobilenet_v3_large
    return build(weights=None, weights_backbone=None, num_classes=K)


def volumes() -> nn.Module:
    upsampling = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True)
    return nn.Sequential(nn.Conv3d(3, 16, 3, stride=2, padding=1), upsampling, nn.Conv3d(16, 4, 1))


# of the images in the dry run; of most models (64, 64)
SIZES: dict[type, tuple[int, ...]] = {
    smp.PSPNet: (192, 192),  # at 64 pixels its pooled maps are hardly smaller than the others
    nn.Sequential: (8, 6, 4),
}
OF_THREE = "head.mix before the upsampling of 3 maps, 3 multiplied with a linear layer"
FOUR = " before the upsampling of 4 maps"


@pytest.mark.parametrize(
    ("build", "lines"),
    [
        (Net, [OF_THREE]),
        (functools.partial(Checkpointed, False), [OF_THREE]),
        (functools.partial(Checkpointed, True), [OF_THREE]),
        (lambda: Net(Head(linear=False)), ["head.mix before the upsampling of 3 maps"]),
        (volumes, ["2 before the upsampling of 1 map"]),
        (
            smp_model("Segformer", "mit_b0"),
            [f"decoder.fuse_stage.0{FOUR}, 4 multiplied with a linear layer"],
        ),
        (
            transformers_segformer,
            [f"decode_head.linear_fuse{FOUR}, 4 multiplied with a linear layer"],
        ),
        (smp_model("PSPNet", psp_out_channels=32), [f"decoder.conv.0{FOUR}"]),
        pytest.param(
            smp_model("DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True),
            [f"decoder.fusion_blocks.{i}.project before the upsampling of 1 map" for i in range(4)],
            marks=pytest.mark.slow,
        ),
        (lraspp, ["classifier.high_classifier before the upsampling of 1 map"]),
        (lambda: Pyramid(16, 8), ["mix before the upsampling of 1 map"]),
    ],
    ids=[
        *("net", "checkpoint", "reentrant", "mmsegmentation", "volumes", "segformer"),
        *("transformers", "pspnet", "dpt", "lraspp", "images"),
    ],
)
def test_equals_the_unchanged_model(
    build: Callable[[], nn.Module], lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A record names what was moved."""
    caplog.set_level(logging.INFO, logger="anchorops")
    model = build().double()
    size = SIZES.get(type(model), (64, 64))
    x = images((*size[:-1], size[-1] + 32)).double()
    plain, handle = moved(model, images(size).double())
    assert handle.moved == lines and "; ".join(lines) in caplog.text
    check(plain, model, x, rtol=1e-9, atol=1e-9)
    assert operations(model, x) < operations(plain, x)
    assert model.state_dict().keys() == plain.state_dict().keys()
    handle.remove()
    handle.remove()
    for p, q in zip(plain.modules(), model.modules(), strict=True):
        assert type(p) is type(q) and vars(p).keys() == vars(q).keys()


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
@pytest.mark.parametrize("linear", [False, True])
def test_modes_and_maps_that_are_not_upsampled(mode: str, linear: bool) -> None:
    def resized(head: Any, maps: list[Tensor]) -> Tensor:
        a, b, c = head.reduced(maps)
        scale = nn.Upsample(scale_factor=4, mode=mode)
        middle = F.interpolate(size=a.shape[2:], input=b, mode=mode)
        return head.mix(input=torch.cat(tensors=(scale(c), a, middle), dim=-3))

    model = Net(Head(linear, resized)).double().to(memory_format=torch.channels_last)
    plain, handle = moved(model, images().double())
    line = "head.mix before the upsampling of 2 maps"
    assert handle.moved == [line + ", 2 multiplied with a linear layer" * linear]
    check(plain, model, images((32, 64)).double(), rtol=1e-9, atol=1e-9)


def test_autocast_has_the_error_of_autocast() -> None:
    model = Net()
    plain, _ = moved(model)
    x = images()
    exact = step(copy.deepcopy(plain).double(), x.double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(step(net, x)[0] - exact).norm() / exact.norm() for net in (plain, model)]
    assert errors[1] < 1.5 * errors[0] < 0.02


def test_multiplied_weights_are_float32_under_autocast() -> None:
    model = Net().eval()
    moved(model)
    mix, linear = model.head.mix, model.head.layers[0].linear
    for parameter in (mix.weight, mix.bias, linear.weight, linear.bias):
        nn.init.zeros_(parameter)
    with torch.no_grad():  # W·M is 1 for each channel; with W in bfloat16 it would be 0
        mix.weight[:, :2, 0, 0] = torch.tensor([1 + 2.0**-10, -1])
        linear.weight.fill_(2.0**10)
        maps = [torch.ones(1, 8, 16, 16), torch.ones(1, 16, 8, 8), torch.ones(1, 24, 4, 4)]
        with torch.autocast("cpu", torch.bfloat16):
            assert (model.head(maps) == 8).all()


@pytest.mark.parametrize("linear", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fullgraph(linear: bool) -> None:
    torch.compiler.reset()
    model = Net(Head(linear)).double()
    plain, _ = moved(model, images().double())
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images((32, 64)).double()
    for expected, actual in zip(step(plain, x), step(compiled, x), strict=True):
        torch.testing.assert_close(actual, expected)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    torch.testing.assert_close(compiled.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(strict: bool) -> None:
    model = Net().eval()
    plain, _ = moved(model)
    x = images()
    dynamic = {"x": {0: torch.export.Dim("batch", min=2, max=8)}}
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic, strict=strict)
    for batch in (2, 3):
        x = images(batch=batch)
        torch.testing.assert_close(program.module()(x), plain(x))
    assert operations(program.module(), x) < operations(plain, x)
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("cat" in target for target in targets), "the joined map was computed"


def without_gradients(head: Any, maps: list[Tensor]) -> Tensor:
    with torch.no_grad():
        joined = cat(head, maps)
    return head.mix(joined)


def upsampled_without_gradients(head: Any, maps: list[Tensor]) -> Tensor:
    first, *others = head.reduced(maps)
    with torch.no_grad():
        frozen = [up(x.detach(), maps[0].shape[2:]) for x in others]
    return head.mix(torch.cat([up(first, maps[0].shape[2:]), *frozen], 1))


def one_is_not_upsampled(head: Any, maps: list[Tensor]) -> Tensor:
    with torch.no_grad():
        first, *others = head.reduced(maps)
        joined = torch.cat([first, *(up(x, first.shape[2:]) for x in others)], 1)
    return head.mix(joined)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    "after", [without_gradients, upsampled_without_gradients, one_is_not_upsampled]
)
def test_upsamplings_without_gradients(after: Callable[..., Any], linear: bool) -> None:
    """Of a frozen network: the convolution learns, and nothing before it."""
    model = Net(Head(linear, after)).double()
    plain, handle = moved(model, images().double())
    assert handle.moved[0].startswith("head.mix before the upsampling of ")
    check(plain, model, images((32, 64)).double(), rtol=1e-9, atol=1e-9)
    assert model.head.mix.weight.grad is not None
    assert all(p.grad is None for p in model.head.layers[2].parameters())


def mixed_without_gradients(head: Any, maps: list[Tensor]) -> Tensor:
    joined = cat(head, maps)
    with torch.no_grad():
        return head.mix(joined)


def joined_without_gradients(head: Any, maps: list[Tensor]) -> Tensor:
    upsampled = head.upsampled(maps)
    with torch.no_grad():
        joined = torch.cat(upsampled, 1)
    return head.mix(joined)


def joined_in_a_checkpoint(head: Any, maps: list[Tensor]) -> Tensor:
    joined: Any = checkpoint(lambda *x: cat(head, [*x]), *maps, use_reentrant=True)
    return head.mix(joined)


def joined_as_a_leaf(head: Any, maps: list[Tensor]) -> Tensor:
    with torch.no_grad():
        joined = cat(head, maps)
    return head.mix(joined.requires_grad_())


BETWEEN: dict[str, tuple[Callable[..., Any], str]] = {  # a checkpoint, or torch.no_grad, of a part
    "checkpoint": (
        lambda head, maps: checkpoint(head.mix, cat(head, maps), use_reentrant=False),
        "where a checkpoint begins or ends, or torch.no_grad begins, in head",
    ),
    "reentrant": (
        lambda head, maps: checkpoint(head.mix, cat(head, maps), use_reentrant=True),
        "requires_grad",
    ),
    "inside": (
        lambda head, maps: checkpoint(mixed, head, maps, use_reentrant=False),
        "where a checkpoint begins or ends",
    ),
    "joined in a checkpoint": (joined_in_a_checkpoint, "or by a reentrant checkpoint"),
    "joined as a leaf": (joined_as_a_leaf, "in place"),
    "mixed in no_grad": (mixed_without_gradients, "or torch.no_grad begins, in head"),
    "joined in no_grad": (joined_without_gradients, "or torch.no_grad begins, in head"),
}


@pytest.mark.parametrize("how", BETWEEN)
def test_what_begins_between(how: str) -> None:
    after, why = BETWEEN[how]
    model = Net(Head(after=after)).train()
    with pytest.raises(ValueError, match=why):
        ao.late_upsampling(model, images())
    model.head.after = mixed
    ao.late_upsampling(model, images())
    model.head.after = after
    with pytest.raises(RuntimeError, match=r"or ends, or torch.no_grad begins, between the"):
        model(images())


@pytest.mark.parametrize("late_first", [False, True])
@pytest.mark.parametrize("dim", [16, 96])
def test_attach(late_first: bool, dim: int) -> None:
    """SAR on the classifier; or on the convolution itself, which then stays where it is."""
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    method = ao.SAR(5 if dim == 16 else 16, dim)
    same = copy.deepcopy(method)
    if late_first:
        ao.late_upsampling(model, images())
    sar, plain_sar = ao.attach(model, method), ao.attach(plain, same)
    if not late_first and dim == 96:
        with pytest.raises(ValueError, match=r"read by .*requires_grad.* and 2 more"):
            ao.late_upsampling(model, images())
        return
    if not late_first:
        ao.late_upsampling(model, images())
    x, labels = images(), torch.randint(0, 5, (2, 32, 48))
    losses = [
        net.train()(x).square().mean() + of(labels)
        for net, of in ((model, sar), (plain, plain_sar))
    ]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


class LoRA(nn.Module):
    """An adapter around a layer, as PEFT's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = copy.deepcopy(base), copy.deepcopy(base)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_A(x) - 0.25 * self.lora_B(x)


def parametrize(head: Any) -> None:
    for layer in (head.mix, head.layers[0].linear):
        parametrizations.weight_norm(layer)


def freeze(head: Any) -> None:
    head.mix.weight.requires_grad_(False)
    head.layers[0].linear.requires_grad_(False)


def tie(head: Any) -> None:
    for layer, width in zip(head.layers[:2], WIDTHS, strict=False):
        layer.linear = nn.Linear(width, 32).double()
    for layer in (head.layers[0], head.layers[2]):
        layer.linear.bias = head.layers[1].linear.bias


def keep_input(head: Any) -> None:
    head.mix.register_forward_pre_hook(lambda _, args: setattr(head, "seen", args[0]))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "adapt mix": lambda head: setattr(head, "mix", LoRA(head.mix)),
    "compile mix": lambda head: head.mix.compile(backend="eager"),
    "hook mix": keep_input,
    "adapt linear": lambda head: setattr(head.layers[0], "linear", LoRA(head.layers[0].linear)),
    "parametrize": parametrize,
    "old weight norm": lambda head: nn.utils.weight_norm(head.layers[0].linear),
    "freeze": freeze,
    "tie": tie,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("how", CHANGES)
def test_changed_layers(how: str, after: bool) -> None:
    """Results do not depend on whether layers are changed before late_upsampling or after it."""
    model, plain = Net().double(), Net().double()
    plain.load_state_dict(model.state_dict())
    for network in (plain, model):
        if after and network is model:
            ao.late_upsampling(model, images().double())
        torch.manual_seed(0)
        CHANGES[how](network.head)
    refused = {  # three convolutions read the joined map
        "adapt mix": r"read by torch.cat, read by .* and 2 more",
        "compile mix": r"16, 24\), which the hooks of head.mix would",
        "hook mix": r"read by torch.cat, read by .*conv2d, and kept",
    }
    if not after and how in refused:
        with pytest.raises(ValueError, match=refused[how]):
            ao.late_upsampling(model, images().double())
        return
    if not after:
        products = 2 if how in ("adapt linear", "old weight norm") else 3
        line = "head.mix before the upsampling of 3 maps"
        assert ao.late_upsampling(model, images().double()).moved == [
            f"{line}, {products} multiplied with a linear layer"
        ]
    check(plain, model, images().double(), rtol=1e-9, atol=1e-9)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


@pytest.mark.parametrize(
    "sharded", [[], [""], ["head", ""], ["head.layers.0.linear", ""], ["head.mix", ""]]
)
def test_ddp_and_fully_sharded(alone: None, sharded: list[str]) -> None:
    """A layer sharded on its own has its weight only while it runs."""
    model, x = Net(), images()
    plain, _ = moved(model)
    for name in sharded:
        fully_shard(model.get_submodule(name), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    wrapped = model if sharded else nn.parallel.DistributedDataParallel(model)
    torch.testing.assert_close(step(wrapped, x), step(plain, x))
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        gradient: Any = q.grad
        whole = gradient.full_tensor() if sharded else gradient
        torch.testing.assert_close(whole, p.grad, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"before torch.compile, DDP and FSDP"):
        ao.late_upsampling(wrapped, x)


@pytest.mark.parametrize("late_first", [False, True])
@pytest.mark.parametrize("remove_late_first", [False, True])
def test_low_resolution_beside(late_first: bool, remove_late_first: bool) -> None:
    """One module holds both."""
    model, x = Flat(), images()
    plain = copy.deepcopy(model)
    functions = [ao.late_upsampling, ao.low_resolution]
    order = functions if late_first else functions[::-1]
    handles = {function: function(model, x) for function in order}
    low = model.train()(x)
    assert low.shape == (2, K, 16, 24)
    torch.testing.assert_close(up(low, (32, 48)), plain.train()(x))
    first, second = functions if remove_late_first else functions[::-1]
    handles[first].remove()
    assert model(x).shape == ((2, K, 16, 24) if remove_late_first else (2, K, 32, 48))
    assert (operations(model, x) < operations(plain, x)) != remove_late_first
    handles[second].remove()
    assert type(model) is Flat
    torch.testing.assert_close(model(x), plain(x))


class Shared(Net):
    """The head runs twice: at two scales, or (unlike the first) without its last map."""

    def forward(self, x: Tensor) -> Tensor:
        small = up(x, (16, 16))
        self.head.skips = False
        first = self.classifier(self.head(self.body(x)))
        self.head.skips = self.differs
        return first + up(self.classifier(self.head(self.body(small))), first.shape[2:])


def skipping(head: Any, maps: list[Tensor]) -> Tensor:
    a, b, c = head.upsampled(maps)
    return head.mix(torch.cat([a, b, torch.zeros_like(c) if head.skips else c], 1))


@pytest.mark.parametrize("differs", [False, True])
def test_a_head_that_runs_twice(differs: bool) -> None:
    model = Shared(Head(after=skipping)).double()
    model.differs = differs  # type: ignore[assignment]
    x = images().double()
    if differs:
        with pytest.raises(ValueError, match="in head, which runs several times, not always the"):
            ao.late_upsampling(model, x)
        return
    plain, _ = moved(model, x)
    check(plain, model, x, rtol=1e-9, atol=1e-9)


def kept(head: Any, maps: list[Tensor]) -> Tensor:
    head.last = cat(head, maps)
    return head.mix(head.last)


def changed_source(head: Any, maps: list[Tensor]) -> Tensor:
    source = head.reduced(maps)[0].tanh()
    joined = torch.cat([up(source, (16, 24)), *head.upsampled(maps)[1:]], 1)
    source.zero_()
    return head.mix(joined)


def three_by_three(head: Any, maps: list[Tensor]) -> Tensor:
    return F.conv2d(cat(head, maps), head.mix.weight.expand(-1, -1, 3, 3), padding=1)


class Subclass(nn.Parameter):
    """A weight that is more than a tensor, as those of torchao."""


@pytest.mark.parametrize(
    ("after", "got"),
    [
        (three_by_three, "read by .*cat, read by a 3×3 conv"),
        (
            lambda head, maps: F.conv2d(cat(head, maps), head.mix.weight, stride=2),
            "with stride, padding or groups",
        ),
        (
            lambda head, maps: head.mix(torch.cat(head.upsampled(maps), 2).reshape(2, 96, 16, 24)),
            r"read by torch.cat along dimension 2",
        ),
        (lambda head, maps: head.mix(cat(head, maps).relu()), "read by .*cat, read by .*relu"),
        (
            lambda head, maps: F.conv2d(cat(head, maps), Subclass(head.mix.weight.detach())),
            "a convolution with a weight of type Subclass",
        ),
        (kept, r"read by .*cat, read by .*conv2d, and kept"),
        (lambda head, maps: head.mix(cat(head, maps).relu_()), "cat, which is changed in place"),
        (changed_source, "convolution after a change of the maps in place"),
    ],
    ids=["3×3", "stride", "dimension", "relu", "class", "kept", "in-place", "source"],
)
def test_models_it_refuses(after: Callable[..., Tensor], got: str) -> None:
    model = Net(Head(after=after))
    before = copy.deepcopy(vars(model))
    with pytest.raises(ValueError, match=f"late_upsampling: model: expected a 1×1 .*{got}"):
        ao.late_upsampling(model, images())
    assert type(model) is Net and vars(model).keys() == before.keys()
    assert type(model.head) is Head


@pytest.mark.parametrize(
    ("channels", "outputs", "on_cpu", "on_gpu"),
    [(96, 96, True, True), (96, 720, True, False), (24, 720, False, False), (96, 19, True, True)],
)
def test_what_is_moved_depends_on_the_device(
    channels: int, outputs: int, on_cpu: bool, on_gpu: bool
) -> None:
    """Everything but the CPU is taken for a GPU, on which upsampling takes longer in relation."""
    for device, moves in (("cpu", on_cpu), ("meta", on_gpu)):
        x = torch.zeros(1, 3, 32, 32, device=device)
        expected = (
            contextlib.nullcontext()
            if moves
            else pytest.raises(ValueError, match="where it would save little time")
        )
        with expected:
            ao.late_upsampling(Pyramid(channels, outputs).to(device), x)


def test_linear_layers_of_tokens_without_storage() -> None:
    _, handle = moved(Net().to("meta"), images().to("meta"))
    assert handle.moved == [OF_THREE]


def test_what_gains_little_stays() -> None:
    with pytest.raises(ValueError, match="where it would save little time"):
        ao.late_upsampling(smp.DeepLabV3("resnet18", encoder_weights=None), images((64, 64)))
    with pytest.raises(ValueError, match=r"got no call of F.interpolate"):
        ao.late_upsampling(nn.Conv2d(3, 4, 1), images())


def of_an_absolute_map(head: Any, maps: list[Tensor]) -> Tensor:
    first, *others = head.upsampled(maps)
    return head.mix(torch.cat([first.abs(), *others], 1))


def in_another_order(head: Any, maps: list[Tensor]) -> Tensor:
    a, b, c = head.reduced(maps)
    return head.mix(torch.cat([up(x, maps[0].shape[2:]) for x in (a, c, b)], 1))


def joined_twice(head: Any, maps: list[Tensor]) -> Tensor:
    first, *others = head.upsampled(maps)
    return head.mix(torch.cat([first, torch.cat(others, 1)], 1))


def of_changed_maps(head: Any, maps: list[Tensor]) -> Tensor:
    joined = cat(head, maps)
    maps[2].zero_()
    return head.mix(joined)


def also_returned(head: Any, maps: list[Tensor]) -> Any:
    joined = cat(head, maps)
    return head.mix(joined), joined


def read_as_numbers(head: Any, maps: list[Tensor]) -> Tensor:
    joined = cat(head, maps)
    joined.tolist()
    return head.mix(joined)


def mixed_twice(head: Any, maps: list[Tensor]) -> Tensor:
    other = head.mix(maps[1].repeat(1, 6, 1, 1))
    return head.mix(cat(head, maps)) + other


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (of_an_absolute_map, r"torch.Tensor.abs reads a map that the convolution reads"),
        (
            lambda head, maps: head.mix(torch.cat(head.upsampled(maps)[::-1], 1)),
            "another map than in the dry run",
        ),
        (in_another_order, "the upsampling reads another map than in the dry run"),
        (joined_twice, "torch.cat"),
        (read_as_numbers, r"torch.Tensor.tolist reads a map"),
        (cat, r"calls .*'conv': 0.* where the dry run had .*'conv': 1"),
        (also_returned, "an upsampled map is returned, or no convolution reads it"),
        (of_changed_maps, "a map is changed in place between its upsampling and the convolution"),
        (kept, "something keeps a map"),
        (three_by_three, "a 3×3 convolution, unlike in the dry run"),
        (mixed_twice, "another map than in the dry run"),
    ],
)
def test_a_forward_unlike_the_dry_run_raises(after: Callable[..., Any], message: str) -> None:
    model = Net().eval()
    ao.late_upsampling(model, images())
    model(images())
    model.head.after = after
    advice = r"remove\(\) the handle, and call late_upsampling again, with arguments as in this for"
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"Head: .*{message}.*{advice}"):
        model(images())


def test_bad_input() -> None:
    model = Net()
    model.head.forward = functools.partial(model.head.forward)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="in head, whose forward was replaced"):
        ao.late_upsampling(model, images())


def test_inference_mode() -> None:
    model = Net().eval()
    plain, x = copy.deepcopy(model), images()
    with torch.inference_mode():
        ao.late_upsampling(model, images())
        torch.testing.assert_close(model(x), plain(x))
    for batch in (x, x[:0]):
        check(plain, model, batch, rtol=1e-3, atol=1e-5)


def test_maps_of_two_dtypes() -> None:
    def promoted(head: Any, maps: list[Tensor]) -> Tensor:
        a, b, _ = head.upsampled(maps)
        last = up(maps[2].float().repeat(1, 4, 1, 1)[:, :32], a.shape[2:])
        return head.mix(torch.cat([a.double(), b, last], 1))

    model = Net(Head(after=promoted))
    model.head.mix.double()
    model.classifier.double()
    plain, handle = moved(model)
    assert len(handle.moved) == 1
    check(plain, model, images(), rtol=1e-5, atol=1e-5)


def test_dropout_switched_on_alone() -> None:
    """In evaluation a dropout gives back the joined map; switched on, the head runs as before."""

    head: Any = Head(after=lambda head, maps: head.mix(head.dropout(cat(head, maps))))
    head.dropout = nn.Dropout(0.5)
    model = Net(head).eval()
    plain, _ = moved(model)
    x = images()
    assert operations(model, x) < operations(plain, x)
    heads: list[Any] = [plain.head, model.head]
    for head in heads:
        head.dropout.train()
    torch.manual_seed(0)
    expected = plain(x)
    torch.manual_seed(0)
    torch.testing.assert_close(model(x), expected)


def test_small_images_and_generated_forwards() -> None:
    """At 32 pixels the product of the weights takes longer than what it saves."""
    model = smp.Segformer("mit_b0", encoder_weights=None, classes=K)
    x = images((32, 32), batch=1)
    plain = copy.deepcopy(model)
    ao.late_upsampling(model, x)
    assert operations(model.eval(), x) <= operations(plain.eval(), x)
    traced = torch.fx.symbolic_trace(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="a model whose forward is written in Python, got"):
        ao.late_upsampling(traced, x)

"""Changed models inside what replaces, follows or traces their forward: they stay changed, or an
error says what to do. Handles that were removed change nothing any more."""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import anchorops as ao
from tests import test_late_upsampling as late
from tests.helpers.small_networks import NO_TORCHVISION, K
from tests.test_late_upsampling import Flat, Head, up

extraction = pytest.importorskip("torchvision.models.feature_extraction", reason=NO_TORCHVISION)
IMAGES = torch.randn(1, 3, 64, 64)
FUNCTIONS = [ao.low_resolution, ao.late_upsampling]


class Net(late.Net):
    """Its head, which late_upsampling changes, can be traced."""

    def __init__(self) -> None:
        super().__init__(Head(linear=False))


class Joined(TorchDispatchMode):
    """Whether a convolution reads the joined map of 96 channels."""

    is_read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.is_read |= args[0].shape[1] == 96
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=FUNCTIONS)
def function(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param


def is_changed(function: object, model: nn.Module) -> bool:
    """Whether a training forward runs as `function` changed it."""
    with Joined() as joined:
        logits = model.train()(IMAGES)
    return logits.shape[3] == 32 if function is ao.low_resolution else not joined.is_read


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate(function: Callable[..., Any], accelerator: Accelerator) -> None:
    """unwrap_model follows __wrapped__ from the prepared forward to the one that it binds."""
    model = Net()
    handle = function(model, IMAGES)
    assert not hasattr(model.forward, "__wrapped__")
    assert [*inspect.signature(model.forward).parameters] == ["x"]
    prepared = accelerator.prepare(model)
    assert is_changed(function, prepared)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is model and is_changed(function, model)
    handle.remove()
    assert type(model) is Net and not is_changed(function, model)
    function(model, IMAGES)  # unwrap_model has left a forward in the model, that of its class
    assert is_changed(function, model)


def test_prepared_and_unwrapped_before(
    function: Callable[..., Any], accelerator: Accelerator
) -> None:
    model = accelerator.prepare(Net())
    with pytest.raises(ValueError, match=r"call it before accelerator.prepare.* was replaced"):
        function(model, IMAGES)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    handle = function(model, IMAGES)
    assert is_changed(function, model)
    handle.remove()
    assert not is_changed(function, model)


def test_wraps(function: Callable[..., Any]) -> None:
    """A forward that wraps the changed one, also after the handle was removed."""
    model = Net()
    handle = function(model, IMAGES)
    changed: Any = model.forward

    @functools.wraps(changed)
    def forward(*args: Any) -> Any:
        return changed(*args)

    model.forward = forward  # type: ignore[assignment]
    assert is_changed(function, model)
    model.forward = MethodType(inspect.unwrap(changed.__func__), model)
    assert is_changed(function, model)
    handle.remove()
    model.forward = forward  # type: ignore[assignment]
    assert not is_changed(function, model)


@pytest.mark.parametrize("peft_first", [False, True])
def test_peft(function: Callable[..., Any], peft_first: bool) -> None:
    model: Any = Net()
    lora = peft.LoraConfig(target_modules=["stages.0", "stages.1"])
    handle = None if peft_first else function(model, IMAGES)
    model = peft.get_peft_model(model, lora)
    handle = handle or function(model, IMAGES)
    assert is_changed(function, model)
    merged = model.merge_and_unload()
    assert is_changed(function, merged)
    handle.remove()
    assert type(merged) is Net and not is_changed(function, merged)


@pytest.mark.parametrize("peft_first", [False, True])
def test_layers_that_peft_adds_or_merges(peft_first: bool) -> None:
    """They add calls to the forward that late_upsampling has changed, or remove some."""
    model: Any = Flat()
    lora = peft.LoraConfig(target_modules=["stages.0"])
    if peft_first:
        model = peft.get_peft_model(model, lora)
        handle = ao.late_upsampling(model, IMAGES)
        model = model.merge_and_unload()
    else:
        handle = ao.late_upsampling(model, IMAGES)
        model = peft.get_peft_model(model, lora)
    with pytest.raises(RuntimeError, match=r"Flat: .*: remove\(\) the handle, and call .* again"):
        model(IMAGES)
    handle.remove()
    ao.late_upsampling(model, IMAGES)
    assert is_changed(ao.late_upsampling, model)


def test_symbolic_traces_are_refused(function: Callable[..., Any]) -> None:
    model = Net()
    expected = model(IMAGES)
    handle = function(model, IMAGES)
    name = "Net" if function is ao.low_resolution else "Head"
    message = rf"^torch.fx.symbolic_trace: {name} after {function.__name__} cannot be traced: rem"
    for trace in (
        torch.fx.symbolic_trace,
        lambda whole: torch.fx.symbolic_trace(nn.Sequential(whole.eval())),
        lambda whole: extraction.create_feature_extractor(whole.train(), ["body.stages.2"]),
    ):
        with pytest.raises(RuntimeError, match=message):
            trace(model)
    handle.remove()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(IMAGES), expected)
    features = extraction.create_feature_extractor(model, ["body.stages.2"])(IMAGES)
    assert features["body.stages.2"].shape == (1, 24, 8, 8)


class Unbatched(Flat):
    def forward(self, images: Tensor) -> Tensor:
        if images.dim() == 3:
            return self.forward(images[None])[0]
        return super().forward(images)


class Pyramid(Flat):
    def forward(self, images: Tensor, again: bool = True) -> Any:
        logits = super().forward(images)
        if not again:
            return logits
        return logits, self.forward(images[..., ::2, ::2], again=False)


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [*result]


@pytest.mark.parametrize(
    ("build", "traced", "images"),
    [
        (Unbatched, IMAGES, IMAGES[0]),
        (Unbatched, IMAGES[0], IMAGES),
        (Pyramid, IMAGES, IMAGES),
    ],
    ids=["unbatched", "batched", "pyramid"],
)
def test_a_model_that_calls_its_forward(
    function: Callable[..., Any], build: Callable[[], nn.Module], traced: Tensor, images: Tensor
) -> None:
    model = build()
    plain = copy.deepcopy(model)
    handle = function(model, traced)
    results, expected = outputs(model(images)), outputs(plain(images))
    if function is ao.low_resolution:
        pairs = [*zip(results, expected, strict=True)]
        assert all(2 * x.shape[-1] == full.shape[-1] for x, full in pairs)
        low = [(x.reshape(1, K, *x.shape[-2:]), full) for x, full in pairs]
        results = [up(x, full.shape[-2:]).view_as(full) for x, full in low]
    else:
        assert is_changed(function, model)
    torch.testing.assert_close(results, expected)
    handle.remove()
    torch.testing.assert_close(outputs(model(images)), outputs(plain(images)))


def test_a_compiled_model_that_calls_its_forward() -> None:
    model = Unbatched()
    ao.low_resolution(model, IMAGES)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES[0]), model(IMAGES)[0])


def test_a_removed_handle_changes_nothing(function: Callable[..., Any]) -> None:
    model = Net()
    first = function(model, IMAGES)
    shallow = copy.copy(first)
    first.remove()
    second = function(model, IMAGES)
    first.remove()
    shallow.remove()
    assert is_changed(function, model)
    module: Any = model if function is ao.low_resolution else model.head
    changed = type(module)
    module.__class__ = type("Sharded", (changed,), {})  # as fully_shard
    first.remove()
    with pytest.raises(ValueError, match="remove: model: expected the class that anchorops gave"):
        second.remove()
    module.__class__ = changed
    other = FUNCTIONS[1 - FUNCTIONS.index(function)](model, IMAGES)
    second.remove()
    first.remove()
    assert not is_changed(function, model)
    other.remove()
    assert all(type(x) is type(y) for x, y in zip(model.modules(), Net().modules(), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_model_and_handle(
    function: Callable[..., Any], copied: Callable[[Any], Any]
) -> None:
    model = Net()
    handle = function(model, IMAGES)
    other, other_handle = copied((model, handle))
    other_handle.remove()
    assert not is_changed(function, other) and is_changed(function, model)
    other, other_handle = copied((model, handle))
    handle.remove()
    assert is_changed(function, other) and not is_changed(function, model)


def test_what_a_handle_says_is_the_callers(function: Callable[..., Any]) -> None:
    handle = function(Net(), IMAGES)
    before = repr(handle)
    (handle.outputs if function is ao.low_resolution else handle.moved).clear()
    assert repr(handle) == before

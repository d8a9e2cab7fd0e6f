"""Predictions in ONNX models: standard operators, and the same labels in onnxruntime."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, _decomp, nn

import anchorops as ao

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the exporter of TorchScript
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Case(NamedTuple):
    predict: Callable[..., Any]
    volumes: bool = False
    labels: bool = False  # the second input, of the images' size


CONFIDENT = partial(ao.pixel_argmax, confidence=True)
CASES = {
    "labels": Case(ao.pixel_argmax),
    "uint8 and confidence": Case(partial(CONFIDENT, dtype=torch.uint8, align_corners=True)),
    "sigmoids": Case(partial(CONFIDENT, sigmoid=True, threshold=0.3)),
    "one sigmoid": Case(
        lambda x, size: ao.pixel_argmax(x[:, :1], size, sigmoid=True, dtype=torch.uint8)
    ),
    "float64": Case(lambda x, size: CONFIDENT(x.double(), size)),
    "volumes": Case(CONFIDENT, volumes=True),
    "confusion": Case(ao.pixel_confusion, labels=True),
    "confusion, a class is ignored": Case(partial(ao.pixel_confusion, ignore_index=2), labels=True),
    "confusion of a sigmoid": Case(
        lambda x, labels: ao.pixel_confusion(x[:, :1], labels.clamp(max=1), sigmoid=True),
        labels=True,
    ),
}


QUICK = ("labels", "confusion")


class Model(nn.Module):
    """Logits of five classes at half of the images' size, and what is predicted from them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        convolution = nn.Conv3d if case.volumes else nn.Conv2d
        self.convolution, self.case = convolution(3, 5, 3, 2, 1), case

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        second = images.shape[2:] if labels is None else labels
        return self.case.predict(self.convolution(images), second)


def _inputs(case: Case, batch: int, *size: int) -> tuple[Tensor, ...]:
    size = (6, *size) if case.volumes else size
    images = torch.randn(batch, 3, *size)
    labels = torch.randint(0, 6, (batch, *size)) % 6
    return (images, torch.where(labels == 5, 255, labels)) if case.labels else (images,)


def _dynamic(inputs: Sequence[Tensor], auto: object = None) -> tuple[dict[int, Any], ...]:
    """Batch and sizes of each input by name, or all `auto`."""
    sizes = [[axis for axis in range(x.dim()) if x.dim() == 3 or axis != 1] for x in inputs]
    names = ("batch", "first", "second", "third")
    return tuple({axis: auto or names[i] for i, axis in enumerate(axes)} for axes in sizes)


def _export(how: str, model: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
    names = ["images", "labels"][: len(inputs)]
    if how == "TorchScript":
        axes = dict(zip(names, _dynamic(inputs), strict=True))
        torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes)
        return
    shapes = _dynamic(inputs, torch.export.Dim.AUTO)
    if how == "dynamo":
        torch.onnx.export(
            model, inputs, file, dynamo=True, input_names=names, dynamic_shapes=shapes
        )
        return
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    assert "anchorops" in str(program.graph)
    assert "anchorops" in str(program.run_decompositions().graph)
    program = program.run_decompositions(ao.onnx_decompositions())
    torch.onnx.export(program, (), file, dynamo=True)


# torch.onnx.export(dynamo=True) exports such a program too, so two cases are enough there
@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "TorchScript") for name in CASES),
        *((name, "an exported program") for name in QUICK),
        *(
            pytest.param(name, "an exported program", marks=pytest.mark.slow)
            for name in CASES
            if name not in QUICK
        ),
        ("labels", "dynamo"),
        pytest.param("confusion", "dynamo", marks=pytest.mark.slow),
    ],
)
def test_equal_labels_in_onnxruntime(name: str, how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    case, file = CASES[name], tmp_path / "model.onnx"
    model = Model(case).eval()
    _export(how, model, _inputs(case, 2, 16, 24), file)
    assert {node.domain for node in onnx.load(file).graph.node} <= {"", "pkg.onnxscript.torch_lib"}
    session = onnxruntime.InferenceSession(file)
    inputs = _inputs(case, 3, 20, 18)  # another batch and size
    feeds = {x.name: y.numpy() for x, y in zip(session.get_inputs(), inputs, strict=True)}
    got, expected = session.run(None, feeds), model(*inputs)
    for x, y in zip(got, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(torch.from_numpy(x), y.detach(), rtol=1e-5, atol=1e-6)


def test_labels_alone_are_one_resize_and_one_argmax(tmp_path: Path) -> None:
    case, file = CASES["labels"], tmp_path / "model.onnx"
    _export("an exported program", Model(case).eval(), _inputs(case, 2, 16, 24), file)
    operators = {node.op_type for node in onnx.load(file).graph.node}
    assert operators - {"Shape", "Concat", "Gather"} == {"ArgMax", "Conv", "Resize"}


LOSS = Case(lambda x, labels: ao.pixel_kl_divergence(x, x.flip(1), labels.shape[1:]), labels=True)


def test_losses_are_refused(tmp_path: Path) -> None:
    model, inputs = Model(LOSS).eval(), _inputs(LOSS, 2, 16, 24)
    message = "pixel_kl_divergence: an ONNX model can contain pixel_argmax, confusion, pixel_conf"
    with pytest.raises(RuntimeError, match=message):
        _export("TorchScript", model, inputs, tmp_path / "model.onnx")
    with pytest.raises(RuntimeError, match="can contain pixel_argmax"):
        _export("an exported program", model, inputs, tmp_path / "model.onnx")


def test_a_chosen_backend_is_refused(tmp_path: Path) -> None:
    case = CASES["labels"]
    with ao.use_backend("cpu"), pytest.raises(ValueError, match="ONNX has only standard operators"):
        _export("TorchScript", Model(case), _inputs(case, 1, 8, 8), tmp_path / "model.onnx")


def test_nothing_of_torch_is_replaced() -> None:
    """torch's own table of decompositions has none of ours."""
    assert type(_decomp.decomposition_table) is dict
    assert not _decomp.decomposition_table.keys() & ao.onnx_decompositions().keys()

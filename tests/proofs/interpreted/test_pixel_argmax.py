"""Predicted classes and confusion matrices: equal integers, unless logits are almost equal."""

import pytest
import torch
from emulator import BACKEND

import anchorops as ao
from anchorops import reference

pytestmark = pytest.mark.usefixtures("sorted_by_numpy")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INTEGERS = ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]


def check_argmax(logits, size, align_corners=False):
    """The logit of our class is the largest, up to rounding."""
    ours = ao.pixel_argmax(logits, size, align_corners=align_corners)
    z = reference.upsample(logits.float(), size, align_corners)
    assert ours.dtype == torch.int64 and ours.shape == z[:, 0].shape
    assert ours.is_contiguous()
    found = z.gather(1, ours[:, None])[:, 0]
    assert (found >= z.amax(1) - 2**-22 * float(z.abs().max())).all()
    return ours


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        ((2, 19, 3, 5), (12, 20)),
        ((1, 37, 9, 2), (33, 16)),
        ((1, 2, 3, 40), (12, 160)),
        ((2, 150, 5, 4), (5, 4)),
        ((1, 7, 9, 8), (3, 5)),
        ((1, 2, 2, 2), (3, 3)),
        ((1, 5, 1, 1), (4, 3)),
    ],
)
def test_sizes(size, pixels, align_corners):
    check_argmax(torch.randn(size), pixels, align_corners)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_layouts(dtype):
    logits = torch.randn(2, 20, 3, 9).to(dtype)
    expected = check_argmax(logits, (12, 36))
    around = torch.full((4, 22, 7, 13), torch.nan, dtype=dtype)
    around[1:3, 1:21, 2:5, 3:12] = logits
    for view in (
        logits.contiguous(memory_format=torch.channels_last),
        logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        around[1:3, 1:21, 2:5, 3:12],
    ):
        assert torch.equal(ao.pixel_argmax(view, (12, 36)), expected)


@pytest.mark.parametrize("pixels", [(8, 12), (5, 7), (2, 3)])
def test_first_of_equal_logits(pixels):
    logits = torch.zeros(1, 40, 2, 3)
    assert not ao.pixel_argmax(logits, pixels).any()
    logits[0, [7, 33]] = 1.5
    assert (ao.pixel_argmax(logits, pixels) == 7).all()
    logits[0] = -torch.inf
    assert not ao.pixel_argmax(logits, pixels).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("pixels", [(8, 12), (5, 7), (2, 3)])
def test_nan_is_largest(pixels):
    logits = torch.randn(1, 40, 2, 3)
    logits[0, 5] = torch.inf
    logits[0, 20, 0, 1] = torch.nan
    expected = reference.pixel_argmax(logits, pixels)
    assert (expected == 20).any() and (expected == 5).any()
    assert torch.equal(ao.pixel_argmax(logits, pixels), expected)
    logits[0, [11, 30]] = torch.nan
    assert (ao.pixel_argmax(logits, pixels) == 11).all()


def test_offsets_are_64_bit():
    torch.use_deterministic_algorithms(False)  # otherwise torch.empty would write all of it
    buffer = torch.empty(2**32 + 64, dtype=FP16)
    for stride in ((2**30, 12, 4, 1), (0, 2**30, 4, 1), (0, 1, 2**30, 4), (0, 1, 3, 2**30)):
        far = buffer.as_strided((4 if stride[0] else 1, 3, 3, 4), stride)
        near = far.copy_(torch.randn(far.shape)).clone()
        assert torch.equal(ao.pixel_argmax(far, (12, 16)), ao.pixel_argmax(near, (12, 16)))


def test_empty():
    assert ao.pixel_argmax(torch.empty(0, 3, 2, 2), (4, 4)).shape == (0, 4, 4)
    assert ao.pixel_argmax(torch.randn(2, 3, 2, 2), (0, 4)).shape == (2, 0, 4)
    empty = torch.empty(0, dtype=torch.int64)
    assert not ao.confusion(empty, empty, 3).any()


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in INTEGERS], ids=str)
def test_label_dtypes_of_confusion(dtype):
    labels = torch.randint(0, 8, (2, 9, 33)).to(dtype)
    labels[0, 0, :4] = 120
    predictions = torch.randint(0, 6, labels.shape)
    expected = reference.confusion(predictions, labels, 6, ignore_index=3)
    assert torch.equal(ao.confusion(predictions, labels, 6, ignore_index=3), expected)


@pytest.mark.parametrize("num_classes", [2, 3, 19, 150, 4096])
def test_classes_of_confusion(num_classes):
    labels = torch.randint(-1, num_classes + 1, (700,))
    predictions = torch.randint(-1, num_classes + 1, (700,))
    labels[:200], predictions[:200] = num_classes - 1, num_classes - 1
    expected = reference.confusion(predictions, labels, num_classes, ignore_index=0)
    assert torch.equal(ao.confusion(predictions, labels, num_classes, ignore_index=0), expected)


def test_values_outside_are_left_out():
    labels = torch.tensor([0, 1, 2**40, -(2**40), 2**32 + 1, 255, 2, 2, 2])
    predictions = torch.tensor([1, 1, 1, 1, 1, 1, -1, 2**32 + 2, 3])
    expected = torch.tensor([[0, 1, 0], [0, 1, 0], [0, 0, 0]])
    assert torch.equal(ao.confusion(predictions, labels, 3), expected)


def test_strides_of_confusion():
    labels, predictions = torch.randint(0, 4, (2, 14, 30)), torch.randint(0, 4, (2, 7, 10))
    part = labels[:, ::2, 1::3]
    expected = ao.confusion(predictions, part.contiguous(), 4)
    assert torch.equal(ao.confusion(predictions, part, 4), expected)
    turned = predictions.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(ao.confusion(turned, part, 4), expected)
    row = predictions[:1, :1].expand(2, 7, 10)
    assert torch.equal(ao.confusion(row, part, 4), ao.confusion(row.contiguous(), part, 4))


@pytest.mark.parametrize(
    ("size", "pixels", "align_corners", "dtype"),
    [
        ((2, 19, 3, 5), (12, 20), False, BF16),
        ((2, 5, 4, 6), (17, 25), True, FP32),
        ((1, 37, 6, 7), (6, 7), False, BF16),
        ((1, 7, 9, 8), (3, 5), False, FP16),
    ],
)
def test_hits_are_the_diagonal(size, pixels, align_corners, dtype):
    """The arithmetic is the same, so this holds even if logits are equal up to rounding."""
    logits = (torch.randn(size) * 4).round().div(4).to(dtype)
    labels = torch.randint(0, size[1], (size[0], *pixels))
    labels[torch.rand(labels.shape) < 0.2] = 255
    options = {"align_corners": align_corners}
    matrix = ao.pixel_confusion(logits, labels, **options)
    assert torch.equal(ao.ops.softmax_moments(logits, labels, **options).hits, matrix.diagonal())
    predictions = ao.pixel_argmax(logits, pixels, **options)
    assert torch.equal(reference.confusion(predictions, labels, size[1], ignore_index=255), matrix)


def test_compiles_as_one_graph():
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def matrix(logits, labels):
        return ao.pixel_confusion(logits, labels)

    for width in (3, 5):
        logits, labels = torch.randn(1, 4, 2, width), torch.randint(0, 4, (1, 7, 2 * width))
        assert torch.equal(matrix(logits, labels), ao.pixel_confusion(logits, labels))


def test_operators_are_registered_as_torch_expects():
    operators = torch.ops.anchorops
    logits, labels = torch.randn(2, 5, 2, 3), torch.randint(0, 5, (2, 8, 12))
    torch.library.opcheck(getattr(operators.pixel_argmax, BACKEND), (logits, 8, 12, False))
    predictions = torch.randint(0, 5, (2, 8, 12))
    torch.library.opcheck(getattr(operators.confusion, BACKEND), (predictions, labels, 5, 255))

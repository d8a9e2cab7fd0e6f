"""CUDA: an operator that is called directly, not by our public functions, checks what its kernels
rely on. It raises, and reads no wrong memory."""

import pytest
import torch
from torch import Tensor

from tests.helpers.operators import strided

pytestmark = pytest.mark.on("simulated_cuda")


K, D = 5, 6
LABELS = torch.randint(0, K, (2, 8, 12))
KEYS = torch.randint(-1, K, (2, 12), dtype=torch.int32)
COUNTS = KEYS[KEYS >= 0].bincount(minlength=K)
FEATURES, ANCHORS = torch.randn(2, D, 12), torch.randn(K, D)
BY_CLASS = torch.rand(K)
RIGHT = {
    "class_keys": {
        "labels": LABELS,
        "height": 4,
        "width": 5,
        "num_classes": K,
        "per_image": False,
        "ignore_index": 255,
    },
    "split_groups": {"keys": KEYS, "counts": COUNTS, "seed": torch.tensor(5), "groups": 2},
    "class_moments": {
        "features": FEATURES,
        "keys": KEYS,
        "anchors": ANCHORS,
        "num_keys": K,
        "groups": 1,
        "with_sums": True,
    },
    "class_moments_backward": {
        "features": FEATURES,
        "keys": KEYS,
        "anchors": ANCHORS,
        "dsums": ANCHORS,
        "dsqdists": BY_CLASS,
        "groups": 1,
        "size": FEATURES.shape,
        "stride": FEATURES.stride(),
        "dtype": torch.float32,
    },
}
# Operator, argument, its wrong value, message.
SHAPE, TABLE = "expected shape", "expected a contiguous"
WRONG = [
    ("class_keys", "labels", LABELS[0], "expected .B, H, W., got shape .8, 12."),
    ("class_keys", "labels", LABELS[:, :0], "expected at least one for each image"),
    ("class_keys", "num_classes", 16_385, "expected at most 16384, got 16385"),
    ("class_keys", "class_dtype", torch.uint8, "class_dtype is not supported: use the backend tri"),
    ("split_groups", "keys", strided(KEYS), TABLE),
    ("split_groups", "counts", strided(COUNTS), TABLE),
    ("split_groups", "seed", torch.tensor([1, 2]), "expected one number, got 2"),
    ("split_groups", "groups", 0, "expected at least 1, got 0"),
    ("class_moments", "anchors", ANCHORS[:, 1:], SHAPE),
    ("class_moments_backward", "features", FEATURES[1:], SHAPE),
    ("class_moments_backward", "anchors", ANCHORS[0], SHAPE),
    ("class_moments_backward", "dsums", ANCHORS[:, 1:], SHAPE),
    ("class_moments_backward", "dsqdists", BY_CLASS[1:], SHAPE),
]


@pytest.mark.parametrize("operator", RIGHT)
def test_right_arguments(operator: str, backend: str):
    getattr(torch.ops.anchorops, operator).cuda(**RIGHT[operator])


@pytest.mark.parametrize(
    ("operator", "argument", "wrong", "message"),
    WRONG,
    ids=[f"{operator}-{argument}" for operator, argument, *_ in WRONG],
)
def test_wrong_arguments(operator: str, argument: str, wrong: object, message: str, backend: str):
    call = getattr(torch.ops.anchorops, operator).cuda
    with pytest.raises(RuntimeError, match=rf"{operator}\.cuda: .*{message}"):
        call(**RIGHT[operator] | {argument: wrong})


@pytest.mark.parametrize(
    ("operator", "argument", "wrong"),
    [
        ("split_groups", "counts", COUNTS.int()),
        ("class_moments", "keys", KEYS.long()),
        ("class_moments", "anchors", ANCHORS.double()),
        ("class_moments_backward", "features", FEATURES.half()),
    ],
    ids=lambda x: str(x.dtype) if isinstance(x, Tensor) else x,
)
def test_wrong_dtypes(operator: str, argument: str, wrong: Tensor, backend: str):
    with pytest.raises(RuntimeError, match="expected scalar type"):
        getattr(torch.ops.anchorops, operator).cuda(**RIGHT[operator] | {argument: wrong})

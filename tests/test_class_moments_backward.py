"""The gradient of class moments, by the operator of the GPU backends: all layouts, alignments and
tables.

Each element is between the exact value minus and plus its error in float32, both rounded to the
features' dtype.
"""

import pytest
import torch
from class_moments_cases import BF16, F16, F32
from cpu_kernels import in_layout
from simulated_gpu import BACKEND

pytestmark = pytest.mark.on("simulated_triton", "simulated_cuda")

LAYOUTS = [  # of features, and their size
    ("contiguous", (2, 24, 4, 16), BF16),
    ("contiguous", (2, 17, 9, 31), F16),
    ("contiguous", (2, 136, 8, 24), F32),
    ("contiguous", (2, 65, 1, 1), F32),
    ("contiguous", (2, 40, 6, 1), BF16),
    ("contiguous", (1, 1, 6, 10), F32),
    ("contiguous", (5, 300), F16),
    ("contiguous", (33, 1), BF16),
    # planes that are not aligned to 16 bytes
    ("contiguous", (2, 40, 13, 13), BF16),
    ("contiguous", (3, 37, 90), F16),
    ("contiguous", (2, 21, 135), F32),
    ("misaligned", (2, 40, 13, 13), BF16),
    ("cropped aligned", (2, 24, 13, 11), BF16),
    ("channels_last", (2, 24, 4, 16), F16),
    ("channels_last", (2, 136, 8, 24), BF16),
    ("channels_last", (2, 65, 1, 1), BF16),
    ("channels_last", (2, 17, 9, 31), F32),
    ("misaligned", (2, 24, 4, 16), BF16),
    ("misaligned", (70, 24), F32),
    ("channels_last misaligned", (2, 24, 4, 16), F32),
    ("cropped", (2, 24, 4, 16), F16),
    ("cropped", (3, 8, 50), BF16),
    ("cropped aligned", (2, 24, 4, 16), BF16),
    ("cropped aligned", (70, 24), F16),
    ("channels_last cropped", (2, 24, 4, 16), BF16),
    ("channels_last cropped aligned", (2, 24, 4, 16), F32),
    ("transposed dense", (2, 24, 4, 16), BF16),
    ("transposed dense", (130, 24), F32),
    ("every other", (2, 24, 4, 16), F16),
    ("expanded batch", (2, 24, 4, 16), BF16),
    ("expanded channels", (2, 24, 4, 16), F32),
    ("expanded pixels", (2, 24, 4, 16), BF16),
]


def make_features(layout, size, dtype):
    return in_layout(torch.randn(size).to(dtype), layout)[0]


def make_keys(size, num_keys, ignored=0.2):
    pixels = (1, size[0]) if len(size) == 2 else (size[0], torch.Size(size[2:]).numel())
    keys = torch.randint(0, num_keys, pixels, dtype=torch.int32)
    keys[torch.rand(pixels) < ignored] = -1
    return keys


def dense_stride(features):
    return torch.empty_like(features, device="meta").stride()


def run(features, keys, anchors, dsums, dsqdists, groups=1, stride=None):
    """features may be a view; without dsqdists they are not passed to the operator."""
    size, dtype, stride = features.shape, features.dtype, stride or dense_stride(features)
    if dsqdists is None:
        features = anchors = None
    backward = getattr(torch.ops.anchorops.class_moments_backward, BACKEND)
    out = backward(features, keys, anchors, dsums, dsqdists, groups, size, stride, dtype)
    assert out.shape == size and out.stride() == tuple(stride) and out.dtype == dtype
    return out


def as_rows(features):
    return features.movedim(1, -1).flatten(0, -2)


def check(features, keys, anchors, dsums, dsqdists, groups=1, stride=None):
    ours = as_rows(run(features, keys, anchors, dsums, dsqdists, groups, stride))
    rows, keys = as_rows(features.double()), keys.flatten().long()
    valid, keys = keys[:, None] >= 0, keys.clamp(min=0)
    exact, error = torch.zeros_like(rows), torch.zeros_like(rows)
    if dsqdists is not None:
        nearest = anchors.double()[keys // groups % len(anchors)]
        scale = 2 * dsqdists.double()[keys, None]
        exact = scale * (torch.where(valid, rows, 0) - nearest)
        error = 2**-23 * (exact.abs() + scale.abs() * nearest.abs())
    if dsums is not None:
        exact = exact + dsums.double()[keys]
        error = error + 2**-24 * exact.abs()
    exact, error = torch.where(valid, exact, 0), torch.where(valid, error, 0)
    low, high = ((exact + side * error).to(ours.dtype) for side in (-1, 1))
    assert ((low <= ours) & (ours <= high)).all()


@pytest.mark.parametrize(("layout", "size", "dtype"), LAYOUTS, ids=str)
def test_layouts(backend, layout, size, dtype):
    features, keys, dim = make_features(layout, size, dtype), make_keys(size, 5), size[1]
    if not layout.startswith("expanded"):
        features.movedim(1, -1)[(keys < 0).view(size[:1] + size[2:])] = torch.nan
    anchors, dsums, dsqdists = torch.randn(5, dim), torch.randn(5, dim), torch.randn(5)
    check(features, keys, anchors, dsums, dsqdists)
    check(features, keys, anchors, None, dsqdists)
    check(features, keys, None, dsums, None)
    stride = torch.empty(size, device="meta").stride()  # not always the features' own
    check(features, keys, anchors, dsums, dsqdists, stride=stride)
    if len(size) == 4:
        like = torch.empty(size, device="meta").contiguous(memory_format=torch.channels_last)
        check(features, keys, anchors, dsums, dsqdists, stride=like.stride())


@pytest.mark.parametrize("size", [(2, 24, 4, 16), (70, 24), (2, 17, 5, 7)])
def test_tables(backend, size):
    features, keys, dim = torch.randn(size).to(BF16), make_keys(size, 7), size[1]
    misaligned = torch.randn(2, 7 * dim + 1)[:, 1:].view(2, 7, dim)
    for anchors, dsums, dsqdists in (
        (torch.randn(7, dim), torch.randn(1, 1).expand(7, dim), torch.randn(1).expand(7)),
        (torch.randn(7, dim + 1)[:, 1:], torch.randn(7, 2 * dim)[:, ::2], torch.randn(14)[::2]),
        (*misaligned, torch.randn(8)[1:]),
        (torch.randn(dim, 7).T, torch.randn(dim, 7).T, torch.randn(7)),
    ):
        check(features, keys, anchors, dsums, dsqdists)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize(
    ("num_classes", "groups", "images"),
    [(1, 1, 1), (5, 3, 1), (5, 1, 2), (5, 3, 2), (128, 4, 2), (16_384, 1, 1)],
)
def test_keys_of_images_and_groups(backend, num_classes, groups, images, layout):
    features, num_keys = make_features(layout, (2, 24, 3, 16), BF16), num_classes * groups * images
    keys = make_keys(features.shape, num_keys)
    keys[0, 0] = num_keys - 1
    tables = torch.randn(num_classes, 24), torch.randn(num_keys, 24), torch.randn(num_keys)
    check(features, keys, *tables, groups=groups)


def test_planes_that_lie_otherwise_than_those_of_the_gradient(backend):
    """The first plane begins at a vector in both, the second one elsewhere in a vector of each."""
    features = torch.randn(2, 16, 7, 9).to(BF16)[:, :, :5]
    keys = make_keys(features.shape, 3)
    check(features, keys, torch.randn(3, 16), torch.randn(3, 16), torch.randn(3))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
def test_all_ignored(backend, layout):
    features = make_features(layout, (2, 24, 5, 16), BF16).fill_(torch.nan)
    keys = torch.full((2, 80), -1, dtype=torch.int32)
    tables = torch.full((3, 24), torch.nan), torch.full((3, 24), torch.inf), torch.rand(3)
    assert not run(features, keys, *tables).any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned", "every other"])
def test_not_finite_element_spoils_itself_alone(backend, layout):
    features = make_features(layout, (2, 24, 5, 16), BF16)
    keys = make_keys(features.shape, 5)
    keys[1, 37] = 1
    tables = torch.randn(5, 24), torch.randn(5, 24), torch.randn(5)
    clean = run(features, keys, *tables)
    features[1, 3, 2, 5] = torch.inf
    ours = run(features, keys, *tables)
    assert not ours[1, 3, 2, 5].isfinite()
    ours[1, 3, 2, 5] = clean[1, 3, 2, 5]
    assert torch.equal(ours, clean)


def test_offsets_are_64_bit(backend):
    """Strides of 2^30 elements: the last rows are beyond 2^31. Few pages are touched."""
    torch.use_deterministic_algorithms(False)  # otherwise torch.empty would write all of it
    buffer = torch.empty(2**32 + 64, dtype=F16)
    for size, stride in (  # test_guarantees.py has others
        ((4, 61), (2**30, 1)),
        ((61, 4), (1, 2**30)),
        ((4, 4, 3, 8), (2**30, 24, 8, 1)),
        ((1, 4, 4, 16), (0, 2**30, 16, 1)),
        ((1, 8, 4, 4), (0, 1, 2**30, 8)),
    ):
        far = buffer.as_strided(size, stride)
        near = far.copy_(torch.randn(size)).clone()
        keys, dim = make_keys(size, 2), size[1]
        tables = torch.randn(2, dim), torch.randn(2, dim), torch.randn(2)
        assert torch.equal(run(far, keys, *tables, stride=stride), run(near, keys, *tables))

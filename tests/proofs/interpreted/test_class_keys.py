import pytest
import torch
from emulator import BACKEND

from anchorops import reference
from anchorops._ops.class_keys import class_keys
from anchorops.kernels.launch import as_pixels
from anchorops.kernels.tile_keys import tile_keys


def check(labels, size, num_classes, per_image=False, ignore_index=255):
    features = torch.empty(size)
    expected = reference.class_keys(features, labels, num_classes, per_image, ignore_index)
    keys, counts = class_keys(
        features,
        labels,
        num_classes,
        per_image=per_image,
        ignore_index=ignore_index,
        backend=BACKEND,
    )
    assert keys.dtype == torch.int32 and counts.dtype == torch.int64
    assert torch.equal(keys.long(), expected[0]) and torch.equal(counts, expected[1])


@pytest.mark.parametrize(
    ("size", "classes", "per_image"),
    [
        ((2, 3, 9, 13), 5, False),
        ((2, 3, 9, 13), 5, True),
        ((300, 3), 4, False),
        ((1, 3, 700), 1500, False),
        ((2, 3, 0, 4), 4, True),
        ((0, 3), 4, False),
    ],
)
def test_random_groups(size, classes, per_image):
    """Few keys and many, of which most have no pixel; images, points, no pixels."""
    shape = size[:1] if len(size) == 2 else (size[0], *size[2:])
    labels, features = torch.randint(-1, classes + 1, shape), torch.empty(size)
    if len(size) == 4:
        labels = labels.repeat_interleave(2, 1).repeat_interleave(3, 2)  # resized
    keys, counts = class_keys(
        features,
        labels,
        classes,
        groups=3,
        per_image=per_image,
        seed=5,
        ignore_index=2,
        backend=BACKEND,
    )
    expected, of_classes = reference.class_keys(features, labels, classes, per_image, 2)
    assert keys.dtype == torch.int32 and counts.dtype == torch.int64
    assert torch.equal(keys.long(), reference.split_groups(expected, of_classes, 3, 5))
    assert torch.equal(counts, reference.group_counts(of_classes, 3))


@pytest.mark.skipif(BACKEND != "cuda", reason="Triton uses class_keys and split_groups")
@pytest.mark.parametrize("per_image", [False, True])
def test_opcheck_group_keys(per_image):
    labels = torch.randint(0, 6, (2, 8, 6))
    given = 4, 5, 5, per_image, 255, torch.tensor(3), 2
    torch.library.opcheck(torch.ops.anchorops.group_keys.cuda, (labels, *given))


INTEGERS = ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in INTEGERS], ids=str)
def test_dtypes(dtype):
    labels = torch.randint(0, 8, (2, 9, 13)).to(dtype)
    labels[0, 0, :4] = 120
    check(labels, (2, 1, 9, 13), 5, ignore_index=3)


@pytest.mark.parametrize(
    ("source", "size"),
    [((36, 52), (9, 13)), ((7, 5), (9, 13)), ((9, 30), (9, 13)), ((1, 1), (3, 4))],
)
@pytest.mark.parametrize("per_image", [False, True])
def test_resized_by_nearest(source, size, per_image):
    check(torch.randint(-1, 22, (2, *source)), (2, 1, *size), 19, per_image)


def test_more_than_one_tile():
    check(torch.randint(0, 300, (1, 700)), (1, 1, 700), 300)
    check(torch.zeros(520, dtype=torch.int64), (520, 1), 1)
    check(torch.randint(0, 40_000, (300,)), (300, 1), 16_384)


@pytest.mark.parametrize(("classes", "dtype"), [(5, torch.uint8), (300, torch.int16)], ids=str)
@pytest.mark.parametrize("per_image", [False, True])
def test_classes_in_small_integers(classes, dtype, per_image):
    labels = torch.randint(-2, classes + 2, (2, 9, 13))
    operator = getattr(torch.ops.anchorops.class_keys, BACKEND)
    keys, counts = operator(labels, 9, 13, classes, per_image, 3, dtype)
    features = torch.empty(2, 1, 9, 13)
    expected, _ = reference.class_keys(features, labels, classes, False, 3)
    assert keys.dtype == dtype and torch.equal(keys, expected.to(dtype))  # -1 is 255 in uint8
    assert torch.equal(counts, reference.class_keys(features, labels, classes, per_image, 3)[1])


def test_strides():
    labels = torch.randint(0, 6, (2, 14, 30))
    check(labels[:, ::2, 1::3], (2, 1, 7, 10), 6)
    check(labels.transpose(1, 2), (2, 1, 30, 14), 6)
    check(labels[:, :1].expand(2, 5, 30), (2, 1, 5, 30), 6)
    check(labels[0, 3:4, ::2].expand(3, 15), (3, 1, 15), 6, per_image=True)


def test_offsets_are_64_bit():
    torch.use_deterministic_algorithms(False)  # otherwise torch.empty would write all of it
    labels = torch.empty(2**32 + 64, dtype=torch.uint8).as_strided((3, 4, 5), (2**31, 5, 1))
    labels.copy_(torch.randint(0, 6, (3, 4, 5)))
    check(labels, (3, 1, 4, 5), 6)


def test_values_outside_are_ignored():
    labels = torch.tensor([-1, 0, 4, 5, 255, 2**40, -(2**40), 2**32 + 1, 3])
    check(labels, (9, 1), 5)
    check(labels, (9, 1), 5, ignore_index=-1)
    check(labels, (9, 1), 5, ignore_index=2**40)


def test_empty():
    check(torch.empty(0, dtype=torch.int64), (0, 3), 4)
    check(torch.empty(0, 4, 4, dtype=torch.int64), (0, 3, 2, 2), 4, per_image=True)
    check(torch.full((2, 5), 255), (2, 3, 5), 4)


@pytest.mark.skipif(BACKEND != "triton", reason="Triton alone sorts pixels by key")
def test_few_keys_take_partials_and_many_are_sorted(monkeypatch):
    from anchorops.kernels import launch

    monkeypatch.setattr(launch, "architecture", lambda: "sm_90")

    def chunks(num_keys, *size):
        (view,) = launch.as_pixels(size, torch.empty(size, device="meta").stride())
        return launch.chunks_of(view, 2, launch.tile_of(view, 2), 4 * num_keys * size[1])

    for num_keys in (2, 19, 150, 171 * 4):
        assert 22 <= chunks(num_keys, 8, 720, 128, 256) <= 171  # half of the device to all of it
    for num_keys in (8 * 150, 2048, 16_384):
        assert chunks(num_keys, 8, 720, 128, 256) == 0
    assert chunks(19, 300, 64) == 3  # the number of tiles
    assert chunks(16_384, 300, 768) == 0


@pytest.mark.skipif(BACKEND != "triton", reason="Triton alone lists the keys of tiles")
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_keys", [1, 3, 2**31 - 1])
def test_keys_of_a_tile(num_keys, ignored):
    keys = torch.randint(0, num_keys, (2, 40), dtype=torch.int32)
    keys[torch.rand(keys.shape) < ignored] = -1
    (view,) = as_pixels((2, 5, 40), (200, 40, 1))
    summaries, lists, local = tile_keys(keys, view, 32)  # the second tile of a line ends early
    tiles = torch.full((4, 32), -1, dtype=torch.int32)
    tiles[0::2], tiles[1::2, :8] = keys[:, :32], keys[:, 32:]
    for tile, summary, listed, places in zip(tiles, summaries.tolist(), lists, local, strict=True):
        present = tile[tile >= 0].unique()
        if (tile == tile[0]).all():
            assert summary == -1 - int(tile[0])
        else:
            assert summary == len(present) + 2**16 * int((tile < 0).any())
            assert torch.equal(listed[: len(present)], present)
            expected = torch.where(tile >= 0, torch.searchsorted(present, tile), -1)
            assert torch.equal(places.long(), expected)

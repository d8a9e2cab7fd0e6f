"""Class keys on every backend: keys, counts, nearest-neighbour resizing, groups of equal size.

All keys and counts are equal to those of the reference, so each test is also one of the reference.
"""

import pytest
import torch
import torch.nn.functional as F

from anchorops import reference
from anchorops._ops.class_keys import class_keys
from anchorops._ops.split_groups import split_groups

pytestmark = pytest.mark.on("cpu", "simulated_triton", "simulated_cuda")
cpu = pytest.mark.on("cpu")
not_cuda = pytest.mark.on("cpu", "simulated_triton")
INTEGERS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)


@pytest.fixture
def both(backend: str):
    """Keys and counts of the backend, after checking that they equal the reference's."""

    def run(labels, size, num_classes, *, groups=1, per_image=False, seed=None, ignore_index=255):
        features, common = torch.empty(size), (per_image, ignore_index)
        options = {"groups": groups, "per_image": per_image, "seed": seed}
        options |= {"ignore_index": ignore_index, "backend": backend}
        keys, counts = class_keys(features, labels, num_classes, **options)
        assert keys.dtype == torch.int32 and counts.dtype == torch.int64
        expected = reference.class_keys(features, labels, num_classes, *common)
        if groups > 1:
            split = reference.split_groups(*expected, groups, seed)
            expected = split, reference.group_counts(expected[1], groups)
        assert torch.equal(keys.long(), expected[0]) and torch.equal(counts, expected[1])
        return keys, counts

    return run


def bincount(keys: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return torch.bincount(keys[keys >= 0], minlength=counts.numel()).view(counts.shape)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_dtypes(both, dtype: torch.dtype, poisoned: None):
    labels = torch.randint(0, 8, (2, 9, 13)).to(dtype)
    labels[0, 0, :4] = 120
    keys, counts = both(labels, (2, 1, 9, 13), 5, ignore_index=3)
    wide = labels.long().flatten(1)
    assert torch.equal(keys.long(), torch.where((wide < 5) & (wide != 3), wide, -1))
    assert torch.equal(counts, bincount(keys, counts)) and counts[3] == 0


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((16, 24), (8, 12)),  # twice as large
        ((36, 52), (9, 13)),  # four times
        ((23, 31), (9, 13)),  # odd ratios
        ((1024, 769), (113, 97)),
        ((9, 30), (9, 13)),  # one side unchanged
        ((4, 3), (8, 6)),  # smaller than the features
        ((7, 5), (9, 13)),
        ((1, 1), (3, 4)),
        ((5, 6), (1, 1)),
    ],
)
@pytest.mark.parametrize("per_image", [False, True])
def test_resized_as_interpolate(both, source, size, per_image: bool):
    labels = torch.randint(-2, 22, (2, *source))
    keys, counts = both(labels, (2, 1, *size), 19, per_image=per_image)
    nearest = F.interpolate(labels[:, None].float(), size, mode="nearest").long().flatten(1)
    image = 19 * torch.arange(2)[:, None] if per_image else 0
    valid = (nearest >= 0) & (nearest < 19)
    assert torch.equal(keys.long(), torch.where(valid, nearest + image, -1))
    assert torch.equal(counts, bincount(keys, counts))


@cpu  # the PTX machine takes nine seconds
def test_every_ratio_of_sizes(both):
    """Where float32 rounds the scale, the source index may differ by one from exact arithmetic."""
    for size in range(1, 40):
        for source in range(1, 120, 7):
            labels = torch.arange(source)[None, None]
            keys, _ = both(labels, (1, 1, 1, size), 120)
            nearest = F.interpolate(labels[None].float(), (1, size), mode="nearest")
            assert torch.equal(keys, nearest.int().view(1, size))


@not_cuda  # for CeCo
@pytest.mark.parametrize(
    ("num_classes", "dtype"),
    [(5, torch.uint8), (255, torch.uint8), (300, torch.int16)],
    ids=str,
)
@pytest.mark.parametrize("per_image", [False, True])
def test_classes_in_small_integers(both, backend, num_classes, dtype, per_image: bool):
    labels = torch.randint(-2, num_classes + 2, (2, 9, 13))
    operator = getattr(torch.ops.anchorops.class_keys, backend)
    keys, counts = operator(labels, 9, 13, num_classes, per_image, 3, dtype)
    expected, _ = reference.class_keys(torch.empty(2, 1, 9, 13), labels, num_classes, False, 3)
    assert keys.dtype == dtype and torch.equal(keys, expected.to(dtype))  # -1 is 255 in uint8
    assert torch.equal(
        counts, both(labels, (2, 1, 9, 13), num_classes, per_image=per_image, ignore_index=3)[1]
    )


def test_values_outside_are_ignored(both):
    labels = torch.tensor([-1, 0, 4, 5, 255, 2**40, -(2**40), 2**32 + 1, 3, -(2**63), 2**63 - 1])
    for ignore_index in (255, -1, -100, 2**40, -(2**63)):
        keys, counts = both(labels, (11, 1), 5, ignore_index=ignore_index)
        assert keys.tolist() == [[-1, 0, 4, -1, -1, -1, -1, -1, 3, -1, -1]]
        assert counts.tolist() == [1, 0, 0, 1, 1]
    keys, counts = both(labels, (11, 1), 5, ignore_index=4)  # a class
    assert keys[0, 2] == -1 and counts.tolist() == [1, 0, 0, 1, 0]
    keys, counts = both(labels, (11, 1), 300, ignore_index=-1)  # 255 is a class
    assert keys[0, 4] == 255 and counts[255] == 1


def test_ignore_index_is_not_wrapped_to_the_labels_dtype(both):
    small = torch.tensor([-1, 0, 1], dtype=torch.int8)  # 255 as int8 would be -1
    assert both(small, (3, 1), 2)[0].tolist() == [[-1, 0, 1]]
    large = torch.tensor([255, 0, 1], dtype=torch.uint8)  # -1 as uint8 would be 255
    assert both(large, (3, 1), 256, ignore_index=-1)[0].tolist() == [[255, 0, 1]]


def test_many_pixels_and_classes(both):
    """Pixels of more than one block of the GPU kernels."""
    both(torch.randint(0, 300, (1, 700)), (1, 1, 700), 300)
    both(torch.zeros(520, dtype=torch.int64), (520, 1), 1)
    both(torch.randint(0, 40_000, (300,)), (300, 1), 16_384)


# Groups


@pytest.mark.parametrize("groups", [2, 3, 4, 7, 1000])
@pytest.mark.parametrize("per_image", [False, True])
def test_groups_are_of_equal_size(both, groups: int, per_image: bool):
    labels = torch.randint(-1, 6, (2, 20, 15)).repeat_interleave(2, 1)  # resized
    size = (2, 1, 20, 15)
    classes, class_counts = both(labels, size, 5, per_image=per_image)
    keys, counts = both(labels, size, 5, per_image=per_image, groups=groups, seed=11)
    valid = classes >= 0
    assert torch.equal(keys[valid] // groups, classes[valid]) and (keys[~valid] == -1).all()
    assert torch.equal(counts, bincount(keys, counts))
    assert torch.equal(counts.sum(-1), class_counts)
    assert (counts.amax(-1) - counts.amin(-1) <= 1).all()


def test_groups_of_rare_classes(both):
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 255])
    keys, counts = both(labels, (7, 1), 4, groups=4, seed=3)
    assert counts.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert torch.equal(counts, bincount(keys, counts))


def test_groups_never_change(both):
    """Users publish results that depend on the groups, so the groups must never change."""
    labels = torch.tensor([[0, 1, 0, 1, 2, 0, 255, 1, 0, 1, 2, 0]])

    def groups(count: int, seed: int) -> list[int]:
        keys, _ = both(labels, (1, 1, 12), 3, groups=count, seed=seed)
        return torch.where(keys >= 0, keys % count, -1)[0].tolist()

    assert groups(2, 0) == [0, 0, 1, 1, 0, 1, -1, 0, 0, 1, 1, 0]
    assert groups(3, 12345) == [0, 0, 0, 1, 1, 1, -1, 0, 1, 2, 0, 2]
    assert groups(3, -7) == [0, 0, 2, 2, 1, 1, -1, 0, 1, 1, 0, 0]
    assert groups(3, 12345 + 2**32) == [0, 0, 1, 2, 1, 0, -1, 0, 1, 1, 0, 2]


@cpu  # the PTX machine takes seven seconds
def test_groups_are_spread_evenly(both):
    """Pixels next to each other, and a pixel under consecutive seeds, are grouped independently."""
    labels = torch.zeros(64, 64, dtype=torch.int64)[None]
    groups_by_seed = torch.stack(
        [both(labels, (1, 1, 64, 64), 1, groups=2, seed=s)[0].view(64, 64) for s in range(64)]
    ).double()
    tolerance = 5 * 0.5 / groups_by_seed.numel() ** 0.5
    for axis in range(3):
        a, b = groups_by_seed.narrow(axis, 0, 63), groups_by_seed.narrow(axis, 1, 63)
        assert abs((a == b).double().mean() - 0.5) < tolerance
    assert (abs(groups_by_seed.mean(0) - 0.5) < 5 * 0.5 / 64**0.5).all()


def some_keys(num_keys: int, *shape: int) -> torch.Tensor:
    return torch.randint(-1, num_keys, shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("make_keys", "shape", "groups"),  # shape of the counts
    [
        *(
            (lambda: some_keys(6, 2, 300), (8,), groups) for groups in (2, 4, 7, 1000)
        ),  # two are absent
        (lambda: some_keys(3, 1, 1500), (3,), 2),
        (lambda: some_keys(7, 1, 66_000), (7,), 3),  # ranks of more than 256 programs
        (lambda: torch.zeros(2, 700, dtype=torch.int32), (1,), 2),
        (lambda: some_keys(1024, 1, 400), (1024,), 4),  # keys without a pixel, most with one
        pytest.param(lambda: some_keys(2500, 1, 700), (2500,), 4, marks=not_cuda),  # too many there
        (lambda: some_keys(8, 2, 300), (2, 4), 2),
        (lambda: torch.full((3, 400), -1, dtype=torch.int32), (4,), 2),
        (lambda: F.pad(some_keys(4, 1, 3), (395, 2, 2, 0), value=-1), (4,), 2),  # few are valid
        (lambda: some_keys(4, 0, 6), (4,), 3),
    ],
)
def test_any_keys_are_split(backend: str, make_keys, shape, groups: int):
    keys = make_keys()
    counts = torch.bincount(keys[keys >= 0], minlength=torch.Size(shape).numel()).view(shape)
    split, group_counts = split_groups(keys, counts, groups, 5, backend=backend)
    assert split.dtype == torch.int32 and group_counts.dtype == torch.int64
    assert torch.equal(split, reference.split_groups(keys, counts, groups, 5))
    assert torch.equal(group_counts, reference.group_counts(counts, groups))


@pytest.mark.parametrize("seed", [0, 1, -1, -7, 2**31, 2**40 + 5, -(2**63), 2**63 - 1])
def test_seed_is_an_int_or_a_tensor(backend: str, seed: int):
    keys = some_keys(5, 2, 150)
    counts = torch.bincount(keys[keys >= 0], minlength=5)
    expected = reference.split_groups(keys, counts, 3, seed)
    for form in (seed, torch.tensor(seed), torch.tensor([seed])):
        assert torch.equal(split_groups(keys, counts, 3, form, backend=backend)[0], expected)

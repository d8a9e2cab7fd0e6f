import pytest
import torch
from emulator import BACKEND

from anchorops import reference
from anchorops._ops.split_groups import split_groups


def check(keys, num_keys, groups, seed, images=None):
    """images: the keys are of so many images, and the counts [images, num_keys / images]."""
    counts = torch.bincount(keys[keys >= 0], minlength=num_keys)
    counts = counts if images is None else counts.view(images, -1)
    split, of_groups = split_groups(keys, counts, groups, seed, backend=BACKEND)
    assert split.dtype == torch.int32 and of_groups.dtype == torch.int64
    assert torch.equal(split, reference.split_groups(keys, counts, groups, seed))
    assert torch.equal(of_groups, reference.group_counts(counts, groups))


def some_keys(num_keys, *shape):
    return torch.randint(-1, num_keys, shape, dtype=torch.int32)


@pytest.mark.parametrize("seed", [0, -7, 2**31, 2**40 + 5, -(2**63), 2**63 - 1])
def test_seeds(seed):
    check(some_keys(5, 2, 150), 5, 3, seed)
    check(some_keys(5, 2, 150), 5, 3, torch.tensor([seed]))


@pytest.mark.parametrize("groups", [2, 4, 7, 1000])
def test_groups(groups):
    check(some_keys(6, 2, 300), 8, groups, 11)  # two keys are absent


def test_more_than_one_block():
    check(some_keys(3, 1, 1500), 3, 2, 5)
    check(torch.zeros(2, 700, dtype=torch.int32), 1, 2, 5)  # one key
    check(some_keys(2500, 1, 700), 2500, 4, 5)  # keys without a pixel, most with one
    check(some_keys(2 * 4, 2, 300), 2 * 4, 2, 5, images=2)


def test_long_runs_of_ignored_pixels():
    keys = torch.full((3, 400), -1, dtype=torch.int32)
    check(keys, 4, 2, 3)
    keys[1, 390:], keys[2, 5] = 2, 3
    check(keys, 4, 2, 3)


def test_no_pixels():
    check(torch.empty(0, 6, dtype=torch.int32), 4, 3, 1)

import sys

import pytest
import torch
from emulator import BACKEND

from anchorops import reference
from anchorops.ops.splat_keys import splat_keys
from anchorops.ops.upsampled_sums import upsampled_sums

SIZES = [
    ((3, 5), (9, 15)),
    ((5, 7), (13, 11)),  # odd ratios
    ((13, 12), (5, 4)),  # fewer labels than features, and more than one block
    ((1, 3), (4, 6)),
    ((4, 4), (1, 2)),
    ((2, 2), (9, 1)),
    ((5, 6), (5, 6)),
]


@pytest.mark.parametrize(("size", "label_size"), SIZES)
def test_weights(size, label_size):
    keys = torch.randint(-1, 5, (2, label_size[0] * label_size[1]), dtype=torch.int32)
    keys[1] = 2  # one run
    rows, columns = (
        reference.splat_axis(*pair, torch.device("cpu"))
        for pair in zip(label_size, size, strict=True)
    )
    splat = reference.splat_of(rows, columns, size)
    image = torch.tensor([[0], [5]], dtype=torch.int32)
    keys = torch.where(keys >= 0, keys + image, -1)
    table = reference.splat_keys(keys, 10, splat)
    weights = splat_keys(keys, 10, label_size, size, BACKEND)
    expected = (table.double() / reference.SPLAT_UNITS).float()
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_sums(images, monkeypatch):
    """W of this number of images at a time."""
    module = sys.modules["anchorops.ops.upsampled_sums"]
    monkeypatch.setattr(module, "FEWEST_PARTS", 3 * 4 / 5 / images)
    features = torch.randn(3, 4, 3, 4, requires_grad=True)
    labels = torch.randint(-1, 6, (3, 7, 8))
    dsums = torch.randn(3, 5, 4)
    counts, sums, _ = upsampled_sums(features, labels, 5, ignore_index=255)
    (gradient,) = torch.autograd.grad(sums, features, dsums)
    expected = reference.upsampled_sums(features, labels, 5, ignore_index=255)
    (dfeatures,) = torch.autograd.grad(expected.sums, features, dsums)
    assert torch.equal(counts, expected.counts)
    torch.testing.assert_close(sums, expected.sums)
    torch.testing.assert_close(gradient, dfeatures)


def test_nothing():
    assert splat_keys(torch.empty(0, 6, dtype=torch.int32), 0, (2, 3), (2, 2), BACKEND).shape == (
        0,
        4,
    )
    ignored = torch.full((1, 6), -1, dtype=torch.int32)
    assert not splat_keys(ignored, 3, (2, 3), (2, 2), BACKEND).any()

"""Class counts and augmentation."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from anchorops.train.data.counts import check_classes, class_counts, describe_counts
from anchorops.train.data.digits import DigitScenes
from anchorops.train.data.folders import MaskFolder, open_folder
from anchorops.train.data.loading import RandomScale, Training, augmentation


def test_counts_are_made_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    cache = folder / "cache"
    for _ in range(2):
        pixels, images, *others = class_counts(open_folder(folder, "train"), cache)
        assert pixels.tolist() == [18, 18 + 20] and images.tolist() == [1, 2]
        assert others == [18, (4, 6), (5, 9)]  # ignored pixels, heights, widths
        monkeypatch.setattr(MaskFolder, "read_labels", None)
    with pytest.raises(TypeError):  # another label map: counted again
        class_counts(open_folder(folder, "train", label_map={1: 255}), cache)


def test_counts_of_another_format_or_other_images(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Only the header of an image tells that its mask is turned."""
    cache, data = folder / "cache", open_folder(folder, "train")
    assert class_counts(data, cache).heights == (4, 6)
    turned = Image.Exif()
    turned[0x112] = 6
    for name in ("a/1.jpg", "b.png"):
        with Image.open(folder / "images/train" / name) as image:
            image.save(folder / "images/train" / name, exif=turned)
    counts = class_counts(data, cache)
    assert (counts.heights, counts.widths) == ((5, 9), (4, 6))
    monkeypatch.setattr(MaskFolder, "read_labels", None)
    assert class_counts(data, cache).heights == (5, 9)
    monkeypatch.setattr("anchorops.train.data.counts.FORMAT", 1)
    with pytest.raises(TypeError):
        class_counts(data, cache)


def test_counts_that_cannot_be_kept(folder: Path):
    (folder / "cache").touch()
    with pytest.raises(OSError, match=r"cache/\w+.json could not be written: "):
        class_counts(open_folder(folder, "train"), folder / "cache")


def test_foreground_that_is_ignored():
    classes, some, none = ["ground", "thing"], torch.tensor([5, 0]), torch.tensor([0, 0])
    for training, present in ((some, "ground"), (none, "no class")):
        with pytest.raises(
            ValueError, match=f"pixels of {present} only: .*; 255 is ignored unless"
        ):
            check_classes(classes, training, some)
    with pytest.raises(ValueError, match="validation split has no valid pixel"):
        check_classes(classes, some + 1, none)
    assert check_classes([*classes, "rare"], torch.tensor([5, 1, 0]), some) == ["rare"]


def test_description_of_counts_and_damaged_ones(folder: Path):
    counts = class_counts(open_folder(folder, "train"), folder / "cache")
    assert describe_counts(["ground", "thing"], counts, counts)[1:] == [
        "validation images: 4 to 6 high, 5 to 9 wide, 24.3 % of the pixels ignored",
        "rarest classes: ground 32 %, thing 68 % of the training pixels",
    ]
    (kept,) = (folder / "cache").iterdir()
    for text in ("", "{}"):
        kept.write_text(text)
        with pytest.raises(ValueError, match=f"{kept} is damaged .*: delete it"):
            class_counts(open_folder(folder, "train"), folder / "cache")


def test_augmentation_is_a_function_of_the_draw():
    scenes = DigitScenes("train", 4, (40, 48), seed=0)
    scaled = RandomScale(None, (0.5, 2.0))
    transform = augmentation(3, (32, 32), scaled=scaled, flip=True, photometric=True)
    data = Training(scenes, transform, seed=5)
    torch.manual_seed(0)
    first = data[1, 10]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, data[1, 10], strict=True))
    assert not torch.equal(first[0], data[1, 11][0])
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert first[0].shape == (3, 32, 32) and first[1].dtype == torch.int16


def test_padding_is_ignored_and_labels_are_not_interpolated():
    scenes = DigitScenes("train", 2, (32, 32), seed=0)
    transform = augmentation(3, (96, 96), scaled=RandomScale(None, (1.5, 1.5)))
    _, labels = Training(scenes, transform, seed=0)[0, 0]
    assert (labels == -1).sum() >= 96 * 96 - 48 * 48
    assert set(labels.unique().tolist()) <= set(scenes[0][1].unique().tolist()) | {-1}


def test_random_scale():
    """torch cannot scale to a single pixel: the image has two on each side."""
    assert RandomScale(None, (2.0, 2.0))(tv_tensors.Mask(torch.zeros(8, 6))).shape == (16, 12)
    image = tv_tensors.Image(torch.zeros(3, 8, 6, dtype=torch.uint8))
    assert RandomScale(1, (1.0, 1.0))(image).shape == (3, 2, 2)

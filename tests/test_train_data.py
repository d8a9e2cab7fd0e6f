"""Data sets on disk, in trees that the tests write; augmentation, weights, evaluation."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy.io import savemat
from torch import nn
from torchvision import tv_tensors

import anchorops as ao
from anchorops._measure import peak_extra_bytes
from anchorops.train import finish, loop, report
from anchorops.train.analysis import collect_features
from anchorops.train.commands import main
from anchorops.train.config import Data, Optimization
from anchorops.train.cost import measure_cost
from anchorops.train.counts import check_classes, class_counts, describe_counts
from anchorops.train.data import (
    RandomScale,
    Training,
    augmentation,
    build_datasets,
    evaluation_transform,
)
from anchorops.train.digits import DigitScenes
from anchorops.train.evaluate import evaluate, predict
from anchorops.train.folders import MaskFolder, open_folder
from anchorops.train.learner import (
    Learner,
    build_loss,
    build_regularizer,
    class_weights,
)
from anchorops.train.models import build_model
from anchorops.train.pictures import choose_images, draw_legend, palette
from anchorops.train.presets import FOLDER


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array)
    elif path.suffix == ".mat":
        savemat(path, {"S": array})
    else:
        Image.fromarray(array).save(path)


def image(height: int = 6, width: int = 9) -> np.ndarray:
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def mask(*values: int, height: int = 6, width: int = 9) -> np.ndarray:
    """Rows of the given values, in turn."""
    rows = np.resize(np.array(values, np.uint8), height)
    return np.repeat(rows[:, None], width, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, images of differing sizes in sub-folders, JPEG and PNG."""
    for split in ("train", "val"):
        write(tmp_path / f"images/{split}/a/1.jpg", image())
        write(tmp_path / f"masks/{split}/a/1.png", mask(0, 1, 255))
        write(tmp_path / f"images/{split}/b.png", image(4, 5))
        write(tmp_path / f"masks/{split}/b.png", mask(1, height=4, width=5))
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    return tmp_path


def test_folder(folder: Path):
    train, val = build_datasets(Data(dataset="folder", root=folder), seed=0)
    assert len(train) == len(val) == 2 and list(train.classes) == ["ground", "thing"]
    pixels, labels = train[0]
    assert pixels.shape == (3, 6, 9) and pixels.dtype == torch.uint8
    assert labels[:, 0].tolist() == [0, 1, -1, 0, 1, -1]
    assert train[1][0].shape == (3, 4, 5)


def test_counts_are_made_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    cache = folder / "cache"
    pixels, images, *_ = class_counts(open_folder(folder, "train"), cache)
    assert pixels.tolist() == [18, 18 + 20] and images.tolist() == [1, 2]
    monkeypatch.setattr(MaskFolder, "read_labels", None)
    again = class_counts(open_folder(folder, "train"), cache)
    assert [x.tolist() for x in again[:2]] == [[18, 38], [1, 2]]
    with pytest.raises(TypeError):  # another label map: counted anew
        class_counts(open_folder(folder, "train", label_map={1: 255}), cache)


def test_run_on_images_of_any_size(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "classes.txt").write_text("Straße\nthing\nabsent\n\n", encoding="utf-8")
    options = ["--model", "segformer-b0", "--crop", "32", "32", "--steps", "1", "--batch-size", "2"]
    options += ["--workers", "0", "--device", "cpu", "--evaluation", "sliding"]
    main(["folder", "--root", str(folder), "--out", str(folder), "--name", "run", *options])
    assert "no training pixels: absent" in capsys.readouterr().err
    page = (folder / "run/report.html").read_text(encoding="utf-8")
    assert "Straße" in page and "<h2>Features</h2>" in page
    options += ["--eval-batch-size", "2", "--overwrite"]
    with pytest.raises(SystemExit, match="--eval-batch-size: more than 1 needs images of one"):
        main(["folder", "--root", str(folder), "--out", str(folder), "--name", "run", *options])


NAMES = [r"a $\frac$ thing", "<script>&amp;", "_of which the name is " + 5 * "so very long "]


@pytest.mark.parametrize("fails", [None, "draw_predictions", "collect_features", "_curves"])
def test_results_do_not_depend_on_pictures(
    fails: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Names with markup are drawn as they are; what fails is said on one line."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nink")

    if fails:
        monkeypatch.setattr(report if fails == "_curves" else finish, fails, fail)
    (folder / "classes.txt").write_text("\n".join(NAMES))
    config = FOLDER.replace(root=folder, out=folder, name="a$b$<i>", workers=0, device="cpu")
    config = config.replace(crop=(32, 32), steps=1, batch_size=2, model="segformer-b0")
    loop.start(config)
    found = {path.name for path in config.run.iterdir()}
    assert {"results.json", "best.pt", "report.html"} <= found
    assert ("predictions.png" in found) == (fails != "draw_predictions")
    page = (config.run / "report.html").read_text()
    assert "<script>" not in page and "<i>" not in page and "&lt;script&gt;&amp;amp;" in page
    said = [line for line in capsys.readouterr().err.splitlines() if "could not be made" in line]
    assert [line.rpartition(": ")[2] for line in said] == (["no ink"] if fails else [])


def test_relative_root_is_found_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch):
    options = ["--model", "segformer-b0", "--crop", "32", "32", "--steps", "1", "--batch-size", "2"]
    options += ["--workers", "0", "--device", "cpu", "--out", "runs", "--name", "run"]
    monkeypatch.chdir(folder.parent)
    main(["folder", "--root", folder.name, *options])
    monkeypatch.chdir("/")
    run = folder.parent / "runs/run"
    main(["resume", str(run)])
    moved = folder.parent / "moved"
    shutil.copytree(folder, moved)
    shutil.rmtree(folder / "images")
    with pytest.raises(SystemExit, match=rf"{folder}/images/train does not exist \(--root"):
        main(["resume", str(run)])
    main(["resume", str(run), "--root", str(moved)])


def test_masks_are_read_before_a_run(folder: Path):
    config = FOLDER.replace(root=folder, out=folder, name="run", workers=0, device="cpu")
    write(folder / "masks/val/b.png", mask(9, height=4, width=5))
    with pytest.raises(ValueError, match=r"masks/val/b.png: label values \[9\]"):
        loop.start(config)


def test_start_that_failed_is_no_earlier_run(folder: Path):
    config = FOLDER.replace(root=folder / "typo", out=folder, name="run", device="cpu", workers=0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"typo does not exist \(--root is where"):
            loop.start(config)


def test_foreground_that_is_ignored():
    classes, some, none = ["ground", "thing"], torch.tensor([5, 0]), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"1 class alone \['ground'\]; 255 is ignored unless"):
        check_classes(classes, some, some)
    with pytest.raises(ValueError, match="validation split has not one valid pixel"):
        check_classes(classes, some + 1, none)
    assert check_classes([*classes, "rare"], torch.tensor([5, 1, 0]), some) == ["rare"]


def test_corrupt_image_in_a_worker(folder: Path):
    path = folder / "images/train/a/1.jpg"
    path.write_bytes(path.read_bytes()[:300])
    command = ["--root", str(folder), "--out", str(folder), "--name", "run", "--workers", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(["folder", "--crop", "32", "32", "--device", "cpu", *command])
    message = str(stopped.value.code)
    assert message.startswith(f"anchorops-train: {path} cannot be read: ") and "\n" not in message


def test_label_map_and_suffixes(tmp_path: Path):
    write(tmp_path / "images/train/x_rgb.png", image())
    write(tmp_path / "images/train/x_depth.png", mask(9))
    write(tmp_path / "masks/train/x_label.png", mask(7, 128, 0))
    data = open_folder(
        tmp_path,
        "train",
        image_suffix="_rgb.png",
        mask_suffix="_label.png",
        num_classes=2,
        label_map={7: 255, 128: 1},
    )
    assert len(data) == 1 and data[0][1][:3, 0].tolist() == [-1, 1, 0]


def test_tiff_of_many_channels_and_16_bits(tmp_path: Path):
    write(tmp_path / "images/train/x.tif", np.full((6, 9, 5), 65_535, np.uint16))
    write(tmp_path / "masks/train/x.tif", mask(0, 1).astype(np.uint16))
    data = open_folder(tmp_path, "train", num_classes=2, channels=5)
    pixels, _ = data[0]
    assert pixels.shape == (5, 6, 9) and pixels.dtype == torch.float32 and (pixels == 1).all()
    transformed, labels = Training(data, augmentation(Data("folder", crop=(8, 8)), 5), 0)[0, 0]
    assert transformed.shape == (5, 8, 8) and labels.shape == (8, 8)


def test_tiff_whose_channels_come_first(tmp_path: Path):
    planes = np.arange(7 * 6 * 9, dtype=np.uint8).reshape(7, 6, 9)
    write(tmp_path / "images/train/x.tif", planes)
    write(tmp_path / "masks/train/x.png", mask(0, 1))
    pixels, _ = open_folder(tmp_path, "train", num_classes=2, channels=7)[0]
    assert pixels.numpy().tolist() == planes.tolist()


@pytest.mark.parametrize("value", [-1, 70_000])
def test_label_map_of_impossible_values(folder: Path, value: int):
    with pytest.raises(ValueError, match="--label-map: expected values 0 to 65535"):
        open_folder(folder, "train", label_map={value: 1})


def test_bilevel_mask_and_palette(tmp_path: Path):
    write(tmp_path / "images/train/x.png", image())
    write(tmp_path / "images/train/y.png", image())
    write(tmp_path / "masks/train/x.png", mask(0, 1).astype(bool))
    indexed = Image.fromarray(mask(1, 0), "P")
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    indexed.save(tmp_path / "masks/train/y.png")
    data = open_folder(tmp_path, "train", num_classes=2)
    assert data[0][1][:2, 0].tolist() == [0, 1] and data[1][1][:2, 0].tolist() == [1, 0]


def test_messages_name_the_file(folder: Path):
    root = folder
    with pytest.raises(ValueError, match="--root: expected where the data set folder lies"):
        build_datasets(Data(dataset="folder"), 0)
    with pytest.raises(ValueError, match=r"leftImg8bit.* does not exist|gtFine.* does not exist"):
        build_datasets(Data(dataset="cityscapes", root=root), 0)
    with pytest.raises(ValueError, match=r"b.png: expected 4 channels \(--channels\), got 3"):
        open_folder(root, "train", channels=4)[1]
    write(root / "masks/train/b.png", mask(7, height=4, width=5))
    with pytest.raises(ValueError, match=r"masks/train/b.png: label values \[7\] are not those of"):
        open_folder(root, "train")[1]
    write(root / "masks/train/b.png", mask(1))
    with pytest.raises(ValueError, match=r"b.png: expected the size of its image, \(4, 5\), got"):
        open_folder(root, "train")[1]
    write(root / "masks/train/b.png", image(4, 5))
    with pytest.raises(ValueError, match=r"b.png: expected one channel of integer labels"):
        open_folder(root, "train")[1]
    path = root / "images/train/a/1.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"a/1.jpg cannot be read: .*[Tt]runcated"):
        open_folder(root, "train")[0]
    (root / "masks/train/a/1.png").unlink()
    with pytest.raises(ValueError, match=r"masks/train/a/1.png does not exist: the mask of .*jpg"):
        open_folder(root, "train")
    (root / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"classes.txt does not exist: write it, or give --num"):
        open_folder(root, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Straße\nthing".encode("latin-1"), r"classes.txt: expected UTF-8, got .* byte 0xdf"),
        ("a\nb".encode("utf-16"), r"classes.txt: expected UTF-8"),
        (b"\n \n", r"classes.txt is empty: expected the name of a class on each line"),
        (b"a\nb\na\n", r"classes.txt: expected each name once, got again: a$"),
        (b"a\n", r"classes.txt: expected 2 to 4096 classes, got 1"),
    ],
)
def test_names_of_classes_that_cannot_be(content: bytes, message: str, folder: Path):
    (folder / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_folder(folder, "train")


def test_files_of_a_folder_that_do_not_pair(folder: Path):
    write(folder / "images/train/.hidden/b.jpg", image())
    (folder / "images/train/a/._1.jpg").write_bytes(b"of macOS")
    (folder / "masks/train/._b.png").write_bytes(b"of macOS")
    assert len(open_folder(folder, "train")) == 2
    write(folder / "masks/train/c.png", mask(0))
    with pytest.raises(ValueError, match=r"masks/train/c.png has no image in .*images/train"):
        open_folder(folder, "train")
    write(folder / "images/train/c.png", image())
    write(folder / "images/train/c.jpg", image())
    with pytest.raises(ValueError, match=r"train/c.png lies beside .*train/c.jpg: expected one"):
        open_folder(folder, "train")
    (folder / "images/train/c.jpg").unlink()
    write(folder / "masks/train/c.tif", mask(0))
    with pytest.raises(ValueError, match=r"masks/train/c.tif lies beside .*c.png: expected one"):
        open_folder(folder, "train")


def test_image_with_a_nan(tmp_path: Path):
    values = np.zeros((6, 9), np.float32)
    values[0, 0] = np.nan
    write(tmp_path / "images/train/x.tif", values)
    write(tmp_path / "masks/train/x.png", mask(0, 1))
    with pytest.raises(ValueError, match=r"x.tif: expected finite values, got NaN or infinity in"):
        open_folder(tmp_path, "train", num_classes=2)[0]


def test_sizes_ignored_pixels_and_rare_classes(folder: Path):
    counts = class_counts(open_folder(folder, "train"), folder / "cache")
    assert (counts.ignored, counts.heights, counts.widths) == (18, (4, 6), (5, 9))
    again = class_counts(open_folder(folder, "train"), folder / "cache")
    assert again[2:] == counts[2:] and torch.equal(again.pixels, counts.pixels)
    assert describe_counts(["ground", "thing"], counts, counts)[1:] == [
        "validation images: 4 to 6 high, 5 to 9 wide, 24.3 % of the pixels ignored",
        "rarest classes: ground 32 %, thing 68 % of the training pixels",
    ]
    (kept,) = (folder / "cache").iterdir()
    for text in ("", "{}"):
        kept.write_text(text)
        with pytest.raises(ValueError, match=f"{kept} is damaged .*: delete it"):
            class_counts(open_folder(folder, "train"), folder / "cache")


def test_weights_of_absent_classes(folder: Path):
    (folder / "classes.txt").write_text("ground\nthing\nabsent")
    config = FOLDER.replace(root=folder, out=folder, given_class_weights=(0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="--given-class-weights: every class with training pixels"):
        loop.start(config.replace(workers=0, device="cpu"))


def test_cityscapes(tmp_path: Path):
    for split, city in (("train", "ulm"), ("val", "lindau")):
        stem = f"{split}/{city}/{city}_0_0"
        write(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png", image())
        write(tmp_path / f"gtFine/{stem}_gtFine_labelIds.png", mask(7, 0, 33, 3, 11, 31))
        write(tmp_path / f"gtFine/{stem}_gtFine_color.png", image())
    train, _ = build_datasets(Data(dataset="cityscapes", root=tmp_path), 0)
    assert len(train) == 1 and len(train.classes) == 19
    assert train[0][1][:, 0].tolist() == [0, -1, 18, -1, 2, 16]


def test_ade20k(tmp_path: Path):
    for split in ("training", "validation"):
        write(tmp_path / f"images/{split}/ADE_1.jpg", image())
        write(tmp_path / f"annotations/{split}/ADE_1.png", mask(0, 1, 150))
    _, val = build_datasets(Data(dataset="ade20k", root=tmp_path), 0)
    assert len(val.classes) == 150 and val[0][1][:3, 0].tolist() == [-1, 0, 149]


def test_pascal_context(tmp_path: Path):
    for split, name in (("train", "2008_1"), ("val", "2008_2")):
        write(tmp_path / f"JPEGImages/{name}.jpg", image())
        write(tmp_path / f"SegmentationClassContext/{name}.png", mask(0, 1, 59))
        lists = tmp_path / "ImageSets/SegmentationContext"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text(f"{name}\n")
    train, _ = build_datasets(Data(dataset="pascal-context", root=tmp_path), 0)
    assert len(train.classes) == 59 and train[0][1][:3, 0].tolist() == [-1, 0, 58]
    (lists / "val.txt").write_text("2008_3\n")
    with pytest.raises(ValueError, match=r"2008_3.jpg does not exist"):
        build_datasets(Data(dataset="pascal-context", root=tmp_path), 0)


def test_coco_stuff(tmp_path: Path):
    (tmp_path / "imageLists").mkdir()
    for split, name in (("train", "COCO_1"), ("test", "COCO_2")):
        write(tmp_path / f"images/{name}.jpg", image())
        write(tmp_path / f"annotations/{name}.mat", mask(0, 1, 13, 182, 12))
        (tmp_path / f"imageLists/{split}.txt").write_text(name)
    train, _ = build_datasets(Data(dataset="coco-stuff-10k", root=tmp_path), 0)
    assert len(train.classes) == 171
    assert train[0][1][:5, 0].tolist() == [-1, 0, 11, 170, -1]
    for year in ("train2017", "val2017"):
        write(tmp_path / f"images/{year}/1.jpg", image())
        write(tmp_path / f"annotations/{year}/1.png", mask(255, 0, 12, 181, 11))
    train, _ = build_datasets(Data(dataset="coco-stuff-164k", root=tmp_path), 0)
    assert train[0][1][:5, 0].tolist() == [-1, 0, 11, 170, -1]


def test_augmentation_is_a_function_of_the_draw():
    scenes = DigitScenes("train", 4, (40, 48), seed=0)
    config = Data("folder", crop=(32, 32), scale=(0.5, 2.0), flip=True, photometric=True)
    data = Training(scenes, augmentation(config, 3), seed=5)
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
    config = Data("folder", crop=(96, 96), scale=(1.5, 1.5))
    _, labels = Training(scenes, augmentation(config, 3), seed=0)[0, 0]
    assert (labels == -1).sum() >= 96 * 96 - 48 * 48
    assert set(labels.unique().tolist()) <= set(scenes[0][1].unique().tolist()) | {-1}


def test_short_side():
    scaled = evaluation_transform(Data("ade20k", short_side=20), 3)
    assert scaled(tv_tensors.Image(torch.zeros(3, 40, 60, dtype=torch.uint8))).shape == (3, 20, 30)
    assert RandomScale(None, (2.0, 2.0))(tv_tensors.Mask(torch.zeros(8, 6))).shape == (16, 12)


def test_class_weights():
    shares = torch.tensor([0.64, 0.32, 0.04, 0.0], dtype=torch.float64)
    weights = class_weights("inverse-sqrt", shares)
    assert weights is not None and weights[:3].mean().item() == pytest.approx(1)
    assert (weights[2] / weights[0]).item() == pytest.approx(4) and weights[3] == 1
    inverse = class_weights("inverse", shares)
    assert inverse is not None and (inverse[2] / inverse[0]).item() == pytest.approx(16)
    assert class_weights("none", shares) is None


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        (Optimization(), {"ce"}),
        (Optimization(loss="focal", focal_gamma=1.0), {"ce"}),
        (Optimization(ohem=0.7, ohem_kept=3), {"ce"}),
        (Optimization(loss="dice"), {"dice"}),
        (Optimization(loss="ce+dice"), {"ce", "dice"}),
    ],
)
def test_losses(options, terms):
    logits, labels = torch.randn(2, 4, 5, 5), torch.randint(4, (2, 10, 10))
    labels[0, 0] = -1
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    loss = build_loss(options, weights)
    value = loss(logits, labels)
    assert set(loss.terms) == {*terms, "accuracy"}
    z = nn.functional.interpolate(logits, (10, 10), mode="bilinear")
    right = (z.argmax(1) == labels).sum() / (labels >= 0).sum()
    torch.testing.assert_close(loss.terms["accuracy"], right)
    if options == Optimization():
        expected = nn.functional.cross_entropy(z, labels, weights, ignore_index=-1)
        torch.testing.assert_close(value, expected)


def test_hard_example_mining():
    labels = torch.zeros(1, 1, 4, dtype=torch.long)
    labels[..., 3] = -1
    truth = torch.tensor([0.9, 0.8, 0.2, 0.1])
    logits = torch.stack([truth.log(), (1 - truth).log()])[None, :, None]
    losses = -truth.log()
    hard = build_loss(Optimization(ohem=0.7, ohem_kept=1))(logits, labels)
    torch.testing.assert_close(hard, losses[2])
    two = build_loss(Optimization(ohem=0.1, ohem_kept=2))(logits, labels)
    torch.testing.assert_close(two, losses[1:3].mean())


class Threshold(nn.Module):
    """Logits at stride 4 that say whether the first channel is positive."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.avg_pool2d(images[:, :1], 4)
        return torch.cat([-x, x], 1)


def test_confusion_of_images_of_any_size_and_windows():
    image = torch.ones(1, 3, 40, 56)
    image[..., 24:] = -1
    truth = (image[:, 0] > 0).long()
    truth[:, 3] = -1
    for window in (None, (16, 24), (64, 64)):
        confusion = evaluate(Threshold(), [(image, truth)], 2, torch.device("cpu"), window)
        assert confusion.tolist() == [[39 * 32, 0], [0, 39 * 24]], window
    assert predict(Threshold(), image, (80, 112)).shape == (1, 80, 112)


def test_evaluation_memory_of_many_classes():
    """No tensor of all pixels and classes, 1.2 GB here, and none of pixels and pairs of classes."""
    image, truth = torch.zeros(1, 3, 1024, 2048), torch.zeros(1, 1024, 2048, dtype=torch.int16)

    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(1, 150, images.shape[2] // 4, images.shape[3] // 4)
            logits[:, 7] = 1
            return logits

    def evaluated() -> torch.Tensor:
        return evaluate(Constant(), [(image, truth)], 150, torch.device("cpu"))

    assert evaluated()[0, 7] == truth.numel()
    torch.use_deterministic_algorithms(True)
    try:
        extra = peak_extra_bytes(evaluated, torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
    if extra is None:
        pytest.skip("this system does not tell the peak of the memory")
    logits, pixels = 150 * 256 * 512 * 4, truth.numel()
    assert extra < logits + 24 * pixels


@pytest.mark.slow
def test_more_than_255_classes_from_files_to_report(tmp_path: Path):
    """Masks of 16 bits; class 255 is one like the others."""
    for split in ("train", "val"):
        for name, classes in (("a", [255, 299]), ("b", [0, 255])):
            noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
            write(tmp_path / f"images/{split}/{name}.png", noise)
            rows = np.resize(np.array(classes, np.uint16), 64)
            rows[3] = 65_535
            write(tmp_path / f"masks/{split}/{name}.png", np.repeat(rows[:, None], 64, 1))
    config = FOLDER.replace(
        root=tmp_path, out=tmp_path, name="run", workers=0, device="cpu", num_classes=300
    )
    config = config.replace(label_map={65_535: -1}, steps=2, crop=(64, 64), batch_size=4)
    config = config.replace(methods=("occl",), lr=1e-3, threads=1)
    train, _ = build_datasets(config.data, seed=0)
    assert train[0][1][:4, 0].tolist() == [255, 299, 255, -1]
    assert class_counts(train, tmp_path / "counts")[0].nonzero().flatten().tolist() == [0, 255, 299]
    results = loop.start(config)
    assert results["pixels"] == 2 * 63 * 64
    assert results["classes"][255]["frequency"] == pytest.approx(63 / 126)
    assert (tmp_path / "run/report.html").exists()


def test_pictures():
    colors = palette(11)
    assert len({tuple(color) for color in colors[:11].tolist()}) == 11 and colors[-1].min() == 255
    many = palette(200)
    assert len({tuple(color) for color in many[:200].tolist()}) > 190
    for width, length in ((2.2, 5), (5.4, 20), (13.4, 8)):
        figure = Figure((width, 6))
        names = {k: f"class {k}".ljust(length, "x") for k in range(24)}
        foot = draw_legend(figure, names, many)
        (legend,) = figure.legends
        extent = legend.get_window_extent(FigureCanvasAgg(figure).get_renderer())
        assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width, (width, length)
        assert extent.y1 <= foot * figure.bbox.height
    scenes = DigitScenes("val", 60, (64, 64), seed=0)
    chosen = choose_images(scenes, 8)
    shown = {x for i in chosen for x in scenes[i][1].unique().tolist()}
    assert len(set(chosen)) == 8 and shown >= set(range(11))


def test_features_of_a_split():
    torch.manual_seed(0)
    model = build_model("hrnet-w18-small", 11).eval()
    scenes = DigitScenes("val", 6, (32, 32), seed=0)
    stacked = [torch.stack(x) for x in zip(*(scenes[i] for i in range(6)), strict=True)]
    images, labels = stacked[0].float() / 255, stacked[1]
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    found = collect_features(model, batches, 11, torch.device("cpu"))
    with torch.no_grad():
        features = model.body(images)
    centroids, counts = ao.class_centroids(features, labels.long(), 11)
    assert torch.equal(found.counts, counts)
    torch.testing.assert_close(found.centroids, centroids)
    samples, sampled = found.samples
    assert samples.shape == (len(sampled), 240)
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2)
    keys = labels[:, ::4, ::4].flatten()
    for sample, label in zip(samples[::9], sampled[::9], strict=True):
        assert keys[(pixels - sample).square().sum(1).argmin()] == label


def test_measuring_the_cost_changes_nothing():
    model = build_model("hrnet-w18-small", 5)
    learner = Learner(model, build_regularizer(["sar"], {}, 5, 240))
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    labels = torch.randint(5, (2, 32, 32))
    plain, full = measure_cost(learner, torch.randn(2, 3, 32, 32), labels, bf16=False)
    assert plain.seconds > 0 and full.seconds > 0 and plain.memory_mb is None
    for name, value in learner.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in learner.parameters())

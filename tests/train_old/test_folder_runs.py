"""Training runs on image folders: sizes, names, paths and files that cannot be used."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from image_files import image, mask, write
from PIL import Image

from anchorops.train.commands import main
from anchorops.train.config import Config
from anchorops.train.data.counts import class_counts
from anchorops.train.data.loading import build_datasets
from anchorops.train.presets import FOLDER
from anchorops.train.report import finish
from anchorops.train.report import page as report
from anchorops.train.run import loop

OPTIONS = "--model segformer-b0 --crop 32 32 --steps 1 --batch-size 2 --workers 0 --device cpu"


@pytest.fixture
def config(folder: Path) -> Config:
    return FOLDER.replace(root=folder, out=folder, name="run", workers=0, device="cpu")


def test_run_on_images_of_any_size(folder: Path, capsys: pytest.CaptureFixture[str]):
    names = ["Straße", "thing", *(f"absent {k}" for k in range(12))]
    (folder / "classes.txt").write_text("\n".join([*names, "", ""]), encoding="utf-8")
    command = ["folder", "--root", str(folder), "--out", str(folder), "--name", "run"]
    command += f"{OPTIONS} --evaluation sliding --window-stride 16 24".split()
    main(command)
    absent = f"no training pixels: {', '.join(names[2:12])} and 2 more\n"
    said = capsys.readouterr().err
    assert absent in said
    warning = "WARNING: the network starts from random weights"
    assert said.count(warning) == 1
    assert "--pretrained" in said and "--weights FILE" in said
    page = (folder / "run/report.html").read_text(encoding="utf-8")
    assert "Straße" in page and "<h2>Features</h2>" in page
    with pytest.raises(SystemExit, match="--eval-batch-size: more than 1 needs images of one"):
        main([*command, "--eval-batch-size", "2", "--overwrite"])


NAMES = [r"a $\frac$ thing", "<script>&amp;", "_of which the name is " + 5 * "so very long "]


@pytest.mark.parametrize("fails", [None, "draw_predictions", "collect_features", "_curves"])
def test_results_do_not_depend_on_pictures(
    fails: str | None, folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Names with markup are drawn unchanged; a failure is reported on one line."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nink")

    if fails:
        monkeypatch.setattr(report if fails == "_curves" else finish, fails, fail)
    (folder / "classes.txt").write_text("\n".join(NAMES))
    config = config.replace(name="a$b$<i>", crop=(32, 32), steps=1, batch_size=2)
    config = config.replace(model="segformer-b0")
    loop.start(config)
    files = {path.name for path in config.run.iterdir()}
    assert {"results.json", "best.pt", "report.html"} <= files
    assert ("predictions.png" in files) == (fails != "draw_predictions")
    page = (config.run / "report.html").read_text()
    assert "<script>" not in page and "<i>" not in page and "&lt;script&gt;&amp;amp;" in page
    said = [line for line in capsys.readouterr().err.splitlines() if "could not be made" in line]
    assert [line.rpartition(": ")[2] for line in said] == (["no ink"] if fails else [])


def test_relative_root_is_found_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)
    main(["folder", "--root", folder.name, "--out", "runs", "--name", "run", *OPTIONS.split()])
    monkeypatch.chdir("/")
    run = folder.parent / "runs/run"
    main(["resume", str(run)])
    moved = folder.parent / "moved"
    shutil.copytree(folder, moved)
    shutil.rmtree(folder / "images")
    with pytest.raises(SystemExit, match=rf"{folder}/images/train does not exist \(--root"):
        main(["resume", str(run)])
    main(["resume", str(run), "--root", str(moved)])


def test_masks_are_read_before_a_run(folder: Path, config: Config):
    write(folder / "masks/val/b.png", mask(9, height=4, width=5))
    with pytest.raises(ValueError, match=r"masks/val/b.png: label values \[9\]"):
        loop.start(config)


@pytest.mark.parametrize("split", ["train", "val"])
def test_orientations_are_decided_before_a_run(split: str, folder: Path, config: Config):
    """One image of 5 × 4 pixels beside one of 4 × 5; and an image whose sizes tell nothing."""
    shutil.rmtree(folder / f"images/{split}/a")
    shutil.rmtree(folder / f"masks/{split}/a")
    turned = Image.Exif()
    turned[0x112] = 6
    Image.fromarray(image(4, 5)).save(folder / f"images/{split}/c.png", exif=turned)
    write(folder / f"masks/{split}/c.png", mask(0, 1, height=4, width=5))
    config = config.replace(eval_batch_size=2, model="no model")
    sizes = "4 to 5 high and 4 to 5 wide" if split == "val" else "4 to 6 high and 5 to 9 wide"
    with pytest.raises(ValueError, match=f"--eval-batch-size: .*{sizes}"):
        loop.start(config)
    Image.fromarray(image(5, 5)).save(folder / f"images/{split}/c.png", exif=turned)
    write(folder / f"masks/{split}/c.png", mask(0, 1, height=5, width=5))
    with pytest.raises(ValueError, match=rf"{split}/c.png: the EXIF orientation is 6, that of"):
        loop.start(config)


def test_start_that_failed_is_no_earlier_run(folder: Path, config: Config):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"typo does not exist \(--root is the directory"):
            loop.start(config.replace(root=folder / "typo"))


def test_corrupt_image_in_a_worker(folder: Path):
    path = folder / "images/train/a/1.jpg"
    path.write_bytes(path.read_bytes()[:-20])  # the header, which is read at the start, is left
    command = ["--root", str(folder), "--out", str(folder), "--name", "run", "--workers", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(["folder", "--crop", "32", "32", "--device", "cpu", *command])
    message = str(stopped.value.code)
    assert message.startswith(f"anchorops-train: {path} cannot be read: ") and "\n" not in message


def test_weights_of_absent_classes(folder: Path, config: Config):
    (folder / "classes.txt").write_text("ground\nthing\nabsent")
    with pytest.raises(ValueError, match="--given-class-weights: every class with training pixels"):
        loop.start(config.replace(given_class_weights=(0.0, 0.0, 1.0)))


@pytest.mark.slow
def test_more_than_255_classes_from_files_to_report(tmp_path: Path):
    """16-bit masks; class 255 is an ordinary class."""
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

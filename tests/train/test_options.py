"""Where options come from: presets, files, runs, command lines."""

from pathlib import Path

import pytest
import yaml

from anchorops.train.commands import PRESETS, Given, main, masks_of, parse, presets
from anchorops.train.options import Options
from tests.helpers.image_files import write


def parsed(words: str) -> Given:
    command, *others = words.split()
    return parse(command, others)


def test_names_of_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A file of that name wins; an unknown one lists the presets with their published results."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()  # of data
    given = parsed("fit --config=folder --model.lr 3 --model.methods [sar]")
    assert given.options.data.crop == (256, 256) and given.options.model.lr == 3
    assert given.run == tmp_path / "runs/folder-sar-seed0"
    assert parsed("fit --seed 1").run == tmp_path / "runs/no-preset-plain-seed1"
    assert main(["presets"]) == 0 and "81.4 with sar" in capsys.readouterr().out
    assert len(presets().splitlines()) == len([*PRESETS.glob("*.yaml")]) - 1
    with pytest.raises(ValueError, match=r"(?s)got foldr\. The presets:.*81.4 with sar"):
        parsed("fit --config foldr")
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").write_text("shared: [digits]\nmodel: {network: x}")
    options = parsed("fit -c folder -c digits-segformer-b0 --seed 1").options
    assert (options.model.network, options.val_every, options.seed) == ("segformer-b0", 100, 1)
    (tmp_path / "model.yaml").write_text("lr: 0.5")
    model = parsed("fit -c digits --model model.yaml --model.power 1").options.model
    assert (model.lr, model.power) == (0.5, 1)


def test_the_options_of_a_run_come_first(straight: Path):
    data = parsed(f"validate --run {straight} --data.workers 2").options.data
    assert (data.crop, data.val_images, data.workers) == ((32, 32), 10, 2)
    options = yaml.safe_load((straight / "config.yaml").read_text())
    assert list(options) == [*Options.__annotations__]
    given = parsed(f"fit --config digits --run {straight} --resume")
    assert given.others["resume"] and given.run == straight


def test_files_to_predict(tmp_path: Path):
    out, names = tmp_path / "out", [str(tmp_path / x) for x in ("[a].jpg", "low/ö😀.jpg")]
    for name in names:
        write(Path(name), b"")
    given = parse("predict", ["--config", "digits", "--images", *names, "--out", "o"])
    assert given.others["images"] == names
    masks = masks_of(names, out, resume=False)
    assert [*masks.values()] == [out / "[a].png", out / "low/ö😀.png"]
    write(out / "[a].png", b"")
    assert [*masks_of(names, out, resume=True).values()] == [out / "low/ö😀.png"]

"""Parameters, FLOPs and speed in the report."""

import re
from pathlib import Path

import pytest
from tiny_runs import TINY

from anchorops.train.config import Config
from anchorops.train.report import cost
from anchorops.train.run.loop import start
from anchorops.train.run.parts import build_parts
from anchorops.train.run.ranks import start_ranks


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return TINY.replace(crop=(32, 64), steps=1, out=tmp_path, name="run")


def test_counts_of_a_network(config: Config, monkeypatch: pytest.MonkeyPatch):
    """FLOPs of a single convolution, counted by hand. Parameters only for training are separate."""
    parts = build_parts(
        config.replace(auxiliary_weight=0.4), start_ranks("cpu"), from_checkpoint=True
    )
    measured = cost.measure_complexity(parts)
    model = parts.model
    assert model.auxiliary is not None
    methods = sum(p.numel() for p in model.get_submodule("regularizer").parameters())
    auxiliary = sum(p.numel() for p in model.auxiliary.parameters())
    assert measured.trained == sum(p.numel() for p in model.parameters())
    assert measured.trained - measured.parameters == methods + auxiliary
    assert measured.size == (32, 64) and measured.frames_per_second > 0
    body = model.get_submodule("body")
    monkeypatch.setattr(body, "forward", lambda images: images[:, :1].expand(-1, 240, -1, -1))
    assert cost.measure_complexity(parts).flops == 2 * 240 * 11 * 32 * 64


def test_report_shows_them(config: Config):
    start(config)
    page = (config.run / "report.html").read_text()
    assert "<h2>Size and speed of the network</h2>" in page
    rows = dict(re.findall(r"<td>([^<]+)</td><td>([\d.e+]+)</td>", page))
    assert float(rows["images 32×64 per second, one by one"]) > 0
    trained = float(rows["with what is for training only, M"])
    # 2·(D² + D) + D² and three batch norms, D = 240
    assert trained - float(rows["parameters, M"]) == pytest.approx(
        (3 * 240**2 + 8 * 240) / 1e6, abs=0.011
    )

"""The script that trains for the evidence, and its report."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from trainings import report as evidence_report

SCRIPT = Path(__file__).parents[2] / "bench/evidence.py"
# the mIoU of seed 0, 1, …
ROWS = """
digits segformer-b0 plain published 500 0.5 0.6
digits segformer-b0 ceco published 500 0.49 0.57
digits segformer-b0 ceco from-scratch 500 - - 0.7
digits segformer-b0 plain published 1500 0.505
digits segformer-b0 ceco published 1500 0.5
camvid efficientnet-lite0 plain published 1000 0.5 0.6 0.55
camvid efficientnet-lite0 sar published 1000 0.53 0.61
"""
PAGE = """
CPU; torch 2 and GPU; torch 2; 12 runs of `run`
3 of the 3 runs planned on digit scenes are missing
All 1 runs planned on photographs are here.
Baseline: +0.5 from 500 to 1,500 steps (one seed); converged at 500 steps.
|  | 500 steps: mIoU | tail | 1,500 steps: mIoU | tail |
| baseline | 55.0 ± 7.1 (n = 2) | 22.0 ± 2.8 (n = 2) | 50.5 | 20.2 |
| CeCo | −2.0 ± 1.4 (n = 2) | −0.8 ± 0.6 (n = 2) | −0.5 | −0.2 |
| CeCo, from scratch |  |  |  |  |
## Photographs,
|  | steps | mIoU | tail | sky |
| baseline | 1,000 | 55.0 ± 5.0 | 22.0 ± 2.0 | 90.0 |
| SAR | 1,000 | +2.0 ± 1.4 (n = 2) | +0.8 ± 0.6 (n = 2) |
on the test split
|  | steps | mIoU | tail | sky |
| baseline | 1,000 | 50.0 ± 10.0 | 11.0 ± 1.0 | 80.0 |
| SAR | 1,000 | +4.0 ± 2.8 (n = 2) | +0.4 ± 0.3 (n = 2) |
|  | SegFormer-B0 | DeepLabV3+ on EfficientNet-Lite0 |
| CeCo | 0.5 (0.5–0.5) |  |
| SAR |  | 1.8 (0.5–3) |
"""


def row(words: list[str], seed: int, miou: float) -> dict[str, Any]:
    """A run in the evidence; photographs have their machine, the IoU of classes and a test."""
    run: dict[str, Any] = dict(zip(("scenes", "model", "methods", "setting"), words, strict=False))
    steps, camvid = int(words[4]), run["scenes"] == "camvid"
    body = None if camvid else 0.5
    run |= {"steps": steps, "seed": seed, "miou": miou, "head": 0.8, "body": body}
    run |= {"tail": 0.4 * miou, "commit": "abc"}
    run["curve"] = [[steps // 2, miou / 2, 0.4, body, 0.0], [steps, miou, 0.8, body, 0.2]]
    run["gradient_ratios"] = {run["methods"]: [0.5, 3.0] if steps < 1500 else [0.5]}
    if camvid:
        test = {"miou": 2 * miou - 0.6, "tail": miou / 5, "classes": {"sky": 0.8}}
        run |= {"device": "GPU", "classes": {"sky": 0.9}, "test": test}
    return run


def rows() -> list[dict[str, Any]]:
    lines = [line.split() for line in ROWS.split("\n")[1:-1]]
    runs = [(words, seed) for words in lines for seed in range(len(words) - 5)]
    return [row(x[:5], seed, float(x[5 + seed])) for x, seed in runs if x[5 + seed] != "-"]


def test_report_of_evidence(tmp_path: Path):
    """It has the runs that exist, and counts those that are missing."""
    assert len(evidence_report.curves(rows()[7:]).axes) == 3  # none of the body
    planned = [["digits", "segformer-b0", "sar", "published", 500, seed] for seed in range(3)]
    planned.append(["camvid", "efficientnet-lite0", "plain", "published", 1000, 0])
    evidence = {"command": "run", "device": "CPU", "torch": "2", "planned": planned, "rows": rows()}
    evidence_report.write(evidence, tmp_path)
    assert json.loads((tmp_path / "evidence.json").read_text()) == evidence
    page = (tmp_path / "evidence.md").read_text()
    place = 0
    for line in PAGE.splitlines():
        place = page.index(line, place)
    for name in ("digits-segformer-b0", "camvid-efficientnet-lite0"):
        assert (tmp_path / f"evidence-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_options_of_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Runs that have a row are not repeated."""

    def evidence(words: str) -> str:
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--out", str(tmp_path), *words.split()])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    with pytest.raises(SystemExit):
        evidence("--only nothing-*")
    assert "--only nothing-*: no run" in capsys.readouterr().err
    known = tmp_path / "rows.json"
    known.write_text(json.dumps({"rows": rows()[8:9]}))
    lines = evidence(f"--rows {known} --list --only camvid-*-plain-1000-*").splitlines()
    assert [line.split()[0] for line in lines] == ["missing", "finished", "missing"]

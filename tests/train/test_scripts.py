"""The script that trains for the evidence."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from trainings import report as evidence_report

BENCH = Path(__file__).parents[2] / "bench"


def test_wrong_options_of_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    script = BENCH / "evidence.py"
    options = ["--out", str(tmp_path), "--only", "nothing-*"]
    monkeypatch.setattr(sys, "argv", [script.name, *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    assert "--only nothing-*: no run" in capsys.readouterr().err


def test_report_of_evidence(tmp_path: Path):
    """The report contains the runs that exist, and counts those that are missing. Photographs have
    their machine, the IoU of their classes, and a table of the test split."""

    def row(methods: str, setting: str, steps: int, seed: int, miou: float) -> dict:
        run = {"scenes": "digits", "model": "segformer-b0", "methods": methods, "setting": setting}
        run |= {
            "steps": steps,
            "seed": seed,
            "miou": miou,
            "head": 0.8,
            "body": 0.5,
            "tail": 0.4 * miou,
        }
        curve = [[steps // 2, miou / 2, 0.4, 0.2, 0.0], [steps, miou, 0.8, 0.5, 0.2]]
        ratios = {method: [0.5, 3.0] for method in methods.split("+") if method != "plain"}
        return run | {"commit": "abc", "curve": curve, "gradient_ratios": ratios}

    rows = [
        *(row("plain", "published", 500, seed, miou) for seed, miou in ((0, 0.5), (1, 0.6))),
        *(row("ceco", "published", 500, seed, miou) for seed, miou in ((1, 0.57), (0, 0.49))),
        row("ceco", "from-scratch", 500, 2, 0.7),
        row("plain", "published", 1500, 0, 0.505),
        row("ceco", "published", 1500, 0, 0.5) | {"gradient_ratios": {"ceco": [0.5]}},
    ]
    assert evidence_report.table(rows, 2).splitlines() == [
        "|  | 500 steps: mIoU | tail | 1,500 steps: mIoU | tail |",
        "|---|--:|--:|--:|--:|",
        "| baseline | 55.0 ± 7.1 | 22.0 ± 2.8 | 50.5 | 20.2 |",
        "| CeCo | −2.0 ± 1.4 | −0.8 ± 0.6 | −0.5 | −0.2 |",
        "| CeCo, from scratch |  |  |  |  |",
    ]
    assert "| baseline | 55.0 ± 7.1 (n = 2) |" in evidence_report.table(rows, 3)
    photographs = []
    for methods, seed, miou in (
        *(("plain", seed, miou) for seed, miou in enumerate((0.5, 0.6, 0.55))),
        *(("sar", seed, miou) for seed, miou in ((1, 0.61), (0, 0.53))),
    ):
        run = row(methods, "published", 1000, seed, miou) | {"scenes": "camvid", "body": None}
        run |= {"model": "efficientnet-lite0", "device": "GPU", "classes": {"sky": 0.9}}
        run["curve"] = [[*point[:3], None, point[4]] for point in run["curve"]]
        test = {"miou": 2 * miou - 0.6, "tail": miou / 5, "classes": {"sky": 0.8}}
        photographs.append(run | {"test": test})
    assert len(evidence_report.curves(photographs).axes) == 3  # none of the body
    rows += photographs
    planned = [["digits", "segformer-b0", "sar", "published", 500, seed] for seed in range(3)]
    planned.append(["camvid", "efficientnet-lite0", "plain", "published", 1000, 0])
    evidence = {"command": "run", "device": "CPU", "torch": "2", "planned": planned, "rows": rows}
    evidence_report.write(evidence, tmp_path)
    assert json.loads((tmp_path / "evidence.json").read_text()) == evidence
    page = (tmp_path / "evidence.md").read_text()
    assert "Baseline: +0.5 from 500 to 1,500 steps (one seed); converged at 500 steps." in page
    assert "|  | SegFormer-B0 | DeepLabV3+ on EfficientNet-Lite0 |" in page
    assert "| CeCo | 0.5 (0.5–0.5) |  |\n| SAR |  | 1.8 (0.5–3) |" in page
    assert "\nCPU; torch 2 and GPU; torch 2; 12 runs of `run`" in page
    on_validation, on_test = page.split("## Photographs, ")[1].split("on the test split")
    header = "|  | steps | mIoU | tail | sky |\n"
    assert header in on_validation and header in on_test
    assert "| baseline | 1,000 | 55.0 ± 5.0 | 22.0 ± 2.0 | 90.0 |" in on_validation
    assert "| SAR | 1,000 | +2.0 ± 1.4 (n = 2) | +0.8 ± 0.6 (n = 2) |" in on_validation
    assert "| baseline | 1,000 | 50.0 ± 10.0 | 11.0 ± 1.0 | 80.0 |" in on_test
    assert "| SAR | 1,000 | +4.0 ± 2.8 (n = 2) | +0.4 ± 0.3 (n = 2) |" in on_test
    assert "3 of the 3 runs planned on digit scenes are missing" in page
    assert "All 1 runs planned on photographs are here." in page
    for name in ("digits-segformer-b0", "camvid-efficientnet-lite0"):
        picture = (tmp_path / f"evidence-{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")


def test_evidence_with_a_row_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    known, script = tmp_path / "rows.json", BENCH / "evidence.py"
    row = {"scenes": "camvid", "model": "efficientnet-lite0", "methods": "plain"}
    row |= {"setting": "published", "steps": 1000, "seed": 1}
    known.write_text(json.dumps({"rows": [row]}))
    options = ["--out", str(tmp_path), "--rows", str(known), "--list"]
    options += ["--only", "camvid-*-plain-1000-*"]
    monkeypatch.setattr(sys, "argv", [script.name, *options])
    runpy.run_path(str(script), run_name="__main__")
    states = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert states == ["missing", "finished", "missing"]

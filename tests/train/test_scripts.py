"""The script that trains for the evidence, and its report."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from trainings import report as evidence_report

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench/evidence.py"


def test_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Of the runs on photographs, here without the first one. Those that have a row are not
    repeated, and are in the report; tests/test_docs.py compares the page of all runs."""

    def evidence(words: str) -> str:
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--out", str(tmp_path), *words.split()])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    with pytest.raises(SystemExit):
        evidence("--only nothing-*")
    assert "--only nothing-*: no run" in capsys.readouterr().err
    known = tmp_path / "rows.json"
    rows = json.loads((ROOT / "docs/evidence.json").read_text())["rows"]
    rows = [row for row in rows if row["scenes"] == "camvid"][1:]
    known.write_text(json.dumps({"rows": rows}))
    listed = evidence(f"--rows {known} --list --only camvid-*-plain-1000-*")
    assert re.findall("missing|finished", listed) == ["missing", "finished", "finished"]

    evidence(f"--rows {known} --report {tmp_path}")
    assert json.loads((tmp_path / "evidence.json").read_text())["rows"] == rows
    page = (tmp_path / "evidence.md").read_text()
    assert "1 of the 17 runs planned on photographs are missing." in page
    assert "| SAR | 1,000 | +0.1 ± 0.7 (n = 2) | +0.0 ± 0.4 (n = 2) |" in page  # seeds 1 and 2
    picture = tmp_path / "evidence-camvid-efficientnet-lite0.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(evidence_report.curves(rows).axes) == 6  # two schedules, none of the body

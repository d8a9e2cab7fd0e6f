"""Labels that are out of range: the progress bar, the warning and the report."""

from pathlib import Path

import pytest

from anchorops.train.report.page import _curves
from anchorops.train.run.journal import IGNORED_LABELS, WRONG_LABELS, Journal


def test_labels_out_of_range_are_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with Journal(tmp_path, 0, 10) as journal:
        journal.show({"loss": 1.0, WRONG_LABELS: 0.0, IGNORED_LABELS: 9.0})
        journal.warn_of_labels(0.0)
        assert journal.bar.postfix.startswith("loss") and "labels" not in journal.bar.postfix
        assert "warning" not in capsys.readouterr().err
        for count in (12.5, 3.0):
            journal.show({"loss": 1.0, WRONG_LABELS: count})
            journal.warn_of_labels(count)
    shown = capsys.readouterr().err
    assert shown.count("12.5 labels per step are neither a class nor ignored") == 1
    assert shown.count("warning") == 1


@pytest.mark.parametrize("count", [0.0, 2.0])
def test_curve(count: float) -> None:
    lines = [{"step": step, "loss": 1.0, WRONG_LABELS: count * (step > 1)} for step in (1, 2)]
    lines = [{**line, IGNORED_LABELS: 9.0} for line in lines]
    titles = [axis.get_title() for axis in _curves(lines).axes]
    assert titles == ["loss and its terms", "counts, and SAR's gate"][: 1 + (count > 0)]

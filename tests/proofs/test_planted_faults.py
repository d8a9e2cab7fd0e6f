"""Each fault of planted_faults.toml quotes text that stands in its file once."""

from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="it is new in Python 3.11")
ROOT = Path(__file__).parents[2]


def test_the_text_that_is_replaced_stands_in_the_file_once():
    table = tomllib.loads(Path(__file__).with_name("planted_faults.toml").read_text())
    for file, faults in table.items():
        source = (ROOT / file).read_text()
        for name, (_, right, wrong) in faults.items():
            assert source.count(right) == 1 and wrong != right, f"{file}, {name}"

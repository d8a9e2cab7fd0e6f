"""The README's examples run as pasted."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_has_examples():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[-1][:30])
def test_example_runs(example):
    exec(compile(example, "README.md", "exec"), {})


def test_commands_exist():
    for command in re.findall(r"anchorops-train (\S+)", README):
        from anchorops.train.__main__ import COMMANDS
        from anchorops.train.presets import PRESETS

        assert command.startswith("-") or command in {*COMMANDS, *PRESETS}, command

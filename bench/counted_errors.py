"""The errors of Triton's kernels against float64, as the machine for PTX executes them for sm_80:
the checks of single operators by `anchorops-doctor --verify --all`.

    python bench/counted_errors.py [--out bench/results/counted-errors.json]

Three minutes on two cores, without a GPU.
"""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from record import ROOT, save_counts

from anchorops.doctor.verify import COMPOSITION


def checks() -> Iterator[tuple[str, str, str, float, float]]:
    """Name, operator, dtype, error and limit of each check, from tests/test_verify.py."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "", "tests/test_verify.py"]
    environment = os.environ | {"PTX_ARCH": "80", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checks.xml"
        subprocess.run([*command, "--junitxml", str(path)], cwd=ROOT, env=environment, check=True)
        for found in ElementTree.parse(path).iter("property"):
            if found.get("name") == "check":
                yield ast.literal_eval(found.get("value", ""))


def rows() -> list[dict[str, Any]]:
    """Of each operator the error that is the largest part of its limit, relative to the largest
    number of the result, and which part."""
    grouped: dict[str, list[tuple[float, float]]] = {}
    for _, operator, _, error, limit in checks():
        if operator != COMPOSITION:
            grouped.setdefault(operator, []).append((error, error / limit if error else 0.0))
    assert grouped, "tests/test_verify.py recorded no check"
    worst = {name: max(found, key=lambda x: x[1]) for name, found in sorted(grouped.items())}
    return [
        {"operator": name, "checks": len(grouped[name]), "error": error, "share": share}
        for name, (error, share) in worst.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/counted-errors.json")
    arguments = parser.parse_args()
    save_counts(arguments.out, rows())


if __name__ == "__main__":
    main()

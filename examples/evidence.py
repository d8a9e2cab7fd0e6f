"""The methods on digit scenes, beside the plain network: mean ± standard deviation over seeds.

    python examples/evidence.py [--seeds 3] [--out runs/evidence] [--networks hrnet-w18-small]
                                [--table evidence.md]

Every method has the hyper-parameters that its paper publishes, every run the demo's schedule: 48
runs of one to two minutes on one CPU core each. It can be interrupted: finished runs are kept, the
others go on.
With --table the comparison is also written as Markdown, a table for each network.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from anchorops.train.checkpoint import latest_checkpoint, save_atomically
from anchorops.train.compare import comparison, load_results
from anchorops.train.learner import CLASSES
from anchorops.train.loop import resume, start
from anchorops.train.presets import DEMO

METHODS = (
    (),
    ("cr",),
    ("sar",),
    ("cbp",),
    ("occl",),
    ("cbp", "occl"),
    ("ceco",),
    ("mvsc",),
)
MEASURES = ("miou", "head", "body", "tail")


def table(results: Mapping[tuple[str, ...], Sequence[dict[str, Any]]]) -> str:
    """Markdown: a row for the results of each choice of methods, one per seed, the plain network's
    (key ()) among them. In %, mean ± standard deviation over the seeds; the difference to plain is
    that of equal seeds."""
    plain = {run["seed"]: run["miou"] for run in results[()]}
    lines = ["| methods | mIoU | to plain | head | body | tail |", "|---|" + "---:|" * 5]
    for methods, runs in results.items():
        miou, *groups = (_spread([run[name] for run in runs]) for name in MEASURES)
        added = "" if not methods else _spread([r["miou"] - plain[r["seed"]] for r in runs], "+")
        name = " + ".join(CLASSES[m] if m != "cr" else "CR" for m in methods) or "plain"
        cells = [name, miou, added, *groups]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], sign: str = "") -> str:
    percent = [100 * value for value in values]
    spread = f" ± {stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{fmean(percent):{sign}.1f}{spread}".replace("-", "−")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--networks", nargs="+", choices=DEMO, default=list(DEMO))
    parser.add_argument("--table", type=Path, help="write the comparison as Markdown")
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        for network in arguments.networks:
            for methods in METHODS:
                name = f"{network}-{'+'.join(methods) or 'plain'}-{seed}"
                run = arguments.out / name
                runs.append((network, methods, run))
                if (run / "results.json").exists():
                    continue
                if run.exists() and latest_checkpoint(run):
                    resume(run)
                    continue
                config = DEMO[network].replace(
                    methods=methods,
                    seed=seed,
                    threads=1,
                    out=arguments.out,
                    name=name,
                    overwrite=True,
                )
                start(config)
    results = {
        network: {
            methods: [load_results(run) for n, m, run in runs if (n, m) == (network, methods)]
            for methods in METHODS
        }
        for network in arguments.networks
    }
    rows = [rows for network in results.values() for rows in network.values()]
    print(comparison(list(chain.from_iterable(rows))))
    if arguments.table:
        tables = [f"### {network}\n\n{table(rows)}" for network, rows in results.items()]
        save_atomically("\n".join(tables), arguments.table)


if __name__ == "__main__":
    main()

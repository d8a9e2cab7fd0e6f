"""The methods on digit scenes, beside the plain network: mean ± standard deviation over seeds.

    python examples/evidence.py [--seeds 3] [--out runs/evidence] [--networks hrnet-w18-small]

Every method has the hyper-parameters that its paper publishes, every run the demo's schedule: 48
runs of one to two minutes on one CPU core each. Finished runs are kept, so it can be interrupted.
"""

import argparse
from pathlib import Path

from anchorops.train.compare import comparison, load_results
from anchorops.train.loop import start
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--networks", nargs="+", choices=DEMO, default=list(DEMO))
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        for network in arguments.networks:
            for methods in METHODS:
                name = f"{network}-{'+'.join(methods) or 'plain'}-{seed}"
                run = arguments.out / name
                runs.append((network, methods, run))
                if not (run / "results.json").exists():
                    config = DEMO[network].replace(
                        methods=methods,
                        seed=seed,
                        threads=1,
                        out=arguments.out,
                        name=name,
                        overwrite=True,
                    )
                    start(config)
    runs.sort(key=lambda run: (list(DEMO).index(run[0]), METHODS.index(run[1])))
    print(comparison([load_results(run) for _, _, run in runs]))


if __name__ == "__main__":
    main()

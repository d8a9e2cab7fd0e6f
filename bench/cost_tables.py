"""Writes the tables of README.md and docs/ from committed rows.

    python bench/cost_tables.py

A table stands between `<!-- rows: NAME -->` and `<!-- end of rows -->`. A function that returns
text writes the whole table. One that returns a list checks a table whose words are written by hand:
its figures must stand in the page, in this order.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import nan

import record
from cases.listed import IMAGES, TRAINING, VOLUMES
from record import BASELINE, BOTH, OWN, ROOT, by_case, compared, gain, markdown_table

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(?P<mark><!-- rows: (?P<name>\w+) -->\n).*?(?=<!-- end of rows -->)", re.S)
OF_README = ("HRNet, Cityscapes", "SegFormer, ADE20K")  # cross-entropy on a GPU


def committed(name: str) -> dict:
    return record.load(ROOT / f"bench/results/{name}.json")


CPU = committed("amd-epyc-avx512-2-threads")  # of `make bench BENCH=bench/results`
AVX2 = committed("amd-epyc-avx2-2-threads")  # windows and probes, on another CPU
PROBES = [x for x in AVX2["training_steps"] if x["network"].startswith("linear probe")]
SHOWN = (BASELINE, OWN, BOTH)
PROBE = "linear probe, ADE20K"
COUNTED = [x for x in committed("counted-memory")["rows"] if x["name"] in SHOWN]
LAUNCHES, PRECISION = (committed(f"counted-{x}")["rows"] for x in ("launches", "precision"))
HOST_TIME = committed("host-time")["host_time"]
GPU = committed("nvidia-h100-80gb-hbm3-132-multiprocessors")


def main() -> None:
    wrong = []
    for page in PAGES:
        text = page.read_text()
        page.write_text(with_tables(text))
        wrong += [f"{page.relative_to(ROOT)}: {figure}" for figure in missing_figures(text)]
    if wrong:
        sys.exit("\n".join(["not there, or not in their place:", *wrong]))


def with_tables(page: str) -> str:
    """The text of a page, with its tables made anew from the rows."""

    def made_anew(marked: re.Match[str]) -> str:
        table = TABLES[marked["name"]]()
        return f"{marked['mark']}\n{table}\n\n" if isinstance(table, str) else marked[0]

    return MARKED.sub(made_anew, page)


def missing_figures(page: str) -> Iterator[str]:
    """Figures of the rows that a table written by hand does not have, or not in this order."""
    for marked in MARKED.finditer(page):
        table, rest = TABLES[marked["name"]](), marked[0]
        for figure in table if isinstance(table, list) else []:
            _, *after = re.split(rf"(?<![\d.,]){re.escape(figure)}(?![.,]?\d)", rest, maxsplit=1)
            if not after:
                yield f"table {marked['name']}: {figure}"
            rest = "".join(after) or rest


def gains_of(run: dict, **fields: object) -> list[float]:
    """Of the cases with these fields: how many times as fast as the fastest alternative."""
    return [gain(case) for case in by_case(run["operators"]) if fields.items() <= case[0].items()]


def between(values: Iterable[float], digits: str = ".0f") -> str:
    lowest, *_, highest = sorted(values)
    return f"{lowest:{digits}} to {highest:,.0f}"


def step_of(network: str, run: dict) -> dict[str, dict]:
    """The rows of a training step by name."""
    steps = compared(run["training_steps"], "network").items()
    return next(rows for (name,), rows in steps if network in name)


# README


def gains() -> list[str]:
    """Typical and best cases of what the README promises."""
    fields = {"operation": "cross-entropy", "direction": TRAINING, "dtype": "bf16"}
    hrnet, segformer = (gains_of(GPU, **fields, shape=shape)[0] for shape in OF_README)
    return [
        f"{hrnet:.0f}×: 19 classes",
        f"{segformer:.0f}×: 150 classes",
        share_of_step("hrnet", GPU),
        share_of_step("segformer", GPU),
        *(batches("SegFormer-B5"), batches("PSPNet-R101")),
        *(batches(PROBE), batches(f"{PROBE}, 9 heads")),
        share_of_step("hrnet", CPU),
        share_of_step("segformer", CPU),
    ]


def share_of_step(network: str, run: dict) -> str:
    """Time and memory; with late upsampling, if something could run later."""
    rows = step_of(network, run)
    ours, plain = rows.get(BOTH) or rows[OWN], rows[BASELINE]
    return f"{ours['ratio']['median']:.0%}, {ours['peak_bytes'] / plain['peak_bytes']:.0%}"


def batches(network: str) -> str:
    rows = [x for x in COUNTED if x["network"] == network and not x["checkpointing"]]
    first, last = (x["largest_batches"]["24 GB"] for x in (rows[0], rows[-1]))
    return f"{first} → {last}: {network}"


def uses() -> list[str]:
    """What the calls gain on a CPU."""

    def over(other: str, section: str, *case: str) -> str:
        cases = compared(CPU[section], *case).values()
        return between(rows[other]["seconds"] / rows["anchorops"]["seconds"] for rows in cases)

    segformer = step_of("segformer", CPU)
    probes = compared(PROBES, "network").values()
    volume = {"operation": "cross-entropy + Dice", "shape": VOLUMES, "dtype": "fp32"}
    return [
        *(f"{segformer[name]['ratio']['median']:.0%}" for name in (BOTH, OWN)),
        f"{between(1 / rows[OWN]['ratio']['median'] for rows in probes)}×",
        f"{gains_of(CPU, **volume)[0]:.0f}×",
        *(f"{over(way, 'export', 'volume', 'dtype')}×" for way in ("torch", "nnU-Net")),
        f"{over('torch, pycocotools', 'masks', 'masks', 'threads')}×",
        f"{between(gains_of(CPU, operation='matched masks: focal + Dice'))}×",
        f"{between(gains_of(CPU, operation='Lovász'))}×",
    ]


def speedups() -> str:
    """Of the pixel losses."""
    kinds = {"150 classes": 150, "19 classes": 19, "14 classes, volumes": 14, "2 classes": 2}
    kinds |= {"one sigmoid": 1, "20 sigmoids": 20}
    lines = []
    for name, num_classes in kinds.items():
        shape = VOLUMES if "volumes" in name else IMAGES
        fields = {"num_classes": num_classes, "shape": shape}
        loss = {"operation": "sigmoid: " * ("sigmoid" in name) + "cross-entropy", "dtype": "fp32"}
        cells = [name]
        for stride, labels in ((8, "coherent"), (4, "coherent"), (4, "trained"), (1, "coherent")):
            found = gains_of(CPU, **fields, **loss, stride=stride, labels=labels)
            cells += [f"{found[0]:.2g}" if found else ""]
        lines.append([*cells, between(gains_of(CPU, **fields, stride=4), ".2g")])
    header = ["times as fast", "output stride 8", "4", "4, trained network", "1"]
    return markdown_table([*header, "range of all losses, stride 4"], lines)


# Pages of docs/


def cases(run: dict) -> str:
    """The first case of each operation, those of the README, and those slower than the fastest
    other implementation: forward and backward, or forward if there is nothing else."""
    rows = [row for row in run["operators"] if row["shape"] not in (IMAGES, VOLUMES)]
    trained = {row["operation"] for row in rows if row["direction"] == TRAINING}
    usual = "bf16" if run["device_type"] == "cuda" else "fp32"
    lines, seen = [], set()
    for ours, other in map(record.ours_and_other, by_case(rows)):
        if ours is None or other is None:
            continue
        operation, direction, ratio = ours["operation"], ours["direction"], gain([ours, other])
        of_readme = operation == "cross-entropy" and ours["shape"] in OF_README
        shown = operation not in seen or ratio < 1 or of_readme
        if not shown or (direction != TRAINING and operation in trained):
            continue
        where = ours["shape"] if ours["sizes"] in seen else f"{ours['shape']}: {ours['sizes']}"
        unusual = {direction, ours["dtype"], ours["labels"]} - {TRAINING, usual, "coherent"}
        cells = [operation, ", ".join([where, *sorted(unusual)]), measured(ours)]
        lines.append([*cells, f"{other['name']}: {measured(other)}", f"{ratio:.1f}"])
        seen |= {operation, ours["sizes"]}
    header = ["operation", "sizes", "anchorops: ms, MiB", "fastest other: ms, MiB", "×"]
    return markdown_table(header, lines, words=(0, 1, 3))


def measured(row: dict) -> str:
    """Milliseconds and mebibytes."""
    size = nan if row["extra_bytes"] is None else row["extra_bytes"]
    return f"{record.number(row['median'] * 1e3)}; {record.number(size / 2**20)}"


def slower() -> list[str]:
    """Losses that take longer than the fastest alternative."""
    return [f"{x:.2f}" for shape in (VOLUMES, IMAGES) for x in gains_of(CPU, shape=shape) if x < 1]


def pivot(rows: Iterable[dict], line: str, column: str, cell: str) -> str:
    """A line for each value of a text, a column for each of another. The texts are formatted with
    the fields of a row, and its memory in MB."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if "absent" not in row:
            row = row | {"MB": (row.get("peak_bytes") or row.get("memory") or nan) / 1e6}
            lines.setdefault(line.format(**row), {})[column.format(**row)] = cell.format(**row)
    columns = dict.fromkeys(name for cells in lines.values() for name in cells)
    table = [[name, *(cells.get(x, "") for x in columns)] for name, cells in lines.items()]
    return markdown_table(["", *columns], table)


# In parentheses the median and the quartiles, as shares of the first's median.
TIMES = "{seconds[median]:.3f} s ({ratio[median]:.0%}; {ratio[q1]:.0%}–{ratio[q3]:.0%})"
STEPS = ("{name}", "{network}", TIMES + ", {MB:,.0f} MB")
COST = "{seconds:.3f} s, {MB:,.0f} MB"
NETWORKS = (
    "{network}, {sizes}, checkpointing: {checkpointing}",
    "{name}",
    "{MB:,.0f} MB; {largest_batches[24 GB]}",
)
ERRORS = ("{bins:,} bins, trained: {trained}", "{median:.2%} ({worst:.1%})")
OF_A_MACHINE = {
    "operators": cases,
    "training_steps": lambda run: pivot(run["training_steps"], *STEPS),
    "inference": lambda run: pivot(run["inference"], *STEPS),
}
PIVOTS = {
    "training_steps": (CPU["training_steps"], *STEPS),
    "probes": (PROBES, *STEPS),
    "steps_on_a_gpu": ([x for x in GPU["training_steps"] if x["methods"] == "plain"], *STEPS),
    "inference": (CPU["inference"], *STEPS),
    "counted_memory": (COUNTED, *NETWORKS),
    "launches": (LAUNCHES, "{name}", "launches (ours; before)", "{launches} ({ours}; {earlier})"),
    "host_time": (HOST_TIME, "{name}", "{backend}", "{us:.0f} ({ratio:.1f})"),
    "lovasz_precision": (PRECISION, "{pixels}", *ERRORS),
    "masks_in_frameworks": (CPU["masks_in_frameworks"], "{case}", "{name}", COST),
    "windows": (AVX2["windows"], "{windows}", "{name}", COST),
    "export": ([x for x in CPU["export"] if x["dtype"] == "float16"], "{volume}", "{name}", COST),
}
TABLES: dict[str, Callable[[], str | list[str]]] = {
    "gains": gains,
    "uses": uses,
    "speedups": speedups,
    "slower": slower,
    "machine": partial(record.machine, CPU),
    "cases": partial(cases, CPU),
    "cases_on_a_gpu": partial(cases, GPU),
    **{name: partial(pivot, *of_table) for name, of_table in PIVOTS.items()},
}


if __name__ == "__main__":
    main()

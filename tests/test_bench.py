"""The benchmarks: counted bytes, rows, plots."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cases
import cost_tables
import pytest
import run as bench
import torch
from record import compared, head_of, save

import anchorops as ao
from anchorops import _doctor_benchmark, catalogue, doctor
from anchorops.catalogue import batches
from anchorops.measure import example_labels, keys_bytes, measure, moments_bytes, peak_extra_bytes

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_counted_bytes():
    features = torch.empty(2, 3, 4, 5, dtype=torch.bfloat16)  # 240 bytes, 40 pixels
    keys, sums, sqdists, anchors = 160, 7 * 3 * 4, 7 * 4, 7 * 3 * 4
    assert moments_bytes(features, 7, "forward") == 240 + keys + sums
    assert moments_bytes(features, 7, "backward") == 240 + keys + sums
    both = {"sums": True, "sqdists": True}
    forward = moments_bytes(features, 7, "forward", **both)
    assert forward == 240 + keys + anchors + sums + sqdists
    backward = moments_bytes(features, 7, "backward", **both)
    assert backward == 2 * 240 + keys + anchors + sums + sqdists
    assert moments_bytes(features, 7, "forward + backward", **both) == forward + backward
    assert keys_bytes(40, 7) == 40 * (8 + 4) + 7 * 8


@pytest.mark.parametrize("size", [(500,), (3, 200), (2, 60, 90)], ids=str)
def test_example_labels(size):
    random, coherent = (example_labels(size, 19, kind) for kind in ("random", "coherent"))
    assert random.shape == coherent.shape == size
    for labels in (random, coherent):
        assert labels.min() == -1 or labels.min() >= 0
        assert labels.max() < 19
    changes = [(labels.diff() != 0).float().mean() for labels in (random, coherent)]
    assert changes[0] > 0.8
    assert changes[1] < 2 / 37


def test_measure():
    features = torch.randn(2, 8, 32, 32)
    calls = []
    measured, times = measure(
        lambda: calls.append(features.sum()), 1000, CPU, beside=features, seconds=0
    )
    assert len(calls) == len(times) == measured.rounds == 3
    assert min(times) <= measured.q20 <= measured.median <= measured.q80 <= max(times)
    assert measured.gbps == pytest.approx(1000 / measured.median / 1e9)
    assert (measured.copy_share or 0) > 0
    assert (measured.read_share or 0) > 0
    assert measured.others is None  # too short to measure it


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("anchorops.measure.time.perf_counter", lambda: clock.now)
    return clock


def test_measure_outlasts_slow_first_calls(clock):
    durations = [0.25] * 4 + [0.0625] * 1000  # exact in binary

    def run() -> None:
        clock.now += durations.pop(0)

    measured, times = measure(run, 1, CPU, seconds=2)
    assert times == [0.25] * 4 + [0.0625] * 16
    assert measured.median == 0.0625


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc")
def test_measure_sees_other_processes():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        stat = Path(f"/proc/{busy.pid}/stat")

        def used() -> float:
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

        def run() -> None:  # however many processes share the cores, the busy one gets 0.2 s
            end = used() + 0.2
            while used() < end:
                time.sleep(0.01)

        try:
            measured, times = measure(run, 1, CPU, seconds=0)
        finally:
            busy.kill()
    assert (measured.others or 0) * sum(times) > 0.5  # of the 0.6 s in three rounds


def test_measure_leaves_out_its_own_process(clock, monkeypatch):
    """Seconds of all cores, and of this process, which is a part of them."""
    system, process = 100.0, 10.0

    def run() -> None:
        nonlocal system, process
        clock.now, system, process = clock.now + 1, system + 1.75, process + 1.5

    monkeypatch.setattr("anchorops.measure._busy_seconds", lambda: system)
    monkeypatch.setattr("anchorops.measure.time.process_time", lambda: process)
    assert measure(run, 1, CPU, seconds=0)[0].others == 0.25


@pytest.mark.parametrize(("host", "reads"), [(0.0, 1), (3e-3, 1 + 3), (1.0, 1 + 10)])
def test_measure_on_cuda(monkeypatch, clock, host: float, reads: int):
    """The order of events, with a replacement for CUDA: read a clean buffer for twice as long as
    the host needs for a call, and at most 20 ms; start, call, end."""
    order = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, end: object) -> float:
            assert isinstance(end, Event)
            return 2.0  # milliseconds

        def synchronize(self) -> None:
            pass

    class Clean:
        def sum(self) -> None:  # only a read, because a write would leave dirty lines
            order.append("read")

    def zeros(size: int, dtype: torch.dtype, device: str) -> Clean:
        assert (size, dtype, device) == (2**28, torch.float32, "cuda")
        return Clean()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(total_memory=141 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch, "zeros", zeros)

    def run() -> None:
        order.append("call")
        clock.now += host

    measured, times = measure(run, 10**6, torch.device("cuda"), seconds=0)
    assert times == [2e-3] * 3
    assert measured.gbps == pytest.approx(0.5)
    of_a_read = ["read", "event", "read", "event"]
    once = [*["read"] * reads, "event", "call", "event"]
    assert order == [*of_a_read * 3, "call", *once * 3]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_extra_bytes():
    tensor = torch.ones(2**22)  # 16 MiB
    runs = [lambda: tensor.sum(), lambda: tensor + 1, lambda: (tensor + 1).sum()]
    for run in runs:
        run()  # the first call of an operator also loads its code
    nothing, output, temporary = (peak_extra_bytes(run, CPU) for run in runs)
    assert nothing == pytest.approx(0, abs=2**20)
    assert output == pytest.approx(0, abs=2**20)
    assert temporary == pytest.approx(2**24, rel=0.1)


def check_rows(run: dict) -> None:
    assert {"device", "device_type", "torch", "triton", "python", "commit"} <= set(run)
    assert run["copy_gbps"] > 0
    assert run["read_gbps"] > 0
    for row in run["operators"]:
        assert row["q20"] <= row["median"] <= row["q80"]
        assert row["bytes"] / row["median"] / 1e9 == pytest.approx(row["gbps"])
        assert row["error"] is None or row["error"] <= 1e-2


@pytest.mark.slow
def test_rows_and_plots(tmp_path):
    chosen = "HRNet and fp32 and coherent and (index_add or anchorops) and not compiled"
    command = [sys.executable, "bench/run.py", "--tiny", "--device", "cpu", "--only", "operators"]
    answer = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTEST_ADDOPTS": f"-k '{chosen}'"},
        text=True,
        capture_output=True,
    )
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr
    [rows] = tmp_path.glob("*.json")
    backend = "cpu" if ao.backends()["cpu"] is None else "reference"
    of_bandwidth = rf"^  anchorops \({backend}\) .* GB/s +\d+% of copy +\d+% of read"
    assert re.search(of_bandwidth, answer.stdout, re.M)
    assert "class moments with anchors, forward + backward: HRNet" in answer.stdout
    run = json.loads(rows.read_text())
    check_rows(run)
    ours = [row for row in run["operators"] if row["ours"] and row["shape"].startswith("HRNet")]
    assert ours
    assert all(row["ratio"] == 1 for row in ours)
    command = [sys.executable, "bench/plot.py", str(rows)]
    answer = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert answer.returncode == 0, answer.stderr
    assert rows.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "bench/results").glob("*.json")))
def test_committed_rows(name):
    run = json.loads((ROOT / "bench/results" / name).read_text())
    if "operators" in run:
        check_rows(run)
    assert (run.get("device") or "counted" in name) and run["torch"] and run["commit"]


def test_rows_of_another_commit_are_refused(tmp_path):
    path, head = tmp_path / "x/rows.json", {"device": "a CPU", "torch": "2", "commit": "abc"}
    save(path, "operators", head, [{"name": "one"}])
    save(path, "options", head, [{"name": "two"}])
    run = json.loads(path.read_text())
    assert run == head | {"operators": [{"name": "one"}], "options": [{"name": "two"}]}
    with pytest.raises(ValueError, match="has rows of commit abc, and this run is of def"):
        save(path, "options", head | {"commit": "def"}, [])
    assert json.loads(path.read_text()) == run


def test_disturbed_machine_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.OtherProcesses, "cores", lambda self: 1.5)
    monkeypatch.setattr(bench, "WATCH", 0)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # of this process
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"other processes keep 1\.5 cores busy"):
        bench.main()
    rows = [{"name": "quiet", "others": 0.1}, {"name": "slow", "others": 0.3}, {"others": None}]
    (tmp_path / "rows.json").write_text(json.dumps({"operators": rows}))
    assert bench.disturbed(tmp_path / "rows.json") == ["operators: slow"]


def option_row(option: str, *milliseconds: float) -> dict:
    """A row of our call's minimum, lower quartile and upper quartile."""
    minimum, *quartiles = milliseconds
    return {
        **{"option": option, "num_classes": 150, "ratio": 1, "axes": 2, "batch": 1},
        **{"minimum": {"ours": minimum / 1e3}, "test": option},
        "quartiles": {"ours": [ms / 1e3 for ms in quartiles]},
    }


def operator_row(direction: str, minimum: float, q80: float) -> dict:
    return {
        **{"operation": "class moments", "direction": direction, "shape": "a", "sizes": "b"},
        **{"num_classes": 19, "dtype": "fp32", "labels": "random", "name": "anchorops (cpu)"},
        **{"minimum": minimum, "median": minimum, "q80": q80, "test": direction, "ours": True},
    }


CONTAINS_DICE = option_row("cross-entropy + Dice", 61, 62, 177)


def test_contradictions():
    for fastest, found in ((204, 1), (170, 0)):  # most of the whole take at most 177
        run = {"options": [option_row("Dice", fastest, 205, 208), CONTAINS_DICE]}
        assert len([*bench.contradictions(run)]) == found
    other = {**option_row("Dice", 204, 205, 208), "ratio": 2}
    assert not [*bench.contradictions({"options": [other, CONTAINS_DICE]})]
    volumes = [
        option_row("cross-entropy, bf16", 9, 9, 9),
        option_row("cross-entropy + Dice, bf16", 6, 7, 8),
    ]
    [(text, part, whole)] = bench.contradictions({"options": volumes})
    assert [part, whole] == volumes
    assert "by ours: cross-entropy, bf16 took at least 9.0 ms, the whole mostly 8.0" in text
    operators = [operator_row("forward", 3, 4), operator_row("forward + backward", 1, 2)]
    assert len([*bench.contradictions({"operators": operators})]) == 1
    operators[1]["name"] = "anchorops (triton)"
    assert not [*bench.contradictions({"operators": operators})]


@pytest.mark.parametrize("good_attempt", [1, 3, 4])
def test_contradictions_are_measured_again(tmp_path, good_attempt):
    path, attempts = tmp_path / "rows.json", []
    wrong, right = option_row("Dice", 204, 205, 208), option_row("Dice", 58, 59, 60)
    unrelated = option_row("focal", 60, 61, 62)
    path.write_text(json.dumps({"options": [wrong, CONTAINS_DICE, unrelated]}))

    def measure_again(tests: list[str], to: Path) -> None:
        attempts.append(tests)
        rows = [right if len(attempts) == good_attempt else wrong, CONTAINS_DICE]
        to.write_text(json.dumps({"options": rows}))

    if good_attempt > bench.ATTEMPTS:
        with pytest.raises(SystemExit, match=r"so they are not recorded:\noptions, option cross-e"):
            bench.make_consistent(path, measure_again)
        expected = [unrelated]
    else:
        bench.make_consistent(path, measure_again)
        expected = [right, CONTAINS_DICE, unrelated]
    assert attempts == [["Dice", "cross-entropy + Dice"]] * min(good_attempt, bench.ATTEMPTS)
    assert json.loads(path.read_text()) == {"options": expected}
    assert [*tmp_path.iterdir()] == [path]


def test_doctor_benchmark(capsys, monkeypatch):
    small = partial(_doctor_benchmark.benchmark, size=1 / 32, seconds=0)
    monkeypatch.setattr(doctor, "benchmark", small)
    fused = ao.backends()["cpu"] is None
    assert doctor.main(["--benchmark"]) == (0 if fused else 1)
    table = capsys.readouterr().out
    for case in catalogue.cases("bench"):
        call, _, kind = str(case).rpartition(", ")
        backend = "cpu" if fused and "cpu" in case.entry.backends else "reference"
        row = rf"^{backend} +{re.escape(call)} +{kind}(?: +[\d.?]+){{8}}"
        assert len(re.findall(row, table, re.M)) == 1, str(case)
    assert "WRONG" not in table
    monkeypatch.setattr(_doctor_benchmark, "_error", lambda ours, exact: 1.0)
    assert doctor.main(["--benchmark"]) == 1
    assert "WRONG" in capsys.readouterr().out


SHARP = [case for case in catalogue.cases("bench") if str(case).endswith(", sharp")]


@pytest.mark.parametrize("case", SHARP, ids=str)
def test_sharp_logits(case: catalogue.Case):
    """Most labels are those of the logits, and sharp neighbours at a border differ by over 18."""
    make, inputs = case.sample.make, case.sample.inputs()
    assert isinstance(make, batches.Logits)
    logits, labels = inputs["logits"], inputs["labels"]
    labels = labels[:, 0] if logits.shape[1] == 1 else labels
    assert labels.shape == (1, *(make.ratio * n for n in make.size[1:]))
    nearest = labels[(slice(None), *[slice(None, None, make.ratio)] * (labels.dim() - 1))]
    predicted = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)
    assert 0.8 < (predicted == nearest).float().mean() < 1
    border = nearest[..., 1:] != nearest[..., :-1]
    steps = logits.diff(dim=-1).abs().amax(1)
    assert border.any() and steps[border].min() > 18 and steps[~border].max() < 4
    flat = make._replace(sharp=False)(1, torch.Generator().manual_seed(0))["logits"]
    assert flat.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_table_of_options(tmp_path):
    """On small images: every option runs, and its picture is drawn."""
    out = tmp_path / "options.json"
    small = ["-m", "pytest", "-p", "no:cacheprovider", "bench/bench_options.py", "--tiny"]
    small += ["--threads", "1", "--rows"]  # threads of tiny tensors only wait for each other
    dice_rows = tmp_path / "dice.json"
    for command in (
        [*small, out, "--eager"],
        [*small, dice_rows, "-k", "sigmoid and Dice and uint8"],
        ["bench/plot.py", out],
    ):
        answer = subprocess.run(
            [sys.executable, *command], cwd=ROOT, text=True, capture_output=True
        )
        assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr
    rows = json.loads(out.read_text())["options"]
    assert {row["axes"] for row in rows} == {2, 3} and len(rows) > 100
    assert sum("bf16" in row["option"] for row in rows) == 6
    trained = {row["option"] for row in rows if row["option"].endswith("trained")}
    assert trained == {f"{x}, trained" for x in ("cross-entropy", "cross-entropy + Dice", "Lovász")}
    rows = json.loads(dice_rows.read_text())["options"]
    assert len(rows) == 8 and any("compiled" in row["seconds"] for row in rows)
    assert (tmp_path / "options-options.png").exists()


@pytest.mark.slow
def test_rows_of_export(tmp_path):
    """Rows of small volumes stand in one file with the other sections of the run."""
    out = tmp_path / "rows.json"
    save(out, "options", head_of(CPU), [])
    command = [sys.executable, "bench/export.py", "--quick", "--out", str(out)]
    answer = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert answer.returncode == 0, answer.stderr
    run = json.loads(out.read_text())
    assert run["options"] == []
    ways = [row["name"] for row in run["export"] if row["dtype"] == "float16"]
    assert ways[:3] == ["anchorops", "torch", "SciPy"]
    assert all(row["differ"] < 1e-2 for row in run["export"])


def test_rows_of_masks(tmp_path, monkeypatch):
    """Rows of small masks are right, and the tables can name the gain."""
    masks, out = importlib.import_module("masks"), tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["masks.py", "--quick", "--out", str(out)])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # of this process
    masks.main()
    run = json.loads(out.read_text())
    assert len(run["masks"]) == 6 and all(row["differ"] == 0 for row in run["masks"])
    gains = cost_tables.gains_over("torch, pycocotools", compared(run["masks"], "masks", "threads"))
    assert re.fullmatch(r"[\d,]+ to [\d,]+×", gains)


@pytest.mark.slow
def test_rows_of_instances(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="it is not installed")
    instances, out = importlib.import_module("instances"), tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["instances.py", "--quick", "--out", str(out)])
    instances.main()
    run = json.loads(out.read_text())
    assert len(run["masks_in_frameworks"]) == 6 and len(run["coco_steps"]) == 4
    assert all(0.3 < row["mean average precision"] < 0.7 for row in run["coco_steps"])


def test_trained_logits():
    """Few errors, and neighbours of different classes differ by much."""
    labels = example_labels((2, 64, 64), 19, "coherent").clamp(min=0)
    logits = cases.trained_logits(labels, 19, 4)
    assert logits.requires_grad and logits.shape == (2, 19, 16, 16)
    assert (logits.argmax(1) == labels[:, ::4, ::4]).float().mean() > 0.6
    assert logits.diff(dim=-1).abs().amax() > 10


def test_counted_precision(monkeypatch):
    precision = importlib.import_module("counted_precision")
    for name, value in {"SEEDS": 1, "EXAMPLES": 1, "SHAPES": precision.SHAPES[2:3]}.items():
        monkeypatch.setattr(precision, name, value)
    losses = list(precision.rows_of_losses())
    assert len(losses) == len(precision.LOSSES) * len(precision.SCALES)
    assert all(row["results"] == 2 for row in losses)
    assert max(row["worst"] for row in losses) < 100
    assert max(row["ours"] for row in precision.rows_of_divergence()) < 1e-2
    assert max(row["worst"] for row in precision.rows_of_lovasz()) < 1

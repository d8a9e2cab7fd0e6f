"""anchorops-doctor --verify: everything is right here, and a wrong function is noticed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops import _backend
from anchorops.doctor import __main__ as doctor
from anchorops.doctor import verify
from anchorops.doctor.catalogue import MODULES, Case, cases
from anchorops.doctor.catalogue.budget import error_and_limit
from anchorops.doctor.catalogue.entry import evaluate
from anchorops.doctor.catalogue.formulas import dice

CPU = torch.device("cpu")
BACKEND = "reference" if ao.backends()["cpu"] else "cpu"
PLAIN = next(case for case in cases("all") if str(case) == "cross-entropy, 1.5×")


def changed(**fields: Callable[..., Tensor]) -> Case:
    """PLAIN with another call or formula."""
    return PLAIN._replace(entry=PLAIN.entry._replace(**fields))


def test_names_are_unique():
    """Of entries, and of samples: by them results are reported, and random numbers drawn."""
    entries = [entry for module in MODULES for entry in module.ENTRIES]
    for names in (
        [entry.name for entry in entries],
        [sample.name for entry in entries for sample in entry.samples],
    ):
        assert len(names) == len({*names})


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_is_right(every: bool):
    rows = [verify.run(case, BACKEND, CPU) for case in cases("all" if every else "quick")]
    environment = list(verify.environment_rows(BACKEND, CPU))
    assert not [str(row) for row in (*rows, *environment) if row.right is not True]


# Other sizes of logits run with the least options, and in test_softmax_moments.py with more.
OF_FEW_SIZES = ("a loss for each pixel, ", "cross-entropy + Dice, ", "all options, ")


@pytest.mark.on("simulated_triton", "simulated_cuda")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[] if quick else [pytest.mark.slow])
        for case in cases("all")
        if (quick := "quick" in case.sample.tags) or not str(case).startswith(OF_FEW_SIZES)
    ],
)
def test_case(case: Case, backend: str, record_property):
    """The cases are right for kernels that run without a GPU."""
    row = verify.run(case, backend, CPU)
    if row.right is None or "Unsupported: " in row.note:
        pytest.skip(row.note or f"{backend} does not serve it")
    dtype = next(iter(case.sample.inputs().values())).dtype
    name = str(dtype).removeprefix("torch.") if dtype.is_floating_point else "integers"
    record_property("check", [row.operator, name, row.error, row.limit])
    assert row.right, str(row)


CALLS = iter(range(1000))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda loss: loss * (1 + 1e-4), id="value"),
        # the value is the same
        pytest.param(lambda loss: loss + 1e-4 * (loss - loss.detach()), id="gradient"),
        pytest.param(lambda loss: loss + 1e-6 * next(CALLS), id="other bits"),
        pytest.param(lambda loss: loss.detach(), id="no gradient"),
        pytest.param(lambda loss: loss * torch.nan, id="NaN"),
        pytest.param(lambda loss: loss.expand(2), id="shape"),
    ],
)
def test_wrong_functions_are_noticed(change: Callable[[Tensor], Tensor]):
    wrong = changed(ours=lambda **inputs: change(PLAIN.ours(**inputs)))
    row = verify.run(wrong, BACKEND, CPU)
    assert row.right is False and str(row).endswith("WRONG")


def test_a_formula_that_is_not_finite_is_no_excuse():
    ones = torch.ones(3)
    assert error_and_limit(ones, ones, ones * torch.nan, 1e-6)[0] == torch.inf


def test_the_formula_of_an_absent_class_has_a_gradient():
    logits = torch.tensor([[0.0, 0.0, -200.0]]).view(1, 3, 1, 1).requires_grad_()  # p = 0
    dice(logits, torch.zeros(1, 2, 2).long(), squared=True).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_reads_beside_an_input_are_noticed():
    logits = PLAIN.sample.inputs()["logits"]
    around = verify._between_nan(logits, CPU)
    assert torch.equal(around, logits) and around.stride() == logits.stride()
    before = around.as_strided((1,), (1,), around.storage_offset() - 1)
    after = around.as_strided((1,), (1,), around.storage_offset() + around.numel())
    assert before.isnan() and after.isnan()

    def reads_more(logits: Tensor, labels: Tensor) -> Tensor:
        before = logits.as_strided((1,), (1,), logits.storage_offset() - 1)
        return PLAIN.ours(logits=logits, labels=labels) + 0 * before.sum()

    assert verify.run(changed(ours=reads_more), BACKEND, CPU).right is False


def test_what_a_backend_refuses_and_what_raises():
    def refuse(**_: Tensor) -> Tensor:
        raise ValueError("pixel_cross_entropy: backend cuda does not support this call: why")

    def fail(**_: Tensor) -> Tensor:
        raise RuntimeError("the driver failed")

    row = verify.run(changed(ours=refuse), BACKEND, CPU)
    assert row.right is None and str(row).endswith("not served")
    row = verify.run(changed(ours=fail), BACKEND, CPU)
    assert row.right is False and "RuntimeError: the driver failed" in str(row)

    def exhaust(**_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    row = verify.run(changed(formula=exhaust), BACKEND, CPU)
    assert row.right is None and str(row).endswith("CUDA out of memory not checked")


def test_after_a_fault_of_the_gpu_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(verify, "_alive", lambda device: False)
    row = verify.run(PLAIN, BACKEND, CPU)
    assert row.right is None and str(row).endswith("failed in an earlier check: not checked")


def row_of(operator: str, right: bool | None, backend: str = "cpu", *parts: str) -> verify.Row:
    return verify.Row(operator, backend, "name", 0.0, 0.0, right, "", 0.0, parts)


def test_what_takes_it_out_of_auto(monkeypatch):
    """A check of a composition names its parts only if the check of none of them failed."""
    monkeypatch.setattr(_backend, "excluded", {"cuda": (), "triton": ("confusion",), "cpu": ()})
    right = [
        row_of("confusion", True),
        row_of("pixel_argmax", None),
        row_of("environment", False),
        row_of("softmax_moments", False, "reference"),  # there is nothing after it
    ]
    assert verify.not_auto(right) == []
    step = row_of("composition", False, "cuda", "class_moments", "split_groups")
    rows = [*right, step, row_of("class_moments", False), row_of("softmax_moments", False)]
    wrong = "export ANCHOROPS_NOT_AUTO=cpu:class_moments,cpu:softmax_moments"
    assert verify.not_auto(rows) == [
        f"{wrong},triton:confusion",
        f"{wrong},cuda:class_moments,triton:confusion  # one of: name",
        f"{wrong},cuda:split_groups,triton:confusion  # one of: name",
    ]
    rows.append(row_of("class_moments", False, "cuda"))
    assert verify.not_auto(rows) == [f"{wrong},cuda:class_moments,triton:confusion"]


def test_the_operators_of_the_checks(monkeypatch):
    """Each case looks up the operators that its entry names, and no other. Each operator has a case
    of its own."""
    looked_up: set[str] = set()

    class Record(tuple):
        def __contains__(self, name: object) -> bool:
            looked_up.add(str(name))
            return False

    record = Record([""])  # `select` does not look into an empty one
    monkeypatch.setattr(_backend, "excluded", dict.fromkeys(_backend.excluded, record))
    own = set()
    for case in cases("all"):
        looked_up.clear()
        evaluate(case.ours, case.sample.inputs())
        named = {*case.entry.operators}
        difference = f"the entry names {named}, the call selects a backend for {looked_up}"
        assert looked_up == named, f"{case}: {difference}"
        own |= named if len(named) == 1 else set()
    without = {*_backend.OPERATORS} - own
    assert not without, (
        f'an entry of this operator alone needs a sample with the tag "all": {without}'
    )


def test_the_driver(monkeypatch):
    nvidia = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
    monkeypatch.setattr(Path, "read_text", lambda file: nvidia)
    assert verify._driver() == "580.95.05"

    def absent(file: Path) -> str:
        raise FileNotFoundError(file)

    monkeypatch.setattr(Path, "read_text", absent)
    assert verify._driver() == "unknown"


def test_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "cases", lambda tag: [PLAIN])
    path = tmp_path / "rows.json"
    command = ["--verify", "--backend", BACKEND, "--json", str(path)]
    assert doctor.main(command) == (0 if BACKEND == "cpu" else 1)
    report = capsys.readouterr().out
    assert (
        f"{BACKEND}: 4 right, 0 WRONG, 0 not checked, 0 not served" in report
    )  # 3 of the environment
    assert "ANCHOROPS_NOT_AUTO" not in report
    record = json.loads(path.read_text())
    assert record["torch"] == torch.__version__ and len(record["rows"]) == 4

    wrong = changed(ours=lambda **inputs: PLAIN.ours(**inputs) * 1.001)
    monkeypatch.setattr(verify, "cases", lambda tag: [wrong])
    assert doctor.main(command) == 1
    report = capsys.readouterr().out
    assert "3 right, 1 WRONG" in report
    assert report.count("cross-entropy, 1.5×") == 2  # and at the end
    line = "export ANCHOROPS_NOT_AUTO=cpu:softmax_moments\n"
    assert report.endswith(line) == (BACKEND == "cpu")


def test_options_of_the_command(capsys):
    unusable = next((name for name, reason in ao.backends().items() if reason), None)
    if unusable is not None:
        assert doctor.main(["--verify", "--backend", unusable]) == 1
        assert f"{unusable} is not usable here" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        doctor.main(["--all"])
    assert "belong to --verify" in capsys.readouterr().err

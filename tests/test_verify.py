"""anchorops-doctor --verify: everything is right here, and a wrong function is noticed."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops import doctor, verify

CPU = torch.device("cpu")
BACKEND = "reference" if ao.backends()["cpu"] else "cpu"
PLAIN = next(check for check in verify.checks() if check.name == "cross-entropy, 1.5×")


def test_all_is_right():
    rows = [verify.run(check, BACKEND, CPU) for check in verify.checks()]
    environment = list(verify.environment_rows(BACKEND, CPU))
    assert not [str(row) for row in (*rows, *environment) if row.right is not True]
    operators = {operator for row in rows for operator in row.operators.split()}
    names = dir(torch.ops.anchorops)  # those of images; volumes are made of them
    assert operators == {x for x in operators if x in names} and len(operators) == 9


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * (1 + 1e-4)


CALLS = iter(range(1000))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda loss: loss * (1 + 1e-4), id="value"),
        pytest.param(_WrongGradient.apply, id="gradient"),
        pytest.param(lambda loss: loss + 1e-6 * next(CALLS), id="other bits"),
        pytest.param(lambda loss: loss.detach(), id="no gradient"),
        pytest.param(lambda loss: loss * torch.nan, id="NaN"),
        pytest.param(lambda loss: loss.expand(2), id="shape"),
    ],
)
def test_wrong_functions_are_noticed(change: Callable[[Tensor], Tensor]):
    row = verify.run(PLAIN._replace(ours=lambda *inputs: change(PLAIN.ours(*inputs))), BACKEND, CPU)
    assert row.right is False and str(row).endswith("WRONG")


def test_reads_beside_an_input_are_noticed():
    logits = PLAIN.inputs[0]
    around = verify._between_nan(logits, CPU)
    assert torch.equal(around, logits) and around.stride() == logits.stride()
    before = around.as_strided((1,), (1,), around.storage_offset() - 1)
    after = around.as_strided((1,), (1,), around.storage_offset() + around.numel())
    assert before.isnan() and after.isnan()

    def reads_more(z: Tensor, y: Tensor) -> Tensor:
        return PLAIN.ours(z, y) + 0 * z.as_strided((1,), (1,), z.storage_offset() - 1).sum()

    assert verify.run(PLAIN._replace(ours=reads_more), BACKEND, CPU).right is False


def test_what_a_backend_refuses_and_what_raises():
    def refuse(*_: Tensor) -> Tensor:
        raise ValueError("pixel_cross_entropy: backend cuda does not support this call: why")

    def fail(*_: Tensor) -> Tensor:
        raise RuntimeError("the driver failed")

    row = verify.run(PLAIN._replace(ours=refuse), BACKEND, CPU)
    assert row.right is None and str(row).endswith("not served")
    row = verify.run(PLAIN._replace(ours=fail), BACKEND, CPU)
    assert row.right is False and "RuntimeError: the driver failed" in str(row)

    def exhaust(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    row = verify.run(PLAIN._replace(formula=exhaust), BACKEND, CPU)
    assert row.right is None and str(row).endswith("CUDA out of memory not checked")


def test_after_a_fault_of_the_gpu_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(verify, "_alive", lambda device: False)
    row = verify.run(PLAIN, BACKEND, CPU)
    assert row.right is None and str(row).endswith("failed in an earlier check: not checked")


def row_of(operators: str, right: bool | None) -> verify.Row:
    return verify.Row(operators, BACKEND, "name", 0.0, 0.0, right, "", 0.0)


def test_what_a_run_remembers(verdicts):
    def remembered(rows: list[verify.Row], everything: bool = False, complete: bool = True) -> dict:
        verify._remember(BACKEND, rows, everything, complete)
        return json.loads(verdicts.read_text())[0]["right"]

    two = [row_of("confusion pixel_argmax", True), row_of("softmax_moments", None)]
    assert remembered(two) == {"confusion": True, "pixel_argmax": True}
    wrong = row_of("softmax_moments pixel_argmax", False)
    assert remembered([*two, wrong], complete=False) == {
        "softmax_moments": False,
        "pixel_argmax": False,
    }
    assert remembered(two, complete=False) == {"softmax_moments": False, "pixel_argmax": False}
    assert remembered(two) == {"confusion": True, "pixel_argmax": True}  # right again


def test_what_a_run_of_some_of_tritons_checks_remembers(verdicts, monkeypatch):
    monkeypatch.setattr(verify, "device_of", lambda backend: torch.device("meta"))
    rows = [row_of("confusion", True), row_of("softmax_moments", True)]
    wrong = row_of("softmax_moments", False)
    for everything, checked_rows, right in (
        (True, [*rows, wrong], False),
        (False, rows, False),  # other checks had found it
        (True, rows, True),
    ):
        verify._remember("triton", checked_rows, everything, complete=True)
        (record,) = json.loads(verdicts.read_text())
        assert record["right"] == {"confusion": True, "softmax_moments": right}
    verify._remember("triton", [row_of("confusion", False)], everything=False, complete=True)
    (record,) = json.loads(verdicts.read_text())  # the first check, and no other
    assert record["right"] == dict.fromkeys(verify.OPERATORS, False)


def test_an_interrupted_run_remembers_what_is_wrong(capsys, monkeypatch, verdicts):
    wrong = PLAIN._replace(ours=lambda *inputs: PLAIN.ours(*inputs) * 1.001)

    def interrupt(*_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "checks", lambda: [wrong, PLAIN._replace(ours=interrupt)])
    with pytest.raises(KeyboardInterrupt):
        doctor.main(["--verify", "--backend", BACKEND])
    assert json.loads(verdicts.read_text())[0]["right"] == {"softmax_moments": False}


def test_the_command(capsys, monkeypatch, tmp_path, verdicts):
    monkeypatch.setattr(verify, "checks", lambda: [PLAIN])
    path = tmp_path / "rows.json"
    command = ["--verify", "--backend", BACKEND, "--json", str(path)]
    assert doctor.main(command) == (0 if BACKEND == "cpu" else 1)
    report = capsys.readouterr().out
    assert (
        f"{BACKEND}: 4 right, 0 WRONG, 0 not checked, 0 not served" in report
    )  # 3 of the environment
    (record,) = json.loads(verdicts.read_text())
    assert record["backend"] == BACKEND and record["right"] == {"softmax_moments": True}
    record = json.loads(path.read_text())
    assert record["torch"] == torch.__version__ and len(record["rows"]) == 4

    wrong = PLAIN._replace(ours=lambda *inputs: PLAIN.ours(*inputs) * 1.001)
    monkeypatch.setattr(verify, "checks", lambda: [wrong])
    assert doctor.main(command) == 1
    report = capsys.readouterr().out
    assert (
        "3 right, 1 WRONG" in report and report.count("cross-entropy, 1.5×") == 2
    )  # and at the end


def test_options_of_the_command(capsys):
    unusable = next((name for name, reason in ao.backends().items() if reason), None)
    if unusable is not None:
        assert doctor.main(["--verify", "--backend", unusable]) == 1
        assert f"{unusable} is not usable here" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        doctor.main(["--all"])
    assert "belong to --verify" in capsys.readouterr().err

"""gpu_check.py on a CPU, with small networks: every check and every measurement runs."""

import json
import math
import shutil

import gpu_check
import pytest
import torch

import train_gpt2


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    monkeypatch.setattr(train_gpt2, "draw_curve", train_gpt2.draw_curve)  # which main() replaces
    yield
    torch._dynamo.reset()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_every_check_succeeds_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "result.json"
    price = ["--dollars_per_gpu_hour", "3"]
    gpu_check.main(["--device", "cpu", "--ranks", "2", "--out", str(out), *price])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    checks = result["checks"]
    assert len(checks) == 14 and all(check["ok"] for check in checks.values())
    # on a CPU, these are closer than a GPU has to be
    for name in (
        "float32, compiled: 10 losses",
        "20 losses of 2 ranks",
        "10 losses after --resume",
    ):
        (check,) = (check for title, check in checks.items() if title.startswith(name))
        assert check["value"] < 1e-5
    values = {name: m["value"] for name, m in result["measurements"].items()}
    assert all(math.isfinite(value) for value in values.values())
    for name in [*checks, *values]:
        assert name in printed
    tokens_per_sec = 2 * values["compiled, micro-batch 2 x 32"]
    (hours,) = (value for name, value in values.items() if name.startswith("the 10B-token run"))
    assert hours == pytest.approx(19_073 * 2**19 / tokens_per_sec / 3600)
    assert values["its price"] == pytest.approx(hours * 2 * 3)


def test_a_failed_check_is_named_and_exits_with_status_1(monkeypatch, capsys):
    for name in ("check_precision", "check_training", "measure_speed"):
        monkeypatch.setattr(gpu_check, name, lambda *args: math.nan)
    forward = train_gpt2.GPT.forward

    def wrong_on_the_second_device(self, idx, targets):
        logits, loss = forward(self, idx, targets)
        devices.append(idx.device)
        return logits, loss + (len(devices) - 1)

    devices = []
    monkeypatch.setattr(train_gpt2.GPT, "forward", wrong_on_the_second_device)
    with pytest.raises(SystemExit) as error:
        gpu_check.main(["--device", "cpu"])
    assert error.value.code == "1 checks failed: float32: loss, difference to the CPU"
    assert "FAILED" in capsys.readouterr().out


def test_a_missing_folder_is_named_before_the_checks(capsys):
    with pytest.raises(SystemExit, match=r"^--out nowhere/a.json: there is no such folder$"):
        gpu_check.main(["--device", "cpu", "--out", "nowhere/a.json"])
    assert not capsys.readouterr().out


def test_nan_fails():
    report = gpu_check.Report()
    report.check("a", math.nan, 1)
    report.check("b", 1, 1)
    assert [check["ok"] for check in report.checks.values()] == [False, True]

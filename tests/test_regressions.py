"""Errors that the lecture's code is known for, one test each where no other file has it."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fineweb
import train_gpt2
from runs import read_log
from train_gpt2 import GPT, Config, main

ROOT = Path(train_gpt2.__file__).resolve().parent
TINY = Config(
    preset="tiny", n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=257,
    total_batch_size=128, micro_batch_size=4, max_steps=4, lr=1e-2, min_lr=1e-3, warmup_steps=2,
    data_dir="data", device="cpu", dtype="float32", compile=False, val_interval=2, val_tokens=160,
    hellaswag_interval=0, sample_interval=0, checkpoint_interval=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder_with_shards(tmp_path, monkeypatch):
    """An empty working folder with a hundred short documents in data/, a token a byte."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    documents = ["".join(rng.choices("abcdef \n", k=60)) for _ in range(100)]
    fineweb.write_shards(documents, "data", "bytes", val_tokens=1000, workers=1)


def test_no_mask_stays_in_the_model():
    model = GPT(TINY)
    assert not list(model.buffers())
    names = {name for name, _ in model.named_parameters()} | {"lm_head.weight"}  # the tied one
    assert set(model.state_dict()) == names


def test_autocast_is_given_the_devices_type(monkeypatch):
    class Reached(Exception):
        pass

    def autocast(device_type, dtype):
        raise Reached(device_type, dtype)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device in ("cpu", "cuda"):  # not cuda:3
        with pytest.raises(Reached) as reached:
            main(replace(TINY, device=device, dtype="bfloat16"))
        assert reached.value.args == (device, torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_leaves_parameters_in_float32_and_training_goes_well(dtype):
    main(replace(TINY, dtype=dtype, max_steps=8))
    checkpoint = torch.load("log/tiny-001/step_000008.pt", weights_only=True)
    assert {w.dtype for w in checkpoint["model"].values()} == {torch.float32}
    losses = read_log("log/tiny-001")["train"][1]
    assert losses[-1] < losses[0]


def test_the_time_of_a_step_has_no_evaluation_in_it(monkeypatch, capsys):
    evaluate = train_gpt2.validation_loss

    def slow(*args):
        time.sleep(1)
        return evaluate(*args)

    monkeypatch.setattr(train_gpt2, "validation_loss", slow)
    main(replace(TINY, val_interval=2, max_steps=3))
    times = re.findall(r"step \d+/3 \| loss .* \| (\d+) ms", capsys.readouterr().out)
    assert len(times) == 3
    assert max(map(int, times[1:])) < 1000  # step 2 comes after an evaluation


def test_a_start_does_not_empty_the_log():
    main(replace(TINY, max_steps=4))
    folder = Path("log/tiny-001")
    lines = (folder / "log.txt").read_text()
    (folder / "step_000004.pt").unlink()
    main(replace(TINY, max_steps=4, resume="log/tiny-001"))
    assert (folder / "log.txt").read_text() == lines


def test_the_configuration_in_a_checkpoint_is_plain():
    main(TINY)
    checkpoint = torch.load("log/tiny-001/step_000004.pt", weights_only=True)  # refuses classes
    assert Config(**checkpoint["config"]) == TINY
    assert {type(value) for value in checkpoint["config"].values()} <= {int, float, str, bool}


def test_the_last_evaluation_and_checkpoint_come_after_the_last_update():
    main(replace(TINY, max_steps=3))
    folder = Path("log/tiny-001")
    assert read_log(folder)["val"][0] == [0, 2, 3]
    last = torch.load(folder / "step_000003.pt", weights_only=True)
    assert last["optimizer"]["state"][0]["step"] == 3


def test_the_model_gets_int64_from_shards_of_uint16():
    windows = train_gpt2.Windows("data", "train", 16, 257)
    x, y = windows.stack(range(3))
    assert x.dtype == y.dtype == torch.int64


def test_imports_do_nothing(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    code = (
        "import sys; sys.argv = ['x', '--nonsense']\n"
        "import fineweb, hellaswag, train_gpt2, torch\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "2"}
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(empty.iterdir())


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compile_stays_on_while_evaluating_and_sampling(capsys):
    settings = {"max_steps": 3, "val_interval": 1, "hellaswag_interval": 2, "sample_interval": 1}
    question = '{"ctx": "abc", "endings": ["a", "bc", "d", "e f"], "label": 1}\n'
    Path("data/hellaswag_val.jsonl").write_text(question * 3)
    main(replace(TINY, **settings, out_dir="plain"))
    main(replace(TINY, **settings, out_dir="compiled", compile=True))
    plain, compiled = read_log("plain"), read_log("compiled")
    for stream in ("train", "val", "hella"):
        assert compiled[stream][0] == plain[stream][0]
        assert compiled[stream][1] == pytest.approx(plain[stream][1], abs=1e-4)
    names = torch.load("compiled/step_000003.pt", weights_only=True)["model"]
    assert not any("_orig_mod" in name for name in names)

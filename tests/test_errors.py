"""A mistake of the user of train_gpt2.py ends in one line that names it, before the first step.

The line is the message of a SystemExit, for which Python prints the message and exits with status
1. No file is changed. tyro reports unknown flags and wrong types itself, with exit status 2.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import tiktoken
import torch

import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT, Config, GPTConfig

SCRIPT = Path(train_gpt2.__file__).resolve()
FLAGS = {
    "vocab_size": 257, "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "max_steps": 2,
    "total_batch_size": 128, "micro_batch_size": 4, "device": "cpu", "data_dir": "data",
    "val_tokens": 160, "hellaswag_interval": 0, "sample_interval": 0, "checkpoint_interval": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    """A folder with shards in data/, a finished run in run/ and an exported model in run/hf/."""
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("data").mkdir()
        for i, split in enumerate(("val", "train")):
            tokens = np.random.default_rng(i).integers(257, size=600).astype(np.uint16)
            np.save(f"data/x_{split}_{i:06d}.npy", tokens)
        train_gpt2.main(train_gpt2.parse_args(arguments(out_dir="run")))
    return folder


@pytest.fixture(autouse=True)
def copy_of_workshop(workshop, tmp_path, monkeypatch):
    """Every test runs in a copy of the workshop, without network."""

    def no_network(*args, **kwargs):
        raise OSError("no network")

    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)


def arguments(*flags: str, **changes) -> list[str]:
    pairs = [(f"--{name}", str(value)) for name, value in (FLAGS | changes).items()]
    return ["gpt2", *(arg for pair in pairs for arg in pair), "--no_compile", *flags]


def contents() -> dict[str, bytes | None]:
    """All files with their bytes, and all folders."""
    paths = sorted(Path().rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def error_of(*flags: str, **changes) -> str:
    """The line that a command ends with, without a change of any file."""
    before = contents()
    with pytest.raises(SystemExit) as error:
        train_gpt2.main(train_gpt2.parse_args(arguments(*flags, **changes)))
    assert isinstance(error.value.code, str) and len(error.value.code.splitlines()) == 1
    assert contents() == before
    return error.value.code


# ---- as a user sees it ---------------------------------------------------------------------------


def test_real_processes_print_one_line_and_exit_with_status_1(tmp_path):
    Path("damaged").mkdir()
    shutil.copy("run/step_000001.pt", "damaged")
    os.truncate("damaged/step_000001.pt", 1000)
    commands = {
        "no train shards in nowhere": arguments(data_dir="nowhere"),
        "cannot load gpt5": ["--prompt", "Hello", "--init_from", "gpt5"],
        "no readable checkpoint": arguments("--resume", "damaged"),
    }
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    python = [sys.executable, str(SCRIPT)]
    running = [subprocess.Popen([*python, *args], **pipes) for args in commands.values()]
    for message, process in zip(commands, running, strict=True):
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out) == (1, "")
        lines = err.splitlines()
        assert lines[-1].startswith(message)
        if message == "no readable checkpoint":  # after a line for each file that was tried
            assert lines.pop(0).startswith("cannot read damaged/step_000001.pt (")
        assert len(lines) == 1


def test_environments(tmp_path):
    """A folder with spaces and letters beyond ASCII, no home, a console that only knows ASCII, the
    script as a module, and `| head`."""
    folder = tmp_path / "größe 1"
    shutil.copytree("run/hf", folder / "my model")
    env = {name: value for name, value in os.environ.items() if name != "HOME"}
    env |= {"PYTHONPATH": str(SCRIPT.parent), "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "train_gpt2", "--init_from", "my model", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": folder, "env": env}
    sample = subprocess.Popen([*command, "--prompt", "größe", "--num_samples", "2"], **pipes)
    head = subprocess.Popen([*command, "--prompt", "a", "--num_samples", "9999"], **pipes)
    head.stdout.readline()
    head.stdout.close()
    assert head.wait(timeout=100) == 1
    assert head.stderr.read() == b"stopped, because the program that reads the output has ended\n"
    out, err = sample.communicate(timeout=100)
    assert (sample.returncode, err, out[:7]) == (0, b"", b"> gr??e")


def test_tyro_exits_with_status_2(capsys):
    for flags in ("--learning_rate 1", "--max_steps many", "--dtype int8", "--lr"):
        with pytest.raises(SystemExit) as error:
            train_gpt2.parse_args(["gpt2", *flags.split()])
        assert error.value.code == 2
        assert flags.split()[0] in capsys.readouterr().err


def test_the_command_line():
    assert train_gpt2.parse_args([]) == Config()
    config = train_gpt2.parse_args("--max_steps 3 --no-compile --wandb --n_layer 2".split())
    assert config == Config(GPTConfig(n_layer=2), max_steps=3, compile=False, wandb=True)
    for name, preset in train_gpt2.PRESETS.items():
        parsed = asdict(train_gpt2.parse_args([name]))
        assert parsed == asdict(preset) | {"name": name}
        assert f" {name}" in Config.__doc__.replace("\n", " ")  # --help shows it


# ---- hyperparameters -----------------------------------------------------------------------------


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(SystemExit, match=r"^no preset gpt3: choose from gpt2, gpt2-medium, .*$"):
        train_gpt2.parse_args(["gpt3"])


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_steps", 0), ("max_steps", -1), ("lr", -0.1), ("lr", "nan"), ("lr", "inf"),
        ("n_layer", 0), ("micro_batch_size", 0), ("val_interval", -5), ("dropout", 1.5),
        ("beta1", 1.0), ("beta2", 1.0), ("cooldown", 1.5), ("top_p", 1.1), ("timeout", 0.0),
        ("total_batch_size", 0), ("temperature", -1.0), ("log_interval", 0), ("vocab_size", 0),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_named(name, value):
    assert f"--{name} {value} must be" in error_of(**{name: value})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 0, "optimizer": "muon"}, "--lr 0"),
        ({"n_head": 3}, "--n_embd 16 must be divisible by --n_head 3"),
        ({"total_batch_size": 100}, "--total_batch_size 100 is not divisible by"),
        ({"total_batch_size": 8}, "--total_batch_size 8 is not divisible by"),
        ({"micro_batch_size": 3}, "is not divisible by --micro_batch_size 3 x --block_size 16"),
        ({"vocab_size": 300, "sample_interval": 1}, "--vocab_size 300 has no encoding"),
    ],
)
def test_numbers_that_do_not_fit_together_are_named(changes, message):
    assert message in error_of(**changes)


def test_a_batch_that_the_ranks_cannot_split_is_named():
    config = train_gpt2.parse_args(arguments())
    with pytest.raises(SystemExit, match="--micro_batch_size 4 x --block_size 16 x 3 ranks$"):
        train_gpt2.check_config(config, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("flags", [[], ["--prompt", "a"], ["--eval_only"]])
def test_a_missing_device_is_named(flags):
    error = error_of(*flags, "--init_from", "run", device="cuda")
    assert "--device cuda" in error and "--device cpu" in error


# ---- data ----------------------------------------------------------------------------------------

TRAIN = "data/x_train_000001.npy"


def shard(tokens, path: str = TRAIN) -> Callable:
    return lambda: np.save(path, tokens)


def manifest(**changes) -> Callable:
    def write():
        names = ("x_train_000001.npy", "x_val_000000.npy")
        shards = [
            {"file": name, "tokens": 600, "largest": 256, "sha256": ""} | changes for name in names
        ]
        state = {"encoding": "bytes", "vocab_size": 257, "shards": shards, "tokens": 1200}
        Path("data/manifest.json").write_text(json.dumps(state))

    return write


@pytest.mark.parametrize(
    "harm, changes, messages",
    [
        (lambda: None, {"data_dir": "nowhere"}, ["nowhere", "fineweb.py"]),
        (lambda: None, {"data_dir": "run"}, ["no train shards in run", "fineweb.py"]),
        (lambda: None, {"data_dir": TRAIN}, [TRAIN]),
        (Path("data/x_val_000000.npy").unlink, {}, ["no val shards in data"]),
        (Path("data/progress.json").touch, {}, ["data is not finished", "fineweb.py"]),
        (lambda: os.truncate(TRAIN, 800), {}, [TRAIN]),
        (lambda: os.truncate(TRAIN, 0), {}, [TRAIN]),
        (shard(np.zeros(600, np.int32)), {}, [TRAIN, "int32"]),
        (shard(np.zeros((30, 20), np.uint16)), {}, [TRAIN, "(30, 20)"]),
        (shard(np.full(600, 300, np.uint16)), {}, [TRAIN, "vocab_size 257"]),
        (lambda: None, {"block_size": 1024, "total_batch_size": 4096}, ["train split", "1024"]),
        (manifest(), {"vocab_size": 50257}, ["data", "257", "50257"]),
        (manifest(tokens=599), {}, [TRAIN, "shape (600,)"]),
        (manifest(file="x_train_000002.npy"), {}, ["x_train_000002.npy"]),
        (
            lambda: Path("data/manifest.json").write_text("{"),
            {},
            ["data: manifest.json is damaged"],
        ),
    ],
)
def test_data_that_cannot_be_used_is_named(harm, changes, messages):
    harm()
    error = error_of(**changes)
    assert all(message in error for message in messages), error


def test_without_network_the_vocabulary_of_gpt2_is_missing(monkeypatch):
    def no_network(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    fineweb.get_encoding.cache_clear()
    error = error_of(sample_interval=1, vocab_size=50257)
    assert "gpt2" in error and "TIKTOKEN_CACHE_DIR" in error


@pytest.mark.parametrize(
    "text, messages",
    [
        (None, ["examples.jsonl", hellaswag.URL]),
        ("", ["examples.jsonl"]),
        ('{"ctx": "a"}\n', ["examples.jsonl", "line 1", "endings"]),
        (json.dumps({"ctx": "abc", "endings": ["long" * 9] * 4, "label": 0}), ["block_size 16"]),
    ],
)
def test_examples_that_cannot_be_used_are_named(text, messages):
    if text is not None:
        Path("examples.jsonl").write_text(text)
    for flags in ([], ["--eval_only", "--init_from", "run"]):
        error = error_of(*flags, hellaswag_interval=1, hellaswag_file="examples.jsonl")
        assert all(message in error for message in messages), error


# ---- weights and checkpoints ---------------------------------------------------------------------

TASKS = [[], ["--prompt", "a"], ["--export", "new"], ["--eval_only"]]


@pytest.mark.parametrize("task", TASKS)
def test_weights_that_cannot_be_loaded_are_named(task):
    hf = json.loads(Path("run/hf/config.json").read_text())
    for name, change in (("relu", {"activation_function": "relu"}), ("other", {"n_embd": 32})):
        shutil.copytree("run/hf", name)
        Path(name, "config.json").write_text(json.dumps(hf | change))
    for damaged in ("config.json", "model.safetensors"):
        shutil.copytree("run/hf", f"damaged_{damaged}")
        Path(f"damaged_{damaged}", damaged).write_bytes(b"\xff damaged")
    Path("no_weights").mkdir()
    shutil.copy("run/hf/config.json", "no_weights")
    folders = "gpt5 data relu other damaged_config.json damaged_model.safetensors no_weights"
    for source in folders.split():
        error = error_of(*task, "--init_from", source)
        assert error.startswith(f"cannot load {source}, expected gpt2, ") and "gpt2-medium" in error


@pytest.mark.parametrize("task", TASKS)
def test_checkpoints_that_cannot_be_loaded_are_named(task, capsys):
    Path("folder").mkdir()
    Path("folder/step_000001.pt").write_bytes(b"\x80 nothing")
    torch.save({"model": {}}, "other_script.pt")
    for source in ("gone.pt", "folder", "folder/step_000001.pt", "other_script.pt"):
        assert "no readable checkpoint" in error_of(*task, "--init_from", source)
        assert f"cannot read {source}" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused():
    error = error_of(init_from="run", block_size=32)
    assert "--block_size 32 must be at most 16" in error
    GPT(GPTConfig(16, 100, 1, 2, 16)).save_pretrained("small")
    error = error_of(init_from="small")
    assert "data" in error and "100" in error
    assert "--vocab_size 100 has no encoding" in error_of("--eval_only", init_from="small")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resume": "nowhere"}, "no step_*.pt in nowhere: give --resume a run's folder"),
        ({"resume": "data"}, "no step_*.pt in data: give --resume a run's folder"),
        ({"resume": "run", "max_steps": 1}, "--resume_anyway"),
        ({"resume": "run", "n_layer": 2}, "a run cannot change its block_size"),
    ],
)
def test_a_run_that_cannot_be_resumed_is_named(changes, message):
    assert message in error_of(**changes)
    if "max_steps" in changes:
        assert "the run has done 2 steps" in error_of("--resume_anyway", **changes)


# ---- folders, and tasks other than training ------------------------------------------------------


def test_a_folder_that_cannot_be_used_is_named():
    Path("log").write_text("in the way")
    assert "cannot write to log/gpt2-001" in error_of()
    for out_dir in (TRAIN, f"{TRAIN}/below"):
        assert f"cannot write to {out_dir}" in error_of(out_dir=out_dir)
    assert "run has a run: add --resume auto, or change --out_dir" in error_of(out_dir="run")


def test_too_little_disk_space_is_named_at_the_start(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
        with pytest.raises(SystemExit, match=r"has 0\.0 GB free.*--keep_checkpoints$"):
            train_gpt2.main(train_gpt2.parse_args(arguments(out_dir="new")))
    Path("new/run.lock").unlink()  # which the traceback still holds
    # the same command works when there is space
    train_gpt2.main(train_gpt2.parse_args(arguments(out_dir="new")))


def no_account(**settings):
    raise RuntimeError("no API key configured\nuse wandb login")


@pytest.mark.parametrize("module", [None, SimpleNamespace(init=no_account)])  # None: not installed
def test_weights_and_biases_that_cannot_be_used_is_named(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(SystemExit, match=r"^--wandb failed; WANDB_MODE=offline .*$"):
        train_gpt2.main(train_gpt2.parse_args(arguments("--wandb", out_dir="new")))


def test_two_tasks_at_once_are_refused():
    for flags in (["--prompt", "a", "--export", "new"], ["--prompt", "a", "--eval_only"]):
        assert "only one of --eval_only, --export and --prompt" in error_of(*flags)


def test_an_export_does_not_overwrite():
    for folder in ("data", "run/hf", TRAIN):
        assert f"{folder} exists" in error_of("--export", folder, "--init_from", "run")
    path = f"{TRAIN}/below"
    assert f"cannot write {path}" in error_of("--export", path, "--init_from", "run")

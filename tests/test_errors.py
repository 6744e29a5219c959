"""What a user can mend is said in one line, before the first step, and nothing is left or lost."""

import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

import fineweb
import train_gpt2
from inference import Task
from train_gpt2 import GPT, Config, main, parse_arguments

SCRIPT = Path(train_gpt2.__file__).resolve()
TINY = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "total_batch_size": 128,
    "micro_batch_size": 4, "max_steps": 2, "data_dir": "data", "device": "cpu", "val_tokens": 160,
    "checkpoint_interval": 1,
}  # fmt: skip
SMALL_MODEL = GPT(Config(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257))


@pytest.fixture(autouse=True)
def folder_with_shards(tmp_path, monkeypatch):
    """An empty working folder with shards of bytes in data/, and no network."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    documents = ["".join(rng.choices("abcdef \n", k=50)) for _ in range(100)]
    fineweb.write_shards(documents, "data", "bytes", val_tokens=1000, workers=1)
    for split in ("train", "val"):  # leaves verified.json, so that no run here has to make it
        fineweb.open_shards("data", split, 257)
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there


def contents() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(Path().rglob("*")) if p.is_file()}


def arguments(**settings) -> list[str]:
    flags = TINY | settings
    return ["shakespeare_char", *(a for k, v in flags.items() for a in (f"--{k}", str(v)))]


def error_of(*flags, **settings) -> str:
    """The line that a run with these flags must end with (text means exit status 1), having
    changed no file and made none."""
    before = contents()
    with pytest.raises(SystemExit) as error:
        main(*parse_arguments([*arguments(**settings), *flags]))
    assert isinstance(error.value.code, str) and len(error.value.code.splitlines()) == 1
    assert contents() == before
    return error.value.code


def command(*args, **env):
    """The script as a user runs it."""
    line, env = [sys.executable, str(SCRIPT), *args], os.environ | env
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=60)


# ---- through real processes ----------------------------------------------------------------------


def test_an_error_is_one_line_and_status_1():
    done = command(*arguments(data_dir="nowhere"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr
    assert "Traceback" not in done.stdout


def test_without_network_the_weights_of_gpt2_are_missed_in_one_line(tmp_path):
    home = str(tmp_path / "hub")
    done = command(*arguments(init_from="gpt2"), HF_HUB_OFFLINE="1", HF_HOME=home)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "hub does not give gpt2" in done.stderr


# ---- the command line ----------------------------------------------------------------------------


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(SystemExit) as error:
        parse_arguments(["gpt3"])
    assert "'gpt3'" in error.value.code and "gpt2-xl" in error.value.code


@pytest.mark.parametrize(
    "flags",
    [["--learning_rate", "1"], ["--max_steps", "many"], ["--lr"], ["--dtype", "int8"], ["surplus"]],
)
def test_unknown_flags_and_wrong_types_exit_with_status_2(flags, capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments(["gpt2", *flags])
    assert error.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_no_preset_means_gpt2_and_flags_keep_their_underscores():
    assert parse_arguments([]) == (Config(), Task())
    config, _ = parse_arguments(["--max_steps", "3", "--no-compile", "--wandb"])
    assert (config.max_steps, config.compile, config.wandb) == (3, False, True)


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_steps", -1), ("max_steps", 0), ("lr", -0.1), ("lr", "nan"), ("lr", "inf"),
        ("n_layer", 0), ("val_interval", -5), ("micro_batch_size", -4), ("val_tokens", -1),
        ("dropout", -0.1), ("dropout", 1.5), ("beta1", 1.0), ("beta2", 1.5),
    ],
)  # fmt: skip
def test_a_number_that_makes_no_sense_is_named(name, value):
    assert f"--{name}" in error_of(**{name: value})


def test_channels_that_heads_do_not_share_evenly_are_named():
    error = error_of(n_embd=16, n_head=3)
    assert "--n_embd 16" in error and "--n_head 3" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_missed_where_there_is_none():
    assert "cuda" in error_of(device="cuda")


# ---- batch arithmetic ----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [100, 8])
def test_a_batch_of_no_whole_number_of_sequences_is_named(tokens):
    assert f"--total_batch_size {tokens}" in error_of(total_batch_size=tokens)


def test_a_batch_that_ranks_do_not_share_evenly_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 ranks" in error_of()


def test_a_micro_batch_that_does_not_divide_the_batch_is_named():
    assert "--micro_batch_size 3" in error_of(micro_batch_size=3)


# ---- data ----------------------------------------------------------------------------------------


def test_missing_shards_are_named_with_the_command_that_makes_them():
    Path("empty").mkdir()
    for folder in ("nowhere", "empty"):
        error = error_of(data_dir=folder)
        assert folder in error and "fineweb.py" in error


def test_missing_validation_shards_are_named():
    Path("data/data_val_000000.npy").unlink()
    assert "no val shards in data" in error_of()


def test_shards_of_another_vocabulary_are_refused_with_the_right_flag():
    assert "--vocab_size 257" in error_of(vocab_size=50257)


def test_shards_too_short_for_a_window_are_named():
    assert "--block_size 4096" in error_of(block_size=4096, total_batch_size=4096 * 4)


def test_a_torn_shard_is_named():
    path = Path("data/data_train_000001.npy")
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in error_of()


def test_without_network_the_vocabulary_of_gpt2_is_missed_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    fineweb.get_encoding.cache_clear()
    Path("words").mkdir()
    for split in ("train", "val"):  # no manifest: as from elsewhere
        tokens = np.arange(2000, dtype=np.uint16)
        np.save(f"words/x_{split}_000000.npy", tokens)
    error = error_of(data_dir="words", vocab_size=50257)
    assert "vocabulary cannot be fetched" in error and "TIKTOKEN_CACHE_DIR" in error


def test_without_network_hellaswag_is_missed_in_one_line():
    error = error_of(hellaswag_interval=1)
    assert "hellaswag_val.jsonl" in error and "by hand" in error


def test_a_damaged_question_is_named():
    Path("data/hellaswag_val.jsonl").write_text('{"ctx": "a"}\n')
    assert "hellaswag_val.jsonl, line 1" in error_of(hellaswag_interval=1)


# ---- weights and checkpoints ---------------------------------------------------------------------


def test_an_unknown_model_is_answered_with_the_known_ones():
    error = error_of(init_from="gpt5")
    assert "'gpt5'" in error and "gpt2-medium" in error
    for task in ({"prompt": "hello"}, {"export": "new"}):
        assert "'gpt5'" in error_of(init_from="gpt5", **task)


@pytest.mark.parametrize("task", [{}, {"prompt": "hello"}, {"export": "new"}])
def test_a_checkpoint_that_is_absent_or_damaged_is_named(task):
    path = Path("step_000001.pt")
    for content in (None, b"", b"\x80 nothing"):
        if content is not None:
            path.write_bytes(content)
        what = "is not there" if content is None else "is damaged"
        assert f"step_000001.pt {what}" in error_of(init_from=path, **task)


@pytest.mark.parametrize("task", [{"prompt": "hello"}, {"export": "new"}])
def test_a_folder_that_is_no_model_is_named(task):
    assert "data holds no GPT-2" in error_of(init_from="data", **task)
    SMALL_MODEL.save_pretrained("small")
    parts = json.loads(Path("small/config.json").read_text())
    for odd in ({"scale_attn_by_inverse_layer_idx": True}, {"n_embd": 32}, {"n_positions": 8}):
        Path("small/config.json").write_text(json.dumps(parts | odd))
        assert "small holds no GPT-2" in error_of(init_from="small", **task)


def test_more_positions_than_the_weights_have_are_refused():
    SMALL_MODEL.save_pretrained("small")
    error = error_of(init_from="small", block_size=32)
    assert "--block_size 32" in error and "16 positions" in error


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "missing"])
def test_an_export_that_cannot_be_read_is_named(damage):
    SMALL_MODEL.save_pretrained("small")
    if damage == "missing":
        Path("small/model.safetensors").unlink()
    else:
        Path("small", damage).write_bytes(b"\xff damaged")
    assert "small" in error_of(init_from="small")


def test_an_export_that_is_no_gpt2_is_named():
    SMALL_MODEL.save_pretrained("small")
    parts = json.loads(Path("small/config.json").read_text())
    Path("small/config.json").write_text(json.dumps(parts | {"activation_function": "relu"}))
    assert "relu" in error_of(init_from="small")


@pytest.mark.parametrize("folder", ["nowhere", "data"])
def test_a_folder_without_checkpoints_cannot_be_resumed(folder):
    assert f"{folder} holds no step_" in error_of(resume=folder)


def test_a_checkpoint_that_cannot_be_read_is_named():
    Path("mine").mkdir()
    Path("mine/step_000001.pt").write_bytes(b"\x80 nothing")
    Path("mine/owner.lock").touch()
    for flags in ({"resume": "mine"}, {"init_from": "mine"}):
        assert "mine/step_000001.pt is damaged" in error_of(**flags)


# ---- instead of training -------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "-"])
def test_an_empty_prompt_is_refused(prompt, monkeypatch):
    for content in (b"", b"\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert "empty" in error_of(prompt=prompt)
        assert "empty" in error_of("--prompt", "hello", prompt=prompt)


@pytest.mark.parametrize(
    "flags", [["--init_from", ""], ["--export="], ["--max_steps", "1", "--out_dir", ""]]
)
def test_a_variable_that_is_not_set_starts_no_run(flags):
    with pytest.raises(SystemExit, match=r"^--\w+=? is empty"):
        parse_arguments(["gpt2", *flags])


def test_an_empty_standard_input_is_one_line_and_status_1():
    SMALL_MODEL.save_pretrained("small")
    for stdin in (subprocess.DEVNULL, "closed"):
        line = [sys.executable, str(SCRIPT), "--prompt", "-", "--init_from", "small"]
        close = None if stdin == subprocess.DEVNULL else functools.partial(os.close, 0)
        pipes = {"stdin": None if close else stdin, "preexec_fn": close}
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, **pipes)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "an empty prompt" in done.stderr


def test_two_tasks_at_once_are_refused():
    assert "--prompt and --export" in error_of(prompt="hello", export="new")
    assert "--prompt and --eval_only" in error_of("--eval_only", prompt="hello")
    assert "--eval_only and --export" in error_of("--eval_only", export="new")


def test_lambada_is_for_eval_only():
    assert "--lambada goes with --eval_only" in error_of(lambada="texts.jsonl")
    assert "--lambada goes with --eval_only" in error_of(lambada="texts.jsonl", prompt="hello")


def test_no_room_for_what_is_printed_is_one_line():
    SMALL_MODEL.save_pretrained("small")
    line = [sys.executable, str(SCRIPT), "--prompt", "a", "--init_from", "small"]
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr


# ---- the run's folder ----------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_named():
    Path("file").write_text("in the way")  # permissions would not stop root
    for out_dir in ("file", "file/below"):
        assert out_dir in error_of(out_dir=out_dir)
    Path("log").write_text("in the way")
    assert "log" in error_of()


def test_a_disk_without_room_for_a_checkpoint_is_found_at_the_start(monkeypatch, tmp_path):
    full = SimpleNamespace(free=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(SystemExit, match="9 bytes free"):
        main(*parse_arguments(arguments(out_dir="mine", sample_interval=0)))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    main(*parse_arguments(arguments(out_dir="mine", sample_interval=0)))  # once there is room


def test_out_dir_on_a_folder_of_a_run_is_refused():
    main(*parse_arguments(arguments(out_dir="mine", val_interval=0, sample_interval=0)))
    assert "--resume auto" in error_of(out_dir="mine")

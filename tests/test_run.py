"""Whole runs of train_gpt2.py, very small ones, each in a folder of its own."""

import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

import fineweb
import train_gpt2
from inference import Task
from runs import (
    CheckpointWriter,
    RunLog,
    checkpoint_paths,
    load_checkpoint,
    newest_checkpoint,
    read_log,
)
from train_gpt2 import GPT, Config, get_lr, main

SCRIPT = Path(train_gpt2.__file__).resolve()
TEXT = "the cat sat on a mat and saw two red birds fly over green hills"
WORDS = TEXT.split()
TINY = Config(
    preset="tiny", n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=257,
    total_batch_size=128, micro_batch_size=4, max_steps=10, lr=1e-2, min_lr=1e-3, warmup_steps=2,
    data_dir="data", device="cpu", dtype="float32", compile=False, val_interval=4, val_tokens=160,
    hellaswag_interval=0, sample_interval=0, checkpoint_interval=4, keep_checkpoints=0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder_with_shards(tmp_path, monkeypatch):
    """An empty working folder with a few hundred short documents in data/, a token a byte."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(3, 30))) + ".\n" for _ in range(300)]
    fineweb.write_shards(documents, "data", "bytes", shard_size=9000, val_tokens=2000, workers=1)


def train(**settings) -> Path:
    """Run TINY so changed in log/tiny-NNN, or out_dir; return the folder."""
    config = replace(TINY, **settings)
    main(config)
    return Path(config.out_dir or max(Path("log").glob("tiny-*")))


def log_lines(folder) -> list[str]:
    return (Path(folder) / "log.txt").read_text().splitlines()


def weights(folder, step) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(folder) / f"step_{step:06d}.pt")["model"]


def error_of(**settings) -> str:
    """The message of the SystemExit that a run must end in: one line."""
    with pytest.raises(SystemExit) as error:
        main(replace(TINY, **settings))
    assert isinstance(error.value.code, str) and len(error.value.code.splitlines()) == 1
    return error.value.code


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# ---- what a run does, and what it leaves ---------------------------------------------------------


def test_a_run_leaves_its_log_configuration_checkpoints_and_export():
    folder = train()
    assert folder == Path("log/tiny-001")
    names = ["config.json", "hf", "log.txt", "owner.json", "owner.lock"]
    names += ["step_000004.pt", "step_000008.pt", "step_000010.pt"]
    assert sorted(p.name for p in folder.iterdir()) == names  # no .tmp among them
    assert all(re.fullmatch(r"\d+ (train|val) \d+\.\d+", line) for line in log_lines(folder))
    assert Config(**json.loads((folder / "config.json").read_text())) == TINY
    for step in (4, 8, 10):  # the number of finished updates
        assert load_checkpoint(folder / f"step_{step:06d}.pt")["step"] == step


def test_validation_comes_every_interval_and_after_the_last_update():
    streams = read_log(train())
    assert streams["train"][0] == list(range(10))
    assert streams["val"][0] == [0, 4, 8, 10]


def test_each_step_and_each_evaluation_prints_one_line(capsys):
    train(sample_interval=5)
    lines = capsys.readouterr().out.splitlines()
    number = r"[\d.,e+-]+"
    pattern = (
        rf"step (\d+)/10 \| loss {number} \| lr {number} \| norm {number} \| {number} ms \| "
        rf"{number} tok/s \| left \d+h\d\dm"
    )
    steps = [match[1] for line in lines if (match := re.fullmatch(pattern, line))]
    assert steps == [str(step) for step in range(10)]
    assert sum("| val " in line for line in lines) == 4
    assert sum("| sample " in line for line in lines) == 3 * 4  # at 0, 5 and 10, four each


def test_transformers_reads_the_export_and_gives_the_last_checkpoints_logits():
    folder = train()
    model = GPT(TINY)
    model.load_state_dict(weights(folder, 10))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf").eval()
    idx = torch.randint(257, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


def test_a_run_says_at_the_start_how_often_it_reads_its_text(capsys):
    train(max_steps=1)
    shards = fineweb.open_shards("data", "train", 257)
    n_windows = sum((len(shard) - 1) // 16 for shard in shards)
    assert f"| {128 / 16 / n_windows:.2f} epochs\n" in capsys.readouterr().out


def test_the_loss_falls():
    streams = read_log(train(max_steps=60))
    assert abs(streams["val"][1][0] - math.log(257)) < 0.2  # at first, every byte is as likely
    assert streams["val"][1][-1] < 2.7  # letters of 15 words
    assert np.mean(streams["train"][1][-10:]) < 2.7


def test_the_same_seed_gives_the_same_losses_and_another_gives_others():
    assert log_lines(train(dropout=0.1)) == log_lines(train(dropout=0.1))
    assert log_lines(train(dropout=0.1, seed=1)) != log_lines("log/tiny-001")


def test_the_micro_batch_size_changes_no_loss():
    whole, pieces = read_log(train(micro_batch_size=8)), read_log(train(micro_batch_size=1))
    for stream in ("train", "val"):
        np.testing.assert_allclose(whole[stream][1], pieces[stream][1], atol=1e-5)


@pytest.mark.parametrize("name", ["val", "hellaswag", "sample", "checkpoint"])
def test_an_interval_of_0_switches_its_thing_off(name, capsys):
    off = dict.fromkeys((f"{n}_interval" for n in ("val", "hellaswag", "sample", "checkpoint")), 0)
    if name == "val":  # then a run needs no held-out text either
        Path("data/data_val_000000.npy").unlink()
    folder = train(max_steps=2, **off)
    assert set(read_log(folder)) == {"train"}
    assert not list(folder.glob("*.pt"))
    assert not re.search(r"\| (val|hella|sample) ", capsys.readouterr().out)


@pytest.mark.parametrize("micro_batch_size", [2, 4, 8])  # ten windows: whole batches, and ragged
def test_the_validation_loss_is_the_mean_over_exactly_val_tokens(micro_batch_size):
    folder = train(micro_batch_size=micro_batch_size, dropout=0.2)  # which has no part in it
    tokens = torch.tensor(np.load("data/data_val_000000.npy").astype(int))  # 2000, of which 160
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf").eval()
    total = 0.0
    for start in range(0, 160, 16):
        with torch.no_grad():
            logits = model(tokens[start : start + 16][None]).logits[0]  # (T, vocab_size)
        total += F.cross_entropy(logits, tokens[start + 1 : start + 17], reduction="sum").item()
    assert read_log(folder)["val"][1][-1] == pytest.approx(total / 160, abs=2e-6)


def test_two_runs_share_no_folder():
    first = train()
    before = contents(first)
    assert train(seed=2) == Path("log/tiny-002")
    assert contents(first) == before


@pytest.mark.parametrize("left", ["*", "step_000004.pt", "log.txt"])
def test_out_dir_is_refused_where_a_run_is_or_was(left):
    train(out_dir="mine")
    for file in Path("mine").iterdir():
        if left != "*" and file.name != left:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    before = contents("mine")
    assert "mine" in error_of(out_dir="mine")
    assert contents("mine") == before


def test_hellaswag_questions_in_the_data_folder_are_asked_while_training():
    rng = random.Random(1)
    wrong = ["\x07\x0b\x07!", "%%%%%%%", "&&&&&&&"]  # bytes that training never shows
    lines = []
    for _ in range(8):
        endings = [" ".join(rng.choices(WORDS, k=1)) + ".", *wrong]
        rng.shuffle(endings)
        label = next(i for i, ending in enumerate(endings) if ending not in wrong)
        lines.append(json.dumps({"ctx": "the cat", "endings": endings, "label": label}))
    Path("data/hellaswag_val.jsonl").write_text("\n".join(lines))
    steps, shares = read_log(train(max_steps=30, hellaswag_interval=20))["hella"]
    assert steps == [0, 20, 30]
    assert shares[0] < shares[-1] == 1.0


@pytest.mark.parametrize("source", ["", "/hf"])
def test_init_from_begins_with_the_weights_of_a_run_or_an_export(source):
    first = train()
    second = train(init_from=f"{first}{source}", n_layer=5, seed=7)  # five layers: not listened to
    assert read_log(second)["val"][1][0] == pytest.approx(read_log(first)["val"][1][-1], abs=2e-6)
    assert load_checkpoint(second / "step_000010.pt")["config"]["n_layer"] == 2


def test_a_prompt_prints_five_continuations_and_trains_nothing(capsys):
    folder = train()
    before = contents(".")
    capsys.readouterr()
    texts = []
    for _ in range(2):
        main(replace(TINY, init_from=str(folder)), Task(prompt=("the cat",)))
        texts.append(capsys.readouterr().out)
    assert texts[0].count("> the cat") == 5
    assert texts[0] == texts[1]  # seeded
    assert contents(".") == before


# ---- checkpoints and resume ----------------------------------------------------------------------


def interrupt(folder, step):
    """Leave of a finished run what a run killed some steps after its checkpoint leaves."""
    shutil.rmtree(folder / "hf")
    for path in folder.glob("step_*.pt"):
        if int(path.stem[5:]) > step:
            path.unlink()
    lines = [line for line in log_lines(folder) if int(line.split()[0]) < step + 2]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("how", ["auto", "log/tiny-001"])
def test_resume_equals_no_interruption_bit_for_bit(how):
    settings = {"dropout": 0.2, "max_steps": 16, "checkpoint_interval": 6, "sample_interval": 3}
    folder = train(**settings)
    lines, final = log_lines(folder), weights(folder, 16)
    optimizer = load_checkpoint(folder / "step_000016.pt")["optimizer"]["state"]
    interrupt(folder, step=6)

    assert train(**settings, resume=how) == folder
    assert log_lines(folder) == lines  # none lost, none twice
    resumed = load_checkpoint(folder / "step_000016.pt")
    assert all(torch.equal(resumed["model"][name], w) for name, w in final.items())
    for i, moments in optimizer.items():
        assert all(torch.equal(resumed["optimizer"]["state"][i][k], m) for k, m in moments.items())


def test_a_run_from_when_the_prompt_was_a_hyperparameter_goes_on():
    folder = train()
    lines = log_lines(folder)
    interrupt(folder, step=4)
    checkpoint = torch.load(folder / "step_000004.pt", weights_only=True)
    checkpoint["config"]["prompt"] = ""
    torch.save(checkpoint, folder / "step_000004.pt")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"prompt": ""}))
    assert train(resume="auto") == folder
    assert log_lines(folder) == lines


def test_resume_auto_begins_anew_where_every_run_has_finished():
    assert train(resume="auto") == Path("log/tiny-001")
    assert train(resume="auto") == Path("log/tiny-002")


def test_resume_auto_with_out_dir_begins_or_continues_it():
    folder = train(out_dir="mine", resume="auto")
    lines = log_lines(folder)
    interrupt(folder, step=4)
    train(out_dir="mine", resume="auto")
    assert log_lines(folder) == lines
    assert not Path("log").exists()


@pytest.mark.parametrize(
    "changed",
    [{"lr": 0.02}, {"total_batch_size": 256}, {"seed": 7, "beta2": 0.9}, {"block_size": 8}, "data"],
)
def test_what_would_change_the_experiment_is_refused_without_resume_anyway(changed, capsys):
    folder = train()
    interrupt(folder, step=4)
    settings = {} if changed == "data" else changed
    if changed == "data":  # other shards under the same path
        shutil.rmtree("data")
        fineweb.write_shards([TEXT] * 300, "data", "bytes", val_tokens=2000, workers=1)
    before = contents(folder)
    capsys.readouterr()
    error = error_of(resume="auto", **settings)
    said = capsys.readouterr().out
    for name in settings or ["data"]:
        assert name in error and re.search(rf"^  {name} .* changes the experiment$", said, re.M)
    assert "--resume_anyway" in error and contents(folder) == before
    train(resume="auto", resume_anyway=True, **settings)
    assert read_log(folder)["train"][0] == list(range(10))


def test_a_resumed_run_takes_its_hyperparameters_and_keeps_its_moments():
    folder = train()
    interrupt(folder, step=8)
    changed = {"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.3, "beta1": 0.5}
    train(resume="auto", resume_anyway=True, **changed)
    then, now = (load_checkpoint(folder / f"step_{n:06d}.pt") for n in (8, 10))
    for group, decay in zip(now["optimizer"]["param_groups"], (0.3, 0.0), strict=True):
        assert (group["weight_decay"], group["betas"][0], group["lr"]) == (decay, 0.5, 0.0)
    assert now["optimizer"]["state"][0]["step"] == 10
    # at a rate of 0 nothing but the moments changes
    assert all(torch.equal(w, now["model"][name]) for name, w in then["model"].items())
    assert now["config"]["beta1"] == 0.5


def test_what_changes_no_loss_is_taken_and_said(capsys):
    losses = read_log(train())
    interrupt(Path("log/tiny-001"), step=4)
    os.rename("data", "moved")
    settings = {"micro_batch_size": 8, "val_interval": 5, "checkpoint_interval": 3}
    capsys.readouterr()
    folder = train(resume="auto", data_dir="moved", **settings)
    said = capsys.readouterr().out
    for name in (*settings, "data_dir"):
        assert re.search(rf"^  {name} .* changes no loss: taken$", said, flags=re.MULTILINE)
    assert said.count("taken") == 4
    resumed = read_log(folder)
    assert resumed["val"][0] == [0, 5, 10]
    np.testing.assert_allclose(resumed["train"][1], losses["train"][1], atol=1e-5)


@pytest.mark.parametrize("name, value", [("n_layer", 3), ("n_head", 4), ("n_embd", 64)])
def test_a_run_keeps_its_network(name, value):
    folder = train()
    interrupt(folder, step=4)
    before = contents(folder)
    error = error_of(resume="auto", resume_anyway=True, **{name: value})
    assert f"--{name} {getattr(TINY, name)}" in error
    assert contents(folder) == before


def test_a_run_that_is_past_max_steps_is_told():
    folder = train()
    assert "--max_steps 6" in error_of(resume=str(folder), resume_anyway=True, max_steps=6)
    train(resume=str(folder), resume_anyway=True, max_steps=14)  # but it may go further
    assert read_log(folder)["train"][0] == list(range(14))


def test_a_checkpoint_of_another_version_is_told():
    folder = train()
    path = folder / "step_000010.pt"
    checkpoint = load_checkpoint(path)
    torch.save(checkpoint | {"config": checkpoint["config"] | {"n_experts": 8}}, path)
    assert "n_experts" in error_of(resume=str(folder))


def test_resume_with_another_micro_batch_size_gives_the_same_losses():
    folder = train()
    losses = read_log(folder)
    interrupt(folder, step=4)
    resumed = read_log(train(resume="auto", micro_batch_size=2))
    for stream in ("train", "val"):
        np.testing.assert_allclose(resumed[stream][1], losses[stream][1], atol=1e-5)


def flip_a_bit(path):
    """In the middle of the weights, where nothing but a checksum can tell."""
    content = bytearray(path.read_bytes())
    weight = load_checkpoint(path)["model"]["transformer.h.0.mlp.c_fc.weight"]
    content[content.index(weight.numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not a checkpoint"),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-5000]),
    "flipped": flip_a_bit,
    "of another program": lambda path: torch.save({"weights": torch.ones(3)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, capsys):
    folder = train()
    lines, final = log_lines(folder), weights(folder, 10)
    interrupt(folder, step=8)
    DAMAGE[damage](folder / "step_000008.pt")
    train(resume="auto")
    said = capsys.readouterr().out
    assert f"{folder}/step_000008.pt is damaged" in said and "from step 4 " in said
    assert log_lines(folder) == lines
    assert all(torch.equal(weights(folder, 10)[name], w) for name, w in final.items())


def test_every_single_flipped_bit_is_found_or_changes_nothing():
    w = torch.arange(9.0)
    parts = {"model": {"w": w}, "optimizer": {}, "scaler": {}, "step": 3, "config": {}, "data": ""}
    torch.save(parts, "small.pt")
    whole, found = Path("small.pt").read_bytes(), 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        Path("flipped.pt").write_bytes(flipped)
        try:
            read = load_checkpoint(Path("flipped.pt"))
        except ValueError:
            found += 1
            continue
        assert read["step"] == 3 and torch.equal(read["model"]["w"], w)
    assert found > 2000  # much of so small a file is padding


def test_checkpoints_that_are_all_damaged_end_in_one_line():
    folder = train()
    interrupt(folder, step=8)
    for path in folder.glob("step_*.pt"):
        path.write_bytes(b"damaged")
    before = contents(folder)
    assert "remove them" in error_of(resume="auto")
    assert contents(folder) == before


def test_a_checkpoint_holds_plain_data_only():
    def check(part):
        if isinstance(part, dict | list | tuple):
            for inner in part.values() if isinstance(part, dict) else part:
                check(inner)
        else:
            assert type(part) in (torch.Tensor, int, float, str, bool, type(None)), type(part)

    checkpoint = torch.load(train() / "step_000010.pt", weights_only=True)
    check(checkpoint)
    assert checkpoint["config"]["lr"] == 1e-2


def test_a_write_that_breaks_leaves_the_earlier_checkpoint_alone(monkeypatch):
    def save(checkpoint, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    folder = train()
    before = (folder / "step_000010.pt").read_bytes()
    monkeypatch.setattr(torch, "save", save)
    part = SimpleNamespace(state_dict=dict)
    writer = CheckpointWriter(folder, TINY, "")
    writer.save(10, part, part, part)
    writer.wait()
    assert writer.failure == "disk full" and not list(folder.glob("*.tmp"))
    assert (folder / "step_000010.pt").read_bytes() == before
    assert newest_checkpoint(folder)[0] == folder / "step_000010.pt"


def test_a_run_outlives_a_disk_that_takes_no_checkpoint_and_saves_when_it_can(monkeypatch, capsys):
    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

    def step_by_step(step, config):
        limit(100_000 if 10 <= step < 16 else resource.RLIM_INFINITY)  # a checkpoint has 440,000
        return get_lr(step, config)

    settings = {"checkpoint_interval": 3, "keep_checkpoints": 1, "max_steps": 20}
    lines = log_lines(train(**settings))
    capsys.readouterr()
    monkeypatch.setattr(train_gpt2, "get_lr", step_by_step)
    seen = []
    monkeypatch.setattr(train_gpt2, "print0", lambda text: seen.append((text, files())))

    def files():
        return sorted(path.name for path in Path("log").glob("tiny-002/step_*"))

    folder = train(**settings)
    steps = [(text, names) for text, names in seen if "| loss" in text]
    said = [i for i, (text, _) in enumerate(steps) if "not written: File too large" in text]
    assert {13, 14, 15} <= set(said) <= set(range(9, 19)), said  # writing takes a step or more
    assert all(any(name.endswith(".pt") for name in names) for _, names in steps[9:])
    assert [path.name for path in checkpoint_paths(folder)] == ["step_000020.pt"]
    assert log_lines(folder) == lines


def test_lines_that_a_full_disk_did_not_take_come_later():
    folder = train()
    log = RunLog(folder, TINY, first_step=4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.size + 9, resource.RLIM_INFINITY))
    try:
        log.write(4, "train", 1.5)  # "4 train 1" fits
        log.write(5, "train", 2.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert read_log(folder)["train"][0] == [0, 1, 2, 3]
    log.write(6, "train", 3.5)
    assert log_lines(folder)[-3:] == ["4 train 1.500000", "5 train 2.500000", "6 train 3.500000"]


def test_an_export_that_breaks_leaves_the_run_unfinished():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        assert "--resume log/tiny-001" in error_of(checkpoint_interval=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert not Path("log/tiny-001/hf").exists()
    assert train(resume="auto") == Path("log/tiny-001")
    transformers.GPT2LMHeadModel.from_pretrained("log/tiny-001/hf")


@pytest.mark.parametrize("line", ["4 train", "x train 1.0", "4 train one", "\0\xff", "4  train 1"])
def test_a_damaged_line_of_the_log_is_named_and_nothing_is_written(line):
    folder = train()
    interrupt(folder, step=4)
    path = folder / "log.txt"
    path.write_text("0 train 5.5\n" + line + "\n")
    before = contents(folder)
    assert f"{path}, line 2" in error_of(resume="auto")
    assert contents(folder) == before


def test_a_last_line_that_was_cut_off_is_dropped():
    folder = train()
    lines = log_lines(folder)
    interrupt(folder, step=4)
    with open(folder / "log.txt", "a") as file:
        file.write("5 tra")
    train(resume="auto")
    assert log_lines(folder) == lines


def test_training_goes_on_while_a_checkpoint_is_written(monkeypatch):
    written, save = threading.Event(), torch.save

    def slow(checkpoint, path):
        assert written.wait(60), "the next step never came"
        save(checkpoint, path)

    def step_6(step, config):  # asked for while the checkpoint of step 4 is being written
        if step == 6:
            written.set()
        return get_lr(step, config)

    whole = train(checkpoint_interval=4)
    monkeypatch.setattr(torch, "save", slow)
    monkeypatch.setattr(train_gpt2, "get_lr", step_6)
    folder = train(checkpoint_interval=4)
    # and it holds the weights of its own step, not those that came meanwhile
    assert all(torch.equal(weights(folder, 4)[name], w) for name, w in weights(whole, 4).items())


@pytest.mark.parametrize(
    "keep, archive, left",
    [(1, 0, [10]), (2, 0, [8, 10]), (2, 4, [4, 8, 10]), (1, 6, [6, 10]), (0, 0, [2, 4, 6, 8, 10])],
)
def test_the_last_checkpoints_stay_and_those_of_the_archive(keep, archive, left):
    folder = train(checkpoint_interval=2, keep_checkpoints=keep, archive_interval=archive)
    assert [int(path.stem[5:]) for path in checkpoint_paths(folder)] == left


def test_checkpoints_are_in_the_order_of_their_steps_however_many(tmp_path):
    for name in ("step_1000000.pt", "step_000250.pt", "step_999999.pt", "step_x.pt", "step_.pt"):
        (tmp_path / name).touch()
    steps = [int(path.stem[5:]) for path in checkpoint_paths(tmp_path)]
    assert steps == [250, 999_999, 1_000_000]


def test_tied_weights_take_the_room_of_one():
    folder = train()
    model = GPT(TINY)
    n_bytes = 12 * sum(p.numel() for p in model.parameters())  # weights and AdamW's two moments
    assert n_bytes < (folder / "step_000010.pt").stat().st_size < 1.25 * n_bytes


def test_a_run_may_go_on_in_another_precision():
    folder = train()
    interrupt(folder, step=4)
    train(resume="auto", dtype="float16")
    assert load_checkpoint(folder / "step_000010.pt")["scaler"]["scale"] > 0
    interrupt(folder, step=8)
    train(resume="auto")
    assert read_log(folder)["train"][0] == list(range(10))


def test_what_a_killed_process_left_half_written_is_removed():
    folder = train()
    interrupt(folder, step=4)
    (folder / "step_000008.tmp").write_bytes(b"half")
    train(resume="auto")
    assert not list(folder.glob("*.tmp"))


# ---- losses that are not finite, and spikes ------------------------------------------------------


def inject_nan(monkeypatch, steps):
    """Make the losses of these steps nan; two micro-steps a step, val_interval=0."""
    forward, count = GPT.forward, itertools.count()

    def fails(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        return logits, loss * math.nan if next(count) // 2 in steps else loss

    monkeypatch.setattr(GPT, "forward", fails)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(dtype, monkeypatch, capsys):
    whole = train(val_interval=0, checkpoint_interval=1, dtype=dtype)
    inject_nan(monkeypatch, {5, 6, 8})
    folder = train(val_interval=0, checkpoint_interval=1, dtype=dtype)
    said = capsys.readouterr().out
    for step, count in ((5, 1), (6, 2), (8, 1)):
        assert f"step {step}/10 | loss nan" in said
        assert re.search(rf"step {step}/10 .* \| update skipped, {count} in a row$", said, re.M)
    streams = read_log(folder)
    assert streams["skipped"] == ([5, 6, 8], [1, 2, 1])
    assert streams["train"][1][:5] == read_log(whole)["train"][1][:5]
    before, after = weights(folder, 5), weights(folder, 8)  # but for step 7, nothing came between
    assert all(torch.equal(weights(whole, 5)[name], w) for name, w in before.items())
    assert load_checkpoint(folder / "step_000010.pt")["optimizer"]["state"][0]["step"] == 7
    assert all(w.isfinite().all() for w in weights(folder, 10).values())
    assert not all(torch.equal(after[name], w) for name, w in before.items())
    assert math.isfinite(streams["train"][1][9])


def test_a_skipped_update_leaves_every_weight_and_moment_as_it_was(monkeypatch):
    inject_nan(monkeypatch, {5})
    folder = train(val_interval=0, checkpoint_interval=5, max_steps=6)
    before = load_checkpoint(folder / "step_000005.pt")
    assert not (folder / "step_000006.pt").exists()  # weights that give no loss are not kept
    main(replace(TINY, max_steps=5, val_interval=0, checkpoint_interval=5, out_dir="five"))
    model = GPT(TINY)
    model.load_state_dict(before["model"])
    exported = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf")
    assert torch.equal(exported.transformer.wpe.weight, model.transformer.wpe.weight)


def test_too_many_in_a_row_end_the_run_with_losses_and_windows(monkeypatch, capsys):
    inject_nan(monkeypatch, {2, 3, 5, 6, 7})
    settings = {"val_interval": 0, "checkpoint_interval": 2, "max_bad_steps": 3}
    error = error_of(**settings)
    assert "step 7" in error and "--resume log/tiny-001" in error and "--lr" in error
    said = capsys.readouterr().out
    losses = read_log("log/tiny-001")["train"][1]
    tail = " ".join(f"{loss:.4f}" for loss in losses if math.isfinite(loss))
    assert f"step 7/10 | the losses before: {tail}\n" in said
    # the windows it names hold what get_batch gave to the step
    windows = train_gpt2.Windows("data", "train", 16, 257)
    batches = [train_gpt2.get_batch(windows, TINY, 7, m)[0] for m in range(2)]
    rows = {tuple(row.tolist()) for x in batches for row in x}
    named = set()
    for file, starts in re.findall(r"^  (\S+): tokens from ([\d, ]+)$", said, flags=re.MULTILINE):
        tokens = np.load(file)
        named |= {tuple(tokens[int(s) : int(s) + 16].tolist()) for s in starts.split(",")}
    assert named == rows and len(rows) == 8
    newest = checkpoint_paths(Path("log/tiny-001"))[-1]
    assert newest.name == "step_000002.pt"  # from before the nan, since none was due in between
    train(resume="auto", **settings, resume_anyway=True, lr=1e-3)


def test_a_learning_rate_far_too_high_ends_in_one_line():
    assert "lower --lr" in error_of(lr=1e30, min_lr=1e30, max_bad_steps=3)


def test_a_spike_is_told_and_logged_also_after_resuming(monkeypatch, capsys):
    forward, spikes = GPT.forward, {150, 185}
    step = {"now": 0}

    def high(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        return logits, loss + 3 if step["now"] in spikes else loss

    def noted(now, config):
        step["now"] = now
        return get_lr(now, config)

    monkeypatch.setattr(GPT, "forward", high)
    monkeypatch.setattr(train_gpt2, "get_lr", noted)
    settings = {"max_steps": 200, "val_interval": 0, "checkpoint_interval": 180}
    folder = train(**settings)
    assert re.findall(r"step (\d+)/.* \| spike$", capsys.readouterr().out, re.M) == ["150", "185"]
    assert read_log(folder)["spike"][0] == [150, 185]
    lines = log_lines(folder)
    interrupt(folder, step=180)
    train(**settings, resume="auto")  # five steps alone would be too few to tell a spike
    assert log_lines(folder) == lines


# ---- several ranks -------------------------------------------------------------------------------


def test_two_processes_equal_one():
    # 16 sequences a step: 8 micro-steps of one process, 4 of each of two
    settings = {"total_batch_size": 256, "micro_batch_size": 2, "max_steps": 20, "lr": 1e-3}
    questions = '{"ctx": "the cat", "endings": ["sat", "mat", "fly", "%%%"], "label": 1}\n' * 3
    Path("data/hellaswag_val.jsonl").write_text(questions)
    one = read_log(train(**settings, hellaswag_interval=10))
    script = (
        "from train_gpt2 import *\nimport json\n"
        "if __name__ == '__main__': main(Config(**json.loads(open('c.json').read())))\n"
    )
    Path("two.py").write_text(script)
    config = replace(TINY, **settings, hellaswag_interval=10, out_dir="two")
    Path("c.json").write_text(json.dumps(vars(config)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([*command, "two.py"], env=env, capture_output=True, text=True, timeout=99)
    assert done.returncode == 0, done.stderr

    two = read_log("two")
    assert two.keys() == one.keys() == {"train", "val", "hella"}
    for stream in one:
        assert two[stream][0] == one[stream][0]  # every step once
        np.testing.assert_allclose(two[stream][1], one[stream][1], atol=1e-5)
    printed = re.findall(r"^step (\d+)/20 \| loss", done.stdout, flags=re.MULTILINE)
    assert printed == [str(step) for step in range(20)]  # by one rank
    assert "2 ranks x 4 micro-steps" in done.stdout


# ---- Weights & Biases ----------------------------------------------------------------------------


def wandb_records(file):
    """The records of an offline run: pieces behind 4 bytes of checksum, 2 of length and 1 of kind,
    none across a border of 32 KiB (LevelDB's log format, after a header of 7 bytes)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 2**15 - at % 2**15) < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


def test_weights_and_biases_gets_what_the_log_gets(monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = train(wandb=True, sample_interval=5)
    wandb.finish()
    [file] = Path("wandb").glob("offline-run-*/*.wandb")
    for _ in range(300):  # finish() may return before the file has all of it
        records = list(wandb_records(file))
        if any(record.HasField("exit") for record in records):
            break
        time.sleep(0.1)
    config, history = {}, []
    for record in records:
        config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        items = record.history.item
        history.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    assert config["n_layer"] == 2 and config["lr"] == 1e-2
    for stream, (steps, values) in read_log(folder).items():
        sent = [(row["_step"], row[stream]) for row in history if stream in row]
        assert [step for step, _ in sent] == steps
        np.testing.assert_allclose([value for _, value in sent], values, atol=1e-6)
    assert sum(any("samples" in name for name in row) for row in history) == 3


@pytest.mark.parametrize("failing", ["init", "log"])
def test_a_run_goes_on_where_weights_and_biases_fails(failing, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")

    def fail(*args, **settings):
        raise RuntimeError("no network")

    init = fail if failing == "init" else lambda **settings: SimpleNamespace(log=fail)
    monkeypatch.setattr(wandb, "init", init)
    folder = train(wandb=True)
    assert log_lines(folder) == log_lines(train())
    assert capsys.readouterr().out.count("no network") == 1


def test_a_run_that_does_not_ask_for_it_imports_none_of_what_it_does_not_need():
    names = ["wandb", "datasets", "matplotlib", "huggingface_hub", "transformers"]
    code = (
        "import json, sys; from train_gpt2 import *; "
        "main(Config(**json.loads(sys.argv[1]))); "
        f"assert not {{*sys.modules}} & {{*{names}}}, {{*sys.modules}} & {{*{names}}}"
    )
    command = [sys.executable, "-c", code, json.dumps(vars(replace(TINY, max_steps=1)))]
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

"""Tests of train_gpt2.py. They compare with numpy, one process with two, and one
run with one that is resumed."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_gpt2
from train_gpt2 import Config, DataLoaderLite, GPTConfig

ROOT = os.path.dirname(train_gpt2.__file__)
SMALL = {
    "gpt": GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=32),
    "total_batch_size": 8 * 16, "micro_batch_size": 2, "max_steps": 5, "warmup_steps": 2,
    "val_interval": 2, "val_tokens": 7 * 16,
    "hellaswag_interval": 2, "hellaswag_file": "questions.jsonl", "out_dir": "log",
    "log_interval": 1,
}  # fmt: skip


def write_shards(folder, sizes, vocab_size=2**16):
    """Consecutive numbers as tokens; the first shard is for validation. Returns the shards."""
    tokens = (np.arange(sum(sizes)) % vocab_size).astype(np.uint16)
    shards = np.split(tokens, np.cumsum(sizes)[:-1])
    for i, shard in enumerate(shards):
        np.save(folder / f"data_{'train' if i else 'val'}_{i:06d}.npy", shard)
    return shards


def test_every_sequence_is_read_once_per_epoch(tmp_path):
    config = Config(GPTConfig(block_size=8), data_dir=tmp_path, total_batch_size=2 * 2 * 3 * 8)
    _, *train = write_shards(tmp_path, [100, 203, 97, 5, 150])
    expected = [tokens[i] for tokens in train for i in range(0, len(tokens) - 8, 8)]
    loaders = [DataLoaderLite(config, "train", 3, rank, 2) for rank in range(2)]
    first_tokens = []
    for step in range(12):
        for micro_step in range(2):
            for loader in loaders:
                x, y = loader.batch(step, micro_step)
                assert x.shape == y.shape == (3, 8)
                assert (x - x[:, :1] == np.arange(8)).all(), "a sequence is in one shard"
                assert (y == x + 1).all()
                first_tokens += x[:, 0].tolist()
    n = len(expected)
    first, second = first_tokens[:n], first_tokens[n : 2 * n]
    assert len(second) == n
    assert sorted(first) == sorted(second) == expected
    assert expected != first != second, "the order is random, and a new one for each epoch"


def run(folder, ranks=1, **changes):
    """Trains in new processes. Returns what it prints after "loss", "val" and "hella"."""
    folder.mkdir(exist_ok=True)
    question = {"ctx": "One, two,", "endings": ["three", "four", "2", "2, 2"]}
    questions = [question | {"label": i % 4} for i in range(5)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    script = "from dataclasses import replace\nfrom train_gpt2 import *\n"
    script += f"train(replace(DEMO, **{SMALL | changes}))\n"
    (folder / "run.py").write_text(script)
    env = os.environ | {"PYTHONPATH": ROOT, "CUDA_VISIBLE_DEVICES": ""}
    torchrun = f"torch.distributed.run --standalone --nproc_per_node {ranks} run.py".split()
    out = subprocess.check_output([sys.executable, "-m", *torchrun], cwd=folder, env=env, text=True)
    return [list(map(float, re.findall(rf"{w} (\d\S+)", out))) for w in ("loss", "val", "hella")]


def test_two_ranks_have_the_losses_of_one(tmp_path):
    write_shards(tmp_path, [200, 500, 900], vocab_size=257)
    one = run(tmp_path / "one", data_dir=str(tmp_path))
    two = run(tmp_path / "two", ranks=2, data_dir=str(tmp_path))
    assert [len(losses) for losses in one] == [5, 4, 4], "also evaluated after the last update"
    for losses, expected in zip(two, one, strict=True):
        assert losses == pytest.approx(expected, abs=2e-4)  # printed with four digits


def test_a_resumed_run_has_the_same_losses_and_weights(tmp_path):
    write_shards(tmp_path, [200, 500, 900], vocab_size=257)
    changes = {"data_dir": str(tmp_path), "checkpoint_interval": 2, "keep_checkpoints": 0}
    losses, *_ = run(tmp_path / "run", **changes)
    checkpoints = sorted((tmp_path / "run" / "log").glob("step_*.pt"))
    assert [path.stem for path in checkpoints] == ["step_000002", "step_000004", "step_000005"]
    expected = torch.load(checkpoints[-1], weights_only=True)["model"]
    for path in checkpoints[1:]:
        path.unlink()
    resumed_losses, *_ = run(tmp_path / "run", **changes, resume="auto")
    assert resumed_losses == losses[2:]
    weights = torch.load(checkpoints[-1], weights_only=True)["model"]
    assert all(torch.equal(weights[name], w) for name, w in expected.items())
    log = (tmp_path / "run" / "log" / "log.txt").read_text().splitlines()
    steps = [int(line.split()[0]) for line in log if "train" in line]
    assert steps == [0, 1, 2, 3, 4], "repeated steps replace the old ones"

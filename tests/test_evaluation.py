"""Validation: the same tokens for any number of GPUs, and all of them once."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import fineweb
import hellaswag
from fineweb import write_shards
from train_gpt2 import GPT, Config, Windows, main, validation_loss

CONFIG = Config(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=257, val_tokens=16 * 21)


def val_windows(folder):
    documents = (f"{i * i} apples and {i} pears, {i % 7} of them ripe." for i in range(200))
    write_shards(documents, folder, "bytes", val_tokens=1000, workers=1)
    return Windows(folder, "val", CONFIG.block_size, CONFIG.vocab_size)


@pytest.mark.parametrize("B", [1, 4, 21, 64])  # 21 windows: ragged last batches, and a lone one
def test_validation_is_the_mean_over_its_tokens(tmp_path, B):
    torch.manual_seed(0)
    windows, model = val_windows(tmp_path), GPT(CONFIG)
    config = replace(CONFIG, micro_batch_size=B)
    losses = []
    for i in range(21):
        tokens = torch.from_numpy(windows[i].astype("int64"))
        logits, _ = model(tokens[None, :-1])
        losses.append(F.cross_entropy(logits[0], tokens[1:]).item())
    assert math.isclose(
        validation_loss(model, model, windows, config), sum(losses) / 21, rel_tol=1e-5
    )


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_out_the_same_tokens(tmp_path, world_size):
    torch.manual_seed(0)
    windows, model = val_windows(tmp_path), GPT(CONFIG)
    config = replace(CONFIG, micro_batch_size=4)
    whole = validation_loss(model, model, windows, config)
    # without a process group nothing is summed: each rank's part of the mean
    parts = [
        validation_loss(model, model, windows, config, rank, world_size)
        for rank in range(world_size)
    ]
    assert math.isclose(sum(parts), whole, rel_tol=1e-6)


@pytest.mark.parametrize("n_batches", [0, 2, 100])
def test_an_evaluation_asks_before_each_batch_whether_to_stop(tmp_path, n_batches):
    windows, model = val_windows(tmp_path), GPT(CONFIG)
    batches, asked = [], []
    model.transformer.ln_f.register_forward_hook(lambda *_: batches.append(1))
    example = {"ctx": "12", "endings": ["5", "6", "7", "8"], "label": 0}

    def stop():
        asked.append(1)
        return len(asked) > n_batches

    validation_loss(model, model, windows, replace(CONFIG, micro_batch_size=4), stop=stop)
    assert len(batches) == min(n_batches, 6)  # of 21 windows
    assert len(asked) == min(n_batches + 1, 6)
    batches.clear()
    asked.clear()
    questions = hellaswag.prepare([example] * 11, fineweb.get_encoding("bytes"), 16)
    counts = hellaswag.evaluate(model, questions, batch_size=2, stop=stop)
    assert len(batches) == min(n_batches, 6)
    assert len(asked) == min(n_batches + 1, 6)
    assert counts.num_total == min(2 * n_batches, 11)


def test_hellaswag_in_a_run_counts_every_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    val_windows("data")
    example = {"ctx": "12 pears,", "endings": ["5 of them", "xyz", "#!", "so"], "label": 0}
    lines = (json.dumps(example | {"label": i % 4}) + "\n" for i in range(8))
    (tmp_path / "data" / "hellaswag_val.jsonl").write_text("".join(lines))
    settings = {"data_dir": "data", "device": "cpu", "compile": False, "max_steps": 2}
    settings |= {"total_batch_size": 64, "val_interval": 0, "sample_interval": 0}
    main(replace(CONFIG, **settings))
    # whatever a model of bytes prefers, it is right for two of the eight labels
    assert capsys.readouterr().out.count("| hella 0.2500") == 2  # before and after

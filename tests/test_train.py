"""Tests of train_gpt2.py. What they expect is computed with numpy."""

import numpy as np

import train_gpt2
from train_gpt2 import DataLoaderLite


def write_shards(folder, sizes):
    """Consecutive numbers as tokens; the first shard is for validation. Returns the shards."""
    shards = np.split(np.arange(sum(sizes), dtype=np.uint16), np.cumsum(sizes)[:-1])
    for i, shard in enumerate(shards):
        np.save(folder / f"data_{'train' if i else 'val'}_{i:06d}.npy", shard)
    return shards


def test_every_sequence_is_read_once_per_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "data_dir", tmp_path)
    monkeypatch.setattr(train_gpt2, "total_batch_size", 2 * 2 * 3 * 8)  # 12 sequences
    _, *train = write_shards(tmp_path, [100, 203, 97, 5, 150])
    expected = [tokens[i] for tokens in train for i in range(0, len(tokens) - 8, 8)]
    loaders = [DataLoaderLite("train", 3, 8, rank, 2) for rank in range(2)]
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

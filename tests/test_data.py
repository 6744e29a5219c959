"""Batches: whatever asks for them, they are the text."""

import urllib.request

import pytest
import tiktoken
import torch

from train_gpt2 import Config, get_batch, load_tokens


def config(**changes):
    return Config(**{"block_size": 8, "micro_batch_size": 4, "total_batch_size": 32} | changes)


def test_y_is_x_moved_by_one():
    x, y = get_batch(torch.arange(100), config(), step=0, micro_step=0)
    assert x.tolist()[0] == [0, 1, 2, 3, 4, 5, 6, 7] and x.shape == (4, 8)
    assert torch.equal(x + 1, y)


def test_steps_follow_the_text_and_start_over_at_its_end():
    tokens = torch.arange(83)  # 10 windows of 8 + 1, and 2 tokens that are never an input
    starts = [get_batch(tokens, config(), step, 0)[0][:, 0].tolist() for step in range(5)]
    assert sum(starts, []) == [8 * (i % 10) for i in range(20)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("B", [1, 2, 3])
def test_ranks_and_micro_steps_share_out_the_windows_of_a_step(world_size, B):
    # 144 windows a step from a text of 41: each step starts over somewhere within
    tokens, W = torch.arange(8 * 41 + 1), 144
    parts = config(micro_batch_size=B, total_batch_size=8 * W)
    for step in range(5):
        rows = [
            get_batch(tokens, parts, step, micro_step, rank, world_size)[0]
            for micro_step in range(W // (B * world_size))
            for rank in range(world_size)
        ]
        first = [8 * (i % 41) for i in range(step * W, (step + 1) * W)]
        assert sorted(torch.cat(rows)[:, 0].tolist()) == sorted(first)


def test_a_batch_depends_on_its_arguments_alone():
    tokens = torch.arange(1000)
    forwards = [get_batch(tokens, config(), step, 0) for step in range(40)]
    backwards = [get_batch(tokens, config(), step, 0) for step in reversed(range(40))]
    for (x, y), (x2, y2) in zip(forwards, reversed(backwards), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_no_network_names_the_address_and_the_file(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise OSError("unreachable")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    encoding = tiktoken.Encoding(
        "bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={},
    )
    with pytest.raises(SystemExit, match="no input.txt .*tinyshakespeare/input.txt") as error:
        load_tokens(encoding)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    (tmp_path / "input.txt").write_text("Thou")
    assert load_tokens(encoding).tolist() == list(b"Thou")

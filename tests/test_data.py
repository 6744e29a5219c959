"""Batches: whatever asks for them, they are the text."""

import urllib.request

import pytest
import tiktoken
import torch

from train_gpt2 import get_batch, load_tokens


def test_y_is_x_moved_by_one():
    x, y = get_batch(torch.arange(100), step=0, B=4, T=8)
    assert x.tolist()[0] == [0, 1, 2, 3, 4, 5, 6, 7] and x.shape == (4, 8)
    assert torch.equal(x + 1, y)


def test_steps_follow_the_text_and_start_over_at_its_end():
    tokens = torch.arange(83)  # 10 windows of 8 + 1, and 2 tokens that are never an input
    starts = [get_batch(tokens, step, B=4, T=8)[0][:, 0].tolist() for step in range(5)]
    assert sum(starts, []) == [8 * (i % 10) for i in range(20)]


def test_a_batch_depends_on_its_step_alone():
    tokens = torch.arange(1000)
    forwards = [get_batch(tokens, step, B=4, T=8) for step in range(40)]
    backwards = [get_batch(tokens, step, B=4, T=8) for step in reversed(range(40))]
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

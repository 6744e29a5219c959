"""Batches: whatever asks for them, they are the text."""

import urllib.request

import pytest
import tiktoken
import torch

from train_gpt2 import get_batch, load_tokens


def test_y_is_x_moved_by_one():
    tokens = torch.arange(100)
    x, y = get_batch(tokens, B=4, T=8)
    assert x.tolist()[0] == [0, 1, 2, 3, 4, 5, 6, 7] and x.shape == (4, 8)
    assert torch.equal(x + 1, y)


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

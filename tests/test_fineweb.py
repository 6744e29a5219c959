"""Tests of fineweb.py. What they expect is computed with tiktoken's own functions."""

import numpy as np
import pytest
import tiktoken

import fineweb

# several bytes per character, a carriage return, and an end-of-text that is ordinary text
DOCUMENTS = ["Hello, world\n", "größer\r\n", "🙂" * 50, "a <|endoftext|> b", " ", "x" * 1000]


def test_tokens_are_those_of_tiktoken():
    try:
        enc = tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(f"GPT-2's vocabulary is not available: {error}")
    tokens, n_skipped = fineweb.tokenize([*DOCUMENTS, None, ""], "gpt2")
    assert n_skipped == 2
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [t for text in DOCUMENTS for t in [50256, *enc.encode_ordinary(text)]]


def test_tokens_of_bytes_are_the_bytes():
    tokens, _ = fineweb.tokenize(DOCUMENTS, "bytes")
    assert tokens.tolist() == [t for text in DOCUMENTS for t in [256, *text.encode()]]


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path):
    files = [tmp_path / f"{i:03d}.txt" for i in range(300)]  # three batches
    for i, file in enumerate(files):
        file.write_text(f"Document {i}: " + "some words, " * (i % 37))
    expected = [t for file in files for t in [256, *file.read_bytes()]]
    for workers in (1, 3):
        out = tmp_path / str(workers)
        settings = {"encoding": "bytes", "shard_size": 5000, "val_tokens": 250}
        config = fineweb.Config(tuple(map(str, files)), out=str(out), workers=workers, **settings)
        fineweb.main(config)
        val, *train = [
            np.load(path) for path in sorted(out.glob("*.npy"), key=lambda p: p.stem[-6:])
        ]
        assert val.tolist() == expected[:250]
        assert np.concatenate(train).tolist() == expected[250:]
        assert [len(shard) for shard in train[:-1]] == [5000] * (len(train) - 1)

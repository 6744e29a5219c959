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
    tokens = fineweb.tokenize([*DOCUMENTS, None, ""], "gpt2")
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [t for text in DOCUMENTS for t in [50256, *enc.encode_ordinary(text)]]


def test_tokens_of_bytes_are_the_bytes():
    tokens = fineweb.tokenize(DOCUMENTS, "bytes")
    assert tokens.tolist() == [t for text in DOCUMENTS for t in [256, *text.encode()]]

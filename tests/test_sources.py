"""sources.py: a long text is cut where its tokens do not notice."""

import os

import hypothesis
import pytest
from hypothesis import strategies as st
from test_fineweb import documents_in

import fineweb
import sources

some = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)


def encodings():
    """The encodings that are here: GPT-2's only where it was fetched before."""
    yield fineweb.get_encoding("bytes")
    if os.environ.get("TIKTOKEN_CACHE_DIR"):
        yield fineweb.get_encoding("gpt2")


@pytest.mark.parametrize(
    "text", ["x" * 10**6, "\n" * 10**7 + "a", " " * 10**6, "é" * 10**6, "a\t" * 10**6, "中" * 10**6]
)
def test_tiktoken_gets_no_more_at_a_time_than_it_can_do(tmp_path, monkeypatch, text):
    """Its time for a word or a gap grows with the square of the length, or its stack overflows."""
    encode, given = fineweb.encode, []

    def noted(enc, part):
        given.append(part)
        return encode(enc, part)

    monkeypatch.setattr(fineweb, "encode", noted)
    (tmp_path / "a.txt").write_text(text, newline="")
    corpus = sources.corpus_of(tmp_path / "a.txt")
    fineweb.write_shards(corpus, tmp_path / "out", "bytes", val_tokens=1, workers=1)
    assert "".join(given) == text
    assert max(map(len, given)) <= 2**18 and len(given) <= len(text) / 2**18 + 4
    assert documents_in(tmp_path / "out") == [text]


SPACES = " \n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000"
ODD = "a'sZ09.!<|>\0\x7f\u0301\u0327\u200b\u200c\u200d\u200e\u202e\ufeff\ufffe\ufffdאבع١中ß🙂👩"
ODD += SPACES
odd_texts = st.text(st.sampled_from(ODD) | st.characters(exclude_categories=[]), max_size=60)
torn_pairs = st.lists(st.sampled_from(["\ud83d", "\ude42", "a", " ", "\n"])).map("".join)


@some
@hypothesis.given(odd_texts | torn_pairs, st.integers(1, 30))
def test_chunks_are_the_text(text, size):
    parts = [*sources.chunks(text, size)]
    assert "".join(parts) == text
    assert max(map(len, parts)) <= size
    assert all(parts) or not text


@some
@hypothesis.given(st.data(), st.integers(8, 40))
def test_chunks_have_the_tokens_of_the_whole(data, size):
    """Where a word and the gap before it are together shorter than a chunk."""
    letters = st.sampled_from([c for c in ODD if not c.isspace()])
    words = st.text(letters, min_size=1, max_size=size // 2)
    gaps = st.text(st.sampled_from(SPACES), max_size=size - size // 2 - 3)
    gaps = st.tuples(st.sampled_from(" \n"), gaps).map("".join)
    pairs = data.draw(st.lists(st.tuples(gaps, words).map("".join), max_size=20))
    text = data.draw(words) + "".join(pairs)
    parts = [*sources.chunks(text, size)]
    for enc in encodings():
        tokens = [token for part in parts for token in enc.encode_ordinary(part)]
        assert tokens == enc.encode_ordinary(text)

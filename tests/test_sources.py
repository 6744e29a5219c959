"""sources.py: every text of every file arrives once, in order, whole, under its row's number."""

import gzip
import itertools
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st
from test_fineweb import DOCUMENTS, documents_in, error_of, python, stream

import fineweb
import sources

SUFFIXES = [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst"]  # .txt has no rows
WORDS = "the quick, größer 🙂\r\n\n  it's 3 foxes' naïve   dogs!? 中文 ".split(" ")
SMALL = {"BLOCK": 64, "LARGE": 256, "LONGEST": 2000}

some = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)


def compressed(name, content):
    if name.endswith(".gz"):
        return gzip.compress(content)
    if name.endswith(".zst"):
        return pyarrow.compress(content, codec="zstd", asbytes=True)
    return content


def lines(texts, column="text"):
    return "".join(json.dumps({"id": "5", column: text}) + "\n" for text in texts).encode()


def write(path, texts, column="text", group=3, **settings):
    """Texts as a file of the kind that its name tells, without the project's code."""
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": ["5"] * len(texts), column: pyarrow.array(texts, "string")})
        pyarrow.parquet.write_table(table, path, row_group_size=group, **settings)
    elif path.suffix == ".txt":
        path.write_bytes("".join(texts).encode("utf-8"))
    else:
        path.write_bytes(compressed(path.name, lines(texts, column)))


def rows(*paths, column="text"):
    """(file, row, text or what is wrong) of all rows that are no empty text."""
    found = []
    for piece in sources.corpus_of(paths, column).pieces():
        for number, value, begins in piece.read():
            value = str(value) if isinstance(value, Exception) else value
            if begins:
                found.append((Path(piece.path).name, number, value))
            else:  # a long one, which comes in parts
                assert (Path(piece.path).name, number) == found[-1][:2]
                found[-1] = (*found[-1][:2], found[-1][2] + value)
    return [row for row in found if row[2] not in (None, "")]


def texts(*paths):
    return [text for _, _, text in rows(*paths)]


def prose(n_characters, seed=0):
    rng, words, size = np.random.default_rng(seed), [], 0
    while size < n_characters:
        words.append(WORDS[rng.integers(len(WORDS))])
        size += len(words[-1]) + 1
    return " ".join(words)


def shrink(monkeypatch, **sizes):
    for name, size in (SMALL | sizes).items():
        monkeypatch.setattr(sources, name, size)
    monkeypatch.setattr(fineweb, "LONGEST_CHUNK", 32)


def shards(paths, out, encoding="bytes", column="text", **settings):
    settings = {"val_tokens": 1, "workers": 1} | settings
    return fineweb.write_shards(sources.corpus_of(paths, column), out, encoding, **settings)


def encodings():
    """The encodings that are here: GPT-2's only where it was fetched before."""
    yield fineweb.get_encoding("bytes")
    if os.environ.get("TIKTOKEN_CACHE_DIR"):
        yield fineweb.get_encoding("gpt2")


def tokens_of(enc, documents):
    """What tiktoken makes of documents, and where the shards have end-of-text."""
    return [t for text in documents for t in (enc.eot_token, *enc.encode_ordinary(text))]


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_row_arrives_once(tmp_path, monkeypatch, suffix, small):
    if small:
        shrink(monkeypatch)
    expected = {n: f"{n} " * (n % 100 + 1) for n in range(1, 301) if n % 7 and n % 11}
    path = tmp_path / f"a{suffix}"
    values = [expected.get(n, None if n % 7 else "") for n in range(1, 301)]
    write(path, values)
    assert rows(path) == [(path.name, n, text) for n, text in expected.items()]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
@pytest.mark.parametrize("group", [1, 2, 100])
def test_parquet(tmp_path, kind, group):
    """Beside the text another column, of more bytes, and a row group without a row."""
    values = [None, "a", "größer", "", "b" * 1000, "<|endoftext|>", "\ufeffc"]
    table = pyarrow.table({"x": [os.urandom(500)] * 7, "text": pyarrow.array(values, kind)})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as file:
        file.write_table(table[:0])
        file.write_table(table, row_group_size=group)
        file.write_table(table[:0])
        file.write_table(table[1:2])
    expected = [(n, text) for n, text in enumerate([*values, "a"], 1) if text]
    assert [row[1:] for row in rows(tmp_path / "a.parquet")] == expected


def test_nothing_in_a_file(tmp_path):
    for suffix in (*SUFFIXES, ".txt"):
        write(tmp_path / f"a{suffix}", [])
    (tmp_path / "b.jsonl.gz").touch()
    assert rows(tmp_path) == []


NO_TEXT = {"list": [["a"]], "record": [{"a": "b"}], "number": [5], "bytes": [b"a"], "null": [None]}
NO_TEXT["category"] = pyarrow.array(["a"]).dictionary_encode()


@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_column_that_is_no_text(tmp_path, kind):
    table = pyarrow.table({"id": ["5"], "text": NO_TEXT[kind]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    message = error_of(sources.corpus_of, [tmp_path])
    assert "a.parquet has no text in a column" in message and "id (string)" in message
    assert rows(tmp_path, column="id") == [("a.parquet", 1, "5")]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_column(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for column in ("body", "größe", "a.b", "a b"):
        write(path, ["a", "b"], column)
        sources.open_parquet.cache_clear()
        assert [text for *_, text in rows(path, column=column)] == ["a", "b"]
    if suffix == ".parquet":
        assert '"text"' in error_of(sources.corpus_of, [path])
    else:
        assert rows(path) == [("a.jsonl", n, 'it has no key "text"') for n in (1, 2)]


# a line of JSON, and the text or a part of what is wrong
LINES = [
    (b'{"text": "a"}', "a"),
    (b'{"text": "a"}\r', "a"),
    (b'  {"text" :\t"a", "text": "b"} ', "b"),
    (b"", None),
    (b" \t\r", None),
    (b'{"text": null}', None),
    (b'{"text": ""}', ""),
    (b'{"text": 5}', 5),
    (b'{"text": true}', True),
    (b'{"text": {"text": "a"}}', {"text": "a"}),
    (b'{"text": ["a"]}', ["a"]),
    (b'{"body": "a"}', ValueError),
    (b'"text"', TypeError),
    (b'["text"]', TypeError),
    (b"5", TypeError),
    (b"null", TypeError),
    (b'{"text": "a', ValueError),
    (b"{'text': 'a'}", ValueError),
    (b'{"text": "\xff"}', UnicodeDecodeError),
    (b"5" * 5000, ValueError),
    (b"[" * 100_000, RecursionError),
    (b'{"text": "\\ud800"}', "\ud800"),
    (b'{"text": "\\ud83d\\ude42"}', "🙂"),
    ('{"text": "a\u2028\x85\x0b\x0cb"}'.encode(), ValueError),  # JSON allows no such control
    ('{"text": "a\u2028\x85b"}'.encode(), "a\u2028\x85b"),  # and no line ends there
    (b'{"text": "<|endoftext|>"}', "<|endoftext|>"),
]


@pytest.mark.parametrize("last", [b"", b"\n", b"\n\n"])
def test_lines_of_json(tmp_path, last):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(line for line, _ in LINES) + last)
    found = [row for piece in sources.corpus_of([path]).pieces() for row in piece.read()]
    for number, (_, expected) in enumerate(LINES, 1):
        n, value, begins = found[number - 1]
        assert (n, begins) == (number, True)
        is_error = isinstance(expected, type)
        assert isinstance(value, expected) if is_error else value == expected, number
    assert {value for _, value, _ in found[len(LINES) :]} <= {None}


def test_a_text_that_is_not_utf8_in_parquet(tmp_path):
    values = pyarrow.array([b"a", b"b\xff", None, b"c", b"\xed\xa0\x80"])
    table = pyarrow.table({"text": values.cast("string", safe=False)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = {number: text for _, number, text in rows(tmp_path)}
    assert (found[1], found[4]) == ("a", "c")
    assert "0xff" in found[2] and "0xed" in found[5] and len(found) == 4


def test_bad_rows_are_named_and_skipped(tmp_path, capfd):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n5\n\n{"text": "b"}\n{"text": 5}')
    (tmp_path / "b.txt").write_bytes(b"c\xff")
    write(tmp_path / "c.jsonl", ["d"])
    manifest = shards([tmp_path], tmp_path / "out", max_bad=3)
    assert documents_in(tmp_path / "out") == ["a", "b", "d"]
    named = [line.removeprefix(f"{tmp_path}/") for line in manifest["skipped"]]
    places = ["a.jsonl, row 2: TypeError", "a.jsonl, row 5: TypeError: int where text should be"]
    places += ["b.txt, row 1: UnicodeDecodeError"]
    assert [line.startswith(place) for line, place in zip(named, places, strict=True)] == [True] * 3
    said = capfd.readouterr().err
    assert all(f"skipped {line}" in said for line in manifest["skipped"])
    for limit in (0, 1, 2):
        message = error_of(shards, [tmp_path], tmp_path / f"out{limit}", max_bad=limit, name="out")
        assert message.startswith(manifest["skipped"][limit]) and "--max_bad" in message
    again = shards([tmp_path], tmp_path / "out2", max_bad=3, name="out")  # it goes on
    assert again == manifest


def test_a_call_that_ends_anywhere_goes_on_and_counts_bad_rows_once(tmp_path, monkeypatch):
    """It ends before each file that it writes, in turn."""
    shrink(monkeypatch)
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, [*[5, "text"] * 40, *[5] * 40])
    settings = {"shard_size": 50, "name": "x"}
    whole = shards([tmp_path], tmp_path / "out", max_bad=160, **settings)
    assert len(whole["skipped"]) == 160
    write_file, calls = fineweb.write_file, itertools.count(1)

    def then_end(path, content):
        if next(calls) == last:
            raise KeyboardInterrupt
        write_file(path, content)

    monkeypatch.setattr(fineweb, "write_file", then_end)
    for last in range(1, 2 * len(whole["shards"]) + 2):  # at least: each shard, how far it has come
        out, calls = tmp_path / f"out{last}", itertools.count(1)
        with pytest.raises(KeyboardInterrupt):
            shards([tmp_path], out, max_bad=160, **settings)
        assert shards([tmp_path], out, max_bad=160, **settings) == whole


def test_only_the_manifest_is_missing(tmp_path, monkeypatch):
    """Behind the last shard are pieces without a token, whose bad rows were counted."""
    shrink(monkeypatch)
    write(tmp_path / "a.jsonl", [*["text"] * 40, *[5] * 40])
    whole = shards([tmp_path], tmp_path / "out", max_bad=40, name="x")
    write_file = fineweb.write_file

    def fail(path, content):
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        write_file(path, content)

    monkeypatch.setattr(fineweb, "write_file", fail)
    with pytest.raises(KeyboardInterrupt):
        shards([tmp_path], tmp_path / "again", max_bad=40, name="x")
    monkeypatch.setattr(fineweb, "write_file", write_file)
    assert shards([tmp_path], tmp_path / "again", max_bad=40, name="x") == whole


# ---- files ---------------------------------------------------------------------------------------


def test_folders_patterns_and_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("b/c").mkdir(parents=True)
    files = {"b/2.jsonl": "2", "b/c/3.jsonl.gz": "3", "a.parquet": "1", "c.txt": "4"}
    for name, text in files.items():
        write(Path(name), [text])
    Path("d.md").write_text("not a document")
    Path("b/folder.txt").mkdir()
    expected = {
        (".",): "1234",
        ("b",): "23",
        ("c.txt", "b", "a.parquet"): "4231",
        ("a.parquet", "."): "1234",  # once
        ("c.txt", "."): "4123",
        ("*.*",): "14",
        ("**",): "1234",
        ("**/*.jsonl*",): "23",
        ("b/[0-9].jsonl", "?.txt"): "24",
    }
    for given, found in expected.items():
        assert "".join(texts(*given)) == found, given
    assert "".join(texts(tmp_path)) == "1234"  # a Path, too
    Path("[x].txt").write_text("5")
    assert texts("[x].txt") == ["5"]  # a file of that name, and no pattern


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["absent.txt"], "absent.txt does not exist"),
        (["a.txt", "*.jsonl"], "*.jsonl does not exist"),
        (["folder"], "nothing to read"),
        (["folder", "notes.md"], "nothing to read"),
        (["a.txt", "notes.md"], "notes.md"),  # it would be missed, and nobody would know
        ([], "nothing to read"),
    ],
)
def test_nothing_to_read(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("a.txt").write_text("a")
    Path("notes.md").write_text("b")
    assert said in error_of(sources.corpus_of, given)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(range(256)) + b"PAR1", None])
def test_a_damaged_parquet_file_is_named_at_once(tmp_path, content):
    write(tmp_path / "a.parquet", ["a"])
    write(tmp_path / "b.parquet", ["b"])
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-1] if content is None else content)
    message = error_of(sources.corpus_of, [tmp_path])
    assert message.startswith(f"{tmp_path}/b.parquet is damaged") and len(message) < 500


@pytest.mark.parametrize("large", [SMALL["LARGE"], 2**25])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_damaged_page_costs_its_row_group(tmp_path, monkeypatch, large, compression):
    """Read by a worker, or as too large by the main process."""
    shrink(monkeypatch, LARGE=large)
    path, settings = tmp_path / "a.parquet", {"use_dictionary": False, "compression": compression}
    values = [f"{n:04d} " * 20 for n in range(1, 41)]
    write(path, values, group=10, data_page_size=300, write_batch_size=1, **settings)
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(1)
    content = bytearray(path.read_bytes())
    middle = group.data_page_offset + group.total_compressed_size // 2
    content[middle : middle + 100] = b"\xff" * 100  # a page's head is in there
    path.write_bytes(content)
    found = rows(path)
    [number] = [n for _, n, text in found if "and the rest of its row group" in text]
    assert 21 <= number <= 30
    good = {n: text for _, n, text in found if n != number}
    assert {*range(1, 21), *range(31, 41)} <= good.keys() <= {*range(1, number), *range(31, 41)}
    assert len(found) == len(good) + 1
    manifest = shards([path], tmp_path / "out")
    assert [f"a.parquet, row {number}: " in line for line in manifest["skipped"]] == [True]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_members_one_after_the_other(tmp_path, suffix):
    name = f"a.jsonl{suffix}"
    parts = [lines(["a", "b"]), b'{"text": ', b'"c"}\n{"text": "d"}', b"", b"\n", lines(["e"])]
    (tmp_path / name).write_bytes(b"".join(compressed(name, part) for part in parts))
    assert rows(tmp_path) == [(name, n, text) for n, text in enumerate("abcde", 1)]


@pytest.mark.parametrize("damage", ["cut by a byte", "cut", "junk"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_a_bad_row(tmp_path, monkeypatch, suffix, damage):
    shrink(monkeypatch)
    a, b = tmp_path / f"a.jsonl{suffix}", tmp_path / "b.jsonl"
    values = [f"{n} {os.urandom(20).hex()}" for n in range(1, 3001)]
    write(a, values)
    write(b, ["b"])
    content = a.read_bytes()
    if damage == "junk":
        content = content[: len(content) // 2] + b"\xff" * 50 + content[len(content) // 2 + 50 :]
    a.write_bytes(content[:-1] if damage == "cut by a byte" else content[: len(content) * 2 // 3])
    *good, (name, number, error), last = rows(tmp_path)
    assert last == ("b.jsonl", 1, "b")
    assert name == a.name and re.search("Truncated|failed|corrupt", error)
    if damage != "junk":  # which may look like text, until the checksum comes
        assert good == [(a.name, n, text) for n, text in enumerate(values[: len(good)], 1)]
        assert len(good) < number <= len(good) + 2


def test_text_files_are_one_document_each(tmp_path):
    """Byte for byte; and UTF-16 is none."""
    contents = ["a\r\nb\rc\n\nd", "\ufeffa", " ", "", "<|endoftext|>", "🙂\u2028\x85\x0c\0e\u0301"]
    for n, content in enumerate(contents):
        write(tmp_path / f"{n}.txt", [content])
    assert texts(tmp_path) == [content for content in contents if content]
    shards([tmp_path], tmp_path / "out")
    assert documents_in(tmp_path / "out") == [content for content in contents if content]
    (tmp_path / "9.txt").write_text("a", encoding="utf-16")
    assert "utf-8" in texts(tmp_path)[-1]


def test_identity(tmp_path):
    def identity(folder, *names, column="text", **changes):
        folder = tmp_path / folder
        folder.mkdir(exist_ok=True)
        for name in names:
            write(folder / name, [changes.get(name[0], "a")])
        return sources.corpus_of([folder / name for name in names], column).identity

    first = identity("x", "a.jsonl", "b.jsonl")
    assert len(first) == 16 and first == identity("y", "a.jsonl", "b.jsonl")
    others = {identity("x", "b.jsonl", "a.jsonl"), identity("x", "a.jsonl")}
    others |= {identity("x", "a.jsonl", "c.jsonl"), identity("z", "a.jsonl", "b.jsonl", a="aa")}
    others |= {identity("x", "a.jsonl", "b.jsonl", column="body")}
    assert len(others | {first}) == 6
    files = [tmp_path / "x" / name for name in ("a.jsonl", "b.jsonl")]
    assert sources.corpus_of(files, part="2/2").identity == first  # that of the whole
    manifest = fineweb.write_shards(["a"], tmp_path / "out", "bytes", val_tokens=1, workers=1)
    assert manifest["made_by"]["source"] == ""  # a list cannot be known again


@pytest.mark.parametrize("n", range(1, 8))
def test_parts_are_the_whole(tmp_path, n):
    for name in "abcdefg":
        write(tmp_path / f"{name}.txt", [name])
    parts = [sources.corpus_of([tmp_path], part=f"{i}/{n}") for i in range(1, n + 1)]
    paths = [[Path(piece.path).stem for piece in part.pieces()] for part in parts]
    assert "".join(sum(paths, [])) == "abcdefg"
    assert {len(part) for part in paths} <= {7 // n, -(-7 // n)}


@pytest.mark.parametrize(
    "part", ["0/3", "4/3", "x", "2/1000", "3", "/", "1/", "-1/3", "1/0", "1 / 3", "٣/٣"]
)
def test_a_part_that_is_none(tmp_path, part):
    for name in "abc":
        write(tmp_path / f"{name}.txt", [name])
    assert "--part" in error_of(sources.corpus_of, [tmp_path], part=part)


def test_standard_library():
    texts = list(sources.standard_library())
    assert all(texts) and sum(map(len, texts)) > 5e6
    assert Path(json.__file__).read_text(encoding="utf-8") in texts
    assert Path(pytest.__file__).read_text(encoding="utf-8") not in texts  # site-packages
    pieces = sources.corpus_named("stdlib").pieces()
    rows = [row for piece in pieces for row in piece.read()]
    assert [text for _, text, begins in rows if begins] == texts


# ---- pieces --------------------------------------------------------------------------------------


def test_pieces_from_any_one_on(tmp_path, monkeypatch):
    shrink(monkeypatch)
    for n, suffix in enumerate((*SUFFIXES, ".txt", ".parquet", ".jsonl")):
        sizes = [5, 20, 100, 500, 3, 3000, 1] if n < 4 else [400, 5]
        write(tmp_path / f"{n}{suffix}", [prose(size, n) for size in sizes], group=2)
    documents = [prose(100, seed) for seed in range(20)]
    listed = sources.Corpus(lambda *place: sources.document_pieces(documents, *place))
    for corpus, end in ((sources.corpus_of([tmp_path]), (99, 0)), (listed, (0, 99))):
        every = contents(corpus)
        places = [piece[:2] for piece in every]
        assert places == sorted(set(places)) and len(every) > 19
        for place in {*places, *((file, number + 1) for file, number in places), end}:
            assert contents(corpus, *place) == [piece for piece in every if piece[:2] >= place]


def contents(corpus, *place):
    """All that there is in the pieces; errors as what they say."""
    return [
        (p.file, p.number, p.path, [(n, repr(value), begins) for n, value, begins in p.read()])
        for p in corpus.pieces(*place)
    ]


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".txt"])
def test_long_texts_have_the_tokens_of_the_whole(tmp_path, monkeypatch, suffix):
    """Much longer than a block, a chunk, and what a worker should hold."""
    sizes = [10, 70, 500, 5, 900, 300, 300, 40, 1, 64, 32, 128, 250, 260, 890]
    documents = [prose(size, seed + 1)[:size] for seed, size in enumerate(sizes)]
    for n in range(3):  # one row group is large, one is not, one is of many
        write(tmp_path / f"{n}{suffix}", documents, group=(1, 3, 100)[n])
    shrink(monkeypatch)
    expected = ["".join(documents)] if suffix == ".txt" else documents
    for enc in encodings():
        out = tmp_path / enc.name
        manifest = shards([*tmp_path.glob(f"?{suffix}")], out, enc.name, shard_size=999)
        assert stream(out).tolist() == tokens_of(enc, expected * 3)
        assert manifest["text_bytes"] == len("".join(expected * 3).encode())
        assert manifest["documents"] == len(expected) * 3


@pytest.mark.parametrize(("size", "fits"), [(1900, True), (2200, False), (5000, False)])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_text_may_be_too_long(tmp_path, monkeypatch, suffix, size, fits):
    shrink(monkeypatch)
    documents = ["a", "b " * (size // 2), "c", "d" * 100, "e"]
    write(tmp_path / f"a{suffix}", documents)
    found = {number: text for _, number, text in rows(tmp_path)}
    if not fits:
        assert "longer than 2,000 bytes" in found[2]
        documents[1] = found[2]
    assert found == dict(enumerate(documents, 1))


def test_bytes_are_counted_and_not_letters(tmp_path, monkeypatch):
    shrink(monkeypatch)
    write(tmp_path / "a.parquet", ["é" * 1000, "a" * 2000, "é" * 1000 + "a"])
    assert [len(text) for text in texts(tmp_path)][:2] == [1000, 2000]
    assert "longer" in texts(tmp_path)[2]


@pytest.mark.parametrize(
    ("content", "number"),
    [(b"x" * 3000, 2), (b"x" * 3000 + b"\n", 2), (b"\n" * 900 + b"x" * 3000 + b"\n\n", 902)],
)
def test_a_line_that_is_too_long_may_be_the_last(tmp_path, monkeypatch, content, number):
    shrink(monkeypatch)
    (tmp_path / "a.jsonl").write_bytes(lines(["a"]) + content)
    good, bad = rows(tmp_path)
    assert good == ("a.jsonl", 1, "a") and bad[:2] == ("a.jsonl", number) and "longer" in bad[2]


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
    write(tmp_path / "a.txt", [text])
    shards([tmp_path / "a.txt"], tmp_path / "out")
    assert "".join(given) == text
    assert max(map(len, given)) <= 2**18 and len(given) <= len(text) / 2**18 + 4
    assert documents_in(tmp_path / "out") == [text]


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".txt"])
def test_workers_change_nothing(tmp_path, suffix):
    """Several blocks of each of two files, and a bad row in each that can hold one."""
    text = prose(2**16)
    for n in range(2):
        documents = [text[i:] for i in range(0, 2**16, 2**9)]
        write(tmp_path / f"{n}{suffix}", documents, group=30)
        if ".jsonl" in suffix:
            with open(tmp_path / f"{n}{suffix}", "ab") as file:
                file.write(compressed(suffix, b"broken\n"))
    written = set()
    for workers in (1, 2, 3):
        out = tmp_path / f"out{workers}"
        settings = {"shard_size": 2**20, "name": "x", "workers": workers}
        manifest = shards(sorted(tmp_path.glob(f"?{suffix}")), out, **settings)
        assert len(manifest["skipped"]) == 2 * (".jsonl" in suffix)
        written.add(tuple((p.name, p.read_bytes()) for p in sorted(out.iterdir())))
    assert len(written) == 1


STREAM = """
import multiprocessing, os, resource, sys
from pathlib import Path
import pyarrow.parquet
import fineweb, sources

def peak():  # in bytes; of a process's children, the largest one's
    status = Path("/proc/self/status").read_text()
    own = int(status.split("VmHWM:")[1].split()[0])
    return 1024 * (own + 2 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)

path, size = sys.argv[1:]
before, n = peak(), 0
corpus = sources.corpus_of([path])
for piece in corpus.pieces():
    n += sum(len(text) for _, text, _ in piece.read())
assert n == int(size), n
reading = peak() - before
fineweb.write_shards(corpus, "out", "bytes", 2**20, 1, 0, 2)
for worker in multiprocessing.active_children():
    worker.join()
print(reading, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "size"), [("a.txt", 60_000_000), ("a.parquet", 200_000_000)])
def test_what_is_large_is_streamed(tmp_path, name, size):
    """Reading takes less memory than there is text, let alone several times that; and three
    processes need no more for it than their blocks."""
    some_text = b"some words " * (size // 1100)
    if name == "a.txt":
        with open(tmp_path / name, "wb") as file:
            for _ in range(100):
                file.write(some_text)
        size = 100 * len(some_text)
    else:  # one row group, of texts that are all different to the eye of parquet
        texts = pyarrow.array([os.urandom(5000).hex() for _ in range(1000)])
        table = pyarrow.table({"text": pyarrow.chunked_array([texts] * (size // 10_000_000))})
        settings = {"row_group_size": 10**6, "use_dictionary": False}
        pyarrow.parquet.write_table(table, tmp_path / name, **settings)
        assert pyarrow.parquet.ParquetFile(tmp_path / name).num_row_groups == 1
    (tmp_path / "stream.py").write_text(STREAM)
    done = python(tmp_path, "stream.py", name, str(size))
    assert done.returncode == 0, done.stderr
    reading, all_processes = map(int, done.stdout.split())
    assert reading < 100e6
    assert all_processes < 800e6  # of which 3 * 100 MB are the program itself
    assert sum(len(np.load(file)) for file in (tmp_path / "out").glob("*.npy")) > size


# ---- chance --------------------------------------------------------------------------------------

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


@some
@hypothesis.given(st.lists(odd_texts | torn_pairs, max_size=5), st.booleans())
def test_odd_documents_survive(documents, escaped):
    """Halves of surrogate pairs become U+FFFD, as tiktoken itself has it; parquet has none."""
    documents = ["a", *documents]
    utf_16 = [text.encode("utf-16", "surrogatepass") for text in documents]
    whole = [text.decode("utf-16", "replace") for text in utf_16]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "a.parquet"), whole)
        content = [json.dumps({"text": text}, ensure_ascii=True) for text in documents]
        if not escaped:
            content = [json.dumps({"text": text}, ensure_ascii=False) for text in whole]
        Path(folder, "a.jsonl").write_text("\n".join(content), encoding="utf-8", newline="")
        sources.open_parquet.cache_clear()
        for enc in encodings():
            expected = tokens_of(enc, filter(None, documents))
            for name in ("a.parquet", "a.jsonl"):
                out = Path(folder, enc.name + name[1:])
                shards([f"{folder}/{name}"], out, enc.name)
                assert stream(out).tolist() == expected
                assert enc.decode(expected) == enc.decode(stream(out).tolist())
                if enc.name == "bytes":
                    assert documents_in(out) == [*filter(None, whole)]


@some
@hypothesis.given(st.lists(odd_texts, min_size=1, max_size=3), st.integers(2, 20))
def test_odd_texts_arrive_in_blocks_of_any_size(documents, block):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", block)
        patch.setattr(sources, "LARGE", 2 * block)
        documents = [re.sub("[\ud800-\udfff]", "?", text) for text in documents]
        for name in ("a.jsonl", "b.parquet", "c.txt"):
            write(Path(folder, name), documents)
        sources.open_parquet.cache_clear()
        joined = []
        for piece in sources.corpus_of([folder]).pieces():
            for _, text, begins in piece.read():
                joined += [""] if begins else []
                joined[-1] += text or ""
        expected = [*filter(None, [*documents * 2, "".join(documents)])]
        assert [*filter(None, joined)] == expected


def test_the_first_file_may_hold_nothing(tmp_path):
    """Then no token is there yet, and that is not the end."""
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "b.jsonl").write_bytes(lines(DOCUMENTS))
    shards([tmp_path], tmp_path / "out")
    assert documents_in(tmp_path / "out") == DOCUMENTS

"""Where documents come from: files of several kinds.

A corpus is read in pieces, each some neighbouring rows of one file: work for a process.
"""

import contextlib
import functools
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
SUFFIXES = (".parquet", ".jsonl", ".txt")

BLOCK = 2**22  # bytes of text, about, that a worker gets at a time: half a second's work


# A row: its number in the file and its text, one document. In place of the text there may be None,
# a value of another type, or the exception that says why.
Row = tuple[int, object]


class Piece(NamedTuple):
    """What a worker tokenizes at a time: rows of one file that follow on each other."""

    path: str  # the file's, to name bad rows by
    read: Callable[[], Iterable[Row]]


class Corpus(NamedTuple):
    """Documents in their order."""

    pieces: Callable[[], Iterable[Piece]]


def corpus_of(source: str | Path) -> Corpus:
    """The documents of a file, or of all files in a folder and below, sorted by path.

    .parquet: column "text"; .jsonl: key "text" of each line; .txt: the file is one document. Null
    and empty texts are no documents. SystemExit at once where there is nothing to read, and where
    a parquet file is damaged or has no such column of text.
    """
    source = Path(source)
    if not os.path.exists(source):  # False too for a name that is too long
        raise SystemExit(f"{source} does not exist: give a file or folder of documents")
    found = sorted(source.rglob("*")) if source.is_dir() else [source]
    files = [str(path) for path in found if path.suffix in SUFFIXES and path.is_file()]
    if not files:
        raise SystemExit(f"{source}: nothing to read, the file types are {', '.join(SUFFIXES)}")
    return Corpus(functools.partial(file_pieces, files))


def fineweb_edu() -> Corpus:
    """The documents of FineWeb-Edu's sample-10BT, streamed: no copy of the text on the disk.
    SystemExit where the hub does not deliver."""

    def texts() -> Iterator[str]:
        from datasets import load_dataset

        try:
            data = load_dataset(FINEWEB_EDU, name="sample-10BT", split="train", streaming=True)
            yield from (row["text"] for row in data)
        except Exception as error:  # the hub and the sockets each have their own
            advice = "check the network, or use python fineweb.py FILES, which works offline"
            raise SystemExit(f"{FINEWEB_EDU}: {one_line(error)}: {advice}") from error

    return Corpus(functools.partial(document_pieces, texts()))


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def file_pieces(paths: list[str]) -> Iterator[Piece]:
    """The pieces of files."""
    for path in paths:
        if path.endswith(".parquet"):
            reads = parquet_reads(path)
        elif path.endswith(".txt"):
            reads = batches(text_rows(path))
        else:
            reads = json_reads(path)
        yield from (Piece(path, read) for read in reads)


def document_pieces(documents: Iterable[str]) -> Iterator[Piece]:
    """The pieces of documents as they come."""
    return (Piece("the documents", read) for read in batches(enumerate(documents, 1)))


def batches(rows: Iterable[Row]) -> Iterator[Callable]:
    """Rows that are read here instead of by a worker: a BLOCK of them at a time."""
    batch, size = [], 0
    for number, text in rows:
        batch.append((number, text))
        size += len(text) if isinstance(text, str) else 1
        if size >= BLOCK:
            yield functools.partial(iter, batch)
            batch, size = [], 0
    if batch:
        yield functools.partial(iter, batch)


def text_rows(path: str) -> Iterator[Row]:
    """A text file: one document."""
    try:
        yield 1, Path(path).read_bytes().decode("utf-8")  # opened as text, \r\n would become \n
    except (OSError, ValueError) as error:  # ValueError: it is not UTF-8
        yield 1, error


def json_reads(path: str) -> Iterator[Callable]:
    """What reads a file of JSON lines, a BLOCK at a time."""
    number = 1
    with open(path, "rb") as file:
        while lines := file.read(BLOCK):
            lines += file.readline()  # what is left of the last one
            yield functools.partial(json_rows, lines, number)
            number += lines.count(b"\n")


def json_rows(lines: bytes, number: int) -> Iterator[Row]:
    """The rows of JSON lines, of which the first has that number."""
    for n, line in enumerate(lines.split(b"\n"), number):  # in bytes, only \n ends a line
        text = None
        if line.strip():
            try:
                text = json.loads(line)["text"]
            except KeyError:
                text = ValueError('it has no key "text"')
            except (ValueError, TypeError, RecursionError) as error:
                text = error
        yield n, text


def parquet_reads(path: str) -> Iterator[Callable]:
    """What reads a parquet file: row groups of a BLOCK or more together."""
    groups, size, number = [], 0, 1
    for group, (n_rows, n_bytes) in enumerate(row_groups(path)):
        groups.append((group, number))
        size += n_bytes
        number += n_rows
        if size >= BLOCK:
            yield functools.partial(parquet_rows, path, groups)
            groups, size = [], 0
    if groups:
        yield functools.partial(parquet_rows, path, groups)


def row_groups(path: str) -> list[tuple[int, int]]:
    """Each row group's number of rows, and bytes of text."""
    _, chunks = open_parquet(path)
    return [(chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks]


@functools.lru_cache(maxsize=2)  # a worker asks once a piece
def open_parquet(path: str) -> tuple:
    """The file, and for each row group what it knows of the column. SystemExit where there is no
    column of text, or the file is damaged."""
    import pyarrow.parquet  # only parquet needs it

    try:
        parquet = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        damage = f"{path} is damaged ({one_line(error)})"
        raise SystemExit(f"{damage}: copy it again, or remove it") from None
    types = {field.name: str(field.type) for field in parquet.schema_arrow}
    if types.get("text") not in ("string", "large_string", "string_view"):
        raise SystemExit(f'{path} has no text in a column "text": remove it, or rename the column')
    index = [parquet.schema.column(i).path for i in range(len(parquet.schema))].index("text")
    groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
    return parquet, [group.column(index) for group in groups]


def parquet_rows(path: str, groups: list[tuple[int, int]]) -> Iterator[Row]:
    """The rows of row groups, each given as its number and that of its first row."""
    import pyarrow

    parquet, _ = open_parquet(path)
    for group, number in groups:
        try:
            for text in parquet.read_row_group(group, ["text"], use_threads=False)["text"]:
                yield number, text.as_py()
                number += 1
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            yield number, error


def standard_library() -> Iterator[str]:
    """The sources of the running Python's standard library, without tests: code and English
    (docstrings, and pydoc_data/topics.py, the language reference) that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    names = [file.relative_to(root).as_posix() for file in root.rglob("*.py")]
    names = [name for name in names if skip.isdisjoint(name.split("/"))]
    # In the order of a hash of the names neighbours have nothing in common, and it is the same
    # everywhere: the beginning, which is held out, is like the rest.
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        with contextlib.suppress(UnicodeDecodeError):  # a few old files are not UTF-8
            text = (root / name).read_text(encoding="utf-8")
            if text:  # many an __init__.py is empty
                yield text[:50_000]  # no table of characters should outweigh a hundred modules

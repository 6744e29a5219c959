"""Where documents come from: files of several kinds.

A corpus is read in pieces, each some neighbouring rows of one file, that can be counted through
from the beginning: the same files always give the same pieces. What is large is streamed.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
SUFFIXES = (".parquet", ".jsonl", ".txt")

BLOCK = 2**22  # bytes of text, about, that a worker gets at a time: half a second's work
LARGE = 2**25  # more is read by the main process
LONGEST = 2**27  # bytes of one text; a longer one is a bad row, except in a text file


# A row: its number in the file, its text, and whether a document begins with it. In place of the
# text there may be None, a value of another type, or the exception that says why.
Row = tuple[int, object, bool]


class Piece(NamedTuple):
    """What a worker tokenizes at a time: rows of one file that follow on each other."""

    file: int  # which of the corpus's files
    number: int  # which of the file's pieces
    path: str  # the file's, to name bad rows by
    read: Callable[[], Iterable[Row]]


class Corpus(NamedTuple):
    """Documents in their order, which can be read from any piece on."""

    pieces: Callable[..., Iterable[Piece]]  # of (file, number); by default from the beginning
    identity: str = ""  # the same for the same documents; "": they cannot be known again
    n_bytes: int = 0  # of text, about; 0: nobody knows


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
    facts = [(Path(path).name, os.path.getsize(path)) for path in files]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Corpus(functools.partial(file_pieces, files), identity, sum(map(text_bytes, files)))


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

    return Corpus(functools.partial(document_pieces, texts()), f"{FINEWEB_EDU}, sample-10BT")


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def text_bytes(path: str) -> int:
    """About how many bytes of text are in a file."""
    if path.endswith(".parquet"):
        return sum(n_bytes for _, n_bytes in row_groups(path))
    return os.path.getsize(path)


def file_pieces(paths: list[str], file: int = 0, number: int = 0) -> Iterator[Piece]:
    """The pieces of files, from one of them on."""
    for f, path in enumerate(paths[file:], file):
        if path.endswith(".parquet"):
            reads = parquet_reads(path)
        elif path.endswith(".txt"):
            reads = batches(text_rows(path))
        else:
            reads = json_reads(path)
        for n, read in enumerate(reads):
            if (f, n) >= (file, number):
                yield Piece(f, n, path, read)


def document_pieces(documents: Iterable[str], file: int = 0, number: int = 0) -> Iterator[Piece]:
    """The pieces of documents as they come, from one of them on."""
    reads = batches((n, text, True) for n, text in enumerate(documents, 1))
    for n, read in enumerate(reads):
        if n >= number:
            yield Piece(0, n, "the documents", read)


def batches(rows: Iterable[Row]) -> Iterator[Callable]:
    """Rows that are read here instead of by a worker: a BLOCK of them at a time, a long text in
    parts."""
    batch, size = [], 0
    for number, text, begins in rows:
        for part in chunks(text, BLOCK) if isinstance(text, str) else [text]:
            batch.append((number, part, begins))
            begins = False
            size += len(part) if isinstance(part, str) else 1
            if size >= BLOCK:
                yield functools.partial(iter, batch)
                batch, size = [], 0
    if batch:
        yield functools.partial(iter, batch)


def chunks(text: str, size: int) -> Iterator[str]:
    """A text in parts of at most `size` characters. They end where words do, so that their tokens
    are the whole text's; only a word that is longer, with the gap before it, is torn."""
    start = 0
    while len(text) - start > size:
        # no token of GPT-2's goes on from a letter or a sign to a space
        match = re.compile(r".*\S(?=[ \n])", re.DOTALL).match(text, start, start + size)
        end = match.end() if match else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def text_rows(path: str) -> Iterator[Row]:
    """A text file, which may be larger than the memory, as parts of one document."""
    rest, begins = "", True
    try:
        with open(path, encoding="utf-8", newline="") as file:  # "": \r\n stays \r\n
            while block := file.read(BLOCK):
                *parts, rest = chunks(rest + block, BLOCK)
                for part in parts:
                    yield 1, part, begins
                    begins = False
        yield 1, rest, begins
    except (OSError, ValueError) as error:  # ValueError: it is not UTF-8
        yield 1, error, begins


def json_reads(path: str) -> Iterator[Callable]:
    """What reads a file of JSON lines, a BLOCK at a time. A line that is much longer is read here,
    as no worker should hold it."""
    number = 1
    try:
        with open(path, "rb") as file:
            while lines := file.read(BLOCK):
                rest = file.readline(LONGEST)  # of the last line
                if len(rest) < BLOCK:
                    yield functools.partial(json_rows, lines + rest, number)
                elif rest.endswith(b"\n") or not file.peek(1):
                    yield from batches(json_rows(lines + rest, number))
                else:
                    lines = lines[: lines.rfind(b"\n") + 1]
                    yield functools.partial(json_rows, lines, number)
                    error = ValueError(f"the line is longer than {LONGEST:,} bytes")
                    yield functools.partial(iter, [(number + lines.count(b"\n"), error, True)])
                    while not rest.endswith(b"\n") and (rest := file.readline(BLOCK)):
                        pass
                number += (lines + rest[-1:]).count(b"\n")
    except (OSError, ValueError) as error:
        rest = ValueError(f"{error} (and the rest of the file)")
        yield functools.partial(iter, [(number, rest, True)])


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
        yield n, text, True


def parquet_reads(path: str) -> Iterator[Callable]:
    """What reads a parquet file: row groups of a BLOCK or more together. A row group that is LARGE
    is read here, as no worker should hold it."""
    groups, size, number = [], 0, 1
    for group, (n_rows, n_bytes) in enumerate(row_groups(path)):
        if n_bytes < LARGE:
            groups.append((group, number))
            size += n_bytes
        if groups and (n_bytes >= LARGE or size >= BLOCK):
            yield functools.partial(parquet_rows, path, groups)
            groups, size = [], 0
        if n_bytes >= LARGE:
            yield from batches(parquet_rows(path, [(group, number)]))
        number += n_rows
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
        # a buffer, without which all of a row group is read before its first row
        parquet = pyarrow.parquet.ParquetFile(path, buffer_size=2**16, pre_buffer=False)
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

    parquet, chunks = open_parquet(path)
    for group, number in groups:
        chunk = chunks[group]
        mean = 1 + chunk.total_uncompressed_size // max(1, chunk.num_values)  # bytes a row
        at_a_time = max(1, min(1024, BLOCK // mean))
        try:
            for batch in parquet.iter_batches(at_a_time, [group], ["text"], use_threads=False):
                for value in batch.column(0):
                    yield number, text_of(value), True
                    number += 1
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            yield number, ValueError(f"{error} (and the rest of its row group)"), True


def text_of(value) -> str | None | Exception:
    """What pyarrow read as a string, or why it is none."""
    if value.is_valid and len(value.as_buffer()) > LONGEST:
        return ValueError(f"the text is longer than {LONGEST:,} bytes")
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


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

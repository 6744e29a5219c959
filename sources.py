"""Where documents come from: files of several kinds, here or on the hub, and corpora by name.

A corpus is read in pieces, each some neighbouring rows of one file, that can be counted through
from the beginning: the same files always give the same pieces. What is large is streamed.
"""

import contextlib
import functools
import glob
import hashlib
import http.client
import io
import itertools
import json
import os
import platform
import re
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """A corpus by name, and what its folder of shards is like."""

    files: str
    out: str
    val_tokens: int = 0  # held out; 0: one shard, as in the lecture
    encoding: str = "gpt2"
    name: str | None = None  # of the shards; None: the folder's
    tokens: str = ""  # where others have put it as GPT-2's tokens, in llm.c's format


HUB = "hf://datasets/"
EDU = f"{HUB}HuggingFaceFW/fineweb-edu/sample"
DATASETS = {
    "fineweb_edu_10BT": Dataset(
        files=f"{EDU}/10BT/*.parquet", out="edu_fineweb10B", name="edufineweb",
        tokens=f"{HUB}kjj0/finewebedu10B-gpt2/*.bin",
    ),
    "fineweb_edu_100BT": Dataset(f"{EDU}/100BT/*.parquet", "edu_fineweb100B", name="edufineweb"),
    "fineweb_edu_350BT": Dataset(f"{EDU}/350BT/*.parquet", "edu_fineweb350B", name="edufineweb"),
    "fineweb_10BT": Dataset(
        files=f"{HUB}HuggingFaceFW/fineweb/sample/10BT/*.parquet", out="fineweb10B", name="fineweb",
        tokens=f"{HUB}kjj0/fineweb10B-gpt2/*.bin",
    ),
    "openwebtext": Dataset(
        f"{HUB}Skylion007/openwebtext/plain_text/*.parquet", "openwebtext", 5_000_000
    ),
    "bookcorpus": Dataset(
        f"{HUB}lucadiliello/bookcorpusopen/**/*.parquet", "bookcorpus", 5_000_000
    ),
    "tinystories": Dataset(
        f"{HUB}roneneldan/TinyStories/data/train-*.parquet", "tinystories", 5_000_000
    ),
    "shakespeare": Dataset("input.txt", "shakespeare", 30_000),
    "shakespeare_char": Dataset("input.txt", "shakespeare_char", 100_000, "bytes"),
    "stdlib": Dataset("", "stdlib", 300_000, "bytes"),
}  # fmt: skip
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")

BLOCK = 2**22  # bytes of text, about, that a worker gets at a time: half a second's work
LARGE = 2**25  # more is read by the main process; from the hub, where requests count, as much
LONGEST = 2**27  # bytes of one text; a longer one is a bad row, except in a text file
PAUSES = (2, 4, 8, 16, 32, 60, 60)  # seconds between tries, of which each lasts up to 23 itself
OFFLINE = "give the same command again later; files of your own and --dataset stdlib work offline"


# A row: its number in the file, its text, and whether a document begins with it. In place of the
# text there may be tokens, None, a value of another type, or the exception that says why.
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
    part: str = ""  # "3/8": the third of eight parts; the identity is that of the whole


def corpus_named(name: str, part: str = "", download: bool = False) -> Corpus:
    """The documents of one of DATASETS, as corpus_of; to download, the tokens instead."""
    dataset = DATASETS[name]
    if download and not dataset.tokens:
        there = ", ".join(name for name in DATASETS if DATASETS[name].tokens)
        raise SystemExit(f"--download: nobody has made tokens of {name}, only of {there}")
    if dataset.files == "input.txt":
        fetch_shakespeare()
    if dataset.files:
        return corpus_of([dataset.tokens if download else dataset.files], part=part)
    if part:
        raise SystemExit("--part: the standard library is not shared out, it takes seconds")
    identity = f"the standard library of Python {platform.python_version()}"
    return Corpus(functools.partial(document_pieces, standard_library()), identity)


def fetch_shakespeare() -> None:
    """Tiny Shakespeare to input.txt, as the lecture has it, where there is none yet."""
    if os.path.exists("input.txt"):
        return
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=60) as response:
            text = response.read()
        Path("input.txt.tmp").write_bytes(text)
        os.replace("input.txt.tmp", "input.txt")  # whole, or not there
    except (OSError, http.client.HTTPException) as error:
        advice = "put it there as input.txt by hand, or use --dataset stdlib, which works offline"
        raise SystemExit(f"{SHAKESPEARE} cannot be read ({one_line(error)}): {advice}") from None


def corpus_of(sources: Iterable[str | Path], column: str = "text", part: str = "") -> Corpus:
    """The documents of files, in the order given; those of a folder, all below it too, and of a
    pattern sorted by path. hf://datasets/USER/NAME/PATTERN is on the hub.

    .parquet: the column; .jsonl (.gz, .zst): that key of each line; .txt: the file is one document;
    .bin, on the hub: tokens. Null and empty texts are no documents.
    The part "3/8" is the third of eight parts of the files. SystemExit at once where there is
    nothing to read, and where a parquet file is damaged or has no such column of text.
    """
    files = {}
    for source in map(str, sources):
        files |= hub_files(source) if source.startswith(HUB) else local_files(source)
    if not files:
        names = ", ".join(map(str, sources))
        raise SystemExit(f"{names}: nothing to read, the file types are {', '.join(SUFFIXES)}")
    facts = [column, *((Path(path).name, size) for path, size in files.items())]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    i, n = part_of(part)
    if n > len(files):
        raise SystemExit(f"--part {part}: for {len(files)} files there are at most as many parts")
    paths = [*files][len(files) * (i - 1) // n : len(files) * i // n]
    n_bytes = text_bytes({path: files[path] for path in paths}, column)
    return Corpus(functools.partial(file_pieces, paths, column), identity, n_bytes, part)


def part_of(part: str) -> tuple[int, int]:
    """(3, 8) for "3/8", (1, 1) for "". SystemExit where it is no part."""
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", part or "1/1", re.ASCII)
    i, n = map(int, match.groups()) if match else (1, 0)
    if i > n:
        raise SystemExit(f"--part {part}: 1/8 is the first of eight parts, 8/8 the last")
    return i, n


def local_files(source: str) -> dict[str, int]:
    """The files of documents that a path or a pattern means, and their sizes in bytes."""
    if os.path.isdir(source):
        found = sorted(map(str, Path(source).rglob("*")))
    elif os.path.exists(source):  # False too for a name that is too long
        found = [source]
        if not source.endswith(SUFFIXES):
            raise SystemExit(f"{source}: nothing to read, the file types are {', '.join(SUFFIXES)}")
    else:
        found = sorted(glob.glob(source, recursive=True))
        if not found:
            raise SystemExit(f"{source} does not exist: give files or folders of documents")
    found = [path for path in found if path.endswith(SUFFIXES) and os.path.isfile(path)]
    return {path: os.path.getsize(path) for path in found}


def hub_files(pattern: str) -> dict[str, int]:
    """The same for a pattern of files on the hub. SystemExit where it has none."""
    (found,) = patiently(lambda: [hub().glob(pattern, detail=True)], pattern, first=True)
    files = {f"hf://{path}": info["size"] for path, info in found.items()}
    files = {path: size for path, size in files.items() if path.endswith((".parquet", ".bin"))}
    if not files:
        raise SystemExit(f"{pattern}: the hub has no such .parquet files")
    number = re.compile(r"_(\d{6})\.bin$")  # llm.c's: val_000000 comes before train_000001
    keys = {path: (number.findall(path), path) for path in files}
    return {path: files[path] for path in sorted(files, key=keys.get)}


@functools.cache
def hub():
    """The hub as a file system; forked processes share what it knows."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # it tells of each try of its own
    return huggingface_hub.HfFileSystem()


def patiently(read: Callable[[], Iterable], path: str, first: bool = False) -> Iterator:
    """What read() yields from the hub. Where it fails it is called again, after growing pauses.
    SystemExit where that does not help, and at once where nothing is there, or no network at a
    `first` contact."""
    from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled

    done, pauses = 0, iter(PAUSES)
    while True:
        try:
            for item in itertools.islice(read(), done, None):
                yield item
                done, pauses = done + 1, iter(PAUSES)
            return
        except Exception as error:  # the hub, the sockets and pyarrow each have their own
            unreached = first and not hasattr(error, "response")
            lost = FileNotFoundError, EntryNotFoundError, OfflineModeIsEnabled
            gone = isinstance(error, lost)
            pause = None if gone or unreached else next(pauses, None)
            if pause is None:
                raise SystemExit(f"{path}: {one_line(error)}: {OFFLINE}") from error
            print(f"\n{path}: {one_line(error)}: next try in {pause} s", file=sys.stderr)
            time.sleep(pause)
            open_parquet.cache_clear()  # what it has read ahead may be torn


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def text_bytes(files: dict[str, int], column: str) -> int:
    """About how many bytes of text are in files of these sizes."""
    total, ratio = 0, 0.0
    for path, size in files.items():
        if path.endswith(".bin"):
            total += size // 2 * 4  # of text a token is four bytes, about, here two
        elif not path.endswith(".parquet"):
            total += size * (4 if path.endswith((".gz", ".zst")) else 1)  # as text is compressed
        elif path.startswith(HUB) and ratio:  # the first one speaks for the others
            total += round(size * ratio)
        else:
            n_bytes = sum(n_bytes for _, n_bytes in row_groups(path, column))
            ratio = n_bytes / size
            total += n_bytes
    return total


def file_pieces(paths: list[str], column: str, file: int = 0, number: int = 0) -> Iterator[Piece]:
    """The pieces of files, from one of them on."""
    for f, path in enumerate(paths[file:], file):
        if path.endswith(".bin"):
            reads = token_reads(path)
        elif path.endswith(".parquet"):
            reads = parquet_reads(path, column)
        elif path.endswith(".txt"):
            reads = batches(text_rows(path))
        else:
            reads = json_reads(path, column)
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


def json_reads(path: str, column: str) -> Iterator[Callable]:
    """What reads a file of JSON lines, a BLOCK at a time. A line that is much longer is read here,
    as no worker should hold it."""
    import pyarrow

    number = 1
    try:
        with io.BufferedReader(pyarrow.input_stream(path, compression="detect")) as file:
            while lines := file.read(BLOCK):
                rest = file.readline(LONGEST)  # of the last line
                if len(rest) < BLOCK:
                    yield functools.partial(json_rows, lines + rest, number, column)
                elif rest.endswith(b"\n") or not file.peek(1):
                    yield from batches(json_rows(lines + rest, number, column))
                else:
                    lines = lines[: lines.rfind(b"\n") + 1]
                    yield functools.partial(json_rows, lines, number, column)
                    error = ValueError(f"the line is longer than {LONGEST:,} bytes")
                    yield functools.partial(iter, [(number + lines.count(b"\n"), error, True)])
                    while not rest.endswith(b"\n") and (rest := file.readline(BLOCK)):
                        pass
                number += (lines + rest[-1:]).count(b"\n")
    except (OSError, ValueError) as error:  # what is compressed may be torn
        rest = ValueError(f"{error} (and the rest of the file)")
        yield functools.partial(iter, [(number, rest, True)])


def json_rows(lines: bytes, number: int, column: str) -> Iterator[Row]:
    """The rows of JSON lines, of which the first has that number."""
    for n, line in enumerate(lines.split(b"\n"), number):  # in bytes, only \n ends a line
        text = None
        if line.strip():
            try:
                text = json.loads(line)[column]
            except KeyError:
                text = ValueError(f'it has no key "{column}"')
            except (ValueError, TypeError, RecursionError) as error:
                text = error
        yield n, text, True


def token_reads(path: str) -> Iterator[Callable]:
    """What reads a file of tokens on the hub, llm.c's: 256 int32 of header, then uint16."""
    header, size = [], hub().size(path)
    if size >= 1024 and size % 2 == 0:
        ((_, header, _),) = patiently(functools.partial(token_rows, path, 0, 12), path)
        header = header.view("<i4").tolist()
    if header != [20240520, 1, size // 2 - 512]:
        raise SystemExit(f"{path} is not one of llm.c's files of GPT-2's tokens")
    for start in range(1024, size, LARGE):
        read = functools.partial(token_rows, path, start, min(start + LARGE, size))
        yield functools.partial(patiently, read, path)


def token_rows(path: str, start: int, end: int) -> Iterator[Row]:
    """Bytes of a file on the hub, as one row of tokens."""
    content = hub().cat_file(path, start, end, cache_type="none")  # no more than these
    yield 1, np.frombuffer(content, dtype="<u2"), False


def parquet_reads(path: str, column: str) -> Iterator[Callable]:
    """What reads a parquet file: row groups of a BLOCK or more together. A row group that is LARGE
    is read here, as no worker should hold it."""
    groups, size, number = [], 0, 1
    for group, (n_rows, n_bytes) in enumerate(row_groups(path, column)):
        if n_bytes < LARGE:
            groups.append((group, number))
            size += n_bytes
        if groups and (n_bytes >= LARGE or size >= (LARGE if path.startswith(HUB) else BLOCK)):
            yield functools.partial(parquet_rows, path, column, groups)
            groups, size = [], 0
        if n_bytes >= LARGE:
            yield from batches(parquet_rows(path, column, [(group, number)]))
        number += n_rows
    if groups:
        yield functools.partial(parquet_rows, path, column, groups)


def row_groups(path: str, column: str) -> list[tuple[int, int]]:
    """Each row group's number of rows, and bytes of text."""
    if path.startswith(HUB):
        ((_, chunks),) = patiently(lambda: [open_parquet(path, column)], path)
    else:
        _, chunks = open_parquet(path, column)
    return [(chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks]


@functools.lru_cache(maxsize=2)  # a worker asks once a piece
def open_parquet(path: str, column: str) -> tuple:
    """The file, and for each row group what it knows of the column. SystemExit where there is no
    such column of text, or a local file is damaged."""
    import pyarrow.parquet  # only parquet needs it

    # from the hub little more is read than is asked for
    file = hub().open(path, block_size=BLOCK) if path.startswith(HUB) else path
    try:
        # a buffer, without which all of a row group is read before its first row
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=2**16, pre_buffer=False)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        if path.startswith(HUB):
            raise
        damage = f"{path} is damaged ({one_line(error)})"
        raise SystemExit(f"{damage}: copy it again, or remove it") from None
    types = {field.name: str(field.type) for field in parquet.schema_arrow}
    if types.get(column) not in ("string", "large_string", "string_view"):
        has = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise SystemExit(f'{path} has no text in a column "{column}": --text_column of {has:.300}')
    index = [parquet.schema.column(i).path for i in range(len(parquet.schema))].index(column)
    groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
    return parquet, [group.column(index) for group in groups]


def parquet_rows(path: str, column: str, groups: list[tuple[int, int]]) -> Iterable[Row]:
    """The rows of row groups, each given as its number and that of its first row."""
    read = functools.partial(group_rows, path, column, groups)
    return patiently(read, path) if path.startswith(HUB) else read()


def group_rows(path: str, column: str, groups: list[tuple[int, int]]) -> Iterator[Row]:
    """The same, which fails where the hub does."""
    import pyarrow.parquet

    parquet, chunks = open_parquet(path, column)
    if path.startswith(HUB) and len(groups) > 1:
        # The hub counts requests: one for all of them, unless other columns are most of the bytes.
        text = [chunks[group] for group, _ in groups]
        starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in text]
        span = starts[-1] + text[-1].total_compressed_size - starts[0]
        small = span < 2 * sum(chunk.total_compressed_size for chunk in text)
        file = hub().open(path, block_size=span if small else BLOCK)
        parquet = pyarrow.parquet.ParquetFile(
            file, metadata=parquet.metadata, buffer_size=2**16, pre_buffer=False
        )
    for group, number in groups:
        chunk = chunks[group]
        mean = 1 + chunk.total_uncompressed_size // max(1, chunk.num_values)  # bytes a row
        at_a_time = max(1, min(1024, BLOCK // mean))
        try:
            for batch in parquet.iter_batches(at_a_time, [group], [column], use_threads=False):
                for value in batch.column(0):
                    yield number, text_of(value), True
                    number += 1
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            if path.startswith(HUB):
                raise
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

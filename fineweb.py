"""Documents in, shards of tokens out.

    python fineweb.py                                # FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python fineweb.py FILE_OR_FOLDER --out my_data   # .parquet, .jsonl, .txt; a folder: all of them

A shard is a .npy file of uint16 tokens, one dimension. Every document begins with the end-of-text
token; the stream's first tokens are held out for validation. manifest.json, written last,
describes the shards. The trainer reads them by open_shards.

FineWeb-Edu: Penedo et al. 2024, https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu
"""

import collections
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
SUFFIXES = (".parquet", ".jsonl", ".txt")


@functools.cache  # a worker asks once a batch
def get_encoding(name: str) -> tiktoken.Encoding:
    """The encoding "gpt2" (50,257 tokens) or "bytes" (UTF-8's 256 values and end-of-text: nothing
    to download). SystemExit where there is none of that name, or GPT-2's cannot be fetched."""
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            # Without merges any split will do. Short pieces, since tiktoken's search for merges
            # is quadratic in a piece's length.
            pat_str=r"[\s\S]{1,64}",
            mergeable_ranks={bytes([value]): value for value in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    if name != "gpt2":
        raise SystemExit(f'unknown encoding "{name}": choose gpt2 or bytes')
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network; a damaged download
        raise SystemExit(
            f"GPT-2's vocabulary cannot be fetched ({type(error).__name__}): connect once, "
            "or set TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from error


def read_documents(source: str | Path) -> Iterator[str]:
    """The documents of a file, or of all files in a folder and below, sorted by path.

    .parquet: column "text"; .jsonl: key "text" of each line; .txt: the file is one document.
    Null and empty texts are skipped. SystemExit at once where there is nothing to read, and with
    the file and row (or line) where something is not readable as text.
    """
    source = Path(source)
    if not source.exists():
        raise SystemExit(f"{source} does not exist: give a file or folder of documents")
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    files = [file for file in files if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        raise SystemExit(f"{source}: nothing to read, the file types are {', '.join(SUFFIXES)}")
    # Lazy from here on: a corpus may be larger than the memory.
    return (text for file in files for text in only_text(rows_of(file), file, "mend or remove it"))


def rows_of(file: Path) -> Iterator:
    """Whatever a file has where texts should be, row by row."""
    if file.suffix == ".txt":
        yield file.read_bytes().decode("utf-8")  # opened as text, \r\n would become \n
    elif file.suffix == ".jsonl":
        with open(file, "rb") as lines:  # in bytes, only \n ends a line
            for line in lines:  # a blank one counts as null: rows stay lines
                yield json.loads(line)["text"] if line.strip() else None
    else:
        import pyarrow.parquet  # comes with datasets; only parquet needs it

        with pyarrow.parquet.ParquetFile(file) as parquet:
            if "text" not in parquet.schema_arrow.names:
                raise ValueError('no column "text"')
            # A few rows of one row group at a time, never the whole file.
            for batch in parquet.iter_batches(batch_size=1024, columns=["text"]):
                yield from batch.column(0).to_pylist()


def fineweb_edu() -> Iterator[str]:
    """The documents of FineWeb-Edu's sample-10BT, streamed: no copy of the text on the disk.
    SystemExit where the hub does not deliver."""

    def rows() -> Iterator:
        from datasets import load_dataset

        data = load_dataset(FINEWEB_EDU, name="sample-10BT", split="train", streaming=True)
        yield from (row["text"] for row in data)

    advice = "check the network, or use python fineweb.py FILE_OR_FOLDER, which works offline"
    return only_text(rows(), FINEWEB_EDU, advice)


def only_text(rows: Iterable, origin: str | Path, advice: str) -> Iterator[str]:
    """The rows without null and empty ones; SystemExit where one is no text or cannot be read."""
    number = 1
    try:
        for row in rows:
            if row is not None and not isinstance(row, str):
                raise TypeError(f"{type(row).__name__} where text should be")
            if row:
                yield row
            number += 1
    except Exception as error:  # json, pyarrow, the hub and the sockets each have their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SystemExit(f"{origin}, line or row {number}: {reason}: {advice}") from error


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


def tokenize(encoding: str, documents: list[str]) -> np.ndarray:
    """The documents' tokens in one row, end-of-text before each document: (n,) uint16."""
    enc = get_encoding(encoding)
    # "ordinary": a document that spells <|endoftext|> does not end there. uint16: 50,257 < 2**16
    rows = ([enc.eot_token, *enc.encode_ordinary(document)] for document in documents)
    return np.concatenate([np.array(row, dtype=np.uint16) for row in rows])


def token_stream(documents: Iterable[str], encoding: str, workers: int) -> Iterator[np.ndarray]:
    """The documents' tokens, batch by batch in their order, tokenized by `workers` processes."""
    documents = iter(documents)
    # Sixteen pages take some milliseconds to tokenize, far longer than to send to a process.
    batches = iter(lambda: list(itertools.islice(documents, 16)), [])
    if workers == 1:
        yield from (tokenize(encoding, batch) for batch in batches)
        return  # no process to start
    # multiprocessing.Pool.imap reads its input in a thread, where an error that ends the program
    # leaves the pool waiting forever. Here the main process reads, and only a little ahead.
    with ProcessPoolExecutor(workers) as pool:
        pending = collections.deque()
        for batch in batches:
            pending.append(pool.submit(tokenize, encoding, batch))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def cut(
    stream: Iterable[np.ndarray], shard_size: int, val_tokens: int, max_tokens: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(split, tokens) shard by shard; the tokens are valid until the next shard is asked for."""
    shard = np.empty(shard_size, dtype=np.uint16)  # takes memory only as it is filled
    filled = total = 0
    with tqdm(total=max_tokens or None, unit="tok", unit_scale=True, mininterval=1, delay=1) as bar:
        for tokens in stream:
            if max_tokens:  # the last document may end in the middle
                tokens = tokens[: max_tokens - total]
            bar.update(len(tokens))
            while len(tokens):
                room = shard_size - filled
                if total < val_tokens:  # no shard holds both validation and training tokens
                    room = min(room, val_tokens - total)
                head, tokens = tokens[:room], tokens[room:]  # a document goes on in the next shard
                shard[filled : filled + len(head)] = head
                filled += len(head)
                total += len(head)
                if filled == shard_size or total == val_tokens:
                    yield "val" if total <= val_tokens else "train", shard[:filled]
                    filled = 0
            if total == max_tokens:
                break
    if filled:  # the last shard is as long as it happens to be
        yield "val" if total <= val_tokens else "train", shard[:filled]


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write aside, then rename: under its own name a file is always whole."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        raise SystemExit(f"cannot write {path} ({error.strerror}): make room for it") from error


def write_shards(
    documents: Iterable[str],
    out: str | Path,
    encoding: str,
    shard_size: int = 100_000_000,
    val_tokens: int = 100_000,
    max_tokens: int = 0,
    workers: int = 0,
    name: str | None = None,
) -> dict:
    """Tokenize documents into NAME_{val,train}_NNNNNN.npy in the folder `out`; return what
    manifest.json there says.

    Of the stream of tokens, which ends after `max_tokens` (0: with the documents), the first
    `val_tokens` are for validation. No token is lost between shards of `shard_size`. `workers`
    processes tokenize (0: one a core). NAME is by default the folder's.
    SystemExit for impossible numbers, for a folder that holds shards or cannot be written, and
    where no tokens are left to train on.
    """
    out = Path(out)
    name = name or out.resolve().name
    enc = get_encoding(encoding)  # before any worker needs it: they find it in tiktoken's cache
    if min(shard_size, val_tokens) < 1 or min(max_tokens, workers) < 0:
        raise SystemExit("shard_size, val_tokens, max_tokens, workers: give positive numbers")
    too_short = f"{val_tokens:,} validation tokens leave none to train on: lower --val_tokens"
    if 0 < max_tokens <= val_tokens:
        raise SystemExit(f"{too_short} or raise --max_tokens")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # found out now, not after an hour of tokenizing
    except OSError as error:
        raise SystemExit(f"cannot write to {out} ({error.strerror}): choose another") from error
    if any(f.suffix in (".npy", ".bin") or f.name == "manifest.json" for f in out.iterdir()):
        raise SystemExit(f"{out} already holds shards: choose another --out, or delete it")

    shards, split = [], "val"
    stream = token_stream(documents, encoding, workers or os.cpu_count() or 1)
    for split, tokens in cut(stream, shard_size, val_tokens, max_tokens):
        file = f"{name}_{split}_{len(shards):06d}.npy"
        content = io.BytesIO()  # the file's bytes, to write and to sum
        np.save(content, tokens)
        write_file(out / file, content.getbuffer())
        checksum = hashlib.sha256(content.getbuffer()).hexdigest()
        facts = {"tokens": len(tokens), "largest": int(tokens.max()), "sha256": checksum}
        shards.append({"file": file} | facts)
    if split == "val":
        for shard in shards:  # so that another try finds the folder empty
            (out / shard["file"]).unlink()
        raise SystemExit(f"{too_short} or add documents")

    manifest = {"encoding": encoding, "vocab_size": enc.n_vocab, "eot_token": enc.eot_token}
    manifest["shards"] = shards
    # Last: a folder without it is not finished.
    write_file(out / "manifest.json", json.dumps(manifest, indent=2).encode())
    return manifest


def open_shards(folder: str | Path, split: str, vocab_size: int) -> list[np.ndarray]:
    """The shards of a split, "train" or "val", in order: each (n,) uint16, memory-mapped.

    Reads .npy, and llm.c's .bin: 256 int32 of header, then the tokens. SystemExit, one line, if
    they are not there, not whole, or have tokens beyond the vocabulary.
    """
    folder = Path(folder)
    files = sorted(folder.glob(f"*_{split}_{'[0-9]' * 6}.*"))
    files = [file for file in files if file.suffix in (".npy", ".bin")]
    if not files:
        raise SystemExit(
            f"no {split} shards in {folder}/: `python fineweb.py` makes FineWeb-Edu's, "
            f"`python fineweb.py FILE_OR_FOLDER --out {folder}` your own"
        )
    try:
        manifest = folder / "manifest.json"  # llm.c's shards have none
        manifest = json.loads(manifest.read_text()) if manifest.exists() else {"shards": []}
        known = {f["file"]: (int(f["tokens"]), int(f["largest"])) for f in manifest["shards"]}
        n_vocab = manifest.get("vocab_size", vocab_size)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{folder}/manifest.json is damaged ({error!r}): make it again") from None
    if n_vocab != vocab_size:
        raise SystemExit(f"{folder}/ has a vocabulary of {n_vocab}: give --vocab_size {n_vocab}")
    missing = {name for name in known if f"_{split}_" in name[-17:]} - {f.name for f in files}
    if missing:
        raise SystemExit(f"{folder}/ lacks {min(missing)}, which manifest.json lists: copy it too")
    shards = [open_shard(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        # no word of it: read it through, a minute for 10B tokens
        n_tokens, largest = known.get(file.name) or (len(shard), int(shard.max(initial=0)))
        if len(shard) != n_tokens:
            raise SystemExit(
                f"{file} has {len(shard)} tokens, manifest.json says {n_tokens}: "
                "copy it or make it again"
            )
        if largest >= vocab_size:
            raise SystemExit(
                f"{file} has a token {largest}, beyond the vocabulary of {vocab_size}: "
                "give the --vocab_size of its encoding"
            )
    return shards


def open_shard(file: Path) -> np.ndarray:
    """One shard's tokens; SystemExit names a file that holds none."""
    try:
        if file.suffix == ".bin":
            magic, version, n_tokens = np.fromfile(file, dtype="<i4", count=3)
            if (magic, version) != (20240520, 1):
                raise ValueError("its header is not llm.c's")
            return np.memmap(file, dtype="<u2", mode="r", offset=256 * 4, shape=(int(n_tokens),))
        tokens = np.load(file, mmap_mode="r")
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(f"it holds {tokens.dtype} of shape {tokens.shape}")
        return tokens
    except (OSError, ValueError, EOFError) as error:
        raise SystemExit(f"{file} is no shard of uint16 tokens ({error}): make it again") from None


def main(
    source: tyro.conf.Positional[str] = "",
    out: str = "",
    encoding: Literal["gpt2", "bytes"] = "gpt2",
    shard_size: int = 100_000_000,
    val_tokens: int = 0,
    max_tokens: int = 0,
    workers: int = 0,
) -> None:
    """Write a corpus as shards of tokens.

    Args:
        source: a .parquet, .jsonl or .txt file, or a folder of such; without it, FineWeb-Edu
        out: folder for the shards; without it, edu_fineweb10B for FineWeb-Edu
        encoding: gpt2, or bytes, which needs no download
        shard_size: tokens a shard
        val_tokens: tokens held out; 0: one shard of FineWeb-Edu, 100,000 of anything else
        max_tokens: stop after so many; 0: all
        workers: processes that tokenize; 0: one a core
    """
    if source and not out:
        raise SystemExit("name a folder for the shards: --out my_data")
    out = out or "edu_fineweb10B"
    val_tokens = val_tokens or (100_000 if source else shard_size)
    documents, name = (read_documents(source), None) if source else (fineweb_edu(), "edufineweb")
    numbers = (shard_size, val_tokens, max_tokens, workers)
    manifest = write_shards(documents, out, encoding, *numbers, name)
    total = sum(shard["tokens"] for shard in manifest["shards"])
    print(f"{total:,} tokens, the first {val_tokens:,} for validation, in {out}")
    print(f"train on them: python train_gpt2.py --data_dir {out}")


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)

"""Documents in, shards of tokens out.

    python fineweb.py                                # FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python fineweb.py --dataset tinystories          # or another: python fineweb.py --help
    python fineweb.py FILES --out my_data            # .parquet, .jsonl (.gz, .zst), .txt; folders
    python fineweb.py --part 3/8                     # the third of eight machines
    python fineweb.py --download                     # FineWeb-Edu's tokens, as others made them
    python fineweb.py --verify my_data               # are the shards what was written?

A shard is a .npy file of uint16 tokens, one dimension. Every document begins with the end-of-text
token; the stream's first tokens are held out for validation. The shards are the same for any
number of workers. A call that was stopped goes on when the same command is given again, from where
progress.json says. manifest.json, written last, describes the shards, with their checksums. The
trainer reads them by open_shards, which compares each with its checksum once: verified.json
remembers which were right.

FineWeb and FineWeb-Edu: Penedo et al. 2024, https://arxiv.org/abs/2406.17557
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tiktoken
import tyro
from filelock import FileLock, Timeout
from tqdm import tqdm

import sources
from sources import DATASETS, Corpus, Piece, chunks, one_line, part_of

LONGEST_CHUNK = 2**18  # characters that tiktoken gets at a time: a gap of a million is too many
BYTES_A_TOKEN = {"gpt2": 4, "bytes": 1}  # about, in English
# NAME_SPLIT_NNNNNN: no path to another folder, nothing that ends a line or cannot be printed
SHARD_NAME = r"[^/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*_(train|val)_[0-9]{6}\.(npy|bin)"
# what manifest.json says, and what of each shard: types, and patterns of the values as text
MANIFEST = {"encoding": (str, ".*"), "eot_token": (int, ".*"), "shards": (list, "(?s).*")}
MANIFEST |= {"vocab_size": (int, "[1-9][0-9]{0,17}")}
# and what it says besides if write_shards has made it: totals, and what a further call compares
TOTALS = dict.fromkeys(("tokens", "documents", "text_bytes"), (int, "[0-9]{1,18}"))
MADE = TOTALS | {"skipped": (list, "(?s).*"), "made_by": (dict, "(?s).*")}
POSITION = {"position": (list, r"\[\d+, \d+, \d+\]")}  # of a file, a piece, and in its tokens
ENTRY = {"file": (str, SHARD_NAME), "sha256": (str, "[0-9a-f]{64}")}
ENTRY |= {"tokens": (int, "[0-9]{1,18}"), "largest": (int, "[0-9]{1,18}")}
# one at a time: Python 3.11's parser, by which numpy reads them, errs now and then when threads
# share it ("AST constructor recursion depth mismatch", CPython's issue 106905)
HEADERS = threading.Lock()


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


# ---- tokens: documents through the workers -------------------------------------------------------


class Tokens(NamedTuple):
    """What becomes of a piece."""

    tokens: np.ndarray  # (n,) uint16, end-of-text before each document
    n_bytes: int  # of text
    bad: list[str]  # a line for each row that is skipped: the file, the row, what is wrong


def tokenize(piece: Piece, encoding: str) -> Tokens:
    """A piece's documents as tokens, one after the other."""
    enc = get_encoding(encoding)
    eot = np.array([enc.eot_token], dtype=np.uint16)
    parts, n_bytes, bad = [eot[:0]], 0, []
    for number, text, begins in piece.read():
        if isinstance(text, np.ndarray):  # it came as tokens
            if text.max(initial=0) >= enc.n_vocab:
                what = f"{piece.path} has a token {text.max()}, beyond the vocabulary of"
                raise SystemExit(f"{what} {enc.n_vocab}: give its --encoding")
            parts.append(text)
        elif isinstance(text, str) and text:
            parts += [eot] if begins else []
            parts += [encode(enc, chunk) for chunk in chunks(text, LONGEST_CHUNK)]
            n_bytes += len(text if text.isascii() else text.encode("utf-8", "surrogatepass"))
        elif text is not None and not isinstance(text, str):
            if not isinstance(text, Exception):
                text = TypeError(f"{type(text).__name__} where text should be")
            bad.append(f"{piece.path}, row {number}: {one_line(text)}")
    # 50,257 < 2**16
    return Tokens(np.concatenate(parts, dtype=np.uint16, casting="unsafe"), n_bytes, bad)


def encode(enc: tiktoken.Encoding, text: str) -> np.ndarray:
    """A text's tokens, (n,) uint32."""
    try:
        # a document that spells <|endoftext|> does not end there
        return enc.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half a surrogate pair, as JSON can spell it: U+FFFD
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return enc.encode_to_numpy(text, disallowed_special=())


def token_stream(
    corpus: Corpus, encoding: str, workers: int, file: int = 0, number: int = 0
) -> Iterator[tuple[Piece, Tokens]]:
    """A corpus's pieces from one on, in their order, tokenized by `workers` processes."""
    if workers == 1:
        for piece in corpus.pieces(file, number):
            yield piece, tokenize(piece, encoding)
        return  # no process to start
    # A pipe for each process, which ends where that is killed, even in the middle of an answer.
    # The pools of the standard library share one among all: the main process would wait forever.
    idle, processes = queue.SimpleQueue(), []
    for _ in range(workers):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=work, args=(theirs, encoding), daemon=True)
        process.start()  # where processes are forked, they are before a file is open
        theirs.close()
        idle.put(ours)
        processes.append(process)

    def ask(piece: Piece) -> Tokens:
        pipe = idle.get()
        try:
            pipe.send(piece)
            answer = pipe.recv()
        except (EOFError, OSError):
            answer = SystemExit(
                "a worker was killed, as happens where memory ends: give the same command with "
                "fewer --workers, and it goes on"
            )
        idle.put(pipe)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    threads, pending = ThreadPoolExecutor(workers), collections.deque()
    try:
        for piece in corpus.pieces(file, number):
            pending.append((piece, threads.submit(ask, piece)))
            if len(pending) > 2 * workers:  # enough to keep them busy while a shard is written
                piece, future = pending.popleft()
                yield piece, future.result()
        for piece, future in pending:
            yield piece, future.result()
    finally:  # done, or ended early: then nothing that a worker still does is needed
        for process in processes:
            process.terminate()
        threads.shutdown(cancel_futures=True)


def work(pipe: Connection, encoding: str) -> None:
    """A worker: pieces in, tokens out. It leaves Ctrl-C to the main process, and ends where that
    was killed."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        piece = pipe.recv()
        try:
            answer = tokenize(piece, encoding)
        except BaseException as error:
            answer = error
        pipe.send(answer)


# ---- shards: tokens into files -------------------------------------------------------------------


def write_shards(
    documents: Corpus | Iterable[str],
    out: str | Path,
    encoding: str,
    shard_size: int = 100_000_000,
    val_tokens: int = 100_000,
    max_tokens: int = 0,
    workers: int = 0,
    name: str | None = None,
    max_bad: int = 100,
) -> dict:
    """Tokenize documents into NAME_{val,train}_NNNNNN.npy in the folder `out`; return what
    manifest.json there says.

    Of the stream of tokens, which ends after `max_tokens` (0: with the documents), the first
    `val_tokens` are for validation. No token is lost between shards of `shard_size`. `workers`
    processes tokenize (0: one a core). NAME is by default the folder's. Up to `max_bad` rows that
    are no text are skipped. A corpus with an identity goes on where an earlier call was stopped.
    SystemExit for impossible numbers and names, for a folder that holds other shards or cannot be
    written, and where no tokens are left to train on.
    """
    if min(shard_size, val_tokens) < 1 or min(max_tokens, workers, max_bad) < 0:
        numbers = "shard_size, val_tokens, max_tokens, workers, max_bad"
        raise SystemExit(f"{numbers}: give positive numbers")
    if shard_size > 2**31 or workers > 1000:  # a shard is in memory, and so is a worker
        raise SystemExit("give a shard_size of at most 2**31 tokens, and at most 1,000 workers")
    if 0 < max_tokens <= val_tokens:
        raise SystemExit(none_to_train(val_tokens, "raise --max_tokens"))
    corpus = documents
    if not isinstance(corpus, Corpus):
        corpus = Corpus(functools.partial(sources.document_pieces, documents))
    get_encoding(encoding)  # before any worker needs it: they find it in tiktoken's cache
    settings = {"source": corpus.identity, "encoding": encoding, "shard_size": shard_size}
    settings |= {"val_tokens": val_tokens, "max_tokens": max_tokens}
    stream = functools.partial(token_stream, corpus, encoding, workers or n_cores())
    rest = stream, Path(out), name, settings, max_bad, corpus.n_bytes
    return write_part(corpus.part, *rest) if corpus.part else write_stream(*rest)


def n_cores() -> int:
    """The cores that this process may use: on a shared machine, fewer than it has."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return len(cores)


def write_stream(
    stream: Callable[..., Iterator[tuple[Piece, Tokens]]],
    out: Path,
    name: str | None,
    settings: dict,
    max_bad: int,
    n_bytes: int = 0,
    release: Callable[[int, int], None] = lambda file, number: None,
) -> dict:
    """write_shards for tokens from anywhere: stream(file, number) yields the pieces from one on.
    release(file, number) is called when all pieces before that one are in finished shards."""
    name = name or out.resolve().name
    if not split_of(f"{name}_val_000000.npy"):
        raise SystemExit(f"{name!r} cannot begin a shard's name: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # found out now, not after an hour of tokenizing
    except OSError as error:
        raise SystemExit(f"cannot write to {out} ({error.strerror}): choose another") from error
    with only_writer(out):
        state = begun(out, name, settings)
        if "position" not in state:
            (out / "progress.json").unlink(missing_ok=True)  # killed when all was finished
            return state
        n_tokens = n_bytes // BYTES_A_TOKEN[settings["encoding"]]  # about
        n_tokens = min(n_tokens, settings["max_tokens"] or n_tokens)
        check_room(out, n_tokens - state["tokens"])
        write_file(out / "progress.json", json.dumps(state).encode())
        file, number, offset = state["position"]
        bar = progress_bar(n_tokens, state["tokens"])
        with bar, contextlib.closing(stream(file, number)) as pieces:
            tokens = counted(pieces, state, max_bad, bar, n_bytes)
            for split, shard, position in cut(tokens, settings, state["tokens"], offset):
                shard_name = f"{name}_{split}_{len(state['shards']):06d}.npy"
                content = io.BytesIO()  # the file's bytes, to write and to sum
                np.save(content, shard)
                write_file(out / shard_name, content.getbuffer())
                checksum = hashlib.sha256(content.getbuffer()).hexdigest()
                facts = {"tokens": len(shard), "largest": int(shard.max()), "sha256": checksum}
                state["shards"].append({"file": shard_name} | facts)
                state["tokens"] += len(shard)
                state["documents"] += int(np.count_nonzero(shard == state["eot_token"]))
                state["position"] = position
                write_file(out / "progress.json", json.dumps(state).encode())
                release(*position[:2])
            bar.total = bar.n  # it was an estimate
        del state["position"]
        if settings["val_tokens"] >= state["tokens"] and "part" not in settings:
            for entry in state["shards"]:  # so that another try finds the folder empty
                (out / entry["file"]).unlink()
            (out / "progress.json").unlink(missing_ok=True)
            raise SystemExit(none_to_train(settings["val_tokens"], "add documents"))
        state["made_by"].pop("joins", None)  # the same as one machine's
        # Last: a folder without it is not finished.
        write_file(out / "manifest.json", json.dumps(state, indent=2).encode())
        (out / "progress.json").unlink(missing_ok=True)
    return state


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write aside, then rename: under its own name a file is always whole."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # each rank may write its own
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        raise SystemExit(f"cannot write {path} ({error.strerror}): make room for it") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            aside.unlink()


def none_to_train(val_tokens: int, advice: str) -> str:
    return (
        f"{val_tokens:,} validation tokens leave none to train on: lower --val_tokens or {advice}"
    )


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """SystemExit where another process writes into the folder. A dead one's lock is free, as soon
    as its workers have ended too."""
    lock = FileLock(out / "fineweb.lock")
    try:
        lock.acquire(timeout=5)
    except Timeout:
        raise SystemExit(f"another process writes into {out}: choose another --out") from None
    except (OSError, NotImplementedError):
        pass  # a file system without locks, as clusters may have it
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            os.unlink(lock.lock_file)
        lock.release()


def begun(out: Path, name: str, settings: dict) -> dict:
    """What the manifest will say, as far as an earlier call has come, with the position in the
    stream where the next shard begins; without a position, it is finished. SystemExit if the folder
    holds anything else."""
    again = "choose another --out, or delete it"
    state = read_manifest(out)
    if "vocab_size" not in state:
        state = read_manifest(out, "progress.json")
        for aside in out.glob("*.tmp"):  # of a write that was killed
            aside.unlink()
        if state.get("tokens") == 0:  # killed before it could say that it has a shard
            state = {}
            for split in ("val", "train"):
                (out / f"{name}_{split}_000000.npy").unlink(missing_ok=True)
    if "vocab_size" in state:
        made_by = state.get("made_by", {})
        others = [key for key in settings | made_by if made_by.get(key) != settings.get(key)]
        if others or not settings["source"]:
            how = f", made with another {', '.join(others)}" if made_by else ""
            raise SystemExit(f"{out} already holds shards{how}: {again}")
        for entry in state["shards"]:
            open_shard(out / entry["file"], entry)
        if state["tokens"] != sum(entry["tokens"] for entry in state["shards"]):
            raise SystemExit(f"{out}/progress.json does not add up: {again}")
        return state
    if any(path.suffix in (".npy", ".bin") for path in out.iterdir()):
        raise SystemExit(f"{out} already holds shards: {again}")
    enc = get_encoding(settings["encoding"])
    state = {"encoding": enc.name, "vocab_size": enc.n_vocab, "eot_token": enc.eot_token}
    state |= {"tokens": 0, "documents": 0, "text_bytes": 0, "skipped": []}
    return state | {"made_by": dict(settings), "shards": [], "position": [0, 0, 0]}


def check_room(out: Path, n_tokens: int) -> None:
    """SystemExit where the disk has less room than so many tokens need."""
    need, free = 2 * n_tokens, shutil.disk_usage(out).free
    if need > free:
        raise SystemExit(
            f"{out} will need about {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free: "
            "make room, choose another --out, or a --max_tokens of half the bytes there are"
        )


def progress_bar(n_tokens: int, done: int) -> tqdm:
    """A bar of about so many tokens (0: nobody knows), for a terminal or, seldom drawn, a file."""
    every = 1 if sys.stderr.isatty() else 30  # seconds
    return tqdm(total=n_tokens or None, initial=done, unit=" tokens", unit_scale=True,
                mininterval=every, delay=1)  # fmt: skip


def counted(
    pieces: Iterable[tuple[Piece, Tokens]], state: dict, max_bad: int, bar: tqdm, n_bytes: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Pass the pieces' tokens on; add their text and bad rows up in the state, and show them.
    SystemExit where more than `max_bad` rows are bad."""
    before = state["position"][:2] if state["tokens"] else None  # this one was counted then
    n_tokens = state["tokens"] - state["position"][2]  # up to the first piece
    n_read, t0, max_tokens = 0, time.perf_counter(), state["made_by"]["max_tokens"]
    for piece, (tokens, size, bad) in pieces:
        if [piece.file, piece.number] != before:
            state["text_bytes"] += size
            for line in bad:
                if len(state["skipped"]) >= max_bad:
                    limit = f"more than {max_bad} bad rows"
                    raise SystemExit(f"{line}: {limit}: mend or remove it, or raise --max_bad")
                state["skipped"].append(line)
                if bar.last_print_n > bar.initial:  # it is shown
                    bar.clear()
                print(f"skipped {line}", file=sys.stderr)
        n_read += size
        n_tokens += len(tokens)
        if state["text_bytes"] and n_bytes:  # the end, as far as can be seen
            total = max(n_tokens, round(n_tokens / state["text_bytes"] * n_bytes))
            bar.total = min(total, max_tokens or total)
        bar.set_postfix_str(f"{n_read / 1e6 / (time.perf_counter() - t0):.1f} MB/s", refresh=False)
        bar.update(min(n_tokens, max_tokens or n_tokens) - bar.n)
        yield piece, tokens


def cut(
    stream: Iterable[tuple[Piece, np.ndarray]], settings: dict, total: int, offset: int
) -> Iterator[tuple[str, np.ndarray, list[int]]]:
    """(split, tokens, where the next shard begins), shard by shard; the tokens are valid until the
    next shard is asked for. `total` tokens, to `offset` in the first piece, are in shards."""
    shard = np.empty(settings["shard_size"], dtype=np.uint16)  # takes memory only as it is filled
    val_tokens, max_tokens = settings["val_tokens"], settings["max_tokens"]
    filled, position = 0, None
    for piece, tokens in stream:
        tokens, taken = tokens[offset:], offset
        offset, position = 0, [piece.file, piece.number, offset]
        if max_tokens:  # the last document may end in the middle
            tokens = tokens[: max_tokens - total]
        while len(tokens):
            room = len(shard) - filled
            if total < val_tokens:  # no shard holds both validation and training tokens
                room = min(room, val_tokens - total)
            head, tokens = tokens[:room], tokens[room:]  # a document goes on in the next shard
            shard[filled : filled + len(head)] = head
            filled += len(head)
            total += len(head)
            taken += len(head)
            position = [piece.file, piece.number, taken]
            if filled == len(shard) or total == val_tokens:
                yield "val" if total <= val_tokens else "train", shard[:filled], position
                filled = 0
        if max_tokens and total == max_tokens:
            break
    if filled:  # the last shard is as long as it happens to be
        yield "val" if total <= val_tokens else "train", shard[:filled], position


# ---- one corpus, several machines ----------------------------------------------------------------


def write_part(
    part: str,
    stream: Callable[..., Iterator[tuple[Piece, Tokens]]],
    out: Path,
    name: str | None,
    settings: dict,
    max_bad: int,
    n_bytes: int,
) -> dict:
    """write_stream for a part, into a folder of its own. The last of the parts to be finished puts
    them together, and returns the manifest of the whole; the others, their own."""
    i, n = part_of(part)
    if settings["max_tokens"]:
        raise SystemExit("--part shares out all of the source: leave out --max_tokens")
    folders = [out / f"part-{k}-of-{n}" for k in range(1, n + 1)]
    finished = read_manifest(out).get("made_by") == settings  # in an earlier call
    joining = settings | {"joins": n}
    if not finished and read_manifest(out, "progress.json").get("made_by") != joining:
        own = settings | {"val_tokens": 0, "part": part}
        manifest = write_stream(stream, folders[i - 1], name, own, max_bad, n_bytes)
        if not all((folder / "manifest.json").exists() for folder in folders):
            return manifest
    if not finished:
        join_parts(folders, out, name, joining)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # gone, if the earlier call was not killed
    return write_stream(stream, out, name, settings, max_bad)  # finished: what its manifest says


def join_parts(folders: list[Path], out: Path, name: str | None, joining: dict) -> None:
    """Write the parts' shards as those that one machine would have made; each goes when the tokens
    in it are written. SystemExit where they are not parts of the same."""
    parts = [read_manifest(folder) for folder in folders]
    settings = {key: value for key, value in joining.items() if key != "joins"}
    for k, (folder, part) in enumerate(zip(folders, parts, strict=True), 1):
        if part.get("made_by") != settings | {"val_tokens": 0, "part": f"{k}/{len(parts)}"}:
            raise SystemExit(f"{folder} is no part of the same: delete it, and do it again")
    if settings["val_tokens"] >= sum(part["tokens"] for part in parts):
        raise SystemExit(none_to_train(settings["val_tokens"], "add documents"))
    unused = collections.deque(
        ((f, k), folders[f] / entry["file"])
        for f, part in enumerate(parts)
        for k, entry in enumerate(part["shards"], 1)
    )

    def stream(file: int, number: int) -> Iterator[tuple[Piece, Tokens]]:
        for f, part in enumerate(parts):
            for k, entry in enumerate([None, *part["shards"]]):
                if (f, k) < (file, number):
                    continue
                if entry:
                    made = Tokens(open_shard(folders[f] / entry["file"], entry), 0, [])
                else:  # first what was read for all of them
                    nothing = np.empty(0, dtype=np.uint16)
                    made = Tokens(nothing, part["text_bytes"], part["skipped"])
                yield Piece(f, k, str(folders[f]), tuple), made

    def release(file: int, number: int) -> None:
        while unused and unused[0][0] < (file, number):
            unused.popleft()[1].unlink(missing_ok=True)

    write_stream(stream, out, name, joining, sys.maxsize, release=release)


# ---- shards: opened, and compared with what was written ------------------------------------------


def split_of(name: str) -> str | None:
    """The split, "train" or "val", that a shard's file name says; None for other names."""
    match = re.fullmatch(SHARD_NAME, name)
    return match[1] if match else None


def read_manifest(folder: str | Path, name: str = "manifest.json") -> dict:
    """What manifest.json says, or progress.json, every value checked; where there is none, as in
    llm.c's folders, {"shards": []}. SystemExit, one line, says what is wrong with it."""
    path = Path(folder) / name
    try:
        manifest = json.loads(path.read_bytes())
        parts = [(manifest, MANIFEST), *((entry, ENTRY) for entry in manifest["shards"])]
        if "made_by" in manifest:
            parts.append((manifest, MADE))
        if name == "progress.json":
            parts.append((manifest, POSITION))
        for part, rules in parts:
            for key, (kind, pattern) in rules.items():  # `type is`, as a bool is an int too
                if type(part[key]) is not kind or not re.fullmatch(pattern, str(part[key])):
                    raise ValueError(f"{key} is {part[key]!r}")
        if len({entry["file"] for entry in manifest["shards"]}) < len(manifest["shards"]):
            raise ValueError("it lists a file twice")
    except FileNotFoundError:
        return {"shards": []}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise SystemExit(f"{path} is damaged ({error!r:.200}): copy it or make it again") from None
    return manifest


def fingerprint(folder: str | Path) -> str:
    """16 hex digits for the data in a folder, the same wherever it lies: of the files, tokens and
    checksums in manifest.json; without it, of the shards' names and sizes."""
    facts = [(e["file"], e["tokens"], e["sha256"]) for e in read_manifest(folder)["shards"]]
    if not facts:
        files = [file for file in Path(folder).glob("*") if split_of(file.name)]
        facts = [(file.name, open_shard(file).nbytes) for file in files]
    return hashlib.sha256(json.dumps(sorted(facts)).encode()).hexdigest()[:16]


def open_shards(folder: str | Path, split: str, vocab_size: int) -> list[np.ndarray]:
    """The shards of a split, "train" or "val", in order: each (n,) uint16, memory-mapped.

    Reads .npy, and llm.c's .bin: 256 int32 of header, then the tokens. SystemExit, one line, if
    they are not there, not whole, not what manifest.json describes, or have tokens beyond the
    vocabulary.
    """
    folder = Path(folder)
    if (folder / "progress.json").exists() and not (folder / "manifest.json").exists():
        raise SystemExit(f"{folder}/ is not finished: give its fineweb.py command again")
    files = sorted(file for file in folder.glob("*") if split_of(file.name) == split)
    if not files:
        raise SystemExit(
            f"no {split} shards in {folder}/: `python fineweb.py` makes FineWeb-Edu's, "
            f"`python fineweb.py FILE_OR_FOLDER --out {folder}` your own"
        )
    manifest = read_manifest(folder)
    n_vocab = manifest.get("vocab_size", vocab_size)
    if n_vocab != vocab_size:
        raise SystemExit(f"{folder}/ has a vocabulary of {n_vocab}: give --vocab_size {n_vocab}")
    check_encodings(folder, manifest)
    entries = {folder / e["file"]: e for e in manifest["shards"] if split_of(e["file"]) == split}
    missing = {file.name for file in entries.keys() - set(files)}
    if missing:
        raise SystemExit(f"{folder}/ lacks {min(missing)}, which manifest.json lists: copy it too")
    shards = [open_shard(file, entries.get(file)) for file in files]
    for file, shard in zip(files, shards, strict=True):
        # no word of it: read it through, a minute for 10B tokens
        largest = entries[file]["largest"] if file in entries else int(shard.max(initial=0))
        if largest >= vocab_size:
            raise SystemExit(
                f"{file} has a token {largest}, beyond the vocabulary of {vocab_size}: "
                "give the --vocab_size of its encoding"
            )
    check_once(folder, entries)
    return shards


def check_encodings(folder: Path, manifest: dict) -> None:
    """SystemExit where shards of several encodings are in a folder, as far as it can be seen."""
    known = {entry["file"]: manifest["encoding"] for entry in manifest["shards"]}
    found = {}
    for file in sorted(file for file in folder.glob("*") if split_of(file.name)):
        encoding = known.get(file.name)
        if not encoding:  # a thousand of GPT-2's tokens in a row are not all among the first 257
            head = open_shard(file)[: 2**20]
            encoding = "bytes" if head.max(initial=0) < 257 else "gpt2"
            if len(head) < 1000:
                continue
        found[encoding] = file.name
    if len(found) > 1:
        what = ", ".join(f"{name} ({encoding})" for encoding, name in found.items())
        raise SystemExit(f"{folder}/ has shards of several encodings: {what}: move one kind away")


def open_shard(file: Path, entry: dict | None = None) -> np.ndarray:
    """One shard's tokens; SystemExit names a file that holds none, or not as many as its entry in
    the manifest says."""
    try:
        if file.suffix == ".bin":
            magic, version, n_tokens = np.fromfile(file, dtype="<i4", count=3).tolist()
            if (magic, version) != (20240520, 1):
                raise ValueError("its header is not llm.c's")
            tokens = np.memmap(file, dtype="<u2", mode="r", offset=256 * 4, shape=(n_tokens,))
        else:
            with HEADERS:
                tokens = np.load(file, mmap_mode="r")
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(f"it holds {tokens.dtype} of shape {tokens.shape}")
        if file.stat().st_size != tokens.offset + tokens.nbytes:
            raise ValueError(f"it goes on after the {len(tokens)} that its header tells of")
        if entry and len(tokens) != entry["tokens"]:
            raise ValueError(f"it has {len(tokens)}, manifest.json says {entry['tokens']}")
        return tokens
    except Exception as error:  # numpy's reader answers junk with every kind of it
        reason = f"{file} is no shard of uint16 tokens ({' '.join(str(error).split())})"
        raise SystemExit(f"{reason}: copy it or make it again") from None


def checksum_of(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        for block in iter(lambda: content.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def faults_of(entries: dict[Path, dict]) -> Iterator[str]:
    """Read shards to the end: a line for each that is not what its entry in the manifest says."""

    def fault(file: Path) -> str:
        entry = entries[file]
        try:
            shard = open_shard(file, entry)
            checksum = checksum_of(file)
        except SystemExit as error:
            return str(error)
        except OSError as error:
            return f"{file} cannot be read ({error.strerror}): copy it or make it again"
        if checksum == entry["sha256"] and shard.max(initial=0) == entry["largest"]:
            return ""
        part = "largest token" if checksum == entry["sha256"] else "checksum"
        what = f"{file} is not what manifest.json describes (its {part} differs)"
        return f"{what}: copy it or make it again"

    sizes = [2 * entry["tokens"] for entry in entries.values()]  # bytes, all but the headers
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, mininterval=1, delay=1)
    with bar, ThreadPoolExecutor(8) as pool:  # a thread that hashes leaves Python to the others
        for size, line in zip(sizes, pool.map(fault, entries), strict=True):
            bar.update(size)
            if line:
                yield line


def check_once(folder: Path, entries: dict[Path, dict]) -> None:
    """SystemExit names a shard that is not what its entry says. To find out costs one reading of
    each: verified.json remembers those that were right."""
    memory, verified, now = folder / "verified.json", {}, {}
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # none yet; damaged
        verified = dict(json.loads(memory.read_bytes()))
    for file, entry in entries.items():
        stat = file.stat()  # before it is read: a change meanwhile will show
        # a copy has another inode and ctime, even one that keeps the time of modification
        now[file.name] = [stat.st_size, stat.st_ino, stat.st_ctime_ns, entry["sha256"]]
    unread = {f: e for f, e in entries.items() if verified.get(f.name) != now[f.name]}
    fault = next(faults_of(unread), "")
    if fault:
        raise SystemExit(fault)
    if unread:
        with contextlib.suppress(SystemExit):  # read-only: then read each time
            write_file(memory, json.dumps(verified | now).encode())


def verify_folder(folder: str | Path) -> None:
    """Read all shards, whatever verified.json says, and print a line for each that is not as
    manifest.json says. SystemExit if there are any, or no manifest."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if "vocab_size" not in manifest:
        raise SystemExit(f"{folder}/ has no manifest.json to verify its shards by: copy it too")
    entries = {folder / entry["file"]: entry for entry in manifest["shards"]}
    files = {file for file in folder.glob("*") if split_of(file.name)} | entries.keys()
    faults = [f"{file} is not in manifest.json: remove it" for file in files - entries.keys()]
    faults += faults_of(entries)
    if faults:
        print("\n".join(sorted(faults)))
        bad = f"{len(faults)} of {len(files)} shards of {folder} are bad"
        raise SystemExit(f"{bad}: copy them or make them again")
    n_tokens = sum(entry["tokens"] for entry in entries.values())
    print(f"{folder}: {len(files)} shards, {n_tokens:,} tokens, all as manifest.json says")


# ---- the command line ----------------------------------------------------------------------------


def main(
    files: tyro.conf.Positional[tuple[str, ...]] = (),
    dataset: Literal[tuple(DATASETS)] | None = None,
    out: str = "",
    text_column: str = "text",
    encoding: Literal["gpt2", "bytes"] | None = None,
    shard_size: int = 100_000_000,
    val_tokens: int = 0,
    max_tokens: int = 0,
    max_bad: int = 100,
    workers: int = 0,
    part: str = "",
    download: bool = False,
    verify: str = "",
) -> None:
    """Write a corpus as shards of tokens, or verify a folder of them. A call that was stopped goes
    on when the same command is given again.

    Args:
        files: .parquet, .jsonl, .jsonl.gz, .jsonl.zst or .txt files, folders and patterns of such,
            or hf://datasets/USER/NAME/PATTERN; instead of a dataset
        dataset: a corpus by its name; without it and files, fineweb_edu_10BT
        out: folder for the shards; a dataset has one of its own
        text_column: column of .parquet, key of .jsonl, that holds the text
        encoding: gpt2, or bytes, which needs no download
        shard_size: tokens a shard
        val_tokens: tokens held out; 0: one shard of FineWeb and FineWeb-Edu, fewer of anything else
        max_tokens: stop after so many; 0: all
        max_bad: rows to skip, at most, because they hold no text
        workers: processes that tokenize; 0: one a core
        part: do only the third of eight parts, on one of eight machines: 3/8
        download: fetch the tokens of fineweb_edu_10BT or fineweb_10BT instead of making them
        verify: instead, a folder whose shards to read and compare with its manifest.json
    """
    if verify and (files or dataset or out or part or download):
        raise SystemExit("--verify writes no shards: give it nothing but a folder")
    if verify:
        return verify_folder(verify)
    if files and (dataset or download):
        raise SystemExit("files, or --dataset, or --download: give one of them")
    if files and not out:
        raise SystemExit("name a folder for the shards: --out my_data")
    if text_column != "text" and not files:
        raise SystemExit("--text_column is of files: a dataset's is known")
    known = sources.Dataset("", out, 100_000) if files else DATASETS[dataset or "fineweb_edu_10BT"]
    out = out or known.out
    if files:
        corpus = sources.corpus_of(files, text_column, part)
    else:
        corpus = sources.corpus_named(dataset or "fineweb_edu_10BT", part, download)
    numbers = (shard_size, val_tokens or known.val_tokens or shard_size, max_tokens, workers)
    encoding = encoding or known.encoding
    manifest = write_shards(corpus, out, encoding, *numbers, known.name, max_bad)
    report(Path(out), manifest)


def report(out: Path, manifest: dict) -> None:
    """Print what there is now, and what to do with it."""
    tokens, documents, text = (manifest[key] for key in TOTALS)
    if "part" in manifest["made_by"]:
        print(f"{tokens:,} tokens are done; the part that is finished last puts all together")
        return
    sizes = {"val": 0, "train": 0}
    for entry in manifest["shards"]:
        sizes[split_of(entry["file"])] += entry["tokens"]
    whole = text and not manifest["made_by"]["max_tokens"]  # else more was read than is there
    bytes_a_token = f", {text / tokens:.2f} bytes a token" if whole else ""
    print(f"{out}: {tokens:,} tokens of {documents:,} documents{bytes_a_token},")
    print(f"  in {len(manifest['shards'])} shards, the first {sizes['val']:,} for validation")
    if manifest["skipped"]:
        print(f"  {len(manifest['skipped'])} rows were skipped: manifest.json names them")
    preset = "gpt2" if manifest["encoding"] == "gpt2" else "shakespeare_char"
    print(f"train on them: python train_gpt2.py {preset} --data_dir {out}")


if __name__ == "__main__":
    if "" in sys.argv:  # --verify "$FOLDER" without $FOLDER is no wish for 10B tokens
        sys.exit("an empty argument: give a file or folder, or leave it out")

    def stop(number: int, frame) -> None:
        print("\nstopped: the same command goes on after the last whole shard", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    tyro.cli(main, use_underscores=True)

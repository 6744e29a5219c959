"""Tokenizes documents and writes the tokens to shards, which train_gpt2.py reads.

    python fineweb.py                        # FineWeb-Edu sample-10BT into edu_fineweb10B/
    python fineweb.py --dataset tinystories  # another name from DATASETS below
    python fineweb.py --dataset USER/NAME    # any text data set on the Hugging Face hub
    python fineweb.py FILES --out my_data    # .parquet, .jsonl (.gz, .zst), .txt; folders
    python fineweb.py --part 3/8             # the third of eight jobs that share a folder
    python fineweb.py --download             # FineWeb-Edu as ready-made tokens
    python fineweb.py --verify my_data       # compare the shards with their checksums

A shard is a .npy file: a one-dimensional uint16 array. Every document begins with end-of-text, and
the first tokens are the validation split. The number of workers does not change the shards. After
an interruption the same command resumes from progress.json. manifest.json is written last.
"""

import collections
import contextlib
import functools
import glob
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import urllib.request
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken

BATCH = 128  # documents that a worker tokenizes at a time
# Pieces of at most 2**18 characters, because tiktoken fails on a million spaces in a row: the rest
# of a text, or up to a space after a word, which no GPT-2 token crosses, or any characters.
PIECE = re.compile(r"(?s).{1,262144}\Z|.{0,262143}\S(?= )|.{1,262144}")
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
SHARD = re.compile(r".*_(train|val)_\d{6}\.(npy|bin)")
COUNTS = ("tokens", "documents", "skipped")  # totals in manifest.json
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
EDU = "HuggingFaceFW/fineweb-edu/sample/"
# name: source, folder, beginning of the shards' names (None: the folder's name), validation tokens
# (0: one shard, as in the lecture). FineWeb and FineWeb-Edu: https://arxiv.org/abs/2406.17557
DATASETS = {
    "fineweb_edu_10BT": (EDU + "10BT/*.parquet", "edu_fineweb10B", "edufineweb", 0),
    "fineweb_edu_100BT": (EDU + "100BT/*.parquet", "edu_fineweb100B", "edufineweb", 0),
    "fineweb_edu_350BT": (EDU + "350BT/*.parquet", "edu_fineweb350B", "edufineweb", 0),
    "fineweb_10BT": ("HuggingFaceFW/fineweb/sample/10BT/*.parquet", "fineweb10B", "fineweb", 0),
    "openwebtext": ("Skylion007/openwebtext/plain_text/*.parquet", "openwebtext", None, 5 * 10**6),
    "bookcorpus": ("lucadiliello/bookcorpusopen/**/*.parquet", "bookcorpus", None, 5 * 10**6),
    "tinystories": ("roneneldan/TinyStories/data/train-*.parquet", "tinystories", None, 5 * 10**6),
    "shakespeare": ("input.txt", "shakespeare", None, 30_000),
    "shakespeare_char": ("input.txt", "shakespeare_char", None, 100_000),
    "stdlib": ("", "stdlib", "stdlib", 300_000),  # the sources of Python's standard library
}  # fmt: skip
BYTES = ("shakespeare_char", "stdlib")  # the encoding of these is "bytes"
READY_MADE = {"fineweb_edu_10BT": "kjj0/finewebedu10B-gpt2", "fineweb_10BT": "kjj0/fineweb10B-gpt2"}


@contextlib.contextmanager
def exit_on_error(message: str):
    """Turns exceptions, of which each library has its own kinds, into a one-line SystemExit."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SystemExit(f"{message} ({reason:.300})") from error


def find_files(patterns: tuple[str, ...]) -> list[str]:
    """Returns the local files that paths, folders and glob patterns name."""
    files = []
    for pattern in patterns:
        tree = os.path.join(glob.escape(pattern), "**") if os.path.isdir(pattern) else pattern
        found = [pattern] if os.path.isfile(pattern) else glob.glob(tree, recursive=True)
        found = sorted(path for path in found if path.endswith(SUFFIXES))
        if not found:
            raise SystemExit(f"{pattern}: there are no files ending in {', '.join(SUFFIXES)}")
        files += found
    return files


def standard_library() -> list[str]:
    """Returns the modules of Python's standard library, without tests, in the order of a hash of
    their names, so that the validation split resembles the rest."""
    root = Path(os.__file__).parent
    excluded = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    return [str(root / name) for name in names if excluded.isdisjoint(name.split("/"))]


def read_files(files: list[str], column: str):
    """Yields {column: text or None} for each document of local files; a text file is one document.

    Not datasets.load_dataset("json"), which infers types: it turns dates into timestamps, adds
    quotation marks to all texts if one value is a number, and fails if files differ in their keys.
    """
    import pyarrow.parquet

    for path in files:
        with exit_on_error(f"cannot read the {column} of {path}"):
            if path.endswith(".parquet"):
                batches = pyarrow.parquet.ParquetFile(path).iter_batches(BATCH, columns=[column])
                texts = (text for batch in batches for text in batch[column].to_pylist())
            elif path.endswith(".txt"):
                texts = [Path(path).read_bytes().decode()]
            elif path.endswith(".py"):  # cut: a table should not outweigh a hundred modules
                texts = [Path(path).read_text("utf-8", "replace")[:50_000]]
            else:
                lines = io.BufferedReader(pyarrow.input_stream(path, compression="detect"))
                texts = (json.loads(line)[column] for line in lines if line.strip())
            for row, text in enumerate(texts, 1):
                if text is not None and not isinstance(text, str):
                    raise TypeError(f"row {row} is {text!r:.50}")
                yield {column: text}


def load_documents(source: str | list[str], subset: str | None, column: str):
    """Returns a datasets.IterableDataset of local files (a list), or of a hub pattern or name."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported in one line
    load = functools.partial(datasets.load_dataset, split="train", streaming=True)
    with exit_on_error(f"cannot load {source}"):
        if isinstance(source, list):  # the IterableDataset's shards are the files
            kwargs = {"files": source, "column": column}
            return datasets.IterableDataset.from_generator(read_files, gen_kwargs=kwargs)
        if "*" in source:  # parquet files, of which no other column is downloaded
            return load("parquet", data_files=f"hf://datasets/{source}", columns=[column])
        return load(source, subset).select_columns([column])


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """Returns the encoding "gpt2" (50,257 tokens) or "bytes" (256 byte values and end-of-text).
    Exits with a one-line message if the vocabulary cannot be fetched."""
    if name == "bytes":
        ranks = {bytes([value]): value for value in range(256)}
        # short pieces, because tiktoken is quadratic in the length of a piece
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 256})  # fmt: skip
    with exit_on_error(f"cannot fetch the {name} vocabulary, nor find it in TIKTOKEN_CACHE_DIR"):
        return tiktoken.get_encoding(name)


def tokenize(texts: list[str | None], encoding: str) -> tuple[np.ndarray, int]:
    """Returns the tokens of all texts, (n,) uint16, and the number of null and empty texts."""
    enc = get_encoding(encoding)
    arrays = [np.empty(0, dtype=np.uint16)]
    for text in filter(None, texts):
        arrays.append([enc.eot_token])
        text = text.encode(errors="replace").decode()  # JSON may contain half of a surrogate pair
        # "<|endoftext|>" in a document is ordinary text
        arrays += [enc.encode_to_numpy(p, disallowed_special=()) for p in PIECE.findall(text)]
    tokens = np.concatenate(arrays, dtype=np.uint16, casting="unsafe")  # 50,257 < 2**16
    return tokens, sum(not text for text in texts)


def start_worker() -> None:
    """Leaves Ctrl-C to the main process, and makes the worker exit if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def start_pool(workers: int, encoding: str) -> Executor:
    """Starts worker processes, which load the encoding while the caller opens the source."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    # "fork" would copy locks that other threads of the caller hold, such as PyTorch's
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker)
    for _ in range(workers):
        pool.submit(get_encoding, encoding)
    return pool


def tokenize_all(documents, position: dict | None, column: str, encoding: str, workers: int, pool):
    """Yields (position, tokens, number of skipped texts) for each batch of documents, in order.
    `documents` is a datasets.IterableDataset, and `position` its state_dict() before the batch."""
    next_position = position or documents.state_dict()
    documents.load_state_dict(next_position)
    batches, pending = documents.iter(BATCH), collections.deque()
    with exit_on_error("cannot read or tokenize the documents; the same command resumes"):
        while True:
            # a bounded queue, with enough work for the time that writing a shard takes
            while len(pending) < 2 * workers and (batch := next(batches, None)):
                future = pool.submit(tokenize, batch[column], encoding)
                pending.append((next_position, future))
                next_position = documents.state_dict()
            if not pending:
                return
            position, future = pending.popleft()
            yield position, *future.result()


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes a temporary file and renames it: under its own name a file is always complete."""
    with exit_on_error(f"cannot write {path}"):
        with open(f"{path}.tmp", "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)


def read_json(path: Path) -> dict:
    """Reads manifest.json or progress.json."""
    with exit_on_error(f"{path} is damaged: copy it again, or delete it"):
        state = json.loads(path.read_bytes())
        for entry in state["shards"]:  # a KeyError here is better than one later
            _ = entry["file"], entry["tokens"], entry["largest"]
        return state


def read_state(out: Path, suffix: str, made_by: dict) -> dict:
    """Returns the contents of manifest.json or progress.json, or a new state. Exits with a one-line
    message if the folder has shards that were made with other settings."""
    files = [path.name for path in out.iterdir() if suffix in path.name]
    for name in (f"manifest{suffix}.json", f"progress{suffix}.json"):
        state = read_json(out / name) if name in files else {}
        if state.get("made_by") == made_by:
            return state
    if any(SHARD.fullmatch(name) for name in files):
        message = f"{out} has shards made with other settings"
        raise SystemExit(f"{message}: choose another --out, or delete it")
    enc = get_encoding(made_by["encoding"])
    state = {"encoding": enc.name, "vocab_size": enc.n_vocab, "eot_token": enc.eot_token}
    state |= dict.fromkeys(COUNTS, 0) | {"made_by": made_by, "shards": []}
    return state | {"position": None, "offset": 0}  # where the next shard begins


def write_shards(stream, out: Path, name: str, suffix: str, val_tokens: int, state: dict) -> dict:
    """Writes the tokens that tokenize_all() yields to {name}_{val,train}_NNNNNN.npy, and returns
    the manifest. After each shard progress.json gets the position of the batch in which the next
    one begins, the offset in the tokens of the batch, and the number of texts skipped before it."""
    from tqdm import tqdm

    enc, limit = get_encoding(state["encoding"]), state["made_by"]["max_tokens"] or sys.maxsize
    buffer = np.empty(state["made_by"]["shard_size"], dtype=np.uint16)
    n, total, offset, skipped = 0, state["tokens"], state["offset"], state["skipped"]

    def finish_shard() -> None:
        shard, content = buffer[:n], io.BytesIO()
        np.save(content, shard)
        split = "train" if total > val_tokens else "val"
        file = f"{name}_{split}_{len(state['shards']):06d}.npy"
        write_file(out / file, content.getbuffer())
        sha256 = hashlib.sha256(content.getbuffer()).hexdigest()
        entry = {"file": file, "tokens": n, "largest": int(shard.max()), "sha256": sha256}
        state["shards"].append(entry)
        state["tokens"] += n
        state["documents"] += int(np.count_nonzero(shard == enc.eot_token))

    bar = tqdm(initial=total, unit=" tokens", unit_scale=True, mininterval=1, delay=1)
    for position, tokens, n_skipped in stream:
        tokens = tokens[: offset + limit - total]
        while offset < len(tokens):
            # no shard contains both validation and training tokens
            room = min(len(buffer) - n, val_tokens - total if total < val_tokens else limit)
            part = tokens[offset : offset + room]
            buffer[n : n + len(part)] = part
            n, total, offset = n + len(part), total + len(part), offset + len(part)
            if n == len(buffer) or total == val_tokens:
                finish_shard()
                n = 0
                state |= {"position": position, "offset": offset, "skipped": skipped}
                write_file(out / f"progress{suffix}.json", json.dumps(state).encode())
        bar.update(total - bar.n)
        offset, skipped = 0, skipped + n_skipped
        if total == limit:
            break
    bar.close()
    if total <= val_tokens:
        raise SystemExit(f"{total:,} tokens are too few for {val_tokens:,} validation tokens")
    if n:
        finish_shard()
    del state["position"], state["offset"]
    state |= {"skipped": skipped, "val_tokens": val_tokens}
    write_file(out / f"manifest{suffix}.json", json.dumps(state, indent=1).encode())
    return state


def read_manifest(folder: str | Path) -> dict:
    """Returns manifest.json, or the sum of the manifests of all parts; {} if there is none."""
    manifests = [read_json(path) for path in sorted(Path(folder).glob("manifest*.json"))]
    if not manifests:
        return {}
    made_by = [manifest.get("made_by", {"part": "1/1"}) for manifest in manifests]
    n_parts = int(made_by[0]["part"].split("/")[1])
    if made_by != [made_by[0] | {"part": f"{i + 1}/{n_parts}"} for i in range(n_parts)]:
        raise SystemExit(f"{folder} does not have all parts: run fineweb.py with each --part")
    counts = {key: sum(manifest.get(key, 0) for manifest in manifests) for key in COUNTS}
    return manifests[0] | counts | {"shards": sum((m["shards"] for m in manifests), [])}


def fingerprint(folder: str | Path) -> str:
    """Returns 16 hex digits, equal for equal shards: a hash of the entries of manifest.json, or of
    the files' names and sizes."""
    facts = [sorted(entry.items()) for entry in read_manifest(folder).get("shards", [])]
    files = [path for path in Path(folder).iterdir() if SHARD.fullmatch(path.name)]
    facts = facts or sorted((path.name, path.stat().st_size) for path in files)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def open_shard(path: Path) -> np.ndarray:
    """Returns the tokens of a .npy file, or of a .bin file of llm.c: (n,) uint16, memory-mapped."""
    if path.suffix == ".npy":
        tokens = np.load(path, mmap_mode="r")
    else:  # 256 int32 of header, then the tokens
        magic, version, n = np.fromfile(path, dtype="<i4", count=3)
        if (magic, version) != (20240520, 1):
            raise ValueError("the header is not that of llm.c")
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(n,))
    if tokens.dtype != np.uint16 or path.stat().st_size != tokens.offset + 2 * len(tokens):
        raise ValueError(f"{tokens.dtype}, shape {tokens.shape}, do not fit the size of the file")
    return tokens


def open_shards(folder: str | Path, split: str, vocab_size: int) -> list[np.ndarray]:
    """Returns the shards of a split, "train" or "val", in order: each (n,) uint16, memory-mapped.
    Exits with a one-line message if there are none, if the folder is not finished, if a shard is
    missing, if its size is not the manifest's, or if a token is not in the vocabulary."""
    folder, shards = Path(folder), []
    for path in folder.glob("progress*.json"):
        if not path.with_name(path.name.replace("progress", "manifest")).exists():
            raise SystemExit(f"{folder} is not finished: run its fineweb.py command again")
    manifest = read_manifest(folder)
    if manifest.get("vocab_size", vocab_size) != vocab_size:
        message = f"{folder} has a vocabulary of {manifest['vocab_size']} tokens"
        raise SystemExit(f"{message}: vocab_size must not be {vocab_size}")
    entries = {entry["file"]: entry for entry in manifest.get("shards", [])}
    names = {path.name for path in folder.glob("*")} | entries.keys()
    for name in sorted(filter(SHARD.fullmatch, names)):
        if SHARD.fullmatch(name)[1] == split:
            with exit_on_error(f"{folder / name} is damaged: copy it again"):
                tokens = open_shard(folder / name)
                if len(tokens) != entries.get(name, {}).get("tokens", len(tokens)):
                    raise ValueError("manifest.json has another number of tokens")
            largest = entries[name]["largest"] if name in entries else tokens.max(initial=0)
            if largest >= vocab_size:
                raise SystemExit(f"{folder / name}: token {largest} >= vocab_size {vocab_size}")
            shards.append(tokens)
    if not shards:
        make = f"`python fineweb.py` writes FineWeb-Edu's, `python fineweb.py FILES --out {folder}`"
        raise SystemExit(f"no {split} shards in {folder}: {make} your own")
    return shards


def verify_shards(folder: str) -> None:
    """Prints a line for each shard whose checksum differs, and exits with 1 if there is one."""
    n_bad, entries = 0, read_manifest(folder).get("shards", [])
    for entry in entries:
        path = Path(folder, entry["file"])
        sha256 = entry.get("sha256")
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            print(f"{path} is missing or damaged: copy it again")
            n_bad += 1
    if n_bad or not entries:
        raise SystemExit(f"{folder}: {n_bad} of {len(entries)} shards in manifest.json are bad")
    print(f"{folder}: {len(entries)} shards have the checksums in manifest.json")


def main(
    files: "tyro.conf.Positional[tuple[str, ...]]" = (),  # tyro is imported below
    dataset: str | None = None,
    subset: str | None = None,
    out: str | None = None,
    text_column: str = "text",
    encoding: Literal["gpt2", "bytes"] | None = None,
    shard_size: int = 100_000_000,
    val_tokens: int = 0,
    max_tokens: int = 0,
    workers: int = 0,
    part: str = "1/1",
    download: bool = False,
    verify: str | None = None,
) -> None:
    """Tokenizes documents into shards. If it is interrupted, the same command resumes.

    Args:
        files: .parquet, .jsonl, .jsonl.gz, .jsonl.zst and .txt files, folders and patterns
        dataset: a name from DATASETS, or USER/NAME on the hub; default fineweb_edu_10BT
        subset: configuration of USER/NAME
        out: folder for the shards
        text_column: column or key that contains the text
        encoding: gpt2, or bytes, which needs no download
        shard_size: tokens per shard
        val_tokens: tokens for validation; 0: one shard of FineWeb, a tenth of files or 100,000
        max_tokens: number of tokens to stop after; 0: no limit
        workers: processes that tokenize; 0: one per core
        part: i/n for the i-th of n contiguous parts of the files
        download: fetch the ready-made tokens of fineweb_edu_10BT or fineweb_10BT
        verify: folder whose shards to compare with the checksums in manifest.json
    """
    from filelock import FileLock

    if verify is not None:
        return verify_shards(verify)
    if files and (dataset or download):
        raise SystemExit("give either files, or --dataset, or --download")
    dataset = "" if files else dataset or "fineweb_edu_10BT"
    if not files and dataset not in DATASETS and "/" not in dataset:
        raise SystemExit(f"--dataset {dataset}: not USER/NAME, nor one of {', '.join(DATASETS)}")
    other = (dataset, dataset.split("/")[-1], None, 100_000)
    source, folder, name, n_val = DATASETS.get(dataset, other)
    if not (out or folder):
        raise SystemExit("name the folder for the shards with --out")
    out, encoding = Path(out or folder), encoding or ("bytes" if dataset in BYTES else "gpt2")
    if download:
        with exit_on_error(f"cannot download; only {', '.join(READY_MADE)} exist as tokens"):
            from huggingface_hub import snapshot_download

            repo = {"repo_id": READY_MADE[dataset], "repo_type": "dataset"}
            return print(snapshot_download(**repo, allow_patterns="*.bin", local_dir=out))
    i, n_parts = map(int, part.split("/")) if re.fullmatch(r"\d+/\d+", part) else (0, 0)
    if not 1 <= i <= n_parts:
        raise SystemExit(f"--part {part}: 1/8 is the first of eight parts, 8/8 the last")
    if shard_size < 1 or min(val_tokens, max_tokens, workers) < 0 or 0 < max_tokens <= val_tokens:
        raise SystemExit("a size is negative, --shard_size is 0, or --max_tokens <= --val_tokens")

    if source == "input.txt" and not os.path.exists(source):
        with exit_on_error(f"cannot fetch {SHAKESPEARE}input.txt: save it here"):
            content = urllib.request.urlopen(SHAKESPEARE + source, timeout=60).read()
        write_file(Path(source), content)
    identity = [dataset, subset, text_column]
    if files or source in ("", "input.txt"):
        source = find_files(files or (source,)) if files or source else standard_library()
        sizes = [os.path.getsize(path) for path in source]
        identity = [text_column, *zip(map(os.path.basename, source), sizes, strict=True)]
    # what another call must have in common with this one to continue it
    made_by = {"source": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}
    made_by |= {"encoding": encoding, "shard_size": shard_size, "val_tokens": val_tokens}
    made_by |= {"max_tokens": max_tokens, "part": f"{i}/{n_parts}"}
    if not val_tokens:  # the default
        val_tokens = min(n_val or shard_size, max_tokens // 10 or sys.maxsize)
        if files:  # about four bytes per token, so this is a tenth or, if compressed, less
            val_tokens = min(val_tokens, sum(sizes) // (10 if encoding == "bytes" else 40) + 1)
    suffix = f"-{i:0{len(str(n_parts))}d}of{n_parts}" if n_parts > 1 else ""
    name = (name or out.resolve().name) + suffix
    # where machines are shared, a process may use fewer cores than there are
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    small = dataset and isinstance(source, list)  # tokenized sooner than processes start
    workers = workers or (1 if small else cores)

    with exit_on_error(f"cannot write to {out}, or another process is writing to it"):
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / f".fineweb{suffix}.lock").acquire(timeout=0)
    with lock:
        state = read_state(out, suffix, made_by)
        if "position" in state:  # not finished
            write_file(out / f"progress{suffix}.json", json.dumps(state).encode())
            with start_pool(workers, encoding) as pool:
                documents, position = load_documents(source, subset, text_column), state["position"]
                if n_parts > documents.num_shards:
                    raise SystemExit(f"--part {part}: the source has {documents.num_shards} files")
                documents = documents.shard(n_parts, i - 1)
                stream = tokenize_all(documents, position, text_column, encoding, workers, pool)
                n_val = val_tokens if i == 1 else 0  # only the first part has validation tokens
                state = write_shards(stream, out, name, suffix, n_val, state)
        (out / f"progress{suffix}.json").unlink(missing_ok=True)
    print(f"{out}: {state['tokens']:,} tokens of {state['documents']:,} documents")
    print(f"  in {len(state['shards'])} shards; {state['skipped']:,} empty texts skipped")


if __name__ == "__main__":
    import tyro

    def stop(number: int, frame) -> None:
        print("\ninterrupted: the same command resumes", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    tyro.cli(main, use_underscores=True)

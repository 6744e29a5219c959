"""Tokenizes documents and writes the tokens to shards, which train_gpt2.py reads. A shard is a .npy
file of uint16; the first one is for validation. Every document begins with end-of-text.

    python fineweb.py                        # FineWeb-Edu sample-10BT into edu_fineweb10B/
    python fineweb.py --dataset USER/NAME    # any text data set on the Hugging Face hub
    python fineweb.py FILES --out my_data    # .parquet, .json, .jsonl, .txt (.gz, .zst); folders
    python fineweb.py --part 3/8             # the third of eight jobs that share a folder
    python fineweb.py --download             # FineWeb-Edu as ready-made tokens
    python fineweb.py --verify my_data       # compare the shards with their checksums
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
from filelock import FileLock
from tqdm import tqdm

BATCH = 128  # documents that a worker tokenizes at a time
# at most 2**18 characters, because tiktoken fails on a million spaces; up to a space if possible
PIECE = re.compile(r"(?s).{1,262144}\Z|.{0,262143}\S(?= )|.{1,262144}")
SUFFIXES = (".parquet", ".json", ".jsonl", ".ndjson", ".txt")
PACKED = re.compile(r"\.(gz|zst|bz2|lz4)$")  # after each suffix but .parquet
SHARD = re.compile(r".*_(train|val)_\d{6}\.(npy|bin)")
EDU = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
# name: source, folder, encoding, validation tokens (0: one shard, as in the lecture)
DATASETS = {
    "fineweb_edu_10BT": (EDU + "10BT/*.parquet", "edu_fineweb10B", "gpt2", 0),
    "fineweb_edu_100BT": (EDU + "100BT/*.parquet", "edu_fineweb100B", "gpt2", 0),
    "shakespeare_char": (SHAKESPEARE + "input.txt", "shakespeare_char", "bytes", 100_000),
    "stdlib": ("", "stdlib", "bytes", 300_000),  # the sources of Python's standard library
}


@dataclass(frozen=True)
class Config:
    """Tokenizes documents into shards. If it is interrupted, the same command resumes."""

    files: "tyro.conf.Positional[tuple[str, ...]]" = ()  # parquet, JSON, text (.gz, .zst); folders
    dataset: str = ""  # a name from DATASETS, or USER/NAME on the hub; default fineweb_edu_10BT
    subset: str = ""  # configuration of USER/NAME
    out: str = ""  # folder for the shards; default: that in DATASETS, or my_data
    text_column: str = "text"  # column or key that contains the text; or, nested, data.text
    encoding: Literal["auto", "gpt2", "bytes"] = "auto"  # auto: that in DATASETS, or gpt2
    shard_size: int = 100_000_000  # tokens per shard
    val_tokens: int = 0  # in the first shard; 0: that in DATASETS, or at most a tenth of the files
    workers: int = 0  # processes that tokenize; 0: one per core; the shards do not depend on it
    part: str = "1/1"  # i/n for the i-th of n contiguous parts of the files
    download: bool = False  # fetch the ready-made tokens of fineweb_edu_10BT
    verify: str = ""  # folder whose shards to compare with the checksums in manifest.json


@contextlib.contextmanager
def exit_on_error(message: str, kind: type[BaseException] = Exception):
    """Turns exceptions, of which each library has its own kinds, into a one-line SystemExit."""
    try:
        yield
    except kind as error:
        raise SystemExit(f"{message} ({error!r:.300})") from error  # repr() has no line breaks


def find_files(paths: tuple[str, ...]):
    """Yields the files among paths, and those in folders, sorted by path."""
    for path in paths:
        tree = sorted(map(str, Path(path).rglob("*"))) if os.path.isdir(path) else [path]
        found = [f for f in tree if PACKED.sub("", f).endswith(SUFFIXES) and os.path.isfile(f)]
        if not found:
            raise SystemExit(f"{path}: no files ending in {', '.join(SUFFIXES)} (.gz, .zst)")
        yield from found


def standard_library() -> list[str]:
    """Returns modules of Python's standard library, no tables, ordered by a hash of their names."""
    root = Path(os.__file__).parent
    excluded = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    names = [path.relative_to(root) for path in root.rglob("*.py") if path.stat().st_size < 50_000]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return [str(root / name) for name in names if excluded.isdisjoint(name.parts)]


def get_text(row: dict, column: str):
    """Returns row["a.b"] for the column "a.b" or, if there is no such key, row["a"]["b"]."""
    keys = [column] if column in row else column.split(".")
    return functools.reduce(lambda value, key: None if value is None else value[key], keys, row)


def read_rows(path: str, column: str):
    """Yields the rows of a file as dictionaries; a text file is one row, with \\n as line ends."""
    import pyarrow.parquet

    if path.endswith(".parquet"):
        file = pyarrow.parquet.ParquetFile(path)
        for group in range(file.num_row_groups):  # pyarrow cannot join nested dictionary columns
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=[column]):
                yield from batch.to_pylist()
    elif PACKED.sub("", path).endswith(("json", "jsonl")):  # datasets' reader alters dates
        lines = io.TextIOWrapper(pyarrow.input_stream(path), "utf-8-sig", "surrogatepass")
        for line in filter(None, map(str.strip, lines)):  # an object per line, or one array
            yield from json.loads(line + lines.read()) if line[0] == "[" else [json.loads(line)]
    else:
        yield {column: io.TextIOWrapper(pyarrow.input_stream(path), "utf-8").read()}


def read_files(files: list[str], column: str):
    """Yields {column: text or None} for each document of the files."""
    for path in files:
        with exit_on_error(f"cannot read the {column} of {path}"):
            for number, row in enumerate(read_rows(path, column), 1):
                text = get_text(row, column)
                if not isinstance(text, str | None):
                    raise TypeError(f"row {number} is {text!r:.50}")
                yield {column: text}


def load_documents(files: list[str], source: str, subset: str, column: str):
    """Returns a datasets.IterableDataset with one column, of local files or a source on the web."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported in one line
    load = functools.partial(datasets.load_dataset, split="train", streaming=True)
    with exit_on_error(f"cannot load {source}"):
        if files:
            arguments = {"files": files, "column": column}
            return datasets.IterableDataset.from_generator(read_files, gen_kwargs=arguments)
        if source.endswith(".txt"):
            return load("text", data_files=source, sample_by="document")
        if source.endswith(".parquet"):  # no other column is downloaded
            return load("parquet", data_files=source, columns=[column])
        documents = load(source, subset or None)
        top = [column if column in (documents.column_names or []) else column.split(".")[0]]
        documents = documents.select_columns(top)  # fails if there is no such column
        return documents.map(lambda row: {column: get_text(row, column)}, remove_columns=top)


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """Returns the encoding "gpt2" (50,257 tokens) or "bytes" (256 byte values and end-of-text)."""
    if name == "bytes":
        ranks = {bytes([value]): value for value in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": 256})  # longer ones are slow (quadratic)  # fmt: skip
    with exit_on_error(f"cannot fetch the {name} vocabulary, nor find it in TIKTOKEN_CACHE_DIR"):
        return tiktoken.get_encoding(name)


def tokenize(texts: list[str | None], encoding: str) -> tuple[np.ndarray, int]:
    """Returns the tokens of all texts, (n,) uint16, and the number of null and empty texts."""
    enc = get_encoding(encoding)
    arrays = [np.empty(0, dtype=np.uint16)]  # 50,257 tokens < 2**16
    for text in filter(None, texts):  # "<|endoftext|>" in a text is ordinary text
        arrays.append([enc.eot_token])
        text = text.encode(errors="replace").decode()  # JSON may contain half of a surrogate pair
        arrays += [enc.encode_to_numpy(p, disallowed_special=()) for p in PIECE.findall(text)]
    return np.concatenate(arrays, dtype=np.uint16, casting="unsafe"), sum(not t for t in texts)


def start_worker() -> None:
    """Leaves Ctrl-C to the main process, and ends the worker when the main process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def tokenize_all(documents, state: dict, workers: int):
    """Yields (state_dict() before a batch, its tokens, number of skipped texts), in order."""
    documents.load_state_dict(start := state["position"] or documents.state_dict())
    pool, pending = ThreadPoolExecutor(1), []
    if workers > 1:  # "fork" would copy locks that other threads hold, such as PyTorch's
        pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    with pool, exit_on_error("cannot read or tokenize the documents; the same command resumes"):
        for batch in documents.iter(BATCH):
            pending.append((start, pool.submit(tokenize, *batch.values(), state["encoding"])))
            start = documents.state_dict()
            if len(pending) == 2 * workers:  # enough work for the time that writing a shard takes
                position, future = pending.pop(0)
                yield position, *future.result()
        for position, future in pending:
            yield position, *future.result()


def write_file(path: Path, content: bytes) -> None:
    """Writes a temporary file and renames it, so that a file is complete under its own name."""
    with exit_on_error(f"cannot write {path}"):
        with open(f"{path}.tmp", "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)


def write_shards(stream, prefix: Path, progress: Path, state: dict) -> None:
    """Writes PREFIX_{val,train}_NNNNNN.npy, and after each of them `state` to `progress`."""

    def write_shard(tokens: np.ndarray) -> None:
        split = "val" if state["tokens"] < state["val_tokens"] else "train"
        path = Path(f"{prefix}_{split}_{len(state['shards']):06d}.npy")
        file = io.BytesIO()
        np.save(file, tokens)
        write_file(path, file.getvalue())
        entry = {"file": path.name, "tokens": len(tokens), "largest": int(tokens.max())}
        state["shards"].append(entry | {"sha256": hashlib.sha256(file.getvalue()).hexdigest()})
        state["tokens"] += len(tokens)
        state["documents"] += int(np.count_nonzero(tokens == state["eot_token"]))

    shard_size, offset = state["made_by"]["shard_size"], state["offset"]
    size = shard_size if state["shards"] else state["val_tokens"] or shard_size
    rest = [np.empty(0, np.uint16)]  # the tokens after the last shard
    for position, tokens, n_skipped in tqdm(stream, unit=" documents", unit_scale=BATCH, delay=1):
        rest.append(tokens[offset:])
        while sum(map(len, rest)) >= size:
            joined = np.concatenate(rest)
            write_shard(joined[:size])
            size, rest = shard_size, [joined[size:]]
            state |= {"position": position, "offset": len(tokens) - len(rest[0])}
            write_file(progress, json.dumps(state).encode())
        offset = 0
        state["skipped"] += n_skipped
    joined = np.concatenate(rest)
    if state["tokens"] + len(joined) <= state["val_tokens"]:
        raise SystemExit(f"{len(joined):,} tokens are too few: lower --val_tokens")
    if len(joined):
        write_shard(joined)


def read_manifest(folder: str | Path) -> dict:
    """Returns manifest.json with the shards of all parts, or only file names if there is none."""
    paths = sorted(Path(folder).glob("manifest*.json"))  # --part 3/8 writes manifest-3of8.json
    if not paths:
        files = [path for path in sorted(Path(folder).glob("*")) if SHARD.fullmatch(path.name)]
        return {"shards": [{"file": path.name, "bytes": path.stat().st_size} for path in files]}
    if {path.stem.partition("of")[2] or "1" for path in paths} != {str(len(paths))}:
        raise SystemExit(f"{folder} does not have all parts: run fineweb.py with each --part")
    with exit_on_error(f"{folder}: manifest.json is damaged: copy it again"):
        manifests = [json.loads(path.read_bytes()) for path in paths]
        return manifests[0] | {"shards": [shard for m in manifests for shard in m["shards"]]}


def fingerprint(folder: str | Path) -> str:
    """Returns 16 hex digits, equal for equal shards."""
    return hashlib.sha256(json.dumps(read_manifest(folder)["shards"]).encode()).hexdigest()[:16]


def open_shards(folder: str | Path, split: str, vocab_size: int, verify=False) -> list[np.ndarray]:
    """Returns the shards of "train" or "val", memory-mapped, each (n,) uint16. Exits on errors."""
    if any(Path(folder).glob("progress*.json")):
        raise SystemExit(f"{folder} is not finished: run its fineweb.py command again")
    manifest, shards = read_manifest(folder), []
    if manifest.get("vocab_size") not in (None, min(vocab_size, 50257)):  # it may have added tokens
        raise SystemExit(f"{folder} is for vocab_size {manifest['vocab_size']}, not {vocab_size}")
    for entry in [e for e in manifest["shards"] if SHARD.fullmatch(e["file"])[1] == split]:
        path = Path(folder, entry["file"])
        with exit_on_error(f"{path} is damaged: copy it again"):
            if path.suffix == ".npy":
                tokens = np.load(path, mmap_mode="r")
            else:  # llm.c's format: 256 int32 of header, then the tokens
                tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
                if np.fromfile(path, dtype="<i4", count=3).tolist() != [20240520, 1, len(tokens)]:
                    raise ValueError("the header is not that of llm.c")
            if (tokens.dtype, tokens.shape) != (np.uint16, (entry.get("tokens", tokens.size),)):
                raise ValueError(f"{tokens.dtype}, shape {tokens.shape}")
            if verify and hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                raise ValueError("the checksum is not that in manifest.json")
        if entry.get("largest", tokens[:1_000_000].max(initial=0)) >= vocab_size:
            raise SystemExit(f"{path} has tokens that are not below vocab_size {vocab_size}")
        shards.append(tokens)
    if not shards:
        known = (f"--dataset {name}" for name in DATASETS if DATASETS[name][1] == str(folder))
        command = f"fineweb.py {next(known, f'FILES --out {folder}')}"
        raise SystemExit(f"no {split} shards in {folder}: {command} writes them")
    return shards


def main(config: Config) -> None:
    """Tokenizes documents into shards. Exits with a one-line message on user errors."""
    if config.verify:
        vocab_size = read_manifest(config.verify).get("vocab_size", 0)
        shards = [open_shards(config.verify, s, vocab_size, True) for s in ("val", "train")]
        return print(f"{config.verify}: {sum(map(len, shards))} shards match manifest.json")
    if bool(config.files) + bool(config.dataset) + config.download > 1:
        raise SystemExit("give only one of files, --dataset and --download")
    dataset = config.dataset or ("" if config.files else "fineweb_edu_10BT")
    if not config.files and dataset not in DATASETS and "/" not in dataset:
        raise SystemExit(f"--dataset {dataset}: not USER/NAME, nor one of {', '.join(DATASETS)}")
    source, folder, encoding, n_val = DATASETS.get(dataset, (dataset, "my_data", "gpt2", 100_000))
    out = Path(config.out or folder)
    if config.download:
        from huggingface_hub import snapshot_download

        repo = {"repo_id": "kjj0/finewebedu10B-gpt2", "repo_type": "dataset"}
        with exit_on_error(f"cannot download {repo['repo_id']}"):
            return print(snapshot_download(**repo, allow_patterns="*.bin", local_dir=out))
    with exit_on_error(f"--part {config.part}: 1/8 is the first of eight parts, 8/8 the last"):
        i, n_parts = map(int, config.part.split("/"))
        _ = range(1, n_parts + 1).index(i)
    if config.shard_size < 1 or min(config.val_tokens, config.workers) < 0:
        raise SystemExit("--shard_size is less than 1, or another number is negative")
    files = standard_library() if dataset == "stdlib" else [*find_files(config.files)]
    enc = get_encoding(encoding if config.encoding == "auto" else config.encoding)
    sizes = [os.path.getsize(file) for file in files]
    tenth = sum(sizes) // (10 if enc.name == "bytes" else 40) + 1  # a token has about four bytes
    n_val = min(n_val, tenth) if config.files else n_val or config.shard_size
    identity = hashlib.sha256(json.dumps([*map(os.path.basename, files), *sizes]).encode())
    made_by = asdict(config) | {"files": identity.hexdigest(), "out": "", "workers": 0}
    state = {"encoding": enc.name, "vocab_size": enc.n_vocab, "eot_token": enc.eot_token}
    state |= {"made_by": made_by, "val_tokens": (config.val_tokens or n_val) if i == 1 else 0}
    state.update(tokens=0, documents=0, skipped=0, shards=[], position=None, offset=0)
    workers = config.workers or (1 if enc.name == "bytes" else os.cpu_count())
    suffix = f"-{i:0{len(str(n_parts))}d}of{n_parts}" if n_parts > 1 else ""
    manifest, progress = out / f"manifest{suffix}.json", out / f"progress{suffix}.json"
    with exit_on_error(f"cannot write to {out}, or another process is writing to it"):
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / f".fineweb{suffix}.lock").acquire(timeout=0)
    with lock:
        with exit_on_error(f"{progress} or {manifest} is damaged: delete {out}"):
            saved = [json.loads(p.read_bytes()) for p in (progress, manifest) if p.exists()]
        same = [state for state in saved if state.get("made_by") == made_by]  # may resume
        if not same and any(SHARD.fullmatch(path.name) for path in out.glob(f"*{suffix}_*")):
            raise SystemExit(f"{out} has shards made with other settings: choose another --out")
        state = [state, *same][-1]
        if "position" in state:  # not finished
            write_file(progress, json.dumps(state).encode())
            documents = load_documents(files, source, config.subset, config.text_column)
            if n_parts > documents.num_shards:
                raise SystemExit(f"--part {config.part}: there are {documents.num_shards} files")
            stream = tokenize_all(documents.shard(n_parts, i - 1), state, workers)
            write_shards(stream, out / (out.resolve().name + suffix), progress, state)
            del state["position"], state["offset"]
            write_file(manifest, json.dumps(state, indent=1).encode())
        progress.unlink(missing_ok=True)
    print(f"{out}: {state['tokens']:,} tokens of {state['documents']:,} documents")


if __name__ == "__main__":
    import tyro

    with exit_on_error("interrupted: the same command resumes", KeyboardInterrupt):
        main(tyro.cli(Config, use_underscores=True))

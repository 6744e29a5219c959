"""Tests of fineweb.py. What they expect is computed with loops over numpy and tiktoken."""

import contextlib
import errno
import functools
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import fineweb

ROOT = Path(fineweb.__file__).resolve().parent
# several bytes per character, a carriage return, and an end-of-text that is ordinary text
DOCUMENTS = ["Hello, world\n", "größer\r\n", "🙂" * 50, "a <|endoftext|> b", " ", "x" * 1000]
TOKENIZE = fineweb.tokenize
MANY = [f"Document {i}: " + "some words, " * (i % 37) for i in range(700)]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": "hf", "HF_DATASETS_CACHE": "hf"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def gpt2():
    try:
        return fineweb.get_encoding("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))


def write_jsonl(path, documents, key="text"):
    lines = [json.dumps({key: document, "id": i}) for i, document in enumerate(documents)]
    Path(path).write_text("\n".join(lines) + "\n")
    return str(path)


def write_parquet(path, documents, row_group_size=100, **columns):
    table = pa.table({"id": list(range(len(documents))), "text": documents} | columns)
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return str(path)


def run(**settings):
    """Runs fineweb.py in this process."""
    fineweb.main(fineweb.Config(**settings))


def shard(files, out="out", **settings):
    """Runs fineweb.py on files, with the bytes encoding and one worker. Returns its manifest."""
    files = (files,) if isinstance(files, str) else tuple(files)
    run(files=files, out=out, **{"encoding": "bytes", "workers": 1} | settings)
    return json.loads(Path(out, "manifest.json").read_text())


def files_of(folder):
    """The contents of all files in a folder that matter to the trainer."""
    files = [path for path in Path(folder).iterdir() if path.suffix != ".lock"]
    return {path.name: path.read_bytes() for path in files}


def stream(folder):
    """All tokens of a folder, in the order of the numbers in the file names."""
    paths = sorted(Path(folder).glob("*.npy"), key=lambda path: path.stem[-6:])
    return np.concatenate([np.load(path) for path in paths])


def expected_tokens(documents, encode=lambda text: list(text.encode()), eot=256):
    """The tokens of the documents, in a plain loop."""
    tokens = []
    for document in documents:
        tokens += [eot, *encode(document)]
    return tokens


def documents_in(folder):
    """The documents in a folder of byte tokens."""
    before, *documents = np.split(stream(folder), np.flatnonzero(stream(folder) == 256))
    assert len(before) == 0  # the first document begins with end-of-text too
    return [bytes(document[1:].tolist()).decode() for document in documents]


def error_of(function, *args, **settings):
    """The message of the SystemExit that a call must raise. A message that is a single line of text
    means exit status 1."""
    with pytest.raises(SystemExit) as error:
        function(*args, **settings)
    assert isinstance(error.value.code, str) and len(error.value.code.splitlines()) == 1
    return error.value.code


def start(*args):
    """Runs fineweb.py in another process."""
    command = [sys.executable, str(ROOT / "fineweb.py"), *map(str, args)]
    return subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True)


# ---- tokens and shards ---------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [1, 7, 64, 10**6])
def test_shards_and_manifest(tmp_path, shard_size):
    documents = DOCUMENTS[:4] if shard_size == 1 else DOCUMENTS
    write_jsonl("a.jsonl", documents)
    manifest = shard("a.jsonl", "corpus", shard_size=shard_size, val_tokens=15)
    tokens = expected_tokens(documents)
    assert stream("corpus").tolist() == tokens  # no token is lost where a shard ends
    assert documents_in("corpus") == documents
    expected = {"encoding": "bytes", "vocab_size": 257, "eot_token": 256, "skipped": 0}
    expected |= {"tokens": len(tokens), "documents": len(documents), "val_tokens": 15}
    assert expected.items() <= manifest.items()
    sizes = {"val": [], "train": []}
    for number, entry in enumerate(manifest["shards"]):
        path = Path("corpus", entry["file"])
        split = entry["file"].split("_")[1]
        array = np.load(path)
        assert path.name == f"corpus_{split}_{number:06d}.npy"
        assert array.dtype == np.uint16 and array.shape == (entry["tokens"],)
        assert array.max() == entry["largest"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        sizes[split].append(len(array))
    assert sizes["val"] == [15]  # the validation split is one shard
    # only the last shard may be shorter
    assert set(sizes["train"][:-1]) <= {shard_size} and sizes["train"][-1] <= shard_size
    names = {entry["file"] for entry in manifest["shards"]} | {"manifest.json"}
    assert files_of("corpus").keys() == names  # no temporary file is left
    for split in sizes:
        arrays = fineweb.open_shards("corpus", split, 257)
        assert [len(array) for array in arrays] == sizes[split]


def test_gpt2_tokens(gpt2):
    write_jsonl("a.jsonl", DOCUMENTS)
    manifest = shard("a.jsonl", encoding="gpt2", val_tokens=10)
    assert stream("out").tolist() == expected_tokens(DOCUMENTS, gpt2.encode_ordinary, 50256)
    assert manifest["documents"] == len(DOCUMENTS)
    assert manifest["vocab_size"] == 50257 and manifest["eot_token"] == 50256


def test_bytes_encoding_is_utf8():
    enc = fineweb.get_encoding("bytes")
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert enc.encode_ordinary(text) == list(text.encode())
    assert (enc.n_vocab, enc.eot_token) == (257, 256)


def test_the_number_of_workers_does_not_change_the_files():
    write_jsonl("a.jsonl", MANY)
    for workers in (1, 2, 3):
        shard("a.jsonl", f"{workers}/same", shard_size=9000, workers=workers)
    assert files_of("1/same") == files_of("2/same") == files_of("3/same")
    assert documents_in("3/same") == MANY


LONG = ["word " * 200_000, "x" * 600_000, " " * 600_000 + "end", "größer\t\n" * 90_000]


@pytest.mark.parametrize("text", LONG, ids=["words", "no space", "spaces", "umlauts"])
def test_a_long_document_is_split_without_loss(gpt2, text):
    tokens, n_skipped = fineweb.tokenize([text], "gpt2")
    assert n_skipped == 0 and tokens[0] == 50256 and tokens.dtype == np.uint16
    assert gpt2.decode(tokens[1:].tolist()) == text
    pieces = fineweb.PIECE.findall(text)
    assert len(pieces) > 1 and max(map(len, pieces)) <= 2**18 and "".join(pieces) == text


def test_a_long_document_has_the_tokens_of_the_unsplit_text(gpt2):
    text = "one  two\n three\t\tfour   \n'll 12 !?  " * 12_000
    assert len(fineweb.PIECE.findall(text)) > 1
    assert fineweb.tokenize([text], "gpt2")[0][1:].tolist() == gpt2.encode_ordinary(text)


# ---- sources -------------------------------------------------------------------------------------


def test_every_file_type_in_a_folder():
    os.makedirs("in/deep")
    write_parquet("in/a.parquet", DOCUMENTS, row_group_size=2)
    write_jsonl("in/b.jsonl", DOCUMENTS)
    lines = Path("in/b.jsonl").read_bytes()
    with gzip.open("in/c.jsonl.gz", "wb") as file:
        file.write(lines)
    write_compressed("in/deep/d.jsonl.zst", lines)
    Path("in/e.txt").write_bytes(b"one\r\ndocument\n\n")
    Path("in/notes.md").write_text("another type")
    # folders are sorted by path
    assert shard("in", "all", val_tokens=5)["documents"] == 25
    assert documents_in("all") == [*DOCUMENTS * 4, "one\ndocument\n\n"]
    # files and folders in the order given
    shard(["in/e.txt", "in/b.jsonl", "in/deep", "in/a.parquet"], "some", val_tokens=5)
    assert documents_in("some") == ["one\ndocument\n\n", *DOCUMENTS * 3]


TEN = [f"größer {i}\n🙂 2020-01-0{i}" for i in range(8)] + ["2020-01-01", "5"]
ROWS = [{"id": i, "text": text, "data": {"text": text}} for i, text in enumerate(TEN)]
CONTENTS = {
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "array": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "array in a line": b"\n " + json.dumps(ROWS).encode(),
}
STRING_TYPES = [pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.string_view()]


def write_compressed(path, content):
    names = {"gz": "gzip", "zst": "zstd", "bz2": "bz2", "lz4": "lz4"}
    with pa.output_stream(path, names.get(path.split(".")[-1])) as file:
        file.write(content)
    return path


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "lz4", ""])
@pytest.mark.parametrize("content", CONTENTS)
def test_json(suffix, content):
    for path, column in [("a.json", "text"), ("a.jsonl", "data.text"), ("a.ndjson", "data.text")]:
        path = write_compressed(f"{path}.{suffix}".strip("."), CONTENTS[content])
        shard(path, path + " out", text_column=column, val_tokens=1)
        assert documents_in(path + " out") == TEN


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "lz4", ""])
def test_line_ends_and_byte_order_mark_of_text_files(suffix):
    """`datasets` changes line ends, and leaves a byte-order mark."""
    import datasets

    contents = [f"{text}\r\nCRLF\rCR\n".encode() for text in TEN[1:]] + [b"\xef\xbb\xbfmark\r\n"]
    plain = [write_compressed(f"{i}.txt", c) for i, c in enumerate(contents)]
    files = [write_compressed(f"{i}.txt.{suffix}".strip("."), c) for i, c in enumerate(contents)]
    expected = datasets.load_dataset("text", data_files=plain, sample_by="document", split="train")
    shard(files, val_tokens=1)
    assert documents_in("out") == expected["text"][:]
    assert expected["text"][8:] == ["5\nCRLF\nCR\n", "\ufeffmark\n"]


@pytest.mark.parametrize("file", ["lines.jsonl", "array.json"])
def test_line_ends_and_byte_order_mark_of_json(file):
    """`datasets` ignores them in the file. In a text, "\\r" is an escape sequence, and stays."""
    import datasets

    rows = [json.dumps({"text": text + "\r\n"}) for text in TEN]
    content = "\r\n".join(rows) if file == "lines.jsonl" else f"[{','.join(rows)}]\r\n"
    Path(file).write_bytes(b"\xef\xbb\xbf" + content.encode())
    shard(file, val_tokens=1)
    expected = datasets.load_dataset("json", data_files=file, split="train")["text"][:]
    assert documents_in("out") == expected == [text + "\r\n" for text in TEN]


@pytest.mark.parametrize("kind", STRING_TYPES, ids=str)
def test_columns_of_parquet_files(kind):
    """A name with dots is that of a column, or else that of a nested column. A local folder stands
    for a data set on the hub."""
    strings = pa.array(TEN, kind)
    size = 12 if kind == pa.string_view() else 4  # pyarrow cannot slice string views
    data = pa.StructArray.from_arrays([strings, pa.array(range(10))], ["text", "id"])
    other = {"data": [{"text": "no"}] * 10, "data.text": strings}
    deep = {"a": [None, {"b": None}, *({"b": {"c": text}} for text in TEN)]}
    tables = {"text": {}, "data.text": {"data": data}, "literal": other, "a.b.c": deep}
    for column, columns in tables.items():
        texts = strings if column == "text" else ["no"] * (12 if column == "a.b.c" else 10)
        os.makedirs(f"user/{column}")
        path = write_parquet(f"user/{column}/a.parquet", texts, row_group_size=size, **columns)
        settings = {"encoding": "bytes", "text_column": column.replace("literal", "data.text")}
        for out, source in ("1", {"files": (path,)}), ("2", {"dataset": f"user/{column}"}):
            run(**source, **settings, out=column + out, val_tokens=1)
            assert documents_in(column + out) == TEN


def test_null_and_empty_texts_are_skipped_and_counted():
    rows = [None, "a", "", "b", None]
    files = [write_parquet("a.parquet", rows), write_jsonl("b.jsonl", rows)]
    Path("empty.jsonl").write_text("\n\n")
    Path("empty.txt").write_text("")
    manifest = shard([*files, "empty.jsonl", "empty.txt"], val_tokens=1)
    assert documents_in("out") == ["a", "b", "a", "b"]
    assert manifest["skipped"] == 7 and manifest["documents"] == 4


def test_text_column_and_a_name_that_looks_like_a_pattern():
    write_jsonl("a[1].jsonl", DOCUMENTS, key="content")
    shard("a[1].jsonl", text_column="content", val_tokens=5)
    assert documents_in("out") == DOCUMENTS


def test_texts_that_type_inference_would_change():
    Path("a.jsonl").write_text('{"text": "2020-01-01"}\n{"text": "5", "meta": {"k": [1]}}\n')
    Path("b.jsonl").write_text('{"text": "a\\ud800b", "other": 1}\n')  # half of a surrogate pair
    shard(["a.jsonl", "b.jsonl"], val_tokens=1)
    assert documents_in("out") == ["2020-01-01", "5", "a?b"]


def test_a_small_text_needs_no_flag():
    text = "First Citizen: Before we proceed any further, hear me speak.\n" * 1600
    Path("t.txt").write_text(text)
    run(files=("t.txt",), encoding="bytes")
    folder = "my_data"  # the default
    n_val, n_train = (sum(map(len, fineweb.open_shards(folder, s, 257))) for s in ("val", "train"))
    assert n_val + n_train == len(text) + 1 and 0.05 < n_val / (n_val + n_train) < 0.11


def test_standard_library():
    root = Path(os.__file__).parent
    files = fineweb.standard_library()
    names = [Path(file).relative_to(root).as_posix() for file in files]
    assert "textwrap.py" in names and "json/decoder.py" in names and len(names) > 300
    assert not [name for name in names if {"test", "site-packages"} & {*name.split("/")}]
    assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    run(dataset="stdlib", out="demo_data")
    texts = [Path(file).read_text("utf-8") for file in files]
    assert max(map(len, texts)) < 50_000
    assert documents_in("demo_data") == [text for text in texts if text]
    assert [len(array) for array in fineweb.open_shards("demo_data", "val", 257)] == [300_000]


def test_shakespeare(monkeypatch):
    import datasets

    load_dataset, requests = datasets.load_dataset, []
    Path("local.txt").write_text("First Citizen:\n\n" * 10_000)

    def local(path, data_files, **kwargs):
        requests.append(data_files)
        return load_dataset(path, data_files="local.txt", **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", local)
    for _ in range(2):  # the second time nothing is fetched
        run(dataset="shakespeare_char")
    (url,) = requests
    assert url.startswith("https://") and url.endswith("tinyshakespeare/input.txt")
    assert documents_in("shakespeare_char") == ["First Citizen:\n\n" * 10_000]
    assert sum(map(len, fineweb.open_shards("shakespeare_char", "val", 257))) == 100_000


def test_known_data_sets(monkeypatch):
    """FineWeb-Edu by default; only the text column is read, and one shard is held out."""
    import datasets

    load_dataset, requests = datasets.load_dataset, []
    write_parquet("local.parquet", DOCUMENTS)

    def local(path, data_files, **kwargs):
        requests.append((path, data_files, kwargs))
        return load_dataset(path, data_files="local.parquet", **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", local)
    run(encoding="bytes", shard_size=500, workers=1)
    kwargs = {"columns": ["text"], "split": "train", "streaming": True}
    pattern = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet"
    assert requests == [("parquet", pattern, kwargs)]
    assert documents_in("edu_fineweb10B") == DOCUMENTS
    assert len(np.load("edu_fineweb10B/edu_fineweb10B_val_000000.npy")) == 500
    assert Path("edu_fineweb10B/edu_fineweb10B_train_000001.npy").exists()


def test_another_data_set_of_the_hub():
    """`datasets` loads a folder in the same way as a data set on the hub."""
    os.makedirs("user/name")
    write_parquet("user/name/a.parquet", ["wrong"], content=["wrong"])
    write_parquet("user/name/b.parquet", ["no"] * len(MANY), content=MANY)
    configs = "\n".join(f"- config_name: {c}\n  data_files: {c}.parquet" for c in "ab")
    Path("user/name/README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    settings = {"encoding": "bytes", "workers": 1, "shard_size": 5000, "val_tokens": 100}
    run(dataset="user/name", subset="b", text_column="content", **settings)
    assert documents_in("my_data") == MANY


def test_ready_made_tokens(monkeypatch):
    import huggingface_hub

    def snapshot_download(repo_id, repo_type, allow_patterns, local_dir):
        assert repo_id == "kjj0/finewebedu10B-gpt2"
        assert (repo_type, allow_patterns) == ("dataset", "*.bin")
        os.mkdir(local_dir)
        write_bin(local_dir / "finewebedu_val_000000.bin", [50256, 7])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    run(download=True)
    assert fineweb.open_shards("edu_fineweb10B", "val", 50257)[0].tolist() == [50256, 7]


# ---- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_parts", [2, 3, 5])
def test_parts_together_contain_every_document_once(n_parts):
    parts = [MANY[i::5] for i in range(5)]
    files = [write_parquet(f"{i}.parquet", documents) for i, documents in enumerate(parts)]
    settings = {"encoding": "bytes", "workers": 1, "shard_size": 4000, "val_tokens": 500}
    for i in reversed(range(n_parts)):
        assert i == n_parts - 1 or "all parts" in error_of(fineweb.open_shards, "out", "train", 257)
        run(files=tuple(files), out="out", part=f"{i + 1}/{n_parts}", **settings)
    shards = fineweb.open_shards("out", "val", 257) + fineweb.open_shards("out", "train", 257)
    assert np.concatenate(shards).tolist() == expected_tokens(sum(parts, []))
    assert sum(map(len, fineweb.open_shards("out", "val", 257))) == 500
    manifests = [json.loads(path.read_text()) for path in Path("out").glob("manifest-*.json")]
    assert sum(manifest["documents"] for manifest in manifests) == len(MANY)
    assert sum(manifest["tokens"] for manifest in manifests) == sum(map(len, shards))
    assert Path(f"out/out-1of{n_parts}_val_000000.npy").exists()
    run(verify="out")


def test_twelve_parts_are_in_order():
    files = [write_jsonl(f"{i:02d}.jsonl", [f"document {i}"] * 3) for i in range(12)]
    for i in range(12):
        shard_of_part = {"part": f"{i + 1}/12", "val_tokens": 5, "shard_size": 20}
        run(files=tuple(files), out="out", encoding="bytes", **shard_of_part)
    shards = fineweb.open_shards("out", "val", 257) + fineweb.open_shards("out", "train", 257)
    documents = [f"document {i}" for i in range(12) for _ in range(3)]
    assert np.concatenate(shards).tolist() == expected_tokens(documents)


# ---- interruptions -------------------------------------------------------------------------------


def resume_after_every_write(monkeypatch, call, n_calls=0):
    """Interrupts the first call before its first write, the second one after it, the third one
    before its second write and so on, until one ends. Returns the number of calls."""
    write_file, n_writes = fineweb.write_file, 0

    def interrupted(path, content):
        nonlocal n_writes
        n_writes += 1
        if n_writes > n_calls // 2 and n_calls % 2 == 0:
            raise KeyboardInterrupt
        write_file(path, content)
        if n_writes > n_calls // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fineweb, "write_file", interrupted)
    while True:
        n_writes = 0
        try:
            call()
            monkeypatch.setattr(fineweb, "write_file", write_file)
            return n_calls
        except KeyboardInterrupt:
            n_calls += 1
            assert n_calls < 100


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array", "hub", "nested hub"])
def test_resuming_after_every_write_gives_the_same_files(monkeypatch, kind):
    """Nulls must not be counted twice, and batches end inside row groups and files. A local folder
    stands for a data set on the hub."""
    os.makedirs("user/name")
    for i in range(3):
        documents = [None, *MANY[i::3], None, *MANY[i::3]]
        rows = [{"text": document} for document in documents]
        if kind == "jsonl":
            write_jsonl(f"user/name/{i}.jsonl", documents)
        elif kind == "array":
            write_compressed(f"user/name/{i}.json.zst", json.dumps(rows).encode())
        else:
            write_parquet(f"user/name/{i}.parquet", documents, row_group_size=77, data=rows)
    source = {"dataset": "user/name"} if "hub" in kind else {"files": ("user/name",)}
    source["text_column"] = "data.text" if kind == "nested hub" else "text"
    settings = {"encoding": "bytes", "workers": 1, "shard_size": 16_001, "val_tokens": 3000}
    run(**source, **settings, out="whole/same")
    call = functools.partial(run, **source, **settings, out="pieces/same")
    assert resume_after_every_write(monkeypatch, call) > 8
    assert files_of("whole/same") == files_of("pieces/same")
    assert documents_in("pieces/same") == sum((2 * MANY[i::3] for i in range(3)), [])
    assert json.loads(Path("pieces/same/manifest.json").read_text())["skipped"] == 6


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_signals():
    """The same command resumes one that is killed, terminated or interrupted, the files are those
    of an uninterrupted one, and no worker outlives the main process."""
    write_jsonl("a.jsonl", MANY * 40)
    settings = ["--encoding", "bytes", "--shard_size", 50_000, "--workers", 2]
    shard("a.jsonl", "whole/same", shard_size=50_000)
    n_shards = len(list(Path("whole/same").glob("*.npy")))
    statuses = {signal.SIGKILL: -9, signal.SIGTERM: -15, signal.SIGINT: 1}
    for n, (signum, status) in enumerate(statuses.items(), 1):
        process, workers = start("a.jsonl", "--out", "pieces/same", *settings), []
        while len(workers) < 2 or len(list(Path("pieces/same").glob("*.npy"))) < n * n_shards // 6:
            assert process.poll() is None
            time.sleep(0.002)
            children = children_of(process.pid)
            # one child is Python's resource tracker
            names = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
            workers = [pid for pid, name in names.items() if "spawn_main" in name]
        process.send_signal(signum)
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode == status and len(workers) == 2
        assert ("the same command resumes" in stderr) == (signum == signal.SIGINT)
        assert "Traceback" not in stderr
        deadline = time.time() + 10
        while any(map(is_running, children)):
            assert time.time() < deadline, "a worker outlives the main process"
            time.sleep(0.01)
        assert "not finished" in error_of(fineweb.open_shards, "pieces/same", "train", 257)
    process = start("a.jsonl", "--out", "pieces/same", *settings)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 0
    assert files_of("whole/same") == files_of("pieces/same")


def tokenize_or_die(texts, encoding):
    if any("Document 500:" in text for text in texts):
        os.kill(os.getpid(), signal.SIGKILL)
    return TOKENIZE(texts, encoding)


def test_a_killed_worker(monkeypatch):
    write_jsonl("a.jsonl", MANY)
    settings = {"shard_size": 10_000, "val_tokens": 100, "workers": 2}
    shard("a.jsonl", "whole/same", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "tokenize", tokenize_or_die)
        message = error_of(shard, "a.jsonl", "pieces/same", **settings)
    assert "the same command resumes (BrokenProcessPool" in message
    assert "not finished" in error_of(fineweb.open_shards, "pieces/same", "train", 257)
    shard("a.jsonl", "pieces/same", **settings)
    assert files_of("whole/same") == files_of("pieces/same")


# ---- mistakes: one line, exit status 1, and nothing is overwritten -------------------------------


@pytest.fixture
def inputs():
    write_jsonl("good.jsonl", DOCUMENTS)
    Path("note.md").write_text("some text")
    Path("bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    Path("number.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    Path("list.jsonl").write_text('["a"]\n')
    Path("latin.txt").write_bytes(b"\xff\xfe")
    Path("bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:30])
    Path("bad.parquet").write_bytes(b"PAR1 this is not a parquet file PAR1")
    Path("bad.txt.gz").write_bytes(gzip.compress(b"some text" * 99)[:30])
    Path("number.json").write_text('[{"text": "a"}, {"text": 5}]')
    Path("half.json").write_text('[{"text": "a"},')
    write_parquet("number.parquet", [1, 2], data=[{"text": "a"}, {"text": "b"}])
    os.makedirs("user/name")
    write_parquet("user/name/a.parquet", ["a", "b"])


GOOD = {"files": ("good.jsonl",)}
NESTED = {"files": ("number.parquet",), "text_column": "data.body"}
MISTAKES = {
    "no such file": ({"files": ("nope.jsonl",)}, "nope.jsonl"),
    "no such file among others": ({"files": ("good.jsonl", "nope.txt")}, "nope.txt"),
    "another type": ({"files": ("note.md",)}, "note.md"),
    "a pattern without files": ({"files": ("*.xml",)}, "*.xml"),
    "an empty argument": ({"files": ("",)}, "no files"),
    "no such data set": ({"dataset": "fineweb"}, "fineweb_edu_10BT"),
    "files and a data set": (GOOD | {"dataset": "stdlib"}, "--dataset"),
    "a hub that is not reached": ({"dataset": "user/nothing"}, "user/nothing"),
    "nothing to download": ({"dataset": "stdlib", "download": True}, "--download"),
    "a line that is not JSON": ({"files": ("bad.jsonl",)}, "bad.jsonl"),
    "a line that is a list": ({"files": ("list.jsonl",)}, "list.jsonl"),
    "a text that is a number": ({"files": ("number.jsonl",)}, "number.jsonl (TypeError('row 2"),
    "another key": (GOOD | {"text_column": "body"}, "body of good.jsonl"),
    "not UTF-8": ({"files": ("latin.txt",)}, "latin.txt"),
    "a truncated archive": ({"files": ("bad.jsonl.gz",)}, "bad.jsonl.gz"),
    "a truncated text": ({"files": ("bad.txt.gz",)}, "bad.txt.gz (OSError('Truncated"),
    "a number in an array": ({"files": ("number.json",)}, "number.json (TypeError('row 2 is 5"),
    "an array without end": ({"files": ("half.json",)}, "half.json"),
    "no such nested key": (GOOD | {"text_column": "data.body"}, "data.body of good.jsonl"),
    "no such nested column": (NESTED, "data.body of number.parquet (KeyError("),
    "no such hub column": (NESTED | {"files": (), "dataset": "user/name"}, "['data'] not in"),
    "a damaged parquet file": ({"files": ("bad.parquet",)}, "bad.parquet"),
    "a column of numbers": ({"files": ("number.parquet",)}, "number.parquet"),
    "no such column": ({"files": ("number.parquet",), "text_column": "body"}, "body"),
    "shard_size 0": (GOOD | {"shard_size": 0}, "--shard_size"),
    "a negative number": (GOOD | {"workers": -1}, "negative"),
    "too many for validation": (GOOD | {"val_tokens": 10**6}, "--val_tokens"),
    "part 0": (GOOD | {"part": "0/8"}, "--part 0/8"),
    "part of nothing": (GOOD | {"part": "3"}, "--part 3"),
    "part 9 of 8": (GOOD | {"part": "9/8"}, "--part 9/8"),
    "more parts than files": (GOOD | {"part": "2/2"}, "1 file"),
    "a file in place of the folder": (GOOD | {"out": "note.md/out"}, "note.md"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(inputs, name):
    settings, words = MISTAKES[name]
    settings = {"out": "out", "encoding": "bytes", "workers": 1} | settings
    assert words in error_of(run, **settings)
    assert not list(Path(".").rglob("*.npy"))
    # the correct command can be given after the mistake
    shard("good.jsonl", val_tokens=5)
    assert documents_in("out") == DOCUMENTS


def test_mistakes_on_the_command_line():
    process = start("nope.jsonl", "--out", "out")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith("nope.jsonl: ")
    assert "--text_column" in start("--help").communicate(timeout=60)[0]


def test_a_finished_folder_and_other_settings_or_data(monkeypatch):
    write_jsonl("a.jsonl", DOCUMENTS)
    manifest, before = shard("a.jsonl", val_tokens=5), files_of("out")
    monkeypatch.setattr(fineweb, "load_documents", lambda *_: pytest.fail("it is read again"))
    assert shard("a.jsonl", val_tokens=5) == manifest and files_of("out") == before
    for settings in ({"val_tokens": 6}, {"shard_size": 50}, {"text_column": "id"}):
        message = error_of(shard, "a.jsonl", **{"val_tokens": 5} | settings)
        assert "other settings" in message and "--out" in message
    write_jsonl("a.jsonl", [*DOCUMENTS, "more"])
    assert "other settings" in error_of(shard, "a.jsonl", val_tokens=5)
    assert files_of("out") == before
    os.mkdir("foreign")
    np.save("foreign/x_train_000000.npy", np.zeros(3, np.uint16))
    assert "foreign" in error_of(shard, "a.jsonl", "foreign")
    assert [path.name for path in Path("foreign").glob("*.npy")] == ["x_train_000000.npy"]


def test_one_writer_per_folder():
    from filelock import FileLock

    write_jsonl("a.jsonl", DOCUMENTS)
    os.mkdir("out")
    with FileLock("out/.fineweb.lock"):
        assert "another process" in error_of(shard, "a.jsonl")
    shard("a.jsonl", val_tokens=5)


def test_a_full_disk(monkeypatch):
    write_jsonl("a.jsonl", DOCUMENTS)

    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr(fineweb.os, "fsync", full)
        assert "No space left on device" in error_of(shard, "a.jsonl", val_tokens=5)
    shard("a.jsonl", val_tokens=5)
    assert documents_in("out") == DOCUMENTS


def test_the_vocabulary_cannot_be_fetched(monkeypatch):
    fails = mock.Mock(side_effect=ConnectionError("no network\nat all"))
    monkeypatch.setattr(fineweb.tiktoken, "get_encoding", fails)
    assert "TIKTOKEN_CACHE_DIR" in error_of(fineweb.get_encoding.__wrapped__, "gpt2")


def test_import_has_no_side_effects(tmp_path):
    code = "import sys, fineweb; print({'pyarrow', 'datasets', 'tyro', 'torch'} & {*sys.modules})"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-Bc", code], env=env) == b"set()\n"
    assert not list(tmp_path.iterdir())


# ---- opening and verifying shards ----------------------------------------------------------------


def write_bin(path, tokens, magic=20240520, version=1, n=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if n is None else n
    Path(path).write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


@pytest.fixture
def folder():
    write_jsonl("a.jsonl", DOCUMENTS)
    shard("a.jsonl", "data", val_tokens=100, shard_size=300)
    return Path("data")


def test_bin_files_and_files_without_manifest():
    os.mkdir("data")
    write_bin("data/x_train_000002.bin", [5, 6])
    write_bin("data/x_train_000001.bin", [1, 2, 3])
    np.save("data/x_val_000000.npy", np.array([7], np.uint16))
    shards = fineweb.open_shards("data", "train", 50257)
    assert [array.tolist() for array in shards] == [[1, 2, 3], [5, 6]]
    assert all(isinstance(array, np.memmap) and array.dtype == np.uint16 for array in shards)
    assert fineweb.open_shards("data", "val", 50257)[0].tolist() == [7]
    assert "6" in error_of(fineweb.open_shards, "data", "train", 6)


def test_no_shards_and_another_vocabulary(folder):
    for path in ("nothing", "."):
        message = error_of(fineweb.open_shards, path, "train", 257)
        assert f"fineweb.py FILES --out {path}" in message
    message = error_of(fineweb.open_shards, Path("edu_fineweb100B"), "train", 50257)
    assert "fineweb.py --dataset fineweb_edu_100BT" in message
    message = error_of(fineweb.open_shards, folder, "train", 50257)
    assert "257" in message and "50257" in message
    # a model may have more tokens than GPT-2, which the shards do not contain
    manifest = json.loads((folder / "manifest.json").read_text()) | {"vocab_size": 50257}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert fineweb.open_shards(folder, "train", 50300)
    assert "50257" in error_of(fineweb.open_shards, folder, "train", 257)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "dtype", "shape"])
def test_a_damaged_shard_is_named(folder, damage):
    path = folder / "data_train_000002.npy"
    content, array = path.read_bytes(), np.load(path)
    if damage in ("dtype", "shape"):
        np.save(path, array.astype(np.int32) if damage == "dtype" else array[:-1])
    else:
        path.write_bytes(content[:-2] if damage == "truncated" else b"")
    if damage == "missing":
        path.unlink()
    assert path.name in error_of(fineweb.open_shards, folder, "train", 257)
    assert len(fineweb.open_shards(folder, "val", 257)) == 1


@pytest.mark.parametrize("header", [{"magic": 1}, {"version": 2}, {"n": 9}, {"n": 1}, {"n": -1}])
def test_a_damaged_bin_file_is_named(header):
    os.mkdir("data")
    write_bin("data/x_train_000000.bin", [1, 2, 3], **header)
    assert "x_train_000000.bin" in error_of(fineweb.open_shards, "data", "train", 50257)


def test_a_damaged_manifest(folder):
    for content in ("", "[]", "{}", '{"shards": 5}', '{"shards": [{"file": ', "\0"):
        (folder / "manifest.json").write_text(content)
        assert "manifest.json" in error_of(fineweb.open_shards, folder, "train", 257)
        assert "manifest.json" in error_of(fineweb.fingerprint, folder)
        assert "manifest.json" in error_of(run, verify="data")


def test_fingerprint(folder):
    first = fineweb.fingerprint(folder)
    assert len(first) == 16 and int(first, 16) >= 0
    folder.rename("moved")
    assert fineweb.fingerprint("moved") == first
    Path("moved/manifest.json").unlink()
    sizes = fineweb.fingerprint("moved")
    assert sizes != first
    Path("moved/data_train_000002.npy").unlink()
    assert fineweb.fingerprint("moved") != sizes
    write_jsonl("a.jsonl", [*DOCUMENTS[:-1], "y" * 1000])  # the same sizes, other tokens
    shard("a.jsonl", "data", val_tokens=100, shard_size=300)
    assert fineweb.fingerprint("data") != first


def test_verify(folder):
    run(verify="data")
    path, missing = folder / "data_train_000001.npy", folder / "data_train_000002.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    missing.unlink()
    assert error_of(run, verify="data").startswith(f"{path} is damaged: copy it again")
    path.write_bytes(content)
    assert error_of(run, verify="data").startswith(f"{missing} is damaged: copy it again")
    assert "no val shards in nothing" in error_of(run, verify="nothing")

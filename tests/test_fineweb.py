"""fineweb.py: whatever goes in as documents comes out of the shards, byte for byte."""

import hashlib
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import fineweb

ROOT = Path(fineweb.__file__).resolve().parent
# Several bytes a letter, a carriage return, and an end-of-text that is none.
DOCUMENTS = ["Hello, world\n", "größer\r\n", "🙂" * 50, "a <|endoftext|> b", " ", "x" * 1000]


def shard(out, documents=DOCUMENTS, **settings):
    settings = {"encoding": "bytes", "val_tokens": 10, "workers": 1} | settings
    return fineweb.write_shards(documents, out, **settings)


def stream(out):
    files = sorted(out.glob("*.npy"), key=lambda file: file.stem[-6:])  # numbered through
    return np.concatenate([np.load(file) for file in files])


def documents_in(out):
    """The inverse of the bytes encoding, by numpy alone."""
    before, *documents = np.split(stream(out), np.flatnonzero(stream(out) == 256))
    assert not len(before)  # the first document too begins with end-of-text
    return [bytes(document[1:].tolist()).decode("utf-8") for document in documents]


def error_of(function, *args, **settings):
    """The message of the SystemExit that a call must raise: one line; as text it means status 1."""
    with pytest.raises(SystemExit) as error:
        function(*args, **settings)
    assert isinstance(error.value.code, str) and len(error.value.code.splitlines()) == 1
    return error.value.code


def python(folder, *args):
    """A Python process in `folder`, where nothing but PYTHONPATH tells of the project."""
    command, env = [sys.executable, "-B", *args], {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def write(path, texts):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.write_bytes("".join(texts).encode("utf-8"))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_documents_survive(tmp_path, suffix):
    source = tmp_path / f"source{suffix}"
    write(source, DOCUMENTS if suffix == ".txt" else [None, *DOCUMENTS, ""])
    shard(tmp_path / "out", fineweb.read_documents(source))
    expected = ["".join(DOCUMENTS)] if suffix == ".txt" else DOCUMENTS
    assert documents_in(tmp_path / "out") == expected


def test_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name, texts in {"b/2.jsonl": ["2", "3"], "a.parquet": ["1"], "c.txt": ["4"]}.items():
        write(tmp_path / name, texts)
    (tmp_path / "d.md").write_text("not a document")
    assert list(fineweb.read_documents(tmp_path)) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("shard_size", [1, 7, 64, 10**6])
def test_shards_and_their_manifest(tmp_path, shard_size):
    manifest = shard(tmp_path, shard_size=shard_size, val_tokens=15, name="corpus")
    assert documents_in(tmp_path) == DOCUMENTS  # nothing is lost where a shard ends
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["encoding"], manifest["vocab_size"]) == ("bytes", 257)
    assert manifest["eot_token"] == 256
    sizes = {"val": [], "train": []}
    for number, entry in enumerate(manifest["shards"]):
        path, split = tmp_path / entry["file"], entry["file"].split("_")[1]
        tokens = np.load(path)
        assert path.name == f"corpus_{split}_{number:06d}.npy"
        assert (tokens.dtype, tokens.shape) == (np.uint16, (entry["tokens"],))
        assert tokens.max() == entry["largest"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        sizes[split].append(len(tokens))
    assert sum(sizes["val"]) == 15
    for split in sizes.values():  # only a split's last shard may be short
        assert set(split[:-1]) <= {shard_size} and split[-1] <= shard_size
    assert len(list(tmp_path.iterdir())) == len(manifest["shards"]) + 1  # no temporary file


def test_max_tokens_keeps_the_beginning(tmp_path):
    shard(tmp_path / "all")
    shard(tmp_path / "some", max_tokens=100, shard_size=30)
    assert np.array_equal(stream(tmp_path / "some"), stream(tmp_path / "all")[:100])


def test_workers_change_nothing(tmp_path):
    documents = [str(number) * (number % 50) + "." for number in range(1000)]
    settings = {"shard_size": 5000, "val_tokens": 7000, "name": "corpus"}
    one = shard(tmp_path / "one", documents, workers=1, **settings)
    assert one == shard(tmp_path / "two", documents, workers=2, **settings)  # checksums and all
    assert documents_in(tmp_path / "two") == documents


def test_spawned_workers(tmp_path):
    """Where processes are spawned (macOS, Windows) each imports the main module again."""
    (tmp_path / "script.py").write_text(
        "import multiprocessing, fineweb\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    fineweb.write_shards(['a', 'b'] * 99, 'out', 'bytes', val_tokens=9, workers=2)\n"
    )
    assert python(tmp_path, "script.py").returncode == 0
    assert documents_in(tmp_path / "out") == ["a", "b"] * 99


def test_bytes_encoding_is_utf8():
    enc = fineweb.get_encoding("bytes")
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert enc.encode_ordinary(every) == list(every.encode("utf-8"))
    assert (enc.n_vocab, enc.eot_token) == (257, 256)
    assert bytes(enc.encode_ordinary("a\ud800b")).decode("utf-8") == "a\ufffdb"  # half a pair


def test_gpt2_encoding(tmp_path):
    try:
        enc = fineweb.get_encoding("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))
    shard(tmp_path, encoding="gpt2")
    assert enc.decode(stream(tmp_path)) == "".join("<|endoftext|>" + text for text in DOCUMENTS)
    # The one that a document spells is not counted: it stayed text.
    assert np.count_nonzero(stream(tmp_path) == 50256) == len(DOCUMENTS)


def test_standard_library():
    texts = list(fineweb.standard_library())
    assert all(texts) and sum(map(len, texts)) > 5e6
    assert Path(json.__file__).read_text(encoding="utf-8") in texts
    assert Path(pytest.__file__).read_text(encoding="utf-8") not in texts  # site-packages


BAD_SOURCES = [
    ("absent.txt", None, "does not exist"),
    ("a.docx", b"", "nothing to read"),
    ("a.txt", b"\xff\xfe", "a.txt, line or row 1:"),
    ("a.parquet", b"PAR1", "a.parquet, line or row 1:"),
    ("a.jsonl", b'{"text": "fine"}\n\n{"text": "bro', "a.jsonl, line or row 3:"),
    ("a.jsonl", b'{"text": "fine"}\n{"body": ""}\n', "a.jsonl, line or row 2:"),
    ("a.jsonl", b'{"text": 5}\n', "int where text should be"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_SOURCES)
def test_bad_source(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    # Two workers: an error must not leave one of them waiting.
    assert message in error_of(
        lambda: shard(tmp_path / "out", fineweb.read_documents(tmp_path / name), workers=2)
    )


def test_parquet_without_text(tmp_path):
    assert "nothing to read" in error_of(fineweb.read_documents, tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    assert 'no column "text"' in error_of(list, fineweb.read_documents(tmp_path))


BAD_SETTINGS = [
    {"shard_size": 0},
    {"workers": -1},
    {"encoding": "gpt5"},
    {"max_tokens": 10},  # all of them for validation
    {"val_tokens": 10**6, "shard_size": 100},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS)
def test_bad_settings_leave_nothing_behind(tmp_path, settings):
    error_of(shard, tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_out_is_checked_before_tokenizing(tmp_path):
    shard(tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("in the way")
    never = (pytest.fail("a document was read") for _ in "x")
    assert "already holds shards" in error_of(shard, tmp_path / "out", never)
    assert "cannot write" in error_of(shard, tmp_path / "file" / "out", never)
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_fineweb_edu(tmp_path, monkeypatch):
    """With a stand-in for `datasets`: what the hub is asked for, and what becomes of its rows."""

    def load_dataset(path, name, split, streaming):
        assert (path, name, split) == ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")
        assert streaming
        return iter({"text": text} for text in [None, *DOCUMENTS, ""])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    fineweb.main(encoding="bytes", shard_size=500, workers=1)
    out = tmp_path / "edu_fineweb10B"
    assert documents_in(out) == DOCUMENTS
    assert len(np.load(out / "edufineweb_val_000000.npy")) == 500  # one shard is held out
    assert (out / "edufineweb_train_000001.npy").exists()


def test_no_network(monkeypatch):
    def fails(*args, **settings):
        raise ConnectionError("no network\nat all")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fails))
    message = error_of(list, fineweb.fineweb_edu())
    assert "HuggingFaceFW/fineweb-edu" in message and "works offline" in message
    monkeypatch.setattr(fineweb.tiktoken, "get_encoding", fails)
    fresh = fineweb.get_encoding.__wrapped__  # without what it remembers
    assert "TIKTOKEN_CACHE_DIR" in error_of(fresh, "gpt2")


def test_import_has_no_effect(tmp_path):
    code = "import sys, fineweb; sys.exit('datasets' in sys.modules)"
    done = python(tmp_path, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", [False, True])
def test_command_line(tmp_path, broken):
    write(tmp_path / "a.jsonl", DOCUMENTS * 200 + [5] * broken)
    flags = "--out my_data --encoding bytes --shard_size 90_000 --val_tokens 4 --workers 2"
    done = python(tmp_path, ROOT / "fineweb.py", "a.jsonl", *flags.split())
    assert done.returncode == broken and "Traceback" not in done.stderr
    if broken:
        assert done.stderr.splitlines()[-1].startswith("a.jsonl, line or row 1201: ")
    else:
        assert "train_gpt2.py --data_dir my_data" in done.stdout
        assert documents_in(tmp_path / "my_data") == DOCUMENTS * 200

"""fineweb.py: whatever goes in as documents comes out of the shards, byte for byte."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fineweb
import sources

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


def tokens_corpus(*values):
    """A corpus that is tokens already, one piece."""
    rows = [(1, np.array(values, dtype=np.uint16), False)]
    return sources.Corpus(lambda *_: [sources.Piece(0, 0, "a.bin", lambda: rows)])


def test_tokens_stay_as_they_are(tmp_path):
    fineweb.write_shards(tokens_corpus(256, 5, 0, 255), tmp_path, "bytes", val_tokens=2, workers=1)
    assert stream(tmp_path).tolist() == [256, 5, 0, 255]


def test_tokens_of_another_encoding_are_refused(tmp_path):
    settings = {"encoding": "bytes", "workers": 1, "max_bad": 0}
    assert "a.bin" in error_of(fineweb.write_shards, tokens_corpus(5, 257), tmp_path, **settings)


def test_a_call_that_ends_early_leaves_no_process_waiting(tmp_path):
    """Neither it, for a worker that ended in the middle of an answer, nor a worker for it."""
    (tmp_path / "script.py").write_text(
        "import fineweb, itertools, multiprocessing\n"
        "for n in range(6):\n"
        "    documents = itertools.repeat('some words ' * 10**4)\n"
        "    fineweb.write_shards(documents, f'out{n}', 'bytes', 2**22, 1, 2**22, workers=3)\n"
        "for worker in multiprocessing.active_children():\n"
        "    worker.join()\n"
    )
    done = python(tmp_path, "script.py")
    assert (done.returncode, done.stderr) == (0, "")


def lines(values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


def test_a_dataset_has_a_folder_a_name_and_tokens_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(lines([None, *DOCUMENTS, ""]))
    name, text = "fineweb_edu_10BT", "First Citizen:\n" * 10_000
    assert "HuggingFaceFW/fineweb-edu/sample/10BT/" in sources.DATASETS[name].files
    here = sources.DATASETS[name]._replace(files="*.jsonl")
    monkeypatch.setitem(sources.DATASETS, name, here)
    fineweb.main(encoding="bytes", shard_size=500, workers=1)  # the one without a name
    out = Path("edu_fineweb10B")
    assert documents_in(out) == DOCUMENTS
    assert len(np.load(out / "edufineweb_val_000000.npy")) == 500  # one shard is held out
    assert (out / "edufineweb_train_000001.npy").exists()

    Path("input.txt").write_text(text)
    fineweb.main(dataset="shakespeare_char", workers=1)
    assert documents_in(Path("shakespeare_char")) == [text]
    assert len(np.load("shakespeare_char/shakespeare_char_val_000000.npy")) == 100_000


def test_no_network(monkeypatch):
    def fails(*args, **settings):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(fineweb.tiktoken, "get_encoding", fails)
    fresh = fineweb.get_encoding.__wrapped__  # without what it remembers
    assert "TIKTOKEN_CACHE_DIR" in error_of(fresh, "gpt2")


def test_import_has_no_effect(tmp_path):
    code = "import sys, fineweb; sys.exit(bool({'pyarrow', 'huggingface_hub'} & {*sys.modules}))"
    done = python(tmp_path, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    """Several files, and what is broken in one: skipped and named, or the end."""
    (tmp_path / "b.jsonl").write_text(lines(DOCUMENTS * 200 + [5]))
    (tmp_path / "a.txt").write_text("a text")
    flags = "--out my_data --encoding bytes --shard_size 90_000 --workers 2 --val_tokens"
    command = ROOT / "fineweb.py", "b.jsonl", "a.txt", *flags.split(), "4"
    done = python(tmp_path, *command, "--max_bad", "0")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    bad = "b.jsonl, row 1201: TypeError: int where text should be"
    last = done.stderr.splitlines()[-1]
    assert last == f"{bad}: more than 0 bad rows: mend or remove it, or raise --max_bad"

    done = python(tmp_path, *command)  # it goes on
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert f"skipped {bad}" in done.stderr.splitlines()
    assert "1 rows were skipped" in done.stdout
    assert "train_gpt2.py shakespeare_char --data_dir my_data" in done.stdout
    assert documents_in(tmp_path / "my_data") == [*DOCUMENTS * 200, "a text"]
    manifest = json.loads((tmp_path / "my_data" / "manifest.json").read_text())
    assert manifest["skipped"] == [bad]

    again = python(tmp_path, *command)  # all is there
    assert (again.returncode, again.stdout) == (0, done.stdout)
    other = python(tmp_path, *command[:-1], "5")
    assert "my_data already holds shards, made with another val_tokens" in other.stderr


# ---- what manifest.json may say ------------------------------------------------------------------


SHA256 = hashlib.sha256(b"").hexdigest()
ENTRY = {"file": "a_train_000000.npy", "tokens": 0, "largest": 0, "sha256": SHA256}
MANIFEST = {"encoding": "bytes", "vocab_size": 257, "eot_token": 256, "shards": [ENTRY]}


def entry(**changes):
    return MANIFEST | {"shards": [ENTRY | changes]}


def without(parts, key):
    return {name: value for name, value in parts.items() if name != key}


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    assert fineweb.read_manifest(tmp_path) == {"shards": []}  # none, as with llm.c's shards
    manifest = shard(tmp_path, shard_size=99)
    assert fineweb.read_manifest(tmp_path) == manifest
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {"shards": [], "more": None}))
    assert fineweb.read_manifest(tmp_path)["shards"] == []


BAD_NAMES = [
    "../x_train_000000.npy", "/etc/passwd", "a/b_train_000000.npy", "/a_train_000000.npy",
    "..\\x_train_000000.npy", "a\\b_train_000000.npy", "C:\\a_train_000000.npy", "", ".", "..",
    "a_train_00000.npy", "a_train_0000000.npy", "a_train_٠٠٠٠٠٠.npy", "a_test_000000.npy",
    "a_train_000000.npz", "a_train_000000.npy.tmp", "a_train_000000.npy\n", "train_000000.npy",
    "a\n_train_000000.npy", "a\0_train_000000.npy", "a\ud800_train_000000.npy",
    "a\u2028_train_000000.npy", "a_train_000000.npy/..", "manifest.json",
]  # fmt: skip
BAD_MANIFESTS = [
    b"", b"\xff\xfe\x00", b"\x80nothing" * 99, b"{", b"[]", b"{}", b"null", b"5", b"NaN", b'"a"',
    b"[" * 100_000, b'{"shards": ' * 100_000, b'{"vocab_size": 1' + b"0" * 5000 + b"}",
    b"[" * 900 + b"]" * 900, b"\0" * 1000, bytes(range(256)),
    *(without(MANIFEST, key) for key in MANIFEST),
    *(MANIFEST | {"shards": [without(ENTRY, key)]} for key in ENTRY),
    *(MANIFEST | {"encoding": value} for value in (None, 5, ["bytes"])),
    *(MANIFEST | {"vocab_size": value} for value in (0, -1, True, "257", 257.0, None, 10**4000)),
    *(MANIFEST | {"eot_token": value} for value in (None, True, "256", 256.0)),
    *(MANIFEST | {"shards": value} for value in (None, 5, {}, "", "ab", {"file": "a"}, ENTRY)),
    *(MANIFEST | {"shards": value} for value in ([None], [[]], [5], ["a"], [{}], [ENTRY, ENTRY])),
    *(entry(file=value) for value in (None, 5, [], True)),
    *(entry(tokens=value) for value in (None, -1, True, False, "5", 5.0, float("nan"), 10**4000)),
    *(entry(largest=value) for value in (None, -1, True, "5", 5.0, float("inf"), [[]])),
    *(entry(sha256=value) for value in (None, 5, "", "0" * 63, "0" * 65, "g" * 64, SHA256 + "\n")),
]  # fmt: skip


@pytest.mark.parametrize("bad", [*BAD_MANIFESTS, *(entry(file=name) for name in BAD_NAMES)])
def test_a_malformed_manifest(tmp_path, bad):
    np.save(tmp_path / "a_train_000000.npy", np.zeros(5, dtype=np.uint16))
    content = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    (tmp_path / "manifest.json").write_bytes(content)
    message = error_of(fineweb.read_manifest, tmp_path)
    assert message.startswith(f"{tmp_path}/manifest.json is damaged (") and len(message) < 500
    assert error_of(fineweb.open_shards, tmp_path, "train", 257) == message
    assert error_of(fineweb.main, verify=str(tmp_path)) == message
    assert error_of(fineweb.fingerprint, tmp_path) == message


def test_lists_in_lists_in_lists(tmp_path):
    shard(tmp_path)
    manifest = (tmp_path / "manifest.json").read_bytes()
    for depth in range(800, 1000):  # somewhere in there to read, to show and to write them fails
        nested = "[" * depth + "]" * depth
        (tmp_path / "manifest.json").write_text(f'{{"shards": [], "encoding": {nested}}}')
        error_of(fineweb.read_manifest, tmp_path)
        (tmp_path / "manifest.json").write_bytes(manifest)
        (tmp_path / "verified.json").write_text(f'{{"a": {nested}}}')
        assert len(fineweb.open_shards(tmp_path, "train", 257)) == 1


def test_a_manifest_that_cannot_be_read(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    assert "manifest.json" in error_of(fineweb.read_manifest, tmp_path)


def test_shards_of_a_name_that_no_manifest_may_have_are_not_written(tmp_path):
    for name in ("a\\b", "a\nb"):
        assert "cannot begin" in error_of(shard, tmp_path / name)
    assert not list(tmp_path.iterdir())
    shard(tmp_path / "größe 5:00 ..a")  # while this is no path, and can be printed
    assert len(fineweb.open_shards(tmp_path / "größe 5:00 ..a", "train", 257)) == 1


# ---- checksums -----------------------------------------------------------------------------------


def flip(path, at=-4):
    """Change the lowest bit of a byte in place, by default of the last token but one."""
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END)
        [byte] = file.read(1)
        file.seek(at, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def reads(monkeypatch):
    """The list that grows by the name of each file that is hashed from now on."""
    names, checksum_of = [], fineweb.checksum_of

    def noted(file):
        names.append(file.name)
        return checksum_of(file)

    monkeypatch.setattr(fineweb, "checksum_of", noted)
    return names


def differs(path):
    return (
        f"{path} is not what manifest.json describes (its checksum differs): "
        "copy it or make it again"
    )


def test_a_flipped_bit_is_found_by_the_trainer_before_it_trains(tmp_path):
    shard(tmp_path / "data", DOCUMENTS * 20)
    path = tmp_path / "data" / "data_train_000001.npy"
    size, largest = path.stat().st_size, np.load(path).max()
    flip(path)
    assert (path.stat().st_size, np.load(path).max()) == (size, largest)  # nothing else tells
    assert error_of(fineweb.open_shards, tmp_path / "data", "train", 257) == differs(path)
    assert len(fineweb.open_shards(tmp_path / "data", "val", 257)) == 1
    flags = "shakespeare_char --data_dir data --device cpu --val_interval 0"
    done = python(tmp_path, ROOT / "train_gpt2.py", *flags.split())
    assert done.returncode == 1
    assert done.stderr.splitlines() == [differs("data/data_train_000001.npy")]
    assert not (tmp_path / "log").exists()


def test_a_missing_shard_is_named(tmp_path):
    shard(tmp_path, shard_size=300, name="a")
    (tmp_path / "a_train_000003.npy").unlink()
    message = error_of(fineweb.open_shards, tmp_path, "train", 257)
    assert message.startswith(f"{tmp_path}/ lacks a_train_000003.npy")


def test_every_shard_of_a_split_is_read_once(tmp_path, monkeypatch):
    manifest = shard(tmp_path, shard_size=50, name="a")
    names = {entry["file"] for entry in manifest["shards"]}
    hashed = reads(monkeypatch)
    shards = fineweb.open_shards(tmp_path, "train", 257)
    assert len(shards) > 8  # more than threads
    assert sorted(hashed) == sorted(name for name in names if "train" in name)
    assert len(fineweb.open_shards(tmp_path, "val", 257)) == 1  # which forgets no other split
    assert sorted(hashed) == sorted(names)
    monkeypatch.setattr(fineweb, "checksum_of", None)
    again = fineweb.open_shards(tmp_path, "train", 257)
    assert all(np.array_equal(a, b) for a, b in zip(shards, again, strict=True))
    fineweb.open_shards(tmp_path, "val", 257)

    expected = {}
    for name in names:
        stat = os.stat(tmp_path / name)
        checksum = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        expected[name] = [stat.st_size, stat.st_ino, stat.st_ctime_ns, checksum]
    assert json.loads((tmp_path / "verified.json").read_text()) == expected
    assert not list(tmp_path.glob("*.tmp"))


def test_a_changed_shard_is_read_again(tmp_path):
    shard(tmp_path, name="a")
    fineweb.open_shards(tmp_path, "train", 257)
    path = tmp_path / "a_train_000001.npy"
    stat = path.stat()
    time.sleep(0.05)  # a file system's clock may tick every hundredth of a second only
    flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert error_of(fineweb.open_shards, tmp_path, "train", 257) == differs(path)
    flip(path)
    assert len(fineweb.open_shards(tmp_path, "train", 257)) == 1


def test_a_copied_shard_is_read_again_and_alone(tmp_path, monkeypatch):
    manifest = shard(tmp_path / "a", shard_size=300)
    fineweb.open_shards(tmp_path / "a", "train", 257)
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # with verified.json, and all times kept
    names = sorted(entry["file"] for entry in manifest["shards"][1:])
    hashed = reads(monkeypatch)
    fineweb.open_shards(tmp_path / "b", "train", 257)
    assert sorted(hashed) == names

    flip(tmp_path / "a" / names[1])
    shutil.copy2(tmp_path / "a" / names[1], tmp_path / "b" / "aside")
    os.replace(tmp_path / "b" / "aside", tmp_path / "b" / names[1])
    hashed.clear()
    message = error_of(fineweb.open_shards, tmp_path / "b", "train", 257)
    assert message == differs(tmp_path / "b" / names[1])
    assert hashed == [names[1]]


def test_a_changed_checksum_is_compared_again(tmp_path):
    manifest = shard(tmp_path, name="a")
    fineweb.open_shards(tmp_path, "train", 257)
    manifest["shards"][1]["sha256"] = SHA256
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    path = tmp_path / "a_train_000001.npy"
    assert error_of(fineweb.open_shards, tmp_path, "train", 257) == differs(path)


@pytest.mark.parametrize(
    "memory",
    [b"", b"\xff\x00", b"null", b"5", b"true", b"[]", b"[[[], 1]]", b'["ab"]', b"{", b"[" * 10**5],
)
def test_a_damaged_verified_json_is_as_good_as_none(tmp_path, monkeypatch, memory):
    shard(tmp_path, name="a")
    (tmp_path / "verified.json").write_bytes(memory)
    hashed = reads(monkeypatch)
    for _ in range(2):
        fineweb.open_shards(tmp_path, "train", 257)
    assert hashed == ["a_train_000001.npy"]  # and after the first time it is not damaged


@pytest.mark.parametrize("value", [None, 5, [], [None] * 4, {}, "a", True])
def test_an_odd_entry_in_verified_json_does_not_count(tmp_path, value):
    shard(tmp_path, name="a")
    path = tmp_path / "a_train_000001.npy"
    (tmp_path / "verified.json").write_text(json.dumps({path.name: value}))
    flip(path)
    assert error_of(fineweb.open_shards, tmp_path, "train", 257) == differs(path)


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_folder_that_cannot_be_written_is_read_each_time(tmp_path, monkeypatch, capfd, step):
    shard(tmp_path)
    before = sorted(tmp_path.iterdir())

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    if step == "write":  # root may write anywhere
        monkeypatch.setattr(Path, "write_bytes", refuse)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    hashed = reads(monkeypatch)
    for _ in range(2):
        assert len(fineweb.open_shards(tmp_path, "train", 257)) == 1
    assert len(hashed) == 2
    assert sorted(tmp_path.iterdir()) == before
    assert capfd.readouterr() == ("", "")


def test_two_ranks_may_write_at_the_same_time(tmp_path, monkeypatch):
    replace, others = os.replace, iter([b"other"])

    def late(*args):
        for content in others:  # all of another's writing, before this one's last step
            fineweb.write_file(tmp_path / "file", content)
        replace(*args)

    monkeypatch.setattr(os, "replace", late)
    fineweb.write_file(tmp_path / "file", b"own")
    assert (tmp_path / "file").read_bytes() == b"own"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_fails_while_a_shard_is_read(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    shard(tmp_path, name="a")
    monkeypatch.setattr(fineweb, "checksum_of", fail)
    message = error_of(fineweb.open_shards, tmp_path, "train", 257)
    assert "a_train_000001.npy cannot be read (Input/output error)" in message
    error_of(fineweb.main, verify=str(tmp_path))
    assert message in capsys.readouterr().out.splitlines()


# ---- files that are no shards --------------------------------------------------------------------


class Harmful:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def npy(array, **settings):
    content = io.BytesIO()
    np.save(content, array, **settings)
    return content.getvalue()


def npz(array):
    content = io.BytesIO()
    np.savez(content, array)
    return content.getvalue()


def npy_header(text, data=b"", version=b"\x01\x00"):
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode() + data


def llmc(n_tokens, data=b"", magic=20240520, version=1):
    return np.array([magic, version, n_tokens, *[0] * 253], dtype="<i4").tobytes() + data


UINT16 = np.arange(20, dtype=np.uint16)
GOOD = "{'descr': '<u2', 'fortran_order': False, 'shape': (20,), }"
OBJECTS = np.array([Harmful()], dtype=object)
BAD_SHARDS = {
    "empty.npy": b"", "magic.npy": b"\x93NUMPY", "junk.npy": bytes(range(256)),
    "more.npy": npy(UINT16) + b"\0", "less.npy": npy(UINT16)[:-1], "odd.npy": npy(UINT16)[:-2],
    "big_endian.npy": npy(UINT16.astype(">u2")), "signed.npy": npy(UINT16.astype("<i2")),
    "float16.npy": npy(UINT16.astype("<f2")), "uint32.npy": npy(UINT16.astype("<u4")),
    "bytes.npy": npy(UINT16.astype("u1")), "fields.npy": npy(UINT16.view([("a", "<u2")])),
    "table.npy": npy(UINT16.reshape(4, 5)), "scalar.npy": npy(np.uint16(5)),
    "zip.npy": npz(UINT16), "pickle.npy": pickle.dumps(Harmful()),
    "objects.npy": npy(OBJECTS, allow_pickle=True),
    "version.npy": npy_header(GOOD, UINT16.tobytes(), version=b"\x04\x00"),
    "negative.npy": npy_header(GOOD.replace("20", "-20")),
    "huge.npy": npy_header(GOOD.replace("20", "9" * 40)),
    "text.npy": npy_header(GOOD.replace("20", "'20'")),
    "key.npy": npy_header("{[]: 5}"), "open.npy": npy_header("{'descr"), "none.npy": npy_header(""),
    "code.npy": npy_header("__import__('os').mkdir('harm')"),
    "brackets.npy": npy_header("(" * 5000), "long.npy": npy_header(" " * 65000),
    "empty.bin": b"", "short.bin": llmc(0)[:1023], "junk.bin": bytes(range(256)) * 8,
    "more.bin": llmc(20, UINT16.tobytes() + b"\0"), "less.bin": llmc(20, UINT16.tobytes()[:-1]),
    "one_more.bin": llmc(19, UINT16.tobytes()), "one_less.bin": llmc(21, UINT16.tobytes()),
    "negative.bin": llmc(-20, UINT16.tobytes()), "least.bin": llmc(-(2**31), UINT16.tobytes()),
    "agrees.bin": llmc(-500)[:24], "most.bin": llmc(2**31 - 1, UINT16.tobytes()),
    "magic.bin": llmc(20, UINT16.tobytes(), magic=20240801),
    "version.bin": llmc(20, UINT16.tobytes(), version=7),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SHARDS)
@pytest.mark.filterwarnings("ignore")
def test_a_malformed_shard_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"a_train_000000{name[-4:]}"
    path.write_bytes(BAD_SHARDS[name])
    message = error_of(fineweb.open_shards, tmp_path, "train", 257)
    assert message.startswith(f"{path} is no shard of uint16 tokens (") and len(message) < 600
    assert [*tmp_path.iterdir()] == [path]  # no harm done


def test_whole_shards_are_read(tmp_path):
    """The malformed ones' counterparts."""
    (tmp_path / "a_train_000000.bin").write_bytes(llmc(20, UINT16.tobytes()))
    (tmp_path / "a_train_000001.bin").write_bytes(llmc(0))
    (tmp_path / "a_train_000002.npy").write_bytes(npy(UINT16))
    (tmp_path / "a_train_000003.npy").write_bytes(npy(UINT16[:0]))
    (tmp_path / "a_train_000004.npy").write_bytes(npy_header(GOOD, UINT16.tobytes()))
    for name in ("a_train_000005.npy.part", "a_train_000006.txt", "a_train_7.npy", "train.npy"):
        (tmp_path / name).write_text("no shard, nor named so")
    shards = fineweb.open_shards(tmp_path, "train", 20)
    assert [shard.tolist() for shard in shards] == [
        [*range(20)],
        [],
        [*range(20)],
        [],
        [*range(20)],
    ]


@pytest.mark.filterwarnings("ignore")
def test_no_changed_byte_of_a_header_changes_the_tokens_or_ends_in_a_traceback(tmp_path):
    path, content = tmp_path / "a_train_000000.npy", npy(UINT16)
    for at in range(128):
        for value in {0, 0x28, 0x39, 0xFF, content[at] ^ 1} - {content[at]}:
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                [tokens] = fineweb.open_shards(tmp_path, "train", 257)
            except SystemExit as error:
                assert len(str(error).splitlines()) == 1
            else:
                assert tokens.dtype == np.uint16 and tokens.tolist() == UINT16.tolist()


# ---- --verify ------------------------------------------------------------------------------------


def test_verify_through_a_process(tmp_path):
    manifest = shard(tmp_path / "data", DOCUMENTS * 3, shard_size=1000)
    total = sum(entry["tokens"] for entry in manifest["shards"])
    assert (len(manifest["shards"]), f"{total:,}"[1]) == (5, ",")
    verify = ROOT / "fineweb.py", "--verify", "data"
    done = python(tmp_path, *verify)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"data: 5 shards, {total:,} tokens, all as manifest.json says\n"

    for split in ("train", "val"):  # what was right before is read again all the same
        fineweb.open_shards(tmp_path / "data", split, 257)
    val, flipped, short, _, gone = (tmp_path / "data" / e["file"] for e in manifest["shards"])
    flip(flipped, at=-100)
    short.write_bytes(short.read_bytes()[:-2])
    gone.unlink()
    shutil.copy(val, tmp_path / "data" / "data_val_000009.npy")
    done = python(tmp_path, *verify)
    assert done.returncode == 1
    assert done.stderr == "4 of 6 shards of data are bad: copy them or make them again\n"
    named = dict(line.split(" ", maxsplit=1) for line in done.stdout.splitlines())
    extra = "data/data_val_000009.npy"
    assert named.keys() == {extra, *(f"data/{path.name}" for path in (flipped, short, gone))}
    assert differs(f"data/{flipped.name}") in done.stdout.splitlines()
    assert "mmap" in named[f"data/{short.name}"] and "No such file" in named[f"data/{gone.name}"]
    assert "not in manifest.json" in named[extra]


def test_verify_reads_what_verified_json_says_was_read(tmp_path, capsys):
    shard(tmp_path, name="a")
    path = tmp_path / "a_train_000001.npy"
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    flip(path)  # as a disk may do, without a new time
    stat = path.stat()
    memory = {path.name: [stat.st_size, stat.st_ino, stat.st_ctime_ns, checksum]}
    (tmp_path / "verified.json").write_text(json.dumps(memory))
    fineweb.open_shards(tmp_path, "train", 257)
    assert "1 of 2 shards" in error_of(fineweb.main, verify=str(tmp_path))
    assert capsys.readouterr().out == differs(path) + "\n"


@pytest.mark.parametrize(("key", "words"), [("tokens", "it has"), ("largest", "largest token")])
@pytest.mark.parametrize("by", [1, -1])
def test_verify_compares_more_than_checksums(tmp_path, capsys, key, words, by):
    manifest = shard(tmp_path, name="a")
    assert fineweb.main(verify=str(tmp_path)) is None
    manifest["shards"][1][key] += by
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert "1 of 2 shards" in error_of(fineweb.main, verify=str(tmp_path))
    [line] = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "a_train_000001.npy") in line and words in line


def test_verify_of_files_that_are_no_files(tmp_path, capsys):
    names = ["a_train_000000.npy", "b_train_000001.npy", "c" * 300 + "_train_000002.npy"]
    shards = [ENTRY | {"file": name, "tokens": 10**17} for name in names]
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {"shards": shards}))
    (tmp_path / names[0]).mkdir()
    (tmp_path / names[1]).symlink_to("nowhere")
    (tmp_path / "d_val_000003.bin").symlink_to("nowhere")
    assert "4 of 4 shards" in error_of(fineweb.main, verify=str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip([*names, "d_val_000003.bin"], lines, strict=True):
        assert line.startswith(str(tmp_path / name))


def test_verify_needs_a_folder_with_a_manifest_and_nothing_else(tmp_path):
    shard(tmp_path / "data")
    folder = str(tmp_path / "data")
    others = [{"files": ("text.txt",)}, {"out": "other"}, {"dataset": "stdlib"}]
    for other in (*others, {"part": "1/2"}, {"download": True}):
        assert "--verify" in error_of(fineweb.main, verify=folder, **other)
    (tmp_path / "data" / "manifest.json").unlink()
    for name in ("data", "nowhere"):
        message = error_of(fineweb.main, verify=str(tmp_path / name))
        assert f"{name}/ has no manifest.json" in message


# ---- fingerprint ---------------------------------------------------------------------------------


def test_the_same_data_elsewhere_has_the_same_fingerprint(tmp_path):
    shard(tmp_path / "a", shard_size=300)
    first = fineweb.fingerprint(tmp_path / "a")
    assert len(first) == 16 and set(first) <= set("0123456789abcdef")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    fineweb.open_shards(tmp_path / "b", "train", 257)  # leaves verified.json
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest["shards"].reverse()
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    assert fineweb.fingerprint(str(tmp_path / "b")) == first
    shard(tmp_path / "again", shard_size=300, name="a")
    assert fineweb.fingerprint(tmp_path / "again") == first


def test_other_data_has_another_fingerprint(tmp_path):
    variants = {
        "first": {},
        "letter": {"documents": [*DOCUMENTS[:-1], "y" * 1000]},  # as many tokens
        "cut": {"shard_size": 300},
        "less": {"max_tokens": 900},
        "name": {"name": "b"},
    }
    prints = set()
    for folder, changes in variants.items():
        shard(tmp_path / folder, **({"name": "a"} | changes))
        prints.add(fineweb.fingerprint(tmp_path / folder))
    assert len(prints) == len(variants)


def test_without_a_manifest_names_and_sizes_are_the_fingerprint(tmp_path):
    names = {}
    for folder, files in {
        "a": {"x_train_000000.npy": 20, "x_val_000001.bin": 9},
        "same": {"x_val_000001.bin": 9, "x_train_000000.npy": 20, "notes.txt": 5},
        "size": {"x_train_000000.npy": 19, "x_val_000001.bin": 9},
        "name": {"y_train_000000.npy": 20, "x_val_000001.bin": 9},
        "fewer": {"x_train_000000.npy": 20},
    }.items():
        (tmp_path / folder).mkdir()
        for name, n in files.items():
            data = UINT16[:n].tobytes()
            content = npy(UINT16[:n]) if name.endswith("npy") else llmc(n, data)
            (tmp_path / folder / name).write_bytes(content)
        names.setdefault(fineweb.fingerprint(tmp_path / folder), []).append(folder)
    assert sorted(names.values()) == [["a", "same"], ["fewer"], ["name"], ["size"]]

"""fineweb.py's corpora by name, on a stand-in for the hub that is well, ill, or not there: the
shards are those of the same files on this machine."""

import http.server
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hub import Hub
from test_fineweb import error_of

import fineweb
import sources
from sources import DATASETS, HUB

ROOT = Path(fineweb.__file__).resolve().parent
SETTINGS = {"encoding": "bytes", "shard_size": 5000, "val_tokens": 7000, "workers": 2}
STORIES = DATASETS["tinystories"].files
# fineweb.py that waits for nothing, and takes a little for a lot.
DRIVER = """
import sys, time
import sources
time.sleep = lambda seconds: None  # the client's pauses too
sources.BLOCK, sources.LARGE = map(int, sys.argv.pop(1).split(","))
sys.argv[0] = "fineweb.py"
import fineweb, tyro
tyro.cli(fineweb.main, use_underscores=True)
"""


def texts_of(seed, number):
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdef ü\n", k=rng.randrange(1, 400))) for _ in range(number)]


def write_parquet(path, texts, row_group_size=20, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"id": [*range(len(texts))], "text": texts} | columns)
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)


def files_of(pattern, number=3):
    """Paths in the hub's folder that a pattern of DATASETS means."""
    pattern = pattern.removeprefix(HUB).replace("**", "deep/er")
    return [pattern.replace("*", f"{i:03d}_0000{i}") for i in range(number)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The repositories of all datasets, with files besides that are not meant."""
    folder = tmp_path_factory.mktemp("hub")
    for name, dataset in DATASETS.items():
        if dataset.files.startswith(HUB):
            for path in files_of(dataset.files):
                write_parquet(folder / path, [None, "", *texts_of(f"{name} {path}", 60)])
    edu = folder / "HuggingFaceFW/fineweb-edu"
    (edu / "README.md").write_text("Texts")
    write_parquet(edu / "data/other/000.parquet", ["not meant"])
    write_parquet(folder / "roneneldan/TinyStories/data/validation-0.parquet", ["not meant"])
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(hub, *args, sizes="1000,4000", env=(), **settings):
    """fineweb.py, of which a block is 1,000 bytes, and what is read at a time from the hub 4,000.
    The first argument is a dataset, or files."""
    flags = [a for key, value in (SETTINGS | settings).items() for a in (f"--{key}", str(value))]
    env = os.environ | hub.env(Path("home").resolve()) | dict(env)
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, sizes, *map(str, args), *flags], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process, status=0):
    """What a process put out on standard error."""
    try:
        said, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it did not end: {process.communicate()}")
    assert process.returncode == status, errors
    return errors


def error_line(process):
    errors = ended(process, status=1)
    assert len(errors.strip().splitlines()) == 1, errors
    return errors.strip()


def contents(folder):
    """Every file below a folder, by its path."""
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def tokens_in(folder):
    files = sorted(Path(folder).glob("*.npy"), key=lambda file: file.stem[-6:])
    return np.concatenate([np.load(file) for file in files])


def local(folder, pattern, name, **settings):
    """The contents of a folder of shards that are made of a hub's files without a hub."""
    files = [folder / path for path in files_of(pattern)]
    out = Path("local") / name
    shutil.rmtree(out, ignore_errors=True)
    settings = SETTINGS | {"workers": 1, "name": name} | settings
    fineweb.write_shards(sources.corpus_of(files), out, **settings)
    return contents(out)


def readings(requests):
    """Of requests, those for a file's bytes."""
    return [request for request in requests if request[1].startswith("/cdn/")]


# ---- datasets by name ----------------------------------------------------------------------------

NAMES = {
    "fineweb_edu_10BT": ("edu_fineweb10B", "edufineweb"),
    "fineweb_edu_100BT": ("edu_fineweb100B", "edufineweb"),
    "fineweb_edu_350BT": ("edu_fineweb350B", "edufineweb"),
    "fineweb_10BT": ("fineweb10B", "fineweb"),
    "openwebtext": ("openwebtext", "openwebtext"),
    "bookcorpus": ("bookcorpus", "bookcorpus"),
    "tinystories": ("tinystories", "tinystories"),
}


def test_names():
    assert {*NAMES} == {name for name in DATASETS if DATASETS[name].files.startswith(HUB)}


@pytest.mark.parametrize("name", NAMES)
def test_a_dataset_is_its_files(folder, work, name):
    out, prefix = NAMES[name]
    with Hub(folder) as hub:
        assert ended(start(hub, "--dataset", name)) == ""
    assert contents(out) == local(folder, DATASETS[name].files, prefix)
    assert json.loads(Path(out, "manifest.json").read_text())["skipped"] == []
    shards = sum(len(content) for content in contents(out).values())
    assert not contents("home") or shards > sum(map(len, contents("home").values()))
    assert {path.name for path in work.iterdir()} <= {out, "home", "local"}


def test_without_a_name_it_is_fineweb_edu(folder, work):
    with Hub(folder) as hub:
        ended(start(hub))
    edu = DATASETS["fineweb_edu_10BT"].files
    assert contents("edu_fineweb10B") == local(folder, edu, "edufineweb")


def test_files_on_the_hub_as_a_source(folder, work):
    """One file, two, and a pattern; together with one of this machine."""
    first, *others = [HUB + path for path in files_of(STORIES)]
    with Hub(folder) as hub:
        for source in ([STORIES], [first, *others]):
            ended(start(hub, *source, "--out", "stories"))
            assert contents("stories") == local(folder, STORIES, "stories")
            shutil.rmtree("stories")
        Path("own.jsonl").write_text('{"text": "Mine"}\n')
        ended(start(hub, first, "own.jsonl", "--out", "mixed"))
    assert bytes(tokens_in("mixed")[-4:].tolist()) == b"Mine"


def test_parts_of_the_hubs_files(folder, work):
    with Hub(folder) as hub:
        for part in ("3/3", "1/3", "2/3"):
            hub.requests.clear()
            ended(start(hub, "--dataset", "tinystories", part=part))
            read = {path for _, path, _ in readings(hub.requests)}
            # its own, and the first one's end, which says how much text there is
            assert read <= {f"/cdn/{files_of(STORIES)[int(part[0]) - 1]}"}
    assert contents("tinystories") == local(folder, STORIES, "tinystories")


# ---- how much is asked ---------------------------------------------------------------------------


def asked_bytes(requests):
    ranges = [wanted.removeprefix("bytes=").split("-") for _, _, wanted in readings(requests)]
    return sum(int(last) - int(first) + 1 for first, last in ranges)


@pytest.mark.parametrize("other", [0, 30])
def test_few_requests_for_one_column(tmp_path, work, other):
    """Of a file of 40 row groups, without and with a column that is 30 times as large."""
    texts = [os.urandom(1000).hex() for _ in range(800)]
    columns = {"image": [os.urandom(1000 * other) for _ in texts]} if other else {}
    path = tmp_path / "hub/user/texts/a.parquet"
    write_parquet(path, texts, **columns)
    meta = pyarrow.parquet.read_metadata(path)
    text = sum(meta.row_group(i).column(1).total_compressed_size for i in range(40))
    with Hub(tmp_path / "hub") as hub:
        block = 2 * text // 40  # a block is two row groups, a reading is ten
        ended(start(hub, f"{HUB}user/texts/*", "--out", "out", sizes=f"{block},{5 * block}"))
    assert len(readings(hub.requests)) <= (60 if other else 12)
    assert asked_bytes(hub.requests) < (4 if other else 1.5) * text


# ---- a hub that fails ----------------------------------------------------------------------------


def ill_for_a_while(fault):
    """Misbehaves at the fourth request for a file's bytes and so many after it that one of three
    processes has no luck with all its tries."""
    numbers = itertools.count(1)

    def misbehave(number, method, path):
        return fault if "/cdn/" in path and 4 <= next(numbers) < 22 else None

    return misbehave


FAULTS = {
    "429": 429,
    "Retry-After": (429, {"Retry-After": "1"}),
    "503": 503,
    "cut": "cut",
    "reset": "reset",
    "hang up": "hang up",
}


def test_a_hub_that_fails_now_and_then(folder, work):
    """At every third request for what the client tries again of itself: nothing is to be said."""
    numbers, faults = itertools.count(1), itertools.cycle(FAULTS.values())

    def misbehave(number, method, path):
        if not path.startswith("/api/") and next(numbers) % 3 == 0:
            return next(faults)

    with Hub(folder, misbehave) as hub:
        assert ended(start(hub, "--dataset", "tinystories")) == ""
    assert next(numbers) > 3 * len(FAULTS)  # each was met
    assert contents("tinystories") == local(folder, STORIES, "tinystories")


@pytest.mark.parametrize(("fault", "workers"), [*zip(FAULTS, [1, 2] * 3, strict=True)])
def test_a_hub_that_fails_for_longer(folder, work, fault, workers):
    """Longer than the client tries, which is six times: then it is said what fails, and why."""
    with Hub(folder, ill_for_a_while(FAULTS[fault])) as hub:
        errors = ended(start(hub, "--dataset", "tinystories", workers=workers))
    lines = [line for line in errors.splitlines() if line]
    reasons = {"cut": "RemoteProtocolError", "hang up": "RemoteProtocolError", "reset": "ReadError"}
    reason = reasons.get(fault, "503" if fault == "503" else "429")
    paths = "|".join(HUB + path for path in files_of(STORIES))
    assert lines
    for line in lines:
        assert re.fullmatch(rf"({paths}): .*{reason}.*: next try in \d+ s", line)
    assert contents("tinystories") == local(folder, STORIES, "tinystories")


def test_a_hub_that_fails_at_the_first_contact(folder, work):
    """It is there, but overloaded: that passes."""
    faults = iter([503] * 5)
    with Hub(folder, lambda *request: next(faults, None)) as hub:
        errors = ended(start(hub, "--dataset", "tinystories"))
    assert f"{STORIES}: " in errors and "503" in errors and "next try in" in errors
    assert contents("tinystories") == local(folder, STORIES, "tinystories")


@pytest.mark.parametrize("token", ["", "hf_x"])
def test_a_gate(folder, work, token):
    with Hub(folder, gated=["roneneldan/TinyStories"]) as hub:
        process = start(hub, "--dataset", "tinystories", env={"HF_TOKEN": token})
        *tries, error = [line for line in ended(process, status=1).splitlines() if line]
    assert len(tries) == len(sources.PAUSES) and all("next try in" in line for line in tries)
    assert HUB + files_of(STORIES)[0] in error and "GatedRepoError" in error
    assert not Path("tinystories").exists() or not list(Path("tinystories").glob("*.npy"))


@pytest.mark.parametrize("workers", [1, 2])
def test_it_gives_up_and_goes_on_when_the_hub_is_well(tmp_path, work, workers):
    """The second file is not to be had: what is whole of the first one is not asked for again."""
    texts, ill = [texts_of(number, 2000) for number in range(3)], [True]
    for number in range(3):
        write_parquet(tmp_path / f"hub/user/texts/{number}.parquet", texts[number])

    def misbehave(number, method, path):
        return 503 if ill and "/1.parquet" in path else None

    def asked_of_first():
        return asked_bytes(request for request in hub.requests if "/0.parquet" in request[1])

    with Hub(tmp_path / "hub", misbehave) as hub:
        args = [f"{HUB}user/texts/*.parquet", "--out", "out"]
        sizes = {"sizes": "20000,40000", "shard_size": 10_000, "workers": workers}
        *tries, error = [x for x in ended(start(hub, *args, **sizes), status=1).splitlines() if x]
        assert len(tries) >= len(sources.PAUSES) and all("/1.parquet" in line for line in tries)
        assert error.startswith(f"{HUB}user/texts/1.parquet: ") and "503" in error
        times = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.npy")}
        assert len(times) > 20
        before = asked_of_first()
        ill.clear()
        hub.requests.clear()
        ended(start(hub, *args, **sizes))
        assert asked_of_first() < before / 2  # its end, and what no shard had yet
    assert {path: path.stat().st_mtime_ns for path in times} == times
    expected = [token for some in texts for text in some for token in (256, *text.encode())]
    assert tokens_in("out").tolist() == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_while_the_hub_is_silent(folder, work, workers):
    """A process that waits for an answer ends all the same, and is not trying again."""
    with Hub(folder, lambda *request: "stall" if "/cdn/" in request[2] else None) as hub:
        env = {"HF_HUB_DOWNLOAD_TIMEOUT": "20"} | hub.env(work / "home")
        flags = [a for key, v in (SETTINGS | {"workers": workers}).items() for a in (f"--{key}", v)]
        command = [sys.executable, ROOT / "fineweb.py", "--dataset", "tinystories", *flags]
        process = subprocess.Popen(
            list(map(str, command)), env=os.environ | env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        while not readings(hub.requests):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
        process.terminate()
        began = time.monotonic()
        errors = ended(process, status=143)
    assert time.monotonic() - began < 5
    assert len(errors.strip().splitlines()) == 1 and "the same command goes on" in errors


def test_killed_while_streaming(folder, work):
    out, slow = work / "tinystories", threading.Event()

    def misbehave(number, method, path):
        if "/cdn/" in path and not slow.is_set():
            time.sleep(0.02)

    with Hub(folder, misbehave) as hub:
        for n_shards in (1, 3, 5):
            process = start(hub, "--dataset", "tinystories")
            while len(list(out.glob("*.npy"))) < n_shards:
                assert process.poll() is None
                time.sleep(0.001)
            process.kill()
            process.communicate()
        slow.set()
        ended(start(hub, "--dataset", "tinystories"))
    assert contents(out) == local(folder, STORIES, "tinystories")
    assert sum(map(len, contents("home").values())) < 10_000  # of the corpus nothing is kept


# ---- no hub, or not what is asked of it ----------------------------------------------------------


def test_no_network(work, folder):
    with Hub(folder) as hub:
        pass  # nobody listens there any more
    for reason, env in {"refused": {}, "offline": {"HF_HUB_OFFLINE": "1"}}.items():
        began = time.monotonic()
        for args in (["--dataset", "tinystories"], ["--download"], [STORIES, "--out", "x"]):
            error = error_line(start(hub, *args, env=env))
            assert error.startswith(HUB) and reason in error and "--dataset stdlib" in error
        assert time.monotonic() - began < 15
    assert {path.name for path in work.iterdir()} <= {"home"}


@pytest.mark.parametrize(
    "source", ["nobody/nothing/*.parquet", "roneneldan/TinyStories/absent/*.parquet",
               "roneneldan/TinyStories/*.md"],
)  # fmt: skip
def test_nothing_there(folder, work, source):
    with Hub(folder) as hub:
        began = time.monotonic()
        assert error_line(start(hub, HUB + source, "--out", "x")).startswith(HUB + source)
        assert time.monotonic() - began < 10 and len(hub.requests) < 10
    assert not Path("x").exists()


def test_a_file_that_has_vanished(tmp_path, work):
    """It was listed, and is not there: no pause helps."""
    for number in range(3):
        write_parquet(tmp_path / f"hub/user/texts/{number}.parquet", texts_of(number, 60))
    path = tmp_path / "hub/user/texts/1.parquet"

    def misbehave(number, method, requested):
        if "/resolve/" in requested and "/1.parquet" in requested:
            path.unlink(missing_ok=True)

    with Hub(tmp_path / "hub", misbehave) as hub:
        error = error_line(start(hub, f"{HUB}user/texts/*.parquet", "--out", "out"))
    assert error.startswith(f"{HUB}user/texts/1.parquet: ") and "404" in error


def test_a_file_without_text(tmp_path, work):
    write_parquet(tmp_path / "hub/user/texts/0.parquet", [1, 2])
    with Hub(tmp_path / "hub") as hub:
        error = error_line(start(hub, f"{HUB}user/texts/*.parquet", "--out", "out"))
    assert "0.parquet has no text in a column" in error and "text (int64)" in error


# ---- --download ----------------------------------------------------------------------------------


def bin_file(tokens, magic=20240520, version=1, n_tokens=None):
    """llm.c's: 256 int32 of header, then uint16."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if n_tokens is None else n_tokens
    return header.tobytes() + tokens.astype("<u2").tobytes()


SIZES = (5000, 6000, 6000, 6001, 77, 500, 500, 500, 500, 500)


@pytest.fixture
def tokens(tmp_path):
    """hub/, where others have put FineWeb-Edu's tokens; returns them, file by file."""
    folder, rng = tmp_path / "hub/kjj0/finewebedu10B-gpt2", np.random.default_rng(0)
    folder.mkdir(parents=True)
    parts = [rng.integers(0, 257, size).astype(np.uint16) for size in SIZES]
    for number, part in enumerate(parts):
        split = "train" if number else "val"
        (folder / f"finewebedu_{split}_{number:06d}.bin").write_bytes(bin_file(part))
    return parts


def test_download(tokens, work):
    with Hub(work / "hub") as hub:
        assert ended(start(hub, "--download", shard_size=4096, val_tokens=5000)) == ""
    out = Path("edu_fineweb10B")
    assert np.array_equal(tokens_in(out), np.concatenate(tokens))
    sizes = {path.name: len(np.load(path)) for path in out.glob("*.npy")}
    assert sizes["edufineweb_val_000000.npy"] == sizes["edufineweb_train_000002.npy"] == 4096
    assert sizes["edufineweb_val_000001.npy"] == 5000 - 4096
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["documents"] == np.count_nonzero(np.concatenate(tokens) == 256)


def test_download_of_the_other(tokens, work):
    shutil.copytree("hub/kjj0/finewebedu10B-gpt2", "hub/kjj0/fineweb10B-gpt2")
    with Hub(work / "hub") as hub:
        ended(start(hub, "--download", "--dataset", "fineweb_10BT"))
        assert "--download" in error_line(start(hub, "--download", "--dataset", "tinystories"))
    assert np.array_equal(tokens_in("fineweb10B"), np.concatenate(tokens))
    assert Path("fineweb10B/fineweb_val_000000.npy").exists()


@pytest.mark.parametrize(("workers", "ahead"), [(1, 0), (2, 4)])
def test_download_of_a_beginning(tokens, work, workers, ahead):
    """10,500 tokens: of two files, and what the workers were given meanwhile."""
    with Hub(work / "hub") as hub:
        process = start(hub, "--download", max_tokens=10_500, workers=workers, sizes="20000,20000")
        ended(process)
    assert np.array_equal(tokens_in("edu_fineweb10B"), np.concatenate(tokens)[:10_500])
    assert len({path for _, path, _ in readings(hub.requests)}) <= 2 + ahead


BAD = {
    "magic": (bin_file(np.arange(9), magic=20240801), "one of llm.c's files"),
    "version": (bin_file(np.arange(9), version=2), "one of llm.c's files"),
    "more": (bin_file(np.arange(9), n_tokens=8), "one of llm.c's files"),
    "less": (bin_file(np.arange(9), n_tokens=10), "one of llm.c's files"),
    "negative": (bin_file(np.arange(9), n_tokens=-9), "one of llm.c's files"),
    "short": (bin_file(np.arange(9))[:1000], "one of llm.c's files"),
    "tiny": (b"llm", "one of llm.c's files"),
    "empty": (b"", "one of llm.c's files"),
    "odd": (bin_file(np.arange(9)) + b"\0", "one of llm.c's files"),
    "beyond": (bin_file(np.array([5, 257, 300])), "300"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_of_tokens_is_named(tokens, work, name):
    content, words = BAD[name]
    [path] = Path("hub/kjj0/finewebedu10B-gpt2").glob("*_000002.bin")
    path.write_bytes(content)
    with Hub(work / "hub") as hub:
        error = error_line(start(hub, "--download"))
    assert f"kjj0/finewebedu10B-gpt2/{path.name}" in error and words in error


def test_download_killed_and_gone_on_with(tokens, work):
    out = work / "edu_fineweb10B"
    with Hub(work / "hub", lambda *request: time.sleep(0.02)) as hub:
        ended(start(hub, "--download", shard_size=1000))
        whole = contents(out)
        shutil.rmtree(out)
        for n_shards in (1, 8, 16):
            process = start(hub, "--download", shard_size=1000)
            while len(list(out.glob("*.npy"))) < n_shards:
                assert process.poll() is None
                time.sleep(0.001)
            process.kill()
            process.communicate()
        ended(start(hub, "--download", shard_size=1000))
    assert contents(out) == whole
    assert np.array_equal(tokens_in(out), np.concatenate(tokens))


@pytest.mark.parametrize("fault", FAULTS)
def test_download_from_a_hub_that_fails(tokens, work, fault):
    with Hub(work / "hub", ill_for_a_while(FAULTS[fault])) as hub:
        assert "next try in" in ended(start(hub, "--download"))
    assert np.array_equal(tokens_in("edu_fineweb10B"), np.concatenate(tokens))


def test_download_of_gpt2s_tokens(tmp_path, work):
    """The vocabulary that they are of."""
    try:
        fineweb.get_encoding("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))
    folder = tmp_path / "hub/kjj0/finewebedu10B-gpt2"
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, 50257, 20_000).astype(np.uint16)
    (folder / "finewebedu_val_000000.bin").write_bytes(bin_file(tokens))
    with Hub(tmp_path / "hub") as hub:
        ended(start(hub, "--download", encoding="gpt2"))
    assert np.array_equal(tokens_in("edu_fineweb10B"), tokens)


# ---- Tiny Shakespeare, the standard library ------------------------------------------------------

PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 2000


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Where SHAKESPEARE is; returns the list of what was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path != "/absent" else 404)
            self.send_header("Content-Length", str(len(PLAY)))
            self.end_headers()
            self.wfile.write(PLAY[: 1000 if self.path == "/cut" else None].encode())

        def log_message(self, *args):
            """Silence."""

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(sources, "SHAKESPEARE", f"{url}/input.txt")
        yield asked
        server.shutdown()


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare_char"])
def test_shakespeare(server, name):
    """Fetched once; whatever there is as input.txt is it."""
    fineweb.main(dataset=name, encoding="bytes", val_tokens=5000, workers=1)
    fineweb.main(dataset=name, encoding="bytes", val_tokens=5000, workers=1, out="again")
    assert server == ["/input.txt"] and Path("input.txt").read_text() == PLAY
    assert tokens_in(name).tolist() == tokens_in("again").tolist() == [256, *PLAY.encode()]
    Path("input.txt").write_text("Mine" * 9000)
    fineweb.main(dataset=name, encoding="bytes", val_tokens=5000, workers=1, out="mine")
    assert len(server) == 1 and tokens_in("mine").tolist() == [256, *b"Mine" * 9000]


def test_shakespeare_char_is_bytes_with_room_for_validation(server):
    fineweb.main(dataset="shakespeare_char", workers=1)
    manifest = json.loads(Path("shakespeare_char/manifest.json").read_text())
    assert (manifest["encoding"], manifest["shards"][0]["tokens"]) == ("bytes", 100_000)


@pytest.mark.parametrize("path", ["/absent", "/cut", "nobody listens"])
def test_no_shakespeare(server, monkeypatch, path):
    url = "http://127.0.0.1:9" if path[0] != "/" else sources.SHAKESPEARE[:-10] + path
    monkeypatch.setattr(sources, "SHAKESPEARE", url)
    error = error_of(fineweb.main, dataset="shakespeare")
    assert error.startswith(f"{url} cannot be read") and "--dataset stdlib" in error
    assert not list(Path.cwd().iterdir())


def test_the_standard_library(work, capsys):
    fineweb.main(dataset="stdlib", workers=2)
    documents = [[256, *text.encode()] for text in sources.standard_library()]
    assert np.array_equal(tokens_in("stdlib"), np.concatenate(documents))
    manifest = json.loads(Path("stdlib/manifest.json").read_text())
    assert (manifest["encoding"], manifest["shards"][0]["tokens"]) == ("bytes", 300_000)
    assert manifest["documents"] == len(documents)
    before = contents("stdlib")
    fineweb.main(dataset="stdlib")  # finished
    assert contents("stdlib") == before
    assert "--part" in error_of(fineweb.main, dataset="stdlib", part="1/2", out="parts")

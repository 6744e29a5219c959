"""fineweb.py stopped, killed and started again, on one machine and on several: in the end the
shards are those of a call that nothing happened to, byte for byte, and nothing else is left."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_fineweb import error_of

import fineweb
import sources

if not hasattr(os, "fork"):
    pytest.skip("kills processes as only POSIX knows it", allow_module_level=True)

SCRIPT = Path(fineweb.__file__).resolve()
SETTINGS = {"encoding": "bytes", "shard_size": 4000, "val_tokens": 9000, "workers": 2}
SMALL = {"encoding": "bytes", "shard_size": 700, "val_tokens": 1100, "workers": 1}


def write_corpus(folder, n_files, n_documents):
    """Files of JSON lines, as many texts as that in all; returns the texts."""
    rng, texts = random.Random(0), []
    folder.mkdir()
    for number in range(n_files):
        some = [
            "".join(rng.choices("abcdef ü\n", k=rng.randrange(1, 400)))
            for _ in range(n_documents // n_files)
        ]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some)
        (folder / f"{number:02d}.jsonl").write_text(lines)
        texts += some
    return texts


def plain_tokens(texts):
    """The bytes encoding, by Python alone."""
    return [token for text in texts for token in (256, *text.encode())]


def command(source="../src", out="data", **settings):
    flags = [a for key, value in (SETTINGS | settings).items() for a in (f"--{key}", str(value))]
    return [sys.executable, str(SCRIPT), str(source), "--out", str(out), *flags]


def start(folder, **settings):
    """The script as a user runs it, in a terminal of its own, in the background."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        command(**settings), cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(folder, **settings):
    """Go on until the end, which must be a good one; what it printed."""
    run = start(folder, **settings)
    said, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (0, "")
    return said


def error_line(run):
    """The one line that a process must end with, and nothing besides."""
    try:
        said, errors = run.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        run.kill()
        pytest.fail(f"it did not end: {run.communicate()}")
    assert (said, len(errors.strip().splitlines())) == ("", 1), errors
    return errors.strip()


def contents(folder):
    """Every file below a folder, by its path."""
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def tokens_in(folder):
    files = sorted(folder.glob("*.npy"), key=lambda file: file.stem[-6:])  # numbered through
    return np.concatenate([np.load(file) for file in files]).tolist()


def whole_shards(folder):
    """What an unfinished folder counts on, as files that another writing would change."""
    progress = folder / "progress.json"
    entries = json.loads(progress.read_bytes())["shards"] if progress.exists() else []
    stats = {folder / entry["file"]: (folder / entry["file"]).stat() for entry in entries}
    return {file: (stat.st_ino, stat.st_mtime_ns) for file, stat in stats.items()}


def wait_for(run, moment, folder):
    """Until the names in the folder are such as `moment` wants."""
    while not (folder.is_dir() and moment(os.listdir(folder))):
        assert run.poll() is None, "it ended before the moment came"
        time.sleep(0.0002)  # to look takes as long, and there are few cores


def shards(number):
    return lambda names: sum(name.endswith(".npy") for name in names) >= number


def children_of(run):
    pgrep = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True)
    return list(map(int, pgrep.stdout.split()))


def alive(pid):
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # a zombie has none
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """src/, a corpus of many small shards, and in whole/data what a call left alone makes of it."""
    folder = tmp_path_factory.mktemp("workshop")
    texts = write_corpus(folder / "src", n_files=12, n_documents=6000)
    finish(folder / "whole")
    assert tokens_in(folder / "whole" / "data") == plain_tokens(texts)
    assert len(list((folder / "whole" / "data").iterdir())) > 250
    return folder


@pytest.fixture(scope="module")
def whole(workshop):
    return contents(workshop / "whole" / "data")


# ---- kill -9 -------------------------------------------------------------------------------------

MOMENTS = {
    "at the start": lambda names: True,  # the folder is there
    "lock": lambda names: "fineweb.lock" in names,
    "progress": lambda names: "progress.json" in names,
    "first shard": shards(1),
    "first training shard": lambda names: any("_train_" in name for name in names),
    "a shard aside": lambda names: any(".npy." in name for name in names),
    "progress aside": lambda names: (
        shards(9)(names) and any("progress.json." in name for name in names)
    ),
    "20 shards": shards(20),
    "90 shards": shards(90),
    "200 shards": shards(200),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_once(workshop, whole, moment):
    folder = workshop / f"killed {moment}"
    run = start(folder)
    wait_for(run, MOMENTS[moment], folder / "data")
    workers = children_of(run)
    run.kill()
    run.communicate()
    end = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(alive, workers))
    before = whole_shards(folder / "data")
    finish(folder)
    assert contents(folder / "data") == whole
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in before} == before


def test_killed_again_and_again(workshop, whole):
    folder, before, kills = workshop / "again", {}, 0
    (folder / "data").mkdir(parents=True)
    while True:
        goal = len(list((folder / "data").glob("*.npy"))) + 40
        run = start(folder, workers=kills % 3 + 1)
        while run.poll() is None and not shards(goal)(os.listdir(folder / "data")):
            time.sleep(0.001)
        run.kill()
        errors = run.communicate()[1]
        assert before.items() <= whole_shards(folder / "data").items() or run.returncode == 0
        if run.returncode == 0:
            break
        assert (run.returncode, errors) == (-signal.SIGKILL, "")
        before, kills = whole_shards(folder / "data"), kills + 1
    assert kills > 5
    assert contents(folder / "data") == whole


# ---- kill -9 at every step -----------------------------------------------------------------------

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def killed(call, moment):
    """Do call() in a process that is asked before each change of a folder, by which a new shard too
    gets its name, whether this one, by its number, is the moment to die by kill -9. Did it?"""

    def run():
        changes = itertools.count(1)

        def hook(event, args):
            if event in CHANGES and moment(next(changes)):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        call()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def assert_survives_every_kill(calls, out, expected):
    """The calls, of which each in turn dies at each of its steps, and all are given again then."""
    wrong = {}
    for number, call in enumerate(calls):
        for step in itertools.count(1):
            shutil.rmtree(out, ignore_errors=True)
            for earlier in calls[:number]:
                earlier()
            if not killed(call, step.__eq__):
                break
            try:
                for again in calls[number:]:
                    again()
                differ = {name for name, _ in contents(out).items() ^ expected.items()}
                if differ:
                    wrong[number, step] = differ
            except SystemExit as error:
                wrong[number, step] = error.code
        assert step > 20  # there was something to kill
    assert not wrong


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A corpus whose files have several pieces, and which has rows that are skipped: in the
    middle, and in a last file that has nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "BLOCK", 1000)
    texts = write_corpus(tmp_path / "src", n_files=4, n_documents=40)
    with open("src/02.jsonl", "a") as file:
        file.write('{"text": 5}\n')
    Path("src/last.jsonl").write_text('{"text": null}\n{"text": true}\n')
    return texts


def write(out, **settings):
    part = settings.pop("part", "")
    return fineweb.write_shards(
        sources.corpus_of(["src"], part=part), out, **(SMALL | settings)
    )  # fmt: skip


def test_killed_before_every_change_of_the_folder(corpus, tmp_path):
    write("whole/data")
    assert tokens_in(tmp_path / "whole/data") == plain_tokens(corpus)
    assert_survives_every_kill([lambda: write("data")], "data", contents("whole/data"))


def test_killed_in_the_middle_of_a_document_that_is_the_last(corpus, tmp_path):
    write("whole/data", max_tokens=3333)
    assert tokens_in(tmp_path / "whole/data") == plain_tokens(corpus)[:3333]
    calls = [lambda: write("data", max_tokens=3333)]
    assert_survives_every_kill(calls, "data", contents("whole/data"))


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal(workshop, whole, signum, workers):
    folder = workshop / f"{signum.name}-{workers}"
    run = start(folder, workers=workers)
    wait_for(run, shards(10), folder / "data")
    run.send_signal(signum)
    assert "the same command goes on" in error_line(run)
    assert run.returncode == 128 + signum
    assert not {*contents(folder / "data")} & {"fineweb.lock", "manifest.json"}
    assert not list((folder / "data").glob("*.tmp"))
    finish(folder, workers=workers)
    assert contents(folder / "data") == whole


@pytest.mark.parametrize("moment", ["lock", "first shard", "20 shards"])
def test_ctrl_c(workshop, whole, moment):
    """A terminal sends it to the workers too."""
    folder = workshop / f"ctrl-c {moment}"
    run = start(folder)
    wait_for(run, MOMENTS[moment], folder / "data")
    os.killpg(run.pid, signal.SIGINT)
    assert "the same command goes on" in error_line(run)
    assert run.returncode == 130
    finish(folder)
    assert contents(folder / "data") == whole


def test_a_worker_that_is_killed(workshop, whole):
    folder = workshop / "worker"
    run = start(folder)
    wait_for(run, shards(5), folder / "data")
    os.kill(children_of(run)[0], signal.SIGKILL)
    assert "a worker was killed" in error_line(run)
    assert run.returncode == 1
    finish(folder)
    assert contents(folder / "data") == whole


def test_a_worker_that_is_killed_while_it_hands_its_tokens_over(workshop, whole):
    """Half of them are on their way, and nobody is there to send the rest."""
    folder = workshop / "handing over"
    run = start(folder)
    wait_for(run, shards(1), folder / "data")
    run.send_signal(signal.SIGSTOP)
    time.sleep(0.5)  # a pipe does not hold all tokens of a file
    for worker in children_of(run):
        os.kill(worker, signal.SIGKILL)
    run.send_signal(signal.SIGCONT)
    assert "a worker was killed" in error_line(run)
    assert run.returncode == 1
    finish(folder)
    assert contents(folder / "data") == whole


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [300, 3000, 12_000])
def test_a_file_that_cannot_be_written(workshop, whole, limit):
    """progress.json, or the first shard, or progress.json when it has grown."""
    folder = workshop / f"limit-{limit}"
    folder.mkdir()
    run = subprocess.Popen(
        command(), cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    error = error_line(run)
    assert "cannot write data/" in error and "File too large" in error
    assert run.returncode == 1
    before = whole_shards(folder / "data")
    assert bool(before) == (limit == 12_000)
    finish(folder)
    assert contents(folder / "data") == whole
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in before} == before


def test_a_disk_that_is_full_for_a_while(workshop, whole):
    small = workshop / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    run = start(small, source=workshop / "src")
    try:
        wait_for(run, shards(10), small / "data")
        run.send_signal(signal.SIGSTOP)
        with open(small / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while filler.write(bytes(4096)):
                pass
        before = whole_shards(small / "data")
        run.send_signal(signal.SIGCONT)
        error = error_line(run)
        assert "cannot write data/" in error and "No space left on device" in error
        assert run.returncode == 1
        refused = start(small, source=workshop / "src")
        assert "No space left" in (error := error_line(refused)) or "are free" in error
        assert refused.returncode == 1
        (small / "filler").unlink()
        finish(small, source=workshop / "src")
        assert contents(small / "data") == whole
        assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in before} == before
    finally:
        run.kill()
        run.communicate()
        subprocess.run(["umount", str(small)], check=True)


def test_room_is_estimated_before_the_work(corpus, monkeypatch):
    size = sum(file.stat().st_size for file in Path("src").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, size))
    assert "will need about" in error_of(write, "data")
    assert not contents("data")
    assert write("data", max_tokens=size // 2 - 10)["tokens"] == size // 2 - 10


# ---- the same command, and others ----------------------------------------------------------------


@pytest.fixture
def unfinished(corpus):
    """data/, where a call was killed after a few shards."""
    assert killed(lambda: write("data"), lambda _: len(whole_shards(Path("data"))) == 3)


OTHERS = {"shard_size": 701, "val_tokens": 1101, "max_tokens": 5000, "encoding": "gpt2"}


@pytest.mark.parametrize("key", [*OTHERS, "source"])
@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_other_settings_are_refused(unfinished, monkeypatch, key, state):
    if key == "encoding":  # whoever has no vocabulary of GPT-2's
        bytes_encoding = fineweb.get_encoding("bytes")
        monkeypatch.setattr(fineweb, "get_encoding", lambda name: bytes_encoding)
    if state == "finished":
        write("data")
    before = contents("data")
    if key == "source":
        with open("src/03.jsonl", "a") as file:
            file.write("\n")
    error = error_of(write, "data", **({key: OTHERS[key]} if key in OTHERS else {}))
    assert "already holds shards" in error and f"another {key}:" in error
    before.pop("fineweb.lock", None)  # the killed one's
    assert contents("data") == before


def test_another_file_is_another_source(unfinished):
    Path("src/00.jsonl").rename("src/0.jsonl")
    assert "made with another source:" in error_of(write, "data")


def test_workers_and_bad_rows_may_change(unfinished):
    write("whole/data")
    write("data", workers=3, max_bad=50)
    assert contents("data") == contents("whole/data")


def test_a_finished_folder(workshop, whole):
    folder = workshop / "whole" / "data"
    before = {file: file.stat().st_mtime_ns for file in [*folder.iterdir()]}
    said = finish(workshop / "whole")
    assert said.startswith("data: ") and "train on them" in said
    assert {file: file.stat().st_mtime_ns for file in [*folder.iterdir()]} == before


def test_two_processes_in_one_folder(workshop, whole):
    folder = workshop / "both"
    first = start(folder)
    wait_for(first, shards(3), folder / "data")
    first.send_signal(signal.SIGSTOP)
    before = contents(folder / "data")
    second = start(folder)
    assert "another process writes into data" in error_line(second)
    assert second.returncode == 1 and contents(folder / "data") == before
    first.send_signal(signal.SIGCONT)
    assert first.communicate(timeout=60)[1] == "" and first.returncode == 0
    assert contents(folder / "data") == whole


@pytest.mark.parametrize("error", [OSError, NotImplementedError])
def test_a_file_system_without_locks(corpus, monkeypatch, tmp_path, error):
    expected = write(tmp_path / "whole" / "data")

    def fails(*args, **settings):
        raise error("no locks here")

    monkeypatch.setattr(fineweb.FileLock, "acquire", fails)
    assert write(tmp_path / "data") == expected


@pytest.mark.parametrize("harm", ["deleted", "truncated"])
def test_a_shard_that_is_not_whole_any_more_is_named(unfinished, harm):
    shard = [*whole_shards(Path("data"))][1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-2]) if harm == "truncated" else shard.unlink()
    before = contents("data").keys()
    assert f"{shard} is no shard" in error_of(write, "data")
    assert contents("data").keys() == before - {"fineweb.lock"}
    shard.write_bytes(content)
    write("data")
    write("whole/data")
    assert contents("data") == contents("whole/data")


# ---- sizes ---------------------------------------------------------------------------------------


def test_sizes_of_shards(corpus, tmp_path):
    expected, rng = plain_tokens(corpus), random.Random(1)
    assert {expected.index(256, 1), len(expected)}.isdisjoint({50, 3000})
    for number in range(60):
        shard_size, val_tokens = rng.choice([50, 333, 1000, 10**6]), rng.randint(1, 3000)
        max_tokens = rng.choice([0, 0, val_tokens + 1, rng.randint(val_tokens + 1, 9000)])
        workers, out = rng.choice([1, 1, 1, 2, 3]), tmp_path / str(number)
        manifest = write(
            out, shard_size=shard_size, val_tokens=val_tokens, max_tokens=max_tokens,
            workers=workers,
        )  # fmt: skip
        kept = expected[: max_tokens or None]
        assert tokens_in(out) == kept
        assert (manifest["tokens"], manifest["documents"]) == (len(kept), kept.count(256))
        sizes = {"val": [], "train": []}
        for file in sorted(out.glob("*.npy"), key=lambda file: file.stem[-6:]):
            sizes[file.stem.split("_")[1]].append(len(np.load(file)))
        assert sum(sizes["val"]) == val_tokens
        for split in sizes.values():  # a split's last shard alone may be short
            assert {*split[:-1]} <= {shard_size} and 0 < split[-1] <= shard_size


# ---- one corpus, several machines ----------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("n", [2, 3])
def test_parts_in_any_order_are_one_machines(corpus, n, workers):
    write("whole/data")
    for order in itertools.permutations(range(1, n + 1)):
        shutil.rmtree("data", ignore_errors=True)
        for i in order:
            assert not Path("data/manifest.json").exists()
            write("data", part=f"{i}/{n}", workers=workers)
        assert contents("data") == contents("whole/data")
        assert {path.name for path in Path("data").iterdir()} == {*contents("data")}  # no folder


def test_parts_killed_before_every_change_of_the_folder(corpus):
    write("whole/data", shard_size=2000)
    calls = [lambda i=i: write("data", part=f"{i}/2", shard_size=2000) for i in (2, 1)]
    assert_survives_every_kill(calls, "data", contents("whole/data"))


def killed_while_joining(number):
    """Two parts, of which the last one died when it had joined as many shards as that."""

    def moment(_):
        return Path("data/progress.json").exists() and len(whole_shards(Path("data"))) == number

    write("data", part="2/2")
    assert killed(lambda: write("data", part="1/2"), moment)


def test_a_join_that_was_killed_is_gone_on_with_by_any_part(corpus):
    write("whole/data")
    for number in (0, 1, 5, 11):
        shutil.rmtree("data", ignore_errors=True)
        killed_while_joining(number)
        write("data", part="2/2")
        assert contents("data") == contents("whole/data")


def test_a_join_that_was_killed_is_no_beginning_of_one_machines_call(corpus):
    """Its position is one in the parts and not in the source."""
    write("whole/data")
    killed_while_joining(5)
    assert "already holds shards" in error_of(write, "data")
    write("data", part="1/2")
    assert contents("data") == contents("whole/data")


def test_parts_through_processes_that_are_killed(workshop, whole):
    folder, parts = workshop / "parts", workshop / "parts" / "data"
    run = start(folder, part="2/2")
    wait_for(run, shards(60), parts / "part-2-of-2")
    run.kill()
    run.communicate()
    assert "the part that is finished last" in finish(folder, part="2/2")
    run = start(folder, part="1/2")
    wait_for(run, shards(60), parts)  # of the joining
    run.kill()
    run.communicate()
    before = whole_shards(parts)
    said = finish(folder, part="1/2")
    assert "train on them" in said and contents(parts) == whole
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in before} == before
    mtimes = {file: file.stat().st_mtime_ns for file in parts.iterdir()}
    assert finish(folder, part="2/2") == said  # all is finished
    assert {file: file.stat().st_mtime_ns for file in parts.iterdir()} == mtimes


def test_a_part_done_twice(corpus):
    write("whole/data")
    first = write("data", part="1/2")
    before = {file: file.stat().st_mtime_ns for file in Path("data/part-1-of-2").iterdir()}
    assert write("data", part="1/2") == first
    assert {file: file.stat().st_mtime_ns for file in before} == before
    write("data", part="2/2")
    assert contents("data") == contents("whole/data")
    assert write("data", part="1/2") == write("data", part="2/2")
    assert contents("data") == contents("whole/data")


def test_parts_from_machines_that_share_no_disk(corpus):
    write("whole/data")
    for i in (1, 2, 3):
        write(f"machine-{i}/data", part=f"{i}/3")
        shutil.copytree(f"machine-{i}/data", "data", dirs_exist_ok=True)
    assert {path.name for path in Path("data").iterdir()} == {f"part-{i}-of-3" for i in (1, 2, 3)}
    write("data", part="2/3")
    assert contents("data") == contents("whole/data")


@pytest.mark.parametrize("change", [{"shard_size": 800}, {"val_tokens": 900}, {"source": "other"}])
def test_a_part_of_something_else_is_named(corpus, change):
    write("data", part="1/2")
    settings = {key: value for key, value in change.items() if key != "source"}
    if "source" in change:
        with open("src/00.jsonl", "a") as file:
            file.write("\n")
    if "val_tokens" in change:  # it is the whole's, which no part has
        write("whole/data", **settings)
        write("data", part="2/2", **settings)
        assert contents("data") == contents("whole/data")
        return
    error = error_of(write, "data", part="2/2", **settings)
    assert "part-1-of-2" in error and {"manifest.json"} & {*contents("data/part-1-of-2")}
    shutil.rmtree("data/part-1-of-2")
    write("data", part="1/2", **settings)
    write("whole/data", **settings)
    assert contents("data") == contents("whole/data")


def test_parts_that_leave_none_to_train_on_are_not_lost(corpus):
    """More --val_tokens than there are: found out before a part's shards are used up."""
    write("data", part="1/2", val_tokens=10**6)
    parts = contents("data/part-1-of-2")
    assert "lower --val_tokens" in error_of(write, "data", part="2/2", val_tokens=10**6)
    assert contents("data/part-1-of-2") == parts


def test_a_part_without_documents(corpus):
    """As the last file has none, so its part."""
    write("whole/data")
    for i in range(1, 6):
        write("data", part=f"{i}/5")
    assert contents("data") == contents("whole/data")

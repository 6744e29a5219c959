"""walk_history.py on small throw-away histories, and the form of this repository's own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Variables that a git hook sets would point the commits below at the repository under test.
ENV = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder, *arguments):
    # Neither a name nor a signing key nor hooks are to be expected from whoever runs the tests.
    settings = [
        "user.name=A",
        "user.email=a@b.c",
        "commit.gpgsign=false",
        "core.hooksPath=/dev/null",
    ]
    flags = [part for setting in settings for part in ("-c", setting)]
    command = ["git", "-C", str(folder), *flags, *arguments]
    return subprocess.run(command, env=ENV, check=True, capture_output=True, text=True).stdout


def message(number, run="echo fine", idea="an idea", see="See: a line that\n  goes on", needs=""):
    return f"step {number}: {idea}\n\nWhy.\n\nRun: {run}\n{see}\n{needs}"


def walk(folder, *arguments, **env):
    """Return (exit status, lines of output) of walk_history.py in a folder."""
    command = [sys.executable, "tests/walk_history.py", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=ENV | env, capture_output=True, text=True, timeout=30
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.fixture
def book(tmp_path):
    """Return a function that makes a repository out of commit messages."""

    def make(*messages):
        folder = tmp_path / "book"
        (folder / "tests").mkdir(parents=True)
        shutil.copy(ROOT / "tests" / "walk_history.py", folder / "tests")
        (folder / ".gitignore").write_text("input.txt\n__pycache__\nfifo\n")
        (folder / "page").write_text("committed\n")
        git(folder, "init", "--quiet")
        git(folder, "add", ".")
        for text in ("a plain commit", *messages, "another, with Run: in its subject"):
            git(folder, "commit", "--quiet", "--allow-empty", "-m", text)
        return folder

    yield make
    # Whatever a test did, the walk leaves neither a worktree nor a change behind.
    folder = tmp_path / "book"
    assert len(git(folder, "worktree", "list").splitlines()) == 1
    assert git(folder, "status", "--porcelain") in ("", " M page\n")


def test_a_range_passes_in_worktrees_of_its_own(book):
    python = "python -c 'import sys; print(sys.prefix)'"
    folder = book(
        message("00", "false"),
        message("01", "cat page input.txt; echo spoilt > page", needs="Needs: input.txt"),
        message("02", "cat page; read line || " + python),
        message("03", "false"),
    )
    (folder / "input.txt").write_text("First Citizen\n")
    (folder / "page").write_text("not committed\n")
    status, lines = walk(folder, "--from", "01", "--to", "02")
    assert status == 0
    assert [line.split()[:2] for line in lines[:-1]] == [["step", "01"], ["step", "02"]]
    assert lines[0].endswith("ok       First Citizen")
    # The interpreter in the Run line is ours, though the walk was not started from its folder.
    assert lines[1].endswith(sys.prefix)
    assert lines[2] == "2 steps: 2 passed, 0 failed, 0 skipped"
    assert (folder / "page").read_text() == "not committed\n"


def test_a_failure_shows_the_end_of_its_output(book):
    run = "seq 30; echo oops >&2; exit 3"
    status, lines = walk(book(message("00", run), message("01", "echo a\n  folded line")))
    assert status == 1
    assert "exit 3" in lines[0] and lines[0].endswith("oops")
    assert lines[1:16] == [f"    {number}" for number in range(17, 31)] + ["    oops"]
    assert lines[-1] == "2 steps: 1 passed, 1 failed, 0 skipped"


def test_the_limit_ends_children_too(book):
    # The child keeps a pipe open as long as it lives, and is deaf to a polite signal.
    child = "(trap '' TERM; echo alive; exec sleep 60)"
    folder = book(message("00"))
    os.mkfifo(folder / "fifo")
    run = f"{child} > {folder}/fifo & trap 'echo ended; exit' TERM; echo waiting; sleep 60 & wait"
    git(folder, "commit", "--quiet", "--allow-empty", "-m", message("01", run))
    pipe = os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    start = time.monotonic()
    status, lines = walk(folder, "--timeout", "1")
    assert time.monotonic() - start < 5
    assert status == 1
    assert "timeout" in lines[1] and lines[1].endswith("waiting")
    assert os.read(pipe, 100) == b"alive\n"
    # Nothing, at once: nobody has the other end open. A survivor would raise BlockingIOError.
    assert os.read(pipe, 100) == b""
    os.close(pipe)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_cleans_up(book, number):
    folder = book(message("00"), message("01", "sleep 60"))
    command = [sys.executable, "tests/walk_history.py"]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=ENV,
        stdout=subprocess.PIPE,
        # Where tests run in the background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline().startswith(b"step 00")
        for _ in range(100):
            if len(git(folder, "worktree", "list").splitlines()) == 2:
                break
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=5) == 1
    # The fixture looks for what is left.


FAULTS = [
    ("its number should be 01", message("02")),
    ("its number should be 01", message("1")),
    ("a See: trailer", message("01", see="Seen: nothing")),
    ("one Run: trailer", message("01", run="")),
    ("one Run: trailer", message("01", needs="Run: false")),
    ("longer than 60", message("01", idea="x" * 52)),
    ("its Needs: may name", message("01", needs="Needs: luck")),
]


@pytest.mark.parametrize(("fault", "second"), FAULTS, ids=[fault for fault, _ in FAULTS])
def test_faults_of_form(book, fault, second):
    status, lines = walk(book(message("00", idea="x" * 51), second), "--list")
    assert status == 1
    assert fault in lines[0]
    assert len(lines) == 3  # one fault, then the two steps


def test_unmet_needs_are_skipped_and_said(book):
    both = message("01", needs="Needs: input.txt, gpt2-vocabulary")
    folder = book(message("00", "echo $TIKTOKEN_CACHE_DIR"), both)
    # An empty cache behind a proxy that nobody runs: no vocabulary, and no waiting for it.
    offline = {"TIKTOKEN_CACHE_DIR": "cache", "HTTPS_PROXY": "http://127.0.0.1:9"}
    status, lines = walk(folder, **offline)
    assert status == 0
    assert lines[0].endswith(str(folder / "cache"))
    assert "step 01  skipped" in lines[1]
    assert "karpathy" in lines[1] and "connect once" in lines[1]
    assert lines[-1] == "2 steps: 1 passed, 0 failed, 1 skipped"
    status, lines = walk(folder, "--from", "1", **offline)
    assert status == 1 and "nothing could be run" in lines[-1]


def test_sample_keeps_the_last_and_repeats(book):
    folder = book(*(message(f"{number:02d}") for number in range(4)))
    draws = [[line[:7] for line in walk(folder, "--sample", "2")[1]] for _ in range(2)]
    assert draws[0] == draws[1]
    assert draws[0][0] < draws[0][1] == "step 03" and draws[0][2] == "2 steps"


def test_wrong_requests_end_with_one_line(book, tmp_path):
    folder = book(message("00"))
    status, lines = walk(folder, "--from", "7")
    assert (status, len(lines)) == (1, 1) and "no step in this range" in lines[0]
    assert walk(folder, "--sample", "0")[0] == 2
    git(tmp_path, "clone", "--quiet", "--depth", "1", folder.as_uri(), "shallow")
    status, lines = walk(tmp_path / "shallow")
    assert (status, len(lines)) == (1, 1) and "--unshallow" in lines[0]
    git(folder, "checkout", "--quiet", "HEAD~2")
    status, lines = walk(folder)
    assert (status, len(lines)) == (1, 1) and "no commit on HEAD" in lines[0]


def test_the_form_of_this_history():
    try:
        shallow = git(ROOT, "rev-parse", "--is-shallow-repository").strip() == "true"
        subjects = git(ROOT, "log", "--format=%s").splitlines()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"not a checkout with a history: {error.stderr.strip()}")
    if shallow or not any(subject.startswith("step ") for subject in subjects):
        pytest.skip("this checkout has no whole history of steps")
    status, lines = walk(ROOT, "--list")
    assert status == 0, "\n".join(lines)
    assert lines[0].startswith("00  ")

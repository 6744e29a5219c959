"""walk_history.py on small temporary repositories, and the lessons of this repository."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# a git hook sets variables that would direct the commands below to this repository
ENV = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
SETTINGS = "-c user.name=A -c user.email=a@b.c -c commit.gpgsign=false -c core.hooksPath=/dev/null"
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *arguments) -> str:
    command = ["git", "-C", folder, *SETTINGS.split(), *arguments]
    return subprocess.run(command, env=ENV, check=True, capture_output=True, text=True).stdout


def commit(folder: Path, *messages: str):
    """Commits the messages to the repository, which is made first if it does not exist."""
    if not (folder / ".git").exists():
        (folder / "tests").mkdir()
        shutil.copy(ROOT / "tests" / "walk_history.py", folder / "tests")
        git(folder, "init", "--initial-branch", "main")
        git(folder, "add", ".")
    for text in messages:
        git(folder, "commit", "--allow-empty", "-m", text)


def message(name: str, run: str = "echo fine", idea: str = "an idea", **trailers: str) -> str:
    chapter = {"Lecture": "1:02:03 a chapter"} if name.startswith("lecture") else {}
    trailers = chapter | {"Run": run, "See": "a line that\n  continues"} | trailers
    return "\n".join([f"{name}: {idea}\n", "Why.\n", *(f"{k}: {v}" for k, v in trailers.items())])


def walk(folder: Path, *arguments: str, **env: str) -> tuple[int, list[str]]:
    """Returns the exit status and the lines that walk_history.py prints."""
    command = [sys.executable, "tests/walk_history.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=ENV | env, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_a_range_runs_in_worktrees(tmp_path):
    commit(
        tmp_path,
        "a commit that is not a lesson",
        message("lecture 00", "false"),
        message("lecture 01", "cat input.txt", Needs="input.txt"),
        message("after 01", "python -c\n  'import sys; print(sys.prefix)'"),
        message("after 02", "seq 30; echo the error >&2; exit 3"),
        message("after 03", "false"),
    )
    (tmp_path / "input.txt").write_text("First Citizen\n")
    status, lines = walk(tmp_path, "--from", "01", "--to", "after 02", COLUMNS="200")
    assert status == 1
    assert re.fullmatch(r"lecture 01 +[\d.]+ s  exit 0   First Citizen", lines[0])
    assert re.fullmatch(rf"after 01 +[\d.]+ s  exit 0   {re.escape(sys.prefix)}", lines[1])
    assert re.fullmatch(r"after 02 +[\d.]+ s  exit 3   the error", lines[2])
    assert lines[3:18] == [f"    {number}" for number in range(17, 31)] + ["    the error"]
    assert lines[18:] == ["3 lessons: 2 passed, 1 failed, 0 skipped"]


def wait_for(pipe: int, text: bytes):
    """Reads until the text arrives, or b"", which means that no process can write any more."""
    for _ in range(1200):
        with suppress(BlockingIOError):  # nothing was written, but a process can
            if os.read(pipe, 100) == text:
                return
        time.sleep(0.05)
    raise AssertionError(f"{text} did not arrive")


@pytest.mark.parametrize("end", [None, signal.SIGINT, signal.SIGTERM])
def test_the_time_limit_and_interruptions_end_children(tmp_path, end):
    os.mkfifo(tmp_path / "fifo")
    pipe = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    # one child ignores SIGTERM; another, where setsid is installed, has a process group of its own
    children = f"(trap '' TERM; echo started; setsid sleep 1000 & sleep 1000) > {tmp_path}/fifo"
    commit(tmp_path, message("lecture 00", f"{children} & wait"))
    command = [sys.executable, "tests/walk_history.py", "--timeout", "1000" if end else "3"]
    walker = subprocess.Popen(command, cwd=tmp_path, env=ENV, stdout=-1, stderr=-1, text=True)
    if end:
        wait_for(pipe, b"started\n")
        walker.send_signal(end)
    output = "".join(walker.communicate())
    assert walker.returncode == 1
    assert ("interrupted" if end else "timeout") in output
    wait_for(pipe, b"")
    assert len(git(tmp_path, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "second"),
    [
        ("should be lecture 01 or after 01", message("lecture 02")),
        ("should be lecture 01 or after 01", message("lecture 1")),
        ("should have a See: trailer", message("after 01", See="")),
        ("should have one Run: trailer", message("after 01", "")),
        ("should have one Run: trailer", message("after 01", "one\nRun: two")),
        ("more than 60", message("lecture 01", idea="x" * 49)),
        ("should have no Needs: but", message("after 01", Needs="input.txt and luck")),
        ("should have Lecture:", message("lecture 01", Lecture="0:33:31 one; 62:03 two")),
        ("should have Lecture:", message("after 01", Lecture="0:33:31 one")),
    ],
)
def test_errors_of_form(tmp_path, error, second):
    commit(tmp_path, message("lecture 00", idea="x" * 48), second)
    status, lines = walk(tmp_path, "--list")
    assert status == 1 and len(lines) == 3 and error in lines[2]  # two lessons and one error


def test_needs_and_samples(tmp_path):
    both = message("after 01", Needs="input.txt, GPT-2's vocabulary")
    commit(tmp_path, *(message(f"lecture {number:02d}") for number in range(9)), both)
    # an empty cache, and a proxy that does not exist
    offline = {"TIKTOKEN_CACHE_DIR": "cache", "HTTPS_PROXY": "http://127.0.0.1:9"}
    status, lines = walk(tmp_path, "--from", "lecture 08", **offline)
    assert status == 0 and lines[1] == "after 01    skipped, needs input.txt, GPT-2's vocabulary"
    assert lines[2] == "2 lessons: 1 passed, 0 failed, 1 skipped"
    assert "karpathy" in lines[3] and "TIKTOKEN_CACHE_DIR" in lines[4]
    assert walk(tmp_path, "--from", "after 01", **offline)[0] == 1  # nothing could run
    error = "no lessons in this range; the history up to HEAD has 10"
    assert walk(tmp_path, "--from", "after 02") == (1, [error])
    # a sample repeats, contains the last lesson that can run, and says why the last one cannot
    first, second = ([s[:10] for s in walk(tmp_path, "--sample", "2", **offline)[1]] for _ in "12")
    assert first == second and first[0] < first[1] == "lecture 08" and first[2] == "after 01  "


def test_the_table_and_the_first_edition(tmp_path):
    two = "0:02:00 two; 1:00:00 three"
    chapters = enumerate(["0:00:09 zero", "0:01:40 SECTION 1: one", two, two])
    lectures = [message(f"lecture {i:02d}", idea="a | b", Lecture=name) for i, name in chapters]
    commit(tmp_path, *lectures, *(message(f"after {i:02d}", idea="c") for i in range(1, 17)))
    git(tmp_path, "checkout", "--orphan", "old")
    commit(tmp_path, message("after 17"), "step 03: an old lesson")
    git(tmp_path, "checkout", "main")
    git(tmp_path, "merge", "-s", "ours", "--allow-unrelated-histories", "old", "-m", "The book: 2")
    commit(tmp_path, "a later commit")  # neither this commit nor those of "old" are lessons
    url = "https://www.youtube.com/watch?v=l8pRSuU81PU&t="
    times = f"[0:02:00]({url}120s) [1:00:00]({url}3600s)"
    status, lines = walk(tmp_path, "--table")
    assert status == 0 and lines[2:] == [
        rf"| lecture | [0:00:09]({url}9s) 00 a \| b |",
        rf"| lecture | [0:01:40]({url}100s) 01 a \| b<br>{times} 02 a \| b · 03 a \| b |",
        "| after | " + " · ".join(f"{number:02d} c" for number in range(1, 16)) + " |",
        "| after | 16 c |",
    ]
    # the commands in the README
    assert git(tmp_path, "log", "--format=%s", "main^{/^The book}^2").startswith("step 03: an old")
    git(tmp_path, "checkout", ":/^lecture 01")
    assert git(tmp_path, "log", "-1", "--format=%s") == "lecture 01: a | b\n"
    git(tmp_path, "clone", "--depth", "1", tmp_path.as_uri(), "shallow")
    assert "--unshallow" in walk(tmp_path / "shallow")[1][0]


def test_this_repository():
    status, lines = walk(ROOT, "--table")
    if "|---|---|" not in lines:
        pytest.skip(lines[0])  # for example a shallow clone
    assert status == 0, "\n".join(lines)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.split("--table -->\n")[1].split("\n<!--")[0].splitlines() == lines

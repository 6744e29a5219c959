"""Runs the lessons in the git history, each in a temporary worktree, and checks their form.

    python tests/walk_history.py                                      # all lessons
    python tests/walk_history.py --from "lecture 07" --to "after 02"  # 07 means lecture 07
    python tests/walk_history.py --sample 5     # five lessons, selected by HEAD's hash
    python tests/walk_history.py --list         # prints the lessons; --table: as in the README

A lesson is a commit of `git log --first-parent` whose subject is `lecture NN: idea` or `after NN:
idea`. `Run:` in its message is the command. A lesson is skipped if something that it `Needs:` is
missing. The exit status is 1 if a lesson fails, if its form is wrong, or if no lesson could run.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
# what a lesson may need, and how to provide it
NEEDS = {
    "input.txt": f"save {TEXT} in {ROOT}",
    "GPT-2's vocabulary": "connect to the network, or set TIKTOKEN_CACHE_DIR to a folder with it",
}
VIDEO = "https://www.youtube.com/watch?v=l8pRSuU81PU"
# part is "lecture" or "after"; number is a string, since "7" instead of "07" is an error of form
Lesson = namedtuple("Lesson", "commit subject name part number idea lecture run see needs")
# a git hook sets variables that would direct the commands below to another index
ENV = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
# `python`, `torchrun` and `pytest` are those of the environment of this script
ENV["PATH"] = os.path.dirname(sys.executable) + os.pathsep + ENV.get("PATH", os.defpath)
ENV["PYTHONUNBUFFERED"] = "1"  # the output of a killed process is complete
if ENV.get("TIKTOKEN_CACHE_DIR"):  # a relative path would name another folder in a worktree
    ENV["TIKTOKEN_CACHE_DIR"] = os.path.abspath(ENV["TIKTOKEN_CACHE_DIR"])
PROCESS = {"env": ENV, "stdin": subprocess.DEVNULL, "start_new_session": True}  # gets no Ctrl-C


def git(*arguments, check: bool = True) -> str:
    """Returns the output of a git command. Exits with git's message if it fails."""
    command = ["git", "-C", ROOT, *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", **PROCESS)
    if check and done.returncode != 0:
        sys.exit(done.stderr.strip())
    return done.stdout


def read_lessons() -> list[Lesson]:
    """Returns the lessons up to HEAD, oldest first."""
    # unfold: git joins the lines of a trailer that continues on indented lines
    fields = [f"%(trailers:key={k},valueonly,unfold)" for k in ("Lecture", "Run", "See", "Needs")]
    layout = "--format=format:" + "%x1f".join(["%H", "%s", *fields])
    lessons = []
    for record in git("log", "-z", "--first-parent", "--reverse", layout).split("\0"):
        commit, subject, lecture, run, see, needs = map(str.strip, record.split("\x1f"))
        if found := re.fullmatch(r"((lecture|after) (\d+)): (.+)", subject):
            words = needs.split(", ") if needs else []
            lessons.append(Lesson(commit, subject, *found.groups(), lecture, run, see, words))
    return lessons


def position(name: str) -> tuple[bool, int]:
    """Returns a lesson's place in the order, from its name."""
    if found := re.fullmatch(r"(?:(lecture|after) )?(\d+)", name):
        return found[1] == "after", int(found[2])
    raise argparse.ArgumentTypeError('should be like 07, "lecture 07" or "after 02"')


def form_errors(lessons: list[Lesson]) -> list[str]:
    errors, expected = [], ["lecture 00"]
    for lesson in lessons:
        chapters = [re.match(r"\d:[0-5]\d:[0-5]\d \S", text) for text in lesson.lecture.split("; ")]
        timed = all(chapters) if lesson.part == "lecture" else not lesson.lecture
        checks = {
            f"should be {' or '.join(expected)}": lesson.name in expected,
            "has a subject of more than 60 characters": len(lesson.subject) <= 60,
            "should have one Run: trailer": len(lesson.run.splitlines()) == 1,
            "should have a See: trailer": lesson.see != "",
            "should have Lecture: h:mm:ss NAME if and only if it is a lecture lesson": timed,
            f"should have no Needs: but {', '.join(NEEDS)}": set(lesson.needs) <= set(NEEDS),
        }
        errors += [f"{lesson.name} ({lesson.commit[:8]}) {e}" for e, ok in checks.items() if not ok]
        expected = [f"{lesson.part} {int(lesson.number) + 1:02d}"]
        expected += ["after 01"] if lesson.part == "lecture" else []
    return errors


def table(lessons: list[Lesson]) -> str:
    """Returns a Markdown table: a row for each SECTION of the video, a line for each chapter."""
    rows, chapter = [], None
    for lesson in lessons:
        text = re.sub(r"([*<|])", r"\\\1", f"{lesson.number} {lesson.idea}")
        # the lessons after the lecture are in rows of 15
        if lesson.lecture == chapter and (chapter or int(lesson.number) % 15 != 1):
            rows[-1] += f" · {text}"
            continue
        chapter = lesson.lecture
        for time_ in reversed(re.findall(r"\d:\d\d:\d\d", chapter)):
            h, m, s = map(int, time_.split(":"))
            text = f"[{time_}]({VIDEO}&t={3600 * h + 60 * m + s}s) {text}"
        if rows and chapter and "SECTION" not in chapter:
            rows[-1] += f"<br>{text}"
        else:
            rows.append(f"| {lesson.part} | {text}")
    return "\n".join(["| part | time and lessons |", "|---|---|", *(f"{row} |" for row in rows)])


def is_here(need: str) -> bool:
    if need == "input.txt":
        return (ROOT / need).is_file()
    probe = [sys.executable, "-c", "import tiktoken; tiktoken.get_encoding('gpt2')"]
    with suppress(subprocess.TimeoutExpired):  # a network that does not answer
        return subprocess.run(probe, capture_output=True, timeout=30, **PROCESS).returncode == 0
    return False


def end_processes(leader: subprocess.Popen, tree: Path):
    """Ends the leader's process group, and on Linux all other processes in the folder."""
    with suppress(OSError):  # raised when the group is empty
        os.killpg(leader.pid, signal.SIGTERM)
        for _ in range(100):  # two seconds until SIGKILL
            time.sleep(0.02)
            leader.poll()  # the leader stays in the group until its status is read
            os.killpg(leader.pid, 0)
        os.killpg(leader.pid, signal.SIGKILL)
    for link in Path("/proc").glob("[0-9]*/cwd"):  # torchrun's workers have groups of their own
        with suppress(OSError):  # it has ended, or belongs to another user
            if Path(os.readlink(link)).is_relative_to(tree):
                os.kill(int(link.parent.name), signal.SIGKILL)


def run_lesson(lesson: Lesson, timeout: float, stop: list) -> tuple[float, str, list[str]]:
    """Runs a lesson in a worktree. Returns seconds, exit status and lines of output."""
    folder = Path(tempfile.mkdtemp(prefix="lesson-")).resolve()
    tree, output = folder / "tree", folder / "output.txt"
    try:
        git("worktree", "add", "--quiet", "--detach", tree, lesson.commit)
        if is_here("input.txt"):
            shutil.copy(ROOT / "input.txt", tree)
        start, command = time.monotonic(), ["bash", "-c", lesson.run]
        with output.open("wb") as file:  # a pipe would stay open for a process that is left over
            process = subprocess.Popen(command, cwd=tree, stdout=file, stderr=file, **PROCESS)
        while process.poll() is None and not stop and time.monotonic() < start + timeout:
            time.sleep(0.02)
        seconds, code = time.monotonic() - start, process.poll()
        lines = output.read_text("utf-8", "replace").splitlines()
        end_processes(process, tree)
    finally:
        git("worktree", "remove", "--force", "--force", tree, check=False)
        shutil.rmtree(folder, ignore_errors=True)
    status = "timeout" if code is None else f"exit {code}"
    return seconds, status, [line for line in lines if line.strip()]


def walk(lessons: list[Lesson], sample: int, timeout: float) -> bool:
    """Runs lessons, and prints a line for each. Returns whether some ran and all succeeded."""
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *arguments: stop.append(arguments))
    missing = [n for n in NEEDS if any(n in s.needs for s in lessons) and not is_here(n)]
    able = [lesson for lesson in lessons if not set(missing) & set(lesson.needs)]
    # HEAD's hash is the seed: each commit tests other lessons, and a failure can be repeated
    rng, others = random.Random(git("rev-parse", "HEAD")), able[:-1]
    chosen = rng.sample(others, min(len(others), (sample or len(lessons)) - 1)) + able[-1:]
    count = Counter(passed=0, failed=0, skipped=len(lessons) - len(able))
    for lesson in lessons:
        if lesson in chosen:
            seconds, status, lines = run_lesson(lesson, timeout, stop)
            if stop:
                sys.exit("interrupted; the worktree is removed")
            line = f"{lesson.name:10}  {seconds:5.1f} s  {status:7}  {''.join(lines[-1:]).strip()}"
            print(line[: shutil.get_terminal_size((100, 24)).columns].rstrip(), flush=True)
            count["passed" if status == "exit 0" else "failed"] += 1
            if status != "exit 0":
                print("    " + "\n    ".join(lines[-15:]), flush=True)
        elif lesson not in able and (not sample or lesson == lessons[-1]):
            print(f"{lesson.name:10}  skipped, needs {', '.join(lesson.needs)}", flush=True)
    print(f"{len(lessons)} lessons: " + ", ".join(f"{n} {what}" for what, n in count.items()))
    for need in missing:
        print(f"to run the skipped lessons, {NEEDS[need]}")
    return count["passed"] > 0 and count["failed"] == 0


def main() -> str | int:
    """Returns the exit status, or a message, which means status 1."""
    parser = argparse.ArgumentParser(description="Runs the lessons in the git history.")
    parser.add_argument("--from", dest="first", type=position, default="00", metavar="LESSON")
    parser.add_argument("--to", dest="last", type=position, default="after 99", metavar="LESSON")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="run N lessons only")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each lesson")
    parser.add_argument("--list", action="store_true", help="print the lessons")
    parser.add_argument("--table", action="store_true", help="print the README's table of lessons")
    args = parser.parse_args()
    if args.timeout <= 0 or args.sample < 0:
        parser.error("--sample and --timeout should be positive")
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode
    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        return "a shallow clone lacks lessons: run `git fetch --unshallow`"
    lessons = read_lessons()
    selected = [s for s in lessons if args.first <= position(s.name) <= args.last]
    if not selected:
        return f"no lessons in this range; the history up to HEAD has {len(lessons)}"
    if args.list or args.table:
        print(table(selected) if args.table else "\n".join(s.subject for s in selected))
    ok = args.list or args.table or walk(selected, args.sample, args.timeout)
    errors = form_errors(lessons)
    sys.stderr.writelines(f"{error}\n" for error in errors)
    return not ok or len(errors) > 0


if __name__ == "__main__":
    sys.exit(main())

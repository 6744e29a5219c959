"""Check the book: check out every `step NN: idea` commit, run its `Run:` line, say how it went.

    python tests/walk_history.py                      # every step
    python tests/walk_history.py --from 07 --to 12    # a range
    python tests/walk_history.py --sample 5           # the last step and four drawn by HEAD's hash
    python tests/walk_history.py --list               # the table of steps; runs nothing

The form of the whole history is checked each time: numbers without holes, subjects of at most 60
characters, the trailers `Run:` and `See:`. A step that needs more than the installed packages says
so in a third trailer, `Needs: input.txt, gpt2-vocabulary`; where that is missing it is skipped, and
counted as skipped. Exit status 1: a step failed, the form is wrong, or nothing could be run.
"""

import argparse
import contextlib
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TEXT = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
# What a step may need, and how to come by it.
NEEDS = {
    "input.txt": f"put {TEXT} into {ROOT}",
    "gpt2-vocabulary": "connect once, or set TIKTOKEN_CACHE_DIR to a folder that has it",
}
GRACE = 2.0  # seconds between asking a step's processes to end and killing them


class Step(NamedTuple):
    """One commit of the book; the number as written, since "7" for "07" is a fault of form."""

    commit: str
    number: str
    subject: str
    run: str
    see: str
    needs: list[str]


def environment():
    """Return the variables under which git and the steps run."""
    # A git hook sets these three, and a checkout elsewhere would then write into this index.
    hook = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    env = {name: value for name, value in os.environ.items() if name not in hook}
    # `python` and `torchrun` in a Run line mean those of the environment that runs this file.
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", os.defpath)])
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    env["PYTHONUNBUFFERED"] = "1"  # else a step killed at the limit takes its last lines with it
    if env.get("TIKTOKEN_CACHE_DIR"):  # a relative path would mean another folder in the worktree
        env["TIKTOKEN_CACHE_DIR"] = os.path.abspath(env["TIKTOKEN_CACHE_DIR"])
    return env


def git(*arguments):
    """Return what a git command prints; where git refuses, leave with its own words."""
    command = ["git", "-C", ROOT, *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment())
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    return done.stdout


def read_steps():
    """Return the steps on HEAD, oldest first, their trailers as git itself reads them."""
    # `unfold` joins a trailer that goes on over indented lines.
    trailers = [f"%(trailers:key={key},valueonly,unfold)" for key in ("Run", "See", "Needs")]
    layout = "--format=format:" + "%x1f".join(["%H", "%s", *trailers])
    steps = []
    # Topological, because a rebase may leave dates that disagree with the order of the commits.
    for record in git("log", "-z", "--topo-order", "--reverse", layout).split("\0"):
        commit, subject, run, see, needs = record.split("\x1f")
        if found := re.match(r"step (\d+): ", subject):
            words = [word.strip() for word in re.split("[,\n]", needs) if word.strip()]
            steps.append(Step(commit, found[1], subject, run.strip(), see.strip(), words))
    return steps


def form_faults(steps):
    """Return one line for each way in which the history departs from the form of a step."""
    faults, expected = [], 0
    for step in steps:
        checks = {
            f"its number should be {expected:02d}": step.number == f"{expected:02d}",
            "its subject is longer than 60 characters": len(step.subject) <= 60,
            # Git returns a line for each trailer, so two lines are two commands.
            "it should have one Run: trailer": len(step.run.splitlines()) == 1,
            "it should have a See: trailer": step.see != "",
            f"its Needs: may name {', '.join(NEEDS)}": set(step.needs) <= set(NEEDS),
        }
        where = f"form: step {step.number} ({step.commit[:8]}):"
        faults += [f"{where} {fault}" for fault, fine in checks.items() if not fine]
        expected = int(step.number) + 1  # from the number as it is: one hole is one fault
    return faults


@functools.cache  # asking for the vocabulary may take seconds, and the answer holds for all steps
def is_here(need):
    """Return whether this machine has what a word of `Needs:` names."""
    if need != "gpt2-vocabulary":
        return (ROOT / need).is_file()
    probe = [sys.executable, "-c", "import tiktoken; tiktoken.get_encoding('gpt2')"]
    try:
        done = subprocess.run(probe, capture_output=True, env=environment(), timeout=20)
    except subprocess.TimeoutExpired:  # a network that swallows packets instead of refusing them
        return False
    return done.returncode == 0


@contextlib.contextmanager
def worktree(commit):
    """Yield a folder with the commit checked out, and leave no trace of it, whatever happens."""
    try:
        with tempfile.TemporaryDirectory(prefix="walk-", ignore_cleanup_errors=True) as folder:
            tree = Path(folder) / "tree"
            git("worktree", "add", "--quiet", "--detach", tree, commit)
            if is_here("input.txt"):  # git ignores it, so the checkout lacks it
                shutil.copy(ROOT / "input.txt", tree)
            yield tree
    finally:
        git("worktree", "prune")  # the folder is gone: now git forgets it


def end_group(process):
    """End the process and all that it started."""
    with contextlib.suppress(OSError):  # raised as soon as nobody is left in the group
        # Ask before killing: torchrun's workers live in sessions of their own, out of our reach.
        # It ends them itself when it is asked to end, and orphans them when it is killed.
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            time.sleep(0.02)
            process.poll()  # an ended leader counts as alive until its status is read
            os.killpg(process.pid, 0)
        os.killpg(process.pid, signal.SIGKILL)


def run_step(step, timeout):
    """Run the step's command in a checkout of its own; return (seconds, status, output lines)."""
    # The output goes to a file, since reading a pipe waits for whatever outlives the command.
    with worktree(step.commit) as tree, tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            # An empty command succeeds in bash; a step that lacks its Run: line must not.
            ["bash", "-c", step.run or "echo no Run: line; exit 1"],
            cwd=tree,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, to be ended as one
        )
        try:
            code = process.wait(timeout)
            status = f"exit {code}" if code else "ok"
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            seconds = time.perf_counter() - start
            size = os.fstat(output.fileno()).st_size  # what follows is the complaint of the killed
            end_group(process)  # also what an ended command left running
        output.seek(0)
        lines = output.read(size).decode("utf-8", "replace").splitlines()
    return seconds, status, [line for line in lines if line.strip()]


def draw(steps, size):
    """Return the last step and `size - 1` others, in the history's order."""
    # HEAD's hash is the seed: CI's successive commits come by every step, and a failure repeats
    # for whoever checks out the same commit.
    others = range(len(steps) - 1)
    drawn = random.Random(git("rev-parse", "HEAD")).sample(others, min(size - 1, len(others)))
    return [steps[i] for i in sorted(drawn)] + steps[-1:]


def walk(steps, sample, timeout):
    """Run the steps, a line each as it ends; return how many passed, failed and were skipped."""
    able = [step for step in steps if all(is_here(need) for need in step.needs)]
    chosen = draw(able, sample) if sample else able
    count = {"passed": 0, "failed": 0, "skipped": 0}
    for step in steps:
        if step not in able:
            lacking = [need for need in step.needs if not is_here(need)]
            how = "; ".join(f"{need} ({NEEDS.get(need, 'an unknown word')})" for need in lacking)
            print(f"step {step.number}  skipped: needs {how}", flush=True)
            count["skipped"] += 1
        elif step in chosen:
            seconds, status, lines = run_step(step, timeout)
            last = lines[-1].strip()[:100] if lines else ""
            print(f"step {step.number}  {seconds:5.1f} s  {status:7}  {last}".rstrip())
            count["passed" if status == "ok" else "failed"] += 1
            if status != "ok" and lines:
                print("    " + "\n    ".join(lines[-15:]))
            sys.stdout.flush()  # a log that is not a terminal should grow with the walk, too
    return count


def main():
    """Check the form, then walk; return the exit status, or a line that says what is wrong."""
    parser = argparse.ArgumentParser(description="Check the history: its form, its Run: lines.")
    parser.add_argument("--from", dest="first", metavar="NN", type=int, default=0)
    parser.add_argument("--to", dest="last", metavar="NN", type=int, default=sys.maxsize)
    parser.add_argument("--sample", metavar="N", type=int, help="run N of the steps only")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=90, help="for a step")
    parser.add_argument("--list", action="store_true", help="print the steps, run nothing")
    options = parser.parse_args()
    if options.timeout <= 0 or (options.sample is not None and options.sample < 1):
        parser.error("--sample and --timeout should be above zero")
    # CI cancels a job by SIGTERM: clean up then as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        return "a shallow clone lacks steps: run `git fetch --unshallow` (in CI: fetch-depth: 0)"
    steps = read_steps()
    if not steps:
        return f"{ROOT}: no commit on HEAD has a subject like `step 07: idea`"
    selected = [step for step in steps if options.first <= int(step.number) <= options.last]
    if not selected:
        return f"no step in this range: the history has {steps[0].number} to {steps[-1].number}"

    faults = form_faults(steps)
    print("".join(f"{fault}\n" for fault in faults), end="", flush=True)
    if options.list:
        for step in selected:
            print(step.number, step.subject.partition(": ")[2], sep="  ")
        return 1 if faults else 0

    count = walk(selected, options.sample, options.timeout)
    total = sum(count.values())
    summary = f"{total} steps: " + ", ".join(f"{number} {what}" for what, number in count.items())
    if faults:
        summary += f", {len(faults)} faults of form"
    # A walk without a step would otherwise look like a success.
    if count["skipped"] == total:
        summary += "; nothing could be run here, see above what is needed"
    print(summary)
    return 1 if faults or count["failed"] or count["skipped"] == total else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the worktree is removed")

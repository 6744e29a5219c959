"""Runs that are stopped, killed and started again, as real processes: in the end they are the runs
that nothing happened to, bit for bit."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fineweb
import train_gpt2
from runs import checkpoint_paths, load_checkpoint, read_log, step_of

SCRIPT = Path(train_gpt2.__file__).resolve()
FLAGS = {
    "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "total_batch_size": 1024,
    "micro_batch_size": 16, "max_steps": 60, "dropout": 0.1, "data_dir": "data", "device": "cpu",
    "dtype": "float32", "val_interval": 20, "val_tokens": 1000, "sample_interval": 0,
    "checkpoint_interval": 10, "keep_checkpoints": 2, "optimizer": "adamw", "cooldown": 0,
    "lr": 4e-3, "warmup_steps": 50,
}  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with shards in data/, and in whole/ a run of FLAGS that nothing happened to."""
    folder = tmp_path_factory.mktemp("workshop")
    rng = random.Random(0)
    documents = ["".join(rng.choices("abcdef \n", k=200)) for _ in range(600)]
    fineweb.write_shards(
        documents, folder / "data", "bytes", shard_size=40_000, val_tokens=5000, workers=1
    )
    finish(folder, "whole")
    return folder


@pytest.fixture(scope="module")
def whole_two(workshop):
    """The same with two ranks, to whom dropout gives other losses."""
    finish(workshop, "whole_two", ranks=2)
    return workshop / "whole_two"


def start(folder, ranks=1, torchrun=(), **settings) -> subprocess.Popen:
    """The script as a user runs it, in the background; both outputs come as one."""
    line = [sys.executable, str(SCRIPT)]
    if ranks > 1:
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", *torchrun,
                f"--nproc_per_node={ranks}", str(SCRIPT)]  # fmt: skip
    flags = [a for k, v in (FLAGS | settings).items() for a in (f"--{k}", str(v))]
    return subprocess.Popen(
        [*line, "shakespeare_char", *flags], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def read_until(process, pattern: str, seconds: float = 60) -> str:
    """What the process puts out up to the line with the pattern, which must come."""
    lines, end = [], time.monotonic() + seconds
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
        assert time.monotonic() < end, lines
    raise AssertionError(f"it ended without {pattern}: {''.join(lines)}")


def finish(folder, out: str, ranks=1, **settings):
    """Go on with a run until it ends."""
    run = start(folder, ranks, out_dir=out, resume="auto", **settings)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 0, said


def final_weights(folder) -> dict[str, torch.Tensor]:
    path = checkpoint_paths(Path(folder))[-1]
    assert step_of(path) == FLAGS["max_steps"]
    return load_checkpoint(path)["model"]


def assert_same_run(folder, other):
    """The same final weights, and the same log, bit for bit."""
    a, b = final_weights(folder), final_weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (folder / "log.txt").read_text() == (other / "log.txt").read_text()


# ---- ranks that die ------------------------------------------------------------------------------


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")


def ranks_of(run) -> list[int]:
    """The process ids of the ranks that a torchrun has started, rank 0 first."""
    children = subprocess.check_output(["pgrep", "-P", str(run.pid)], text=True).split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    return sorted(
        (pid for pid, environ in environments.items() if b"LOCAL_RANK=" in environ),
        key=lambda pid: int(re.search(rb"\0LOCAL_RANK=(\d+)", environments[pid])[1]),
    )


@linux
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("out_dir", ["restarted", ""])
def test_torchrun_restarts_a_run_whose_rank_has_died(workshop, whole_two, rank, out_dir):
    before = {*workshop.glob("log/*")}
    out_dir = out_dir and f"{out_dir}-{rank}"
    where = {"out_dir": out_dir} if out_dir else {}
    run = start(workshop, ranks=2, torchrun=["--max-restarts=2"], **where)
    read_until(run, "step 23/")
    os.kill(ranks_of(run)[rank], signal.SIGKILL)
    said = run.communicate(timeout=90)[0]
    assert run.returncode == 0, said
    [folder] = {*workshop.glob("log/*")} - before if not out_dir else [workshop / out_dir]
    assert re.search(rf"{folder.name} from step (10|20) ", said), said  # no operator was needed
    assert_same_run(folder, whole_two)


@linux
@pytest.mark.parametrize("hanging", [0, 1])
def test_a_rank_that_waits_for_one_that_hangs_ends_and_names_itself_and_the_step(workshop, hanging):
    run = start(workshop, ranks=2, out_dir=f"hangs-{hanging}", max_steps=100_000, timeout=5)
    read_until(run, "step 13/")
    ranks = ranks_of(run)
    os.kill(ranks[hanging], signal.SIGSTOP)
    try:
        said = read_until(run, "another rank hangs", seconds=30)
    finally:
        os.kill(ranks[hanging], signal.SIGKILL)
        run.communicate(timeout=60)
    last = said.splitlines()[-1]
    steps = re.findall(r"^step (\d+)/100000 \| loss", said, flags=re.MULTILINE) or ["13"]
    named = re.match(rf"rank {1 - hanging}: step (\d+)/100000 has stood still for 5 s, at ", last)
    assert int(named[1]) in range(int(steps[-1]), int(steps[-1]) + 3), said
    assert run.returncode == 1


# ---- one owner -----------------------------------------------------------------------------------


def test_a_second_process_is_kept_out_of_the_folder_of_a_live_run(workshop):
    run = start(workshop, out_dir="mine", max_steps=100_000)
    read_until(run, "step 15/")  # with a checkpoint
    for flags in ({"out_dir": "mine", "resume": "auto"}, {"resume": "mine"}):
        other = start(workshop, max_steps=100_000, **flags)
        said = other.communicate(timeout=60)[0]
        assert f"mine belongs to a run that is alive, process {run.pid} on " in said
        assert other.returncode == 1 and len(said.splitlines()) == 1
    run.kill()
    run.communicate()
    next_owner = start(workshop, max_steps=100_000, resume="mine")
    read_until(next_owner, "mine from step [1-9]")
    next_owner.kill()
    next_owner.communicate()


def test_runs_that_start_at_once_get_a_folder_each(workshop):
    before = {*workshop.glob("log/*")}
    runs = [start(workshop, max_steps=3, seed=seed) for seed in range(3)]
    for run in runs:
        said = run.communicate(timeout=90)[0]
        assert run.returncode == 0, said
    folders = {*workshop.glob("log/*")} - before
    assert len(folders) == 3
    assert len({(folder / "log.txt").read_text() for folder in folders}) == 3


# ---- kill -9 -------------------------------------------------------------------------------------


def test_a_run_killed_at_twelve_moments_is_the_run_that_was_left_alone(workshop):
    folder, rng, torn = workshop / "killed", random.Random(0), 0

    def is_writing() -> bool:
        return any(re.fullmatch(r"step_\d+\.tmp", name) for name in os.listdir(folder))

    for moment in ["in a step", "at the start", "in a checkpoint"] * 4:
        run = start(workshop, out_dir="killed", resume="auto", checkpoint_interval=2)
        if moment == "at the start":  # of Python, of torch, of the run
            time.sleep(rng.uniform(0.1, 4))
        else:
            first = int(re.search(r"from step (\d+) ", read_until(run, "from step "))[1])
            assert first < 50  # the kills leave steps to kill
        if moment == "in a step":
            read_until(run, f"step {first + rng.randint(0, 4)}/")
            time.sleep(rng.uniform(0, 0.02))
        if moment == "in a checkpoint":
            while not is_writing():
                assert run.poll() is None
        run.kill()
        assert "damaged" not in run.communicate()[0]
        torn += is_writing()
    assert torn, "no kill met a checkpoint while it was written"
    finish(workshop, "killed", checkpoint_interval=2)
    assert_same_run(folder, workshop / "whole")
    assert not list(folder.glob("*.tmp"))


# ---- another number of ranks, another micro-batch ------------------------------------------------


@pytest.fixture(scope="module")
def without_dropout(workshop):
    """A run whose losses depend on nothing but the tokens."""
    finish(workshop, "without_dropout", dropout=0)
    return read_log(workshop / "without_dropout")


@pytest.mark.parametrize(
    "before, after",
    [({"ranks": 2}, {"ranks": 1}), ({"ranks": 1}, {"ranks": 2}), ({}, {"micro_batch_size": 4})],
)
def test_a_run_goes_on_with_other_ranks_or_micro_batches(workshop, without_dropout, before, after):
    out = "-".join(map(str, [*before.values(), "to", *after.values()]))
    run = start(workshop, out_dir=out, dropout=0, **before)
    read_until(run, "step 5/")
    run.terminate()
    run.communicate(timeout=60)
    first = step_of(checkpoint_paths(workshop / out)[-1])
    assert first <= 10  # fifty steps are left
    finish(workshop, out, dropout=0, **after)
    streams = read_log(workshop / out)
    for stream, (steps, losses) in without_dropout.items():
        assert streams[stream][0] == steps
        np.testing.assert_allclose(streams[stream][1], losses, atol=1e-4)


# ---- a full disk ---------------------------------------------------------------------------------


def test_a_run_on_a_disk_that_is_full_for_a_while_goes_on(workshop):
    small = workshop / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        run = start(workshop, out_dir="small/run", checkpoint_interval=3)
        read_until(run, "step 9/")
        with open(small / "filler", "wb") as filler:
            try:
                while True:
                    filler.write(bytes(10_000))
                    filler.flush()
            except OSError:
                pass
        said = read_until(run, "checkpoint not written: No space left on device")
        assert checkpoint_paths(small / "run")
        (small / "filler").unlink()
        said += run.communicate(timeout=60)[0]
        assert run.returncode == 0, said
        assert "not written" not in said.splitlines()[-3]
        assert_same_run(small / "run", workshop / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["step 13/", "step 20/60 . val"])
def test_a_signal_ends_a_run_after_the_step_and_nothing_is_lost(workshop, signum, moment):
    out = f"{signum.name}-{moment[5:7]}"
    run = start(workshop, out_dir=out, max_steps=60)
    read_until(run, moment)
    run.send_signal(signum)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + signum, said
    assert "Traceback" not in said
    last = re.fullmatch(
        r"step (\d+)/60 \| stopped, saved \| .*--resume auto.*", said.splitlines()[-1]
    )
    assert int(last[1]) == step_of(checkpoint_paths(workshop / out)[-1])
    finish(workshop, out)
    assert_same_run(workshop / out, workshop / "whole")


def test_ranks_stop_at_the_same_step_when_torchrun_gets_the_signal(workshop, whole_two):
    run = start(workshop, ranks=2, out_dir="two")
    read_until(run, "step 13/")
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[0]
    assert re.search(r"step \d+/60 \| stopped, saved", said), said
    assert "forcefully" not in said  # no rank had to be killed
    finish(workshop, "two", ranks=2)
    assert_same_run(workshop / "two", whole_two)


def test_a_second_signal_stops_at_once(workshop):
    run = start(workshop, out_dir="twice", total_batch_size=32 * 16 * 4096)  # endless steps
    read_until(run, "step 0/60 . val")  # by then it listens
    time.sleep(1)  # the first step is under way
    run.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert run.poll() is None  # it goes on to finish the step
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=5)
    assert run.returncode == 130
    assert not checkpoint_paths(workshop / "twice")

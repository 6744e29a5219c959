"""Whole runs, very small."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fineweb import write_shards

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--n_layer 2 --n_head 2 --n_embd 32 --block_size 16 --total_batch_size 256 "
    "--micro_batch_size 4 --max_steps 20 --warmup_steps 2 --lr 0.01 --device cpu --no-compile "
    "--vocab_size 257 --data_dir data --hellaswag_interval 0"
).split()


def losses(folder, n_ranks):
    """What a run prints as its losses, one a step."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    done = subprocess.run(
        [sys.executable, *command, ROOT / "train_gpt2.py", *TINY],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"^step \d+/\d+ \| loss (\S+)", done.stdout, re.M)]


def test_two_processes_equal_one(tmp_path):
    words = "the cat sat on a mat and saw two red birds fly over green hills".split()
    documents = (" ".join(words[i * j % 13] for i in range(300)) for j in range(12))
    write_shards(documents, tmp_path / "data", "bytes", val_tokens=1000, workers=1)
    one, two = losses(tmp_path, 1), losses(tmp_path, 2)
    assert len(one) == len(two) == 20 and one[-1] < one[0] - 1
    assert one == pytest.approx(two, abs=1.01e-4)  # the last digit that is printed

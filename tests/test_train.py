"""The training loop, and the data that it reads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt2
from train_gpt2 import DataLoaderLite

SCRIPT = """
from types import SimpleNamespace
import numpy as np
import train_gpt2 as t

bytes_as_tokens = SimpleNamespace(encode_to_numpy=lambda text: np.array([*text.encode()]))
t.tiktoken.get_encoding = lambda name: bytes_as_tokens
t.get_device = lambda: "cpu"
config = t.GPTConfig(block_size=16, vocab_size=128, n_layer=2, n_head=2, n_embd=32)
t.GPTConfig = lambda: config
t.total_batch_size, t.B, t.T, t.max_steps, t.use_compile = 8 * 16, 2, 16, 12, False
t.max_lr, t.warmup_steps = 1e-2, 2
t.train()
"""


def test_batches_cover_the_text_in_order_and_start_again():
    B, T, n_tokens = 2, 5, 64
    loader = object.__new__(DataLoaderLite)  # without input.txt and GPT-2's vocabulary
    loader.B, loader.T, loader.ddp_world_size = B, T, 2
    loader.tokens = np.arange(n_tokens, dtype=np.uint32)
    loader.n_sequences = (n_tokens - 1) // T  # 12
    loader.sequences_per_step = 4
    batches = []
    for step in range(4):
        for loader.ddp_rank in range(2):  # one micro-step on each of two ranks
            batches.append(loader.batch(step, 0))
    x, y = (torch.stack(t) for t in zip(*batches, strict=True))
    # the targets of one epoch are the tokens 1, 2, ... 60, each once; then the first step again
    assert y.dtype == torch.int64
    assert y[:6].flatten().tolist() == list(range(1, 61))
    assert torch.equal(x, y - 1)
    assert torch.equal(y[6:], y[:2])


def losses_of(command: list[str], folder: Path) -> list[float]:
    """The losses that SCRIPT prints, in a folder with a text of its own."""
    rng = np.random.default_rng(0)
    (folder / "input.txt").write_text("".join(chr(c) for c in rng.integers(97, 105, size=3000)))
    (folder / "script.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(Path(train_gpt2.__file__).parent)}
    command = [sys.executable, *command, "script.py"]
    output = subprocess.check_output(command, cwd=folder, env=env, text=True, timeout=120)
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", output)]


def test_two_ranks_have_the_losses_of_one(tmp_path):
    one = losses_of([], tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert len(one) == 12 and losses_of(torchrun, tmp_path) == pytest.approx(one, abs=1e-3)

"""The training loop, and the data that it reads."""

import numpy as np
import torch

from train_gpt2 import DataLoaderLite


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

"""The training loop, and the data that it reads."""

import numpy as np
import torch

from train_gpt2 import DataLoaderLite


def test_batches_cover_the_text_in_order_and_start_again():
    B, T, n_tokens = 2, 5, 34
    loader = object.__new__(DataLoaderLite)  # without input.txt and GPT-2's vocabulary
    loader.B, loader.T = B, T
    loader.tokens = np.arange(n_tokens, dtype=np.uint32)
    loader.n_sequences = (n_tokens - 1) // T  # 6
    x, y = (torch.stack(t) for t in zip(*map(loader.batch, range(4)), strict=True))
    # the targets of one epoch are the tokens 1, 2, ... 30, each once; then the first batch again
    assert y.dtype == torch.int64
    assert y[:3].flatten().tolist() == list(range(1, 31))
    assert torch.equal(x, y - 1)
    assert torch.equal(y[3], y[0])

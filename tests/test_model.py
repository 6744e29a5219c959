"""The network: every promise against something independent of it."""

import torch

from train_gpt2 import CausalSelfAttention, Config


def test_attention_is_causal():
    torch.manual_seed(0)
    attn = CausalSelfAttention(Config(n_head=2, n_embd=16, block_size=8))
    x = torch.randn(2, 8, 16)
    changed = x.clone()
    changed[:, 5] += 1.0
    before, after = attn(x), attn(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(dim=-1).all()

"""The network: every promise against something independent of it."""

import torch

from train_gpt2 import GPT, Block, CausalSelfAttention, Config


def test_attention_is_causal():
    torch.manual_seed(0)
    attn = CausalSelfAttention(Config(n_head=2, n_embd=16, block_size=8))
    x = torch.randn(2, 8, 16)
    changed = x.clone()
    changed[:, 5] += 1.0
    before, after = attn(x), attn(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(dim=-1).all()


def test_block_adds_its_branches_to_the_stream():
    torch.manual_seed(0)
    block = Block(Config(n_head=2, n_embd=16, block_size=8))
    x = torch.randn(2, 8, 16)
    for branch in (block.attn, block.mlp):
        torch.nn.init.zeros_(branch.c_proj.weight)
        torch.nn.init.zeros_(branch.c_proj.bias)
    assert torch.equal(block(x), x)  # branches that say nothing leave the stream as it is


def test_gpt2_has_163_million_parameters_while_the_head_is_untied():
    with torch.device("meta"):  # shapes without memory
        model = GPT(Config())
    assert sum(p.numel() for p in model.parameters()) == 163_037_184

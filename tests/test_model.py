"""The network: every promise against something independent of it."""

import math

import numpy as np
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


def test_gpt2_has_124_million_parameters():
    with torch.device("meta"):  # shapes without memory
        model = GPT(Config())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_embedding_and_head_are_one_matrix_and_learn_as_one():
    torch.manual_seed(0)
    model = GPT(Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11))
    before = model.transformer.wte.weight.detach().clone()
    model(*torch.randint(11, (2, 2, 8)))[1].backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not torch.equal(model.lm_head.weight, before)


def test_logits_depend_on_tokens_and_positions_so_far():
    torch.manual_seed(0)
    model = GPT(Config(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11))
    idx = torch.randint(11, (2, 8))
    changed = idx.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    (before, _), (after, _) = model(idx), model(changed)
    assert before.shape == (2, 8, 11)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(dim=-1).all()
    same = model(torch.zeros(1, 8, dtype=torch.int64))[0][0]  # one token, eight positions
    assert not torch.allclose(same[0], same[1])


def test_loss_is_the_mean_cross_entropy_in_nats():
    torch.manual_seed(0)
    model = GPT(Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11))
    idx, targets = torch.randint(11, (2, 2, 8))
    logits, loss = model(idx, targets)
    p = np.exp(logits.detach().double().numpy())
    p /= p.sum(axis=-1, keepdims=True)
    picked = np.take_along_axis(p, targets.numpy()[..., None], axis=-1)
    assert math.isclose(loss.item(), -np.log(picked).mean(), rel_tol=1e-5)

"""The network: every promise against something independent of it."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from train_gpt2 import GPT, PRESETS, Block, CausalSelfAttention, Config


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


def test_the_presets_have_openais_numbers_of_parameters():
    sizes = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }
    for name, size in sizes.items():
        with torch.device("meta"):  # shapes without memory
            model = GPT(PRESETS[name])
        padding = (50304 - 50257) * PRESETS[name].n_embd
        assert sum(p.numel() for p in model.parameters()) - padding == size


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
    (logits, _), (_, loss) = model(idx), model(idx, targets)
    p = np.exp(logits.detach().double().numpy())
    p /= p.sum(axis=-1, keepdims=True)
    picked = np.take_along_axis(p, targets.numpy()[..., None], axis=-1)
    assert math.isclose(loss.item(), -np.log(picked).mean(), rel_tol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("T, n_parts", [(16, 1), (90, 3), (300, 8)])
def test_the_loss_in_parts_has_the_gradients_of_all_logits_at_once(T, n_parts, dtype, tolerance):
    torch.manual_seed(0)
    model = GPT(Config(n_layer=1, n_head=2, n_embd=16, block_size=T, vocab_size=50257))
    x, y = torch.randint(50257, (2, 10, T))
    assert min(8, math.ceil(x.numel() * 50304 / 2**24)) == n_parts
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast:
        _, loss = model(x, y)
    (5 * loss).backward()  # a scaler multiplies, and accumulation divides
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    with autocast:
        logits, _ = model(x)
    expected = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
    (5 * expected).backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad - grad).abs().max() <= tolerance * p.grad.abs().max()
    assert (grads[0][50257:] == 0).all()  # what pads the vocabulary learns nothing
    with torch.no_grad(), autocast:
        assert model(x, y)[1].item() == loss.item()


def test_initialization_has_openais_deviations():
    torch.manual_seed(0)
    n_layer = 8
    model = GPT(Config(n_layer=n_layer, n_head=2, n_embd=192, block_size=256, vocab_size=500))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            expected = 0.02 / (2 * n_layer) ** 0.5 if "c_proj" in name else 0.02
            expected = 0.01 if "wpe" in name else expected
            assert math.isclose(p.std().item(), expected, rel_tol=0.02), name
            assert abs(p.mean().item()) < 0.02 * expected + 1e-4, name


def test_scaled_branches_keep_the_stream_at_its_size():
    def growth(rescale):
        torch.manual_seed(0)
        model = GPT(Config(n_layer=32, n_head=2, n_embd=64, block_size=16, vocab_size=99))
        x = start = torch.randn(4, 16, 64)
        with torch.no_grad():
            for block in model.transformer.h:
                block.attn.c_proj.weight *= rescale
                block.mlp.c_proj.weight *= rescale
                x = block(x)
        return ((x - start).std() / start.std()).item()

    # undoing the factor 1 / sqrt(2 * 32) = 1 / 8 lets the branches' sum grow about as much
    assert growth(8) > 6 * growth(1)


def test_the_first_loss_is_that_of_a_guess():
    torch.manual_seed(0)
    model = GPT(Config(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=50257))
    _, loss = model(*torch.randint(50257, (2, 4, 64)))
    assert abs(loss.item() - math.log(50257)) < 0.05


def test_the_same_seed_draws_the_same_weights():
    def weights(seed):
        torch.manual_seed(seed)
        model = GPT(Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11))
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_attention_is_the_written_out_formula():
    torch.manual_seed(0)
    B, T, C, nh = 2, 8, 48, 4
    attn = CausalSelfAttention(Config(n_head=nh, n_embd=C, block_size=T))
    x = torch.randn(B, T, C)
    q, k, v = (t.view(B, T, nh, C // nh) for t in attn.c_attn(x).split(C, dim=2))
    scores = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(C // nh)
    later = torch.arange(T)[None, :] > torch.arange(T)[:, None]
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    y = torch.einsum("bhts,bshc->bthc", weights, v).reshape(B, T, C)
    assert torch.allclose(attn(x), attn.c_proj(y), atol=1e-5)


def test_no_mask_is_left_in_the_network():
    model = GPT(Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11))
    assert not list(model.buffers())

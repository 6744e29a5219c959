"""The model. Every test compares with something independent."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import train_gpt2
from train_gpt2 import GPT, GPTConfig


def small_transformers_gpt2() -> GPT2LMHeadModel:
    """A small GPT-2 in which no parameter has a trivial value: no zero biases, for example."""
    shape = {"vocab_size": 97, "n_positions": 32, "n_layer": 3, "n_head": 4, "n_embd": 48}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=96, eos_token_id=96))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model.eval()


def test_from_pretrained_agrees_with_transformers(tmp_path):
    reference = small_transformers_gpt2()
    reference.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert model.config == GPTConfig(32, 97, 3, 4, 48)
    idx = torch.randint(97, (4, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], reference(idx).logits, rtol=0, atol=1e-4)
        _, loss = model(idx[:, :-1], idx[:, 1:])
        expected = reference(idx, labels=idx).loss  # transformers shifts the labels itself
        torch.testing.assert_close(loss, expected)


def test_initialization_statistics():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=8, n_head=2, n_embd=192))
    stds = {"wte": 0.02, "wpe": 0.01, "c_attn": 0.02, "c_fc": 0.02, "c_proj": 0.02 / math.sqrt(16)}
    for name, p in model.named_parameters():
        if name.endswith("bias") or "ln_" in name:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            std = stds[name.split(".")[-2]]
            assert p.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
    idx, targets = torch.randint(512, (2, 4, 64))
    _, loss = model(idx, targets)
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)  # a uniform guess


def test_padded_vocabulary_entries_have_no_effect():
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config)
    idx, targets = torch.randint(65, (2, 3, 16))  # both (B, T)
    logits, loss = model(idx, targets)
    loss.backward()
    assert model.lm_head.weight.shape == (128, 32) and logits.shape == (3, 16, 65)
    log_probs = torch.log(logits.exp() / logits.exp().sum(dim=-1, keepdim=True))  # (B, T, 65)
    expected = -log_probs.gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss, expected)
    assert (model.lm_head.weight.grad[65:] == 0).all()
    with torch.no_grad():
        model.lm_head.weight[65:] = 100.0  # would dominate if they took part
    assert torch.equal(model(idx, targets)[0], logits)
    assert torch.equal(model(idx, targets)[1], loss)
    assert model.generate(idx, 20).max() < 65


def test_learning_rates():
    config = train_gpt2.Config(max_steps=50, warmup_steps=10, lr=6e-4, min_lr=6e-5)
    expected = {step: 6e-4 * (step + 1) / 10 for step in range(10)}
    for step in range(10, 51):
        cosine = math.cos(math.pi * (step - 10) / 40)  # from 1 to -1
        expected[step] = 6e-5 + (6e-4 - 6e-5) * (1 + cosine) / 2
    expected[60] = 6e-5
    for step, lr in expected.items():
        assert train_gpt2.get_lr(step, config) == pytest.approx(lr, rel=1e-6)

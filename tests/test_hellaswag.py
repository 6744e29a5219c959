"""Tests of hellaswag.py. What they expect is computed by transformers, one ending at a time."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
from fineweb import get_encoding
from train_gpt2 import GPT, TRANSPOSED, GPTConfig

BYTES = get_encoding("bytes")
EXAMPLE = {"ctx": "The cat sat", "endings": ["on a mat.", "up.", "in ink", "é!"], "label": 2}


@torch.no_grad()
def test_losses_are_those_of_transformers():
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        p.normal_(std=0.2)  # so that the losses of the endings differ
    sizes = {"n_positions": 32, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 32}
    other = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    for name, p in other.named_parameters():
        w = model.get_parameter(name)
        p.copy_(w.t() if name.endswith(TRANSPOSED) else w[: len(p)])

    (example,) = hellaswag.prepare([EXAMPLE], BYTES, block_size=32)
    expected = []
    for ending in EXAMPLE["endings"]:
        ctx, tokens = b"The cat sat", b" " + ending.encode()
        log_probs = other(torch.tensor([[*ctx, *tokens]])).logits[0].log_softmax(dim=-1)
        ending_losses = [-log_probs[len(ctx) - 1 + i, t].item() for i, t in enumerate(tokens)]
        expected.append(sum(ending_losses))
    losses = hellaswag.get_sum_loss(model, example.tokens, example.mask)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)

"""The model. Every test compares with something independent."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

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

"""Devices and dtypes, as far as a CPU can tell."""

import torch

from train_gpt2 import GPT, Config, resolve_dtype


def test_autocast_keeps_parameters_gradients_and_loss_in_float32():
    torch.manual_seed(0)
    model = GPT(Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(*torch.randint(11, (2, 2, 8)))
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_gpu_without_bfloat16_gets_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve_dtype("cuda") == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_dtype("cuda") == torch.bfloat16

"""Devices and dtypes, as far as a CPU can tell."""

import pytest
import torch

from train_gpt2 import GPT, Config, resolve_device, resolve_dtype


def test_autocast_keeps_parameters_gradients_and_loss_in_float32():
    torch.manual_seed(0)
    model = GPT(Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(*torch.randint(11, (2, 2, 8)))
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_auto_takes_what_the_device_has(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 3)
    assert resolve_dtype("auto", cpu) == torch.float32
    for has_bfloat16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        answer = lambda including_emulation, has=has_bfloat16: has  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
        assert resolve_dtype("auto", gpu) == dtype
        assert resolve_dtype("float32", gpu) == torch.float32


def test_a_device_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no cuda device here"):
        resolve_device("cuda")

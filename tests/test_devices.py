"""Devices and dtypes, as far as a CPU can tell."""

import pytest
import torch

from train_gpt2 import GPT, Config, print0, resolve_device, resolve_dtype


def test_autocast_keeps_parameters_gradients_and_loss_in_float32():
    torch.manual_seed(0)
    model = GPT(Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11))
    with torch.autocast("cpu", torch.bfloat16):
        x, y = torch.randint(11, (2, 2, 8))
        (logits, _), (_, loss) = model(x), model(x, y)
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


def test_each_rank_of_a_machine_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_device("auto", local_rank=3) == torch.device("cuda", 3)
    with pytest.raises(SystemExit, match="no cuda device for rank 4 here"):
        resolve_device("auto", local_rank=4)


def test_only_the_first_rank_prints(monkeypatch, capsys):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        print0(f"rank {rank}")
    assert capsys.readouterr().out == "rank 0\n"


def test_a_device_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="no cuda device for rank 0 here"):
        resolve_device("cuda")

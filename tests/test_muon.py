"""Muon: whose matrices, which updates, how ranks share them, and that a run survives with it."""

import os
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fineweb
import train_gpt2
from runs import load_checkpoint, read_log
from train_gpt2 import (
    GPT,
    PRESETS,
    Config,
    configure_muon,
    configure_optimizer,
    load_model,
    main,
    step_muon,
)

SCRIPT = Path(train_gpt2.__file__).resolve()
TINY = Config(
    preset="tiny", n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=257, optimizer="muon",
    total_batch_size=128, micro_batch_size=4, max_steps=8, lr=1e-2, min_lr=0.0, warmup_steps=2,
    cooldown=0.5, data_dir="data", device="cpu", dtype="float32", compile=False, val_interval=4,
    val_tokens=160, hellaswag_interval=0, sample_interval=0, checkpoint_interval=4,
)  # fmt: skip
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture(autouse=True)
def folder_with_shards(tmp_path, monkeypatch):
    """An empty working folder with a few hundred short documents in data/, a token a byte."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    rng = random.Random(0)
    documents = ["".join(rng.choices("abcdef \n", k=60)) for _ in range(300)]
    fineweb.write_shards(documents, "data", "bytes", val_tokens=2000, workers=1)


def names_of(optimizer, model) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def test_muon_has_the_blocks_matrices_and_adamw_all_else_each_once():
    config = replace(TINY, n_layer=3)
    model = GPT(config)
    muon = names_of(configure_muon(model, config), model)
    adamw = names_of(configure_optimizer(model, config, "cpu"), model)
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert muon == [f"transformer.h.{i}.{name}.weight" for i in range(3) for name in matrices]
    assert sorted(muon + adamw) == sorted(name for name, _ in model.named_parameters())
    assert configure_muon(model, replace(config, optimizer="adamw")) is None


def test_an_update_turns_and_stretches_nothing_much():
    """U V^T of the gradient's singular value decomposition, about, times the learning rate."""
    model = GPT(TINY)
    muon = configure_muon(model, replace(TINY, muon_lr=0.1, weight_decay=0.0))
    before = [p.detach().clone() for p in muon.param_groups[0]["params"]]
    grads = []
    for p in muon.param_groups[0]["params"]:
        u, _, vt = torch.linalg.svd(torch.randn_like(p), full_matrices=False)
        grads.append(u * torch.linspace(3.0, 0.3, len(vt)) @ vt)  # no direction is too weak for it
        p.grad = grads[-1].clone()
    muon.step()
    for p, old, grad in zip(muon.param_groups[0]["params"], before, grads, strict=True):
        n_out, n_in = p.shape
        update = (old - p.detach()).double().numpy() / (0.1 * max(1, n_out / n_in) ** 0.5)
        u, _, vt = np.linalg.svd(grad.double().numpy(), full_matrices=False)
        stretch = np.diag(u.T @ update @ vt.T)  # all 1, were it exact
        assert (0.5 < stretch).all() and (stretch < 1.4).all()
        off = u.T @ update @ vt.T - np.diag(stretch)
        assert abs(off).max() < 0.1  # it is computed in bfloat16


def test_the_rates_of_both_follow_one_schedule(monkeypatch):
    rates = []
    monkeypatch.setattr(
        torch.optim.Muon, "step", lambda muon: rates.append(muon.param_groups[0]["lr"])
    )
    main(replace(TINY, muon_lr=0.03, val_interval=0))
    expected = [0.5, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]  # up, constant, and half of it down
    assert rates == pytest.approx([0.03 * share for share in expected])


def interrupt(folder, step):
    """Leave the folder as a run that ended at that step."""
    for path in folder.glob("step_*.pt"):
        if int(path.stem[5:]) > step:
            path.unlink()
    for path in (folder / "hf").iterdir():
        path.unlink()
    (folder / "hf").rmdir()


def test_resume_equals_no_interruption_bit_for_bit():
    main(TINY)
    folder = Path("log/tiny-001")
    log, whole = read_log(folder), load_checkpoint(folder / "step_000008.pt")
    interrupt(folder, 4)
    main(replace(TINY, resume="auto"))
    again = load_checkpoint(folder / "step_000008.pt")
    assert read_log(folder) == log
    for name, w in whole["model"].items():
        assert torch.equal(w, again["model"][name])
    for i, state in whole["muon"]["state"].items():
        assert torch.equal(state["momentum_buffer"], again["muon"]["state"][i]["momentum_buffer"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_keeps_its_optimizer(optimizer):
    main(replace(TINY, optimizer=optimizer))
    interrupt(Path("log/tiny-001"), 4)
    other = {"adamw": "muon", "muon": "adamw"}[optimizer]
    with pytest.raises(SystemExit, match=f"give --optimizer {optimizer}, or begin") as error:
        main(replace(TINY, optimizer=other, resume="auto", resume_anyway=True))
    assert "\n" not in str(error.value)


def test_a_run_from_before_there_was_a_choice_has_adamw():
    main(replace(TINY, optimizer="adamw", cooldown=0.0))
    folder = Path("log/tiny-001")
    interrupt(folder, 4)
    path = folder / "step_000004.pt"
    checkpoint = load_checkpoint(path)
    for name in ("optimizer", "muon_lr", "cooldown"):
        del checkpoint["config"][name]
    torch.save(checkpoint, path)
    with pytest.raises(SystemExit, match="give --optimizer adamw"):
        main(replace(TINY, resume="auto"))
    main(replace(TINY, optimizer="adamw", cooldown=0.0, resume="auto"))


@pytest.mark.parametrize("damage", ["shape", "name", "absent"])
def test_momentum_that_is_not_the_weights_is_told(damage):
    main(TINY)
    path = Path("log/tiny-001/step_000008.pt")
    checkpoint = load_checkpoint(path)
    state = checkpoint["muon"]["state"]
    if damage == "shape":
        state[0]["momentum_buffer"] = torch.zeros(3, 3)
    elif damage == "name":
        state[0]["velocity"] = state[0].pop("momentum_buffer")
    else:
        del state[0]
    torch.save(checkpoint, path)
    with pytest.raises(SystemExit, match="moments are of other weights"):
        load_model(str(path))


def test_two_ranks_share_the_work_and_equal_one():
    def run(ranks, out, *flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={ranks}", str(SCRIPT), "shakespeare_char"]
        for name in ("n_layer", "n_head", "n_embd", "block_size", "total_batch_size", "max_steps",
                     "lr", "min_lr", "warmup_steps", "cooldown", "optimizer", "data_dir", "device",
                     "dtype", "val_interval", "val_tokens", "checkpoint_interval"):  # fmt: skip
            command += [f"--{name}", str(getattr(TINY, name))]
        command += ["--micro_batch_size", "2", "--sample_interval", "0", "--out_dir", out, *flags]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return read_log(out), load_checkpoint(Path(out) / "step_000008.pt")

    one_log, one = run(1, "one")
    two_log, two = run(2, "two")
    for stream in ("train", "val"):
        np.testing.assert_allclose(two_log[stream][1], one_log[stream][1], atol=1e-4)
    for name, w in one["model"].items():
        # within an update bfloat16 rounds, and weak directions of a gradient are stretched
        assert (two["model"][name] - w).norm() <= 0.1 * w.norm().clamp(min=0.1), name
    for i, state in one["muon"]["state"].items():  # rank 0 has those of rank 1's matrices, too
        theirs = two["muon"]["state"][i]["momentum_buffer"]
        assert (theirs - state["momentum_buffer"]).norm() <= 0.1 * state["momentum_buffer"].norm()
        assert state["momentum_buffer"].abs().max() > 1e-4
    interrupt(Path("two"), 4)
    log, _ = run(1, "two", "--resume", "auto")  # and what it saved is all that is needed
    np.testing.assert_allclose(log["train"][1], one_log["train"][1], atol=1e-4)


def test_a_rank_computes_its_own_matrices_alone():
    shares = []
    for rank in range(3):
        torch.manual_seed(0)
        model = GPT(TINY)
        muon = configure_muon(model, TINY)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        sent, real = [], torch.distributed.broadcast

        def broadcast(flat, source, sent=sent):
            sent.append((source, flat.numel()))

        torch.distributed.broadcast = broadcast
        try:
            step_muon(muon, NO_SCALER, rank, world_size=3)
        finally:
            torch.distributed.broadcast = real
        computed = {n for n, p in model.named_parameters() if p.grad is not None and ".h." in n}
        shares.append({n for n in computed if n.endswith("weight") and "ln_" not in n})
        assert [source for source, _ in sent] == [0, 1, 2]
        matrices = train_gpt2.hidden_matrices(model)
        assert sum(n for _, n in sent) == 2 * sum(p.numel() for p in matrices)  # and momentum
    assert sum(map(len, shares)) == len(set.union(*shares)) == 8
    sizes = [sum(model.get_parameter(n).numel() for n in share) for share in shares]
    assert max(sizes) < 1.5 * sum(sizes) / 3  # about a third each


def test_gpt2_fast_is_the_same_network_on_the_same_data():
    own = {"optimizer", "muon_lr", "lr", "min_lr", "warmup_steps", "cooldown"}
    changed = {f.name for f in fields(Config) if getattr(PRESETS["gpt2-fast"], f.name) != f.default}
    assert changed <= own and PRESETS["gpt2-fast"].optimizer == "muon"

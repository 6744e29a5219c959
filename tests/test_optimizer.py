"""Schedule, AdamW, accumulation and clipping against their formulas."""

import functools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from devices import fits_memory
from train_gpt2 import (
    GPT,
    Config,
    configure_optimizer,
    get_lr,
    resolve_micro_batch_size,
)


def config(**changes):
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 65}
    return Config(**sizes | changes)


def tiny(**changes):
    torch.manual_seed(1)
    return GPT(config(**changes))


def schedule(**changes):
    """10 updates of warm-up, 100 of cosine, from 0.3 to 0.1."""
    return Config(**{"warmup_steps": 10, "max_steps": 110, "lr": 0.3, "min_lr": 0.1} | changes)


def batch(n):
    idx = torch.randint(65, (n, 17), generator=torch.Generator().manual_seed(2))
    return idx[:, :-1], idx[:, 1:]


def test_warm_up_is_linear_and_its_first_update_is_not_lost():
    rates = [get_lr(step, schedule()) for step in range(10)]
    assert rates == pytest.approx([0.3 * n / 10 for n in range(1, 11)])  # ends at the peak


def test_the_decay_is_half_a_cosine_from_the_peak_to_min_lr():
    for step in range(10, 111):
        expected = 0.1 + 0.2 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert get_lr(step, schedule()) == pytest.approx(expected)
    assert get_lr(60, schedule()) == pytest.approx((0.3 + 0.1) / 2)  # halfway, their mean


def test_from_max_steps_on_the_rate_is_min_lr():
    assert [get_lr(step, schedule()) for step in (110, 111, 10_000)] == pytest.approx([0.1] * 3)


def test_no_warm_up_begins_at_the_peak():
    assert get_lr(0, schedule(warmup_steps=0)) == pytest.approx(0.3)


def test_a_run_may_end_with_its_warm_up():
    rates = [get_lr(step, schedule(max_steps=10)) for step in range(11)]
    assert rates[9] == pytest.approx(0.3)
    assert all(0.0 < rate <= 0.3 + 1e-12 for rate in rates)


def test_a_cooldown_is_a_line_after_a_constant_rate():
    settings = schedule(cooldown=0.4)  # of 110 updates, 44
    assert [get_lr(step, settings) for step in range(5)] == pytest.approx(
        [0.03, 0.06, 0.09, 0.12, 0.15]
    )
    assert {get_lr(step, settings) for step in range(10, 67)} == {0.3}
    for step in range(66, 111):
        assert get_lr(step, settings) == pytest.approx(0.1 + 0.2 * (110 - step) / 44)
    assert get_lr(500, settings) == pytest.approx(0.1)


def test_exactly_the_matrices_decay():
    model = tiny(weight_decay=0.25)
    groups = configure_optimizer(model, model.config, "cpu").param_groups
    decay = [id(p) for g in groups if g["weight_decay"] == 0.25 for p in g["params"]]
    plain = [id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]]
    matrices = {id(p) for p in model.parameters() if p.dim() == 2}
    vectors = {id(p) for p in model.parameters() if p.dim() == 1}
    assert set(decay) == matrices and set(plain) == vectors
    assert len(decay) == 2 + 4 * 2 and len(plain) == 2 + 8 * 2  # each once, the tied one too
    assert id(model.lm_head.weight) in decay


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_adamw_is_fused(device_type):
    groups = configure_optimizer(tiny(), config(), device_type).param_groups
    assert all(group["fused"] is True for group in groups)


def test_updates_are_adamws_formula():
    settings = config(lr=0.01, weight_decay=0.3, beta1=0.7, beta2=0.8)  # nobody's defaults
    model = tiny()
    optimizer = configure_optimizer(model, settings, "cpu")
    params = list(model.parameters())
    p = [w.detach().double().numpy().copy() for w in params]
    m, v = [np.zeros_like(w) for w in p], [np.zeros_like(w) for w in p]
    rng = np.random.default_rng(3)
    for t in range(1, 6):
        for i, w in enumerate(params):
            g = rng.normal(size=w.shape).astype(np.float32)
            w.grad = torch.from_numpy(g)
            m[i] = 0.7 * m[i] + 0.3 * g
            v[i] = 0.8 * v[i] + 0.2 * g**2
            p[i] *= 1 - 0.01 * (0.3 if w.dim() == 2 else 0.0)
            p[i] -= 0.01 * (m[i] / (1 - 0.7**t)) / (np.sqrt(v[i] / (1 - 0.8**t)) + 1e-8)
        optimizer.step()
    for w, expected in zip(params, p, strict=True):
        np.testing.assert_allclose(w.detach().numpy(), expected, rtol=0, atol=1e-6)


def test_four_micro_batches_give_the_gradients_of_one_large_batch():
    x, y = batch(8)
    whole, parts = tiny(), tiny()
    whole(x, y)[1].backward()
    for rows in torch.arange(8).split(2):
        (parts(x[rows], y[rows])[1] / 4).backward()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=1e-6)


def test_one_batch_is_learned_by_heart():
    torch.manual_seed(0)
    model = GPT(Config(n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=65))
    x, y = torch.randint(65, (2, 4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        _, loss = model(x, y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # a guess has ln 65 = 4.2; the first token of a row is any of 65


@pytest.mark.parametrize(
    "batch, says",
    [
        ({"total_batch_size": 1000}, "1000 is no multiple of 1 ranks x --block_size 16"),
        ({"total_batch_size": 160, "micro_batch_size": 4}, "does not divide the 10 sequences"),
    ],
)
def test_a_batch_that_does_not_divide_is_told_in_one_line(batch, says):
    with pytest.raises(SystemExit, match=says) as error:
        resolve_micro_batch_size(config(**batch), world_size=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sequences, chosen", [(512, 4), (6, 2), (7, 1)])
def test_an_automatic_micro_batch_divides(sequences, chosen):
    settings = config(total_batch_size=16 * sequences)
    assert resolve_micro_batch_size(settings, world_size=1) == chosen


@pytest.mark.parametrize("room, chosen", [(1000, 64), (64, 64), (63, 32), (9, 8), (0, 1)])
def test_auto_finds_the_largest_micro_batch_that_fits(room, chosen, monkeypatch):
    model, forward, tried = tiny(), GPT.forward, []

    def in_little_memory(self, idx, targets):
        tried.append(len(idx))
        if len(idx) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, idx, targets)

    monkeypatch.setattr(GPT, "forward", in_little_memory)
    trial = functools.partial(fits_memory, model, T=16, autocast=nullcontext())
    settings = config(total_batch_size=16 * 64)
    assert resolve_micro_batch_size(settings, 1, trial) == chosen
    assert tried == [64 >> i for i in range(len(tried))]
    assert all(p.grad is None for p in model.parameters())  # the trial leaves nothing behind
    given = config(total_batch_size=16 * 64, micro_batch_size=16)
    assert resolve_micro_batch_size(given, 1, trial) == 16  # as it is, untried

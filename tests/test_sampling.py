"""Sampling: the same seed, the same text; nothing that the distribution does not have; no key and
no value computed twice."""

import itertools

import pytest
import torch

import train_gpt2
from train_gpt2 import GPT, Config, KVCache


def small_model(vocab_size=65):
    torch.manual_seed(0)
    return GPT(Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=vocab_size)).eval()


def sharp_model(**changes):
    """One whose logits differ much, between tokens and between positions, as a trained one's do."""
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 65}
    torch.manual_seed(0)
    model = GPT(Config(**sizes | changes)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "ln_" not in name:
            p.normal_(std=0.2)
    return model


def tokens(*shape, vocab_size=65):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def draw(model, seed, n_rows=4, **options):
    idx = torch.zeros(n_rows, 1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    return model.generate(idx, 20, generator=generator, **options)  # far beyond block_size


def assert_close(logits, expected, atol=1e-5):
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)


# ---- the distribution ----------------------------------------------------------------------------


def test_same_seed_same_text():
    model = small_model()
    assert torch.equal(draw(model, seed=1), draw(model, seed=1))
    assert not torch.equal(draw(model, seed=1), draw(model, seed=2))


def test_top_1_and_temperature_0_are_greedy():
    model = small_model()
    greedy = draw(model, seed=1, temperature=0)
    assert torch.equal(draw(model, seed=2, top_k=1), greedy)
    idx = greedy[:, :5]  # each token is the argmax of what the model says of those before it
    logits, _ = model(idx)
    assert torch.equal(logits[:, :-1].argmax(-1), idx[:, 1:])


def test_top_k_draws_among_the_k_likeliest():
    model = small_model()
    idx = draw(model, seed=1, n_rows=500, top_k=3)[:, :2]
    likeliest = model(idx[:1, :1])[0][0, 0].topk(3).indices
    assert set(idx[:, 1].tolist()) == set(likeliest.tolist())


def test_samples_follow_the_distribution():
    model = small_model()
    idx = draw(model, seed=1, n_rows=20_000)[:, :2]
    frequencies = torch.bincount(idx[:, 1], minlength=65) / 20_000
    probs = model(idx[:1, :1])[0][0, 0].softmax(-1)
    assert (frequencies - probs).abs().max() < 0.01


def test_padding_is_never_sampled_and_never_in_the_loss():
    model = small_model(vocab_size=65)  # 128 rows
    x, y = torch.randint(65, (2, 4, 8))
    _, before = model(x, y)
    with torch.no_grad():
        model.lm_head.weight[65:] = 100.0  # rows that would win every draw
    logits, after = model(x, y)
    assert logits.size(-1) == 65 and torch.equal(before, after)
    assert draw(model, seed=1, n_rows=500).max() < 65


def test_a_model_that_has_diverged_gives_babble_not_an_error():
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    for options in ({}, {"top_k": 5}, {"temperature": 0.0}):
        assert draw(model, seed=1, **options).shape == (4, 21)


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e38])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-60, 1e-30, 1e-6])
def test_ever_smaller_temperatures_are_greedy_however_large_the_logits(temperature, scale):
    logits = 0.1 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    logits += 2.0 * torch.nn.functional.one_hot(logits.argmax(dim=-1), 300)
    drawn = train_gpt2.draw(scale * logits, temperature)
    assert torch.equal(drawn, logits.argmax(dim=-1, keepdim=True))


GREEDY, TINY = {"temperature": 0.0}, {"temperature": 1e-30}


@pytest.mark.parametrize("options", [{}, GREEDY, TINY, {"top_k": 2}, {"top_k": 3}])
def test_logits_that_are_no_numbers_never_raise(options):
    kinds = [torch.nan, torch.inf, -torch.inf, 0.0, 3e38]
    logits = torch.tensor([*itertools.product(kinds, repeat=4)])  # (625, 4)
    drawn = train_gpt2.draw(logits, **options)
    assert drawn.shape == (625, 1) and 0 <= drawn.min() and drawn.max() < 4


# ---- keys and values, each computed once ---------------------------------------------------------


def in_parts(model, idx, n_first):
    """The logits of idx, fed as its first tokens and then token by token."""
    cache = KVCache(idx.size(1))
    rest = idx[:, n_first:].split(1, dim=1) if n_first < idx.size(1) else ()
    parts = [model.hidden(part, cache=cache) for part in (idx[:, :n_first], *rest)]
    assert cache.T == idx.size(1)
    return model.logits(torch.cat(parts, dim=1))


@pytest.mark.parametrize("n_first", [1, 2, 7, 15, 16])
def test_a_text_in_parts_has_the_logits_of_the_whole(n_first):
    model, idx = sharp_model(), tokens(3, 16)
    assert_close(in_parts(model, idx, n_first), model(idx)[0])


def test_repeated_rows_go_on_each_in_its_own_way():
    model, prompts, rest = sharp_model(), tokens(2, 5), tokens(6, 9)
    cache = KVCache(16)
    model.hidden(prompts, cache=cache)
    cache.repeat(3)
    logits = [model.logits(model.hidden(part, cache=cache)) for part in rest.split(1, dim=1)]
    whole = torch.cat((prompts[[0, 0, 0, 1, 1, 1]], rest), dim=1)
    assert_close(torch.cat(logits, dim=1), model(whole)[0][:, 5:])


def test_under_autocast_the_parts_are_as_exact_as_the_whole():
    model, idx = sharp_model(), tokens(3, 16)
    exact = model(idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        whole, parts = model(idx)[0], in_parts(model, idx, 5)
    assert parts.dtype == torch.bfloat16
    error, error_of_parts = ((x.float() - exact).square().mean().sqrt() for x in (whole, parts))
    assert 0 < error_of_parts < 1.5 * error


def test_a_cache_refuses_a_second_part_of_several_tokens_and_is_none_the_worse():
    model, idx = sharp_model(), tokens(2, 7)
    cache = KVCache(16)
    model.hidden(idx[:, :3], cache=cache)
    with pytest.raises(ValueError, match="one token at a time"):
        model.hidden(idx[:, 3:5], cache=cache)
    for t in range(3, 7):
        last = model.logits(model.hidden(idx[:, t : t + 1], cache=cache))
    assert_close(last[:, 0], model(idx)[0][:, -1])


def test_more_tokens_than_positions_are_refused():
    model, idx = sharp_model(), tokens(2, 17)
    with pytest.raises(ValueError, match="17 tokens, but only 16 positions"):
        model(idx)
    with pytest.raises(ValueError, match="17 tokens"):
        model.hidden(idx, cache=KVCache(17))
    with pytest.raises(ValueError, match="17 tokens"):
        in_parts(model, idx, 16)


# ---- generate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 7, 30])
def test_max_new_tokens_is_exact(n):
    idx = tokens(2, 5)
    out = sharp_model().generate(idx, n, num_samples=3)
    assert out.shape == (6, 5 + n)
    assert torch.equal(out[:, :5], idx[[0, 0, 0, 1, 1, 1]])


def test_samples_of_a_prompt_differ_but_it_is_computed_once():
    model, fed = sharp_model(), []
    model.transformer.h[0].register_forward_hook(lambda _, x, y: fed.append(tuple(y.shape[:2])))
    idx = model.generate(tokens(1, 5), 9, num_samples=4)
    assert fed == [(1, 5)] + [(4, 1)] * 8  # what is drawn last is not looked at
    assert len({tuple(row) for row in idx.tolist()}) == 4


def test_each_prompt_goes_on_as_if_it_were_alone():
    model, idx = sharp_model(), tokens(2, 5)
    together = model.generate(idx, 30, temperature=0, num_samples=3)
    alone = torch.cat([model.generate(row, 30, temperature=0) for row in idx.split(1)])
    assert torch.equal(together, alone[[0, 0, 0, 1, 1, 1]])


# beginning with one token, with all positions taken, and with more tokens than there are positions
@pytest.mark.parametrize("n, T", [(8, 1), (8, 5), (8, 8), (8, 20), (7, 3), (2, 1), (1, 1), (1, 4)])
def test_beyond_the_positions_a_text_goes_on_from_its_last_half(n, T, monkeypatch):
    model, logits, real = sharp_model(block_size=n), [], train_gpt2.draw
    monkeypatch.setattr(train_gpt2, "draw", lambda x, *a, **k: logits.append(x) or real(x, *a, **k))
    idx = model.generate(tokens(2, T), 30)
    first = max(0, T - n)  # the token at position 0
    for length, said in zip(range(T, T + 30), logits, strict=True):
        if length - first > n:
            first = length - max(1, n // 2)
        assert_close(said, model(idx[:, first:length])[0][:, -1])


def test_between_two_tokens_gradients_are_the_callers_and_for_them_there_are_none():
    model, needed = small_model(), []
    model.lm_head.register_forward_hook(lambda _, x, y: needed.append(y.requires_grad))
    for _ in model.stream(tokens(1, 3), 3):
        assert torch.is_grad_enabled()
    assert needed == [False] * 3


# ---- the command line ----------------------------------------------------------------------------


ENDLESS = "--prompt ab --temperature 0 --max_new_tokens 100000000".split()

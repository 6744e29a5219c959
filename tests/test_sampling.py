"""Sampling: the same seed, the same text; nothing that the distribution does not have."""

import torch

from train_gpt2 import GPT, Config


def small_model(vocab_size=65):
    torch.manual_seed(0)
    return GPT(Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=vocab_size)).eval()


def draw(model, seed, n_rows=4, **options):
    idx = torch.zeros(n_rows, 1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    return model.generate(idx, 20, generator=generator, **options)  # far beyond block_size


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

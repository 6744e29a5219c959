"""Sampling: the same seed, the same text; nothing that the distribution does not have; no key and
no value computed twice; and a text on the screen as it is drawn."""

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import fineweb
import train_gpt2
from inference import Task, print_samples, read_prompt
from train_gpt2 import GPT, Config, KVCache, main

SCRIPT = Path(train_gpt2.__file__).resolve()
EOT = 256  # of the bytes encoding


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
    (logits, _), (_, after) = model(x), model(x, y)
    assert logits.size(-1) == 65 and torch.equal(before, after)
    assert draw(model, seed=1, n_rows=500).max() < 65


def test_a_model_that_has_diverged_gives_babble_not_an_error():
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    for options in ({}, {"top_k": 5}, {"temperature": 0.0}, {"top_p": 0.5}):
        assert draw(model, seed=1, **options).shape == (4, 21)


@pytest.fixture
def drawn_from(monkeypatch):
    """The probabilities that train_gpt2.draw drew from, call by call."""
    calls, multinomial = [], torch.multinomial

    def watched(probs, *args, **settings):
        calls.append(probs / probs.sum(dim=-1, keepdim=True))
        return multinomial(probs, *args, **settings)

    monkeypatch.setattr(torch, "multinomial", watched)
    return calls


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 1000])
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
def test_the_probabilities_are_transformers_probabilities(temperature, top_k, top_p, drawn_from):
    logits = 3 * torch.randn(20, 500, generator=torch.Generator().manual_seed(0))
    train_gpt2.draw(logits, temperature, top_k, top_p)
    expected = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    [probs] = drawn_from
    assert torch.equal(probs > 0, expected.softmax(dim=-1) > 0)  # among the same tokens
    assert_close(probs, expected.softmax(dim=-1), atol=1e-6)


def test_top_p_draws_among_the_likeliest_that_suffice():
    logits = torch.tensor([[0.25, 0.125, 0.5, 0.125]]).log().repeat(2000, 1)
    for top_p, suffice in ((0.5, {2}), (0.51, {0, 2}), (0.75, {0, 2}), (0.9, {0, 1, 2, 3})):
        found = train_gpt2.draw(logits, top_p=top_p).unique()
        # of two that are equally likely either one may be left out
        assert suffice - {1, 3} <= set(found.tolist()) <= suffice


@pytest.mark.parametrize("top_p", [0.0, 1e-60, 1e-9])  # 1e-60 is 0 as a float32
def test_with_a_tiny_top_p_the_likeliest_is_always_left(top_p):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(train_gpt2.draw(logits, top_p=top_p), logits.argmax(dim=-1, keepdim=True))


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e38])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-60, 1e-30, 1e-6])
def test_ever_smaller_temperatures_are_greedy_however_large_the_logits(temperature, scale):
    logits = 0.1 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    logits += 2.0 * torch.nn.functional.one_hot(logits.argmax(dim=-1), 300)
    drawn = train_gpt2.draw(scale * logits, temperature)
    assert torch.equal(drawn, logits.argmax(dim=-1, keepdim=True))


GREEDY, TINY = {"temperature": 0.0}, {"temperature": 1e-30}


@pytest.mark.parametrize("options", [{}, GREEDY, TINY, {"top_k": 2}, {"top_k": 3, "top_p": 0.1}])
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


def test_greedy_texts_and_where_they_stop_are_transformers(tmp_path):
    model, idx = sharp_model(block_size=32), tokens(4, 3)
    model.save_pretrained(tmp_path)
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    whole = model.generate(idx, 20, temperature=0)
    lengths = set()
    for stop in whole[:, 3:].unique().tolist():  # each ends some text or other
        theirs = other.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False,
            eos_token_id=stop, pad_token_id=stop,
        )  # fmt: skip
        assert torch.equal(model.generate(idx, 20, temperature=0, stop_token=stop), theirs)
        for row in idx.split(1):  # alone: here all texts have ended when one has
            ours = model.generate(row, 20, temperature=0, stop_token=stop)
            theirs = other.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=20, do_sample=False,
                eos_token_id=stop, pad_token_id=stop,
            )  # fmt: skip
            assert torch.equal(ours, theirs)
            lengths.add(ours.size(1))
    assert min(lengths) < 10 and max(lengths) == 23


def test_a_text_that_has_met_the_stop_token_repeats_it():
    idx = draw(small_model(vocab_size=5), seed=1, n_rows=50, stop_token=3)
    for row in idx[:, 1:].tolist():
        if 3 in row:
            assert set(row[row.index(3) :]) == {3}
    assert (idx[:, -1] == 3).any() and (idx[:, 2] != 3).any()


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


# ---- a text on the screen, as it is drawn --------------------------------------------------------


class Scripted:
    """A model that says these texts, a byte a token, side by side."""

    config, lm_head = SimpleNamespace(block_size=64), SimpleNamespace(weight=torch.zeros(1))

    def __init__(self, *texts: bytes | list[int]):
        self.texts = texts

    def stream(self, idx, max_new_tokens, temperature, num_samples, stop_token, **how):
        assert num_samples == len(self.texts)
        for new in itertools.zip_longest(*self.texts, fillvalue=stop_token):
            yield torch.tensor(new)[:, None]


def show(model, prompt="p"):
    task = Task(num_samples=len(model.texts))
    print_samples(model, fineweb.get_encoding("bytes"), prompt, task, None)


def test_samples_are_printed_whole_and_in_order(capsys):
    show(Scripted(b"abc", b"xyz", b"123"))
    assert capsys.readouterr().out == "> pabc\n> pxyz\n> p123\n"


def steps_of(texts, capsys):
    """What is printed before the second token is drawn, before the third ... and at last."""
    model, said = Scripted(*texts), []
    columns = model.stream

    def watched(*args, **how):
        for new in columns(*args, **how):
            yield new
            said.append(capsys.readouterr().out)

    model.stream = watched
    show(model)
    said[-1] += capsys.readouterr().out
    return said


def test_each_token_of_the_first_sample_is_printed_before_the_next_one_is_drawn(capsys):
    assert steps_of([b"abcd", b"wxyz"], capsys) == ["> pa", "b", "c", "d\n> pwxyz\n"]


def test_when_a_sample_has_ended_the_next_is_printed_from_where_it_is(capsys):
    said = steps_of([b"ab", b"vwxyz", b"", b"12345"], capsys)
    assert said == ["> pa", "b", "\n> pvwx", "y", "z\n> p\n> p12345\n"]


def test_a_character_of_several_tokens_comes_out_whole(capsys):
    text, other = "é🙂ßab", "🙂aé日"  # ten bytes each
    said = steps_of([text.encode(), other.encode()], capsys)
    assert said == ["> p", "é", "", "", "", "🙂", "", "ß", "a", f"b\n> p{other}\n"]


def test_a_sample_stops_at_end_of_text_and_neither_that_nor_what_follows_is_printed(capsys):
    show(Scripted([97, EOT, 98, 98], [EOT, 99, EOT, 99], [100, 101, 102, 103]))
    assert capsys.readouterr().out == "> pa\n> p\n> pdefg\n"


def test_bytes_that_are_no_text_and_tokens_of_no_encoding_do_no_harm(capsys):
    show(Scripted([0xFF, 97, 300, 98]))
    assert capsys.readouterr().out == "> p\ufffdab\n"


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes."""
    folder = tmp_path_factory.mktemp("model")
    sharp_model(vocab_size=257, block_size=32).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def said(folder, capsys):
    """A function: what the command prints, on standard output and on standard error."""

    def said(*prompts, seed=1, **options):
        options = {"num_samples": 2, "max_new_tokens": 12} | options
        main(Config(init_from=folder, device="cpu", seed=seed), Task(prompt=prompts, **options))
        return capsys.readouterr()

    return said


def test_each_prompt_has_its_samples_whatever_else_is_asked(said):
    alone = [said(prompt).out for prompt in ("ab", "xyz ", "ab")]
    assert said("ab", "xyz ", "ab").out == "".join(alone)
    assert alone[0].startswith("> ab") and alone[0].count("> ab") == 2
    assert alone[1].startswith("> xyz ") and alone[1].count("> xyz ") == 2


def test_the_same_seed_has_the_same_samples_and_another_has_others(said):
    assert said("ab").out == said("ab").out != said("ab", seed=2).out


def test_at_temperature_0_all_samples_are_the_likeliest_text(said, folder):
    model, idx = transformers.GPT2LMHeadModel.from_pretrained(folder), torch.tensor([[97, 98]])
    for _ in range(12):
        idx = torch.cat((idx, model(idx).logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    text = bytes(idx[0].tolist()).decode(errors="replace")
    assert said("ab", temperature=0.0, num_samples=3).out == f"> {text}\n" * 3


def test_a_prompt_longer_than_the_context_is_cropped_and_that_is_said_once(said):
    long = "a very long prompt, and then " + "abcdefgh" * 4
    out, err = said(long, temperature=0.0)
    assert err == f"the prompt has {len(long)} tokens: the last 32 are used\n"
    assert out.replace(long, long[-32:]) == said(long[-32:], temperature=0.0).out
    assert said(long[-32:]).err == ""


def test_end_of_text_in_a_prompt_is_the_token(said, monkeypatch):
    seen = []
    monkeypatch.setattr(GPT, "stream", lambda model, idx, *args, **how: seen.append(idx) or ())
    said("<|endoftext|>", "a<|endoftext|>é")
    assert [idx.tolist() for idx in seen] == [[[256]], [[97, 256, 0xC3, 0xA9]]]


def test_the_options_reach_the_draw(said, monkeypatch):
    seen, real = [], train_gpt2.draw

    def watched(logits, *args, **how):
        seen.append((args, how["top_k"], how["top_p"]))
        return real(logits, *args, **how)

    monkeypatch.setattr(train_gpt2, "draw", watched)
    said("ab", temperature=0.5, top_k=3, top_p=0.9)
    assert seen == [((0.5,), 3, 0.9)] * 12


@pytest.mark.parametrize("content", [b"ab", b"ab\n", b"a\n\nb\n\n", "é🙂".encode(), b"\xff"])
def test_a_dash_reads_the_prompt_from_standard_input(content, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    text = content.decode(errors="replace")
    assert read_prompt("-") == (text[:-1] if text.endswith("\n") else text)  # as $(cat) does


def test_bytes_of_an_argument_that_are_no_text_do_no_harm():
    assert read_prompt(os.fsdecode(b"a\xff\xc3\xa9")) == "a\ufffdé"


def process(folder, *flags, **settings):
    """The command in a process of its own, with pipes."""
    line = [sys.executable, str(SCRIPT), "--device", "cpu", "--init_from", folder, *flags]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(line, **pipes | settings)


def test_the_command_as_a_user_gives_it(folder, said):
    flags = "--prompt - --prompt xyz --num_samples 2 --max_new_tokens 12 --seed 1"
    out, err = process(folder, *flags.split()).communicate(b"hello\n", timeout=60)
    assert (out.decode(), err) == (said("hello", "xyz").out, b"")


ENDLESS = "--prompt ab --temperature 0 --max_new_tokens 100000000".split()


def test_a_text_without_end_is_read_while_it_is_drawn(folder):
    with process(folder, *ENDLESS) as running:
        try:
            assert running.stdout.read(200).startswith(b"> ab")
            assert running.poll() is None
        finally:
            running.kill()


def test_a_reader_that_has_enough_ends_it_without_a_word(folder):
    with process(folder, *ENDLESS) as running:  # | head -c 9
        try:
            running.stdout.read(9)
            running.stdout.close()
            running.wait(timeout=60)
            assert running.stderr.read() == b""
        finally:
            running.kill()

"""hellaswag.py against transformers, formulas, and itself cut up differently. No network."""

import hashlib
import http.server
import json
import math
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import first_least, plain_scores, twins

import hellaswag
from fineweb import get_encoding
from hellaswag import Counts, Question, evaluate, prepare, render, render_harness, score
from train_gpt2 import GPT, Config

ROOT = Path(hellaswag.__file__).parent
SHARED = ROOT.parent / "shared" / "data"
BYTES = get_encoding("bytes")  # one token a byte: needs no vocabulary
EXAMPLE = {"ctx": "The cat sat", "endings": ["on a mat.", "up.", "in ink", "é!"], "label": 2}


def gpt2s():
    """GPT-2's encoding, where it is to be had."""
    try:
        return get_encoding("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same weights in this project's model and in transformers'."""
    return twins(tmp_path_factory.mktemp("hf"))


def some_examples(count):
    """Contexts and endings of many lengths; the shortest ending is one token, its space."""
    rng = random.Random(0)
    words = ["red", "blue", "green", "grey", "black", "a", "p(i)nk", "naïve", "Ω"]
    examples = []
    while len(examples) < count:
        ctx, *endings = (" ".join(rng.choices(words, k=rng.randint(0, 8))) for _ in range(5))
        if ctx and len(set(endings)) == 4:  # of two that are the same, either may be the least
            examples.append({"ctx": ctx, "endings": endings, "label": rng.randrange(4)})
    return examples


def some_questions(count):
    """The same of random tokens, with one to 40 in an ending."""
    rng = random.Random(0)

    def draw(n):
        return rng.choices(range(257), k=n)

    return [
        Question(draw(rng.choice([1, 2, 15, 56])), endings, [*map(len, endings)], i % 4)
        for i in range(count)
        for endings in [[draw(rng.choice([1, 2, 7, 40])) for _ in range(4)]]
    ]


def plain_counts(other, examples, sizes_of=lambda endings: [len(e.encode()) + 1 for e in endings]):
    """Examples of bytes one at a time; by default an ending's size is that of it and its space."""
    right = right_norm = 0
    for example in examples:
        context, endings = example["ctx"].encode(), example["endings"]
        sums, _ = plain_scores(other, [*context], [[*f" {e}".encode()] for e in endings])
        right += first_least(sums) == example["label"]
        pairs = zip(sums, sizes_of(endings), strict=True)
        means = [loss / size if size else math.inf for loss, size in pairs]
        right_norm += first_least(means) == example["label"]
    return len(examples), right, right_norm


# ---- from text to tokens -------------------------------------------------------------------------


def test_the_lectures_way_by_hand():
    context, endings, sizes, label = render(EXAMPLE | {"activity_label": "x", "ctx_a": "y"}, BYTES)
    assert bytes(context) == b"The cat sat" and label == 2
    assert [bytes(e).decode() for e in endings] == [" on a mat.", " up.", " in ink", " é!"]
    assert sizes == [10, 4, 7, 4]  # tokens: é takes two


def test_text_that_spells_out_end_of_text_is_text():
    gpt2 = gpt2s()
    example = EXAMPLE | {"ctx": "<|endoftext|> is", "activity_label": "<|endoftext|>"}
    example["endings"] = ["<|endoftext|>", "text", "a mat", "up."]
    for way in (render, render_harness):
        context, endings, *_ = way(example, gpt2)
        assert gpt2.decode(context).endswith("<|endoftext|> is")
        assert [gpt2.decode(e) for e in endings] == [" " + e for e in example["endings"]]
        assert gpt2.eot_token not in {*context, *sum(endings, [])}
    assert render(example, gpt2).sizes[1:] == [1, 2, 2]  # " text", " a mat", " up."


# activity_label, ctx_a, ctx_b -> the context, worked out by hand from the harness's hellaswag/
# utils.py: "label: a B", stripped; " [title]" is a full stop; brackets go; "  " to " ", once
CONTEXTS = [
    (("Roofing", "A man is on a roof.", "he"), "Roofing: A man is on a roof. He"),
    (("Roofing", "A man is on a roof.", ""), "Roofing: A man is on a roof."),
    (("TV", "She waits.", "the CD of Bob"), "TV: She waits. The cd of bob"),
    (("Food", "[header] How to eat [title] Sit.", ""), "Food: How to eat. Sit."),
    (("Food", "How to eat [title] Sit   down.", "[step] now"), "Food: How to eat. Sit  down. now"),
    (("Food", "[step] Chew [substeps] a [b] c", ""), "Food: Chew a c"),
    ((" Food ", "Sit [now] ", " x"), "Food : Sit  x"),
    (("A", "two\nlines [over\nthem]", "é"), "A: two\nlines [over\nthem] É"),
]
# an ending -> what is scored behind the context, with its space, and its characters without
ENDINGS = [
    ("eats.", " eats.", 5),
    (" eats twice. ", " eats twice.", 11),
    ("[step] Chew [title] Sit", "  Chew. Sit", 10),
    ("a   b    c", " a  b  c", 7),
    ("naïve [x] café", " naïve café", 10),
    ("[title]", " ", 0),
]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@pytest.mark.parametrize("parts, expected", CONTEXTS)
def test_the_harnesss_contexts_by_hand(parts, expected, name):
    encoding = gpt2s() if name == "gpt2" else BYTES
    example = dict(zip(("activity_label", "ctx_a", "ctx_b"), parts, strict=True))
    # the harness does not look at ctx
    question = render_harness(EXAMPLE | example | {"ctx": "other"}, encoding)
    assert question.context == encoding.encode_ordinary(expected)
    assert encoding.decode(question.endings[1]) == " up." and question.label == 2


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_harnesss_endings_by_hand(name):
    encoding = gpt2s() if name == "gpt2" else BYTES
    for ending, expected, size in ENDINGS:
        question = render_harness(EXAMPLE | {"endings": [ending, "b", "c", "d"]}, encoding)
        assert encoding.decode(question.context) == ": The cat sat"  # no parts: ctx as it is
        assert encoding.decode(question.endings[0]) == expected
        assert question.sizes == [size, 1, 1, 1]


def test_spaces_at_a_contexts_end_are_scored_with_the_ending():
    gpt2 = gpt2s()
    example = EXAMPLE | {"activity_label": "A", "ctx_a": "Sit [step]", "ctx_b": ""}
    example["endings"] = ["up", "[x] up", "a", "b"]
    context, endings, *_ = render_harness(example, gpt2)
    assert gpt2.decode(context) == "A: Sit"
    assert endings[0] == gpt2.encode_ordinary(" ") + gpt2.encode_ordinary(" up")
    assert [gpt2.decode(e) for e in endings] == ["  up", "   up", "  a", "  b"]


# ---- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_losses_are_those_of_one_ending_a_row(two, batch_size):
    model, other = two
    questions = some_questions(40)
    for start in range(0, 40, batch_size):
        batch = questions[start : start + batch_size]
        sums, hits = score(model, batch)
        for question, losses, all_hits in zip(batch, sums, hits, strict=True):
            expected, expected_hits = plain_scores(other, *question[:2])
            assert losses == pytest.approx(expected, rel=1e-5, abs=1e-4)
            assert all_hits == expected_hits


def test_endings_whose_every_token_is_the_likeliest_are_known(two):
    model, other = two
    idx = torch.tensor([[1, 2, 3]])
    greedy = other.generate(idx, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    almost = [*greedy[:8], 1 + greedy[8]]
    question = Question([1, 2, 3], [greedy, almost, greedy[:1], [5, *greedy[1:]]], [1] * 4, 0)
    assert score(model, [question])[1] == [[True, False, True, False]]


def test_an_ending_does_not_know_of_the_others(two):
    model, _ = two
    for question in some_questions(12):
        before, _ = score(model, [question])
        for k in range(4):
            endings = list(question.endings)
            endings[k] = [7] * 9 + endings[k][:20]
            after, _ = score(model, [question._replace(endings=endings)])
            for i in range(4):
                same = after[0][i] == pytest.approx(before[0][i], rel=1e-5)
                assert same == (i != k)
        same = [question.endings[0]] * 4
        losses = score(model, [question._replace(endings=same)])[0][0]
        assert losses == pytest.approx([before[0][0]] * 4, rel=1e-5)  # wherever they stand


def test_what_pads_a_row_does_not_matter(two, monkeypatch):
    model, _ = two
    questions, lay_out = some_questions(9), hellaswag.lay_out
    expected = score(model, questions)

    def filled(questions):
        batch = lay_out(questions)
        for row, (context, endings, *_) in enumerate(questions):
            n = len(context) + sum(len(e) - 1 for e in endings)
            assert batch.tokens.size(1) >= n
            batch.tokens[row, n:] = 77
            batch.pos[row, n:] = 5
        return batch

    monkeypatch.setattr(hellaswag, "lay_out", filled)
    assert score(model, questions) == expected


def test_the_context_is_computed_once_and_the_head_for_endings_alone(two):
    model, _ = two
    question = Question([1] * 50, [[2] * 5] * 4, [5] * 4, 0)
    shapes = []
    hooks = [
        model.transformer.wte.register_forward_hook(lambda _, x, y: shapes.append(y.shape)),
        model.lm_head.register_forward_hook(lambda _, x, y: shapes.append(y.shape[:-1])),
    ]
    score(model, [question] * 3)
    for hook in hooks:
        hook.remove()
    assert shapes[0][0] == 3 and 66 <= shapes[0][1] <= 50 + 4 * 5 + 15
    assert shapes[1:] == [(3 * 20,)]


def test_choices_are_those_of_one_example_at_a_time(two):
    model, other = two
    examples = some_examples(61)
    expected = plain_counts(other, examples)
    for batch_size in (0, 1, 4, 61):
        counts = evaluate(model, prepare(examples, BYTES, 96), batch_size=batch_size)
        assert counts == expected
    assert 0 < expected[1] < 61 and 0 < expected[2] < 61 and expected[1] != expected[2]


def test_the_harness_divides_by_characters(two):
    model, other = two
    rng = random.Random(0)
    examples = []
    for _ in range(60):  # Ω has two bytes
        endings = ["".join(rng.choices("abΩ", k=rng.randint(5 + k, 14))) for k in range(4)]
        rng.shuffle(endings)
        examples.append({"ctx": ": a", "label": rng.randrange(4), "endings": endings})
    questions = prepare([e | {"ctx": "a"} for e in examples], BYTES, 96, render_harness)
    expected = plain_counts(other, examples, lambda endings: [*map(len, endings)])
    assert evaluate(model, questions) == expected
    for size in (lambda e: len(e.encode()), lambda e: len(e.encode()) + 1):  # bytes, tokens
        assert expected != plain_counts(other, examples, lambda es, size=size: [*map(size, es)])


def uniform():
    """A model that prefers nothing: every token costs ln 257 anywhere."""
    model = GPT(Config(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=257))
    for p in model.parameters():
        p.data.zero_()
    return model


def test_a_model_that_prefers_nothing_by_formulas():
    model = uniform()
    sums, _ = score(model, [render(EXAMPLE, BYTES)])
    assert sums[0] == pytest.approx([n * math.log(257) for n in (10, 4, 7, 4)])
    endings = {"sum": ["long one", "short", "longer yet", "shirt"], "mean": ["é", "abc", "é", "d"]}
    for label in range(4):
        # the shortest has the least sum; at equal means, as at equal sums, the first is taken
        example = {"ctx": "a", "label": label, "endings": endings["sum"]}
        counts = evaluate(model, prepare([example], BYTES, 64))
        assert counts == (1, label == 1, label == 0)
        # é has two tokens in one character, and each ending its space: (4/3, 2/1, 3/1) ln 257
        example["endings"] = endings["mean"]
        counts = evaluate(model, prepare([example], BYTES, 64, render_harness))
        assert counts == (1, label == 3, label == 1)
        # nothing is left of an ending: its one token, the space, is the least, by no characters
        example["endings"] = ["[a]", "b c", "d", "e"]
        counts = evaluate(model, prepare([example], BYTES, 64, render_harness))
        assert counts == (1, label == 0, label == 1)


@pytest.mark.parametrize("n, right", [(10, 3), (10_042, 2871), (7, 7), (5, 0)])
def test_standard_errors_are_those_of_a_sample(n, right):
    values = [1] * right + [0] * (n - right)
    expected = np.std(values, ddof=1) / math.sqrt(n)
    assert hellaswag.with_error(right / n, n) == f"{right / n:.4f} (se {expected:.4f})"


def test_counts_print_scores_with_errors():
    assert Counts(4, 1, 3).acc == 0.25 and Counts(4, 1, 3).acc_norm == 0.75
    text = str(Counts(10, 3, 5))  # sqrt(0.3 · 0.7 / 9), sqrt(0.5 · 0.5 / 9)
    assert text == "acc 0.3000 (se 0.1528) acc_norm 0.5000 (se 0.1667) on 10 examples"
    assert str(Counts(1, 1, 0)).startswith("acc 1.0000 (se 0.0000)")


@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_ranks_share_the_examples_out(two, world_size):
    model, _ = two
    questions = prepare(some_examples(20), BYTES, 96)
    whole = evaluate(model, questions)
    shares = [
        evaluate(model, questions, batch_size=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert tuple(map(sum, zip(*shares, strict=True))) == whole
    assert max(s.num_total for s in shares) - min(s.num_total for s in shares) <= 1


def test_the_mode_is_left_as_found_and_autocast_is_entered_anew(two):
    model, entered = two[0], []
    questions = prepare(some_examples(5), BYTES, 96)

    class Recorder(nullcontext):
        def __enter__(self):
            entered.append(model.training)

    expected = evaluate(model, questions)
    for mode in (True, False):
        model.train(mode)
        assert evaluate(model, questions, batch_size=2, autocast=Recorder()) == expected
        assert model.training == mode
    assert entered == [False] * 6


def test_scores_come_with_their_questions(two):
    model, other = two
    questions = prepare(some_examples(7), BYTES, 96)
    results = list(hellaswag.scores(model, questions, batch_size=3))
    assert [question for question, *_ in results] == questions
    for question, sums, _ in results:
        assert sums == pytest.approx(plain_scores(other, *question[:2])[0], rel=1e-5)


def test_autocast_moves_losses_a_little(two):
    model, questions = two[0], some_questions(8)
    plain = [sums for _, sums, _ in hellaswag.scores(model, questions)]
    how = {"autocast": torch.autocast("cpu", torch.bfloat16)}
    rounded = [sums for _, sums, _ in hellaswag.scores(model, questions, **how)]
    assert rounded != plain
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(plain), rtol=0.03, atol=0.3)


def test_the_longest_come_first_and_none_is_lost():
    examples = some_examples(30)
    questions = prepare(examples, BYTES, 96)
    sizes = [len(q.context) + sum(map(len, q.endings)) for q in questions]
    assert sizes == sorted(sizes, reverse=True)
    assert sorted(questions) == sorted(render(e, BYTES) for e in examples)


def test_long_contexts_lose_their_beginning():
    example = EXAMPLE | {"ctx": "x" * 100 + EXAMPLE["ctx"]}
    question = render(EXAMPLE, BYTES)
    # the longest ending takes 10
    assert prepare([example], BYTES, 16) == [question._replace(context=[*b"at sat"[-6:]])]
    assert prepare([example], BYTES, 11)[0].context == [*b"t"]
    with pytest.raises(SystemExit, match="block_size 10 has no room.*on a mat"):
        prepare([EXAMPLE, example], BYTES, 10)
    # they fill the positions to the last
    model = GPT(Config(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=257))
    seen = []
    model.transformer.wpe.register_forward_pre_hook(lambda _, x: seen.append(x[0].max().item()))
    assert evaluate(model, prepare([example], BYTES, 16)).num_total == 1
    assert seen == [14]  # the last token is predicted, and predicts nothing


class Folded:
    """GPT-2's tokens, taken as numbers below 509: examples as long as GPT-2's, a small network."""

    def __init__(self):
        self.gpt2 = gpt2s()

    def encode_ordinary(self, text):
        return [token % 509 for token in self.gpt2.encode_ordinary(text)]


def test_choices_on_the_whole_validation_set(tmp_path, monkeypatch):
    """They are those of one example at a time, but where two endings are as good as equal."""
    path = SHARED / "hellaswag_val.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    examples = hellaswag.load(path)
    assert len(examples) == 10042
    assert min(Counter(e["label"] for e in examples).values()) > 2400
    encoding = Folded()
    model, other = twins(tmp_path, n_layer=1, n_embd=16, block_size=128, vocab_size=509)
    scores, found = hellaswag.scores, {}

    def recorded(*args, **how):
        for question, *results in scores(*args, **how):
            found[str(question[:2])] = results[0]
            yield question, *results

    monkeypatch.setattr(hellaswag, "scores", recorded)
    counts = evaluate(model, prepare(examples, encoding, 128))
    expected, ties = [10042, 0, 0], [0, 0, 0]
    for example in examples:
        endings = [encoding.encode_ordinary(" " + e) for e in example["endings"]]
        # a few are too long: what is left of the context fills the positions
        context = encoding.encode_ordinary(example["ctx"])[max(map(len, endings)) - 128 :]
        sums, (plain, _) = found[str((context, endings))], plain_scores(other, context, endings)
        for k, sizes in ((1, [1] * 4), (2, [*map(len, endings)])):
            means = [loss / size for loss, size in zip(plain, sizes, strict=True)]
            expected[k] += first_least(means) == example["label"]
            least, second, *_ = sorted(means)
            ties[k] += second - least < 1e-5 * least
            if second - least >= 1e-5 * least:
                chosen = first_least([a / size for a, size in zip(sums, sizes, strict=True)])
                assert chosen == first_least(means), example
    print(f"of 10,042 examples, ties by sum and by mean: {ties[1:]}")
    assert max(ties) < 20
    assert all(abs(a - b) <= n for a, b, n in zip(counts, expected, ties, strict=True))
    assert 2000 < counts.num_correct < 3100  # random weights guess


# ---- the file ------------------------------------------------------------------------------------

WRONG = [{"label": 4}, {"label": -1}, {"label": "1"}, {"label": True}, {"ctx": ""}, {"ctx": None}]
WRONG += [{"endings": endings} for endings in (["a", "b", "c"], "abcd", ["a", "b", "c", 4], None)]
WRONG += [{"activity_label": 7}, {"ctx_a": None}, {"ctx_b": ["a"]}]
LINES = [b"{", b"[]", b"7", b"\xff", b"", json.dumps({"ctx": "a", "label": 0}).encode()]
LINES += [b"[" * 10**5, b"null"]


@pytest.mark.parametrize("line", LINES + [json.dumps(EXAMPLE | w).encode() for w in WRONG])
def test_load_names_the_bad_line(tmp_path, line):
    good = json.dumps(EXAMPLE).encode()
    (tmp_path / "val.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(SystemExit, match=r"val\.jsonl, line 2: not an example"):
        hellaswag.load(tmp_path / "val.jsonl")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"val\.jsonl is empty"):
        hellaswag.load(tmp_path / "val.jsonl")


def test_load_downloads_once_and_only_the_known_file(tmp_path, monkeypatch):
    body = (json.dumps(EXAMPLE) + "\n").encode() * 3
    served = {"/good": body, "/broken": body, "/page": b"<html>sign in first</html>"}
    served |= {"/short": body[: len(body) // 3], "/other": body.replace(b"cat", b"dog")}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in served:
                return self.send_error(404)
            data = served[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            # a connection that breaks at a line's end: what came is valid, yet not all
            self.wfile.write(data[: len(body) // 3] if self.path == "/broken" else data)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(body).hexdigest())
    path = tmp_path / "new" / "val.jsonl"
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name in ("/broken", "/page", "/short", "/other", "/nothing"):
            monkeypatch.setattr(hellaswag, "URL", address + name)
            with pytest.raises(SystemExit, match=address + name) as error:
                hellaswag.load(path)
            assert "\n" not in str(error.value) and "by hand" in str(error.value)
            assert not path.parent.exists() or not list(path.parent.iterdir())
        monkeypatch.setattr(hellaswag, "URL", address + "/good")
        assert hellaswag.load(path) == [EXAMPLE] * 3
        server.shutdown()
    assert [file.name for file in path.parent.iterdir()] == ["val.jsonl"]
    assert path.read_bytes() == body
    assert hellaswag.load(path) == [EXAMPLE] * 3  # the server is gone
    # a file that is there already was put there by somebody: any examples will do
    path.write_text(json.dumps(EXAMPLE))
    assert hellaswag.load(path) == [EXAMPLE]


def test_load_without_network(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise hellaswag.urllib.error.URLError("no route to host")

    monkeypatch.setattr(hellaswag.urllib.request, "urlopen", no_network)
    with pytest.raises(SystemExit) as error:
        hellaswag.load(tmp_path / "val.jsonl")
    message = str(error.value)
    assert hellaswag.URL in message and str(tmp_path / "val.jsonl") in message
    assert "\n" not in message and not list(tmp_path.iterdir())


def test_made_examples():
    documents = [file.read_text() for file in (Path(json.__file__), Path(os.__file__))]
    documents += ["too short", "é " * 500]
    examples = hellaswag.make_examples(documents, 800, seed=3)
    assert examples == hellaswag.make_examples(documents, 800, seed=3)
    assert examples != hellaswag.make_examples(documents, 800, seed=4)
    for example in examples:
        endings, true = example["endings"], example["endings"][example["label"]]
        assert any(f"{example['ctx']} {true}" in document for document in documents)
        assert len(set(endings)) == 4 and len(example["ctx"].encode()) == 112
        assert all(len(ending.encode()) == 15 for ending in endings)
        assert all(any(f"\n {ending}" in document for document in documents) for ending in endings)
    assert all(150 < count < 250 for count in Counter(e["label"] for e in examples).values())
    lines = "\n".join(map(json.dumps, examples)).encode()
    assert hellaswag.parse(lines, "made") == examples
    for question in prepare(examples, BYTES, 128):  # nothing is cut
        assert len(question.context) + len(question.endings[0]) == 128
    with pytest.raises(SystemExit, match="fewer than four passages"):
        hellaswag.make_examples(["too short", "é " * 500, ""], 5)


# ---- as a program --------------------------------------------------------------------------------


def test_importing_does_nothing(tmp_path):
    code = "import sys, hellaswag; assert not {'train_gpt2', 'fineweb'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path):
    model, other = twins(tmp_path / "model" / "hf")  # as a run's folder has it
    examples = some_examples(6)
    lines = "".join(json.dumps(example) + "\n" for example in examples)
    (tmp_path / "val.jsonl").write_text(lines)

    def run(*arguments):
        command = [sys.executable, str(ROOT / "hellaswag.py"), "--device", "cpu", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run("--model", "model", "--file", "val.jsonl", "--batch_size", "2", "--limit", "5")
    assert done.returncode == 0, done.stderr
    lecture = Counts(*plain_counts(other, examples[:5]))
    examples = [e | {"ctx": f": {e['ctx']}"} for e in examples[:5]]
    harness = Counts(*plain_counts(other, examples, lambda endings: [*map(len, endings)]))
    assert done.stdout == (
        f"model, HellaSwag as the lecture has it: {lecture}\n"
        f"model, HellaSwag as the harness has it: {harness}\n"
    )
    done = run("--model", "model", "--file", ".")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Is a directory" in done.stderr

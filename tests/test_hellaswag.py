"""hellaswag.py compared with transformers, with the harness's formulas and with values computed by
hand. No network: downloads come from a server on this machine."""

import hashlib
import http.server
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

import hellaswag
from fineweb import get_encoding
from hellaswag import Counts, evaluate, get_sum_loss, iterate_examples, prepare, render_example
from train_gpt2 import GPT, GPTConfig

ROOT = Path(hellaswag.__file__).parent
VALIDATION_SET = ROOT.parent / "shared" / "data" / "hellaswag_val.jsonl"
BYTES = get_encoding("bytes")  # one token per byte
EXAMPLE = {"ctx": "The cat sat", "endings": ["on a mat.", "up.", "in ink", "é!"], "label": 2}
WAYS = ["lecture", "harness"]


@pytest.fixture(scope="module")
def gpt2():
    try:
        return get_encoding("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))


def new_models(folder, **sizes):
    """A small model and the same weights in transformers, large enough for non-uniform losses."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 96, "vocab_size": 257} | sizes
    torch.manual_seed(1)
    model = GPT(GPTConfig(**sizes, dropout=0.3))
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            p.normal_(mean, std=0.2)
    model.save_pretrained(folder)
    return model.eval(), GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return new_models(tmp_path_factory.mktemp("hf"))


def random_examples(count):
    """Contexts and endings of many lengths. Some letters have more than one byte."""
    rng = random.Random(0)
    words = ["red", "blue", "[b] green", "grey", "a", "p(i)nk", "naïve", "Ω", "  two"]
    examples = []
    while len(examples) < count:
        ctx, *endings = (" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(5))
        if len(set(endings)) == 4:
            example = {"ctx": ctx, "endings": endings, "label": rng.randrange(4)}
            examples.append(example | rng.choice([{}, {"activity_label": "Art"}]))
    return examples


# ---- an independent evaluation -------------------------------------------------------------------


def preprocess(text):
    """lm_eval/tasks/hellaswag/utils.py removes brackets this way."""
    text = text.strip().replace(" [title]", ". ")
    while match := re.search(r"\[[^\n\]]*\]", text):  # brackets that close on the same line
        text = text[: match.start()] + text[match.end() :]
    return text.replace("  ", " ")


def expected_parts(example, encode, way):
    """Context tokens and, for each ending, its tokens and its length."""
    if way == "lecture":
        endings = [encode(" " + ending) for ending in example["endings"]]
        return encode(example["ctx"]), endings, [len(ending) for ending in endings]
    context = example["ctx"]
    if "ctx_b" in example:
        context = example["ctx_a"] + " " + example["ctx_b"].capitalize()
    context = preprocess(example.get("activity_label", "") + ": " + context)
    choices = [preprocess(ending) for ending in example["endings"]]
    # lm_eval.api.model.TemplateLM._encode_pair moves spaces to the continuation
    spaces = re.search(r"\s*$", context).group()
    context = context.removesuffix(spaces)
    n = len(encode(context))
    endings = [encode(context + spaces + " " + choice)[n:] for choice in choices]
    return encode(context), endings, [len(choice) for choice in choices]


@torch.no_grad()
def expected_losses(other, context, endings):
    """The summed loss of each ending, computed by transformers with one ending per call."""
    losses = []
    for ending in endings:
        log_probs = other(torch.tensor([context + ending])).logits[0].log_softmax(dim=-1)
        losses.append(-sum(log_probs[len(context) - 1 + i, t].item() for i, t in enumerate(ending)))
    return losses


def expected_counts(other, examples, encode, way):
    """The same as evaluate(), one example at a time."""
    num_correct = num_correct_norm = 0
    for example in examples:
        context, endings, sizes = expected_parts(example, encode, way)
        losses = expected_losses(other, context, endings)
        num_correct += int(np.argmin(losses) == example["label"])
        num_correct_norm += int(np.argmin(np.divide(losses, sizes)) == example["label"])
    return num_correct, num_correct_norm, len(examples)


# ---- rendering -----------------------------------------------------------------------------------


def test_the_lectures_rendering_by_hand():
    tokens, mask, sizes, label = render_example(EXAMPLE | {"activity_label": "x"}, BYTES)
    texts = ["The cat sat on a mat.", "The cat sat up.", "The cat sat in ink", "The cat sat é!"]
    assert [bytes(row).rstrip(b"\0").decode() for row in tokens.tolist()] == texts
    assert tokens.shape == mask.shape == (4, 21) and tokens.dtype == mask.dtype == torch.int64
    assert sizes.tolist() == [10, 4, 7, 4] and label == 2  # é has two bytes
    for row, size in zip(mask.tolist(), [10, 4, 7, 4], strict=True):
        assert row == [0] * 11 + [1] * size + [0] * (10 - size)


def test_the_harnesss_rendering_by_hand():
    contexts = {  # by lm_eval/tasks/hellaswag/utils.py
        ("Roofing", "A man is on a roof.", "he"): "Roofing: A man is on a roof. He",
        ("Roofing", "A man is on a roof.", ""): "Roofing: A man is on a roof.",
        ("TV", "She waits.", "the CD of Bob"): "TV: She waits. The cd of bob",
        ("Food", "[header] How to eat [title] Sit.", ""): "Food: How to eat. Sit.",
        ("Food", "Eat [title] Sit   down.", "[step] now"): "Food: Eat. Sit  down. now",
        ("Food", "[step] Chew [substeps] a [b] c", ""): "Food: Chew a c",
    }
    for (activity_label, ctx_a, ctx_b), expected in contexts.items():
        fields = {"activity_label": activity_label, "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": "unused"}
        tokens, mask, _, _ = render_example(EXAMPLE | fields, BYTES, "harness")
        assert bytes(tokens[0][: mask[0].argmax()].tolist()).decode() == expected
    endings = {  # the scored text, and the number of its characters without the first space
        "eats.": (" eats.", 5),
        " eats twice. ": (" eats twice.", 11),
        "[step] Chew [title] Sit": ("  Chew. Sit", 10),
        "a   b    c": (" a  b  c", 7),
        "naïve [x] café": (" naïve café", 10),
        "[title]": (" ", 0),
    }
    for ending, (expected, size) in endings.items():
        example = EXAMPLE | {"endings": [ending, "b", "c", "d"]}
        tokens, mask, sizes, _ = render_example(example, BYTES, "harness")
        assert bytes(tokens[0][mask[0] == 1].tolist()).decode() == expected
        assert sizes.tolist() == [size, 1, 1, 1]


@pytest.mark.parametrize("way", WAYS)
def test_rendering_equals_the_formulas_with_gpt2s_tokens(gpt2, way):
    examples = random_examples(200)
    # Spaces at the end of a context, and text that spells a special token.
    examples.append(EXAMPLE | {"ctx": "Sit [step]", "activity_label": "A"})
    examples.append(EXAMPLE | {"ctx": "<|endoftext|> is", "endings": ["<|endoftext|>", *"abc"]})
    examples.append(EXAMPLE | {"activity_label": "A", "ctx_a": "One [x] two. ", "ctx_b": "iS it"})
    for example in examples:
        tokens, mask, sizes, label = render_example(example, gpt2, way)
        context, endings, lengths = expected_parts(example, gpt2.encode_ordinary, way)
        assert sizes.tolist() == lengths and label == example["label"]
        assert tokens.shape == (4, len(context) + max(map(len, endings)))
        for row, row_mask, ending in zip(tokens, mask, endings, strict=True):
            assert row[: len(context)].tolist() == context
            assert row[row_mask == 1].tolist() == ending
            assert row_mask.nonzero()[0].item() == len(context)
            assert not row[len(context) + len(ending) :].any()
    assert gpt2.eot_token not in tokens


@pytest.mark.parametrize("way", WAYS)
def test_prepare_sorts_by_length_and_keeps_every_example(way):
    examples = random_examples(30)
    rendered = prepare(iter(examples), BYTES, 128, way)
    sizes = [e.tokens.size(1) for e in rendered]
    assert sizes == sorted(sizes, reverse=True)
    expected = [render_example(example, BYTES, way).tokens.tolist() for example in examples]
    assert sorted(e.tokens.tolist() for e in rendered) == sorted(expected)


def test_long_contexts_are_truncated_on_the_left():
    example = EXAMPLE | {"ctx": "x" * 100 + EXAMPLE["ctx"]}
    [(tokens, mask, sizes, label)] = prepare([example], BYTES, 16)  # the longest ending takes 10
    texts = [bytes(row).rstrip(b"\0").decode() for row in tokens.tolist()]
    assert texts == ["at sat on a mat.", "at sat up.", "at sat in ink", "at sat é!"]
    assert mask.sum(dim=1).tolist() == sizes.tolist() == [10, 4, 7, 4] and label == 2
    [(tokens, *_)] = prepare([example], BYTES, 11)
    assert bytes(tokens[0].tolist()) == b"t on a mat."
    for block_size in (10, 5):
        with pytest.raises(SystemExit, match=f"block_size {block_size} leaves no context.*cat"):
            prepare([EXAMPLE, example], BYTES, block_size)


# ---- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_losses_equal_those_of_transformers(models, way):
    model, other = models
    for example in random_examples(40):
        tokens, mask, _, _ = render_example(example, BYTES, way)
        with torch.no_grad():
            found = get_sum_loss(model, tokens, mask)
        context, endings, _ = expected_parts(example, BYTES.encode_ordinary, way)
        expected = expected_losses(other, context, endings)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_choices_equal_those_of_transformers_for_every_batch_size(models, way):
    model, other = models
    examples = random_examples(61)
    expected = expected_counts(other, examples, BYTES.encode_ordinary, way)
    rendered = prepare(examples, BYTES, 96, way)
    for batch_size in (1, 4, 16, 100):
        assert evaluate(model, rendered, batch_size=batch_size) == expected
    assert 0 < expected[0] < 61 and 0 < expected[1] < 61 and expected[0] != expected[1]


@pytest.mark.parametrize("way", WAYS)
def test_choices_on_real_examples(tmp_path, gpt2, way):
    if not VALIDATION_SET.exists():
        pytest.skip(f"{VALIDATION_SET} does not exist")
    examples = list(iterate_examples(VALIDATION_SET))
    assert len(examples) == 10_042
    examples = examples[::250]
    model, other = new_models(tmp_path, n_layer=1, block_size=256, vocab_size=50257)
    expected = expected_counts(other, examples, gpt2.encode_ordinary, way)
    assert evaluate(model, prepare(examples, gpt2, 256, way)) == expected
    assert 2 < expected[0] < 25 and 2 < expected[1] < 25  # random weights guess


def test_padding_and_other_rows_do_not_change_losses(models):
    model, (tokens, mask, _, _) = models[0], render_example(EXAMPLE, BYTES)
    with torch.no_grad():
        expected = get_sum_loss(model, tokens, mask)
        padding = torch.full((4, 40), 77)
        tokens, mask = torch.cat([tokens, padding], 1), torch.cat([mask, 0 * padding], 1)
        tokens[1, 15:] = 200  # after the end of " up."
        torch.testing.assert_close(get_sum_loss(model, tokens, mask), expected)
        for i in range(4):
            alone = get_sum_loss(model, tokens[i : i + 1], mask[i : i + 1])
            torch.testing.assert_close(alone, expected[i : i + 1])


def test_the_head_runs_at_scored_positions_only(models):
    model, shapes = models[0], []
    hook = model.lm_head.register_forward_hook(lambda _, x, y: shapes.append(x[0].shape))
    evaluate(model, prepare([EXAMPLE] * 3, BYTES, 96))
    hook.remove()
    assert shapes == [(3 * (10 + 4 + 7 + 4), 32)]


def test_a_uniform_model_by_formulas():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=257))
    for p in model.parameters():
        p.data.zero_()  # every token costs ln 257
    tokens, mask, _, _ = render_example(EXAMPLE, BYTES)
    with torch.no_grad():
        losses = get_sum_loss(model, tokens, mask)
    assert losses.tolist() == pytest.approx([n * math.log(257) for n in (10, 4, 7, 4)])
    for label in range(4):
        # The two shortest endings have the lowest sum, and all averages are equal: the first wins.
        example = {"ctx": "a", "endings": ["long one", "short", "longer", "shirt"], "label": label}
        assert evaluate(model, prepare([example], BYTES, 64)) == (label == 1, label == 0, 1)
        # Tokens per character: é has two bytes, and every ending a space: 3/1, 4/3, 3/1, 2/1.
        example["endings"] = ["é", "abc", "é", "d"]
        counts = evaluate(model, prepare([example], BYTES, 64, "harness"))
        assert counts == (label == 3, label == 1, 1)
        # The clean-up leaves only the space of the first ending: lowest sum, infinite average.
        example["endings"] = ["[a]", "b c", "d", "e"]
        counts = evaluate(model, prepare([example], BYTES, 64, "harness"))
        assert counts == (label == 0, label == 1, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_the_shares_of_all_ranks_add_up(models, world_size):
    model, rendered = models[0], prepare(random_examples(20), BYTES, 96)
    shares = [evaluate(model, rendered, rank, world_size, 3) for rank in range(world_size)]
    totals = [share.num_total for share in shares]
    assert Counts(*map(sum, zip(*shares, strict=True))) == evaluate(model, rendered)
    assert sum(totals) == 20 and max(totals) - min(totals) <= 1
    assert all(type(value) is int for share in shares for value in share)


def test_the_training_mode_is_restored(models):
    model, rendered = models[0], prepare(random_examples(5), BYTES, 96)
    expected = evaluate(model, rendered)
    assert not model.training
    model.train()
    assert evaluate(model, rendered) == expected and model.training  # dropout was off
    model.eval()


def test_losses_under_autocast_are_close(models):
    model, (tokens, mask, _, _) = models[0], render_example(EXAMPLE, BYTES)
    with torch.no_grad():
        expected = get_sum_loss(model, tokens, mask)
        with torch.autocast("cpu", torch.bfloat16):
            found = get_sum_loss(model, tokens, mask)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.3)


def test_scores_are_printed_with_standard_errors():
    text = str(Counts(2871, 2967, 10_042))
    assert text == "acc 0.2859 (se 0.0045) acc_norm 0.2955 (se 0.0046) on 10,042 examples"
    for n, k in [(10, 3), (500, 125), (7, 7), (5, 0)]:
        values = [1] * k + [0] * (n - k)
        score = f"{np.mean(values):.4f} (se {np.std(values, ddof=1) / math.sqrt(n):.4f})"
        assert str(Counts(k, k, n)) == f"acc {score} acc_norm {score} on {n} examples"
    assert str(Counts(1, 0, 1)).startswith("acc 1.0000 (se 0.0000)")


# ---- the file of examples ------------------------------------------------------------------------

BAD_FIELDS = [{"label": label} for label in (4, -1, "1", True, 1.0, None)]
BAD_FIELDS += [{"ctx": ctx} for ctx in ("", None, 7)]
BAD_FIELDS += [{"endings": e} for e in (["a", "b", "c"], "abcd", ["a", "b", "c", 4], None, [])]
BAD_FIELDS += [{"activity_label": 7}, {"ctx_a": None}, {"ctx_b": ["a"]}]
BAD_LINES = [json.dumps(EXAMPLE | fields).encode() for fields in BAD_FIELDS]
BAD_LINES += [b"{", b"[]", b"7", b"null", b'"ctx"', b"\xff", b"", b"[" * 10**5, b'{"ctx": "a"}']


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_malformed_line_is_reported_with_its_number(tmp_path, line):
    good = json.dumps(EXAMPLE).encode()
    (tmp_path / "val.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    examples = iterate_examples(tmp_path / "val.jsonl")
    assert next(examples) == EXAMPLE
    with pytest.raises(SystemExit, match=r"val\.jsonl, line 2: expected JSON with 'ctx'") as error:
        next(examples)
    assert "\n" not in str(error.value)


def test_an_empty_file_and_a_folder_are_reported(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"val\.jsonl is empty"):
        list(iterate_examples(tmp_path / "val.jsonl"))
    with pytest.raises(SystemExit, match="cannot read the examples.*directory"):
        list(iterate_examples(tmp_path))


def test_download(tmp_path, monkeypatch):
    body = (json.dumps(EXAMPLE) + "\n").encode() * 3
    served = {"/good": body, "/broken": body, "/page": b"<html>sign in first</html>"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in served:
                return self.send_error(404)
            data = served[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            # This connection breaks at the end of a line: all lines that arrive are valid.
            self.wfile.write(data[: len(data) // 3] if self.path == "/broken" else data)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(body).hexdigest())
    path = tmp_path / "new" / "val.jsonl"
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        reasons = {"/broken": "IncompleteRead", "/page": "sha256", "/none": "404"}
        for name, reason in reasons.items():
            monkeypatch.setattr(hellaswag, "URL", address + name)
            with pytest.raises(SystemExit, match=f"{reason}.*fetch {address}{name} by hand") as e:
                list(iterate_examples(path))
            assert "\n" not in str(e.value) and not path.parent.exists()
        monkeypatch.setattr(hellaswag, "URL", address + "/good")
        assert list(iterate_examples(path)) == [EXAMPLE] * 3
        server.shutdown()
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == body
    # The server is gone. A file that exists is used, whatever its checksum.
    path.write_text(json.dumps(EXAMPLE))
    assert list(iterate_examples(path)) == [EXAMPLE]
    with pytest.raises(SystemExit, match="refused.*by hand"):
        hellaswag.download(tmp_path / "other.jsonl")


def test_make_examples():
    documents = [Path(module.__file__).read_text() for module in (json, os)]
    documents += ["too short", "é\n " * 500]
    examples = hellaswag.make_examples(documents, 800, seed=3)
    assert examples == hellaswag.make_examples(documents, 800, seed=3)
    assert examples != hellaswag.make_examples(documents, 800)
    for example in examples:
        ctx, endings = example["ctx"], example["endings"]
        correct = ctx + " " + endings[example["label"]]
        assert any(correct in document for document in documents)
        assert len(set(endings)) == 4 and len(ctx.encode()) == 112 and ctx[-1] == "\n"
        assert all(len(ending.encode()) == 15 for ending in endings)
        assert all(any(f"\n {ending}" in document for document in documents) for ending in endings)
    assert all(150 < n < 250 for n in Counter(e["label"] for e in examples).values())
    for e in prepare(examples, BYTES, 128):
        assert e.tokens.size(1) == 128 and e.sizes.tolist() == [16] * 4
        assert e.mask[:, :112].sum() == 0  # nothing was truncated
    with pytest.raises(SystemExit, match="3 held-out documents have fewer than 4 passages"):
        hellaswag.make_examples(["too short", "é\n " * 500, ""], 5)


# ---- the command line ----------------------------------------------------------------------------


def test_importing_has_no_side_effects(tmp_path):
    code = "import sys, hellaswag; assert not {'train_gpt2', 'fineweb', 'tyro'} & {*sys.modules}"
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path):
    _, other = new_models(tmp_path / "model")
    examples = random_examples(6)
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, examples)))

    def run(*arguments):
        command = [sys.executable, str(ROOT / "hellaswag.py"), "--device", "cpu", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run("--model", "model", "--file", "val.jsonl", "--batch_size", "2", "--limit", "5")
    assert done.returncode == 0, done.stderr
    for way, line in zip(WAYS, done.stdout.splitlines(), strict=True):
        counts = expected_counts(other, examples[:5], BYTES.encode_ordinary, way)
        assert line == f"HellaSwag ({way}) {Counts(*counts)}"
    for arguments in (["--model", "model", "--file", "."], ["--limit", "-1"]):
        done = run(*arguments)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr

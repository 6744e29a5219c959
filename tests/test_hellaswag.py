"""hellaswag.py against formulas, transformers, and itself cut up differently. No network."""

import http.server
import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import hellaswag
from fineweb import get_encoding

ROOT = Path(hellaswag.__file__).parent
SHARED = ROOT.parent / "shared" / "data"
BYTES = get_encoding("bytes")  # one token a byte: needs no vocabulary
EXAMPLE = {"ctx": "The cat sat", "endings": ["on a mat.", "up.", "in ink", "é!"], "label": 2}


class Scripted(torch.nn.Module):
    """Gives a logit of `weight` to the next token where `knows` the text so far, else 0 to all."""

    def __init__(self, knows=lambda text: False, weight=9.0):
        super().__init__()
        self.knows, self.weight, self.longest = knows, weight, 0

    def forward(self, idx):
        self.longest = max(self.longest, idx.size(1))
        logits = torch.zeros(*idx.shape, 257)  # (R, N, V)
        for row, tokens in enumerate(idx.tolist()):
            for t in range(len(tokens) - 1):
                if self.knows(bytes(tokens[: t + 2])):
                    logits[row, t, tokens[t + 1]] = self.weight
        return logits, None


class Wrapped(torch.nn.Module):
    """transformers' GPT-2, small and random, behind this project's forward."""

    def __init__(self, n_positions=96):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(1)
        config = transformers.GPT2Config(
            vocab_size=257, n_positions=n_positions, n_embd=32, n_layer=2, n_head=2
        )
        self.gpt = transformers.GPT2LMHeadModel(config)
        for p in self.gpt.parameters():
            p.data.mul_(8)  # far from uniform, so that the endings' losses differ

    def forward(self, idx):
        return self.gpt(idx).logits, None


def some_examples(count):
    """Contexts and endings of many lengths, labels in turn."""
    words = ["red", "blue", "green", "grey", "black", "white", "pink"]
    return [
        {"ctx": " ".join(words[: 1 + i % 7]), "label": i % 4}
        | {"endings": [" ".join(words[j : j + 1 + (i + j) % 3]) for j in range(4)]}
        for i in range(count)
    ]


def test_render_masks_exactly_the_endings():
    tokens, mask, label = hellaswag.render(EXAMPLE, BYTES)
    assert tokens.shape == mask.shape == (4, 11 + 10) and tokens.dtype == torch.int64 and label == 2
    for row, row_mask, ending in zip(tokens, mask, EXAMPLE["endings"], strict=True):
        assert bytes(row[row_mask.bool()].tolist()).decode() == " " + ending
        assert bytes(row.tolist()).rstrip(b"\0").decode() == "The cat sat " + ending
        assert not row_mask[:11].any()


def test_render_with_gpt2s_vocabulary():
    try:
        encoding = get_encoding("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))
    tokens, mask, _ = hellaswag.render(EXAMPLE | {"ctx": "<|endoftext|> is text"}, encoding)
    assert encoding.decode(tokens[0].tolist()).startswith("<|endoftext|> is text on a mat.")
    assert (
        encoding.eot_token not in tokens and encoding.decode(tokens[1][mask[1]].tolist()) == " up."
    )


def test_score_by_hand():
    # probabilities 1/4 and 3/4 of two tokens at every position; three positions, two rows
    logits = torch.tensor([0.0, math.log(3)]).repeat(2, 3, 1)
    tokens = torch.tensor([[0, 0, 1], [0, 1, 1]])
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    sum_loss, mean_loss = hellaswag.score(logits, tokens, mask)
    both = math.log(4) + math.log(4 / 3)
    assert sum_loss.tolist() == pytest.approx([both, math.log(4 / 3)])
    assert mean_loss.tolist() == pytest.approx([both / 2, math.log(4 / 3)])
    assert hellaswag.score(logits.bfloat16(), tokens, mask)[0].dtype == torch.float32


def test_what_pads_a_row_does_not_matter():
    model = Wrapped().eval()
    tokens, mask, _ = hellaswag.render(EXAMPLE, BYTES)
    is_padding = mask.flip(1).int().cummax(1).values.flip(1) == 0  # nothing masked from here on
    other = tokens.masked_fill(is_padding, 77)
    assert is_padding.any()
    with torch.no_grad():
        logits = model(tokens)[0]
        torch.testing.assert_close(
            hellaswag.score(logits, tokens, mask), hellaswag.score(model(other)[0], other, mask)
        )
    logits[is_padding] = math.nan
    assert torch.isfinite(hellaswag.score(logits, tokens, mask)[0]).all()


def test_evaluate_agrees_with_transformers_one_ending_at_a_time():
    model, examples = Wrapped().eval(), some_examples(21)
    right = right_norm = 0
    for example in examples:
        losses = []
        for ending in example["endings"]:
            context, whole = example["ctx"].encode(), f"{example['ctx']} {ending}".encode()
            idx = torch.tensor([list(whole)])
            labels = idx.clone()
            labels[:, : len(context)] = -100  # transformers ignores these
            with torch.no_grad():
                mean = model.gpt(idx, labels=labels).loss.item()
            losses.append((mean * (len(whole) - len(context)), mean))
        best, best_norm = (min(range(4), key=lambda i: losses[i][k]) for k in (0, 1))  # noqa: B023
        right += best == example["label"]
        right_norm += best_norm == example["label"]
    for batch_size in (1, 4, 21):
        counts = hellaswag.evaluate(model, examples, BYTES, 96, "cpu", batch_size)
        assert counts == (21, right, right_norm)
    assert 0 < right_norm < 21


@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_ranks_share_the_examples_out(world_size):
    model, examples = Wrapped(), some_examples(20)
    whole = hellaswag.evaluate(model, examples, BYTES, 96, "cpu")
    shares = [
        hellaswag.evaluate(model, examples, BYTES, 96, "cpu", 3, rank, world_size)
        for rank in range(world_size)
    ]
    assert tuple(map(sum, zip(*shares, strict=True))) == whole
    assert max(s.num_total for s in shares) - min(s.num_total for s in shares) <= 1


def test_models_with_a_known_score():
    examples = some_examples(12)
    truths = {f"{e['ctx']} {e['endings'][e['label']]}".encode() for e in examples}
    knows = Scripted(lambda text: any(truth.startswith(text) for truth in truths), weight=50.0)
    same_length = [e | {"endings": ["same", "size", "four", "ways"]} for e in examples]
    # no ending is preferred: the first is taken, right for every fourth label
    assert hellaswag.evaluate(Scripted(), same_length, BYTES, 64, "cpu") == (12, 3, 3)
    same_length = [e | {"endings": [f"{i}{j}xy" for j in range(4)]} for i, e in enumerate(examples)]
    truths |= {f"{e['ctx']} {e['endings'][e['label']]}".encode() for e in same_length}
    counts = hellaswag.evaluate(knows, same_length, BYTES, 64, "cpu")
    assert counts == (12, 12, 12) and counts.acc == counts.acc_norm == 1.0
    text = str(hellaswag.Counts(10042, 2871, 2967))  # sqrt(0.2859 · 0.7141 / 10042) = 0.0045
    assert text == "acc 0.2859 (se 0.0045) acc_norm 0.2955 (se 0.0046) on 10042 examples"


def test_sums_and_means_can_disagree():
    # at nothing known, a token costs ln 257 anywhere: the sum prefers the short ending
    example = {"ctx": "a", "endings": ["bbbb", "c", "ddd", "eeee"], "label": 3}
    knows = Scripted(lambda text: text.startswith(b"a ee"), weight=4.0)
    assert hellaswag.evaluate(knows, [example], BYTES, 64, "cpu") == (1, 0, 1)


def test_the_mode_is_left_as_found_and_autocast_is_entered_anew():
    model, entered = Wrapped(), []

    class Recorder(nullcontext):
        def __enter__(self):
            entered.append(model.training)

    for mode in (True, False):
        model.train(mode)
        hellaswag.evaluate(model, some_examples(5), BYTES, 96, "cpu", 2, autocast=Recorder())
        assert model.training == mode
    assert entered == [False] * 6


def test_long_contexts_lose_their_beginning():
    example = EXAMPLE | {"ctx": "x" * 100 + EXAMPLE["ctx"]}
    seen = Scripted()
    hellaswag.evaluate(seen, [example], BYTES, 16, "cpu")
    assert seen.longest == 16
    cut = EXAMPLE | {"ctx": example["ctx"][-6:]}  # the longest ending takes the other 10
    model = Wrapped(16).eval()
    for label in range(4):
        assert hellaswag.evaluate(
            model, [example | {"label": label}], BYTES, 16, "cpu"
        ) == hellaswag.evaluate(model, [cut | {"label": label}], BYTES, 16, "cpu")
    assert hellaswag.evaluate(model, [example], BYTES, 11, "cpu").num_total == 1
    with pytest.raises(SystemExit, match="block_size 10 has no room"):
        hellaswag.evaluate(model, [example], BYTES, 10, "cpu")


WRONG = [{"label": 4}, {"label": -1}, {"label": "1"}, {"label": True}, {"ctx": ""}, {"ctx": None}]
WRONG += [{"endings": endings} for endings in (["a", "b", "c"], "abcd", ["a", "b", "c", 4], None)]
LINES = [b"{", b"[]", b"7", b"\xff", b"", json.dumps({"ctx": "a", "label": 0}).encode()]


@pytest.mark.parametrize("line", LINES + [json.dumps(EXAMPLE | w).encode() for w in WRONG])
def test_load_names_the_bad_line(tmp_path, line):
    good = json.dumps(EXAMPLE).encode()
    (tmp_path / "val.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(SystemExit, match=r"val\.jsonl, line 2: not an example"):
        hellaswag.load(tmp_path / "val.jsonl")


def test_load_downloads_once_and_only_whole_files(tmp_path, monkeypatch):
    body = (json.dumps(EXAMPLE) + "\n").encode() * 3
    served = {"/good": body, "/broken": body, "/page": b"<html>sign in first</html>"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = served[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            # a connection that breaks at a line's end: what came is valid, yet not all
            self.wfile.write(data[: len(body) // 3] if self.path == "/broken" else data)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    path = tmp_path / "new" / "val.jsonl"
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name in ("/broken", "/page"):
            monkeypatch.setattr(hellaswag, "URL", address + name)
            with pytest.raises(SystemExit, match=address + name):
                hellaswag.load(path)
            assert not path.parent.exists() or not list(path.parent.iterdir())
        monkeypatch.setattr(hellaswag, "URL", address + "/good")
        assert hellaswag.load(path) == [EXAMPLE] * 3
        server.shutdown()
    assert [file.name for file in path.parent.iterdir()] == ["val.jsonl"]
    assert hellaswag.load(path) == [EXAMPLE] * 3  # the server is gone


def test_load_without_network(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise hellaswag.urllib.error.URLError("no route to host")

    monkeypatch.setattr(hellaswag.urllib.request, "urlopen", no_network)
    with pytest.raises(SystemExit) as error:
        hellaswag.load(tmp_path / "val.jsonl")
    message = str(error.value)
    assert hellaswag.URL in message and str(tmp_path / "val.jsonl") in message
    assert "\n" not in message and not list(tmp_path.iterdir())


def test_the_real_validation_set():
    path = SHARED / "hellaswag_val.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    examples = hellaswag.load(path)
    assert len(examples) == 10042
    assert min(Counter(e["label"] for e in examples).values()) > 2400


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
    with pytest.raises(SystemExit, match="fewer than four passages"):
        hellaswag.make_examples(["too short", "é " * 500, ""], 5)


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
    Wrapped().gpt.save_pretrained(tmp_path / "model" / "hf")  # as a run's folder has it
    lines = "".join(json.dumps(example) + "\n" for example in some_examples(6))
    (tmp_path / "val.jsonl").write_text(lines)

    def run(*arguments):
        command = [sys.executable, str(ROOT / "hellaswag.py"), "--device", "cpu", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run("--model", "model", "--file", "val.jsonl", "--batch_size", "2", "--limit", "5")
    assert done.returncode == 0, done.stderr
    counts = hellaswag.evaluate(Wrapped(), some_examples(5), BYTES, 96, "cpu")
    assert done.stdout == f"model: {counts}\n"
    done = run("--model", "model", "--file", ".")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Is a directory" in done.stderr

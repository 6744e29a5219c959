"""--eval_only and what it prints, against transformers, formulas and EleutherAI's harness."""

import json
import math
import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import first_least, plain_scores, twins

import fineweb
import hellaswag
import train_gpt2
from fineweb import get_encoding
from inference import (
    TokenSums,
    WordSums,
    bytes_of_tokens,
    export,
    load_lambada,
    predict_words,
    render_lambada,
    sum_over_tokens,
)
from train_gpt2 import Config, Windows, main, parse_arguments, val_windows, validation_loss

SCRIPT = Path(train_gpt2.__file__).resolve()
BYTES = get_encoding("bytes")
TEXT = "The café sold 7 naïve Ωs – and 🙂 smiled; the naïve café smiled."
WORDS = [*TEXT.split(), "the", "of", "a", "Zürich", "日本"]


def gpt2s():
    """GPT-2's encoding, where it is to be had."""
    try:
        return get_encoding("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))


def some_text(n_words, seed) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def write_lines(path, records):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


# ---- LAMBADA -------------------------------------------------------------------------------------


def test_lambada_as_json_lines_and_as_text(tmp_path):
    texts = ["the end", "she said “no”, he said  maybe", "a b c"]
    expected = [("the", "end"), ("she said “no”, he said ", "maybe"), ("a b", "c")]
    expected = [{"context": context, "word": word} for context, word in expected]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert load_lambada(tmp_path / "a.txt") == load_lambada(tmp_path / "a.jsonl") == expected


BAD = [b"{", b"[]", b"null", b'"a b"', b'{"txt": "a b"}', b'{"text": 7}', b'{"text": "word"}']
BAD += [b'{"text": " word"}', b"", b"\xff\xfe", b'{"text": null}', b"[" * 10**5]


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_of_lambada_is_named(tmp_path, line):
    path, good = tmp_path / "bad.jsonl", b'{"text": "a good one"}'
    path.write_bytes(b"\n".join([good, good, line, good]))
    with pytest.raises(SystemExit, match=r"bad\.jsonl, line 3: no text of two words") as error:
        load_lambada(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", [b"word", b"", b" word", b"\xff \xfe"])
def test_a_bad_line_of_text_is_named(tmp_path, line):
    (tmp_path / "bad.txt").write_bytes(b"a good one\n" + line + b"\na good one\n")
    with pytest.raises(SystemExit, match=r"bad\.txt, line 2: no text of two words"):
        load_lambada(tmp_path / "bad.txt")


def test_a_file_of_lambada_that_is_empty_or_missing_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    for path, what in ((tmp_path / "a.txt", "is empty"), (tmp_path / "b.txt", "No such file")):
        with pytest.raises(SystemExit, match=f"{path.name}.*{what}") as error:
            load_lambada(path)
        assert "lambada_test.jsonl" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="Is a directory"):
        load_lambada(tmp_path)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same weights in this project's model and in transformers'."""
    return twins(tmp_path_factory.mktemp("hf"))


def test_last_words_are_predicted_as_by_transformers(two):
    model, other = two
    questions, nats, hits = [], [], []
    for i in range(30):
        context = [*some_text(1 + i % 4, seed=i).encode()]
        word = [*f" {WORDS[i % len(WORDS)]}".encode()]
        if i % 3 == 0:  # what the model itself would say
            idx = torch.tensor([context])
            with torch.no_grad():
                for _ in word:
                    likeliest = other(idx).logits[:, -1].argmax(dim=-1, keepdim=True)
                    idx = torch.cat((idx, likeliest), dim=1)
            word = idx[0, len(context) :].tolist()
            if i % 2:  # all but the last of its tokens
                word[-1] = (word[-1] + 1) % 256
        questions.append(hellaswag.Question(context, [word], [1], 0))
        (loss,), (hit,) = plain_scores(other, context, [word])
        nats.append(loss)
        hits.append(hit)
    assert sum(hits) == 5
    for batch_size in (0, 1, 7):
        sums = predict_words(model, questions, batch_size=batch_size)
        assert sums.words == 30 and sums.hits == 5
        assert sums.nats == pytest.approx(sum(nats), rel=1e-5)
    # the harness's formulas: exp of the mean, and the deviation of a sample
    perplexity, error = math.exp(np.mean(nats)), np.std(hits, ddof=1) / math.sqrt(30)
    sums = WordSums(30, sum(nats), 5)
    assert str(sums) == f"accuracy 0.1667 (se {error:.4f}) perplexity {perplexity:.2f} on 30 words"
    shares = [predict_words(model, questions, rank=rank, world_size=4) for rank in range(4)]
    whole = [sum(column) for column in zip(*shares, strict=True)]
    assert whole == pytest.approx(predict_words(model, questions), rel=1e-6)
    assert [share.words for share in shares] == [8, 8, 7, 7]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_a_last_word_is_all_tokens_from_its_space_on(name):
    encoding = gpt2s() if name == "gpt2" else BYTES
    for context, word in (
        ("She lives in", "Zürich"),
        ("a  b ", "naïve."),
        ("“no”,", "<|endoftext|>"),
    ):
        question = render_lambada({"context": context, "word": word}, encoding)
        assert question.context == encoding.encode_ordinary(context.rstrip())
        whole = question.context + question.endings[0]
        assert whole == encoding.encode_ordinary(f"{context} {word}")
        assert len(question.endings) == 1 and len(question.endings[0]) > 1


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, vocab_size", [("bytes", 257), ("gpt2", 50257), ("gpt2", 50304)])
def test_the_bytes_of_tokens_are_those_of_their_text(name, vocab_size):
    encoding = gpt2s() if name == "gpt2" else BYTES
    n_bytes = bytes_of_tokens(encoding, vocab_size)
    assert n_bytes.shape == (vocab_size,) and n_bytes.dtype == torch.int64
    for text in (TEXT, some_text(200, seed=1), "".join(map(chr, range(3000))), " \n\t  \r\n"):
        tokens = encoding.encode_ordinary(text)
        assert n_bytes[tokens].sum() == len(text.encode())
        assert n_bytes[tokens].min() > 0
    pieces = encoding.encode_ordinary("🙂")  # none of them is a text by itself
    assert len(pieces) > 1 and n_bytes[pieces].sum() == 4
    assert (n_bytes == 0).nonzero().flatten().tolist() == [*range(encoding.eot_token, vocab_size)]


def test_without_an_encoding_no_token_stands_for_bytes():
    assert bytes_of_tokens(None, 97).tolist() == [0] * 97


CONFIG = Config(block_size=16, vocab_size=257, val_tokens=16 * 21, micro_batch_size=4)


def sums_of(model, windows, n_bytes, indices, B=4):
    batches = (windows.stack(indices[i : i + B]) for i in range(0, len(indices), B))
    return sum_over_tokens(model, batches, n_bytes, nullcontext())


@pytest.mark.parametrize("name, vocab_size", [("bytes", 257), ("gpt2", 50257)])
def test_sums_over_tokens_are_those_of_transformers_and_of_the_text(tmp_path, name, vocab_size):
    encoding = gpt2s() if name == "gpt2" else BYTES
    model, other = twins(tmp_path / "hf", block_size=16, vocab_size=vocab_size, n_embd=16)
    documents = [some_text(12, seed=i) for i in range(250)]
    fineweb.write_shards(documents, tmp_path / "data", name, val_tokens=1000, workers=1)
    windows = Windows(tmp_path / "data", "val", 16, vocab_size)
    sums = sums_of(model, windows, bytes_of_tokens(encoding, vocab_size), range(21))

    (path,) = (tmp_path / "data").glob("*val*.npy")
    tokens = np.load(path)[: 16 * 21 + 1].astype(np.int64)  # the first 21 windows, and one more
    x, y = tokens[:-1].reshape(21, 16), tokens[1:].reshape(21, 16)
    with torch.no_grad():
        logits = other(torch.from_numpy(x)).logits.double().numpy()
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # logits are small
    nats = -np.take_along_axis(log_probs, y[..., None], axis=-1)[..., 0]
    assert sums.tokens == 21 * 16 and sums.loss == pytest.approx(nats.mean(), rel=1e-6)
    assert sums.hits == (logits.argmax(-1) == y).sum()
    assert sums.accuracy == (logits.argmax(-1) == y).mean()
    is_text = y != encoding.eot_token
    assert 0 < (~is_text).sum() < 30
    # what lies between the ends of texts, its first and last characters in pieces maybe
    text = b"".join(encoding.decode_bytes([t]) for t in y[is_text].tolist())
    bits = nats[is_text].sum() / math.log(2)
    assert sums.bits_per_byte == pytest.approx(bits / len(text), rel=1e-6)
    assert val_windows(windows, CONFIG) == 21
    expected = validation_loss(model, model, windows, CONFIG)
    assert sums.loss == pytest.approx(expected, rel=1e-6)


def test_characters_split_over_tokens_count_their_bytes_once(two):
    model, other = two
    tokens = [*"né 🙂".encode(), 256]
    x, y = torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]])
    model_sums = sum_over_tokens(model, [(x, y)], bytes_of_tokens(BYTES, 257), nullcontext())
    (loss,), _ = plain_scores(other, tokens[:1], [tokens[1:-1]])
    assert model_sums.text_bytes == len("é 🙂".encode()) == 7
    assert model_sums.bits_per_byte == pytest.approx(loss / math.log(2) / 7, rel=1e-6)
    assert model_sums.nats > model_sums.text_nats == pytest.approx(loss, rel=1e-6)


def test_accuracy_is_the_share_of_likeliest_tokens(two):
    model, other = two
    x = torch.randint(257, (6, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = torch.from_numpy(other(x).logits.numpy().argmax(-1))
    y[:, 20:] = (y[:, 20:] + 1) % 257
    sums = sum_over_tokens(model, [(x[:4], y[:4]), (x[4:], y[4:])], torch.ones(257), nullcontext())
    assert (sums.hits, sums.tokens, sums.accuracy) == (120, 300, 0.4)


@pytest.mark.parametrize("world_size", [2, 3, 30])
def test_ranks_token_sums_add_up_to_the_whole(tmp_path, two, world_size):
    documents = [some_text(12, seed=i) for i in range(60)]
    fineweb.write_shards(documents, tmp_path, "bytes", val_tokens=1000, workers=1)
    windows, n_bytes = Windows(tmp_path, "val", 16, 257), bytes_of_tokens(BYTES, 257)
    whole = sums_of(two[0], windows, n_bytes, range(21), B=21)
    parts = [
        sums_of(two[0], windows, n_bytes, range(rank, 21, world_size)) for rank in range(world_size)
    ]
    total = [sum(column) for column in zip(*parts, strict=True)]
    assert total == pytest.approx(whole, rel=1e-6)


def test_token_sums_print_what_there_is():
    # 3 nats a token; 2 bits a byte
    sums = TokenSums(2000, 6000, 500, 8 * math.log(2), 4)
    assert str(sums) == (
        "loss 3.0000 next-token accuracy 0.2500 bits per byte 2.0000 on 2,000 tokens"
    )
    sums = TokenSums(2000, 6000, 500, 0, 0)  # of a vocabulary without an encoding
    assert str(sums) == "loss 3.0000 next-token accuracy 0.2500 on 2,000 tokens"


# ---- the harness ---------------------------------------------------------------------------------


def harness_records():
    """HellaSwag's with all that its texts have, and endings of very different lengths."""
    rng = random.Random(3)
    words = "a the man roof café [title] [step] [substeps] NASA then. sits, up (now)  Ω".split(" ")
    records = []
    while len(records) < 24:
        a, *endings = (" ".join(rng.choices(words, k=rng.choice([1, 3, 9, 20]))) for _ in range(5))
        b = rng.choice(["", "", "the CD of Bob", "he", "[step] Sit down", "élan VITAL", " x  y"])
        label = rng.choice(["Roofing", "Food and Entertaining", "A: b"])
        record = {"activity_label": label, "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}".strip() or "x"}
        records.append(record | {"endings": endings, "label": rng.randrange(4)})
    records[0]["ctx_a"] = "[header] How to x [title] Do   it. [step] Now, [substeps]"
    records[1]["endings"] = ["[title] foo bar", "foo [title] bar", "naïve  café.", "“yes”"]
    records[2]["ctx_a"] = "Sit [step]"  # a space is left at the end
    return records


def test_the_numbers_are_the_harnesss(tmp_path):
    pytest.importorskip("lm_eval")
    gpt2 = gpt2s()
    model, other = twins(tmp_path / "twin", block_size=128, vocab_size=50257)
    export(model, tmp_path / "model", gpt2, "")
    records = harness_records()
    texts = [f"{r['ctx_a']} {r['endings'][0]}".strip() for r in records]
    # no <|endoftext|>: where a text spells it out, the harness takes it for the end of one
    texts = [text for text in texts if " " in text] + ["Two  spaces  here", "a “quoted word”"]
    for text in texts[:30]:  # some last words are what the model would say
        with torch.no_grad():
            logits = other(torch.tensor([gpt2.encode_ordinary(text)])).logits[0, -1]
        word = gpt2.decode([logits.argmax().item()])
        texts += [text + word] if re.fullmatch(r" \w+", word) else []
    write_lines(tmp_path / "hellaswag.jsonl", records)
    write_lines(tmp_path / "lambada.jsonl", [{"text": text} for text in texts])
    command = [sys.executable, str(Path(__file__).with_name("harness.py")), str(tmp_path / "model")]
    command += [f"hellaswag={tmp_path}/hellaswag.jsonl", f"lambada_openai={tmp_path}/lambada.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])

    metrics, samples = theirs["hellaswag"]
    examples = hellaswag.load(tmp_path / "hellaswag.jsonl")
    questions = hellaswag.prepare(examples, gpt2, 128, hellaswag.render_harness)
    counts = hellaswag.evaluate(model, questions)
    assert (counts.acc, counts.acc_norm) == (metrics["acc"], metrics["acc_norm"])
    assert 0.1 < counts.acc < 0.9 and 0.1 < counts.acc_norm < 0.9 and counts.acc != counts.acc_norm
    names = ("acc", "acc_norm")
    shares = (f"{n} {metrics[n]:.4f} (se {metrics[n + '_stderr']:.4f})" for n in names)
    assert str(counts) == f"{' '.join(shares)} on 24 examples"
    for example, sample in zip(examples, samples, strict=True):
        question = hellaswag.render_harness(example, gpt2)
        (sums,), (hits,) = hellaswag.score(model, [question])
        assert [-loss for loss in sums] == pytest.approx([ll for ll, _ in sample], abs=1e-3)
        assert hits == [is_greedy for _, is_greedy in sample]

    metrics, samples = theirs["lambada_openai"]
    questions = [render_lambada(e, gpt2) for e in load_lambada(tmp_path / "lambada.jsonl")]
    sums = predict_words(model, questions)
    error = f"{metrics['acc']:.4f} (se {metrics['acc_stderr']:.4f})"
    assert str(sums).startswith(f"accuracy {error} perplexity ")
    assert math.exp(sums.nats / sums.words) == pytest.approx(metrics["perplexity"], rel=1e-5)
    assert 2 < sums.hits < sums.words == len(texts)
    for question, ((log_likelihood, is_greedy),) in zip(questions, samples, strict=True):
        (sums,), (hits,) = hellaswag.score(model, [question])
        assert (-sums[0], hits[0]) == (pytest.approx(log_likelihood, abs=1e-3), is_greedy)


# ---- --eval_only ---------------------------------------------------------------------------------

FLAGS = {
    "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 257,
    "total_batch_size": 512, "micro_batch_size": 4, "max_steps": 6, "data_dir": "data",
    "device": "cpu", "dtype": "float32", "val_interval": 2, "val_tokens": 1300,
    "hellaswag_interval": 3, "sample_interval": 0, "checkpoint_interval": 6, "lr": 1e-2,
    "optimizer": "adamw", "cooldown": 0, "warmup_steps": 50,
}  # fmt: skip


def arguments(*more, **settings) -> list[str]:
    flags = FLAGS | settings
    return ["shakespeare_char", *(a for k, v in flags.items() for a in (f"--{k}", str(v))), *more]


def said(capsys, *more, **settings) -> list[str]:
    """The lines that train_gpt2.py prints with these flags."""
    capsys.readouterr()
    main(*parse_arguments(arguments(*more, **settings)))
    return capsys.readouterr().out.splitlines()


def error_of(capsys, *more, **settings) -> str:
    """The one line that it ends with instead, before it has computed, printed or left anything."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main(*parse_arguments(arguments(*more, **settings)))
    assert isinstance(error.value.code, str) and len(error.value.code.splitlines()) == 1
    assert capsys.readouterr().out == "" and sorted(Path().rglob("*")) == before
    return error.value.code


QUESTIONS = "data/hellaswag_val.jsonl"
EVALUATE = ("--eval_only", "--init_from", "run")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with shards and questions in data/, LAMBADA's texts, and a run of FLAGS in run/."""
    folder = tmp_path_factory.mktemp("workshop")
    documents = [some_text(12, seed=i) for i in range(200)]
    fineweb.write_shards(documents, folder / "data", "bytes", val_tokens=2000, workers=1)
    examples = []
    for i in range(30):
        rng = random.Random(i)
        endings = [some_text(1 + k, seed=4 * i + k) for k in range(4)]
        rng.shuffle(endings)
        example = {"ctx": some_text(3, seed=i), "endings": endings, "label": rng.randrange(4)}
        examples.append(example | {"activity_label": "Mats"})
    write_lines(folder / QUESTIONS, examples)
    (folder / "lambada.txt").write_text("\n".join(some_text(2 + i % 5, seed=i) for i in range(40)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        main(*parse_arguments(arguments(out_dir="run")))
    return folder


@pytest.fixture
def inside(workshop, monkeypatch):
    """In that folder, and without network."""
    monkeypatch.chdir(workshop)
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there


@pytest.fixture
def alone(workshop, tmp_path, monkeypatch, inside):
    """In an empty folder, and without network."""
    monkeypatch.chdir(tmp_path)


NUMBER = r"(\d+\.\d+)"


def test_eval_only_prints_the_runs_losses_and_transformers_scores(inside, capsys):
    transformers = pytest.importorskip("transformers")
    lines = said(capsys, *EVALUATE, "--lambada", "lambada.txt")
    assert len(lines) == 5 and lines[0].startswith("run, ")
    other = transformers.GPT2LMHeadModel.from_pretrained("run/hf").eval()
    assert f" {other.num_parameters() + 63 * 32:,} parameters" in lines[0]  # 257 rows are 320

    # the validation split: the run's last loss, and transformers' numbers on the same tokens
    pattern = f"  data: loss {NUMBER} next-token accuracy {NUMBER} bits per byte {NUMBER} on "
    loss, accuracy, bits = map(float, re.match(pattern + "1,280 tokens$", lines[1]).groups())
    (last,) = [line for line in Path("run/log.txt").read_text().splitlines() if "6 val" in line]
    assert f"{loss:.4f}" == f"{float(last.split()[2]):.4f}"
    tokens = torch.from_numpy(np.load(next(Path("data").glob("*val*.npy"))).astype(np.int64))
    x, y = tokens[:1280].view(20, 64), tokens[1:1281].view(20, 64)
    with torch.no_grad():
        logits = other(x).logits
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    assert loss == pytest.approx(nats.mean().item(), abs=6e-5)
    assert accuracy == pytest.approx((logits.argmax(-1) == y).float().mean().item(), abs=6e-5)
    expected = nats[y < 256].sum().item() / math.log(2) / (y < 256).sum().item()
    assert bits == pytest.approx(expected, abs=6e-5)

    # HellaSwag both ways: contexts, and sizes by bytes or by characters
    examples = [json.loads(line) for line in Path(QUESTIONS).read_text().splitlines()]
    ways = {"lecture": ("", lambda e: len(e.encode()) + 1), "harness": ("Mats: ", len)}
    for line, (way, (start, size)) in zip(lines[2:4], ways.items(), strict=True):
        right = [0, 0]
        for example in examples:
            endings = [[*f" {ending}".encode()] for ending in example["endings"]]
            context = [*(start + example["ctx"]).encode()][max(map(len, endings)) - 64 :]
            sums, _ = plain_scores(other, context, endings)
            means = [s / size(e) for s, e in zip(sums, example["endings"], strict=True)]
            right[0] += first_least(sums) == example["label"]
            right[1] += first_least(means) == example["label"]
        assert line == f"  HellaSwag as the {way} has it: {hellaswag.Counts(30, *right)}"
    assert lines[2].split(": ")[1] != lines[3].split(": ")[1]

    nats, hits = [], []
    for text in Path("lambada.txt").read_text().splitlines():
        context, word = text.rsplit(" ", 1)
        word = [*f" {word}".encode()]
        (loss,), (hit,) = plain_scores(other, [*context.encode()][len(word) - 64 :], [word])
        nats.append(loss)
        hits.append(hit)
    match = re.match(f"  LAMBADA: accuracy {NUMBER} .* perplexity {NUMBER} on 40 words", lines[4])
    assert float(match[1]) == pytest.approx(np.mean(hits), abs=6e-5)
    assert float(match[2]) == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)


@pytest.mark.parametrize("source", ["run/hf", "run/step_000006.pt"])
def test_eval_only_of_an_export_or_a_checkpoint_is_that_of_the_run(inside, capsys, source):
    expected = said(capsys, *EVALUATE)
    lines = said(capsys, "--eval_only", "--init_from", source)
    assert lines[0].startswith(source) and lines[1:] == expected[1:] and len(lines) == 4


def test_eval_only_leaves_nothing(inside, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    said(capsys, *EVALUATE, "--lambada", "lambada.txt")
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_two_ranks_print_the_numbers_of_one_and_once(inside, capsys):
    one = said(capsys, *EVALUATE, "--lambada", "lambada.txt", val_tokens=1240)  # 19 windows
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(SCRIPT), *arguments(*EVALUATE, "--lambada", "lambada.txt", val_tokens=1240)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=99)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == one and len(one) == 5


@pytest.mark.parametrize("off", [("val",), ("hellaswag",), ("val", "hellaswag")])
def test_an_interval_of_0_switches_a_part_of_eval_only_off(inside, capsys, off):
    whole = said(capsys, *EVALUATE, "--lambada", "lambada.txt")
    some = said(capsys, *EVALUATE, "--lambada", "lambada.txt", **{f"{o}_interval": 0 for o in off})
    gone = {"val": "  data: ", "hellaswag": "  HellaSwag "}
    starts = tuple(gone[name] for name in off)
    assert some == [line for line in whole if not line.startswith(starts)]
    assert len(some) == 5 - ("val" in off) - 2 * ("hellaswag" in off)


def test_without_validation_and_hellaswag_no_data_is_needed(alone, workshop, capsys):
    flags = ("--eval_only", "--init_from", str(workshop / "run"))
    flags += ("--lambada", str(workshop / "lambada.txt"))
    lines = said(capsys, *flags, data_dir="nowhere", val_interval=0, hellaswag_interval=0)
    assert len(lines) == 2 and lines[1].startswith("  LAMBADA: ")


def test_without_network_hellaswag_is_missed_before_anything_is_computed(
    alone, workshop, capsys, monkeypatch
):
    fineweb.write_shards([TEXT] * 50, "data", "bytes", val_tokens=1300, workers=1)
    for split in ("train", "val"):  # leaves verified.json, so that no run here has to make it
        fineweb.open_shards("data", split, 257)
    forward = []
    monkeypatch.setattr(train_gpt2.GPT, "hidden", lambda *_: forward.append(1))
    for more in (("--eval_only", "--init_from", str(workshop / "run")), ()):  # and for a training
        error = error_of(capsys, *more)
        assert str(hellaswag.PATH) in error and "by hand" in error
        assert "--hellaswag_interval 0" in error
    assert not forward


def test_what_is_wrong_with_lambada_is_said_before_anything_is_computed(inside, capsys):
    error = error_of(capsys, *EVALUATE, "--lambada", "nowhere.txt")
    assert "nowhere.txt" in error and "lambada_test.jsonl" in error


def test_weights_and_shards_of_two_vocabularies_are_both_named(inside, tmp_path, capsys):
    twins(tmp_path / "words", vocab_size=97)
    error = error_of(capsys, "--eval_only", "--init_from", str(tmp_path / "words"))
    assert "data/ has a vocabulary of 257" in error and f"{tmp_path / 'words'} one of 97" in error


@pytest.mark.parametrize("more", [(), EVALUATE])
def test_an_ending_longer_than_the_positions_is_said_at_the_start(inside, capsys, more, tmp_path):
    example = {"ctx": "Once", "endings": ["a", "b", "c", "far too long " * 5], "label": 0}
    before = Path(QUESTIONS).read_text()
    try:
        write_lines(QUESTIONS, [json.loads(before.splitlines()[0]), example])
        error = error_of(capsys, *more, hellaswag_interval=3, out_dir=tmp_path / "new")
    finally:
        Path(QUESTIONS).write_text(before)
    assert "block_size 64 has no room" in error and "far too long" in error
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_without_an_encoding_has_a_loss(alone, capsys):
    _, other = twins("mine", vocab_size=97)
    Path("words").mkdir()
    tokens = np.random.default_rng(0).integers(97, size=2000).astype(np.uint16)
    for split in ("train", "val"):  # no manifest: as from elsewhere
        np.save(f"words/x_{split}_000000.npy", tokens)
    flags = ("--eval_only", "--init_from", "mine")
    lines = said(capsys, *flags, data_dir="words", hellaswag_interval=0)
    tokens = torch.from_numpy(tokens[:1281].astype(np.int64))
    x, y = tokens[:-1].view(20, 64), tokens[1:].view(20, 64)
    loss = torch.nn.functional.cross_entropy(other(x).logits.flatten(0, 1), y.flatten())
    match = re.match(f"  words: loss {NUMBER} next-token accuracy {NUMBER} on 1,280", lines[1])
    assert float(match[1]) == pytest.approx(loss.item(), abs=6e-5) and len(lines) == 2
    Path("a.txt").write_text("the end")
    for more, settings in (((), {}), (("--lambada", "a.txt"), {"hellaswag_interval": 0})):
        error = error_of(capsys, *flags, *more, data_dir="words", **settings)
        assert "no encoding has 97 tokens" in error

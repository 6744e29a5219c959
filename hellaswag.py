"""HellaSwag: which of four endings does a language model find the likeliest?

    python hellaswag.py --model gpt2           # OpenAI's 124M; also gpt2-medium, -large, -xl
    python hellaswag.py --model log/gpt2-003   # a run's folder, or an exported one
    python hellaswag.py --limit 500            # the first 500 examples only: quick and rough

10,042 examples; one ending is human, three are a machine's that fooled a classifier (Zellers et
al. 2019, arXiv:1905.07830). A small model cannot play multiple choice, so each ending is scored
alone, as the context's continuation. Guessing gets 0.25.

Two ways of asking give four scores. The lecture's takes the text as it is: its acc counts the
ending of the smallest summed loss, its acc_norm that of the smallest mean loss per token. The
evaluation harness's names the activity first and cleans the text: its acc_norm divides the summed
loss by the ending's characters. For OpenAI's 124M the header of build-nanogpt's hellaswag.py
reports 0.2859 and 0.2955 the lecture's way, 0.2892 and 0.3114 the harness's.
"""

import hashlib
import json
import math
import os
import random
import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
PATH = "hellaswag/hellaswag_val.jsonl"


def load(path: str | Path = PATH) -> list[dict]:
    """The examples in `path`, downloaded to there first where the file does not exist.

    Each has `ctx` (text), `endings` (four texts) and `label` (0 to 3, the right one). SystemExit
    where the file cannot be had, what comes is not the known one, or a line is no such example.
    """
    path = Path(path)
    try:
        if path.exists():
            return parse(path.read_bytes(), path)
        with urllib.request.urlopen(URL, timeout=60) as response:
            # read() in one go raises IncompleteRead when the connection breaks; pieces do not
            data = response.read()
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise SystemExit(
                f"{URL} gives another file than it should, of {len(data):,} bytes: fetch it by "
                f"hand, and put it at {path} if you trust it"
            )
        examples = parse(data, URL)
        path.parent.mkdir(parents=True, exist_ok=True)
        # the final name appears only on a whole file, whenever this process is stopped
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)
        return examples
    except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
        raise SystemExit(f"no {path} ({error}): fetch {URL} by hand and put it there") from None


OPTIONAL = ("activity_label", "ctx_a", "ctx_b")  # what only the harness's way reads


def parse(data: bytes, source: str | Path) -> list[dict]:
    """Checked examples from JSON lines; SystemExit names `source` and the first bad line."""
    examples = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            example = json.loads(line)
            ctx, endings, label = example["ctx"], example["endings"], example["label"]
            # without a context an ending's first token would have nothing to be predicted from
            good = isinstance(ctx, str) and ctx and type(label) is int and 0 <= label <= 3
            good = good and isinstance(endings, list) and [type(e) for e in endings] == [str] * 4
            good = good and all(type(example.get(key, "")) is str for key in OPTIONAL)
        # not JSON, a key missing, not an object, lists in lists in lists
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise SystemExit(
                f"{source}, line {number}: not an example with text in 'ctx', four texts in "
                f"'endings' and a 'label' from 0 to 3; mend it, or fetch {URL} anew"
            )
        examples.append(example)
    if not examples:
        raise SystemExit(f"{source} is empty: fetch {URL} anew")
    return examples


def make_examples(
    documents: list[str], count: int, context_chars: int = 112, ending_chars: int = 15, seed=0
) -> list[dict]:
    """`count` examples in HellaSwag's form from held-out code: which line really comes next?

    A context ends with a line; each ending is the beginning of an indented line, and the wrong ones
    come from elsewhere in the same documents. Lengths are in ASCII characters, so bytes: on a
    byte-level model all endings are as long, and 112 + a space + 15 fill 128 tokens. SystemExit
    where the documents have fewer than four such passages.
    """
    contexts = {}  # ending -> what it follows; a dict, so that the four always differ
    for text in documents:
        # `render` puts a space before an ending, so cut at an indentation's first
        for cut in re.finditer(r"(?<=\n) (?=.)", text):
            start, stop = cut.start() - context_chars, cut.end() + ending_chars
            if start >= 0 and stop <= len(text) and text[start:stop].isascii():
                contexts[text[cut.end() : stop]] = text[start : cut.start()]
    if len(contexts) < 4:
        raise SystemExit(
            f"fewer than four passages of {context_chars} + 1 + {ending_chars} ASCII characters "
            f"in {len(documents)} held-out documents: give it more or longer ones"
        )
    pool, rng, examples = list(contexts), random.Random(seed), []
    for ind in range(count):
        # four drawn alike, then a roll for the true one: no ending gives itself away
        endings, label = rng.sample(pool, 4), rng.randrange(4)
        example = {"ind": ind, "activity_label": "code", "ctx": contexts[endings[label]]}
        examples.append(example | {"label": label, "endings": endings, "split": "val"})
    return examples


class Question(NamedTuple):
    """A context and what might follow it, as tokens."""

    context: list[int]
    endings: list[list[int]]
    sizes: list[int]  # of the endings, for the normalized score
    label: int  # the right ending


def render(example: dict, encoding: tiktoken.Encoding) -> Question:
    """The lecture's way: the plain context, and an ending's size is its number of tokens."""
    # encode_ordinary: a text that spells out <|endoftext|> is still text
    context = encoding.encode_ordinary(example["ctx"])
    # GPT-2's words carry the space on their left, so the two can be encoded apart
    endings = [encoding.encode_ordinary(" " + ending) for ending in example["endings"]]
    return Question(context, endings, [len(ending) for ending in endings], example["label"])


def encode_pair(
    encoding: tiktoken.Encoding, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """As the harness does it: both are encoded together, and cut where the tokens of the context
    alone would end; spaces at its end count as the continuation's."""
    tokens = encoding.encode_ordinary(context.rstrip())
    return tokens, encoding.encode_ordinary(context + continuation)[len(tokens) :]


def render_harness(example: dict, encoding: tiktoken.Encoding) -> Question:
    """The way of EleutherAI's lm-evaluation-harness, task hellaswag: the activity before the
    context, WikiHow's marks taken out, and an ending's size is its number of characters."""

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    ctx = example["ctx"]
    if "ctx_a" in example and "ctx_b" in example:
        ctx = f"{example['ctx_a']} {example['ctx_b'].capitalize()}"
    ctx = clean(f"{example.get('activity_label', '')}: {ctx}")
    choices = [clean(ending) for ending in example["endings"]]
    pairs = [encode_pair(encoding, ctx, " " + choice) for choice in choices]
    endings = [ending for _, ending in pairs]
    return Question(pairs[0][0], endings, [len(c) for c in choices], example["label"])


WAYS = {"lecture": render, "harness": render_harness}


def prepare(
    examples: list[dict],
    encoding: tiktoken.Encoding,
    block_size: int,
    render: Callable[[dict, tiktoken.Encoding], Question] = render,
) -> list[Question]:
    """The examples as tokens, the longest first: one batch then has rows of about one length, and
    a memory that is too small shows at once.

    A context loses its oldest tokens where it and its longest ending exceed `block_size`;
    SystemExit where an ending leaves no room for a token before it.
    """
    questions = []
    for example in examples:
        question = render(example, encoding)
        if not question.context:
            raise SystemExit(f"{example['ctx']!r} leaves nothing before an ending: leave it out")
        longest = max(question.endings, key=len)
        room = block_size - len(longest)
        if room < 1:
            raise SystemExit(
                f"block_size {block_size} has no room for context before "
                f"{encoding.decode(longest)!r}: leave it out, or use a model with a longer one"
            )
        # the four endings lose the same, and so stay comparable
        questions.append(question._replace(context=question.context[-room:]))
    return sorted(questions, key=lambda q: len(q.context) + sum(map(len, q.endings)), reverse=True)


class Batch(NamedTuple):
    """B questions as rows of N tokens, and the S tokens of all their endings."""

    tokens: torch.Tensor  # (B, N) int64
    pos: torch.Tensor  # (B, N) int64, their positions
    mask: torch.Tensor  # (B, 1, N, N) bool: which token sees which
    before: torch.Tensor  # (2, S) int64: row and column of the token before each
    targets: torch.Tensor  # (S,) int64: the tokens of the endings, one after another


def lay_out(questions: list[Question]) -> Batch:
    """A row has its question's context once and the endings behind it, each at the positions that
    follow the context. An ending sees the context and itself, so it might as well be alone."""
    rows, before, targets = [], [], []
    for row, (context, endings, _, _) in enumerate(questions):
        tokens, n = list(context), len(context)
        pos, part = list(range(n)), [0] * n  # 0: the context, 1 to 4: an ending
        for number, ending in enumerate(endings, start=1):
            seen = ending[:-1]  # the last one is predicted, and predicts nothing
            columns = [n - 1, *range(len(tokens), len(tokens) + len(seen))]
            before += [(row, column) for column in columns]
            targets += ending
            tokens += seen
            pos += range(n, n + len(seen))
            part += [number] * len(seen)
        rows.append((tokens, pos, part))
    N = max(len(tokens) for tokens, _, _ in rows)
    N += -N % 16  # few shapes
    padded = [[column + [0] * (N - len(column)) for column in row] for row in rows]
    # numpy reads lists three times as fast as torch
    tokens, pos, part = torch.from_numpy(np.array(padded)).unbind(dim=1)  # (B, N) each
    same_part = part[:, :, None] == part[:, None, :]  # (B, N, N)
    is_context = (part == 0)[:, None, :]  # the padding too, but it comes after all that looks
    mask = (same_part | is_context).tril()
    before, targets = torch.from_numpy(np.array(before)), torch.from_numpy(np.array(targets))
    return Batch(tokens, pos, mask[:, None], before.T, targets)


@torch.no_grad()
def score(model, questions: list[Question]) -> tuple[list[list[float]], list[list[bool]]]:
    """For each question, of each ending: the summed cross-entropy in nats, and whether every token
    of it was the likeliest. `model` is a bare GPT, since shapes change."""
    device = model.lm_head.weight.device
    tokens, pos, mask, before, targets = (part.to(device) for part in lay_out(questions))
    x = model.hidden(tokens, pos, mask)  # (B, N, C)
    row, column = before  # (S,) each
    logits = model.logits(x[row, column]).float()  # (S, V): of the scored positions alone
    losses = F.cross_entropy(logits, targets, reduction="none")  # (S,)
    hits = logits.argmax(dim=-1) == targets  # (S,)
    # added up by Python, in float64: in one order, whatever computed them
    losses, hits = iter(losses.tolist()), iter(hits.tolist())
    sums = [[sum(islice(losses, len(e))) for e in q.endings] for q in questions]
    return sums, [[all([*islice(hits, len(e))]) for e in q.endings] for q in questions]


class Counts(NamedTuple):
    """What `evaluate` counts: whole numbers, to add up over ranks before dividing."""

    num_total: int
    num_correct: int  # questions whose right ending has the least summed loss
    num_correct_norm: int  # the least loss divided by size: long endings are not punished

    @property
    def acc(self) -> float:
        return self.num_correct / self.num_total

    @property
    def acc_norm(self) -> float:
        return self.num_correct_norm / self.num_total

    def __str__(self) -> str:
        shares = {"acc": self.acc, "acc_norm": self.acc_norm}
        text = " ".join(f"{k} {with_error(p, self.num_total)}" for k, p in shares.items())
        return f"{text} on {self.num_total:.0f} examples"


def with_error(share: float, n: float) -> str:
    """A share of n independent examples, and its standard error."""
    return f"{share:.4f} (se {math.sqrt(share * (1 - share) / max(1, n - 1)):.4f})"


def scores(
    model,
    questions: list[Question],
    batch_size: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
    autocast: AbstractContextManager | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Question, list[float], list[bool]]]:
    """This rank's share of what `prepare` returned, each question with what `score` says of it.
    They are scored batch_size at a time; 0: 64 on a GPU, and 16 on a CPU, where more are slower.

    `model` is left in the mode it was found in. `autocast` must bear being entered again and again,
    as torch.autocast does. `stop` is asked before each batch, and may end it all early.
    """
    mine = questions[rank::world_size]  # of every length
    batch_size = batch_size or (64 if model.lm_head.weight.device.type == "cuda" else 16)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(mine), unit="example", disable=not progress, leave=False)
    try:
        for start in range(0, len(mine), batch_size):
            if stop():
                break
            batch = mine[start : start + batch_size]
            with autocast or nullcontext():
                results = score(model, batch)
            yield from zip(batch, *results, strict=True)
            bar.update(len(batch))
    finally:
        bar.close()
        model.train(was_training)


def evaluate(model, questions: list[Question], **how) -> Counts:
    """Count the right endings; `how` as `scores` has it."""
    num_total = num_correct = num_correct_norm = 0
    for question, sums, _ in scores(model, questions, **how):
        pairs = zip(sums, question.sizes, strict=True)
        means = [loss / size if size else math.inf for loss, size in pairs]
        num_total += 1
        num_correct += sums.index(min(sums)) == question.label
        num_correct_norm += means.index(min(means)) == question.label
    return Counts(num_total, num_correct, num_correct_norm)


def main(
    model: str = "gpt2",
    file: str = PATH,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    batch_size: int = 0,
    limit: int = 0,
) -> None:
    """Score a model on HellaSwag's validation set, the lecture's way and the harness's.

    Args:
        model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a run's folder or an exported folder.
        file: the examples, as JSON lines; downloaded to there when absent.
        device: auto: CUDA, else Apple's MPS, else the CPU.
        dtype: of matrix products; auto: bfloat16 or float16 on CUDA, else float32.
        batch_size: examples at a time; 0: 64 on a GPU, else 16.
        limit: only the first so many examples; 0 for all.
    """
    # here, not above: the trainer imports this module
    from train_gpt2 import autocast_of, encoding_of, load_model, resolve_device, resolve_dtype

    if batch_size < 0 or limit < 0:
        raise SystemExit("--batch_size and --limit must be at least 0")
    target = resolve_device(device)
    examples = load(file)[: limit or None]
    gpt = load_model(model).to(target)
    encoding = encoding_of(gpt.config.vocab_size)
    autocast = autocast_of(resolve_dtype(dtype, target), target)
    size = gpt.config.block_size
    asked = {way: prepare(examples, encoding, size, render) for way, render in WAYS.items()}
    for way, questions in asked.items():
        counts = evaluate(gpt, questions, batch_size=batch_size, progress=True, autocast=autocast)
        print(f"{model}, HellaSwag as the {way} has it: {counts}")


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)

"""HellaSwag: which of four endings does a language model find the likeliest?

    python hellaswag.py --model gpt2           # OpenAI's 124M; also gpt2-medium, -large, -xl
    python hellaswag.py --model log/gpt2-003   # a run's folder, or an exported one
    python hellaswag.py --limit 500            # the first 500 examples only: quick and rough

10,042 examples; one ending is human, three are a machine's that fooled a classifier (Zellers et
al. 2019, arXiv:1905.07830). A small model cannot play multiple choice, so each ending is scored
alone, as the context's continuation. Guessing gets 0.25. For OpenAI's 124M the header of
build-nanogpt's hellaswag.py reports acc 0.2859 and acc_norm 0.2955.
"""

import json
import os
import random
import re
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from http.client import HTTPException
from pathlib import Path
from typing import Literal, NamedTuple

import tiktoken
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
PATH = "hellaswag/hellaswag_val.jsonl"


def load(path: str | Path = PATH) -> list[dict]:
    """The examples in `path`, downloaded to there first where the file does not exist.

    Each has `ctx` (text), `endings` (four texts) and `label` (0 to 3, the right one). SystemExit
    where the file cannot be had, or holds a line that is no such example.
    """
    path = Path(path)
    try:
        if path.exists():
            return parse(path.read_bytes(), path)
        with urllib.request.urlopen(URL, timeout=60) as response:
            # read() in one go raises IncompleteRead when the connection breaks; pieces do not
            data = response.read()
        examples = parse(data, URL)
        path.parent.mkdir(parents=True, exist_ok=True)
        # the final name appears only on a whole file, whenever this process is stopped
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)
        return examples
    except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
        raise SystemExit(f"no {path} ({error}): fetch {URL} by hand and put it there") from None


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


def render(example: dict, encoding: tiktoken.Encoding) -> tuple[torch.Tensor, torch.Tensor, int]:
    """One row per ending: tokens (4, N) int64, mask (4, N) bool, and the label.

    A row is the context, its ending, and zeros up to the longest row's N; the mask is true on the
    ending alone. The two are encoded apart: GPT-2's words carry the space on their left.
    """
    # encode_ordinary: a text that spells out <|endoftext|> is still text
    context = encoding.encode_ordinary(example["ctx"])
    endings = [encoding.encode_ordinary(" " + ending) for ending in example["endings"]]
    N = len(context) + max(len(ending) for ending in endings)
    tokens = torch.zeros(4, N, dtype=torch.int64)  # (4, N)
    mask = torch.zeros(4, N, dtype=torch.bool)  # (4, N)
    for row, ending in enumerate(endings):
        stop = len(context) + len(ending)
        tokens[row, :stop] = torch.tensor(context + ending)
        mask[row, len(context) : stop] = True
    return tokens, mask, example["label"]


def score(
    logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's cross-entropy on its masked tokens, in nats: the sum, and the mean per token.

    logits (R, N, V) of any float type, tokens (R, N), mask (R, N) -> (R,), (R,) float32.
    """
    targets, mask = tokens[:, 1:], mask[:, 1:].bool()  # (R, N-1): logits at t speak of t + 1
    losses = torch.zeros(targets.shape, device=logits.device)  # (R, N-1)
    # only endings become float32: most of the logits are context's and padding's
    predictions = logits[:, :-1][mask].float()  # (R, N, V) -> (scored tokens, V)
    losses[mask] = F.cross_entropy(predictions, targets[mask], reduction="none")
    sum_loss = losses.sum(dim=1)  # (R,)
    return sum_loss, sum_loss / mask.sum(dim=1)


class Counts(NamedTuple):
    """What `evaluate` counts: whole numbers, to add up over ranks before dividing."""

    num_total: int
    num_correct: int  # examples whose right ending has the least summed loss
    num_correct_norm: int  # the least mean loss per token: long endings are not punished

    @property
    def acc(self) -> float:
        return self.num_correct / self.num_total

    @property
    def acc_norm(self) -> float:
        return self.num_correct_norm / self.num_total

    def __str__(self) -> str:
        # a share p of n independent examples has the standard error sqrt(p (1 - p) / n)
        acc, norm = (
            f"{p:.4f} (se {(p * (1 - p) / self.num_total) ** 0.5:.4f})"
            for p in (self.acc, self.acc_norm)
        )
        return f"acc {acc} acc_norm {norm} on {self.num_total} examples"


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    examples: list[dict],
    encoding: tiktoken.Encoding,
    block_size: int,
    device: torch.device | str,
    batch_size: int = 8,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
    autocast: AbstractContextManager | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Counts:
    """Score this rank's share of `examples`, `batch_size` of them (four rows each) at a time.

    `model` maps idx (R, N) to (logits (R, N, V), anything) and is left in the mode it was found
    in; give the bare one, as shapes change. `autocast` must bear being entered again and again,
    as torch.autocast does. `stop` is asked before each batch, and may end the evaluation early.
    A row longer than `block_size` loses its oldest context; SystemExit,
    before the model runs, where an ending and one token before it do not fit.
    """
    rows = []
    for example in examples[rank::world_size]:
        tokens, mask, label = render(example, encoding)
        # all four rows lose the same tokens of context, and so stay comparable
        tokens, mask = tokens[:, -block_size:], mask[:, -block_size:]  # (4, min(N, block_size))
        if mask[:, 0].any():
            raise SystemExit(
                f"block_size {block_size} has no room for context before the longest of "
                f"{example['endings']}: leave that example out, or use a model with a longer one"
            )
        rows.append((tokens, mask, label))
    num_total = num_correct = num_correct_norm = 0
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(rows), unit="example", disable=not progress)
    try:
        for start in range(0, len(rows), batch_size):
            if stop():
                break
            tokens, mask, label = zip(*rows[start : start + batch_size], strict=True)
            # Padding on the right is harmless: under a causal mask no position sees what comes
            # after it, and nothing after a row's ending is scored.
            N = max(t.size(1) for t in tokens)
            tokens = torch.cat([F.pad(t, (0, N - t.size(1))) for t in tokens])  # (4B, N)
            mask = torch.cat([F.pad(m, (0, N - m.size(1))) for m in mask])  # (4B, N)
            tokens, mask = tokens.to(device), mask.to(device)
            with autocast or nullcontext():
                logits, _ = model(tokens)  # (4B, N, V)
            sum_loss, mean_loss = score(logits, tokens, mask)  # (4B,) each
            label = torch.tensor(label, device=device)  # (B,)
            num_total += len(label)
            num_correct += int((sum_loss.view(-1, 4).argmin(dim=1) == label).sum())
            num_correct_norm += int((mean_loss.view(-1, 4).argmin(dim=1) == label).sum())
            bar.set_postfix(acc_norm=f"{num_correct_norm / num_total:.4f}", refresh=False)
            bar.update(len(label))
    finally:
        bar.close()
        model.train(was_training)
    return Counts(num_total, num_correct, num_correct_norm)


def main(
    model: str = "gpt2",
    file: str = PATH,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    batch_size: int = 8,
    limit: int = 0,
) -> None:
    """Score a model on HellaSwag's validation set.

    Args:
        model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a run's folder or an exported folder.
        file: the examples, as JSON lines; downloaded to there when absent.
        device: auto: CUDA, else Apple's MPS, else the CPU.
        batch_size: examples at a time; the model sees four rows for each.
        limit: only the first so many examples; 0 for all.
    """
    # here, not above: the trainer imports this module
    from train_gpt2 import encoding_of, load_model, resolve_device

    if batch_size < 1 or limit < 0:
        raise SystemExit("--batch_size must be at least 1 and --limit at least 0")
    target = resolve_device(device)
    examples = load(file)[: limit or None]
    gpt = load_model(model).to(target)
    encoding = encoding_of(gpt.config.vocab_size)
    block_size = gpt.config.block_size
    counts = evaluate(gpt, examples, encoding, block_size, target, batch_size, progress=True)
    print(f"{model}: {counts}")


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)

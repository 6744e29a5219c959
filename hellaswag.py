"""Evaluates a language model on HellaSwag: which of four endings completes a text?

    python hellaswag.py --model gpt2           # OpenAI's 124M; also gpt2-medium, -large, -xl
    python hellaswag.py --model log/gpt2-001   # a run's folder, or an exported model
    python hellaswag.py --limit 500            # the first 500 examples: faster, less precise

The validation set has 10,042 examples of a context and four endings. A human wrote one ending; a
model generated the others, selected to fool classifiers (Zellers et al. 2019, arXiv:1905.07830).
Small models cannot answer multiple-choice questions, so each ending is scored as a continuation of
the context, and the most likely one is the model's choice. Random guessing scores 0.25.

An example can be rendered in two ways, and each has two scores. `acc` chooses the ending with the
lowest summed loss; `acc_norm` first divides each sum by the length of the ending.

    way       text                                            length in    GPT-2 124M: acc, acc_norm
    lecture   context and endings as in the file              tokens       0.2859  0.2955
    harness   "activity: context", WikiHow's markup removed   characters   0.2892  0.3114

The harness is EleutherAI's lm-evaluation-harness. The scores are from build-nanogpt's hellaswag.py.
"""

import hashlib
import http.client
import json
import os
import random
import re
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import tiktoken
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
PATH = "hellaswag/hellaswag_val.jsonl"
Way = Literal["lecture", "harness"]


def download(path: str | Path = PATH):
    """Downloads the official file to `path` if absent. Exits with a one-line message on failure."""
    path = Path(path)
    if path.exists():
        return
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            data = response.read()  # raises IncompleteRead if the connection breaks
        digest = hashlib.sha256(data).hexdigest()
        if digest != SHA256:
            raise OSError(f"the sha256 of {len(data):,} bytes is {digest}, expected {SHA256}")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Rename a temporary file, so that the final name only ever refers to a complete file.
        tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        tmp.write_bytes(data)
        os.replace(tmp, path)
    except (OSError, http.client.HTTPException) as error:
        advice = f"fetch {URL} by hand and put it there"
        raise SystemExit(f"cannot download {path} ({error}): {advice}") from None


def iterate_examples(path: str | Path = PATH) -> Iterator[dict]:
    """Yields the examples of a JSON lines file, which is downloaded first if it is absent. Exits
    with a one-line message if the file is empty or a line is not an example."""
    download(path)
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise SystemExit(f"cannot read the examples: {error}") from None
    if not lines:
        raise SystemExit(f"{path} is empty: delete it to download it again")
    for number, line in enumerate(lines, start=1):
        try:
            example = json.loads(line)
            ctx, endings, label = example["ctx"], example["endings"], example["label"]
            optional = [example.get(key, "") for key in ("activity_label", "ctx_a", "ctx_b")]
            valid = isinstance(endings, list) and len(endings) == 4
            valid = valid and all(isinstance(text, str) for text in [ctx, *endings, *optional])
            # The first token of an ending is predicted from the context, which is never empty.
            valid = valid and ctx != "" and type(label) is int and 0 <= label < 4
        except (ValueError, KeyError, TypeError, RecursionError):  # not JSON, or not an object
            valid = False
        if not valid:
            expected = "'ctx' (text), 'endings' (four texts) and 'label' (0 to 3)"
            raise SystemExit(f"{path}, line {number}: expected JSON with {expected}")
        yield example


def make_examples(documents: list[str], count: int, context_chars=112, ending_chars=15, seed=0):
    """Returns `count` examples from held-out code: which of four indented lines is next?
    An example has 112 + 1 + 15 = 128 bytes of ASCII. Exits if there are too few passages."""
    # The space is the one that render_example() adds. A lookahead finds overlapping passages.
    passage = re.compile(rf"(?s)(?=(.{{{context_chars - 1}}}\n) (.{{{ending_chars}}}))")
    matches = [match for text in documents if text.isascii() for match in passage.findall(text)]
    contexts = {ending: ctx for ctx, ending in matches}  # a dict: the endings are distinct
    if len(contexts) < 4:
        raise SystemExit(f"{len(documents)} held-out documents have fewer than 4 passages of code")
    rng, examples = random.Random(seed), []
    for _ in range(count):
        endings, label = rng.sample(list(contexts), 4), rng.randrange(4)
        example = {"activity_label": "code", "ctx": contexts[endings[label]]}
        examples.append(example | {"endings": endings, "label": label})
    return examples


class RenderedExample(NamedTuple):
    tokens: torch.Tensor  # (4, N) int64, each row is the context and one ending, padded with 0
    mask: torch.Tensor  # (4, N) int64, 1 at the tokens of the ending
    sizes: torch.Tensor  # (4,) int64, the lengths of the endings for acc_norm
    label: int  # index of the correct ending


def clean(text: str) -> str:
    """Removes the markup of the examples from WikiHow, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def render_example(example: dict, enc: tiktoken.Encoding, way: Way = "lecture") -> RenderedExample:
    """Tokenizes an example as in the lecture, or as in lm_eval/tasks/hellaswag."""
    if way == "lecture":
        # GPT-2's tokens include the space before a word, so the two can be encoded separately.
        ctx_tokens = enc.encode_ordinary(example["ctx"])
        end_tokens = [enc.encode_ordinary(" " + ending) for ending in example["endings"]]
        sizes = [len(tokens) for tokens in end_tokens]
    else:
        ctx = example["ctx"]
        if "ctx_a" in example and "ctx_b" in example:
            ctx = example["ctx_a"] + " " + example["ctx_b"].capitalize()
        ctx = clean(example.get("activity_label", "") + ": " + ctx)
        endings = [clean(ending) for ending in example["endings"]]
        # Encode both together, then split. Spaces at the end of the context go to the ending.
        ctx_tokens = enc.encode_ordinary(ctx.rstrip())
        both = [enc.encode_ordinary(ctx + " " + ending) for ending in endings]
        end_tokens = [tokens[len(ctx_tokens) :] for tokens in both]
        sizes = [len(ending) for ending in endings]
    rows = [torch.tensor(ctx_tokens + tokens) for tokens in end_tokens]
    tokens = pad_sequence(rows, batch_first=True)  # (4, N)
    rows = [torch.tensor([0] * len(ctx_tokens) + [1] * len(tokens)) for tokens in end_tokens]
    mask = pad_sequence(rows, batch_first=True)  # (4, N)
    return RenderedExample(tokens, mask, torch.tensor(sizes), example["label"])


def prepare(
    examples: Iterable[dict], enc: tiktoken.Encoding, block_size: int, way: Way = "lecture"
) -> list[RenderedExample]:
    """Renders the examples and sorts them, longest first: the rows of a batch then have similar
    lengths, and the first batch needs the most memory. Contexts are truncated on the left to fit
    into block_size. Exits with a one-line message if nothing remains of a context."""
    rendered = []
    for example in examples:
        tokens, mask, sizes, label = render_example(example, enc, way)
        # The four endings lose the same part of the context, so they stay comparable.
        tokens, mask = tokens[:, -block_size:], mask[:, -block_size:]
        if mask[:, 0].any():
            raise SystemExit(f"block_size {block_size} leaves no context in {str(example)[:200]}")
        rendered.append(RenderedExample(tokens, mask, sizes, label))
    return sorted(rendered, key=lambda example: example.tokens.size(1), reverse=True)


class Counts(NamedTuple):
    """Results as integers, which can be summed over ranks."""

    num_correct: int
    num_correct_norm: int
    num_total: int

    def __str__(self) -> str:
        n = self.num_total
        acc, acc_norm = self.num_correct / n, self.num_correct_norm / n
        # standard error of the mean of n independent examples
        se, se_norm = ((p * (1 - p) / max(1, n - 1)) ** 0.5 for p in (acc, acc_norm))
        scores = f"acc {acc:.4f} (se {se:.4f}) acc_norm {acc_norm:.4f} (se {se_norm:.4f})"
        return f"{scores} on {n:,} examples"


# not cuDNN's attention, the default on an H100: it builds a plan for each new length of the rows
@sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def get_sum_loss(model, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums the cross-entropy of each row's masked tokens: (R, N), (R, N) to (R,) float64."""
    shift_tokens, shift_mask = tokens[:, 1:], mask[:, 1:] == 1  # (R, N-1)
    x = model.hidden(tokens)[:, :-1]  # (R, N-1, C)
    # The vocabulary is large: compute logits at the S scored positions only.
    logits = model.logits(x[shift_mask])  # (S, vocab_size)
    losses = F.cross_entropy(logits.float(), shift_tokens[shift_mask], reduction="none")  # (S,)
    rows = shift_mask.nonzero()[:, 0].cpu()  # (S,)
    # float64, so that the sum does not depend on the batch; on the CPU, since MPS lacks float64
    return torch.zeros(len(tokens), dtype=torch.float64).index_add(0, rows, losses.cpu().double())


@torch.no_grad()
def evaluate(
    model, examples: list[RenderedExample], rank=0, world_size=1, batch_size=16, progress=False
) -> Counts:
    """Counts the correct choices of an uncompiled GPT on this rank's share of the examples. A batch
    has 4 * batch_size rows. If losses are equal, the first ending is chosen."""
    examples = examples[rank::world_size]
    device, was_training = model.lm_head.weight.device, model.training
    num_correct = num_correct_norm = 0
    model.eval()
    try:
        for start in tqdm(range(0, len(examples), batch_size), disable=not progress, leave=False):
            batch = examples[start : start + batch_size]
            # Padding is on the right, where causal attention hides it from the scored tokens.
            tokens = pad_sequence([row for e in batch for row in e.tokens], batch_first=True)
            mask = pad_sequence([row for e in batch for row in e.mask], batch_first=True)
            sum_loss = get_sum_loss(model, tokens.to(device), mask.to(device)).view(-1, 4)
            avg_loss = sum_loss / torch.stack([e.sizes for e in batch])  # inf for an empty ending
            labels = torch.tensor([e.label for e in batch])
            num_correct += (sum_loss.argmin(dim=1) == labels).sum().item()
            num_correct_norm += (avg_loss.argmin(dim=1) == labels).sum().item()
    finally:
        model.train(was_training)
    return Counts(num_correct, num_correct_norm, len(examples))


def main(
    model: str = "gpt2",
    file: str = PATH,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    batch_size: int = 16,
    limit: int = 0,
):
    """Prints a model's scores on HellaSwag, rendered both ways, with their standard errors.

    Args:
        model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, USER/NAME on the hub, or a folder.
        file: Examples as JSON lines; downloaded if absent.
        device: auto selects CUDA, else MPS, else the CPU.
        dtype: Data type of matmuls; auto selects bfloat16 or float16 on CUDA, else float32.
        batch_size: Number of examples in a forward pass; each has four rows.
        limit: Number of examples, from the first; 0 selects all.
    """
    import train_gpt2  # not at the top, because train_gpt2 imports this module

    if batch_size < 1 or limit < 0:
        raise SystemExit("--batch_size must be at least 1, --limit at least 0")
    device = train_gpt2.get_device(device)
    examples = list(iterate_examples(file))[: limit or None]
    gpt = train_gpt2.load_model(model).to(device)
    enc = train_gpt2.get_encoding_for(gpt.config.vocab_size)
    _, autocast = train_gpt2.get_autocast(dtype, device)
    for way in ("lecture", "harness"):
        rendered = prepare(examples, enc, gpt.config.block_size, way)
        with autocast:
            counts = evaluate(gpt, rendered, batch_size=batch_size, progress=True)
        print(f"HellaSwag ({way}) {counts}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, use_underscores=True)

"""The plain way to score endings, to compare with: transformers' GPT-2, an example at a time, each
ending in a row of its own behind a copy of the context, all logits of all rows."""

import torch
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from train_gpt2 import GPT, Config


def twins(folder, **changes):
    """A small GPT with no weight at a trivial value, and what transformers loads of its export."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 96, "vocab_size": 257}
    torch.manual_seed(1)
    model = GPT(Config(**sizes | {"dropout": 0.3} | changes))
    with torch.no_grad():
        for name, p in model.named_parameters():  # far from uniform: the endings' losses differ
            p.normal_(mean=1.0 if "ln_" in name and name.endswith("weight") else 0.0, std=0.2)
    model.save_pretrained(folder)
    return model.eval(), GPT2LMHeadModel.from_pretrained(folder).eval()


@torch.no_grad()
def plain_scores(other, context: list[int], endings: list[list[int]]):
    """Of each ending: its summed cross-entropy, and whether each token of it was the likeliest."""
    n, longest = len(context), max(map(len, endings))
    rows = [[*context, *ending, *[0] * (longest - len(ending))] for ending in endings]
    idx = torch.tensor(rows)  # (R, N)
    logits, targets = other(idx, use_cache=False).logits[:, :-1], idx[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (R, N - 1)
    hits = logits.argmax(dim=-1) == targets
    parts = [slice(n - 1, n - 1 + len(ending)) for ending in endings]
    sums = [row[part].double().sum().item() for row, part in zip(losses, parts, strict=True)]
    return sums, [bool(row[part].all()) for row, part in zip(hits, parts, strict=True)]


def first_least(values) -> int:
    """The place of the smallest value; of several, the first one's."""
    return min(range(len(values)), key=values.__getitem__)

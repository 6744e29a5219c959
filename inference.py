"""What trained weights are for: to go on with a text, and to be measured.

    python train_gpt2.py --prompt "Hello, I'm a language model," --init_from log/gpt2-001
    python train_gpt2.py --eval_only --init_from log/gpt2-001 --lambada lambada_test.jsonl
    python train_gpt2.py --export my_gpt2 --init_from log/gpt2-001/step_010000.pt

These are train_gpt2.py's; here are their options and the functions behind them, which work on any
of its models.
"""

import codecs
import json
import math
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError
from tiktoken.load import read_file_cached
from torch.nn import functional as F
from tqdm import tqdm

import hellaswag

TOKENIZER_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
TOKENIZER_FILES = {  # with the checksums that tiktoken has of them
    "vocab.json": (
        "encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    ),
    "merges.txt": (
        "vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ),
}  # fmt: skip
LAMBADA_URL = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"


@dataclass(frozen=True)
class Task:
    """What to do with weights, --init_from's or else OpenAI's gpt2, instead of training."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """continue this text; may be given several times; -: the text on standard input"""
    num_samples: int = 5
    """continuations of each prompt"""
    max_new_tokens: int = 100
    """tokens of a continuation, unless it meets end-of-text before"""
    temperature: float = 1.0
    """divides the logits: below 1 is careful, above 1 wild; 0: always the likeliest token"""
    top_k: int = 50
    """draw among so many of the likeliest tokens; 0: all"""
    top_p: float = 1.0
    """draw among the likeliest tokens that together have this probability"""
    eval_only: bool = False
    """print validation loss, bits per byte, next-token accuracy, and HellaSwag's scores"""
    lambada: str = ""
    """with --eval_only: a file of texts, LAMBADA's, whose last words to predict"""
    export: str = ""
    """write the weights into this new folder, for transformers"""
    plan: bool = False
    """print what the run would take, without training: parameters, FLOPs, memory, hours, dollars"""
    gpus: int = 1
    """with --plan: ranks"""
    gpu: str = ""
    """with --plan: a GPU of the table (H100, A100, ...), whose peak rate gives the hours at an
    assumed MFU"""
    tokens_per_second: float = 0.0
    """with --plan: a measured rate of all ranks together, instead of --gpu's"""
    dollars_per_gpu_hour: float = 0.0
    """with --plan: what the hours cost"""


TASKS = ("prompt", "eval_only", "export", "plan")
NEEDED = {  # by other options, which go with --prompt
    "lambada": "eval_only",
    **dict.fromkeys(("gpus", "gpu", "tokens_per_second", "dollars_per_gpu_hour"), "plan"),
}


def check_task(task: Task) -> str:
    """The name of what is to do; empty: train. SystemExit if the options make no sense."""
    given = {f.name for f in fields(task) if getattr(task, f.name) != f.default}
    wanted = [name for name in TASKS if name in given]
    if len(wanted) > 1:
        raise SystemExit(f"{' and '.join(f'--{name}' for name in wanted)}: give one of them")
    for name in sorted(given - {*TASKS}):
        needed = NEEDED.get(name, "prompt")
        if needed not in given:
            raise SystemExit(f"--{name} goes with --{needed}: give both, or none")
    bounds = {"num_samples": (1, 10**6), "max_new_tokens": (1, 10**9), "top_k": (0, 10**9)}
    bounds |= {"temperature": (0, 10**9), "top_p": (0, 1), "gpus": (1, 10**6)}
    bounds |= {"tokens_per_second": (0, 10**12), "dollars_per_gpu_hour": (0, 10**9)}
    for name, (least, most) in bounds.items():
        if not least <= getattr(task, name) <= most:  # nan neither
            raise SystemExit(f"--{name} {getattr(task, name)}: give {least} to {most}")
    return wanted[0] if wanted else ""


def run_task(what: str, config, task: Task):
    """Do it. torchrun's ranks share an evaluation; of anything else the first one does all."""
    import train_gpt2 as trainer  # here, not above: it imports this module

    if what == "eval_only":
        return measure(config, task.lambada)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    if what == "plan":
        from plan import plan  # here, not above: it imports this module

        return plan(config, task)
    source = config.init_from or "gpt2"
    if what == "export":
        folder = Path(task.export)
        if os.path.lexists(folder):
            raise SystemExit(f"{folder} exists: name a new folder for --export")
        model, encoding = trainer.load_model(source), None
        with suppress(SystemExit):  # of another vocabulary, or not to be had: then without it
            encoding = trainer.encoding_of(model.config.vocab_size)
        export(model, folder, encoding, "the same command again")
        has = ", with its tokenizer" if (folder / "vocab.json").exists() else ""
        print(f"{folder} has {source} for transformers{has}")
    else:
        prompts = [read_prompt(prompt) for prompt in task.prompt]
        device = trainer.resolve_device(config.device)
        model = trainer.load_model(source).eval().to(device)
        encoding = trainer.encoding_of(model.config.vocab_size)
        try:
            for prompt in prompts:
                generator = torch.Generator(device).manual_seed(config.seed)
                print_samples(model, encoding, prompt, task, generator)
        except OSError as error:  # nobody reads on, as with `| head`; a file on a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
            pipe = isinstance(error, BrokenPipeError)
            raise SystemExit(141 if pipe else f"cannot print ({error.strerror})") from None


# ---- samples -------------------------------------------------------------------------------------


def read_prompt(prompt: str) -> str:
    """The prompt, or what standard input has if it is -. SystemExit if that is empty."""
    if prompt == "-":
        given = sys.stdin.buffer.read() if sys.stdin else b""  # None, if it was closed
        prompt = given.decode(errors="replace").removesuffix("\n")
    if not prompt:
        raise SystemExit("an empty prompt: give a text, or <|endoftext|> to begin a document")
    return prompt.encode(errors="surrogateescape").decode(errors="replace")  # not UTF-8


def print_samples(model, encoding: tiktoken.Encoding, prompt: str, task: Task, generator):
    """Print continuations of a prompt, the first one as it comes. All are drawn side by side, which
    is faster than one after the other; the next follows as far as it is, then as it comes."""
    tokens = encoding.encode(prompt, allowed_special="all")
    n = model.config.block_size
    if len(tokens) > n:
        print(f"the prompt has {len(tokens)} tokens: the last {n} are used", file=sys.stderr)
    idx = torch.tensor([tokens[-n:]], device=model.lm_head.weight.device)  # (1, T)
    waiting = ["> " + prompt] * task.num_samples  # what of each is not printed yet
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in waiting]
    ended, current = [False] * len(waiting), 0
    stream = model.stream(
        idx, task.max_new_tokens, task.temperature, task.num_samples, encoding.eot_token,
        top_k=task.top_k, top_p=task.top_p, generator=generator,
    )  # fmt: skip
    for new in stream:
        for i, token in enumerate(new.flatten().tolist()):
            ended[i] |= token == encoding.eot_token
            if not ended[i] and token < encoding.n_vocab:
                # a character may be several tokens: the decoder waits for its last byte
                waiting[i] += decoders[i].decode(encoding.decode_single_token_bytes(token))
        print(waiting[current], end="", flush=True)
        waiting[current] = ""
        while ended[current] and current + 1 < len(waiting):
            current += 1
            print("\n" + waiting[current], end="", flush=True)
            waiting[current] = ""
    print("".join("\n" + text for text in waiting[current + 1 :]))


# ---- scores --------------------------------------------------------------------------------------


class TokenSums(NamedTuple):
    """Sums over the predicted tokens of a text, to add up over ranks before dividing."""

    tokens: float
    nats: float  # of cross-entropy
    hits: float  # tokens that were the likeliest
    text_nats: float  # without end-of-text, which is no part of the text
    text_bytes: float

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def accuracy(self) -> float:
        return self.hits / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """What an ideal compressor would make of the text: comparable between vocabularies."""
        return self.text_nats / math.log(2) / self.text_bytes

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f} next-token accuracy {self.accuracy:.4f}"
        text += f" bits per byte {self.bits_per_byte:.4f}" if self.text_bytes else ""
        return f"{text} on {self.tokens:,.0f} tokens"


@torch.no_grad()
def sum_over_tokens(model, batches, token_bytes: torch.Tensor, autocast) -> TokenSums:
    """Predict the targets y of batches (x, y), both (B, T). token_bytes (vocab_size,): the bytes of
    text that each token stands for."""
    sums = torch.zeros(5, dtype=torch.float64)
    for x, y in batches:
        device, targets = model.lm_head.weight.device, y.flatten()  # (B * T,)
        with autocast:
            logits = model(x.to(device))[0].flatten(0, 1).float()  # (B * T, V)
        losses = F.cross_entropy(logits, targets.to(device), reduction="none").cpu().double()
        hits = logits.argmax(dim=-1).cpu() == targets
        n_bytes = token_bytes[targets]
        text_nats = losses[n_bytes > 0].sum()
        parts = len(targets), losses.sum(), hits.sum(), text_nats, n_bytes.sum()
        sums += torch.tensor(parts, dtype=torch.float64)
    return TokenSums(*sums.tolist())


def bytes_of_tokens(encoding: tiktoken.Encoding | None, vocab_size: int) -> torch.Tensor:
    """(vocab_size,) int64: the bytes that each token stands for; end-of-text and what pads the
    vocabulary stand for none, and nor does anything without an encoding."""
    n_bytes = torch.zeros(vocab_size, dtype=torch.int64)
    for token in range(encoding.eot_token if encoding else 0):  # the last one of both encodings
        n_bytes[token] = len(encoding.decode_single_token_bytes(token))
    return n_bytes


class WordSums(NamedTuple):
    """Sums over LAMBADA's last words, to add up over ranks before dividing."""

    words: float
    nats: float
    hits: float  # words whose every token was the likeliest

    def __str__(self) -> str:
        accuracy = hellaswag.with_error(self.hits / self.words, int(self.words))
        perplexity = np.exp(self.nats / self.words)  # inf, where math.exp would raise
        return f"accuracy {accuracy} perplexity {perplexity:.2f} on {self.words:.0f} words"


def load_lambada(path: str | Path) -> list[dict]:
    """The texts of LAMBADA (Paperno et al. 2016): JSON lines with a `text` each, as OpenAI made
    them for GPT-2, or lines of plain text in a .txt file. SystemExit names what cannot be read."""
    examples = []
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise SystemExit(f"no {path} ({error.strerror}): fetch {LAMBADA_URL} by hand") from None
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode() if str(path).endswith(".txt") else json.loads(line)["text"]
            context, word = text.rsplit(" ", maxsplit=1)
            if not context.strip() or not word:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise SystemExit(
                f"{path}, line {number}: no text of two words or more; mend it, or fetch "
                f"{LAMBADA_URL} anew"
            ) from None
        examples.append({"context": context, "word": word})
    if not examples:
        raise SystemExit(f"{path} is empty: fetch {LAMBADA_URL} anew")
    return examples


def render_lambada(example: dict, encoding: tiktoken.Encoding) -> hellaswag.Question:
    """A context with a single ending, the last word."""
    context, word = hellaswag.encode_pair(encoding, example["context"], " " + example["word"])
    return hellaswag.Question(context, [word], [1], 0)


def predict_words(model, questions: list[hellaswag.Question], **how) -> WordSums:
    """The last words' losses, and how many are predicted; `how` as hellaswag.scores has it."""
    words = nats = hits = 0
    for _, losses, all_hits in hellaswag.scores(model, questions, **how):
        words, nats, hits = words + 1, nats + losses[0], hits + all_hits[0]
    return WordSums(words, nats, hits)


def measure(config, lambada: str):
    """Print how good --init_from's weights are: on the validation split and on HellaSwag, where
    these are not switched off, and on LAMBADA, where its file is given."""
    import train_gpt2 as trainer

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = trainer.resolve_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    trainer.start_ranks(world_size, device, config.timeout)
    if rank > 0:
        dist.barrier()  # the first one fetches what is missing, and says what is wrong
    config = replace(config, init_from=config.init_from or "gpt2")
    model = trainer.load_model(config.init_from).eval().to(device)
    config = trainer.network_of(model, config)
    T = min(config.block_size, model.config.block_size)
    config = replace(config, block_size=T)
    windows = trainer.open_windows(config, "val") if config.val_interval else ()
    try:
        encoding = trainer.encoding_of(config.vocab_size)
    except SystemExit:
        if config.hellaswag_interval or lambada:
            raise
        encoding = None  # a loss can be had without
    ways = hellaswag.WAYS if config.hellaswag_interval else ()
    questions = {way: trainer.questions_of(config, encoding, way) for way in ways}
    texts = load_lambada(lambada) if lambada else []
    words = hellaswag.prepare(texts, encoding, T, render_lambada)
    if rank == 0 and world_size > 1:
        dist.barrier()

    autocast = trainer.autocast_of(trainer.resolve_dtype(config.dtype, device), device)
    how = {"rank": rank, "world_size": world_size, "progress": rank == 0, "autocast": autocast}
    trainer.print0(f"{config.init_from}, {sum(p.numel() for p in model.parameters()):,} parameters")
    if windows:
        B = 8 if config.micro_batch_size == "auto" else config.micro_batch_size
        mine = range(rank, trainer.val_windows(windows, config), world_size)
        starts = tqdm(range(0, len(mine), B), unit="batch", disable=rank > 0, leave=False)
        batches = (windows.stack(mine[i : i + B]) for i in starts)
        n_bytes = bytes_of_tokens(encoding, config.vocab_size)
        sums = sum_over_tokens(model, batches, n_bytes, autocast)
        trainer.print0(
            f"  {config.data_dir}: {TokenSums(*trainer.sum_over_ranks(*sums, device=device))}"
        )
    for way in questions:
        counts = hellaswag.evaluate(model, questions[way], **how)
        counts = hellaswag.Counts(*trainer.sum_over_ranks(*counts, device=device))
        trainer.print0(f"  HellaSwag as the {way} has it: {counts}")
    if words:
        sums = predict_words(model, words, **how)
        trainer.print0(f"  LAMBADA: {WordSums(*trainer.sum_over_ranks(*sums, device=device))}")
    if world_size > 1:
        dist.destroy_process_group()


# ---- weights for other programs ------------------------------------------------------------------


def export(model, folder: Path, encoding: tiktoken.Encoding | None, again: str):
    """Write what transformers loads into a folder, whole or not at all: the weights, and GPT-2's
    tokenizer where that is the encoding. SystemExit, which says to give `again`, if it cannot."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an attempt that failed
    try:
        model.save_pretrained(aside)
        if encoding and encoding.name == "gpt2":
            save_tokenizer(aside, model.config.block_size)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    except (OSError, SafetensorError) as error:
        raise SystemExit(
            f"{folder} cannot be written ({error}): make room, and give {again}"
        ) from None


def save_tokenizer(folder: Path, n_positions: int):
    """GPT-2's tokenizer: under other names transformers has the files that tiktoken keeps."""
    contents = {}
    for name, (file, sha256) in TOKENIZER_FILES.items():
        try:
            contents[name] = read_file_cached(f"{TOKENIZER_URL}/{file}", sha256)
        except (OSError, ValueError):
            return  # they are gone, and so is the network: the weights are what matters
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": n_positions}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

"""What trained weights are for: to go on with a text.

    python train_gpt2.py --prompt "Hello, I'm a language model," --init_from log/gpt2-001

This is train_gpt2.py's; here are its options and the functions behind them, which work on any of
its models.
"""

import codecs
import os
import sys
from dataclasses import dataclass, fields

import tiktoken
import torch
import tyro


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


def check_task(task: Task) -> bool:
    """Whether there is something to do but to train. SystemExit if the options make no sense."""
    given = {f.name for f in fields(task) if getattr(task, f.name) != f.default}
    for name in sorted(given):
        if "prompt" not in given:
            raise SystemExit(f"--{name} goes with --prompt: give both, or none")
    bounds = {"num_samples": (1, 10**6), "max_new_tokens": (1, 10**9), "top_k": (0, 10**9)}
    bounds |= {"temperature": (0, 10**9), "top_p": (0, 1)}
    for name, (least, most) in bounds.items():
        if not least <= getattr(task, name) <= most:  # nan neither
            raise SystemExit(f"--{name} {getattr(task, name)}: give {least} to {most}")
    return bool(task.prompt)


def run_task(config, task: Task):
    """Do it, on the first of torchrun's ranks."""
    import train_gpt2 as trainer  # here, not above: it imports this module

    if int(os.environ.get("RANK", 0)) > 0:
        return
    prompts = [read_prompt(prompt) for prompt in task.prompt]
    device = trainer.resolve_device(config.device)
    model = trainer.load_model(config.init_from or "gpt2").eval().to(device)
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

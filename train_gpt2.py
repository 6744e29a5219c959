"""Reproduce GPT-2 (124M): from a folder of tokens to a trained model, in one file.

    python train_gpt2.py                     # the 124M run, on the shards that fineweb.py makes
    python train_gpt2.py demo                # offline, on a CPU, two minutes
    python train_gpt2.py gpt2 --lr 1e-3      # every field of Config is a flag
    torchrun --standalone --nproc_per_node=8 train_gpt2.py gpt2
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train_gpt2.py gpt2
    python train_gpt2.py gpt2 --resume auto  # the newest run that did not finish, else a new one
    python train_gpt2.py gpt2 --prompt "Hello, I'm a language model," --init_from log/gpt2-001
    python train_gpt2.py gpt2 --eval_only --init_from log/gpt2-001

Papers: GPT-2, "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), for
the network; GPT-3, "Language Models are Few-Shot Learners" (Brown et al. 2020), for the training.
"""

import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import demo
import fineweb
import hellaswag
import runs
from devices import (
    autocast_of,
    fits_memory,
    peak_flops,
    print0,
    resolve_device,
    resolve_dtype,
    start_ranks,
    sum_over_ranks,
)
from inference import Task, check_task, export, run_task

# ---- hyperparameters: the part to tweak ----------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Every hyperparameter of a run, with its unit and reason. The defaults are GPT-2 124M's."""

    preset: tyro.conf.Suppress[str] = "gpt2"
    """names the run's folder"""
    n_layer: int = 12
    """blocks"""
    n_head: int = 12
    """attention heads in a block, of n_embd / n_head channels each: 64 in every GPT-2"""
    n_embd: int = 768
    """channels of the residual stream"""
    block_size: int = 1024
    """positions: tokens of the longest context"""
    vocab_size: int = 50257
    """tokens: 256 bytes, 50,000 merges, end-of-text; 257 means bytes and end-of-text alone"""
    dropout: float = 0.0
    """probability; training for less than two epochs needs none"""

    total_batch_size: int = 2**19
    """tokens an update, over all ranks and micro-steps: GPT-3's 0.5M, as a power of two"""
    max_steps: int = 19_073
    """updates: 10B tokens / 2**19"""
    lr: float = 6e-4
    """peak learning rate (GPT-3, table 2.1)"""
    min_lr: float = 6e-5
    """learning rate at the end: a tenth of the peak"""
    cooldown: float = 0.0
    """share of the updates, the last ones, in which the rate falls along a line to min_lr, after it
    was constant; 0: half a cosine all the way from the warm-up"""
    warmup_steps: int = 715
    """updates of linear warm-up: GPT-3's 375M tokens / 2**19"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonal updates for the blocks' matrices, AdamW for the rest"""
    muon_lr: float = 0.02
    """Muon's peak learning rate, on lr's schedule; a matrix moves by about so much of its norm"""
    weight_decay: float = 0.1
    """on matrices only"""
    beta1: float = 0.9
    """AdamW's memory of the gradient"""
    beta2: float = 0.95
    """AdamW's memory of the squared gradient: shorter than the usual 0.999, as GPT-3's"""
    grad_clip: float = 1.0
    """largest norm of the gradient; 0 clips nothing"""
    shuffle: bool = True
    """take the windows in a seeded order, a new one each epoch; else in the stream's own order"""
    seed: int = 1337
    """of initialization, order of the data, dropout and samples"""

    # nothing below changes the losses: a continued run may have it otherwise
    data_dir: str = "edu_fineweb10B"
    """folder of the token shards, as fineweb.py makes them"""
    micro_batch_size: int | Literal["auto"] = "auto"
    """sequences in one forward pass; auto: as many as fit a GPU's memory, found by trial, else 4"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of matrix products; auto: on CUDA bfloat16, or float16 on a GPU without it, else float32"""
    compile: bool = True
    """torch.compile: a minute at the start, much faster steps"""
    val_interval: int = 250
    """updates between validations; 0: none, as for all intervals"""
    val_tokens: int = 20 * 2**19
    """tokens of a validation: the same for any number of GPUs"""
    hellaswag_interval: int = 250
    """updates between HellaSwag evaluations"""
    sample_interval: int = 250
    """updates between samples"""
    checkpoint_interval: int = 250
    """updates between checkpoints, of 1.5 GB each for 124M parameters"""
    keep_checkpoints: int = 2
    """the last so many stay; 0: all"""
    archive_interval: int = 5000
    """checkpoints at its multiples stay too"""
    max_bad_steps: int = 10
    """updates in a row that are skipped, as not finite, before the run stops; 0: never stop"""
    init_from: str = ""
    """weights to begin with: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder that transformers
    loads, a run's folder, or one of its step_NNNNNN.pt"""
    resume: str = ""
    """a run's folder to continue; auto: the preset's newest that did not finish, else a new one"""
    resume_anyway: bool = False
    """continue though hyperparameters differ in which the losses would not be the run's"""
    out_dir: str = ""
    """the run's folder; empty: the next free log/PRESET-NNN"""
    timeout: float = 600.0
    """seconds a rank may stand still, as it does when another one hangs; 0: PyTorch's half hour"""
    wandb: bool = False
    """send the log to Weights & Biases too"""


NETWORK = ("n_layer", "n_head", "n_embd", "vocab_size")  # what weights fix

# too small for torch.compile to earn back its minute on a CPU
_SMALL = Config(n_layer=4, n_head=4, n_embd=128, vocab_size=257, compile=False)
PRESETS = {
    # sizes: GPT-2 paper, table 2; learning rates: GPT-3's for models of about that size
    "gpt2": Config(),
    # the same network and data, trained otherwise; the rates are those of smaller networks
    "gpt2-fast": Config(optimizer="muon", lr=3e-3, min_lr=0.0, warmup_steps=250, cooldown=0.6),
    "gpt2-medium": Config(n_layer=24, n_head=16, n_embd=1024, lr=3e-4, min_lr=3e-5),
    "gpt2-large": Config(n_layer=36, n_head=20, n_embd=1280, lr=2.5e-4, min_lr=2.5e-5),
    "gpt2-xl": Config(n_layer=48, n_head=25, n_embd=1600, lr=2e-4, min_lr=2e-5),
    "shakespeare_char": replace(
        _SMALL, data_dir="shakespeare_char", block_size=64, max_steps=600, optimizer="muon",
        total_batch_size=12 * 64, micro_batch_size=12, lr=1.6e-2, muon_lr=0.03, min_lr=0.0,
        warmup_steps=20, cooldown=0.9, val_tokens=100_000, hellaswag_interval=0,
        checkpoint_interval=500,
    ),
    "finetune": Config(
        init_from="gpt2", data_dir="my_data", total_batch_size=2**15, max_steps=200, lr=3e-5,
        min_lr=3e-6, warmup_steps=20, val_interval=50, val_tokens=2**18, hellaswag_interval=0,
        sample_interval=50, checkpoint_interval=100,
    ),
    "demo": replace(
        _SMALL, data_dir="demo_data", block_size=96, max_steps=750,
        total_batch_size=12 * 96, micro_batch_size=6, lr=6e-3, min_lr=0.0, warmup_steps=100,
        val_interval=250, val_tokens=50_000, hellaswag_interval=375, sample_interval=375,
        checkpoint_interval=375,
    ),
}  # fmt: skip


# ---- model ---------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens so far: each is computed once, however long the text gets."""

    def __init__(self, n_positions: int):
        self.n_positions = n_positions
        self.T = 0  # tokens so far
        self.layers = {}  # an attention module -> its keys and values: (2, B, nh, n_positions, hs)

    def extend(self, layer: nn.Module, k: torch.Tensor, v: torch.Tensor):
        """Add a layer's k and v, each (B, nh, T, hs), of the tokens that follow; return all."""
        B, nh, T, hs = k.shape
        if layer not in self.layers:
            self.layers[layer] = k.new_empty(2, B, nh, self.n_positions, hs)
        kv, stop = self.layers[layer], self.T + T
        kv[:, :, :, self.T : stop] = torch.stack((k, v))
        return kv[:, :, :, :stop].unbind()

    def repeat(self, n: int):
        """Each row n times: texts that begin alike share that beginning's computation."""
        self.layers = {layer: kv.repeat_interleave(n, dim=1) for layer, kv in self.layers.items()}


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and those before it, n_head heads side by side."""

    def __init__(self, config: Config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"{config.n_embd} channels do not divide into {config.n_head} heads")
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k, v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, mask=None, cache=None):  # (B, T, C) to (B, T, C)
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(self, k, v)  # each (B, nh, T with those before, hs)
        # flash attention: the (T, T) weights are never written to memory (Dao et al. 2022)
        dropout = self.dropout if self.training else 0.0
        is_causal = mask is None and T > 1  # a lone query is the last one: it sees all keys
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads back side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each position for itself: four times as wide, GELU, and back."""

    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # the approximation GPT-2 was trained with
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) to (B, T, C)
        x = self.gelu(self.c_fc(x))  # (B, T, 4C)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, config: Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, mask=None, cache=None):  # (B, T, C) to (B, T, C)
        # norms sit on the branches (GPT-2 paper, section 2.3): along the sum itself gradients
        # reach the first block unchanged
        x = x + self.attn(self.ln_1(x), mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class HeadLoss(torch.autograd.Function):
    """The head and the mean cross-entropy in one, some rows at a time. All logits at once would be
    the largest thing in memory, several times over: as products, in float32, as gradients. So both
    gradients are computed while a part's logits are there, and only these are kept."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size: int, learning: bool):
        """x (N, C), weight (V, C), targets (N,) below vocab_size, to nats: a mean over N."""
        n_parts = min(8, math.ceil(len(x) * len(weight) / 2**24))
        grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
        loss = torch.zeros((), device=x.device)
        parts = zip(*(t.chunk(n_parts) for t in (x, targets[:, None], grad_x)), strict=True)
        for x_part, y, grad_part in parts:  # (n, C), (n, 1), (n, C)
            logits = F.linear(x_part, weight).float()  # (n, V)
            logits[:, vocab_size:] = -math.inf  # what pads the vocabulary
            log_sum = logits.logsumexp(dim=-1, keepdim=True)  # (n, 1)
            loss += (log_sum - logits.gather(1, y)).sum()
            if learning:
                # in the logits the gradient is what the model expects minus what came
                surprise = (logits - log_sum).exp()  # (n, V)
                surprise.scatter_add_(1, y, torch.full_like(log_sum, -1.0))
                grad_part += surprise @ weight
                grad_weight += surprise.t() @ x_part
        ctx.save_for_backward(grad_x, grad_weight)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        # the mean's 1 / N comes here: in float16 the parts would be too small for it
        grad_x, grad_weight = ctx.saved_tensors
        grad = grad / len(grad_x)
        return grad_x * grad, grad_weight * grad, None, None, None


class GPT(nn.Module):
    """GPT-2, with the parameter names of OpenAI's release; of other blocks, if they are given."""

    def __init__(self, config: Config, block: Callable[[Config], nn.Module] = Block):
        super().__init__()
        self.config = config
        # 50257 becomes 50304 = 786 * 64: matrix kernels work in tiles of such sizes
        padded_vocab_size = math.ceil(config.vocab_size / 64) * 64
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(padded_vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press & Wolf 2016)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw GPT-2's: deviation 0.02, positions 0.01 (openai/gpt-2, src/model.py)."""
        for name, p in self.named_parameters():  # has the tied matrix once: it is drawn once
            if name.endswith("bias"):
                p.zero_()
            elif "ln_" in name:
                p.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                # 2 n_layer branches add up: without this the stream would grow with the depth
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                p.normal_(std=0.01 if name.endswith("wpe.weight") else 0.02)

    def hidden(self, idx, pos=None, mask=None, cache=None) -> torch.Tensor:
        """idx (B, T) int64 to what the head reads, (B, T, C).

        pos (B, T), positions below block_size, and mask (B, 1, T, T) bool, which token sees which,
        are for what is not one text a row. A cache takes texts in parts: the first of any length,
        then a token at a time."""
        if pos is None:
            start = cache.T if cache else 0
            if start and idx.size(1) > 1:
                raise ValueError("a cache takes one token at a time after the first ones")
            T = start + idx.size(1)
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens, but only {self.config.block_size} positions")
            pos = torch.arange(start, T, device=idx.device)
        tok_emb = self.transformer.wte(idx)  # (B, T, C)
        pos_emb = self.transformer.wpe(pos)  # (T, C) or (B, T, C)
        x = self.transformer.drop(tok_emb + pos_emb)
        for block in self.transformer.h:
            x = block(x, mask, cache)
        if cache:
            cache.T = T
        return self.transformer.ln_f(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """What hidden returned, or a part of it, (..., C) to (..., vocab_size)."""
        return self.lm_head(x)[..., : self.config.vocab_size]  # the padding stays in here

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None):
        """idx (B, T) int64, T up to block_size, to the logits (B, T, vocab_size) of the tokens that
        follow, and None; given these as targets (B, T), to None, and their mean cross-entropy in
        nats."""
        x = self.hidden(idx)
        if targets is None:
            return self.logits(x), None
        return None, HeadLoss.apply(
            x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.vocab_size,
            torch.is_grad_enabled(),
        )  # fmt: skip

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, num_samples=1, **how) -> torch.Tensor:
        """Continue each row of idx (B, T) num_samples times, to (B * num_samples, T and up to
        max_new_tokens more). `stream` says how."""
        texts = [idx.repeat_interleave(num_samples, dim=0)]
        texts += self.stream(idx, max_new_tokens, temperature, num_samples, **how)
        return torch.cat(texts, dim=1)

    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, temperature=1.0, num_samples=1, stop_token=None, **how
    ) -> Iterator[torch.Tensor]:
        """Yield what continues idx (B, T), a token (B * num_samples, 1) at a time, drawn by `draw`.

        A text that has met stop_token repeats it, until all have. Where no position is left a text
        goes on from its last half, computed anew: its tokens have other positions then."""
        n, cache = self.config.block_size, None
        for i in range(max_new_tokens):
            if cache is None or cache.T == n:
                new = idx[:, -n:] if cache is None else idx[:, -max(1, n // 2) :]
                cache = KVCache(min(n, new.size(1) + max_new_tokens))
            logits = self.logits(self.hidden(new, cache=cache)[:, -1])  # (B, vocab_size)
            if i == 0:
                cache.repeat(num_samples)
                idx, logits = (t.repeat_interleave(num_samples, dim=0) for t in (idx, logits))
                ended = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
            new = draw(logits.float(), temperature, **how)  # (B * num_samples, 1)
            if stop_token is not None:
                ended |= new == stop_token
                new = new.masked_fill(ended, stop_token)
            yield new
            if ended.all():
                return
            idx = torch.cat((idx, new), dim=1)

    @classmethod
    def with_weights(cls, config: Config, weights: dict[str, torch.Tensor]) -> "GPT":
        """A model with these weights. Where they are not the configuration's it says so, by all
        kinds of exceptions, before that takes any memory."""
        check_config(config)
        if config.n_layer > len(weights):
            raise ValueError(f"{config.n_layer} layers, but {len(weights)} weights")
        with torch.device("meta"):  # names and shapes alone
            cls(config).load_state_dict(weights, assign=True)
        model = cls(config)
        model.load_state_dict(weights)
        return model

    @classmethod
    def from_pretrained(cls, source: str | Path, dropout: float = 0.0) -> "GPT":
        """A GPT-2 from a folder with config.json and model.safetensors, as transformers and
        save_pretrained write it, or OpenAI's gpt2, gpt2-medium, gpt2-large, gpt2-xl from the hub.
        SystemExit, one line, if that is no GPT-2."""
        folder = Path(source) if os.path.isdir(source) else download_gpt2(str(source))
        try:
            parts = json.loads((folder / "config.json").read_text())
            if parts.get("n_inner") == 4 * parts["n_embd"]:
                parts["n_inner"] = None  # which means the same
            usual = GPT2 | {"add_cross_attention": False, "quantization_config": None}
            odd = {key: parts[key] for key in usual if parts.get(key, usual[key]) != usual[key]}
            if odd:
                raise ValueError(f"GPT-2 has no {odd}")
            shape = {key: parts[key] for key in NETWORK}
            config = Config(**shape, block_size=parts["n_positions"], dropout=dropout)
            state = {}
            for name, w in load_file(folder / "model.safetensors").items():
                if not w.is_floating_point():
                    raise ValueError(f"{name} is of {w.dtype}")
                if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
                    name = "transformer." + name.removeprefix("transformer.")
                    state[name] = w.t() if name.endswith(TRANSPOSED) else w
            wte = state["transformer.wte.weight"]
            wte = F.pad(wte, (0, 0, 0, -config.vocab_size % 64))
            state |= {"transformer.wte.weight": wte, "lm_head.weight": wte}
            return cls.with_weights(config, state)
        except (Exception, SystemExit) as error:  # no file, no JSON, other keys, types, shapes
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise SystemExit(f"{folder} holds no GPT-2 that can be loaded: {reason:.500}") from None

    def save_pretrained(self, folder: str | Path):
        """Write config.json, generation_config.json and model.safetensors, for transformers and
        for from_pretrained."""
        folder, config = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, p in self.named_parameters():
            w = p.detach().float().cpu()
            w = w[: config.vocab_size] if name.endswith("wte.weight") else w
            weights[name] = (w.t() if name.endswith(TRANSPOSED) else w).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        parts = GPT2 | {key: getattr(config, key) for key in NETWORK}
        parts |= dict.fromkeys(("n_positions", "n_ctx"), config.block_size)  # llama.cpp has n_ctx
        parts |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
        # what a document follows and ends with: end-of-text, the last token of GPT-2's
        end = min(config.vocab_size, 50257) - 1
        parts |= {"bos_token_id": end, "eos_token_id": end, "architectures": ["GPT2LMHeadModel"]}
        generation = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
        for name, content in (("config", parts), ("generation_config", generation)):
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        # safetensors makes its file for its owner alone
        shutil.copymode(folder / "config.json", folder / "model.safetensors")


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None) -> torch.Tensor:
    """A token (B, 1) for each row of logits (B, V): divided by the temperature (0: always the
    likeliest), among the top_k likeliest (0: all), and of these among the likeliest that together
    have a probability of top_p."""
    logits = logits.nan_to_num()  # a model that diverged: drawing from nan ends the program
    if temperature < 1e-30:  # 0, or what float32 cannot divide by
        return logits.argmax(dim=-1, keepdim=True)
    # the largest becomes 0, so that no temperature can make it infinite
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p < 1.0:  # nucleus sampling (Holtzman et al. 2019)
        p, order = probs.sort(dim=-1, descending=True)
        enough = p.cumsum(dim=-1) - p >= top_p  # those before suffice
        p[:, 1:] = p[:, 1:].masked_fill(enough[:, 1:], 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, p)
    return torch.multinomial(probs, 1, generator=generator)


# OpenAI's code keeps linear layers as (in, out), PyTorch as (out, in)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# what else the config.json of a GPT-2 says
GPT2 = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "n_inner": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}  # fmt: skip


def download_gpt2(name: str) -> Path:
    """The folder of OpenAI's weights in the hub's cache, fetched if absent."""
    names = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    if name not in names:
        raise SystemExit(f"no model {name!r}: give a folder, or one of {', '.join(names)}")
    from huggingface_hub import snapshot_download

    files = ["config.json", "model.safetensors"]
    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=files))
    except Exception as error:  # offline, refused, rate-limited: the hub has a word for each
        reason = f"the hub does not give {name} ({type(error).__name__})"
        raise SystemExit(f"{reason}: connect once, or name a folder with its {files}") from None


# ---- data: shards to batches ---------------------------------------------------------------------


class Windows:
    """A split's tokens as numbered windows of block_size + 1 tokens; neighbours share one."""

    def __init__(self, data_dir: str, split: str, block_size: int, vocab_size: int):
        self.block_size = block_size
        self.shards = fineweb.open_shards(data_dir, split, vocab_size)  # each (n,) uint16, on disk
        # a window ends before its shard does: less than a window a shard is never read
        self.ends = np.cumsum([max(0, len(shard) - 1) // block_size for shard in self.shards])
        if not len(self):
            raise SystemExit(
                f"{data_dir} has too little {split} text for --block_size {block_size}"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        """Window i: (block_size + 1,) uint16."""
        k, start = self.place(i)
        return self.shards[k][start : start + self.block_size + 1]

    def place(self, i: int) -> tuple[int, int]:
        """Window i's shard, and where in it the window starts."""
        k = int(np.searchsorted(self.ends, i, side="right"))
        return k, (i - (int(self.ends[k - 1]) if k else 0)) * self.block_size

    def describe(self, indices: Iterable[int]) -> str:
        """Where windows lie: a line for each shard, with their first tokens' places in it."""
        starts = {}
        for k, start in sorted(map(self.place, indices)):
            starts.setdefault(self.shards[k].filename, []).append(str(start))
        return "\n".join(f"  {file}: tokens from {', '.join(s)}" for file, s in starts.items())

    def stack(self, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows as a batch x, y, both (B, T) int64: y is x moved by one."""
        tokens = np.stack([self[i] for i in indices]).astype(np.int64)  # (B, T + 1)
        x, y = torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])
        return x.contiguous(), y.contiguous()


@functools.lru_cache(maxsize=2)  # one step may see the end of an epoch and the next one's start
def epoch_order(n_windows: int, seed: int, epoch: int) -> np.ndarray:
    """Each epoch's own order: a permutation of the windows' numbers, (n_windows,)."""
    order = np.arange(n_windows, dtype=np.uint32)
    np.random.default_rng((seed, epoch)).shuffle(order)
    return order


def windows_of_step(windows: Windows, config: Config, step: int, share=slice(None)) -> list[int]:
    """The windows that update `step` takes, or a share of them: W, from number step * W of the
    epochs' orders laid end to end."""
    W = config.total_batch_size // config.block_size
    indices = []
    for number in range(step * W, (step + 1) * W)[share]:
        epoch, i = divmod(number, len(windows))
        if config.shuffle:
            i = int(epoch_order(len(windows), config.seed, epoch)[i])
        indices.append(i)
    return indices


def get_batch(windows: Windows, config: Config, step: int, micro_step: int, rank=0, world_size=1):
    """The batch x, y, both (B, T) int64, of a rank's micro-step: a function of its arguments.

    Micro-steps and ranks share the step's windows out. No position is kept, so none is lost and
    none drifts.
    """
    B = config.micro_batch_size
    first = (micro_step * world_size + rank) * B
    return windows.stack(windows_of_step(windows, config, step, slice(first, first + B)))


def prefetch(fetch: Callable, arguments: Iterable[tuple], ahead: int = 4) -> Iterator:
    """fetch(*a) for each a in arguments, in order, by a thread that keeps `ahead` of its reader."""
    arguments = iter(arguments)
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = deque(thread.submit(fetch, *a) for a in itertools.islice(arguments, ahead))
        while pending:
            batch = pending.popleft().result()
            pending.extend(thread.submit(fetch, *a) for a in itertools.islice(arguments, 1))
            yield batch


# ---- optimizer and schedule ----------------------------------------------------------------------


def get_lr(step: int, config: Config) -> float:
    """The learning rate of update `step`: linear warm-up, then half a cosine down to min_lr; or,
    with a cooldown, a constant rate and then a line (Hägele et al. 2024)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps  # + 1: a rate of 0 would waste a step
    if config.cooldown:
        left = (config.max_steps - step) / (config.cooldown * config.max_steps)  # of the cooldown
        return config.min_lr + max(0.0, min(1.0, left)) * (config.lr - config.min_lr)
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))  # from 1 to 0
    return config.min_lr + cosine * (config.lr - config.min_lr)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of the blocks, which map vectors to vectors: neither embeddings nor the head."""
    return [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]


def configure_muon(model: nn.Module, config: Config) -> torch.optim.Muon | None:
    """Muon for the hidden matrices, if the configuration wants it."""
    if config.optimizer == "adamw":
        return None
    decay = config.weight_decay
    return torch.optim.Muon(hidden_matrices(model), lr=config.muon_lr, weight_decay=decay)


def configure_optimizer(model: nn.Module, config: Config, device_type: str) -> torch.optim.AdamW:
    """AdamW for what is not Muon's. It decays matrices (2 dimensions: linear layers, embeddings)
    and nothing else."""
    taken = {*hidden_matrices(model)} if config.optimizer == "muon" else set()
    params = [p for p in model.parameters() if p not in taken]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    # fused: one kernel goes over all parameters, instead of a dozen over each
    fused = device_type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=1e-8, fused=fused)


def step_muon(muon: torch.optim.Muon, scaler, rank: int = 0, world_size: int = 1):
    """Muon's update. Orthogonalizing is the dear part: ranks share the matrices out, the largest
    first, and give each other theirs, with its momentum, so that all stay the same."""
    params = sorted(muon.param_groups[0]["params"], key=torch.numel, reverse=True)
    for i, p in enumerate(params):
        if i % world_size != rank:
            p.grad = None  # Muon passes over it
    scaler.step(muon)
    if world_size == 1:
        return
    for owner in range(min(world_size, len(params))):
        tensors = []
        for p in params[owner::world_size]:
            if "momentum_buffer" not in muon.state[p]:
                muon.state[p]["momentum_buffer"] = torch.zeros_like(p)
            tensors += [p.detach(), muon.state[p]["momentum_buffer"]]
        flat = torch.cat([t.flatten() for t in tensors])  # one message instead of many
        dist.broadcast(flat, owner)
        if owner != rank:
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(part.view_as(t))


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss stands out by six standard deviations from those before it."""
    return len(before) >= 20 and loss > np.mean(before) + 6 * np.std(before)


# ---- evaluation ----------------------------------------------------------------------------------

SAMPLE_PROMPT = "Hello, I'm a language model,"


def val_windows(windows: Windows, config: Config) -> int:
    """How many windows have the split's first val_tokens tokens."""
    return max(1, min(config.val_tokens // config.block_size, len(windows)))


@torch.no_grad()
def validation_loss(
    model,
    raw_model: GPT,
    windows: Windows,
    config: Config,
    rank=0,
    world_size=1,
    stop=lambda: False,
) -> float:
    """Mean cross-entropy in nats of the split's first val_tokens tokens; ranks share them out.
    `stop` is asked before each batch, and may end the evaluation early."""
    device, B = raw_model.lm_head.weight.device, config.micro_batch_size
    n_windows = val_windows(windows, config)
    mine = range(rank, n_windows, world_size)
    total = 0.0
    raw_model.eval()
    for i in range(0, len(mine), B):
        if stop():
            break
        x, y = windows.stack(mine[i : i + B])
        whole = len(x) == B  # another shape would be compiled anew
        _, loss = (model if whole else raw_model)(x.to(device), y.to(device))
        total += loss.item() * len(x)
    raw_model.train()
    return sum_over_ranks(total, device=device)[0] / n_windows


def sample_texts(model: GPT, encoding, prompt: str, seed: int, n: int = 4) -> list[str]:
    """n continuations of the prompt by 32 tokens, each among the 50 likeliest; a seed, a text."""
    device = model.lm_head.weight.device
    idx = torch.tensor([encoding.encode_ordinary(prompt)], device=device)  # (1, T)
    generator = torch.Generator(device).manual_seed(seed)
    model.eval()
    idx = model.generate(idx, 32, num_samples=n, top_k=50, generator=generator)  # (n, T + 32)
    model.train()
    return [encoding.decode([t for t in row if t < encoding.n_vocab]) for row in idx.tolist()]


# ---- the run -------------------------------------------------------------------------------------


def resolve_micro_batch_size(
    config: Config, world_size: int, fits: Callable[[int], bool] = lambda B: B <= 4
) -> int:
    """Sequences of a forward pass; for auto the largest power of two that fits, and divides a
    rank's step. SystemExit if the batch does not divide."""
    sequences, rest = divmod(config.total_batch_size, config.block_size * world_size)
    if rest or not sequences:
        raise SystemExit(
            f"--total_batch_size {config.total_batch_size} is no multiple of {world_size} ranks x "
            f"--block_size {config.block_size}: give one that is"
        )
    if config.micro_batch_size == "auto":
        B = math.gcd(sequences, 2**30)
        while B > 1 and not fits(B):
            B //= 2
        return B
    if sequences % config.micro_batch_size:
        raise SystemExit(
            f"--micro_batch_size {config.micro_batch_size} does not divide the {sequences} "
            "sequences of a rank's step: give one that does"
        )
    return config.micro_batch_size


def flops_per_token(config: Config, n_params: int) -> int:
    """Of forward and backward pass: 6 for each parameter, and 6 L C T for attention, half of the
    12 L C T in appendix B of the PaLM paper, since a causal kernel skips the other half."""
    return 6 * n_params + 6 * config.n_layer * config.n_embd * config.block_size


def model_of(path: Path, checkpoint: dict, dropout: float) -> GPT:
    """A checkpoint's model, whose positions may be more than the windows it was trained on.
    SystemExit where hyperparameters, weights and moments are not those of a run of this script."""
    try:
        config = checkpoint["config"]
        config.pop("prompt", None)  # was among the hyperparameters once
        config = Config(**config)
        check_config(config)
        n_positions = len(checkpoint["model"]["transformer.wpe.weight"])
        config = replace(config, block_size=n_positions, dropout=dropout)
        model = GPT.with_weights(config, checkpoint["model"])
        adamw, muon = configure_optimizer(model, config, "cpu"), configure_muon(model, config)
        for name, optimizer, keys in (
            ("optimizer", adamw, ("step", "exp_avg", "exp_avg_sq")),
            ("muon", muon, ("momentum_buffer",)),
        ):
            groups = optimizer.param_groups if optimizer else []
            shapes = [p.shape for group in groups for p in group["params"]]
            shapes = [{key: () if key == "step" else shape for key in keys} for shape in shapes]
            states = checkpoint[name]["state"].items() if optimizer else ()
            found = {i: {key: w.shape for key, w in state.items()} for i, state in states}
            if found and found != dict(enumerate(shapes)):  # there are none before the first update
                raise ValueError("the optimizer's moments are of other weights")
        return model
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        line = f"{path} is of another version of this script ({reason:.500}): use that version"
        raise SystemExit(line) from None


def load_model(source: str, dropout: float = 0.0) -> GPT:
    """The weights of a checkpoint, the newest ones of a run's folder, or whatever
    GPT.from_pretrained can load."""
    try:
        path = Path(source)
        if path.suffix == ".pt" and not os.path.isdir(path):
            checkpoint = runs.load_checkpoint(path)
        else:
            path, checkpoint = runs.newest_checkpoint(path)
    except ValueError as error:
        raise SystemExit(f"{error}: take another one") from None
    if checkpoint:
        return model_of(path, checkpoint, dropout)
    exported = Path(source) / "hf"
    return GPT.from_pretrained(exported if os.path.isdir(exported) else source, dropout)


def encoding_of(vocab_size: int):
    """The encoding that a vocabulary belongs to, or is larger than; SystemExit if none is."""
    if vocab_size < 50257 and vocab_size != 257:
        raise SystemExit(
            f"no encoding has {vocab_size} tokens: give --vocab_size 257 (bytes) or 50257 (GPT-2), "
            "or --sample_interval 0 --hellaswag_interval 0"
        )
    return fineweb.get_encoding("bytes" if vocab_size == 257 else "gpt2")


def check_config(config: Config):
    """SystemExit naming the first hyperparameter that makes no sense."""
    for f in fields(config):
        name, value, kind = f.name, getattr(config, f.name), type(f.default)
        if name == "micro_batch_size":
            if value == "auto":
                continue
            kind = int
        if not isinstance(value, int | float if kind is float else kind):  # not from a flag
            raise SystemExit(f"--{name} {value!r}: give it a value of type {kind.__name__}")
        positive = ("n_", "block", "vocab", "total", "micro", "max_steps")
        least = 1 if name.startswith(positive) else 0
        shares = ("dropout", "beta1", "beta2", "cooldown")
        below = 1.0 if name in shares else 1e18 if kind is int else math.inf
        if kind in (int, float) and not least <= value < below:
            raise SystemExit(f"--{name} {value}: give {least} or more, and less than {below}")
    if config.n_embd % config.n_head:
        raise SystemExit(f"--n_embd {config.n_embd} does not divide into --n_head {config.n_head}")


def network_of(model: GPT, config: Config) -> Config:
    """The configuration with the model's network."""
    return replace(config, **{name: getattr(model.config, name) for name in NETWORK})


def open_windows(config: Config, split: str) -> Windows:
    """A split's windows. SystemExit if weights and shards speak of other tokens."""
    n_vocab = fineweb.read_manifest(config.data_dir).get("vocab_size", config.vocab_size)
    if config.init_from and n_vocab != config.vocab_size:
        raise SystemExit(
            f"{config.data_dir}/ has a vocabulary of {n_vocab}, {config.init_from} one of "
            f"{config.vocab_size}: make the shards in the weights' encoding, or take other weights"
        )
    return Windows(config.data_dir, split, config.block_size, config.vocab_size)


def questions_of(config: Config, encoding, way: str) -> list[hellaswag.Question]:
    """HellaSwag's questions, or those that the data has about itself, rendered this way."""
    own = Path(config.data_dir) / "hellaswag_val.jsonl"
    try:
        examples = hellaswag.load(own if own.exists() else hellaswag.PATH)
    except SystemExit as error:
        raise SystemExit(f"{error}; or do without, --hellaswag_interval 0") from None
    return hellaswag.prepare(examples, encoding, config.block_size, hellaswag.WAYS[way])


def prepare(config: Config, path: Path | None, checkpoint: dict | None):
    """All else that a run starts from: configuration, model (on the CPU), fingerprint of the data,
    windows, encoding, HellaSwag's questions. Whatever is wrong with them is said here, before the
    first step."""
    data = fineweb.fingerprint(config.data_dir)
    torch.manual_seed(config.seed)
    if checkpoint:
        model = model_of(path, checkpoint, config.dropout)
    else:
        model = load_model(config.init_from, config.dropout) if config.init_from else GPT(config)
    if config.init_from:  # the network is that of the weights, whatever the preset's
        config = network_of(model, config)
    n_positions = model.config.block_size
    if config.block_size > n_positions:
        raise SystemExit(f"--block_size {config.block_size} is beyond {n_positions} positions")

    splits = ("train", "val") if config.val_interval else ("train",)
    windows = {split: open_windows(config, split) for split in splits}
    encoding = questions = None
    if config.hellaswag_interval or config.sample_interval:
        encoding = encoding_of(config.vocab_size)
    if config.hellaswag_interval:
        questions = questions_of(config, encoding, "lecture")
    return config, model, data, windows, encoding, questions


def main(config: Config, task: Task | None = None, signals: Iterable[signal.Signals] = ()):
    """Train as the configuration says, or do what the task says instead; one of the signals ends
    training after the step, with a checkpoint. SystemExit, one line, for what its user can mend."""
    check_config(config)
    if task and (what := check_task(task)):
        return run_task(what, config, task)
    started = time.perf_counter()
    rank = int(os.environ.get("RANK", 0))  # torchrun's variables
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = resolve_device(config.device, local_rank)
    dtype = resolve_dtype(config.dtype, device)
    autocast = autocast_of(dtype, device)
    T = config.block_size
    B = resolve_micro_batch_size(config, world_size)  # or says now that the batch does not divide
    start_ranks(world_size, device, config.timeout)

    # rank 0 goes first: it fetches what is missing, and says once what is wrong
    paths = [None, None]  # of the run's folder, and of the checkpoint to go on from
    if rank == 0:
        if config.preset == "demo":
            demo.prepare(config.data_dir, config.block_size)
        folder, lock = runs.choose_run(config)
        path, checkpoint = runs.newest_checkpoint(folder) if folder else (None, None)
        prepared = prepare(config, path, checkpoint)
        config, raw_model, data, *_ = prepared
        if checkpoint:
            runs.check_same_experiment(config, checkpoint, data, (*NETWORK, "optimizer"))
        folder, lock = runs.start_folder(folder, config, raw_model)  # ours while lock lives
        paths = [folder, path]
    if world_size > 1:
        dist.broadcast_object_list(paths)
    if rank > 0:
        folder, path = paths
        checkpoint = runs.load_checkpoint(path) if path else None
        prepared = prepare(config, path, checkpoint)
    config, raw_model, data, windows, encoding, questions = prepared
    first_step = checkpoint["step"] if checkpoint else 0
    n_params = sum(p.numel() for p in raw_model.parameters())
    if rank == 0:
        log = runs.RunLog(folder, config, first_step)
        writer = runs.CheckpointWriter(folder, config, data)

    raw_model.to(device)
    if config.micro_batch_size == "auto" and device.type == "cuda":
        trial = functools.partial(fits_memory, raw_model, T=T, autocast=autocast)
        B = resolve_micro_batch_size(config, world_size, trial)
    config = replace(config, micro_batch_size=B)
    grad_accum_steps = config.total_batch_size // (B * T * world_size)
    print0(
        f"{folder} from step {first_step} | {n_params:,} parameters | {device}, {dtype} | "
        f"{world_size} ranks x {grad_accum_steps} micro-steps x {B} x {T} tokens | "
        f"{config.max_steps * config.total_batch_size / T / len(windows['train']):.2f} epochs"
    )

    # two handles: raw_model for what comes in other shapes, model (compiled, wrapped) for the rest
    if config.compile:  # what is compiled is kept beside the runs, for the next one
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.abspath("log/compiled"))
    model = torch.compile(raw_model) if config.compile else raw_model
    if world_size > 1:
        devices = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    muon = configure_muon(raw_model, config)
    optimizer = configure_optimizer(raw_model, config, device.type)
    optimizers = [optimizer, muon] if muon else [optimizer]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        # the moments are the run's, the hyperparameters those of now
        for name, part in (("optimizer", optimizer), ("muon", muon)):
            if part:
                part.load_state_dict(
                    checkpoint[name] | {"param_groups": part.state_dict()["param_groups"]}
                )
        if checkpoint["scaler"]:  # empty, if the run was not in float16 until now
            scaler.load_state_dict(checkpoint["scaler"])
        del checkpoint, prepared  # 1.5 GB

    def fetch(step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = get_batch(windows["train"], config, step, micro_step, rank, world_size)
        # out of pinned memory a GPU copies while it computes
        return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)

    def is_due(interval: int, step: int) -> bool:
        return interval > 0 and (step % interval == 0 or step == config.max_steps)

    def stopping() -> bool:
        """Whether any rank got a signal: all must stop at the same step."""
        return any(sum_over_ranks(stop.signum, device=device))

    steps = range(first_step, config.max_steps)
    batches = prefetch(fetch, ((s, m) for s in steps for m in range(grad_accum_steps)))
    flops_per_step = flops_per_token(config, n_params) * config.total_batch_size
    texts, bad_steps, recent = [], 0, deque(maxlen=100)  # losses of the last steps
    if rank == 0:
        recent.extend(filter(math.isfinite, log.losses))
    stop = runs.StopSignal(signals)
    watchdog = runs.Watchdog(rank, config.timeout if world_size > 1 else 0)

    def stop_early() -> bool:  # an evaluation, before each of its batches
        watchdog.seen(name)
        return stop.signum > 0

    start = time.perf_counter()
    for step in range(first_step, config.max_steps + 1):
        name = f"step {step}/{config.max_steps}"
        watchdog.seen(name)

        # first, so that a run continued from here does all the rest of this turn again
        due = is_due(config.checkpoint_interval, step) and step > first_step
        if rank == 0 and (due or writer.failure) and not bad_steps:
            writer.save(step, raw_model, optimizer, scaler, muon)
        if stopped := stopping():
            break
        if is_due(config.val_interval, step):
            with autocast:
                loss = validation_loss(model, raw_model, windows["val"], config, rank, world_size,
                                       stop_early)  # fmt: skip
            if stopped := stopping():
                break
            print0(f"{name} | val {loss:.4f}")
            if rank == 0:
                log.write(step, "val", loss)
        if is_due(config.hellaswag_interval, step):
            counts = hellaswag.evaluate(raw_model, questions, rank=rank, world_size=world_size,
                                        autocast=autocast, stop=stop_early)  # fmt: skip
            counts = hellaswag.Counts(*sum_over_ranks(*counts, device=device))
            if stopped := stopping():
                break
            print0(f"{name} | hella {counts.acc_norm:.4f}")
            if rank == 0:
                log.write(step, "hella", counts.acc_norm)
        if is_due(config.sample_interval, step) and rank == 0:
            with autocast:
                texts = sample_texts(raw_model, encoding, SAMPLE_PROMPT, config.seed)
            print0("\n".join(f"{name} | sample {text!r}" for text in texts))
            log.mirror(step, {"samples": texts})
        if step == config.max_steps:
            break

        # one step of training, and nothing else, between t0 and dt
        t0 = time.perf_counter()
        torch.manual_seed(config.seed + 1 + step * world_size + rank)  # for dropout
        lr = get_lr(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if muon:
            muon.param_groups[0]["lr"] = config.muon_lr * lr / (config.lr or 1.0)
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            x, y = (t.to(device, non_blocking=True) for t in next(batches))
            if world_size > 1:
                # gradients meet once a step; the forward pass already prepares for it
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast:
                _, loss = model(x, y)
            loss = loss / grad_accum_steps  # gradients add up: of means, so divide by their number
            loss_sum += loss.detach()
            scaler.scale(loss).backward()
        if world_size > 1:
            dist.all_reduce(loss_sum)
        for part in optimizers:
            scaler.unscale_(part)
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf).item()
        loss = loss_sum.item() / world_size
        # one update that is not finite, and no weight would ever be finite again
        bad_steps = 0 if math.isfinite(loss) and math.isfinite(norm) else bad_steps + 1
        if not bad_steps:
            if muon:
                step_muon(muon, scaler, rank, world_size)
            scaler.step(optimizer)
        scaler.update()  # float16 overflows now and then: its scale goes down, and later up again
        raw_model.zero_grad(set_to_none=True)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()  # the clock waits for the GPU
        dt = time.perf_counter() - t0

        mfu = flops_per_step / dt / (peak_flops(device) * world_size)
        steps_left = config.max_steps - step - 1
        left = (time.perf_counter() - start) / (step + 1 - first_step) * steps_left / 60  # minutes
        line = f"{name} | loss {loss:.4f} | lr {lr:.1e} | norm {norm:.2f} | {dt * 1000:.0f} ms | "
        line += f"{config.total_batch_size / dt:,.0f} tok/s | "
        line += f"mfu {mfu:.2f} | " if math.isfinite(mfu) else ""
        line += f"left {left // 60:.0f}h{left % 60:02.0f}m"
        line += f" | update skipped, {bad_steps} in a row" if bad_steps else ""
        spike = is_spike(loss, recent)
        line += " | spike" if spike else ""
        if rank == 0 and writer.failure:
            line += f" | checkpoint not written: {writer.failure}"
        print0(line)
        if step == first_step:
            seconds = time.perf_counter() - started
            print0(
                f"{name} | the first step took {dt:.1f} s and ended {seconds:.1f} s after the start"
            )
        if rank == 0:
            log.write(step, "train", loss)
            if bad_steps:
                log.write(step, "skipped", bad_steps)
            if spike:
                log.write(step, "spike", loss)
        if not bad_steps:
            recent.append(loss)
        elif bad_steps == config.max_bad_steps:
            print0(f"{name} | the losses before: {' '.join(f'{x:.4f}' for x in [*recent][-10:])}")
            print0(f"{name} | what it was reading:")
            print0(windows["train"].describe(windows_of_step(windows["train"], config, step)))
            raise SystemExit(
                f"step {step}: {bad_steps} updates in a row were not finite: go on from the last "
                f"checkpoint with --resume {folder} --resume_anyway and a lower --lr"
            )

    if stopped:
        if rank == 0:
            writer.save(step, raw_model, optimizer, scaler, muon)
            writer.wait()
            saved = f"not saved: {writer.failure}" if writer.failure else "saved"
            print0(f"{name} | stopped, {saved} | the same command with --resume auto goes on")
        stopping()  # all wait here: torchrun would end the first rank when another one has left
        raise SystemExit(128 + (stop.signum or signal.SIGTERM))
    minutes = (time.perf_counter() - start) / 60
    if rank == 0:
        writer.wait()
        export(raw_model, folder / "hf", encoding, f"--resume {folder}")
        if writer.failure:
            print0(f"the last checkpoint is not written: {writer.failure}")
    print0(f"done in {minutes:.1f} minutes: {folder}/hf loads in transformers and by --init_from")
    if device.type == "cuda":
        print0(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB a GPU")
    if config.preset == "demo" and rank == 0:
        demo.report(folder, texts)
    if world_size > 1:
        dist.destroy_process_group()


# ---- the command line ----------------------------------------------------------------------------


def parse_arguments(arguments: list[str]) -> tuple[Config, Task]:
    """`[PRESET] [--field value]...` to what main takes; without a preset, gpt2."""
    name, flags = "gpt2", arguments
    if arguments and not arguments[0].startswith("-"):
        name, *flags = arguments
    if name not in PRESETS:
        raise SystemExit(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    for flag, value in zip(["", *flags], flags, strict=False):
        if not value or re.fullmatch(r"--\w+=", value):  # as "$RUN" is where RUN is not set
            raise SystemExit(f"{flag or value} is empty: give it a value, or leave it out")
    preset, training = replace(PRESETS[name], preset=name), Task()

    def command(config: Config = preset, task: Task = training):
        return config, task

    description = f"Train GPT-2. Presets, to give as the first word: {', '.join(PRESETS)}."
    return tyro.cli(command, args=flags, description=description, prog=f"train_gpt2.py {name}",
                    use_underscores=True, config=(tyro.conf.OmitArgPrefixes,))  # fmt: skip


if __name__ == "__main__":
    if sys.stdout:  # None, if it was closed; samples may have characters that it cannot print
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Ctrl-C; and what clouds and schedulers send before they take a machine away
        main(*parse_arguments(sys.argv[1:]), (signal.SIGINT, signal.SIGTERM))
    except KeyboardInterrupt:  # before the first step
        sys.exit(128 + signal.SIGINT)
    except torch.OutOfMemoryError:
        sys.exit("out of GPU memory: halve --micro_batch_size, which leaves the losses the same")

"""Reproduce GPT-2 (124M): the model, the training loop, evaluation and sampling in one file.

    python train_gpt2.py                        # train GPT-2 124M on the shards in edu_fineweb10B/
    python train_gpt2.py demo                   # a small model, offline, in two minutes on a CPU
    python train_gpt2.py gpt2 --lr 1e-3         # every hyperparameter is a flag; --help lists them
    torchrun --standalone --nproc_per_node=8 train_gpt2.py gpt2
    python train_gpt2.py gpt2 --resume auto     # continue the newest unfinished run, or start one
    python train_gpt2.py --prompt "Hello, I'm a language model," --init_from log/gpt2-001
    python train_gpt2.py --eval_only --init_from gpt2
    python train_gpt2.py --export my_gpt2 --init_from log/gpt2-001

Papers: GPT-2, "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), for
the network; GPT-3, "Language Models are Few-Shot Learners" (Brown et al. 2020), for the training.
"""

import copy
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import fineweb
import hellaswag

# ---- 1. hyperparameters ------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    """The network. The defaults are GPT-2 124M."""

    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50257  # 256 bytes, 50,000 merges, end-of-text; 257: bytes and end-of-text
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads in each block
    n_embd: int = 768  # channels
    dropout: float = 0.0  # probability; training for about one epoch needs none


@dataclass(frozen=True)
class Config:
    """A run: the network, and how it is trained. The defaults reproduce GPT-2 124M."""

    gpt: GPTConfig = GPTConfig()
    data_dir: str = "edu_fineweb10B"  # folder of token shards, written by fineweb.py
    init_from: str = ""  # initial weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a run, a folder
    total_batch_size: int = 2**19  # tokens per step, over all ranks; about 0.5M, as for GPT-3
    micro_batch_size: int | Literal["auto"] = "auto"  # B, sequences per forward pass; same losses
    max_steps: int = 19_073  # optimizer steps; 10B tokens / 2**19
    lr: float = 6e-4  # peak learning rate (GPT-3, table 2.1)
    min_lr: float = 6e-5  # learning rate after the decay
    warmup_steps: int = 715  # steps of linear warmup; GPT-3's 375M tokens / 2**19
    cooldown: float = 0.0  # 0: cosine decay; else the fraction of steps of a final linear decay
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices in the blocks
    muon_lr: float = 0.02  # Muon's peak learning rate; follows the same schedule as lr
    weight_decay: float = 0.1  # on weight matrices and embeddings only
    beta1: float = 0.9  # AdamW: decay rate of the mean of the gradient
    beta2: float = 0.95  # AdamW: decay rate of the mean of its square
    grad_clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    shuffle: bool = True  # read the sequences in a random order, a new one for each epoch
    seed: int = 1337  # of the initialization, the order of the data, dropout and samples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of autocast; auto: by GPU
    compile: bool = True  # torch.compile: a minute at the start, then much faster steps
    log_interval: int = 1  # steps between lines on the console
    val_interval: int = 250  # steps between validations; 0: never, as for all intervals
    val_tokens: int = 20 * 2**19  # tokens per validation, independent of the number of ranks
    hellaswag_interval: int = 250  # steps between evaluations on HellaSwag
    hellaswag_file: str = hellaswag.PATH  # its questions; downloaded if absent
    sample_interval: int = 250  # steps between samples
    sample_prompt: str = "Hello, I'm a language model,"  # prompt of the samples during training
    checkpoint_interval: int = 250  # steps between checkpoints, 1.5 GB each for GPT-2 124M
    keep_checkpoints: int = 2  # number of the newest checkpoints to keep; 0: all
    archive_interval: int = 5000  # checkpoints at its multiples are kept as well
    max_bad_steps: int = 10  # stop after so many non-finite steps in a row; 0: never stop
    name: str = "gpt2"  # of the run; its folder is log/NAME-NNN
    out_dir: str = ""  # the run's folder, instead of log/NAME-NNN
    resume: str = ""  # continue the run in this folder; auto: the newest unfinished run
    resume_anyway: bool = False  # resume although changed hyperparameters change the experiment
    timeout: float = 600.0  # seconds a rank waits for the others before the run is aborted
    wandb: bool = False  # log to Weights & Biases as well
    prompt: tuple[str, ...] = ()  # instead of training: continue this text; "-" reads stdin
    num_samples: int = 4  # samples for each prompt
    max_new_tokens: int = 100  # tokens per sample
    temperature: float = 1.0  # divides the logits; 0: always the most likely token
    top_k: int = 50  # sample from the k most likely tokens only; 0: from all
    top_p: float = 1.0  # sample from the most likely tokens with this total probability only
    eval_only: bool = False  # instead of training: evaluate the weights in init_from
    export: str = ""  # instead of training: write the weights to this folder for transformers


# a run cannot be resumed with other values of these: the checkpoint would not fit
FIXED = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "optimizer")
# a run that is resumed with other values of these is another experiment; data: the shards
EXPERIMENT = ("data", "total_batch_size", "max_steps", "lr", "min_lr", "warmup_steps", "cooldown")
EXPERIMENT += ("muon_lr", "weight_decay", "beta1", "beta2", "grad_clip", "dropout", "shuffle")
EXPERIMENT += ("seed",)

# bytes as tokens; too small for torch.compile to save time on a CPU
DEMO = Config(
    gpt=GPTConfig(block_size=192, vocab_size=257, n_layer=3, n_head=4, n_embd=128),
    data_dir="demo_data",
    total_batch_size=12 * 192,
    micro_batch_size=12,
    max_steps=900,
    lr=1.6e-2,
    warmup_steps=20,
    cooldown=0.6,
    optimizer="muon",
    muon_lr=0.03,
    compile=False,
    log_interval=25,
    val_tokens=20_000,
    hellaswag_file="demo_data/next_line.jsonl",
    sample_prompt="def ",
    temperature=0.7,
)

PRESETS = {
    # sizes: GPT-2 paper, table 2; learning rates: GPT-3's for models of about that size
    "gpt2": Config(),
    "gpt2-medium": Config(GPTConfig(n_layer=24, n_head=16, n_embd=1024), lr=3e-4, min_lr=3e-5),
    "gpt2-large": Config(GPTConfig(n_layer=36, n_head=20, n_embd=1280), lr=2.5e-4, min_lr=2.5e-5),
    "gpt2-xl": Config(GPTConfig(n_layer=48, n_head=25, n_embd=1600), lr=2e-4, min_lr=2e-5),
    # small models reach the same loss in fewer steps this way; not measured at 124M
    "gpt2-fast": Config(optimizer="muon", lr=3e-3, min_lr=0.0, warmup_steps=250, cooldown=0.6),
    "finetune": Config(
        init_from="gpt2",
        data_dir="my_data",
        total_batch_size=2**15,
        max_steps=200,
        lr=3e-5,
        min_lr=3e-6,
        warmup_steps=20,
        val_interval=50,
        hellaswag_interval=0,
    ),
    "shakespeare_char": replace(
        DEMO, data_dir="shakespeare_char", hellaswag_interval=0, sample_prompt="ROMEO:"
    ),
    "demo": DEMO,
}


def flatten(config: Config) -> dict:
    """All hyperparameters by name, those of the network included."""
    values = asdict(config)
    return values.pop("gpt") | values


def check_config(config: Config, ddp_world_size: int = 1):
    """Exit with one line if a hyperparameter is out of range."""
    gpt, B, T = config.gpt, config.micro_batch_size, config.gpt.block_size
    at_least_1 = {*FIXED, "total_batch_size", "micro_batch_size", "max_steps", "val_tokens"}
    at_least_1 |= {"log_interval", "num_samples", "max_new_tokens", "timeout"}
    at_most = {"dropout": 1, "cooldown": 1, "top_p": 1, "beta1": 0.9999, "beta2": 0.9999}
    for name, value in flatten(config).items():
        low, high = int(name in at_least_1), at_most.get(name, 1e12)
        if type(value) in (int, float) and not low <= value <= high:  # nan is refused, too
            raise SystemExit(f"--{name} {value} must be between {low} and {high}")
    if config.lr == 0 and config.optimizer == "muon":
        raise SystemExit("--lr 0 must be above 0: Muon's learning rate follows its schedule")
    if gpt.n_embd % gpt.n_head:
        raise SystemExit(f"--n_embd {gpt.n_embd} must be divisible by --n_head {gpt.n_head}")
    n_sequences, rest = divmod(config.total_batch_size, T * ddp_world_size)
    if rest or (B != "auto" and n_sequences % B):
        raise SystemExit(
            f"--total_batch_size {config.total_batch_size} must be divisible by --micro_batch_size "
            f"{B} x --block_size {T} x {ddp_world_size} ranks"
        )


# ---- 2. model ----------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens so far: sampling a token processes that token only."""

    def __init__(self, n_positions: int):
        self.n_positions = n_positions
        self.T = 0  # tokens so far
        self.kv = {}  # attention module -> its keys and values, (2, B, nh, n_positions, hs)

    def append(self, attn: nn.Module, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Append k and v, both (B, nh, T, hs), of new tokens; return the keys and values of all."""
        B, nh, T, hs = k.shape
        if attn not in self.kv:
            self.kv[attn] = k.new_empty(2, B, nh, self.n_positions, hs)
        end = self.T + T
        self.kv[attn][:, :, :, self.T : end] = torch.stack((k, v))
        return self.kv[attn][:, :, :, :end]  # (2, B, nh, end, hs)


class CausalSelfAttention(nn.Module):
    """Multi-head attention; a position attends to itself and to the positions before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(self, k, v)
        # flash attention: the (T, T) matrix is never written to memory (Dao et al. 2022);
        # a single query is the newest token, which attends to all keys
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=T > 1)
        y = y.transpose(1, 2).contiguous().view(B, T, C)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Position-wise feed-forward network with 4x expansion."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # the approximation that GPT-2 used
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gelu(self.c_fc(x))  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """A transformer block: attention, then MLP, both added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        # pre-norm (GPT-2 paper, section 2.3): no LayerNorm on the residual path itself, so the
        # gradient reaches the first block unchanged
        x = x + self.attn(self.ln_1(x), cache)  # (B, T, C)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2, with the parameter names of OpenAI's release."""

    def __init__(self, config: GPTConfig, block: type[nn.Module] = Block):
        super().__init__()
        self.config = config
        # 50257 -> 50304, a multiple of 64, for which GPU kernels are faster
        padded_vocab_size = math.ceil(config.vocab_size / 64) * 64
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(padded_vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, padded_vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # weight tying (Press & Wolf 2016)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Initialize as GPT-2: std 0.02, positions 0.01 (openai/gpt-2, src/model.py)."""
        for name, p in self.named_parameters():  # yields the tied matrix once
            if name.endswith("bias"):
                p.zero_()
            elif "ln_" in name:
                p.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                # the residual stream sums 2 * n_layer of these: keep its variance independent of
                # the depth
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                p.normal_(std=0.01 if name.endswith("wpe.weight") else 0.02)

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """The input of lm_head, (B, T, C), for tokens idx (B, T) int64. With a cache, idx follow
        the tokens in the cache: any number in the first call, then one at a time."""
        T = idx.size(1)
        start = 0 if cache is None else cache.T
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens, but block_size is {self.config.block_size}")
        pos = torch.arange(start, start + T, device=idx.device)  # (T,)
        pos_emb = self.transformer.wpe(pos)  # (T, C)
        tok_emb = self.transformer.wte(idx)  # (B, T, C)
        x = self.transformer.drop(tok_emb + pos_emb)
        for block in self.transformer.h:
            x = block(x, cache)  # (B, T, C)
        if cache is not None:
            cache.T += T
        return self.transformer.ln_f(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) to (..., vocab_size): without the columns that pad the vocabulary."""
        return self.lm_head(x)[..., : self.config.vocab_size]  # a view: nothing is copied

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None):
        """Logits (B, T, vocab_size) of the next token for idx (B, T) int64, T <= block_size; with
        targets (B, T) int64 also the mean cross-entropy in nats, else None."""
        logits = self.logits(self.hidden(idx))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eot=None, generator=None
    ):
        """Append up to max_new_tokens tokens, sampled by sample_token, to each row of idx (B, T).
        A row that has sampled the token eot repeats it; generation stops when all rows have. When
        block_size is reached, the last half of the tokens becomes the new context."""
        block_size = self.config.block_size
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        x, cache = idx[:, -block_size:], KVCache(block_size)
        for _ in range(max_new_tokens):
            if cache.T + x.size(1) > block_size:
                x, cache = idx[:, -max(1, block_size // 2) :], KVCache(block_size)
            logits = self.logits(self.hidden(x, cache)[:, -1])  # (B, vocab_size)
            x = sample_token(logits.float(), temperature, top_k, top_p, generator)  # (B, 1)
            if eot is not None:
                ended |= x == eot
                x = x.masked_fill(ended, eot)
            idx = torch.cat((idx, x), dim=1)
            if ended.all():
                break
        return idx

    @classmethod
    def from_pretrained(cls, model_type: str, dropout: float = 0.0) -> "GPT":
        """Load gpt2, gpt2-medium, gpt2-large or gpt2-xl from the hub, or a folder with config.json
        and model.safetensors, as written by transformers or by save_pretrained."""
        folder, files = Path(model_type), ["config.json", "model.safetensors"]
        try:
            if not folder.is_dir():
                from huggingface_hub import snapshot_download

                repo = f"openai-community/{model_type}"
                folder = Path(snapshot_download(repo, allow_patterns=files))
            hf = json.loads((folder / "config.json").read_text())
            other = {k: hf[k] for k, value in HF_CONFIG.items() if hf.get(k, value) != value}
            if other:
                raise ValueError(f"GPT-2 does not have {other}")
            shape = (
                hf[key] for key in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
            )
            model = cls(GPTConfig(*shape, dropout=dropout))
            state = {}
            for name, w in load_file(folder / "model.safetensors").items():
                if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
                    name = "transformer." + name.removeprefix("transformer.")
                    state[name] = w.t() if name.endswith(TRANSPOSED) else w
            wte = F.pad(state["transformer.wte.weight"], (0, 0, 0, -hf["vocab_size"] % 64))
            state["transformer.wte.weight"] = state["lm_head.weight"] = wte
            model.load_state_dict(state)
            return model
        except Exception as error:  # no connection, missing or corrupt files, other shapes
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise SystemExit(
                f"cannot load {model_type} ({reason:.300}): give gpt2, gpt2-medium, gpt2-large, "
                f"gpt2-xl, a run's folder, or a folder with {' and '.join(files)} of a GPT-2"
            ) from None

    def save_pretrained(self, folder: str | Path):
        """Write config.json and model.safetensors for transformers and for from_pretrained."""
        folder, config = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, p in self.named_parameters():
            w = p.detach().float().cpu()
            if name.endswith("wte.weight"):
                w = w[: config.vocab_size]  # without the padding
            weights[name] = (w.t() if name.endswith(TRANSPOSED) else w).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        hf = HF_CONFIG | {"architectures": ["GPT2LMHeadModel"], "vocab_size": config.vocab_size}
        hf |= {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        hf |= dict.fromkeys(("n_positions", "n_ctx"), config.block_size)
        hf |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
        eot = min(config.vocab_size, 50257) - 1
        hf |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot)
        (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")

    def configure_optimizers(self, config: Config, device_type: str) -> list[torch.optim.Optimizer]:
        """[AdamW], or [AdamW, Muon] with Muon for the matrices in the blocks. Only matrices and
        embeddings decay, not biases and LayerNorms. The `lr_scale` of a parameter group multiplies
        the learning rate of get_lr."""
        adamw_params, muon_params = [], []
        for name, p in self.named_parameters():
            is_muon = config.optimizer == "muon" and ".h." in name and p.dim() == 2
            (muon_params if is_muon else adamw_params).append(p)
        decay = [p for p in adamw_params if p.dim() >= 2]
        no_decay = [p for p in adamw_params if p.dim() < 2]
        groups = [
            {"params": decay, "weight_decay": config.weight_decay, "lr_scale": 1.0},
            {"params": no_decay, "weight_decay": 0.0, "lr_scale": 1.0},
        ]
        betas = (config.beta1, config.beta2)
        fused = device_type in ("cuda", "mps", "cpu")  # one kernel updates all parameters
        optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=1e-8, fused=fused)]
        if muon_params:
            # Muon orthogonalizes the momentum (Jordan et al. 2024)
            group = {"params": muon_params, "lr_scale": config.muon_lr / config.lr}
            optimizers.append(torch.optim.Muon([group], weight_decay=config.weight_decay))
        return optimizers

    def flops_per_token(self, T: int) -> int:
        """FLOPs of forward and backward per token: 6 per parameter, and 6 * L * C * T in attention,
        half of the 12 * L * C * T in the PaLM paper (appendix B), since the mask skips half."""
        n_params = sum(p.numel() for p in self.parameters())
        return 6 * n_params + 6 * self.config.n_layer * self.config.n_embd * T


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None) -> torch.Tensor:
    """A token (B, 1) for each row of logits (B, vocab_size). temperature 0: the most likely one;
    top_k 0: no limit; top_p: nucleus sampling (Holtzman et al. 2019)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        kth_logit = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth_logit, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p < 1.0:
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        # drop a token if the more likely ones already have a total probability of top_p
        drop = sorted_probs.cumsum(dim=-1) - sorted_probs >= top_p
        drop[:, 0] = False
        probs = probs.masked_fill(drop.scatter(-1, order, drop), 0.0)
    return torch.multinomial(probs, 1, generator=generator)


# OpenAI's release stores these as (in, out), nn.Linear as (out, in)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# what config.json contains for every GPT-2
HF_CONFIG = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}


# ---- 3. data -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # a step may read the end of an epoch and the start of the next
def epoch_order(n_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the sequences in an epoch: a permutation, (n_sequences,)."""
    return np.random.default_rng((seed, epoch)).permutation(np.arange(n_sequences, dtype=np.uint32))


class DataLoaderLite:
    """Batches of token sequences from the shards of a split.

    A batch is a pure function of the step: the step, the micro-step and the rank decide which
    sequences it contains. So there is no loader state to save, and the losses do not depend on
    the number of ranks or on the micro-batch size B.
    """

    def __init__(self, config: Config, split: str, B: int, ddp_rank: int, ddp_world_size: int):
        self.B, self.T = B, config.gpt.block_size
        self.ddp_rank, self.ddp_world_size = ddp_rank, ddp_world_size
        self.shuffle, self.seed = config.shuffle, config.seed
        self.sequences_per_step = config.total_batch_size // self.T
        self.shards = fineweb.open_shards(config.data_dir, split, config.gpt.vocab_size)
        # a sequence is T + 1 tokens of one shard; its last token is the first of the next sequence
        self.ends = np.cumsum([max(0, len(shard) - 1) // self.T for shard in self.shards])
        self.n_sequences = int(self.ends[-1])
        if self.n_sequences == 0:
            raise SystemExit(
                f"the {split} split in {config.data_dir} has less than {self.T} tokens"
            )

    def sequences(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """The sequences with these numbers as x, y, both (B, T) int64; y is x shifted by one."""
        rows = []
        for i in indices:
            k = int(np.searchsorted(self.ends, i, side="right"))  # the number of the shard
            start = (i - (int(self.ends[k - 1]) if k else 0)) * self.T
            rows.append(self.shards[k][start : start + self.T + 1])
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        # a copy from pinned memory to the GPU does not block the CPU
        return (x.pin_memory(), y.pin_memory()) if torch.cuda.is_available() else (x, y)

    def batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's batch x, y, both (B, T) int64, of a micro-step."""
        first = (micro_step * self.ddp_world_size + self.ddp_rank) * self.B
        indices = []
        for n in range(first, first + self.B):
            epoch, i = divmod(step * self.sequences_per_step + n, self.n_sequences)
            if self.shuffle:
                i = int(epoch_order(self.n_sequences, self.seed, epoch)[i])
            indices.append(i)
        return self.sequences(indices)


def prepare_demo_data(config: Config):
    """Make the demo's data: Python's standard library as bytes, and questions about it."""
    path = Path(config.hellaswag_file)
    if not path.exists():
        fineweb.main(fineweb.Config(dataset="stdlib", out=config.data_dir))
        # in HellaSwag's form, on held-out code: which of four lines comes next?
        shards = fineweb.open_shards(config.data_dir, "val", config.gpt.vocab_size)
        text = fineweb.get_encoding("bytes").decode(np.concatenate(shards).tolist())
        examples = hellaswag.make_examples(text.split("<|endoftext|>"), 200)
        write_atomically(path, "".join(json.dumps(example) + "\n" for example in examples))


def get_encoding_for(vocab_size: int):
    """The tiktoken encoding that a vocabulary size belongs to."""
    if vocab_size != 257 and vocab_size < 50257:
        raise SystemExit(f"--vocab_size {vocab_size} has no encoding: give 257 (bytes) or 50257")
    return fineweb.get_encoding("bytes" if vocab_size == 257 else "gpt2")


# ---- 4. learning rate schedule -----------------------------------------------------------------


def get_lr(step: int, config: Config) -> float:
    """The learning rate of a step: linear warmup, then cosine decay to min_lr; or, with a cooldown,
    a constant rate followed by a linear decay (Hägele et al. 2024)."""
    max_lr, min_lr, max_steps = config.lr, config.min_lr, config.max_steps
    if step < config.warmup_steps:
        return max_lr * (step + 1) / config.warmup_steps  # + 1: a rate of 0 would waste a step
    if config.cooldown:
        remaining = (max_steps - step) / (config.cooldown * max_steps)  # above 1: not yet begun
        return min_lr + min(1.0, remaining) * (max_lr - min_lr)
    decay_ratio = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    coeff = 0.5 * (1.0 + math.cos(math.pi * min(1.0, decay_ratio)))  # from 1 to 0
    return min_lr + coeff * (max_lr - min_lr)


# ---- 5. evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_loss(model, raw_model: GPT, val_loader: DataLoaderLite, n_tokens: int, device: str):
    """Mean cross-entropy in nats per token, next-token accuracy, and number of tokens, for the
    first n_tokens of the validation split. The ranks split the sequences."""
    n_sequences = max(1, min(n_tokens // val_loader.T, val_loader.n_sequences))
    indices = range(val_loader.ddp_rank, n_sequences, val_loader.ddp_world_size)
    loss_sum = num_correct = 0.0
    raw_model.eval()
    for i in range(0, len(indices), val_loader.B):
        x, y = val_loader.sequences(indices[i : i + val_loader.B])
        x, y = x.to(device), y.to(device)
        # a smaller last batch would be compiled again
        logits, loss = model(x, y) if len(x) == val_loader.B else raw_model(x, y)
        loss_sum += loss.item() * y.numel()
        num_correct += (logits.argmax(dim=-1) == y).sum().item()
    raw_model.train()
    loss_sum, num_correct = sum_over_ranks(loss_sum, num_correct, device=device)
    n_tokens = n_sequences * val_loader.T
    return loss_sum / n_tokens, num_correct / n_tokens, n_tokens


def sample_texts(model: GPT, enc, prompt: str, config: Config):
    """Yield num_samples continuations of the prompt, each with the prompt."""
    device = model.lm_head.weight.device
    tokens = enc.encode(prompt, allowed_special="all") or [enc.eot_token]
    idx = torch.tensor([tokens], device=device)  # (1, T)
    sampling = (config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    model.eval()
    for i in range(config.num_samples):
        generator = torch.Generator(device).manual_seed(config.seed + i)
        tokens = model.generate(idx, *sampling, enc.eot_token, generator)[0, idx.size(1) :].tolist()
        yield prompt + enc.decode([token for token in tokens if token < enc.eot_token])
    model.train()


# ---- 6. the run's folder: config.json, log.txt, curve.png, step_NNNNNN.pt, hf/ -------------------


def write_atomically(path: Path, text: str):
    """Write a temporary file and rename it: the file is complete or absent."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def checkpoint_paths(log_dir: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(log_dir.glob("step_[0-9]*.pt"))


def load_checkpoint(path: Path) -> dict | None:
    """Read a checkpoint, or the newest readable one in a folder, to the CPU. None if the folder has
    no checkpoint."""
    paths = checkpoint_paths(path) if path.is_dir() else [path]
    for path in reversed(paths):
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
                if archive.testzip():
                    raise ValueError("wrong checksum")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
            if not {"model", "gpt", "config", "optimizers", "step", "data"} <= set(checkpoint):
                raise ValueError("not a checkpoint of this script")
            return checkpoint
        except Exception as error:  # missing, truncated or corrupt
            reason = (str(error) or repr(error)).splitlines()[0]
            print(f"cannot read {path} ({reason:.200})", file=sys.stderr)
    if paths:
        raise SystemExit("no readable checkpoint: give another one, or start a new run")
    return None


class CheckpointWriter:
    """Writes checkpoints in a thread. If one cannot be written, `failure` has the reason; the run
    continues, and the next checkpoint is a new attempt."""

    def __init__(self, log_dir: Path, config: Config, data: str):
        self.log_dir, self.config, self.data = log_dir, config, data
        self.thread, self.pending, self.failure = ThreadPoolExecutor(max_workers=1), None, ""

    def save(self, step: int, model: GPT, optimizers, scaler):
        """Copy the state of the run, and write the copy in the background."""
        self.wait()
        checkpoint = {
            "step": step,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "gpt": asdict(model.config),
            "config": flatten(self.config),
            "data": self.data,
        }
        self.pending = self.thread.submit(self.write, copy.deepcopy(checkpoint))

    def write(self, checkpoint: dict):
        path = self.log_dir / f"step_{checkpoint['step']:06d}.pt"
        tmp = self.log_dir / "checkpoint.tmp"
        try:
            torch.save(checkpoint, tmp)
            with open(tmp, "rb+") as file:
                os.fsync(file.fileno())  # on the disk before it gets its name
            os.replace(tmp, path)
            keep, interval = self.config.keep_checkpoints, self.config.archive_interval
            for old in checkpoint_paths(self.log_dir)[:-keep] if keep else []:
                if not interval or int(old.stem[5:]) % interval:
                    old.unlink()
            self.failure = ""
        except (OSError, RuntimeError) as error:  # torch.save: RuntimeError if the disk is full
            self.failure = (str(error) or repr(error)).splitlines()[0]
            tmp.unlink(missing_ok=True)

    def wait(self):
        """Wait until the last checkpoint is written."""
        if self.pending:
            self.pending.result()


LOG_LINE = re.compile(r"^(\d+) (train|val|hella) (\S+)\n", re.MULTILINE)  # not a truncated one


class RunLog:
    """log.txt, one line `step stream value` for each number; Weights & Biases if enabled."""

    def __init__(self, log_dir: Path, config: Config, first_step: int):
        self.path, self.wandb_run = log_dir / "log.txt", None
        # a resumed run repeats the steps after its checkpoint
        lines = LOG_LINE.findall(self.path.read_text()) if self.path.exists() else []
        lines = [" ".join(line) + "\n" for line in lines if int(line[0]) < first_step]
        write_atomically(self.path, "".join(lines))
        if config.wandb:
            settings = {"name": log_dir.name, "dir": log_dir, "config": flatten(config)}
            try:
                import wandb

                self.wandb_run = wandb.init(project="gpt2", **settings)
            except Exception as error:  # not installed, not logged in
                reason = (str(error) or repr(error)).splitlines()[0]
                raise SystemExit(f"--wandb: {reason}; WANDB_MODE=offline needs no login") from None

    def write(self, step: int, stream: str, value: float):
        try:
            with open(self.path, "a") as file:
                file.write(f"{step} {stream} {value:.6f}\n")
        except OSError as error:  # a full disk; the run is worth more than its log
            print(f"cannot write to {self.path}: {error.strerror}", flush=True)
        if self.wandb_run:
            self.wandb_run.log({stream: value}, step=step)


def read_log(log_dir: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """log.txt as {stream: (steps, values)}."""
    streams = {"train": ([], []), "val": ([], []), "hella": ([], [])}
    for step, stream, value in LOG_LINE.findall((Path(log_dir) / "log.txt").read_text()):
        streams[stream][0].append(int(step))
        streams[stream][1].append(float(value))
    return streams


def draw_curve(log_dir: Path, config: Config):
    """Draw log.txt as curve.png: losses on the left, accuracy on HellaSwag on the right."""
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        streams = read_log(log_dir)
        left.plot(*streams["train"], linewidth=0.7, label="training loss")
        left.plot(*streams["val"], marker=".", label="validation loss")
        right.plot(*streams["hella"], marker=".", label="accuracy")
        right.axhline(0.25, color="silver", linestyle=":", label="chance")
        if config.gpt.vocab_size >= 50257:
            # GPT-2: build-nanogpt's play.ipynb and hellaswag.py; GPT-3: its paper, table H.1
            left.axhline(3.2924, color="C3", linestyle="--", label="GPT-2 124M, validation")
            right.axhline(0.2955, color="C3", linestyle="--", label="GPT-2 124M")
            right.axhline(0.337, color="C2", linestyle="--", label="GPT-3 124M")
        losses = [loss for loss in streams["train"][1] if math.isfinite(loss)]
        if losses:  # do not let the first steps hide the rest
            left.set_ylim(top=1.05 * max(losses[len(losses) // 50 :]))
        left.set(title=log_dir.name, xlabel="step", ylabel="loss (nats per token)")
        right.set(title=Path(config.hellaswag_file).stem, xlabel="step", ylabel="accuracy")
        left.legend()
        right.legend()
        figure.savefig(log_dir / "curve.png")
    except (ImportError, OSError) as error:  # no matplotlib, a full disk
        print(f"cannot draw {log_dir}/curve.png: {error}", flush=True)


def choose_log_dir(config: Config) -> Path:
    """The run's folder: that of --resume or --out_dir, or a new log/NAME-NNN."""
    runs = sorted(Path("log").glob(f"{config.name}-[0-9][0-9][0-9]"))
    unfinished = [run for run in runs if not (run / "hf").exists()]
    if config.resume not in ("", "auto"):
        if not checkpoint_paths(Path(config.resume)):
            raise SystemExit(f"no step_*.pt in {config.resume}: give --resume a run's folder")
        return Path(config.resume)
    if config.out_dir:
        if not config.resume and (Path(config.out_dir) / "config.json").exists():
            raise SystemExit(f"{config.out_dir} has a run: add --resume auto, or change --out_dir")
        return Path(config.out_dir)
    if config.resume and unfinished:
        return unfinished[-1]
    return Path("log", f"{config.name}-{int(runs[-1].name[-3:]) + 1 if runs else 1:03d}")


def start_run(log_dir: Path, config: Config, n_params: int) -> FileLock:
    """Create the run's folder and write config.json. The run has the folder for itself as long as
    it holds the lock."""
    needed = 12 * n_params * (config.keep_checkpoints + 1)  # bytes: weights and two moments
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(log_dir / "run.lock")
        lock.acquire(timeout=0)
        free = shutil.disk_usage(log_dir).free
        if config.checkpoint_interval and free < needed:
            raise SystemExit(
                f"checkpoints need {needed / 1e9:.1f} GB, but {log_dir} has {free / 1e9:.1f} GB "
                "free: free space, or lower --keep_checkpoints"
            )
        write_atomically(log_dir / "config.json", json.dumps(flatten(config), indent=2) + "\n")
    except Timeout:
        raise SystemExit(f"another process trains in {log_dir}: give another --out_dir") from None
    except OSError as error:
        raise SystemExit(f"cannot write to {log_dir}: {error.strerror}") from None
    return lock


def check_resume(config: Config, checkpoint: dict, data: str):
    """Print hyperparameters that differ from the checkpoint's. Exit if the run would not be the
    same experiment, unless resume_anyway is set."""
    old = checkpoint["config"] | {"data": checkpoint["data"]}
    new = flatten(config) | {"data": data}
    changed = [name for name in FIXED + EXPERIMENT if old[name] != new[name]]
    for name in changed:
        print(f"{name} was {old[name]} in the run to resume, now it is {new[name]}", flush=True)
    if set(changed) & set(FIXED):
        raise SystemExit(f"a run cannot change its {', '.join(FIXED)}: start a new run")
    if changed and not config.resume_anyway:
        raise SystemExit("not the same experiment: give the old values, or --resume_anyway")
    if checkpoint["step"] > config.max_steps:
        raise SystemExit(f"the run has done {checkpoint['step']} steps, more than --max_steps")


class StopSignal:
    """Records SIGINT or SIGTERM, so that the run can stop after the current step. A second signal
    ends the process at once."""

    def __init__(self, *signals: signal.Signals):
        self.signum, self.received_at = 0, math.inf
        for signum in signals:
            signal.signal(signum, self.handle)

    def handle(self, signum: int, frame):
        # torchrun forwards the Ctrl-C that the ranks have already received from the terminal
        if time.monotonic() > self.received_at + 1:
            os._exit(128 + signum)
        if not self.signum and int(os.environ.get("RANK", 0)) == 0:
            os.write(2, b"stopping after this step; a second signal stops at once\n")
        self.signum, self.received_at = signum, min(self.received_at, time.monotonic())


# ---- 7. devices and DDP --------------------------------------------------------------------------

# dense bfloat16 TFLOP/s (V100, T4: float16) from the data sheets
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121}
PEAK_TFLOPS |= {"A10": 125, "4090": 165, "3090": 71, "V100": 125, "T4": 65}


def peak_flops(device: str) -> float:
    """The peak FLOP/s of a GPU; nan for a CPU and for GPUs that are not in the table."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    words = re.split(r"[\s-]+", name)  # "NVIDIA A100-SXM4-80GB"
    return next((PEAK_TFLOPS[word] * 1e12 for word in words if word in PEAK_TFLOPS), math.nan)


def get_device(name: str) -> str:
    """auto, cuda, mps or cpu to a device; with CUDA each rank of a machine has its own."""
    n_gpus, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if n_gpus else "mps" if has_mps else "cpu"
    n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks on this machine
    if (name == "cuda" and n_ranks > n_gpus) or (name == "mps" and not has_mps):
        raise SystemExit(f"{n_ranks} ranks, {n_gpus} GPUs for --device {name}: try --device cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def get_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of autocast. auto: float32, but on CUDA bfloat16, or float16 on GPUs without it."""
    if name == "auto" and device.startswith("cuda"):
        # GPUs before Ampere only emulate bfloat16, slowly
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return torch.float32 if name == "auto" else getattr(torch, name)


def get_autocast(name: str, device: str) -> torch.autocast:
    """The context manager in which matmuls have the dtype of get_dtype."""
    dtype = get_dtype(name, device)
    return torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32)


def setup_ddp(config: Config) -> tuple[bool, int, int, int, str]:
    """ddp, ddp_rank, ddp_local_rank, ddp_world_size and this rank's device. torchrun sets the
    environment variables."""
    ddp = "RANK" in os.environ
    ddp_rank = int(os.environ.get("RANK", 0))
    ddp_local_rank = int(os.environ.get("LOCAL_RANK", 0))
    ddp_world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = get_device(config.device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if ddp:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    return ddp, ddp_rank, ddp_local_rank, ddp_world_size, device


def sum_over_ranks(*values: float, device: str) -> list[float]:
    """Each value summed over all ranks."""
    if not dist.is_initialized():
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return totals.tolist()


def fits_memory(model: GPT, B: int, T: int, autocast) -> bool:
    """Whether a forward and backward pass of B sequences fit into the GPU's memory."""
    try:
        # AdamW's two moments, DDP's buckets, and as much again to spare
        extra = [torch.empty_like(p) for p in model.parameters() for _ in range(4)]
        idx = torch.zeros(B, T, dtype=torch.int64, device=extra[0].device)
        with autocast:
            _, loss = model(idx, idx)
        loss.backward()  # needs more memory than the compiled model
        return True
    except torch.OutOfMemoryError:
        return False


def find_micro_batch_size(config: Config, model: GPT, ddp_world_size: int, device: str, autocast):
    """B, the number of sequences per forward pass. auto: on a GPU the largest power of two that
    divides the sequences of a rank and fits into memory, else at most 4."""
    T = config.gpt.block_size
    if config.micro_batch_size != "auto":
        return config.micro_batch_size
    B = math.gcd(config.total_batch_size // (T * ddp_world_size), 2**20)
    if not device.startswith("cuda"):
        return min(B, 4)
    while B > 1:
        failed = not fits_memory(model, B, T, autocast)
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if sum_over_ranks(failed, device=device) == [0]:  # all ranks use the same B
            break
        B //= 2
    return B


# ---- 8. training ---------------------------------------------------------------------------------


def is_due(interval: int, step: int, last_step: bool) -> bool:
    return interval > 0 and (step % interval == 0 or last_step)


def train(config: Config, stop_signal: StopSignal | None = None):
    """Train a model. Exits with one line on user errors, and with 128 + signal after a signal."""
    ddp, ddp_rank, ddp_local_rank, ddp_world_size, device = setup_ddp(config)
    master_process = ddp_rank == 0  # this process does logging, checkpointing etc.
    device_type = device.split(":")[0]  # cuda:0 -> cuda
    stop_signal = stop_signal or StopSignal()
    check_config(config, ddp_world_size)
    shared = [None]
    if master_process:
        shared = [choose_log_dir(config)]
        if config.data_dir == "demo_data":
            prepare_demo_data(config)
    if ddp:
        dist.broadcast_object_list(shared)  # the other ranks wait here for rank 0
    log_dir = shared[0]

    # model
    torch.manual_seed(config.seed)
    checkpoint = load_checkpoint(log_dir) if log_dir.is_dir() else None
    if checkpoint or config.init_from:
        raw_model = load_model(config.init_from, checkpoint, config.gpt.dropout)
    else:
        raw_model = GPT(config.gpt)
    if config.init_from:
        config = with_network_of(raw_model, config)
    raw_model.to(device)
    n_params = sum(p.numel() for p in raw_model.parameters())
    dtype = get_dtype(config.dtype, device)
    autocast = get_autocast(config.dtype, device)

    # data
    T = config.gpt.block_size
    B = find_micro_batch_size(config, raw_model, ddp_world_size, device, autocast)
    grad_accum_steps = config.total_batch_size // (B * T * ddp_world_size)
    train_loader = DataLoaderLite(config, "train", B, ddp_rank, ddp_world_size)
    data = fineweb.fingerprint(config.data_dir)
    if config.val_interval:
        val_loader = DataLoaderLite(config, "val", B, ddp_rank, ddp_world_size)
    if config.sample_interval or config.hellaswag_interval:
        enc = get_encoding_for(config.gpt.vocab_size)
    if config.hellaswag_interval:
        examples = hellaswag.iterate_examples(config.hellaswag_file)
        examples = hellaswag.prepare(examples, enc, T)

    # optimizers
    optimizers = raw_model.configure_optimizers(config, device_type)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)
    first_step = 0
    if checkpoint:
        check_resume(config, checkpoint, data)
        first_step = checkpoint["step"]
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            # the moments are the checkpoint's, the hyperparameters those of this command
            state["param_groups"] = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(state)
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        del checkpoint

    # model is compiled and wrapped in DDP; raw_model is for all that has other shapes
    model = torch.compile(raw_model) if config.compile else raw_model
    if ddp:
        device_ids = [ddp_local_rank] if device_type == "cuda" else None
        model = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True)  # saves memory
    if master_process:
        lock = start_run(log_dir, config, n_params)
        log = RunLog(log_dir, config, first_step)
        writer = CheckpointWriter(log_dir, config, data)
        epochs = config.max_steps * train_loader.sequences_per_step / train_loader.n_sequences
        start_line = f"{log_dir} | {n_params:,} parameters | {device} | {dtype}"
        print(f"{start_line} | starting at step {first_step}")
        batch = f"{ddp_world_size} ranks x {grad_accum_steps} micro-steps x {B} x {T} tokens"
        print(
            f"{config.total_batch_size} tokens per step = {batch} | {epochs:.2f} epochs", flush=True
        )

    flops_per_step = raw_model.flops_per_token(T) * config.total_batch_size
    bad_steps = 0
    start = time.time()
    for step in range(first_step, config.max_steps + 1):
        last_step = step == config.max_steps

        # save before evaluating: a run that is resumed from here repeats this step's evaluations
        stopping = any(sum_over_ranks(stop_signal.signum, device=device))
        save = stopping or is_due(config.checkpoint_interval, step, last_step)
        if master_process and save and step > first_step and not bad_steps:
            writer.save(step, raw_model, optimizers, scaler)
        if stopping:
            break
        if is_due(config.val_interval, step, last_step):
            with autocast:
                n_tokens = config.val_tokens
                val_loss, _, _ = evaluate_loss(model, raw_model, val_loader, n_tokens, device)
            if master_process:
                print(f"step {step:5d} | val {val_loss:.4f}", flush=True)
                log.write(step, "val", val_loss)
        if is_due(config.hellaswag_interval, step, last_step):
            with autocast:
                counts = hellaswag.evaluate(raw_model, examples, ddp_rank, ddp_world_size)
            _, num_correct_norm, num_total = sum_over_ranks(*counts, device=device)
            if master_process:
                print(f"step {step:5d} | hella {num_correct_norm / num_total:.4f}", flush=True)
                log.write(step, "hella", num_correct_norm / num_total)
        if is_due(config.sample_interval, step, last_step) and master_process:
            with autocast:
                for text in sample_texts(raw_model, enc, config.sample_prompt, config):
                    print(f"step {step:5d} | sample: {text}", flush=True)
        if is_due(config.val_interval, step, last_step) and master_process:
            draw_curve(log_dir, config)
        if last_step:
            break

        # one training step
        torch.manual_seed(config.seed + step * ddp_world_size + ddp_rank)  # of dropout
        t0 = time.time()
        loss_accum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            x, y = train_loader.batch(step, micro_step)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            if ddp:
                # all-reduce only on the last micro-step; DDP reads this flag in forward()
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast:
                logits, loss = model(x, y)
            del logits  # (B, T, vocab_size): the largest tensor of a step
            loss = loss / grad_accum_steps  # the gradients are added up: divide, for their mean
            loss_accum += loss.detach()
            scaler.scale(loss).backward()
        if ddp:
            dist.all_reduce(loss_accum)
            loss_accum /= ddp_world_size
        lr = get_lr(step, config)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        loss_accum, norm = torch.stack((loss_accum, norm)).tolist()
        # skip a non-finite update, which would make all weights non-finite
        bad_steps = 0 if math.isfinite(loss_accum + norm) else bad_steps + 1
        if not bad_steps:
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        raw_model.zero_grad(set_to_none=True)
        if device_type == "cuda":
            torch.cuda.synchronize()  # wait for the GPU to finish the step
        dt = time.time() - t0  # in seconds

        if master_process:
            log.write(step, "train", loss_accum)
            tokens_per_sec = config.total_batch_size / dt
            mfu = flops_per_step / dt / (peak_flops(device) * ddp_world_size)
            steps_done, steps_left = step + 1 - first_step, config.max_steps - step - 1
            seconds = (time.time() - start) / steps_done * steps_left
            line = f"step {step:5d} | loss {loss_accum:.4f} | lr {lr:.2e} | norm {norm:.4f} | "
            line += f"dt {dt * 1000:.0f}ms | tok/sec {tokens_per_sec:,.0f} | "
            line += f"mfu {mfu:.1%} | " if math.isfinite(mfu) else ""
            line += f"left {seconds // 3600:.0f}h{seconds % 3600 // 60:02.0f}m"
            if bad_steps:
                line += f" | not finite: update skipped, {bad_steps} in a row"
            if writer.failure:
                line += f" | checkpoint not written: {writer.failure}"
            if step % config.log_interval == 0 or bad_steps:
                print(line, flush=True)
        if bad_steps and bad_steps == config.max_bad_steps:
            message = f"step {step}: {bad_steps} steps in a row were not finite"
            raise SystemExit(f"{message}: --resume auto --resume_anyway with a lower --lr")

    if master_process:
        writer.wait()
        if writer.failure:
            print(f"the last checkpoint was not written: {writer.failure}")
        if stopping:
            print(f"stopped at step {step}: the same command with --resume auto continues")
        else:
            export(raw_model, log_dir / "hf")
            draw_curve(log_dir, config)
            print(f"finished in {(time.time() - start) / 60:.1f} minutes; see {log_dir}/curve.png")
            if device_type == "cuda":
                print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB per GPU")
            print(f'python train_gpt2.py --prompt "{config.sample_prompt}" --init_from {log_dir}')
        lock.release()
    if ddp:
        dist.barrier()  # torchrun ends the other ranks when one of them exits
        dist.destroy_process_group()
    if stopping:
        raise SystemExit(128 + (stop_signal.signum or signal.SIGTERM))


# ---- 9. sampling, evaluation only, export --------------------------------------------------------


def load_model(source: str, checkpoint: dict | None = None, dropout: float = 0.0) -> GPT:
    """The model of a checkpoint, of a step_NNNNNN.pt, of a run's folder, or of a source that
    GPT.from_pretrained loads; on the CPU."""
    path = Path(source)
    if not checkpoint and (path.is_dir() or path.suffix == ".pt"):
        checkpoint = load_checkpoint(path)
    if not checkpoint:
        return GPT.from_pretrained(str(path / "hf") if (path / "hf").is_dir() else source, dropout)
    model = GPT(replace(GPTConfig(**checkpoint["gpt"]), dropout=dropout))
    model.load_state_dict(checkpoint["model"])
    return model


def with_network_of(model: GPT, config: Config) -> Config:
    """The config with the network of a model. T may be smaller than its number of positions."""
    T, n = config.gpt.block_size, model.config.block_size
    if T > n:
        raise SystemExit(f"--block_size {T} must be at most {n}, as in {config.init_from}")
    gpt = replace(model.config, block_size=T, dropout=config.gpt.dropout)
    return replace(config, gpt=gpt)


def print_samples(config: Config):
    """Print continuations of each prompt."""
    model = load_model(config.init_from).to(get_device(config.device))
    enc = get_encoding_for(model.config.vocab_size)
    for prompt in config.prompt:
        prompt = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
        for text in sample_texts(model, enc, prompt, config):
            print(f"> {text}", flush=True)


def evaluate_only(config: Config):
    """Print the evaluations of the training loop, once, for the weights in init_from."""
    ddp, ddp_rank, _, ddp_world_size, device = setup_ddp(config)
    master_process = ddp_rank == 0
    model = load_model(config.init_from).to(device)
    T = min(config.gpt.block_size, model.config.block_size)
    config = replace(config, gpt=replace(model.config, block_size=T))
    enc = get_encoding_for(config.gpt.vocab_size)
    with get_autocast(config.dtype, device):
        if config.val_interval:
            B = 8 if config.micro_batch_size == "auto" else config.micro_batch_size
            loader = DataLoaderLite(config, "val", B, ddp_rank, ddp_world_size)
            loss, accuracy, n = evaluate_loss(model, model, loader, config.val_tokens, device)
            if master_process:
                _, y = loader.sequences(range(n // T))
                n_bytes = len(enc.decode_bytes(y[y != enc.eot_token].tolist()))
                print(f"validation loss      {loss:.4f} nats per token, {n:,} tokens")
                print(f"perplexity           {math.exp(loss):.2f}")
                print(f"next-token accuracy  {accuracy:.4f}")
                # unlike the loss per token, it does not depend on the vocabulary
                print(f"bits per byte        {loss * n / math.log(2) / n_bytes:.4f}")
        for way in ("lecture", "harness") if config.hellaswag_interval else ():
            examples = hellaswag.iterate_examples(config.hellaswag_file)
            examples = hellaswag.prepare(examples, enc, T, way)
            counts = hellaswag.evaluate(model, examples, ddp_rank, ddp_world_size)
            counts = hellaswag.Counts(*map(int, sum_over_ranks(*counts, device=device)))
            if master_process:
                print(f"HellaSwag, {way:9} {counts}")
    if ddp:
        dist.destroy_process_group()


def export(model: GPT, folder: Path):
    """Write a folder that transformers loads: the weights and, for GPT-2's vocabulary, the
    tokenizer. The folder is complete or absent."""
    from tiktoken.load import read_file_cached

    tmp = folder.with_name(folder.name + ".tmp")
    try:
        model.save_pretrained(tmp)
        if model.config.vocab_size == 50257:
            url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
            for name, source in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
                (tmp / name).write_bytes(read_file_cached(f"{url}/{source}"))
            tokenizer = {"tokenizer_class": "GPT2Tokenizer"}
            (tmp / "tokenizer_config.json").write_text(json.dumps(tokenizer) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise SystemExit(f"cannot export to {folder}: {error!s:.200}") from None


# ---- 10. command line ----------------------------------------------------------------------------


def parse_args(args: list[str]) -> Config:
    """`[PRESET] [--field value]...`; without a preset, gpt2."""
    import tyro

    preset, *flags = args if args and not args[0].startswith("-") else ["gpt2", *args]
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset}: choose from {', '.join(PRESETS)}")
    return tyro.cli(
        Config,
        prog=f"train_gpt2.py {preset}",
        description=f"Train GPT-2. Presets: {', '.join(PRESETS)}.",
        args=flags,
        default=replace(PRESETS[preset], name=preset),
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction),
    )


def main(config: Config):
    """Train, or do what prompt, eval_only or export ask for."""
    tasks = [name for name in ("prompt", "eval_only", "export") if getattr(config, name)]
    if not tasks:
        # clouds and job schedulers send SIGTERM before they take a machine away
        return train(config, StopSignal(signal.SIGINT, signal.SIGTERM))
    if len(tasks) > 1:
        raise SystemExit(f"give only one of {', '.join('--' + name for name in tasks)}")
    check_config(config)
    config = replace(config, init_from=config.init_from or "gpt2")
    if config.prompt:
        print_samples(config)
    elif config.eval_only:
        evaluate_only(config)
    elif Path(config.export).exists():
        raise SystemExit(f"{config.export} exists: give --export a new folder")
    else:
        export(load_model(config.init_from), Path(config.export))
        print(f"{config.export} is written: transformers can load it")


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except torch.OutOfMemoryError:
        sys.exit("out of GPU memory: halve --micro_batch_size, which does not change the losses")
    except SystemExit as error:
        if isinstance(error.code, str) and int(os.environ.get("RANK", 0)) > 0:
            sys.exit(1)  # rank 0 prints the same message
        raise

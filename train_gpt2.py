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

import contextlib
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
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken.load
import torch
import torch.distributed as dist
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_map_only

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
    init_from: str = ""  # initial weights: gpt2 to gpt2-xl, USER/NAME on the hub, a run, a folder
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
FIXED = "block_size vocab_size n_layer n_head n_embd optimizer".split()
# a run that is resumed with other values of these is another experiment; data: the shards
EXPERIMENT = "data total_batch_size max_steps lr min_lr warmup_steps cooldown muon_lr".split()
EXPERIMENT += "weight_decay beta1 beta2 grad_clip dropout shuffle seed".split()
# bytes as tokens; too small for torch.compile to save time on a CPU
DEMO = Config(GPTConfig(block_size=128, vocab_size=257, n_layer=2, n_head=4, n_embd=96))
DEMO = replace(DEMO, data_dir="demo_data", hellaswag_file="demo_data/next_line.jsonl")
DEMO = replace(DEMO, total_batch_size=24 * 128, micro_batch_size=24, max_steps=750, compile=False)
DEMO = replace(DEMO, optimizer="muon", lr=1.6e-2, muon_lr=0.03, warmup_steps=20, cooldown=0.9)
DEMO = replace(DEMO, log_interval=25, val_tokens=20_000, sample_prompt="def ", temperature=0.7)
FINETUNE = Config(init_from="gpt2", data_dir="my_data", total_batch_size=2**15, max_steps=200)
FINETUNE = replace(FINETUNE, lr=3e-5, min_lr=3e-6, warmup_steps=20)
CHAR = replace(DEMO, data_dir="shakespeare_char", sample_prompt="ROMEO:", hellaswag_interval=0)
GPT1 = Config(GPTConfig(block_size=512, dropout=0.1), total_batch_size=64 * 512, lr=2.5e-4)
GPT1 = replace(GPT1, min_lr=0.0, warmup_steps=2000, weight_decay=0.01, max_steps=305_176)
# GPT-3 paper, table 2.1 and appendix B: 300B tokens, 375M of them warmup; 0.5M, 1M or 2M a step
GPT3 = Config(GPTConfig(2048), "edu_fineweb100B", max_steps=572_204)
B1M = replace(GPT3, total_batch_size=2**20, max_steps=286_102, warmup_steps=357)
B2M = replace(GPT3, total_batch_size=2**21, max_steps=143_051, warmup_steps=178)
PRESETS = {
    # sizes: GPT-2 paper, table 2; learning rates: GPT-3's for models of about that size
    "gpt2": Config(),
    "gpt2-medium": Config(GPTConfig(n_layer=24, n_head=16, n_embd=1024), lr=3e-4, min_lr=3e-5),
    "gpt2-large": Config(GPTConfig(n_layer=36, n_head=20, n_embd=1280), lr=2.5e-4, min_lr=2.5e-5),
    "gpt2-xl": Config(GPTConfig(n_layer=48, n_head=25, n_embd=1600), lr=2e-4, min_lr=2e-5),
    "gpt2-40B": Config(data_dir="edu_fineweb100B", max_steps=76_294),  # the lecture's longer run
    "gpt2-lr3x": Config(lr=1.8e-3, min_lr=1.8e-4, warmup_steps=100),  # its source is in README
    # small models reach the same loss in fewer steps this way; not measured at 124M
    "gpt2-fast": Config(optimizer="muon", lr=3e-3, min_lr=0.0, warmup_steps=250, cooldown=0.6),
    "gpt1": GPT1,  # GPT-1's size and training; GPT-2's network and vocabulary
    "gpt3-small": GPT3,
    "gpt3-medium": replace(GPT3, gpt=GPTConfig(2048, 50257, 24, 16, 1024), lr=3e-4, min_lr=3e-5),
    "gpt3-large": replace(GPT3, gpt=GPTConfig(2048, 50257, 24, 16, 1536), lr=2.5e-4, min_lr=2.5e-5),
    # the paper has 24 heads, which do not divide 2048
    "gpt3-xl": replace(B1M, gpt=GPTConfig(2048, 50257, 24, 16, 2048), lr=2e-4, min_lr=2e-5),
    "gpt3-2.7b": replace(B1M, gpt=GPTConfig(2048, 50257, 32, 32, 2560), lr=1.6e-4, min_lr=1.6e-5),
    # with DDP, each GPU needs 16 bytes per parameter (107 and 206 GB) and memory for activations
    "gpt3-6.7b": replace(B2M, gpt=GPTConfig(2048, 50257, 32, 32, 4096), lr=1.2e-4, min_lr=1.2e-5),
    "gpt3-13b": replace(B2M, gpt=GPTConfig(2048, 50257, 40, 40, 5120), lr=1e-4, min_lr=1e-5),
    "finetune": replace(FINETUNE, val_interval=50, hellaswag_interval=0),
    "shakespeare_char": CHAR,
    "gpt-mini": replace(CHAR, gpt=GPTConfig(128, 257, 6, 6, 192)),  # minGPT's small sizes
    "gpt-micro": replace(CHAR, gpt=GPTConfig(128, 257, 4, 4, 128)),
    "gpt-nano": replace(CHAR, gpt=GPTConfig(128, 257, 3, 3, 48)),
    "demo": DEMO,
}
Config.__doc__ += f" Presets: {', '.join(PRESETS)}."  # for --help


def flatten(config: Config) -> dict:
    """All hyperparameters by name, those of the network included."""
    values = asdict(config)
    return values.pop("gpt") | values


def check_config(config: Config, ddp_world_size: int = 1):
    """Exit with one line if a hyperparameter is out of range."""
    gpt, B, T = config.gpt, config.micro_batch_size, config.gpt.block_size
    at_least_1 = (*FIXED, "total_batch_size", "micro_batch_size", "max_steps", "val_tokens")
    at_least_1 += ("log_interval", "num_samples", "max_new_tokens", "timeout")
    low = dict.fromkeys(at_least_1, 1) | {"lr": 1e-9}
    high = {"dropout": 1, "cooldown": 1, "top_p": 1, "beta1": 0.9999, "beta2": 0.9999}
    for name, value in flatten(config).items():
        limits = low.get(name, 0), high.get(name, 1e12)
        if type(value) in (int, float) and not limits[0] <= value <= limits[1]:  # nan, too
            raise SystemExit(f"--{name} {value} must be between {limits[0]} and {limits[1]}")
    if gpt.n_embd % gpt.n_head:
        raise SystemExit(f"--n_embd {gpt.n_embd} must be divisible by --n_head {gpt.n_head}")
    n_sequences, rest = divmod(config.total_batch_size, T * ddp_world_size)
    if rest or (B != "auto" and n_sequences % B):
        unit = f"--micro_batch_size {B} x --block_size {T} x {ddp_world_size} ranks"
        raise SystemExit(f"--total_batch_size {config.total_batch_size} is not divisible by {unit}")


# ---- 2. model ----------------------------------------------------------------------------------
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

    def forward(self, x: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:  # append to the keys and values of the tokens so far
            past_k, past_v = cache.get(self, (k[:, :, :0], v[:, :, :0]))
            k, v = cache[self] = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        # flash attention never writes the (T, T) matrix (Dao et al. 2022); a single query sees all
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

    def forward(self, x: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        # pre-norm (GPT-2 paper, section 2.3): no LayerNorm changes the gradient between blocks
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
        modules = {
            "wte": nn.Embedding(padded_vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList([block(config) for _ in range(config.n_layer)]),
            "ln_f": nn.LayerNorm(config.n_embd),
        }
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(config.n_embd, padded_vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # weight tying (Press & Wolf 2016)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Initialize as GPT-2: std 0.02, positions 0.01 (openai/gpt-2, src/model.py)."""
        for name, p in self.named_parameters():  # yields the tied matrix once
            if name.endswith("bias"):
                p.zero_()
            elif "ln_" not in name:  # the weights of LayerNorms are ones
                std = 0.01 if name.endswith("wpe.weight") else 0.02
                if name.endswith("c_proj.weight"):
                    # the residual stream adds up 2 * n_layer outputs of these: keep its variance
                    std /= math.sqrt(2 * self.config.n_layer)
                p.normal_(std=std)

    def hidden(self, idx: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        """The input of lm_head, (B, T, C), for tokens idx (B, T) int64. A cache, {} in the first
        call, keeps the keys and values of all tokens: each later call gets one new token only."""
        T, block_size = idx.size(1), self.config.block_size
        start = next(iter(cache.values()))[0].size(2) if cache else 0  # tokens in the cache
        assert start + T <= block_size, f"{start + T} tokens, but block_size is {block_size}"
        pos = torch.arange(start, start + T, device=idx.device)  # (T,)
        pos_emb = self.transformer.wpe(pos)  # (T, C)
        tok_emb = self.transformer.wte(idx)  # (B, T, C)
        x = self.transformer.drop(tok_emb + pos_emb)
        for block in self.transformer.h:
            x = block(x, cache)  # (B, T, C)
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
        """Append max_new_tokens sampled tokens to idx (B, T), or fewer if each row has sampled eot.
        When block_size is reached, the last half of the tokens becomes the new context."""
        T, block_size = idx.size(1), self.config.block_size
        x, cache, n_cached = idx[:, -block_size:], {}, 0
        for _ in range(max_new_tokens):
            if n_cached + x.size(1) > block_size:
                x, cache, n_cached = idx[:, -max(1, block_size // 2) :], {}, 0
            logits = self.logits(self.hidden(x, cache)[:, -1])  # (B, vocab_size)
            n_cached += x.size(1)
            x = sample_token(logits.float(), temperature, top_k, top_p, generator)  # (B, 1)
            idx = torch.cat((idx, x), dim=1)
            if eot is not None and (idx[:, T:] == eot).any(dim=1).all():
                break
        return idx

    @classmethod
    def from_pretrained(cls, model_type: str, dropout: float = 0.0) -> "GPT":
        """Load a GPT-2 from the hub (gpt2, USER/NAME) or from a folder written by transformers."""
        expected = "gpt2, gpt2-medium, gpt2-large, gpt2-xl, USER/NAME on the hub, a run or a folder"
        with fineweb.exit_on_error(f"cannot load {model_type}, expected {expected}"):
            from huggingface_hub import snapshot_download

            folder, new, old = Path(model_type), "model*.safetensors", "pytorch_model*.bin"
            if not folder.is_dir():
                repo = model_type if "/" in model_type else f"openai-community/{model_type}"
                folder = Path(snapshot_download(repo, allow_patterns=["config.json", new]))
                if not any(folder.glob(new)):
                    snapshot_download(repo, allow_patterns=old)
            hf = HF_CONFIG | json.loads((folder / "config.json").read_text())
            same = {"gelu_pytorch_tanh": "gelu_new", 4 * hf["n_embd"]: None}  # synonyms
            other = {k: hf[k] for k, value in HF_CONFIG.items() if same.get(hf[k], hf[k]) != value}
            if other:
                raise ValueError(f"GPT-2 does not have {other}")
            sizes = [hf[k] for k in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")]
            weights, state = {}, {}
            for path in sorted(folder.glob(new)) or sorted(folder.glob(old)):  # one or several
                is_new = path.suffix == ".safetensors"
                weights |= load_file(path) if is_new else torch.load(path, "cpu", weights_only=True)
            for name, w in weights.items():
                if not re.search(r"\.attn\.(masked_)?bias$|head|^score\.", name):  # masks, heads
                    name = "transformer." + name.removeprefix("transformer.")
                    state[name] = w.t() if name.endswith(TRANSPOSED) else w
            wte = state["transformer.wte.weight"]
            if not torch.equal(weights.get("lm_head.weight", wte), wte):
                raise ValueError("lm_head.weight is not equal to wte.weight, as it is in GPT-2")
            wte = F.pad(wte, (0, 0, 0, -hf["vocab_size"] % 64))
            state["transformer.wte.weight"] = state["lm_head.weight"] = wte
            model = cls(GPTConfig(*sizes, dropout))
            model.load_state_dict(state)
            return model

    def save_pretrained(self, folder: str | Path):
        """Write a new folder that transformers can load. It is complete or absent."""
        config, folder = self.config, Path(folder)
        weights = {}
        for name, p in self.named_parameters():
            w = p.detach().float().cpu()
            w = w[: config.vocab_size] if name.endswith("wte.weight") else w  # without the padding
            weights[name] = (w.t() if name.endswith(TRANSPOSED) else w).contiguous()
        hf = HF_CONFIG | {"architectures": ["GPT2LMHeadModel"]} | asdict(config)
        hf |= dict.fromkeys(("n_positions", "n_ctx"), config.block_size)
        hf |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
        eot = min(config.vocab_size, 50257) - 1
        hf |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot)
        with fineweb.exit_on_error(f"cannot write {folder}"):
            tmp = folder.with_name(folder.name + ".tmp")
            tmp.mkdir(parents=True, exist_ok=True)
            save_file(weights, tmp / "model.safetensors", metadata={"format": "pt"})
            (tmp / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
            if config.vocab_size == 50257:  # GPT-2's tokenizer
                url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
                for name, source in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
                    (tmp / name).write_bytes(tiktoken.load.read_file_cached(f"{url}/{source}"))
                (tmp / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
            os.replace(tmp, folder)

    def configure_optimizers(self, config: Config) -> list[torch.optim.Optimizer]:
        """[AdamW], or [AdamW, Muon] with Muon for the matrices in the blocks. Biases and LayerNorms
        do not decay. The `lr_scale` of a parameter group multiplies the rate of get_lr."""
        adamw_params, muon_params = [], []
        for name, p in self.named_parameters():
            is_muon = config.optimizer == "muon" and ".h." in name and p.dim() == 2
            (muon_params if is_muon else adamw_params).append(p)
        decay = {"params": [p for p in adamw_params if p.dim() >= 2], "lr_scale": 1.0}
        no_decay = {"params": [p for p in adamw_params if p.dim() < 2], "lr_scale": 1.0}
        groups = [decay | {"weight_decay": config.weight_decay}, no_decay | {"weight_decay": 0.0}]
        betas = (config.beta1, config.beta2)
        optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=1e-8, fused=True)]
        if muon_params:
            group = {"params": muon_params, "lr_scale": config.muon_lr / config.lr}
            optimizers.append(Muon([group], {"weight_decay": config.weight_decay}))
        return optimizers

    def flops_per_token(self, T: int) -> int:
        """FLOPs of forward and backward per token: 6 per parameter, and 6 * L * C * T in attention,
        half of the 12 * L * C * T in the PaLM paper (appendix B), since the mask skips half."""
        n_params = sum(p.numel() for p in self.parameters())
        return 6 * n_params + 6 * self.config.n_layer * self.config.n_embd * T


class Muon(torch.optim.Optimizer):
    """Orthogonalizes the momentum (Jordan et al. 2024); torch.optim.Muon is slow on most CPUs."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for n, m in dict.fromkeys(p.shape for p in group["params"]):
            params = [p for p in group["params"] if p.shape == (n, m)]  # updated in one batch
            grads = torch.stack([p.grad for p in params])  # (L, n, m)
            momentum = self.state[params[0]].setdefault("momentum", torch.zeros_like(grads))
            momentum.lerp_(grads, 0.05)
            X = grads.lerp_(momentum, 0.95)  # Nesterov momentum
            X /= X.norm(dim=(1, 2), keepdim=True) + 1e-7
            X = X.to(torch.bfloat16 if X.is_cuda else torch.float32)
            X = X.mT if n > m else X  # X @ X.mT is then smaller than X.mT @ X
            for _ in range(5):  # Newton-Schulz iteration: the singular values approach 1
                A = X @ X.mT
                B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
                X = torch.baddbmm(X, B, X, beta=3.4445)
            for p, update in zip(params, X.mT if n > m else X, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * max(1.0, n / m) ** 0.5)


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
HF_CONFIG = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
HF_CONFIG |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
HF_CONFIG |= {"tie_word_embeddings": True, "add_cross_attention": False, "n_inner": None}


# ---- 3. data -------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=2)  # a step may read the end of an epoch and the start of the next
def epoch_order(n_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the sequences in an epoch: a permutation, (n_sequences,)."""
    return np.random.default_rng((seed, epoch)).permutation(np.arange(n_sequences, dtype=np.uint32))


class DataLoaderLite:
    """Batches of token sequences from the shards of a split. The number of a step decides which
    sequences it reads: no state to save, and the same losses for all ranks and micro-batches."""

    def __init__(self, config: Config, split: str, B: int, ddp_rank: int, ddp_world_size: int):
        self.B, self.T, self.config = B, config.gpt.block_size, config
        self.ddp_rank, self.ddp_world_size = ddp_rank, ddp_world_size
        self.sequences_per_step = config.total_batch_size // self.T
        self.shards = fineweb.open_shards(config.data_dir, split, config.gpt.vocab_size)
        # a sequence is T + 1 tokens of one shard; its last token is the first of the next sequence
        self.ends = np.cumsum([max(0, len(shard) - 1) // self.T for shard in self.shards])
        self.n_sequences = int(self.ends[-1])
        if self.n_sequences == 0:
            raise SystemExit(f"{config.data_dir}: the {split} split has fewer than {self.T} tokens")

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
        return (x.pin_memory(), y.pin_memory()) if torch.cuda.is_initialized() else (x, y)

    def batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's batch x, y, both (B, T) int64, of a micro-step."""
        first = (micro_step * self.ddp_world_size + self.ddp_rank) * self.B
        indices = []
        for n in range(first, first + self.B):
            epoch, i = divmod(step * self.sequences_per_step + n, self.n_sequences)
            if self.config.shuffle:
                i = int(epoch_order(self.n_sequences, self.config.seed, epoch)[i])
            indices.append(i)
        return self.sequences(indices)


def prepare_demo_data(config: Config):
    """Make the demo's data: Python's standard library as bytes, and questions about it."""
    if Path(config.hellaswag_file).exists():
        return
    fineweb.main(fineweb.Config(dataset="stdlib", out=config.data_dir))
    # in HellaSwag's form, on held-out code: which of four lines comes next?
    shards = fineweb.open_shards(config.data_dir, "val", config.gpt.vocab_size)
    text = fineweb.get_encoding("bytes").decode(np.concatenate(shards).tolist())
    examples = hellaswag.make_examples(text.split("<|endoftext|>"), 200)
    fineweb.write_file(Path(config.hellaswag_file), "\n".join(map(json.dumps, examples)).encode())


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
def evaluate_loss(model, val_loader: DataLoaderLite, n_tokens: int, device: str):
    """Mean cross-entropy in nats per token, next-token accuracy, and number of tokens, for the
    first n_tokens of the validation split. The ranks split the sequences."""
    n_sequences = max(1, min(n_tokens // val_loader.T, val_loader.n_sequences))
    indices = range(val_loader.ddp_rank, n_sequences, val_loader.ddp_world_size)
    loss_sum = num_correct = 0.0
    model.eval()
    for i in range(0, len(indices), val_loader.B):
        rows = list(indices[i : i + val_loader.B])
        x, y = val_loader.sequences(rows + [0] * (val_loader.B - len(rows)))
        y[len(rows) :] = -100  # no loss for the rows that only fill up the last batch
        logits, loss = model(x.to(device), y.to(device))
        loss_sum += loss.item() * len(rows) * val_loader.T
        num_correct += (logits.argmax(dim=-1).cpu() == y).sum().item()
    model.train()
    loss_sum, num_correct = sum_over_ranks(loss_sum, num_correct, device=device)
    n_tokens = n_sequences * val_loader.T
    return loss_sum / n_tokens, num_correct / n_tokens, n_tokens


def sample_texts(model: GPT, enc, prompt: str, config: Config):
    """Yield num_samples continuations of the prompt, each with the prompt."""
    tokens = enc.encode(prompt, allowed_special="all") or [enc.eot_token]
    idx = torch.tensor([tokens], device=model.lm_head.weight.device)  # (1, T)
    sampling = (config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    model.eval()
    for i in range(config.num_samples):
        generator = torch.Generator(idx.device).manual_seed(config.seed + i)
        tokens = model.generate(idx, *sampling, enc.eot_token, generator)[0, idx.size(1) :].tolist()
        yield prompt + enc.decode([token for token in tokens if token < enc.eot_token])
    model.train()


# ---- 6. the run's folder: config.json, log.txt, curve.png, step_NNNNNN.pt, hf/ -------------------
def load_checkpoint(path: Path) -> dict | None:
    """Read a checkpoint, or the newest readable one in a folder. None if the folder has none."""
    paths = sorted(path.glob("step_*.pt")) if path.is_dir() else [path]
    for path in reversed(paths):
        try:
            if zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
                raise ValueError("wrong checksum")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
            if not {"model", "gpt", "config", "optimizers", "step", "data"} <= set(checkpoint):
                raise ValueError("not a checkpoint of this script")
            return checkpoint
        except Exception as error:  # missing, truncated or corrupt
            print(f"cannot read {path} ({repr(error):.200})", file=sys.stderr)
    if paths:
        raise SystemExit("no readable checkpoint: give another one, or start a new run")


class CheckpointWriter:
    """Writes checkpoints in a thread. If one cannot be written, `failure` has the reason."""

    def __init__(self, log_dir: Path, config: Config, data: str):
        self.log_dir, self.config, self.data = log_dir, config, data
        self.thread, self.pending, self.failure = ThreadPoolExecutor(max_workers=1), [], ""

    def save(self, step: int, model: GPT, optimizers, scaler):
        """Copy the state of the run to the CPU, and write the copy in the background."""
        wait(self.pending)
        checkpoint = {"step": step, "data": self.data, "scaler": scaler.state_dict()}
        checkpoint |= {"config": flatten(self.config), "gpt": asdict(model.config)}
        checkpoint |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        checkpoint |= {"model": model.state_dict()}
        checkpoint = tree_map_only(torch.Tensor, lambda t: t.to("cpu", copy=True), checkpoint)
        weights = checkpoint["model"]  # write the tied matrix once
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        self.pending = [self.thread.submit(self.write, checkpoint)]

    def write(self, checkpoint: dict):
        tmp = self.log_dir / "checkpoint.tmp"
        try:
            torch.save(checkpoint, tmp)
            with open(tmp, "rb+") as file:
                os.fsync(file.fileno())  # on the disk before it gets its name
            os.replace(tmp, self.log_dir / f"step_{checkpoint['step']:06d}.pt")
            keep, interval = self.config.keep_checkpoints, self.config.archive_interval
            for old in sorted(self.log_dir.glob("step_*.pt"))[:-keep] if keep else []:
                if not interval or int(old.stem[5:]) % interval:
                    old.unlink()
            self.failure = ""
        except Exception as error:  # above all a full disk
            self.failure = (str(error) or repr(error)).splitlines()[0]
            tmp.unlink(missing_ok=True)


class RunLog:
    """log.txt, one line `step stream value` for each number; Weights & Biases if enabled."""

    LINE = re.compile(r"^(\d+) (train|val|hella) (\S+)\n", re.MULTILINE)  # not a truncated one

    def __init__(self, log_dir: Path, config: Config, first_step: int):
        self.path, self.wandb_run = log_dir / "log.txt", None
        # a resumed run repeats the steps after its checkpoint
        lines = self.LINE.findall(self.path.read_text()) if self.path.exists() else []
        lines = [" ".join(line) + "\n" for line in lines if int(line[0]) < first_step]
        fineweb.write_file(self.path, "".join(lines).encode())
        if config.wandb:
            settings = {"name": log_dir.name, "dir": log_dir, "config": flatten(config)}
            with fineweb.exit_on_error("--wandb failed; WANDB_MODE=offline needs no login"):
                import wandb

                self.wandb_run = wandb.init(project="gpt2", **settings)

    def write(self, step: int, stream: str, value: float):
        with contextlib.suppress(OSError), open(self.path, "a") as file:  # a full disk
            file.write(f"{step} {stream} {value:.6f}\n")
        if self.wandb_run:
            self.wandb_run.log({stream: value}, step=step)


def read_log(log_dir: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """log.txt as {stream: (steps, values)}."""
    streams = {"train": ([], []), "val": ([], []), "hella": ([], [])}
    for step, stream, value in RunLog.LINE.findall((Path(log_dir) / "log.txt").read_text()):
        streams[stream][0].append(int(step))
        streams[stream][1].append(float(value))
    return streams


def draw_curve(log_dir: Path, config: Config):
    """Draw log.txt as curve.png: losses on the left, accuracy on HellaSwag on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
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
    losses = [loss for loss in streams["train"][1] if math.isfinite(loss)] or [1.0]
    left.set_ylim(top=1.05 * max(losses[len(losses) // 50 :]))  # not the loss of the first steps
    left.set(title=log_dir.name, xlabel="step", ylabel="loss (nats per token)")
    right.set(title=Path(config.hellaswag_file).stem, xlabel="step", ylabel="accuracy")
    left.legend()
    right.legend()
    with contextlib.suppress(OSError):  # a full disk
        figure.savefig(log_dir / "curve.png")


def choose_log_dir(config: Config) -> Path:
    """The run's folder: that of --resume or --out_dir, or a new log/NAME-NNN."""
    if config.resume not in ("", "auto"):
        if not any(Path(config.resume).glob("step_*.pt")):
            raise SystemExit(f"no step_*.pt in {config.resume}: give --resume a run's folder")
        return Path(config.resume)
    if config.out_dir:
        if not config.resume and (Path(config.out_dir) / "config.json").exists():
            raise SystemExit(f"{config.out_dir} has a run: add --resume auto, or change --out_dir")
        return Path(config.out_dir)
    runs = sorted(Path("log").glob(f"{config.name}-[0-9][0-9][0-9]"))
    unfinished = [run for run in runs if not (run / "hf").exists()]
    if config.resume and unfinished:
        return unfinished[-1]
    return Path("log", f"{config.name}-{int(runs[-1].name[-3:]) + 1 if runs else 1:03d}")


def start_run(log_dir: Path, config: Config, n_params: int) -> FileLock:
    """Create the run's folder, lock it against other processes, and write config.json."""
    with fineweb.exit_on_error(f"cannot write to {log_dir}, or another process trains in it"):
        log_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(log_dir / "run.lock")
        lock.acquire(timeout=0)
    needed = 12 * n_params * (config.keep_checkpoints + 1)  # bytes: weights and two moments
    free = shutil.disk_usage(log_dir).free
    if config.checkpoint_interval and free < needed:
        have = f"checkpoints need {needed / 1e9:.1f} GB, {log_dir} has {free / 1e9:.1f} GB free"
        raise SystemExit(f"{have}: free space, or lower --keep_checkpoints")
    shutil.rmtree(log_dir / "hf", ignore_errors=True)  # of a finished run that is extended
    fineweb.write_file(log_dir / "config.json", json.dumps(flatten(config), indent=2).encode())
    return lock


def check_resume(config: Config, checkpoint: dict, data: str) -> int:
    """The step to resume from. Exits if changed hyperparameters make the run another experiment."""
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
    return checkpoint["step"]


class StopSignal:
    """Records SIGINT or SIGTERM: the run stops after the step. A second one ends the process."""

    def __init__(self, *signals: signal.Signals):
        self.signum, self.received_at = 0, math.inf
        for signum in signals:
            signal.signal(signum, self.handle)

    def handle(self, signum: int, frame):
        # torchrun forwards the Ctrl-C that the ranks have already received from the terminal
        if time.monotonic() > self.received_at + 1:
            os._exit(128 + signum)
        if not self.signum and os.environ.get("RANK", "0") == "0":
            os.write(2, b"stopping after this step; a second signal stops at once\n")
        self.signum, self.received_at = signum, min(self.received_at, time.monotonic())


# ---- 7. devices and DDP --------------------------------------------------------------------------
# dense bfloat16 TFLOP/s (V100, T4: float16) from the data sheets; the first match counts
PEAK_TFLOPS = {"MIG": math.nan, "B200": 2250, "H200 NVL": 835, "H200": 989, "GH200": 989}
PEAK_TFLOPS |= {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A40": 150, "A30": 165}
PEAK_TFLOPS |= {"A10G": 70, "A10": 125, "A6000": 155, "L40S": 362, "L40": 181, "L4": 121, "T4": 65}
PEAK_TFLOPS |= {"V100 PCIE": 112, "V100": 125, "5090": 209, "4090": 165, "3090": 71}


def peak_flops(device: str) -> float:
    """The peak FLOP/s of a GPU; nan for a CPU and for GPUs that are not in the table."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    words = set(re.split(r"[\s-]+", name))  # "NVIDIA A100-SXM4-80GB"
    return 1e12 * next((p for k, p in PEAK_TFLOPS.items() if words >= set(k.split())), math.nan)


def get_device(name: str) -> str:
    """auto, cuda, mps or cpu to a device; with CUDA each rank of a machine has its own."""
    n_gpus, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if n_gpus else "mps" if has_mps else "cpu"
    n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks on this machine
    if (name == "cuda" and n_ranks > n_gpus) or (name == "mps" and not has_mps):
        raise SystemExit(f"{n_ranks} ranks, {n_gpus} GPUs for --device {name}: try --device cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def get_autocast(name: str, device: str) -> tuple[torch.dtype, torch.autocast]:
    """The dtype of matmuls and its context manager. auto: float32; on CUDA bfloat16 or float16."""
    dtype = torch.float32 if name == "auto" else getattr(torch, name)
    if name == "auto" and device.startswith("cuda"):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    return dtype, torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32)


def sum_over_ranks(*values: float, device: str) -> list[float]:
    """Each value summed over all ranks."""
    if not dist.is_initialized():
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return totals.tolist()


def find_micro_batch_size(config: Config, model, ddp_world_size: int, device: str, autocast):
    """B, the number of sequences per forward pass. auto: on a GPU the largest power of two that
    divides the sequences of a rank and fits into memory, else at most 4."""
    gpt, T = config.gpt, config.gpt.block_size
    if config.micro_batch_size != "auto":
        return config.micro_batch_size
    B = math.gcd(config.total_batch_size // (T * ddp_world_size), 2**20)
    if not device.startswith("cuda"):
        return min(B, 4)
    # AdamW's two moments, and as much as the weights to spare
    reserved = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]
    # bytes of logits, their gradient, and at least 10 activations per block; saves compilations
    needed = 2 * T * (2 * gpt.vocab_size + 10 * gpt.n_layer * gpt.n_embd)
    free, _ = torch.cuda.mem_get_info(device)
    while B > 1:
        idx, loss, failed = reserved[0].new_zeros(B, T, dtype=torch.int64), None, False
        try:
            if B * needed > free:
                raise torch.OutOfMemoryError
            with autocast:
                loss = model(idx, idx)[1]
            loss.backward()
        except torch.OutOfMemoryError:
            failed = True
        model.zero_grad(set_to_none=True)
        if sum_over_ranks(failed, device=device) == [0]:  # all ranks use the same B
            break
        B //= 2
    return B


# ---- 8. training ---------------------------------------------------------------------------------
def is_due(interval: int, step: int, last_step: bool) -> bool:
    return interval > 0 and (step % interval == 0 or last_step)


def train(config: Config, stop_signal: StopSignal | None = None):
    """Train a model. Exits with one line on user errors, and with 128 + signal after a signal."""
    # set up DDP; torchrun sets these environment variables
    ddp = "RANK" in os.environ
    ddp_rank = int(os.environ.get("RANK", 0))
    ddp_local_rank = int(os.environ.get("LOCAL_RANK", 0))
    ddp_world_size = int(os.environ.get("WORLD_SIZE", 1))
    master_process = ddp_rank == 0  # this process does logging, checkpointing etc.
    check_config(config, ddp_world_size)
    device = get_device(config.device)
    device_type = device.split(":")[0]  # cuda:0 -> cuda
    if device_type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if ddp:
        # device_id: connect the GPUs now, not in the first step
        backend, gpu = ("nccl", torch.device(device)) if device_type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout), device_id=gpu)
    stop_signal = stop_signal or StopSignal()
    log_dir = choose_log_dir(config)
    if master_process and config.data_dir == "demo_data":
        prepare_demo_data(config)
    if ddp:
        dist.barrier()  # the other ranks wait here for rank 0

    # model
    torch.manual_seed(config.seed)
    checkpoint = load_checkpoint(log_dir) if log_dir.is_dir() else None
    T = config.gpt.block_size
    if checkpoint or config.init_from:
        raw_model = load_model(config.init_from, checkpoint, config.gpt.dropout)
    else:
        raw_model = GPT(config.gpt)
    if config.init_from:  # T may be smaller than the number of positions of the given weights
        if T > raw_model.config.block_size:
            raise SystemExit(f"--block_size {T} must be at most {raw_model.config.block_size}")
        config = replace(config, gpt=replace(raw_model.config, block_size=T))
    raw_model.to(device)
    n_params = sum(p.numel() for p in raw_model.parameters())
    dtype, autocast = get_autocast(config.dtype, device)
    data = fineweb.fingerprint(config.data_dir)
    first_step = check_resume(config, checkpoint, data) if checkpoint else 0
    if ddp:  # the disks of several machines may have different files
        states = [None] * ddp_world_size
        dist.all_gather_object(states, (first_step, data))
        if len(set(states)) > 1:
            raise SystemExit(f"copy {log_dir} and the shards to all machines: {set(states)} differ")
    # model is compiled and wrapped in DDP; raw_model is for all that has other shapes
    model = torch.compile(raw_model, dynamic=False) if config.compile else raw_model
    if ddp:
        device_ids = [ddp_local_rank] if device_type == "cuda" else None
        model = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True)  # saves memory
        model.require_backward_grad_sync = False  # True on the last micro-step of each step
    # data
    B = find_micro_batch_size(config, model, ddp_world_size, device, autocast)
    grad_accum_steps = config.total_batch_size // (B * T * ddp_world_size)
    train_loader = DataLoaderLite(config, "train", B, ddp_rank, ddp_world_size)
    if config.val_interval:
        val_loader = DataLoaderLite(config, "val", B, ddp_rank, ddp_world_size)
    enc = get_encoding_for(config.gpt.vocab_size)
    if config.hellaswag_interval:
        examples = hellaswag.prepare(hellaswag.iterate_examples(config.hellaswag_file), enc, T)
    # optimizers
    optimizers = raw_model.configure_optimizers(config)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)
    if checkpoint:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            # the moments are the checkpoint's, the hyperparameters those of this command
            state["param_groups"] = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(state)
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())  # {}: no float16
        del checkpoint
    if master_process:
        lock = start_run(log_dir, config, n_params)
        log = RunLog(log_dir, config, first_step)
        writer = CheckpointWriter(log_dir, config, data)
        epochs = config.max_steps * train_loader.sequences_per_step / train_loader.n_sequences
        batch = f"{ddp_world_size} ranks x {grad_accum_steps} micro-steps x {B} x {T} tokens"
        print(f"{log_dir} | {n_params:,} parameters | {device} | {dtype} | from step {first_step}")
        print(f"{config.total_batch_size} tokens per step = {batch} | {epochs:.2f} epochs")
    start, bad_steps, stopping = time.time(), 0, False
    for step in range(first_step, config.max_steps + 1):
        last_step = step == config.max_steps
        # save before evaluating: a run that is resumed from here repeats this step's evaluations
        save = stopping or is_due(config.checkpoint_interval, step, last_step)
        if master_process and save and step > first_step and not bad_steps:
            writer.save(step, raw_model, optimizers, scaler)
        if stopping:
            break
        with autocast:
            if is_due(config.val_interval, step, last_step):
                val_loss = evaluate_loss(model, val_loader, config.val_tokens, device)[0]
                if master_process:
                    print(f"step {step:5d} | val {val_loss:.4f}", flush=True)
                    log.write(step, "val", val_loss)
                    draw_curve(log_dir, config)
            if is_due(config.hellaswag_interval, step, last_step):
                counts = hellaswag.evaluate(raw_model, examples, ddp_rank, ddp_world_size)
                _, num_correct_norm, num_total = sum_over_ranks(*counts, device=device)
                if master_process:
                    print(f"step {step:5d} | hella {num_correct_norm / num_total:.4f}", flush=True)
                    log.write(step, "hella", num_correct_norm / num_total)
            if is_due(config.sample_interval, step, last_step) and master_process:
                for text in sample_texts(raw_model, enc, config.sample_prompt, config):
                    print(f"step {step:5d} | sample: {text}", flush=True)
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
        signum = torch.full_like(loss_accum, stop_signal.signum)
        sums = torch.stack((loss_accum / ddp_world_size, signum))
        if ddp:
            dist.all_reduce(sums)
        lr = get_lr(step, config)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        # the step waits for the GPU here only; the update overlaps with reading the next batch
        loss_accum, stopping, norm = torch.stack((*sums, norm)).tolist()  # stopping: any signum
        # skip a non-finite update, which would make all weights non-finite
        bad_steps = 0 if math.isfinite(loss_accum + norm) else bad_steps + 1
        if not bad_steps:
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        raw_model.zero_grad(set_to_none=True)
        dt = time.time() - t0  # in seconds
        if master_process:
            log.write(step, "train", loss_accum)
            tokens_per_sec = config.total_batch_size / dt
            flops = raw_model.flops_per_token(T) * tokens_per_sec
            mfu = flops / (peak_flops(device) * ddp_world_size)
            left = (time.time() - start) * (config.max_steps - step - 1) / (step + 1 - first_step)
            line = f"step {step:5d} | loss {loss_accum:.4f} | lr {lr:.2e} | norm {norm:.4f} | "
            line += f"dt {dt * 1000:.0f}ms | tok/sec {tokens_per_sec:,.0f} | "
            line += f"mfu {mfu:.1%} | " if math.isfinite(mfu) else ""
            line += f"left {left // 3600:.0f}h{left % 3600 // 60:02.0f}m"
            line += f" | not finite: update skipped, {bad_steps} in a row" if bad_steps else ""
            line += f" | checkpoint not written: {writer.failure}" if writer.failure else ""
            if step % config.log_interval == 0 or bad_steps:
                print(line, flush=True)
        if bad_steps and bad_steps == config.max_bad_steps:
            raise SystemExit(f"not finite {bad_steps} steps in a row: resume with a lower --lr")
    if master_process:
        wait(writer.pending)
        if writer.failure:
            print(f"the last checkpoint was not written: {writer.failure}")
        if stopping:
            print(f"stopped at step {step}: the same command with --resume auto continues")
        else:
            raw_model.save_pretrained(log_dir / "hf")
            draw_curve(log_dir, config)
            print(f"finished in {(time.time() - start) / 60:.1f} minutes; see {log_dir}/curve.png")
            print(f'python train_gpt2.py --prompt "{config.sample_prompt}" --init_from "{log_dir}"')
        lock.release()
    if ddp:
        dist.barrier()  # torchrun ends the other ranks when one of them exits
        dist.destroy_process_group()
    if stopping:
        raise SystemExit(128 + (stop_signal.signum or signal.SIGTERM))


# ---- 9. sampling, evaluation only, export --------------------------------------------------------
def load_model(source: str, checkpoint: dict | None = None, dropout: float = 0.0) -> GPT:
    """The model of a checkpoint, a step_NNNNNN.pt, a run's folder, or a from_pretrained source."""
    path = Path(source)
    if not checkpoint and (path.is_dir() or path.suffix == ".pt"):
        checkpoint = load_checkpoint(path)
    if not checkpoint:
        return GPT.from_pretrained(str(path / "hf") if (path / "hf").is_dir() else source, dropout)
    model = GPT(replace(GPTConfig(**checkpoint["gpt"]), dropout=dropout))
    model.load_state_dict(checkpoint["model"])
    return model


def evaluate_only(model: GPT, enc, device: str, config: Config):
    """Print the evaluations of the training loop, once."""
    T = min(config.gpt.block_size, model.config.block_size)
    config = replace(config, gpt=replace(model.config, block_size=T))
    with get_autocast(config.dtype, device)[1]:
        if config.val_interval:
            val_loader = DataLoaderLite(config, "val", B=8, ddp_rank=0, ddp_world_size=1)
            loss, accuracy, n = evaluate_loss(model, val_loader, config.val_tokens, device)
            _, y = val_loader.sequences(range(n // T))
            n_bytes = len(enc.decode_bytes(y[y != enc.eot_token].tolist()))
            print(f"validation loss      {loss:.4f} nats per token, {n:,} tokens")
            print(f"perplexity           {math.exp(loss):.2f}")
            print(f"next-token accuracy  {accuracy:.4f}")
            print(f"bits per byte        {loss * n / math.log(2) / n_bytes:.4f}")
        for way in ("lecture", "harness") if config.hellaswag_interval else ():
            rows = hellaswag.prepare(hellaswag.iterate_examples(config.hellaswag_file), enc, T, way)
            print(f"HellaSwag, {way:9} {hellaswag.evaluate(model, rows)}")


# ---- 10. command line ----------------------------------------------------------------------------
def parse_args(args: list[str]) -> Config:
    """`[PRESET] [--field value]...`; without a preset, gpt2."""
    import tyro

    preset, *flags = args if args and not args[0].startswith("-") else ["gpt2", *args]
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset}: choose from {', '.join(PRESETS)}")
    default, style = replace(PRESETS[preset], name=preset), tyro.conf.OmitArgPrefixes
    return tyro.cli(Config, args=flags, default=default, config=[style], use_underscores=True)


def main(config: Config):
    """Train, or do what eval_only, export or prompt ask for."""
    tasks = [config.eval_only, config.export, config.prompt]
    if not any(tasks):
        return train(config, StopSignal(signal.SIGINT, signal.SIGTERM))
    if sum(map(bool, tasks)) > 1:
        raise SystemExit("give only one of --eval_only, --export and --prompt")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    check_config(config)
    config = replace(config, init_from=config.init_from or "gpt2")
    if config.export and Path(config.export).exists():
        raise SystemExit(f"{config.export} exists: give --export a new folder")
    model = load_model(config.init_from)
    if config.export:
        model.save_pretrained(config.export)
        return print(f"{config.export} is written: transformers can load it")
    device, enc = get_device(config.device), get_encoding_for(model.config.vocab_size)
    model.to(device)
    if config.eval_only:
        return evaluate_only(model, enc, device, config)
    for prompt in config.prompt:
        prompt = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
        for text in sample_texts(model, enc, prompt, config):
            print(f"> {text}", flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not all consoles and locales have all characters
    try:
        main(parse_args(sys.argv[1:]))
    except torch.OutOfMemoryError:
        sys.exit("out of GPU memory: halve --micro_batch_size (same losses) or use a smaller model")
    except BrokenPipeError:
        os.write(2, b"stopped, because the program that reads the output has ended\n")
        os._exit(1)  # without writing the rest of the output
    except SystemExit as error:  # the first rank of each machine prints the message
        silent = isinstance(error.code, str) and int(os.environ.get("LOCAL_RANK", 0)) > 0
        sys.exit(1 if silent else error.code)

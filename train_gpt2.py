"""Reproduce GPT-2 (124M).

    python train_gpt2.py

Paper: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """The network's shape. The defaults are GPT-2 124M's."""

    n_layer: int = 12
    """blocks"""
    n_head: int = 12
    """attention heads in a block, of n_embd / n_head channels each: 64 in every GPT-2"""
    n_embd: int = 768
    """channels of the residual stream"""
    block_size: int = 1024
    """positions: tokens of the longest context"""
    vocab_size: int = 50257
    """tokens: 256 bytes, 50,000 merges, end-of-text"""
    dropout: float = 0.0
    """probability"""


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
        # position t may look at 0 .. t: a lower triangle of ones
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()
        self.register_buffer("mask", mask, persistent=False)  # (block_size, block_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) to (B, T, C)
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        # the products of hs numbers of deviation 1 have deviation sqrt(hs): take it out again,
        # or the softmax would start saturated (Vaswani et al. 2017, section 3.2.1)
        att = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, T)
        att = att.masked_fill(~self.mask[:T, :T], -math.inf)
        att = F.dropout(F.softmax(att, dim=-1), self.dropout, self.training)
        y = att @ v  # (B, nh, T, T) @ (B, nh, T, hs) -> (B, nh, T, hs)
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) to (B, T, C)
        # norms sit on the branches (GPT-2 paper, section 2.3): along the sum itself gradients
        # reach the first block unchanged
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2, with the parameter names of OpenAI's release."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """idx (B, T) int64, T up to block_size, to the logits (B, T, vocab_size) of the tokens that
        follow."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens, but only {self.config.block_size} positions")
        pos = torch.arange(T, device=idx.device)
        tok_emb = self.transformer.wte(idx)  # (B, T, C)
        pos_emb = self.transformer.wpe(pos)  # (T, C), alike in every row
        x = self.transformer.drop(tok_emb + pos_emb)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        return self.lm_head(x)


def main():
    if torch.cuda.is_available():
        device = "cuda"
    elif torch.backends.mps.is_available():
        device = "mps"
    else:
        device = "cpu"
    print(f"device: {device}")

    model = GPT(Config()).to(device)
    idx = torch.randint(50257, (2, 8), device=device)
    with torch.no_grad():
        logits = model(idx)
    print(f"idx {tuple(idx.shape)} -> logits {tuple(logits.shape)}")


if __name__ == "__main__":
    main()

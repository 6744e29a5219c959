"""Reproduce GPT-2 (124M).

    python train_gpt2.py

Paper: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019).
"""

from dataclasses import dataclass

import torch
from torch import nn


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
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k, v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)


class MLP(nn.Module):
    """Each position for itself: four times as wide, and back."""

    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)


class Block(nn.Module):
    """Attention, then MLP, each behind a norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)


class GPT(nn.Module):
    """GPT-2, with the parameter names of OpenAI's release."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)


def main():
    if torch.cuda.is_available():
        device = "cuda"
    elif torch.backends.mps.is_available():
        device = "mps"
    else:
        device = "cpu"
    print(f"device: {device}")

    model = GPT(Config()).to(device)
    for name, p in model.named_parameters():
        if "h." not in name or "h.0." in name:  # the other blocks are like the first
            print(f"{name:35} {tuple(p.shape)}")


if __name__ == "__main__":
    main()

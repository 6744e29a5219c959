"""Reproduce GPT-2 (124M): the model and the training loop in one file.

    python train_gpt2.py

Paper: GPT-2, "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019).
"""

from dataclasses import dataclass

from torch import nn


# ---- hyperparameters ---------------------------------------------------------------------------
@dataclass(frozen=True)
class GPTConfig:
    """The network. The defaults are GPT-2 124M."""

    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50257  # 256 bytes, 50,000 merges, end-of-text
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads in each block
    n_embd: int = 768  # channels


# ---- model -------------------------------------------------------------------------------------
class CausalSelfAttention(nn.Module):
    """Multi-head attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)


class MLP(nn.Module):
    """Position-wise feed-forward network with 4x expansion."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)


class Block(nn.Module):
    """A transformer block: attention, then MLP."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)


class GPT(nn.Module):
    """GPT-2, with the parameter names of OpenAI's release."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        modules = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            "ln_f": nn.LayerNorm(config.n_embd),
        }
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)


if __name__ == "__main__":
    model = GPT(GPTConfig())
    print(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

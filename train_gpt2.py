"""Reproduce GPT-2 (124M).

python train_gpt2.py
"""

import torch


def main():
    if torch.cuda.is_available():
        device = "cuda"
    elif torch.backends.mps.is_available():
        device = "mps"
    else:
        device = "cpu"
    print(f"device: {device}")


if __name__ == "__main__":
    main()

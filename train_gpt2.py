"""Reproduce GPT-2 (124M): the model and the training loop in one file.

    python train_gpt2.py

Paper: GPT-2, "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019).
"""

import torch

if __name__ == "__main__":
    print(f"PyTorch {torch.__version__}, CUDA available: {torch.cuda.is_available()}")

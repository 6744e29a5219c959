"""The demo: the real run's code on text that every Python installation has, offline, on a CPU.

    python train_gpt2.py demo

makes its data before the run, and says after it what has happened.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np

import fineweb
import hellaswag
import runs
import sources


def prepare(data_dir: str, block_size: int):
    """Make shards, and questions about their held-out text that fit, once."""
    folder = Path(data_dir)
    if folder.exists():
        return
    print(f"making {folder}/ from the sources of Python's standard library, a token a byte")
    aside = folder.with_name(folder.name + ".tmp")  # renamed when whole
    shutil.rmtree(aside, ignore_errors=True)
    documents = sources.standard_library()
    fineweb.write_shards(documents, aside, "bytes", val_tokens=300_000, workers=1, name="stdlib")
    tokens = np.concatenate(fineweb.open_shards(aside, "val", vocab_size=257))
    text = fineweb.get_encoding("bytes").decode(tokens.tolist())
    held_out = text.split("<|endoftext|>")
    examples = hellaswag.make_examples(held_out, 200, context_chars=block_size - 16)
    lines = "".join(json.dumps(example) + "\n" for example in examples)
    (aside / "hellaswag_val.jsonl").write_text(lines)
    os.replace(aside, folder)


def report(folder: Path, texts: list[str]):
    """Say in a few lines, and in curve.png, what the demo has done."""
    import matplotlib

    matplotlib.use("Agg")  # a picture in a file, no window
    from matplotlib import pyplot as plt

    streams = runs.read_log(folder)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*streams["train"], label="train", linewidth=0.8)
    if "val" in streams:
        axes.plot(*streams["val"], label="validation", marker="o")
    axes.set(xlabel="step", ylabel="loss, nats a byte", title="A small GPT reads Python's sources")
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120)
    plt.close(figure)
    print("\nWhat happened: a small GPT read Python's standard library, a byte at a time.")
    if "val" in streams:
        losses = streams["val"][1]
        print(f"  validation loss  {losses[0]:.3f} -> {losses[-1]:.3f} nats a byte")
    if "hella" in streams:
        shares = streams["hella"][1]
        print(
            f"  the next line    found among four {shares[0]:.0%} -> {shares[-1]:.0%} (chance: 25%)"
        )
    for text in texts[:1]:
        print(f"  a sample         {text!r}")
    print(f"  the losses       {folder}/curve.png")
    print("The real thing, GPT-2 124M on 10B tokens, on a machine with 8 GPUs:")
    print("  python fineweb.py && torchrun --standalone --nproc_per_node=8 train_gpt2.py")

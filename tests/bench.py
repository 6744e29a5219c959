"""Benchmarks: each compares ways of doing the same work, in turns, in one run.

    python tests/bench.py train [PRESET] [FILES]   # a training step, beside transformers' GPT-2 and
                                                   # nanoGPT's model.py, or files like it
    python tests/bench.py fineweb FILE       # tokenizing a parquet file, beside a plain loop
    python tests/bench.py hellaswag          # scored positions only, beside all logits
    python tests/bench.py sampling           # with and without the KV cache
    python tests/bench.py checkpoint         # time that a checkpoint takes from the training loop
    python tests/bench.py ranks              # one rank and two, on a CPU

The machine may be busy with other work, so only ratios between the ways of one run mean something.
The figures are medians over the rounds, with the lowest and the highest in brackets.
"""

import argparse
import importlib.util
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import asdict, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.nn import functional as F

import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT, PRESETS, CheckpointWriter, Config, GPTConfig, get_autocast, get_device


def seconds(function: Callable, *args) -> float:
    """The time that a call takes."""
    t0 = time.perf_counter()
    function(*args)
    return time.perf_counter() - t0


def compare(title: str, unit: str, ways: dict[str, Callable[[], float]], rounds: int = 5):
    """Call each way once per round; print the medians, and their ratios to the last way."""
    results = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            results[name].append(way())
    print(f"\n{title}; {unit}, median of {rounds} rounds")
    base = statistics.median(results[name])
    for name, r in results.items():
        median = statistics.median(r)
        print(f"  {name:34} {median:10.4g} [{min(r):.4g}, {max(r):.4g}] {median / base:6.2f}x")


# ---- train ---------------------------------------------------------------------------------------


def our_loss(model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return model(x, y)[1]


def transformers_loss(model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return model(x, labels=x).loss  # it shifts the labels itself


def transformers_gpt2(gpt: GPTConfig):
    """transformers' GPT-2 with this network, without dropout."""
    import transformers

    config = transformers.GPT2Config(
        n_layer=gpt.n_layer, n_head=gpt.n_head, n_embd=gpt.n_embd, n_positions=gpt.block_size,
        vocab_size=gpt.vocab_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # the default, but without a warning
    return model


def training_step(
    model, get_loss, optimizers, B: int, gpt: GPTConfig, device: str, grad_accum_steps: int = 1
) -> Callable:
    """A function that trains on one random batch: forward, backward, clipping and update."""
    T, vocab_size = gpt.block_size, gpt.vocab_size
    tokens = torch.randint(vocab_size, (B, T + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (B, T)
    _, autocast = get_autocast("auto", device)

    def step():
        for _ in range(grad_accum_steps):
            with autocast:
                loss = get_loss(model, x, y) / grad_accum_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # wait for the GPU

    return step


def load_peer(path: str, gpt: GPTConfig):
    """The model of another repository's file with `GPT` and `GPTConfig`, with this network. As in
    those repositories, the vocabulary is padded to a multiple of 64."""
    spec = importlib.util.spec_from_file_location("peer", path)
    sys.modules["peer"] = peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    values = asdict(gpt) | {"vocab_size": math.ceil(gpt.vocab_size / 64) * 64, "bias": True}
    names = {field.name for field in fields(peer.GPTConfig)}
    return peer.GPT(peer.GPTConfig(**{name: values[name] for name in names & set(values)}))


def bench_train(preset: str = "", *peers: str):
    """Tokens per second of a training step: this script and others, compiled and not."""
    device = get_device("auto")
    preset = preset or ("gpt2" if device.startswith("cuda") else "demo")
    config = PRESETS[preset]
    B, T = config.micro_batch_size, config.gpt.block_size
    if B == "auto":  # a CPU would need minutes for a step of 64 x 1024 tokens
        B, T = (64, 1024) if device.startswith("cuda") else (4, 256)
    gpt = replace(config.gpt, block_size=T)
    ours = GPT(gpt).to(device)
    optimizers = ours.configure_optimizers(config)
    theirs = transformers_gpt2(gpt).to(device)
    models = {"this script": (ours, our_loss, optimizers)}
    others = {path: (load_peer(path, gpt).to(device), our_loss) for path in peers}
    for name, (model, loss) in (others | {"transformers": (theirs, transformers_loss)}).items():
        # fused on a GPU only, as in nanoGPT and build-nanogpt
        adamw = torch.optim.AdamW(model.parameters(), 6e-4, fused=device.startswith("cuda"))
        models[name] = (model, loss, [adamw])
    compiled = {f"{k}, compiled": (torch.compile(m), *rest) for k, (m, *rest) in models.items()}
    ways = {}
    for name, parts in (compiled | models).items():
        step = training_step(*parts, B, gpt, device)
        for _ in range(3):  # compile and warm up
            t = seconds(step)
        n = max(1, round(2 / t))  # about two seconds per turn
        ways[name] = lambda step=step, n=n: n * B * T / seconds(lambda: [step() for _ in range(n)])
    compare(f"a step of {B} x {T} tokens, {preset} on {device}", "tokens per second", ways)
    flops, peak = ours.flops_per_token(T), train_gpt2.peak_flops(device)
    print(f"  {flops / 1e6:,.1f}M FLOPs per token; peak {peak / 1e12:.0f} TFLOP/s (nan: not known)")
    if device.startswith("cuda"):
        print(f"  peak memory of all ways {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


# ---- fineweb -------------------------------------------------------------------------------------


# runs fineweb.py, and prints its tokens per second after the first batch, which waits for the start
# of the workers, until the last shard and the manifest are written
TIMED_FINEWEB = """
import sys, time, fineweb

def timed(*args):
    for position, tokens, n_skipped in tokenize_all(*args):
        if not batches:
            batches.append((len(tokens), time.perf_counter()))
        yield position, tokens, n_skipped

if __name__ == "__main__":
    batches, tokenize_all, fineweb.tokenize_all = [], fineweb.tokenize_all, timed
    files, out, workers = sys.argv[1:]
    fineweb.main(fineweb.Config(files=(files,), out=out, workers=int(workers)))
    (n_first, start), = batches
    n_tokens = fineweb.read_manifest(out)["tokens"] - n_first
    print(n_tokens / (time.perf_counter() - start))
"""


def bench_fineweb(file: str):
    """Tokens per second from the first to the last document, reading and writing included."""
    import pyarrow.parquet

    enc = fineweb.get_encoding("gpt2")
    texts = pyarrow.parquet.read_table(file, columns=["text"])["text"].to_pylist()

    def plain() -> float:
        """One core's encode_ordinary, without reading and writing."""
        n_tokens = 0
        t0 = time.perf_counter()
        for text in texts:
            n_tokens += 1 + len(enc.encode_ordinary(text))
        return n_tokens / (time.perf_counter() - t0)

    def shards(workers: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", TIMED_FINEWEB, file, f"{folder}/out", str(workers)]
            env = os.environ | {"PYTHONPATH": str(Path(fineweb.__file__).parent)}
            run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            return float(run.stdout.split()[-1])

    ways = {f"fineweb.py, {n} workers": lambda n=n: shards(n) for n in (os.cpu_count(), 1)}
    compare(file, "tokens per second", ways | {"encode_ordinary in a loop": plain}, rounds=5)


# ---- hellaswag, sampling, checkpoint, ranks ------------------------------------------------------


def bench_hellaswag():
    """Examples per second: the head at the scored positions only, or at all positions."""
    gpt = replace(PRESETS["gpt2"].gpt, n_layer=2, block_size=256)  # few blocks: the head counts
    model = GPT(gpt).to(get_device("auto")).eval()
    sources = [path.read_text() for path in Path(__file__).parent.glob("*.py")]
    examples = hellaswag.make_examples(sources, 16)
    rows = hellaswag.prepare(examples, fineweb.get_encoding("bytes"), gpt.block_size)

    @torch.no_grad()
    def all_logits():
        for example in rows:
            tokens = example.tokens.to(model.lm_head.weight.device)
            logits, _ = model(tokens)  # (4, N, vocab_size)
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    ways = {
        "hellaswag.evaluate": lambda: len(rows) / seconds(hellaswag.evaluate, model, rows),
        "one example at a time, all logits": lambda: len(rows) / seconds(all_logits),
    }
    compare("HellaSwag, 2 blocks of GPT-2 124M", "examples per second", ways, rounds=3)


def bench_sampling():
    """Tokens per second of GPT-2 124M for one sequence: generate, or a full pass for each token."""
    model = GPT(PRESETS["gpt2"].gpt).to(get_device("auto")).eval()

    @torch.no_grad()
    def without_cache(idx: torch.Tensor, n: int):
        for _ in range(n):
            logits, _ = model(idx)
            idx = torch.cat((idx, logits[:, -1:].argmax(dim=-1)), dim=1)

    for length in (64, 256):
        idx = torch.randint(50257, (1, length), device=model.lm_head.weight.device)
        ways = {
            "with the KV cache": lambda idx=idx: 16 / seconds(model.generate, idx, 16, 0.0),
            "without": lambda idx=idx: 16 / seconds(without_cache, idx, 16),
        }
        compare(f"16 tokens after {length}", "tokens per second", ways, rounds=3)


def bench_checkpoint():
    """Seconds that saving takes from the loop: copying only, or copying and writing."""
    config, device = replace(Config(), keep_checkpoints=1), get_device("auto")
    model = GPT(replace(config.gpt, n_layer=6)).to(device)
    optimizers = model.configure_optimizers(config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizers[0].step()
    scaler = torch.amp.GradScaler(enabled=False)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        writer = CheckpointWriter(Path(folder), config, data="")

        def save() -> tuple[float, float]:
            t = seconds(writer.save, 1, model, optimizers, scaler)
            return t, seconds(wait, writer.pending)

        ways = {"in a thread": lambda: save()[0], "in the loop": lambda: sum(save())}
        compare("a checkpoint of 82M parameters", "seconds", ways)


def bench_ranks():
    """Milliseconds per step of a small network under torchrun, one thread per rank."""
    script = Path(train_gpt2.__file__)
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(257, size=1_000_000).astype(np.uint16)
        np.save(Path(folder) / "x_train_000000.npy", tokens)

        def step_time(n_ranks: int) -> float:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={n_ranks}", str(script), "demo", "--data_dir", folder]
            command += ["--max_steps", "30", "--log_interval", "1", "--device", "cpu"]
            for name in ("val", "hellaswag", "sample", "checkpoint"):
                command += [f"--{name}_interval", "0"]
            command += ["--micro_batch_size", str(12 // n_ranks)]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            times = [int(ms) for ms in re.findall(r"dt (\d+)ms", run.stdout)]
            return statistics.median(times[10:])

        ways = {"two ranks": lambda: step_time(2), "one rank": lambda: step_time(1)}
        compare("a step of the demo's network", "milliseconds", ways, rounds=3)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    benchmarks = {name[6:]: f for name, f in globals().items() if name.startswith("bench_")}
    parser.add_argument("benchmark", choices=benchmarks)
    parser.add_argument(
        "argument", nargs="*", help="a preset and files for train, a parquet file for fineweb"
    )
    args = parser.parse_args()
    benchmarks[args.benchmark](*args.argument)


if __name__ == "__main__":
    main()

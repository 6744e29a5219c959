"""How much the project's choices bring, against the plain way: medians over interleaved rounds.

    python tests/bench.py train        # a whole step, lever by lever, beside transformers'
    python tests/bench.py scaling      # one rank, or two that share the step
    python tests/bench.py data         # waiting for batches: fetched ahead, or when needed
    python tests/bench.py memory       # of one step of the 124M: this model, or transformers'
    python tests/bench.py optimizer    # fused AdamW, or torch's default on a CPU
    python tests/bench.py checkpoint   # what one costs the loop: written beside it, or in it
    python tests/bench.py fineweb      # tokenizing on every core, or as one would write it at first
    python tests/bench.py hellaswag    # the context once, or four rows and all logits
    python tests/bench.py sampling     # with keys and values kept, or without
    python tests/bench.py shakespeare input.txt  # the preset, or nanoGPT's recipe for a CPU

Each way is timed in turn, so that what else the machine does falls on all of them.
"""

import argparse
import copy
import io
import itertools
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow.parquet
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fineweb
import hellaswag
import runs
import sources
import train_gpt2
from train_gpt2 import (
    GPT,
    PRESETS,
    Config,
    configure_optimizer,
    flops_per_token,
    get_batch,
    prefetch,
)

ROUNDS = 5


def clock(function, *args) -> float:
    """Seconds that a call takes."""
    t0 = time.perf_counter()
    function(*args)
    return time.perf_counter() - t0


def compare(title: str, unit: str, ways: dict, rounds: int = ROUNDS) -> None:
    """Call each way in turn, so many rounds; print the medians, and their ratios to the last."""
    results = {name: [] for name in ways}
    for _, (name, way) in itertools.product(range(rounds), ways.items()):
        results[name].append(way())
    last = statistics.median(results[name])
    print(f"{title} ({unit}; median of {rounds}, from least to most)")
    for name, r in results.items():
        median = statistics.median(r)
        print(f"  {name:25} {median:9.4g} {median / last:6.2f}x   {min(r):.4g} to {max(r):.4g}")


LEVERS = ("low precision", "compile", "flash attention", "fused AdamW", "loss in parts")


def bench_train(preset: str = "", *wanted: str) -> None:
    """Forward, backward and update: gpt2's at 64 x 1024 tokens on a GPU; on a CPU the demo's, or,
    if asked for, gpt2's at 4 x 256; of the ways those with a wanted word. A process for each, so
    that each has its own peak memory; while one works the others wait."""
    on_gpu = torch.cuda.is_available()
    preset = preset or ("gpt2" if on_gpu else "demo")
    ours = [lever for lever in LEVERS if on_gpu or lever not in ("low precision", "compile")]
    ways = {
        "this trainer": ours,
        **({} if on_gpu else {"this trainer, compiled": [*ours, "compile"]}),
        "no lever": [],
        **{f"{lever} alone": [lever] for lever in LEVERS},
        "transformers, compiled": ["transformers", "compile"],
        "transformers, plain": ["transformers"],
    }
    if wanted:
        plain = "transformers, plain"
        ways = {n: w for n, w in ways.items() if n == plain or any(word in n for word in wanted)}
    spawn = multiprocessing.get_context("spawn")
    learners, processes = {}, []
    for name, levers in ways.items():
        ask, answer = spawn.Pipe()
        process = spawn.Process(target=learn, args=(preset, levers, answer), daemon=True)
        process.start()
        answer.close()  # so that the end of the process is the end of its answers
        print(f"\r{name + ': the first step':60}", end="", flush=True)
        ask.recv()  # built, compiled and warm, before the next one begins
        learners[name] = ask
        processes.append(process)
    results = {name: [] for name in ways}
    for _, (name, ask) in itertools.product(range(ROUNDS), learners.items()):
        ask.send("a turn")
        results[name].append(ask.recv())
    for ask in learners.values():
        ask.send("")  # no turn any more
    for process in processes:
        process.join()  # what follows is measured on a quiet machine

    config, device = sizes_of(preset)
    exact = flops_per_token(config, sum(p.numel() for p in GPT(config).parameters()))
    in_full = exact + 6 * config.n_layer * config.n_embd * config.block_size
    rate = matrix_rate(device)
    title = f"{preset}, {config.micro_batch_size} x {config.block_size} tokens a step on {device}"
    print(f"\r{title:60}")
    print(f"  {exact / 1e6:,.1f}M FLOPs a token: 6 N + 6 L C T, causal attention counted as half")
    print(f"  ({in_full / 1e6:,.1f}M: 6 N + 12 L C T, in full)")
    print(f"  the largest products reach {rate / 1e12:.3g} TFLOP/s: {rate / exact:,.0f} tokens/s")
    print(f"  {'':28} tokens/s  times plain  share of that    mfu   peak GiB")
    median = {name: statistics.median(r[0] for r in turns) for name, turns in results.items()}
    for name, turns in results.items():
        r, peak = median[name], max(r[1] for r in turns)
        times, share = r / median["transformers, plain"], r * exact / rate
        mfu = r * exact / train_gpt2.peak_flops(device)  # nan: a CPU's peak is not known
        print(f"  {name:28} {r:8,.0f} {times:12.2f} {share:14.2f} {mfu:6.2f} {peak:10.2f}")


def sizes_of(preset: str) -> tuple[Config, torch.device]:
    """A preset's network, and as many sequences as the benchmark takes at once."""
    device, config = train_gpt2.resolve_device("auto"), PRESETS[preset]
    if config.micro_batch_size == "auto" and device.type == "cuda":
        config = replace(config, micro_batch_size=64)
    elif config.micro_batch_size == "auto":
        config = replace(config, micro_batch_size=4, block_size=256)
    else:
        B = config.total_batch_size // config.block_size
        config = replace(config, micro_batch_size=B)
    return config, device


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large product in the dtype that training takes here."""
    n, dtype = (8192 if device.type == "cuda" else 2048), train_gpt2.resolve_dtype("auto", device)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)

    def product() -> None:
        c = a @ b
        c[0, 0].item()  # waits for the GPU

    return 2 * n**3 / min(clock(product) for _ in range(10))


def learn(preset: str, levers: list[str], answer) -> None:
    """A process that makes a turn of steps whenever it is asked to, and answers with tokens/s and
    its peak memory in GiB."""
    config, device = sizes_of(preset)
    on_gpu, B, T = device.type == "cuda", config.micro_batch_size, config.block_size
    torch.manual_seed(0)
    theirs = "transformers" in levers
    if theirs:
        import transformers

        transformers.logging.set_verbosity_error()
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, n_positions=T,
                vocab_size=config.vocab_size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                bos_token_id=None, eos_token_id=None,
            )
        ).to(device)  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1)
    else:
        model = GPT(config).to(device)
        fused = "fused AdamW" in levers
        optimizer = configure_optimizer(model, config, device.type if fused else "other")
    # the plainest loop has autocast on a GPU, as everybody's
    low = "low precision" in levers or theirs and on_gpu
    dtype = torch.bfloat16 if low else torch.float32
    handle = torch.compile(model) if "compile" in levers else model
    written_out = not theirs and "flash attention" not in levers
    tokens = torch.randint(config.vocab_size, (B, T + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # each (B, T)

    def step() -> None:
        attention = sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext()
        with train_gpt2.autocast_of(dtype, device), attention:
            if theirs:
                loss = handle(x, labels=x).loss
            elif "loss in parts" in levers:
                _, loss = handle(x, y)
            else:
                logits, _ = handle(x)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    for _ in range(3):  # the last one is warm
        seconds = clock(step)
    n_steps = max(1, round(1.5 / seconds))
    answer.send("ready")
    while answer.recv():
        seconds = clock(lambda: [step() for _ in range(n_steps)])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        if on_gpu:
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()  # what is free belongs to the next one
        answer.send((n_steps * B * T / seconds, peak / 2**30))


def bench_scaling() -> None:
    """The trainer itself under torchrun, a thread a rank, the demo's network."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(257, size=1_000_000).astype(np.uint16)
        np.save(f"{folder}/x_train_000000.npy", tokens)
        off = "--val_interval 0 --hellaswag_interval 0 --sample_interval 0 --checkpoint_interval 0"
        script = Path(train_gpt2.__file__)

        def milliseconds(n_ranks: int, optimizer: str) -> float:
            """The median step of a short run."""
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={n_ranks}", script, "shakespeare_char", *off.split()]
            command += ["--data_dir", folder, "--max_steps", "40", "--device", "cpu"]
            command += ["--micro_batch_size", str(12 // n_ranks), "--optimizer", optimizer]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            out = subprocess.run(command, cwd=folder, env=environment, check=True,
                                 capture_output=True, text=True).stdout  # fmt: skip
            times = re.findall(r" (\d+) ms ", out)
            return statistics.median(map(int, times[10:]))

        ways = {
            f"{n} rank{'s' * (n > 1)}, {optimizer}": lambda n=n, o=optimizer: milliseconds(n, o)
            for optimizer in ("muon", "adamw")
            for n in (2, 1)
        }
        compare("a step of 12 x 64 tokens, a thread a rank", "ms", ways, rounds=3)


def bench_data() -> None:
    demo = PRESETS["demo"]
    model = GPT(demo)
    optimizer = configure_optimizer(model, demo, "cpu")

    def waiting(feed, windows) -> float:
        """Per cent of some steps' time spent in next(batches)."""
        arguments = itertools.product(range(9), range(2))  # steps, micro-steps
        batches = feed(lambda *at: get_batch(windows, demo, *at), arguments)
        next(batches), next(batches)  # a step for the thread to get ahead
        start, waited = time.perf_counter(), 0.0
        for micro_step in range(16):
            t0 = time.perf_counter()
            x, y = next(batches)
            waited += time.perf_counter() - t0
            model(x, y)[1].backward()
            if micro_step % 2:
                optimizer.step()
                optimizer.zero_grad()
        return 100 * waited / (time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(257, size=9_000_000).astype(np.uint16)
        np.save(f"{folder}/x_train_000000.npy", tokens)
        windows = train_gpt2.Windows(folder, "train", demo.block_size, demo.vocab_size)
        ways = {"fetched ahead": prefetch, "fetched when needed": itertools.starmap}
        ways = {name: lambda feed=feed: waiting(feed, windows) for name, feed in ways.items()}
        compare("waiting for batches in the demo", "% of the time", ways)


def bench_memory(way: str = "") -> None:
    ways = ("this model", "transformers, plain loop")
    if not way:  # each in a process of its own, since a process only knows its highest peak
        command = [sys.executable, __file__, "memory"]
        ways = {w: lambda w=w: float(subprocess.check_output([*command, w])) for w in ways}
        return compare("peak memory of a step, 124M, 4 x 256 tokens, float32", "GiB", ways)
    x, y = torch.randint(50257, (2, 4, 256))
    if way == "this model":
        model = GPT(Config())
        optimizer = configure_optimizer(model, Config(), "cpu")
        model(x, y)[1].backward()
    else:
        import transformers

        no_dropout = transformers.GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        model = transformers.GPT2LMHeadModel(no_dropout).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)
        model(x, labels=x).loss.backward()
    optimizer.step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def bench_optimizer() -> None:
    model = GPT(replace(Config(), n_layer=6))  # half the blocks: 82M parameters
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    fused, default = (configure_optimizer(model, Config(), name) for name in ("cpu", "other"))
    ways = {"fused": lambda: clock(fused.step), "torch's default": lambda: clock(default.step)}
    compare("an update of 82M parameters", "seconds", ways)


def bench_checkpoint() -> None:
    demo, scaler = PRESETS["demo"], torch.amp.GradScaler(enabled=False)

    def learner(config) -> tuple:
        """A model and its optimizer, with the moments that the first update makes."""
        model = GPT(config)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer = configure_optimizer(model, config, "cpu")
        optimizer.step()
        return model, optimizer

    with tempfile.TemporaryDirectory(dir=".") as folder:  # on a disk, where /tmp may be memory
        model, optimizer = learner(demo)
        writer = runs.CheckpointWriter(Path(folder), demo, "")
        x, y = torch.randint(257, (2, 6, 96))
        stops, seconds = [], []

        def steps(saves: bool) -> float:
            t0 = time.perf_counter()
            for step in range(50):
                for _ in range(2):
                    model(x, y)[1].backward()
                optimizer.step()
                optimizer.zero_grad()
                if saves and not step:  # the other 49 steps run beside the writing
                    stops.append(clock(writer.save, step, model, optimizer, scaler))
            seconds.append(time.perf_counter() - t0)
            return seconds[-1]

        ways = {"with a checkpoint": lambda: steps(True), "without": lambda: steps(False)}
        compare("50 steps of the demo's model", "seconds", ways)
        share = statistics.median(stops) / statistics.median(seconds)
        print(f"  the loop stops for {share:.2%} of the time")

        model, optimizer = learner(Config())
        writer = runs.CheckpointWriter(Path(folder), Config(), "")

        def beside() -> float:
            writer.wait()
            return clock(writer.save, 0, model, optimizer, scaler)

        def states() -> dict:
            return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

        def in_the_loop() -> float:
            writer.wait()
            with open(f"{folder}/file", "wb") as file:
                return clock(lambda: (torch.save(states(), file), os.fsync(file.fileno())))

        ways = {
            "written beside the loop": beside,
            "a plain copy": lambda: clock(copy.deepcopy, states()),
            "written in the loop": in_the_loop,
        }
        compare("the loop's stop for a checkpoint of 124M parameters", "seconds", ways)
        writer.wait()


def bench_fineweb(path: str = "") -> None:
    """From a parquet file to shards, reading and writing included, in GPT-2's encoding."""
    with tempfile.TemporaryDirectory() as folder:
        if not path:
            path = f"{folder}/stdlib.parquet"
            table = pyarrow.table({"text": list(sources.standard_library()) * 4})
            pyarrow.parquet.write_table(table, path, row_group_size=100)

        def shards(workers: int) -> None:
            with tempfile.TemporaryDirectory() as out:
                fineweb.write_shards(sources.corpus_of([path]), out, "gpt2", workers=workers)

        def plain(rows) -> None:
            np.save(f"{folder}/plain.npy", np.concatenate(list(rows)))

        def texts() -> list[str]:
            return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()

        def one_by_one() -> None:
            plain(map(plain_tokens, texts()))

        def pool() -> None:
            with multiprocessing.Pool(max(1, (os.cpu_count() or 1) // 2)) as workers:
                plain(workers.imap(plain_tokens, texts(), chunksize=16))

        one_by_one()  # GPT-2's vocabulary is loaded, for all of them
        n_tokens = len(np.load(f"{folder}/plain.npy"))
        rate = lambda way, *args: n_tokens / clock(way, *args)  # noqa: E731
        ways = {
            "a worker a core": lambda: rate(shards, 0),
            "1 worker": lambda: rate(shards, 1),
            "Pool(cores // 2).imap": lambda: rate(pool),
            "document by document": lambda: rate(one_by_one),
        }
        compare(f"{n_tokens / 1e6:.1f}M tokens from {Path(path).name}", "tokens/s", ways)


def plain_tokens(text: str) -> np.ndarray:
    """One document, the plain way."""
    enc = fineweb.get_encoding("gpt2")
    return np.array([enc.eot_token, *enc.encode_ordinary(text)], dtype=np.uint16)


def bench_hellaswag(path: str = "") -> None:
    """A network of 124M on questions like HellaSwag's; or on its file: 16 examples of a quarter of
    the lengths and 16 of three quarters, for a batch has neighbours when all are asked."""
    encoding, model = fineweb.get_encoding("gpt2"), GPT(Config()).eval()
    if path:
        examples = sorted(hellaswag.load(path), key=lambda e: len(e["ctx"] + "".join(e["endings"])))
        examples = [e for at in (1, 3) for e in examples[at * len(examples) // 4 :][:16]]
    else:
        documents = list(itertools.islice(sources.standard_library(), 20))
        examples = hellaswag.make_examples(documents, 4, context_chars=160, ending_chars=90)
    questions = hellaswag.prepare(examples, encoding, 1024)
    plain_choices(model, examples[:2], encoding)  # neither way comes first
    rate = lambda *way: len(examples) / clock(*way)  # noqa: E731
    ways = {
        "context once": lambda: rate(hellaswag.evaluate, model, questions),
        "four rows, all logits": lambda: rate(plain_choices, model, examples, encoding),
    }
    compare("HellaSwag, 124M, float32", "examples/s", ways, rounds=ROUNDS if path else 3)


@torch.no_grad()
def plain_choices(model: GPT, examples: list[dict], encoding) -> list[tuple[int, int]]:
    """As one would write it at first: an example at a time, four padded rows, logits everywhere."""
    choices = []
    for example in examples:
        context = encoding.encode_ordinary(example["ctx"])
        rows = [context + encoding.encode_ordinary(f" {e}") for e in example["endings"]]
        tokens = torch.zeros(4, max(map(len, rows)), dtype=torch.int64)  # (4, N)
        is_ending = torch.zeros(tokens.shape)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            is_ending[i, len(context) : len(row)] = 1
        logits, targets = model(tokens)[0][:, :-1], tokens[:, 1:]  # (4, N - 1, V), (4, N - 1)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        sums = (losses.view(4, -1) * is_ending[:, 1:]).sum(dim=1)  # (4,)
        means = sums / is_ending.sum(dim=1)
        choices.append((int(sums.argmin()), int(means.argmin())))
    return choices


def bench_sampling(n_tokens: str = "512") -> None:
    """New tokens from a network of 124M."""
    model, prompt, n = GPT(Config()).eval(), torch.randint(50257, (1, 8)), int(n_tokens)

    @torch.no_grad()
    def without_cache(idx: torch.Tensor) -> None:
        for _ in range(n):
            logits = model.logits(model.hidden(idx)[:, -1])  # (1, V)
            idx = torch.cat((idx, train_gpt2.draw(logits)), dim=1)

    ways = {
        "cached": lambda: clock(model.generate, prompt, n),
        "cached, 5 samples": lambda: clock(model.generate, prompt, n, 1.0, 5),
        "all tokens anew": lambda: clock(without_cache, prompt),
    }
    compare(f"{n} new tokens, 124M", "seconds", ways, rounds=3)


def bench_shakespeare(path: str) -> None:
    """Each recipe once on the same split, the last tenth held out: seconds of training alone."""
    tokens = np.fromfile(path, dtype=np.uint8).astype(np.uint16)
    n = len(tokens) * 9 // 10
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x_train_000000.npy", tokens[:n])
        np.save(f"{folder}/x_val_000001.npy", tokens[n:])
        preset = replace(PRESETS["shakespeare_char"], data_dir=folder, device="cpu")
        off = dict.fromkeys(("sample_interval", "checkpoint_interval"), 0)
        run = replace(preset, out_dir=f"{folder}/run", val_interval=50, **off)
        curves, seconds, out = {"this preset": []}, 0.0, io.StringIO()
        with redirect_stdout(out):
            train_gpt2.main(run)
        for kind, value in re.findall(r"(val |norm .*? \| )([\d.]+)", out.getvalue()):
            if kind == "val ":
                curves["this preset"].append((seconds, float(value)))
            else:
                seconds += float(value) / 1000  # a step's line has its milliseconds
        model, seconds = GPT(preset), 0.0
        windows = train_gpt2.Windows(folder, "val", preset.block_size, preset.vocab_size)
        curves["nanoGPT's recipe"] = []
        t0 = time.perf_counter()
        for _ in nanogpt_recipe(model, torch.from_numpy(tokens[:n].astype(np.int64))):
            seconds += time.perf_counter() - t0
            loss = train_gpt2.validation_loss(model, model, windows, preset)
            curves["nanoGPT's recipe"].append((seconds, loss))
            t0 = time.perf_counter()
    for name, curve in curves.items():
        until = next((f"{at:.1f} s" for at, loss in curve if loss <= 1.886), "never")
        print(f"  {name:18} validation 1.886 after {until}, {curve[-1][1]:.4f} in the end, after "
              f"{curve[-1][0]:.1f} s")  # fmt: skip


def nanogpt_recipe(model: GPT, tokens: torch.Tensor, max_steps: int = 2000) -> Iterator[None]:
    """The plain loop: random positions, AdamW, warm-up and cosine from 1e-3 to 1e-4. It waits every
    50 updates."""
    recipe = replace(
        PRESETS["shakespeare_char"], lr=1e-3, min_lr=1e-4, warmup_steps=100, beta2=0.99,
        cooldown=0.0, optimizer="adamw",
    )  # fmt: skip
    recipe = replace(recipe, max_steps=max_steps, weight_decay=0.1)
    optimizer = configure_optimizer(model, recipe, "other")  # for which there is no fused one
    for step in range(max_steps):
        if step % 50 == 0:
            yield
        for group in optimizer.param_groups:
            group["lr"] = train_gpt2.get_lr(step, recipe)
        starts = torch.randint(len(tokens) - 64, (12,))
        windows = torch.stack([tokens[i : i + 65] for i in starts])  # (B, T + 1)
        loss = model(windows[:, :-1], windows[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [name[6:] for name in globals() if name.startswith("bench_")]
    parser.add_argument("name", choices=names)
    parser.add_argument(
        "argument",
        nargs="*",
        help="shakespeare: a text file; and where wanted: fineweb: a .parquet file, hellaswag: "
        "its file, sampling: a number of tokens, train: a preset, and words of the ways to try",
    )
    arguments = parser.parse_args()
    globals()[f"bench_{arguments.name}"](*arguments.argument)

"""Checks that this machine computes GPT-2 right, measures its speed, and estimates the real run.

    python tests/gpu_check.py                      # some minutes, without data and network
    torchrun --standalone --nproc_per_node=8 tests/gpu_check.py
    python tests/gpu_check.py --out result.json --dollars_per_gpu_hour 2.5
    python tests/gpu_check.py --device cpu         # the same code with small networks

Each line is a check with its limit, or a measurement. The exit status is 1 if a check fails. With
several GPUs, or --ranks, the checks of several ranks run as well, on this machine only.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
from bench import our_loss, training_step, transformers_gpt2, transformers_loss
from torch._dynamo.utils import counters
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.profiler import ProfilerActivity, profile

import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT, PRESETS, Config, GPTConfig, StopSignal, get_autocast

GPT2 = PRESETS["gpt2"].gpt
# bytes as tokens, which need no vocabulary: for training runs, and for everything on a CPU
SMALL = GPTConfig(block_size=256, vocab_size=257, n_layer=4, n_head=4, n_embd=256)
TINY = GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=32)
TIMEOUT = 60  # seconds a rank waits for the others
SHUTDOWN = 60  # seconds that torchrun needs to end all processes
DEADLINE = time.monotonic() + 300  # seconds; later, some measurements are left out


class Report:
    """Prints each result when it is there, and collects all of them."""

    def __init__(self):
        self.checks, self.measurements = {}, {}

    def check(self, name: str, value: float, limit: float):
        """A check succeeds if the value is at most the limit; nan fails."""
        value, ok = float(value), bool(value <= limit)
        self.checks[name] = {"value": value, "limit": limit, "ok": ok}
        print(f"{name:66}{value:12,.3g}   {'ok' if ok else 'FAILED'}, limit {limit:g}", flush=True)

    def measure(self, name: str, value: float, unit: str):
        """nan: it could not be measured."""
        self.measurements[name] = {"value": value, "unit": unit}
        print(f"{name:66}{value:12,.{0 if value > 1000 else 2}f}   {unit}", flush=True)


def seconds(function: Callable, device: str, rounds: int = 5) -> float:
    """The median time of a call, after one call that compiles and warms up."""
    times = []
    for _ in range(rounds + 1):
        t0 = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - t0)
    return statistics.median(times[1:])


def device_ms(function: Callable, device: str, rounds: int = 3) -> float:
    """Milliseconds that the device computes in a call, from torch.profiler. On a CPU, they include
    the profiler's own time."""
    function()
    activity = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        for _ in range(rounds):
            function()
        if device != "cpu":
            torch.cuda.synchronize()
    name = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    return sum(getattr(event, name) for event in events) / 1000 / rounds


def random_batch(gpt: GPTConfig, B: int, T: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(gpt.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].to(device), tokens[:, 1:].to(device)  # (B, T)


# ---- right ---------------------------------------------------------------------------------------


def check_float32(report: Report, gpt: GPTConfig, device: str):
    """Logits, loss and gradient of the GPU are those of the CPU."""
    torch.manual_seed(0)
    model, results = GPT(gpt), []
    for place in ("cpu", device):
        copied = copy.deepcopy(model).to(place)
        logits, loss = copied(*random_batch(gpt, 2, min(gpt.block_size, 256), place))
        loss.backward()
        norm = get_total_norm([p.grad for p in copied.parameters()])
        results.append((logits.detach().cpu(), loss.item(), norm.item()))
    (logits, loss, norm), (logits_2, loss_2, norm_2) = results
    report.check("float32: logits, difference to the CPU", (logits - logits_2).abs().max(), 1e-3)
    report.check("float32: loss, difference to the CPU", abs(loss - loss_2), 1e-4)
    report.check("float32: norm of the gradient, relative to the CPU", abs(norm_2 / norm - 1), 1e-3)


def check_precision(report: Report, gpt: GPTConfig, device: str):
    """Ten updates in mixed precision, and compiled, have the losses of uncompiled float32."""
    torch.manual_seed(0)
    model = GPT(replace(gpt, n_layer=min(gpt.n_layer, 2))).to(device)  # compiles faster
    x, y = random_batch(gpt, 2, min(gpt.block_size, 256), device)

    def losses(name: str, compiled: bool = False) -> torch.Tensor:
        raw_model, result = copy.deepcopy(model), []
        step_model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
        (optimizer,) = raw_model.configure_optimizers(Config())
        dtype, autocast = get_autocast(name, device)
        enabled = dtype == torch.float16  # 2**10: no update overflows and is skipped
        scaler = torch.amp.GradScaler(device.split(":")[0], init_scale=2**10, enabled=enabled)
        for _ in range(10):
            with autocast:
                loss = step_model(x, y)[1]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(raw_model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            result.append(loss.item())
        return torch.tensor(result)

    expected = losses("float32")
    for name, compiled, limit in [("float32", 1, 5e-3), ("bfloat16", 0, 0.1), ("float16", 0, 0.1)]:
        title = f"{name}{', compiled' * compiled}: 10 losses, difference to float32"
        report.check(title, (losses(name, compiled) - expected).abs().max(), limit)


def sources() -> list[str]:
    """The source code of the tests: text that needs no download."""
    return [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]


def make_data(folder: Path):
    """Shards of bytes, and questions in HellaSwag's form."""
    enc, examples = fineweb.get_encoding("bytes"), []
    tokens = [[enc.eot_token, *enc.encode_ordinary(text)] for text in sources()]
    tokens = np.concatenate(tokens).astype(np.uint16)
    np.save(folder / "x_val_000000.npy", tokens[:20_000])
    np.save(folder / "x_train_000000.npy", tokens[20_000:])
    for context_chars in (40, 60, 80):  # rows of different lengths
        examples += hellaswag.make_examples(sources(), 32, context_chars)
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, examples)))


def make_config(folder: str, out_dir: str, device: str, n_ranks: int, **changes) -> Config:
    """A run of 20 steps on the data of make_data, in folder/out_dir."""
    gpt = TINY if device == "cpu" else SMALL
    config = Config(
        gpt, folder, total_batch_size=4 * n_ranks * gpt.block_size, micro_batch_size=2,
        max_steps=20, lr=3e-3, warmup_steps=2, device=device.split(":")[0], timeout=TIMEOUT,
        out_dir=f"{folder}/{out_dir}", keep_checkpoints=0, checkpoint_interval=10,
        val_interval=5, val_tokens=13 * gpt.block_size,  # the last batch is not full
        hellaswag_interval=5, hellaswag_file=f"{folder}/questions.jsonl",
        sample_interval=10, sample_prompt="def ", max_new_tokens=20,
    )  # fmt: skip
    return replace(config, **changes)


def read_losses(folder: str, stream: str = "train") -> np.ndarray:
    return np.array(train_gpt2.read_log(folder)[stream][1])


def check_training(report: Report, folder: str, device: str):
    """A compiled run with evaluations in between; its checkpoints; HellaSwag."""
    torch._dynamo.reset()
    counters.clear()
    config = make_config(folder, "run", device, 1)
    with contextlib.redirect_stdout(io.StringIO()):
        train_gpt2.train(config)
        n_breaks = sum(counters["graph_break"].values())
        n_graphs = counters["stats"]["unique_graphs"]
        Path(folder, "resumed").mkdir()
        os.rename(f"{folder}/run/step_000010.pt", f"{folder}/resumed/step_000010.pt")
        train_gpt2.train(replace(config, resume=f"{folder}/resumed", out_dir=""))
    report.check("20 steps with evaluations between them: graph breaks", n_breaks, 0)
    report.check("the same: compiled graphs (training, validation)", n_graphs, 2)
    losses, resumed = read_losses(f"{folder}/run")[10:], read_losses(f"{folder}/resumed")
    report.check("10 losses after --resume, difference", np.abs(resumed - losses).max(), 1e-2)

    model = train_gpt2.load_model(f"{folder}/run/step_000020.pt")  # on the CPU
    val_loader = train_gpt2.DataLoaderLite(config, "val", 2, 0, 1)
    loss, _, _ = train_gpt2.evaluate_loss(model, val_loader, config.val_tokens, "cpu")
    difference = abs(loss - read_losses(f"{folder}/run", "val")[-1])
    report.check("validation loss of its checkpoint on the CPU, difference", difference, 2e-2)

    examples = hellaswag.iterate_examples(config.hellaswag_file)
    examples = hellaswag.prepare(examples, fineweb.get_encoding("bytes"), config.gpt.block_size)
    choices = []
    for place in ("cpu", device):
        model.to(place).eval()
        with torch.no_grad():
            rows = [(e.tokens.to(place), e.mask.to(place)) for e in examples]
            choices.append([hellaswag.get_sum_loss(model, *row).argmin() for row in rows])
    n_different = sum(a.item() != b.item() for a, b in zip(*choices, strict=True))
    report.check(f"{len(examples)} HellaSwag choices, not those of the CPU", n_different, 1)


# ---- several ranks -------------------------------------------------------------------------------


def worker(job: dict):
    """A process of run_ranks."""
    if job["task"] == "all_reduce":
        device = train_gpt2.get_device(job["device"])
        if device != "cpu":
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
        gradient = torch.zeros(job["n_params"], device=device)
        t = seconds(lambda: dist.all_reduce(gradient), device)
        Path(job["result"]).write_text(str(t))  # every rank has about the same
        return dist.destroy_process_group()
    batch = train_gpt2.DataLoaderLite.batch

    def batch_or_death(self, step: int, micro_step: int):
        if step == 3 and self.ddp_rank == self.ddp_world_size - 1:
            Path(job["result"]).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, step, micro_step)

    if job["task"] == "kill":
        train_gpt2.DataLoaderLite.batch = batch_or_death
    train_gpt2.train(make_config(**job["config"]), StopSignal(signal.SIGINT, signal.SIGTERM))


def run_ranks(n_ranks: int, folder: str, **job) -> float:
    """Run worker(job) on n_ranks ranks of this machine, or without torchrun (0). Its result."""
    path, result = Path(folder, "job.json"), Path(folder, f"{job['task']}.result")
    path.write_text(json.dumps(job | {"result": str(result)}))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    command = [sys.executable, *(torchrun if n_ranks else []), __file__, "--worker", str(path)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode and job["task"] != "kill":
        print(run.stdout[-2000:], run.stderr[-4000:], sep="\n")
    return float(result.read_text()) if result.exists() else math.nan


def check_ranks(report: Report, folder: str, device: str, n_ranks: int, n_params: int):
    name = device.split(":")[0]
    config = {"folder": folder, "device": name, "n_ranks": n_ranks, "compile": name == "cuda"}
    config |= {"dtype": "float32", "hellaswag_interval": 0, "sample_interval": 0}
    run_ranks(0, folder, task="train", config=config | {"out_dir": "one"})
    run_ranks(n_ranks, folder, task="train", config=config | {"out_dir": "several"})
    difference = np.abs(read_losses(f"{folder}/one") - read_losses(f"{folder}/several")).max()
    report.check(f"20 losses of {n_ranks} ranks, difference to one process", difference, 5e-3)
    killed_at = run_ranks(n_ranks, folder, task="kill", config=config | {"out_dir": "killed"})
    title = "a rank is killed: seconds until all have ended"
    report.check(title, time.time() - killed_at, TIMEOUT + SHUTDOWN)
    t = run_ranks(n_ranks, folder, task="all_reduce", device=name, n_params=n_params)
    report.measure(f"all-reduce of the gradient, {n_ranks} ranks", 1000 * t, "ms")


# ---- fast ----------------------------------------------------------------------------------------


def measure_steps(report: Report, name: str, B: int, model, get_loss, optimizer, gpt, device: str):
    """Tokens per second of training steps; nan if they run out of memory."""
    grad_accum_steps = max(1, 64 // B) if device != "cpu" else 1  # as on 8 GPUs
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        step = training_step(model, get_loss, [optimizer], B, gpt, device, grad_accum_steps)
        tokens_per_sec = grad_accum_steps * B * gpt.block_size / seconds(step, device)
    except torch.OutOfMemoryError:
        tokens_per_sec = math.nan
    optimizer.zero_grad()
    report.measure(f"{name}, micro-batch {B} x {gpt.block_size}", tokens_per_sec, "tokens/s")
    return tokens_per_sec


def measure_parts(report: Report, model: GPT, compiled, B: int, T: int, device: str):
    """Where the time of a step with one micro-step goes."""
    _, autocast = get_autocast("auto", device)
    batch, (x, y) = (
        random_batch(model.config, B, T, "cpu"),
        random_batch(model.config, B, T, device),
    )
    (adamw,) = model.configure_optimizers(Config())
    muon = model.configure_optimizers(replace(Config(), optimizer="muon"))[1]
    muon.param_groups[0]["lr"] = 0.0
    hidden = torch.randn(B, T, model.config.n_embd, device=device, requires_grad=True)

    @torch.compile(dynamic=False)
    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = model.logits(hidden)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def forward_backward(function: Callable, *args):
        with autocast:
            loss = function(*args)
        loss.backward()

    def clip():
        clip_grad_norm_(model.parameters(), 1.0)

    def step():
        forward_backward(our_loss, compiled, *(tensor.to(device) for tensor in batch))
        clip()
        adamw.step()
        adamw.zero_grad()

    model_ms = device_ms(lambda: forward_backward(our_loss, compiled, x, y), device)
    ms = {"head and loss": device_ms(lambda: forward_backward(head, hidden), device)}
    ms["blocks and embeddings"] = model_ms - ms["head and loss"]
    ms |= {"clipping": device_ms(clip, device), "AdamW": device_ms(adamw.step, device)}
    ms["copy of the batch"] = device_ms(lambda: [tensor.to(device) for tensor in batch], device)
    muon_ms = device_ms(muon.step, device)
    step_ms = 1000 * seconds(step, device)
    ms["everything else, above all waiting for the CPU"] = step_ms - sum(ms.values())
    report.measure(f"a step of {B} x {T}", step_ms, "ms")
    for name, value in ms.items():
        report.measure(f"    {name}", value, "ms")
    report.measure("Muon for all matrices of the blocks", muon_ms, "ms")
    report.measure(f"Muon, share of a step of {B} x {T}", muon_ms / (muon_ms + step_ms), "of it")
    model.zero_grad()


def measure_speed(report: Report, gpt: GPTConfig, device: str) -> float:
    """Tokens per second at the automatic micro-batch size."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    cuda, T, speeds = device != "cpu", gpt.block_size, {}
    model = GPT(gpt).to(device)
    compiled = torch.compile(model, dynamic=False)
    (optimizer,) = model.configure_optimizers(Config())
    _, autocast = get_autocast("auto", device)
    config = replace(Config(), gpt=gpt, total_batch_size=(512 if cuda else 2) * T)
    B_auto = train_gpt2.find_micro_batch_size(config, compiled, 1, device, autocast)
    report.measure("automatic micro-batch size", B_auto, "sequences")

    def steps(name: str, B: int, *parts) -> float:
        return measure_steps(report, name, B, *parts, gpt, device)

    for B in dict.fromkeys([B_auto, 64, 32, 16] if cuda else [B_auto]):
        if B != B_auto and time.monotonic() > DEADLINE:
            break
        speeds[B] = steps("compiled", B, compiled, our_loss, optimizer)
        if cuda:
            mfu = model.flops_per_token(T) * speeds[B] / train_gpt2.peak_flops(device)
            report.measure(f"    MFU at {B}", mfu, "of the peak")
            report.measure(f"    memory at {B}", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    report.check("automatic micro-batch size: out of memory", math.isnan(speeds[B_auto]), 0)
    if cuda and B_auto < 512:
        fits = not math.isnan(steps("compiled", 2 * B_auto, compiled, our_loss, optimizer))
        # it may fit with less than 5% of the memory to spare
        fits &= torch.cuda.max_memory_allocated() < 0.95 * torch.cuda.mem_get_info()[1]
        report.check("automatic micro-batch size: twice as many also fit", fits, 0)
    measure_parts(report, model, compiled, min(B_auto, 64), T, device)

    n_examples, n_new = 512 if cuda else 8, min(T, 100) - 1
    examples = hellaswag.make_examples(sources(), n_examples)
    examples = hellaswag.prepare(examples, fineweb.get_encoding("bytes"), T)
    idx = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with autocast:
        t = seconds(lambda: hellaswag.evaluate(model, examples), device, rounds=1)
        report.measure("HellaSwag", n_examples / t, "examples/s")
        t = seconds(lambda: model.eval().generate(idx, n_new, top_k=50), device, rounds=1)
        report.measure("sampling, one sequence with the KV cache", n_new / t, "tokens/s")

    B = min(B_auto, 32)
    t = steps("uncompiled, as the lecture's script", B, model.train(), our_loss, optimizer)
    report.measure("    compiled, times as fast", speeds.get(B, math.nan) / t, "x")
    if time.monotonic() < DEADLINE and importlib.util.find_spec("transformers"):
        theirs = transformers_gpt2(gpt).to(device)
        adamw = torch.optim.AdamW(theirs.parameters(), lr=6e-4, fused=cuda)
        parts = (torch.compile(theirs), transformers_loss, adamw)
        t = steps("transformers, compiled, a plain loop", B, *parts)
        report.measure("    this script compiled, times as fast", speeds.get(B, math.nan) / t, "x")
    return speeds[B_auto]


def main(args: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() or 1))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--ranks", type=int, default=n_ranks, help="default: the number of GPUs")
    parser.add_argument("--out", help="write the results to this JSON file")
    parser.add_argument("--dollars_per_gpu_hour", type=float, default=0.0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(args)
    train_gpt2.draw_curve = lambda log_dir, config: None  # matplotlib may be missing
    if args.worker:
        return worker(json.loads(Path(args.worker).read_text()))
    if int(os.environ.get("RANK", 0)) > 0:
        return  # rank 0 starts the processes of check_ranks itself
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise SystemExit(f"--out {args.out}: there is no such folder")
    n_ranks = args.ranks
    for name in [*os.environ]:  # of torchrun
        if name.endswith(("RANK", "WORLD_SIZE")) or name.startswith(("MASTER_", "TORCHELASTIC_")):
            del os.environ[name]
    device = train_gpt2.get_device(args.device)
    gpt = TINY if device == "cpu" else GPT2
    n_params = sum(p.numel() for p in GPT(gpt).parameters())
    name = platform.machine() if device == "cpu" else torch.cuda.get_device_name(device)
    hardware = f"{n_ranks} x {name}"
    about = {"hardware": hardware, "torch": torch.__version__, "date": str(date.today())}
    print(" | ".join(f"{key} {value}" for key, value in about.items()))

    report = Report()
    check_float32(report, gpt, device)
    check_precision(report, gpt, device)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        check_training(report, folder, device)
        if n_ranks > 1:
            check_ranks(report, folder, device, n_ranks, n_params)
    hours = 19_073 * 2**19 / (measure_speed(report, gpt, device) * n_ranks) / 3600
    report.measure(f"the 10B-token run on {hardware}, without evaluations", hours, "hours")
    if args.dollars_per_gpu_hour:
        report.measure("its price", hours * n_ranks * args.dollars_per_gpu_hour, "dollars")
    if args.out:
        result = {"about": about, "checks": report.checks, "measurements": report.measurements}
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    failed = [name for name, check in report.checks.items() if not check["ok"]]
    if failed:
        raise SystemExit(f"{len(failed)} checks failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])

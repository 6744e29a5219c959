"""Training runs of tiny networks: compared with transformers, with numpy, and with each other."""

import functools
import itertools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import wait
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hellaswag
import train_gpt2
from train_gpt2 import GPT, Config, DataLoaderLite, GPTConfig

ROOT = Path(train_gpt2.__file__).resolve().parent
SCRIPT = str(ROOT / "train_gpt2.py")
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
EOT = 256
PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of a file
DRAW_CURVE = train_gpt2.draw_curve
TINY = Config(
    GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=32),
    name="tiny", device="cpu", dtype="float32", compile=False,
    total_batch_size=8 * 16, micro_batch_size=4, max_steps=20,  # 1.6 epochs of the shards below
    lr=1e-2, min_lr=1e-3, warmup_steps=3, val_interval=10, val_tokens=20 * 16,
    hellaswag_interval=0, sample_interval=0, checkpoint_interval=4, keep_checkpoints=0,
)  # fmt: skip


def changed(config: Config, **changes) -> Config:
    """The config with other values of some fields, those of the network included."""
    gpt = {name: changes.pop(name) for name in asdict(config.gpt) if name in changes}
    return replace(config, gpt=replace(config.gpt, **gpt), **changes)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder. It draws no curves, which would take most of the time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "draw_curve", lambda log_dir, config: None)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Config:
    """TINY with random shards of bytes."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i, (split, n_tokens) in enumerate([("val", 500), ("train", 900), ("train", 701)]):
        tokens = rng.choice([*range(97, 110), EOT], size=n_tokens).astype(np.uint16)
        np.save(folder / f"x_{split}_{i:06d}.npy", tokens)
    return replace(TINY, data_dir=str(folder))


@pytest.fixture(scope="session")
def reference(tiny, tmp_path_factory) -> Path:
    """The folder of the finished run of `tiny`, with its curve. No test changes it."""
    folder = tmp_path_factory.mktemp("reference")
    train_gpt2.train(replace(tiny, out_dir=str(folder)))
    return folder


@pytest.fixture(scope="session")
def initial(tiny, tmp_path_factory) -> Path:
    """A folder for transformers with the initial weights of `tiny`."""
    torch.manual_seed(tiny.seed)
    GPT(tiny.gpt).save_pretrained(folder := tmp_path_factory.mktemp("initial") / "hf")
    return folder


@pytest.fixture(scope="session")
def run_of(tiny, reference, tmp_path_factory):
    """A function that returns the folder of a finished, undisturbed run with these changes."""

    @functools.cache
    def run(**changes) -> Path:
        folder = tmp_path_factory.mktemp("run") if changes else reference
        if changes:
            train_gpt2.train(changed(tiny, out_dir=str(folder), **changes))
        return folder

    return run


def train_and_stop(config: Config, n_steps: int):
    """Train for a number of steps, until a StopSignal that has received SIGTERM."""

    class StopSignal:  # the loop reads signum once a step, at its end
        signals = itertools.chain([0] * (n_steps - 1), itertools.repeat(signal.SIGTERM))
        signum = property(lambda self: next(self.signals))

    with pytest.raises(SystemExit) as error:
        train_gpt2.train(config, StopSignal())
    assert error.value.code == 128 + signal.SIGTERM


def error_of(config: Config) -> str:
    """The one-line message that a run must end with, without a change of any file."""

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    before = contents()
    with pytest.raises(SystemExit) as error:
        train_gpt2.train(config)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    assert contents() == before
    return error.value.code


def log_text(folder) -> str:
    return (Path(folder) / "log.txt").read_text()


def values(folder, stream: str = "train") -> dict[int, float]:
    """{step: value} of a stream in log.txt."""
    rows = [line.split() for line in log_text(folder).splitlines()]
    return {int(step): float(value) for step, name, value in rows if name == stream}


def steps_of_checkpoints(folder) -> list[int]:
    return sorted(int(path.stem[5:]) for path in Path(folder).glob("step_*.pt"))


def assert_same_losses(one, two, tolerance=1e-4):
    for stream in ("train", "val"):
        assert values(one, stream) == pytest.approx(values(two, stream), abs=tolerance)


def assert_same_run(one, two):
    """Equal bit for bit: the log and the final weights."""
    assert log_text(one) == log_text(two)
    weights = "hf/model.safetensors"
    assert (Path(one) / weights).read_bytes() == (Path(two) / weights).read_bytes()


@pytest.fixture
def unfinished(reference, tmp_path) -> Path:
    """A copy of the reference as if its process had been killed in step 14."""
    folder = tmp_path / "run"
    shutil.copytree(reference, folder, ignore=shutil.ignore_patterns("hf", "*16.pt", "*20.pt"))
    lines = [line for line in log_text(reference).splitlines() if int(line.split()[0]) < 14]
    # a power failure or a full disk may damage lines
    (folder / "log.txt").write_text("\n".join([*lines, "\0\0", "", "3 tra4 train 1.0", "5 tr"]))
    return folder


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ---- other processes -----------------------------------------------------------------------------


def hold_step(step: int):
    """Patch this process: the step waits for a signal. Of two ranks, rank 0 does not notice it."""
    batch = DataLoaderLite.batch

    def waiting_batch(self, this_step, micro_step):
        if this_step == step and (self.ddp_rank, self.ddp_world_size) == (0, 2):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif this_step == step:
            print(f"rank {self.ddp_rank} waits", flush=True)
            stop_signal = signal.getsignal(signal.SIGTERM).__self__
            wait_until(lambda: stop_signal.signum)
        return batch(self, this_step, micro_step)

    DataLoaderLite.batch = waiting_batch


def run_in_child(config: Config, output: str, held_step: int | None = None):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if held_step is not None:
        hold_step(held_step)
    train_gpt2.main(config)


@pytest.fixture(scope="session")
def start():
    """A function that runs train_gpt2.main(config) in another process, without the seconds that
    importing torch takes: a server imports it once and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_train", "matplotlib.figure"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        multiprocessing.forkserver.ensure_running()
    children = []

    def start(*args):
        children.append(context.Process(target=run_in_child, args=args))
        children[-1].start()
        return children[-1]

    yield start
    for child in children:
        child.kill()


def arguments(config: Config) -> list[str]:
    """The command line of a config."""
    args = ["gpt2", *([] if config.compile else ["--no_compile"])]
    for name, value in train_gpt2.flatten(config).items():
        if not isinstance(value, bool) and value not in ("", ()):
            args += [f"--{name}", str(value)]
    return args


def torchrun(script: str, config: Config, output: Path, sigterm_after: str = "") -> int:
    """Run two ranks; send SIGTERM to torchrun when a text is in the output. The exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with output.open("a") as file:
        pipes = {"stdout": file, "stderr": file, "env": os.environ | {"PYTHONPATH": PYTHONPATH}}
        process = subprocess.Popen([*command, script, *arguments(config)], **pipes)
    try:
        if sigterm_after:
            wait_until(lambda: sigterm_after in output.read_text() or process.poll() is not None)
            process.send_signal(signal.SIGTERM)
        return process.wait(timeout=120)
    finally:
        process.kill()


# ---- the data loader -----------------------------------------------------------------------------


def sequences(folder: str, split: str, T: int) -> np.ndarray:
    """All sequences of a split, (n, T + 1), each from one shard."""
    rows = []
    for path in sorted(Path(folder).glob(f"*_{split}_*.npy")):
        tokens = np.load(path).astype(np.int64)
        rows += [tokens[i : i + T + 1] for i in range(0, len(tokens) - T, T)]
    return np.stack(rows)


def step_of(config: Config, step: int, B: int, ddp_world_size: int = 1) -> np.ndarray:
    """The sequences (n, T + 1) of a step, over all micro-steps and ranks."""
    rows = []
    loaders = [DataLoaderLite(config, "train", B, r, ddp_world_size) for r in range(ddp_world_size)]
    n_micro_steps = config.total_batch_size // (B * config.gpt.block_size * ddp_world_size)
    for micro_step, loader in itertools.product(range(n_micro_steps), loaders):
        x, y = loader.batch(step, micro_step)
        assert x.dtype == y.dtype == torch.int64 and x.shape == (B, config.gpt.block_size)
        assert torch.equal(x[:, 1:], y[:, :-1])  # y is x shifted by one
        rows.append(torch.cat((x, y[:, -1:]), dim=1).numpy())
    return np.concatenate(rows)


@pytest.mark.parametrize("B, ddp_world_size", [(1, 1), (8, 1), (2, 2), (1, 4), (4, 2)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_step_is_the_same_for_every_split(tiny, B, ddp_world_size, shuffle):
    rows, config = sequences(tiny.data_dir, "train", 16), replace(tiny, shuffle=shuffle)
    for step in range(30):
        expected = []
        for n in range(8 * step, 8 * step + 8):
            epoch, i = divmod(n, len(rows))
            if shuffle:  # (seed, epoch) seed a permutation
                i = np.random.default_rng((tiny.seed, epoch)).permutation(len(rows))[i]
            expected.append(rows[i])
        assert np.array_equal(step_of(config, step, B, ddp_world_size), np.stack(expected))


def test_each_epoch_visits_each_sequence_once_in_a_new_order(tiny):
    n = len(sequences(tiny.data_dir, "train", 16))
    assert n == 899 // 16 + 700 // 16  # no sequence crosses the end of a shard
    visited = np.concatenate([step_of(tiny, step, 8) for step in range(math.ceil(3 * n / 8))])
    epochs = visited[: 3 * n].reshape(3, n, 17)
    everything = sorted(map(tuple, sequences(tiny.data_dir, "train", 16)))
    assert all(sorted(map(tuple, epoch)) == everything for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], step_of(replace(tiny, seed=1), 0, 8))


def test_the_automatic_micro_batch_size_on_a_cpu(tiny):
    for n_sequences, B in ((64, 4), (12, 4), (6, 2), (7, 1), (2, 2)):
        config = replace(tiny, micro_batch_size="auto", total_batch_size=16 * n_sequences)
        assert train_gpt2.find_micro_batch_size(config, None, 1, "cpu", None) == B


# ---- losses --------------------------------------------------------------------------------------


def hf_model(folder):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder)


def hf_loss(model, rows: np.ndarray) -> torch.Tensor:
    """The mean cross-entropy of a model of transformers on sequences (n, T + 1)."""
    rows = torch.from_numpy(rows)
    logits = model(rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}], ids=str)
def test_losses_do_not_depend_on_the_micro_batch_size(run_of, changes):
    assert list(values(run_of(**changes))) == list(range(20))
    for B in (1, 2, 8):
        assert_same_losses(run_of(micro_batch_size=B, **changes), run_of(**changes))


def two_machines(config: Config) -> list[str]:
    """What torchrun prints on two machines that share no folder, with one rank each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--master_addr=localhost", f"--master_port={port}"]
    script, pipes = [SCRIPT, *arguments(config)], {"stdout": subprocess.PIPE, "text": True}
    processes = []
    for i in range(2):
        Path(f"machine_{i}").mkdir(exist_ok=True)
        pipes |= {"cwd": f"machine_{i}", "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen([*command, f"--node_rank={i}", *script], **pipes))
    return [process.communicate(timeout=120)[0] for process in processes]


def test_two_machines_have_the_losses_of_one(tiny, reference):
    config = replace(tiny, out_dir="run", resume="auto", micro_batch_size=2)
    outputs = two_machines(config)
    assert_same_losses("machine_0/run", reference)
    assert "2 ranks x 2 micro-steps x 2 x 16 tokens" in outputs[0]
    assert outputs[0].count("step     3 | loss") == 1  # one rank prints
    assert "loss" not in outputs[1] and not any(Path("machine_1").iterdir())
    # a run that is resumed, but the second machine does not have its checkpoint
    shutil.rmtree("machine_0/run/hf")
    for output in two_machines(config):
        assert output.count("copy run and the shards to all machines: {(") == 1, output
    assert not any(Path("machine_1").iterdir())


def test_losses_are_those_of_a_plain_loop_with_transformers(tiny, initial, reference):
    model = hf_model(initial).train()
    decay = [p for p in model.parameters() if p.dim() == 2]
    no_decay = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=False)
    rows, losses = sequences(tiny.data_dir, "train", 16), []
    rngs = [np.random.default_rng((tiny.seed, epoch)) for epoch in (0, 1)]
    order = np.concatenate([rng.permutation(len(rows)) for rng in rngs])
    for step in range(20):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 3) / 17))
        lr = 1e-2 * (step + 1) / 3 if step < 3 else 1e-3 + 9e-3 * cosine
        loss = hf_loss(model, rows[order[8 * step : 8 * step + 8]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2
    assert list(values(reference).values()) == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_losses_in_mixed_precision(run_of, reference, dtype):
    folder = run_of(dtype=dtype)
    assert_same_losses(folder, reference, tolerance=0.03)
    assert log_text(folder) != log_text(reference)  # autocast was on
    checkpoint = torch.load(folder / "step_000020.pt", weights_only=True)
    assert all(w.dtype == torch.float32 for w in checkpoint["model"].values())
    assert bool(checkpoint["scaler"]) == (dtype == "float16")  # which needs loss scaling


def test_the_validation_loss_is_the_mean_over_the_first_val_tokens(tiny, initial, reference):
    rows = sequences(tiny.data_dir, "val", 16)
    assert list(values(reference, "val")) == [0, 10, 20]
    for step, folder in ((0, initial), (20, reference / "hf")):
        expected = hf_loss(hf_model(folder).eval(), rows[:20]).item()
        assert values(reference, "val")[step] == pytest.approx(expected, abs=1e-5)
    # a split that is smaller than val_tokens is read once; B does not divide its sequences
    loader = DataLoaderLite(tiny, "val", 7, 0, 1)
    model = train_gpt2.load_model(str(reference), dropout=0.5)  # which evaluation switches off
    loss, _, n_tokens = train_gpt2.evaluate_loss(model, loader, 10**6, "cpu")
    assert n_tokens == len(rows) * 16 == 31 * 16
    assert loss == pytest.approx(hf_loss(hf_model(reference / "hf").eval(), rows).item(), abs=1e-5)


@pytest.fixture(scope="session")
def examples(tmp_path_factory) -> Path:
    """A file in HellaSwag's form, with endings of several lengths."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("examples") / "examples.jsonl"
    documents = ["\n ".join("".join(rng.choices("abcdefgh", k=12)) for _ in range(300))]
    rows = hellaswag.make_examples(documents, 60, context_chars=9, ending_chars=6)
    for row in rows:
        lengths = itertools.islice(itertools.cycle([2, 3, 4, 5]), row["label"], None)
        row["endings"] = [text[:n] for text, n in zip(row["endings"], lengths, strict=False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def accuracies(model, path: Path, way: str) -> tuple[float, float]:
    """acc and acc_norm of a model of transformers, one ending at a time."""
    correct, correct_norm, rows = 0, 0, [json.loads(line) for line in path.open()]
    for row in rows:
        context = row["ctx"] if way == "lecture" else "code: " + row["ctx"].rstrip()
        losses = []
        for ending in row["endings"]:
            text = context + (" " if way == "lecture" else row["ctx"][-1] + " ") + ending
            n = len(text) - len(context)  # bytes, which are the tokens
            tokens = torch.tensor([list(text.encode())[-16:]])
            logprobs = model(tokens).logits.log_softmax(-1)[0, :-1]
            loss = -logprobs.gather(1, tokens[0, 1:, None])[-n:].sum().item()
            losses.append((loss, loss / (n if way == "lecture" else len(ending))))
        correct += min(range(4), key=lambda i: losses[i][0]) == row["label"]
        correct_norm += min(range(4), key=lambda i: losses[i][1]) == row["label"]
    return correct / len(rows), correct_norm / len(rows)


def test_hellaswag_during_training_is_what_transformers_scores(run_of, examples):
    folder = run_of(hellaswag_file=str(examples), hellaswag_interval=15)
    assert list(values(folder, "hella")) == [0, 15, 20]
    _, acc_norm = accuracies(hf_model(folder / "hf").eval(), examples, "lecture")
    assert values(folder, "hella")[20] == pytest.approx(acc_norm, abs=1e-6)


def test_eval_only_prints_what_transformers_gives(tiny, reference, examples, capsys):
    config = replace(tiny, eval_only=True, init_from=str(reference), val_tokens=320)
    train_gpt2.main(replace(config, hellaswag_file=str(examples), hellaswag_interval=1))
    printed = capsys.readouterr().out
    rows, model = sequences(tiny.data_dir, "val", 16)[:20], hf_model(reference / "hf").eval()
    loss, targets = hf_loss(model, rows).item(), rows[:, 1:]
    with torch.no_grad():
        predicted = model(torch.from_numpy(rows[:, :-1])).logits.argmax(-1).numpy()
    n_bytes = (targets != EOT).sum()  # end-of-text is not part of the text
    assert f"validation loss      {loss:.4f} nats per token, 320 tokens" in printed
    assert f"perplexity           {math.exp(loss):.2f}\n" in printed
    assert f"next-token accuracy  {(predicted == targets).mean():.4f}\n" in printed
    assert f"bits per byte        {loss * 320 / math.log(2) / n_bytes:.4f}\n" in printed
    for way in ("lecture", "harness"):
        acc, acc_norm = accuracies(model, examples, way)
        line = next(line for line in printed.splitlines() if line.startswith(f"HellaSwag, {way}"))
        assert f"acc {acc:.4f} " in line and f"acc_norm {acc_norm:.4f} " in line
    assert not list(Path().iterdir())  # nothing is written


# ---- the run's folder ----------------------------------------------------------------------------


def test_the_files_of_a_run(tiny, reference):
    names = {"config.json", "curve.png", "hf", "log.txt", "run.lock"}
    names |= {f"step_{step:06d}.pt" for step in (4, 8, 12, 16, 20)}
    assert {path.name for path in reference.iterdir()} == names  # no temporary file
    weights = torch.load(reference / "step_000020.pt", weights_only=True)["model"]
    wte, lm_head = weights["transformer.wte.weight"], weights["lm_head.weight"]
    assert wte.data_ptr() == lm_head.data_ptr()  # the tied matrix is written once
    lines = log_text(reference).splitlines()
    assert len(lines) == 23 and all(
        re.fullmatch(r"\d+ (train|val) \d+\.\d{6}", line) for line in lines
    )
    expected = asdict(replace(tiny, out_dir=str(reference))) | asdict(tiny.gpt) | {"prompt": []}
    del expected["gpt"]
    assert json.loads((reference / "config.json").read_text()) == expected
    assert (reference / "curve.png").read_bytes().startswith(PNG)
    model, idx = train_gpt2.load_model(str(reference)), torch.randint(257, (2, 16))
    expected = hf_model(reference / "hf").eval()(idx).logits
    assert torch.allclose(model.eval()(idx)[0], expected, atol=1e-5)


def test_the_console(tiny, capsys):
    config = replace(tiny, log_interval=5, sample_interval=20, max_new_tokens=3, num_samples=2)
    train_gpt2.train(config)
    train_gpt2.train(replace(config, max_steps=1, sample_prompt=""))  # it may be empty
    printed = capsys.readouterr().out
    pattern = r"step +(\d+) | loss N | lr N | norm N | dt Nms | tok/sec N | left \d+h\d\dm"
    pattern = pattern.replace("|", r"\|").replace("N", r"[\d.,e+-]+")
    lines = printed.splitlines()
    steps = [match[1] for line in lines if (match := re.fullmatch(pattern, line))]
    assert steps == ["0", "5", "10", "15", "0"]
    assert printed.count("step     0 | sample: Hello, I'm a language model,") == 2
    assert printed.count("step     0 | sample: ") == 4
    assert "log/tiny-001 | 36,224 parameters | cpu | torch.float32 | from step 0" in lines
    assert f"step     5 | loss {values('log/tiny-001')[5]:.4f} |" in printed


def test_the_newest_checkpoints_and_those_of_the_archive_are_kept(run_of):
    everything = [4, 8, 12, 16, 20]
    for keep, archive, expected in ((0, 0, everything), (2, 0, [16, 20]), (1, 8, [8, 16, 20])):
        folder = run_of(keep_checkpoints=keep, archive_interval=archive, val_interval=0)
        assert steps_of_checkpoints(folder) == expected
        assert not values(folder, "val")  # 0 means never


def test_a_run_survives_checkpoints_that_cannot_be_written(tiny, reference, monkeypatch, capsys):
    torch_save, save = torch.save, train_gpt2.CheckpointWriter.save

    def full_disk(checkpoint, path):
        if checkpoint["step"] in (8, 20):
            Path(path).write_bytes(b"the first half")
            raise OSError(28, "No space left on device")
        torch_save(checkpoint, path)

    def save_and_wait(writer, *args):  # or the next line might be printed before the failure
        save(writer, *args)
        wait(writer.pending)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, f: full_disk({"step": 8}, f))
    monkeypatch.setattr(train_gpt2, "draw_curve", DRAW_CURVE)
    monkeypatch.setattr(torch, "save", full_disk)
    monkeypatch.setattr(train_gpt2.CheckpointWriter, "save", save_and_wait)
    train_gpt2.train(replace(tiny, out_dir="run", keep_checkpoints=1))
    assert_same_run("run", reference)
    assert steps_of_checkpoints("run") == [16]  # kept, although it is not the newest attempt
    assert not list(Path("run").glob("*.tmp"))  # they would fill the disk
    printed = capsys.readouterr().out
    reports = re.findall(r"step +(\d+) .*not written: \[Errno 28\] No space left", printed)
    assert reports == ["8", "9", "10", "11"]
    assert "the last checkpoint was not written: [Errno 28] No space left" in printed


def test_weights_and_biases_offline(tiny, reference, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train_gpt2.train(replace(tiny, out_dir="run", wandb=True))
    wandb.teardown()
    assert_same_run("run", reference)
    (file,) = Path("run/wandb").glob("offline-run-*/*.wandb")
    assert b"train" in file.read_bytes() and b"val" in file.read_bytes()


# ---- resume --------------------------------------------------------------------------------------


RESUMED = [{}, {"dropout": 0.2}, {"optimizer": "muon", "cooldown": 0.5}, {"dtype": "float16"}]


@pytest.mark.parametrize("changes", RESUMED, ids=str)
def test_resume_is_exact(tiny, run_of, changes):
    config = changed(tiny, out_dir="run", **changes)
    train_and_stop(config, 7)
    assert steps_of_checkpoints("run") == [4, 7]
    assert max(values("run")) == 6 and not Path("run/hf").exists()
    train_and_stop(replace(config, resume="auto"), 6)
    assert max(values("run")) == 12
    train_gpt2.train(replace(config, out_dir="", resume="run"))
    assert_same_run("run", run_of(**changes))


def test_resume_after_kill(tiny, run_of, start, tmp_path):
    changes = {"max_steps": 40, "checkpoint_interval": 3, "val_interval": 16, "keep_checkpoints": 2}
    config = replace(tiny, out_dir=str(tmp_path / "run"), resume="auto", **changes)
    log, output, exit_codes = Path("run/log.txt"), tmp_path / "output", []
    for step in [*sorted(random.Random(0).sample(range(25), 5)), None]:  # None: no kill
        child = start(config, str(output))
        if step is not None:
            line = f"{step} train"
            wait_until(lambda: log.exists() and f"\n{line}" in log.read_text())  # noqa: B023
            child.kill()
        child.join()
        exit_codes.append(child.exitcode)
    assert -signal.SIGKILL in exit_codes and exit_codes[-1] == 0, output.read_text()
    assert_same_run("run", run_of(**changes))
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_skipped(tiny, reference, unfinished, capsys, damage):
    path = Path("run/step_000012.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in a tensor
    path.write_bytes({"truncated": data[:-1000], "flipped": data, "empty": b""}[damage])
    train_gpt2.train(replace(tiny, out_dir="run", resume="auto"))
    printed = capsys.readouterr()
    assert "cannot read run/step_000012.pt" in printed.err
    assert "from step 8" in printed.out
    assert_same_run("run", reference)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_checkpoint_is_not_executed(tiny, unfinished, legacy):
    checkpoint = torch.load("run/step_000012.pt", weights_only=True)
    checkpoint["config"]["name"] = Malicious()
    Path("evil").mkdir()
    torch.save(checkpoint, "evil/step_000013.pt", _use_new_zipfile_serialization=not legacy)
    for task in ({"resume": "evil"}, {"init_from": "evil"}, {"init_from": "evil/step_000013.pt"}):
        assert "no readable checkpoint" in error_of(replace(tiny, **task))
    shutil.copy("evil/step_000013.pt", "run")
    assert train_gpt2.load_checkpoint(unfinished)["step"] == 12
    assert not Path("executed").exists()
    torch.load("evil/step_000013.pt", weights_only=False)
    assert Path("executed").exists()  # the attack is a real one


def test_resume_auto_continues_the_newest_unfinished_run(tiny):
    config = replace(tiny, max_steps=6, val_interval=0, checkpoint_interval=3)
    train_gpt2.train(config)
    train_and_stop(config, 2)
    train_and_stop(replace(config, name="other"), 2)
    train_gpt2.train(replace(config, resume="auto"))
    assert {path.name for path in Path("log").iterdir()} == {"other-001", "tiny-001", "tiny-002"}
    assert_same_run("log/tiny-001", "log/tiny-002")
    train_gpt2.train(replace(config, resume="auto"))  # all are finished: a new run
    assert_same_run("log/tiny-001", "log/tiny-003")


def test_a_finished_run_can_be_extended(tiny, run_of):
    changes = {"max_steps": 12, "cooldown": 1e-9, "val_interval": 4}  # a constant learning rate
    config = changed(tiny, **changes)
    train_gpt2.train(replace(config, max_steps=8))
    assert Path("log/tiny-001/hf").is_dir()
    train_and_stop(replace(config, resume="log/tiny-001", resume_anyway=True), 2)
    assert not Path("log/tiny-001/hf").exists()  # unfinished again
    train_gpt2.train(replace(config, resume="auto"))
    assert_same_run("log/tiny-001", run_of(**changes))


@pytest.mark.parametrize(
    "name, value",
    [("lr", 2e-2), ("seed", 1), ("weight_decay", 0.2), ("dropout", 0.1), ("total_batch_size", 256)],
)
def test_resume_with_another_experiment_is_refused(tiny, unfinished, capsys, name, value):
    config = changed(tiny, out_dir="run", resume="auto", **{name: value})
    assert "--resume_anyway" in error_of(config)
    message = f"{name} was {train_gpt2.flatten(tiny)[name]} in the run to resume, now it is {value}"
    assert message in capsys.readouterr().out
    train_and_stop(replace(config, resume_anyway=True), 1)
    assert message in capsys.readouterr().out
    group = torch.load("run/step_000013.pt")["optimizers"][0]["param_groups"][0]
    assert group["lr"] == train_gpt2.get_lr(12, config)  # the new one is in force
    assert group["weight_decay"] == config.weight_decay
    assert json.loads(Path("run/config.json").read_text())[name] == value


@pytest.mark.parametrize("name, value", [("n_embd", 16), ("block_size", 8), ("optimizer", "muon")])
def test_a_run_cannot_change_its_network_or_optimizer(tiny, unfinished, name, value):
    config = changed(tiny, resume="run", resume_anyway=True, **{name: value})
    assert f"cannot change its {', '.join(train_gpt2.FIXED)}" in error_of(config)


def test_resume_with_the_same_experiment_is_accepted(tiny, reference, unfinished, capsys):
    shutil.copytree(tiny.data_dir, "moved")
    changes = {"data_dir": "moved", "micro_batch_size": 2, "val_interval": 20, "dtype": "auto"}
    changes |= {} if torch.cuda.is_available() else {"device": "auto", "checkpoint_interval": 5}
    config, other = replace(tiny, resume="run", **changes), Path("moved/x_train_000003.npy")
    np.save(other, np.full(100, 97, dtype=np.uint16))
    assert "--resume_anyway" in error_of(config)
    assert "data was" in capsys.readouterr().out
    other.unlink()  # the same shards in another folder
    train_gpt2.train(config)
    assert values("run") == pytest.approx(values(reference), abs=1e-4)


@pytest.mark.parametrize("source", ["", "hf", "step_000020.pt"])
def test_fine_tuning_with_a_shorter_context(tiny, reference, source):
    changes = {"init_from": str(reference / source), "max_steps": 3, "val_interval": 3}
    config = changed(tiny, out_dir="run", block_size=8, total_batch_size=64, **changes)
    train_and_stop(config, 2)
    rows = sequences(tiny.data_dir, "val", 8)[: 320 // 8]
    expected = hf_loss(hf_model(reference / "hf").eval(), rows).item()
    assert values("run", "val")[0] == pytest.approx(expected, abs=1e-5)
    # a resumed run does not need the source
    train_gpt2.train(replace(config, init_from="gone", resume="auto"))
    assert json.loads(Path("run/hf/config.json").read_text())["n_positions"] == 16
    expected = hf_loss(hf_model("run/hf").eval(), rows).item()
    assert values("run", "val")[3] == pytest.approx(expected, abs=1e-5)


# ---- signals, and two processes ------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step(tiny, reference, start, tmp_path, signum):
    config = replace(tiny, out_dir=str(tmp_path / "run"))
    output = tmp_path / "output"
    child = start(config, str(output), 7)
    wait_until(lambda: output.exists() and "rank 0 waits" in output.read_text())  # in step 7
    assert "another process trains in" in error_of(replace(config, resume="auto"))
    os.kill(child.pid, signum)
    child.join()
    output = output.read_text()
    assert child.exitcode == 128 + signum, output
    assert steps_of_checkpoints("run") == [4, 8] and not Path("run/hf").exists()
    assert Path("run/curve.png").read_bytes().startswith(PNG)  # of the first validation
    assert "stopped at step 8: the same command with --resume auto continues" in output
    train_gpt2.train(replace(config, resume="auto"))
    assert_same_run("run", reference)


def test_a_signal_to_torchrun_stops_all_ranks_after_the_step(tiny, run_of, tmp_path):
    config = replace(tiny, out_dir="run", optimizer="muon", micro_batch_size=2)
    script, output = tmp_path / "held.py", tmp_path / "output"
    lines = ["import sys, test_train, train_gpt2 as t", "test_train.hold_step(6)"]
    script.write_text("\n".join([*lines, "t.main(t.parse_args(sys.argv[1:]))"]))
    assert torchrun(str(script), config, output, sigterm_after="rank 1 waits") != 0
    assert steps_of_checkpoints("run") == [4, 7], output.read_text()
    assert torchrun(SCRIPT, replace(config, resume="auto"), output) == 0, output.read_text()
    assert_same_losses("run", run_of(optimizer="muon"))


def test_a_second_signal_stops_at_once(tiny, start, tmp_path):
    # the first step has a billion micro-steps
    config = replace(tiny, out_dir=str(tmp_path / "run"), total_batch_size=64 * 10**9)
    output = tmp_path / "output"
    child = start(config, str(output))
    wait_until(lambda: output.exists() and "step     0 | val" in output.read_text())

    def has_stopped() -> bool:
        child.terminate()  # SIGTERM; the signals of the first second count as one
        return not child.is_alive()

    wait_until(has_stopped)
    assert child.exitcode == 128 + signal.SIGTERM
    assert output.read_text().count("after this step; a second signal stops at once") == 1
    assert not steps_of_checkpoints("run")


# ---- updates that are not finite -----------------------------------------------------------------


def make_losses(monkeypatch, factors: dict[int, float]):
    """Multiply the training loss of some steps, of two micro-steps each."""
    forward, n_calls = GPT.forward, itertools.count()

    def patched(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        factor = factors.get(next(n_calls) // 2, 1.0) if self.training else 1.0
        return logits, loss * factor

    monkeypatch.setattr(GPT, "forward", patched)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_update_that_is_not_finite_is_skipped(tiny, dtype, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt2, "draw_curve", DRAW_CURVE)  # it has to cope with the losses
    make_losses(monkeypatch, {0: math.nan, 6: math.inf, 7: math.nan, 19: math.nan})
    train_gpt2.train(replace(tiny, out_dir="run", checkpoint_interval=1, dtype=dtype))
    losses = values("run")
    assert [step for step in losses if not math.isfinite(losses[step])] == [0, 6, 7, 19]
    assert losses[18] < losses[1] - 2
    # nothing is saved between a bad step and the next good one
    assert steps_of_checkpoints("run") == [2, 3, 4, 5, 6, *range(9, 20)]
    before = torch.load("run/step_000019.pt", weights_only=True)["model"]
    after = GPT.from_pretrained("run/hf").state_dict()  # without the padding of the vocabulary
    assert all(torch.equal(w[:257], after[name][:257]) for name, w in before.items())
    assert all(w.isfinite().all() for w in after.values())
    printed = capsys.readouterr().out
    assert re.findall(r"update skipped, (\d) in a row", printed) == ["1", "1", "2", "1"]


def test_too_many_in_a_row_end_the_run(tiny, reference, monkeypatch):
    with monkeypatch.context() as patch:
        make_losses(patch, dict.fromkeys(range(9, 20), math.nan))
        with pytest.raises(SystemExit) as error:
            train_gpt2.train(replace(tiny, out_dir="run", max_bad_steps=3))
    assert error.value.code == "not finite 3 steps in a row: resume with a lower --lr"
    assert steps_of_checkpoints("run") == [4, 8]
    Path("run/run.lock").unlink()  # which the traceback still holds
    train_gpt2.train(replace(tiny, out_dir="run", resume="auto"))
    assert_same_run("run", reference)

"""--plan, against real steps in other processes, transformers, PyTorch's counter, arithmetic."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_gpt2
from inference import Task
from plan import HOLES
from train_gpt2 import GPT, PRESETS, Config, main, parse_arguments

SCRIPT = Path(train_gpt2.__file__).resolve()
# what a few steps take beyond what the process had; a tiny model has loaded the libraries before
MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from train_gpt2 import GPT, Config, autocast_of, configure_optimizer

def memory(what):  # kB; of this process alone, where ru_maxrss may begin with its parent's
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def train(dtype, grad_accum_steps, **shape):
    config = Config(**shape)
    model = GPT(config)
    optimizer = configure_optimizer(model, config, "cpu")
    for micro_step in range(2 * grad_accum_steps):
        x = torch.randint(config.vocab_size, (config.micro_batch_size, config.block_size))
        with autocast_of(getattr(torch, dtype), torch.device("cpu")):
            _, loss = model(x, x)
        (loss / grad_accum_steps).backward()
        if micro_step % grad_accum_steps == grad_accum_steps - 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

how = json.loads(sys.argv[1])
tiny = dict(n_layer=1, n_head=1, n_embd=64, block_size=64, vocab_size=257, micro_batch_size=1)
train(how["dtype"], 1, **tiny)
before = memory("VmRSS")
train(**how)
print((memory("VmHWM") - before) * 1024)
"""
SIX = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """A working folder without data, that stays empty; and no network."""
    monkeypatch.chdir(tmp_path)
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    yield
    assert not [*tmp_path.iterdir()]


def printed(capsys, *flags) -> dict[str, str]:
    """What --plan prints: the name of each line to the value in it."""
    main(*parse_arguments([*flags, "--plan"]))
    lines = capsys.readouterr().out.splitlines()
    return dict(m.groups() for line in lines if (m := re.match(r" *(\D+?)  +([\d.,e+]+)", line)))


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory as Linux tells it")
@pytest.mark.parametrize(
    ("malloc", "dtype", "grad_accum_steps", "shape"),
    [
        ("usual", "float32", 2, {"block_size": 64, "micro_batch_size": 2}),  # 124M
        ("usual", "float32", 1, SIX | {"vocab_size": 257, "micro_batch_size": 6}),
        ("exact", "bfloat16", 2, SIX | {"micro_batch_size": 2}),
        ("exact", "float32", 1, SIX | {"vocab_size": 257, "micro_batch_size": 3, "dropout": 0.1}),
    ],
)
def test_memory_is_that_of_real_steps(capsys, malloc, dtype, grad_accum_steps, shape):
    how = json.dumps({"dtype": dtype, "grad_accum_steps": grad_accum_steps, **shape})
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
    if malloc == "exact":  # what is freed is given back: the process holds its live tensors
        env["MALLOC_MMAP_THRESHOLD_"] = "65536"
    line = [sys.executable, "-c", MEASURE, how]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    sequences = shape["micro_batch_size"] * grad_accum_steps
    batch = sequences * shape.get("block_size", 1024)
    flags = [f"--{key}={value}" for key, value in shape.items()]
    flags += [f"--dtype={dtype}", f"--total_batch_size={batch}", "--device=cpu"]
    out = printed(capsys, *flags)
    expected = number(out["total"]) - (number(out[HOLES]) if malloc == "exact" else 0)
    tolerance = 0.05 if malloc == "exact" else 0.1
    assert expected * 2**30 == pytest.approx(int(done.stdout), rel=tolerance)


@pytest.mark.parametrize(
    ("preset", "n_params"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
     ("gpt2-xl", 1_557_611_200)],
)  # fmt: skip
def test_parameters_are_those_of_transformers(capsys, preset, n_params):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = PRESETS[preset]
    shape = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd")}
    with torch.device("meta"):
        other = GPT2LMHeadModel(GPT2Config(**shape))
    assert sum(p.numel() for p in other.parameters()) == n_params
    main(*parse_arguments([preset, "--plan", "--micro_batch_size=1", "--device=cpu"]))
    out = capsys.readouterr().out
    assert re.search(f"parameters +{n_params + 47 * config.n_embd:,}  {n_params:,} without", out)


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium"])
def test_flops_are_those_that_pytorch_counts(capsys, preset):
    T = PRESETS[preset].block_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        idx = torch.zeros(1, T, dtype=torch.int64)
        GPT(PRESETS[preset])(idx, idx)[1].backward()
    main(*parse_arguments([preset, "--plan", "--micro_batch_size=1", "--device=cpu"]))
    half, full = re.search(
        r"FLOPs of a token +(\S+)  .* half; (\S+) in full", capsys.readouterr().out
    ).groups()
    # which counts products alone, those of attention in full; positions, biases and norms are 1%
    attention = 12 * PRESETS[preset].n_layer * PRESETS[preset].n_embd * T
    assert number(full) == pytest.approx(counter.get_total_flops() / T, rel=0.01)
    assert number(full) - number(half) == attention / 2


def test_hours_and_dollars(capsys):
    flags = ["shakespeare_char", "--gpus=3", "--total_batch_size=2304", "--max_steps=1000"]
    flags += ["--dollars_per_gpu_hour=2.5"]
    out = printed(capsys, *flags, "--tokens_per_second=160")
    assert out["tokens of the run"] == "2,304,000"
    assert out["hours"] == "4.00" and out["dollars"] == "30.00"
    out = printed(capsys, "gpt2", "--gpus=8", "--gpu=A100", "--micro_batch_size=1")
    hours = 19_073 * 2**19 * 803_478_528 / (0.4 * 8 * 312e12) / 3600
    assert number(out["hours"]) == pytest.approx(hours, abs=0.01) and "dollars" not in out
    assert "hours" not in printed(capsys, "demo")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_planned(capsys, preset):
    flags = [preset, "--total_batch_size=98304", "--micro_batch_size=2"]
    out = printed(capsys, *flags, "--gpu=H100")  # whatever this machine has
    assert number(out["total"]) > 0 and number(out["tokens a second"]) > 0


BAD = [
    ("--plan", "--gpu=H1000", "H1000.*H200, H100, A100"), ("--gpu=H100", "--gpu goes with --plan"),
    ("--gpus=2", "--gpus goes with --plan"), ("--plan", "--gpus=0", "--gpus 0"),
    ("--tokens_per_second=9", "goes with --plan"), ("--plan", "--tokens_per_second=nan", "nan"),
    ("--dollars_per_gpu_hour=2", "goes with --plan"), ("--plan", "--eval_only", "one of them"),
    ("--plan", "--dollars_per_gpu_hour=2", "give --gpu or --tokens_per_second"),
    ("--plan", "--gpu=A100", "--dtype=float32", "16-bit"), ("--plan", "--gpus=3", "no multiple"),
    ("--plan", "--micro_batch_size=7", "does not divide"), ("--plan", "--n_head=7", "--n_embd"),
]  # fmt: skip


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
def test_what_cannot_be_planned_is_one_line(flags):
    *flags, message = flags
    with pytest.raises(SystemExit, match=message) as error:
        main(*parse_arguments(["gpt2", "--device=cpu", *flags]))
    assert isinstance(error.value.code, str) and "\n" not in error.value.code  # exit status 1


def test_only_the_first_rank_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    main(Config(), Task(plan=True))
    assert not capsys.readouterr().out

"""Malformed input of every kind, through the command lines: each ends in one line with status 1 or
2, and no file is made or changed."""

import functools
import gzip
import io
import itertools
import json
import os
import pickle
import random
import resource
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import tyro
from safetensors.torch import load_file, save_file

import fineweb
import hellaswag
import runs
import sources
import train_gpt2
from train_gpt2 import GPT, parse_arguments

ROOT = Path(train_gpt2.__file__).resolve().parent
TRAIN = (
    "train_gpt2.py shakespeare_char --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 "
    "--total_batch_size 128 --micro_batch_size 4 --max_steps 2 --data_dir data --device cpu "
    "--val_tokens 160 --checkpoint_interval 1 --keep_checkpoints 1 --sample_interval 0"
)
# what the first word of a command below stands for
WORDS = {
    "train": TRAIN,
    "fineweb": "fineweb.py --encoding bytes --workers 1",
    "hellaswag": "hellaswag.py --device cpu --file data/hellaswag_val.jsonl",
}
PT, LOG = "mine/step_000002.pt", "mine/log.txt"
SHARD, MANIFEST = "data/data_train_000001.npy", "data/manifest.json"
QUESTIONS = "data/hellaswag_val.jsonl"
CONFIG, WEIGHTS = "mine/hf/config.json", "mine/hf/model.safetensors"
EXAMPLE = {"ctx": "abc", "endings": ["a", "b c", "d", "ef"], "label": 2}
LONG = "x" * 300  # more than a file's name may have


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Shards and questions in data/, in mine/ a run, in docs/ documents: all as it should be."""
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rng = random.Random(0)
        documents = ["".join(rng.choices("abcdef \n", k=50)) for _ in range(100)]
        fineweb.write_shards(documents, "data", "bytes", 3000, val_tokens=1000, workers=1)
        Path(QUESTIONS).write_text(f"{json.dumps(EXAMPLE)}\n" * 4)
        Path("docs").mkdir()
        Path("docs/a.txt").write_text("\n".join(documents))
        run("train --out_dir mine")
    return folder


@pytest.fixture(autouse=True)
def workshop(good, tmp_path, monkeypatch):
    """A copy of it to work in, no network, and little memory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):  # a copy's verified.json has to be made anew
        fineweb.open_shards("data", split, 257)
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sources.open_parquet.cache_clear()  # under the same names are other files
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def contents() -> dict[str, bytes]:
    """All files, but for how far a call has come: where it has no shard yet, it says nothing."""
    files = (path for path in sorted(Path().rglob("*")) if path.is_file())
    found = {str(path): path.read_bytes() for path in files}
    if b'"tokens": 0,' in found.get("new/progress.json", b""):
        del found["new/progress.json"]
    return found


def words_of(command: str) -> list[str]:
    first, *rest = shlex.split(command)
    return [*shlex.split(WORDS.get(first, first)), *rest]


def run(command: str):
    """A command line, in this process."""
    script, *arguments = words_of(command)
    if script == "train_gpt2.py":
        return train_gpt2.main(*parse_arguments(arguments))
    module = {"fineweb.py": fineweb, "hellaswag.py": hellaswag}[script]
    return tyro.cli(module.main, args=arguments, use_underscores=True)


def error_of(command: str, capfd) -> str:
    """The line that it must end with (text means status 1), or what tyro says (status 2)."""
    before, peak = contents(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    capfd.readouterr()
    with pytest.raises(SystemExit) as error, warnings.catch_warnings(record=True) as warned:
        for kind in (UserWarning, FutureWarning, RuntimeWarning, SyntaxWarning):
            warnings.simplefilter("always", kind)
        run(command)
    said = capfd.readouterr()
    assert not [str(w.message) for w in warned]  # each would be a second line
    assert "Traceback" not in said.out + said.err
    assert contents() == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 2**18  # KiB
    if error.value.code == 2:
        return said.err
    assert isinstance(error.value.code, str) and len(error.value.code.splitlines()) == 1
    assert said.err == ""
    return error.value.code


# ---- what a file may hold ------------------------------------------------------------------------


class Harmful:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return os.system, ("touch harm",)


def put(path: str, content: bytes):
    return lambda: Path(path).write_bytes(content)


def cut(path: str, n_bytes: int):
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:n_bytes])


def flip(path: str, at: int):
    def damage():
        content = bytearray(Path(path).read_bytes())
        content[at] ^= 1
        Path(path).write_bytes(content)

    return damage


def changed(path: str, **changes):
    """A file of JSON with some values changed."""
    return lambda: Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def without(path: str, key: str):
    def damage():
        parts = json.loads(Path(path).read_text())
        del parts[key]
        Path(path).write_text(json.dumps(parts))

    return damage


def saved(change):
    """The checkpoint after change(its parts), which may return another one."""

    def damage():
        parts = torch.load(PT, weights_only=True)
        other = change(parts)
        torch.save(parts if other is None else other, PT)

    return damage


def lacking(*keys):
    """The checkpoint without what is under these keys."""

    def change(parts):
        for key in keys[:-1]:
            parts = parts[key]
        del parts[keys[-1]]

    return saved(change)


def setting(**changes):
    """The checkpoint with another configuration."""
    return saved(lambda parts: parts["config"].update(changes))


def tensors(change):
    """The exported weights after change(them)."""

    def damage():
        weights = load_file(WEIGHTS)
        change(weights)
        save_file(weights, WEIGHTS)

    return damage


def npy(array, **settings) -> bytes:
    content = io.BytesIO()
    np.save(content, array, **settings)
    return content.getvalue()


def npz(array) -> bytes:
    content = io.BytesIO()
    np.savez(content, array)
    return content.getvalue()


def llmc(n_tokens: int, n_bytes: int, magic=20240520, version=1) -> bytes:
    header = np.array([magic, version, n_tokens, *[0] * 253], dtype="<i4")
    return header.tobytes() + b"\1" * n_bytes


def archive(**records):
    """A checkpoint of these records, each with its checksum."""

    def damage():
        Path(PT).unlink()
        writer = torch._C.PyTorchFileWriter(PT)
        for name, record in records.items():
            writer.write_record(name, record, len(record))
        writer.write_end_of_file()

    return damage


def parquet(column: str, values: list) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({column: values}), content)
    return content.getvalue()


def alone(name: str, content: bytes):
    """The folder x/ with one shard of that content, another that is good, and no manifest."""

    def damage():
        Path("x").mkdir()
        Path("x", name).write_bytes(content)
        np.save("x/x_val_000000.npy", TOKENS // 4)

    return damage


def document(name: str, content: bytes):
    return put(f"docs/{name}", content)


TOKENS = np.arange(200, dtype=np.uint16)
OBJECTS = npy(np.array([Harmful()], dtype=object), allow_pickle=True)
NESTED = b"[" * 100_000
# a pickle that asks for a tensor's numbers
NO_DATA = b"\x80\2(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpuK\5tQ."
JUNK = bytes(range(256)) * 4


# ---- flags ---------------------------------------------------------------------------------------

# a command, and a part of what its line must say
FLAGS = {
    "train --learning_rate 1": "--learning_rate",
    "train --lr": "--lr",
    "train --lr fast": "--lr",
    "train --max_steps 1.5": "--max_steps",
    "train --dtype int8": "--dtype",
    "train --device tpu": "--device",
    "train --compile maybe": "maybe",
    "train surplus": "surplus",
    "train --n_layer ''": "--n_layer",
    "train --lr nan": "--lr nan",
    "train --lr inf": "--lr inf",
    "train --min_lr -1e-3": "--min_lr -0.001",
    "train --weight_decay -1": "--weight_decay",
    "train --beta1 1": "--beta1",
    "train --beta2 nan": "--beta2",
    "train --grad_clip -1": "--grad_clip",
    "train --dropout 1": "--dropout",
    "train --timeout nan": "--timeout",
    "train --n_layer 0": "--n_layer 0",
    "train --n_head 0": "--n_head 0",
    "train --n_head -2": "--n_head -2",
    "train --n_head 3": "--n_head 3",
    "train --n_embd 0": "--n_embd 0",
    "train --block_size 0": "--block_size 0",
    "train --block_size 4096 --total_batch_size 16384": "--block_size 4096",
    "train --vocab_size 0": "--vocab_size 0",
    "train --vocab_size 50257": "--vocab_size 257",
    "train --max_steps 0": "--max_steps 0",
    "train --total_batch_size 100": "--total_batch_size 100",
    "train --micro_batch_size 3": "--micro_batch_size 3",
    "train --seed -1": "--seed -1",
    f"train --seed {2**64}": "--seed",
    f"train --max_steps {10**400}": "--max_steps",
    "train --data_dir ''": "--data_dir is empty",
    "train --data_dir docs/a.txt": "docs/a.txt",
    f"train --data_dir {LONG}": LONG,
    "train --out_dir mine": "--resume auto",
    "train --out_dir docs/a.txt": "docs/a.txt",
    f"train --out_dir {LONG}": LONG,
    "train --resume nowhere": "nowhere holds no step_",
    "train --resume docs/a.txt": "docs/a.txt holds no step_",
    f"train --resume {LONG}": "holds no step_",
    "train --resume mine --n_layer 2": "--n_layer 1",
    "train --resume mine --seed 5": "--resume_anyway",
    "train --resume mine --resume_anyway --max_steps 1": "--max_steps 1",
    "train --init_from gpt5": "'gpt5'",
    "train --init_from data": "data holds no GPT-2",
    "train --init_from mine --block_size 32": "--block_size 32",
    f"train --init_from {LONG}": "no model",
    "train --prompt hello --init_from gpt5": "'gpt5'",
    "train --prompt": "--prompt",
    "train --prompt ''": "--prompt is empty",
    "train --prompt a --temperature -1": "--temperature -1",
    "train --prompt a --temperature nan": "--temperature nan",
    "train --prompt a --temperature inf": "--temperature inf",
    "train --prompt a --temperature hot": "--temperature",
    "train --prompt a --top_k -1": "--top_k -1",
    "train --prompt a --top_k 0.5": "--top_k",
    f"train --prompt a --top_k {10**400}": "--top_k 1000",
    "train --prompt a --top_p -0.1": "--top_p -0.1",
    "train --prompt a --top_p 1.5": "--top_p 1.5",
    "train --prompt a --top_p nan": "--top_p nan",
    "train --prompt a --num_samples 0": "--num_samples 0",
    "train --prompt a --num_samples -5": "--num_samples -5",
    "train --prompt a --max_new_tokens 0": "--max_new_tokens 0",
    "train --temperature 0.5": "--temperature goes with --prompt",
    "train --top_k 5": "--top_k goes with --prompt",
    "train --export new --top_p 0.5": "--top_p goes with --prompt",
    "train --eval_only --num_samples 3": "--num_samples goes with --prompt",
    "train --lambada docs/a.txt": "--lambada goes with --eval_only",
    "train --prompt a --export new": "--prompt and --export",
    "train --prompt a --init_from mine/step_000009.pt": "mine/step_000009.pt",
    "train --init_from data/manifest.json": "no model 'data/manifest.json'",
    "train --export new --init_from data": "data holds no GPT-2",
    "train --export data --init_from mine": "data exists",
    "train --export docs/a.txt --init_from mine": "docs/a.txt exists",
    "train --export docs/a.txt/new --init_from mine": "docs/a.txt/new cannot be written",
    f"train --export {LONG} --init_from mine": f"{LONG} cannot be written",
    "train_gpt2.py gpt3": "'gpt3'",
    "train_gpt2.py ''": "no preset ''",
    "train_gpt2.py --preset gpt2": "--preset",
    "fineweb docs --out new --shard_size 0": "shard_size",
    f"fineweb docs --out new --shard_size {10**12}": "shard_size",
    f"fineweb docs --out new --shard_size {10**30}": "shard_size",
    "fineweb docs --out new --shard_size 1e8": "--shard_size",
    "fineweb docs --out new --val_tokens -1": "val_tokens",
    "fineweb docs --out new --val_tokens 1000000": "--val_tokens",
    "fineweb docs --out new --max_tokens -5": "max_tokens",
    "fineweb docs --out new --max_tokens 5 --val_tokens 5": "--max_tokens",
    "fineweb docs --out new --workers -1": "workers",
    f"fineweb docs --out new --workers {10**30}": "workers",
    "fineweb docs --out new --encoding latin-1": "--encoding",
    "fineweb docs --out new --sharding 5": "--sharding",
    "fineweb --dataset stdlib --text_column body": "--text_column",
    "fineweb docs more --out new": "more does not exist",
    "fineweb 'docs/*.parquet' --out new": "docs/*.parquet does not exist",
    "fineweb docs --out new --text_column": "--text_column",
    "fineweb docs --out new --max_bad -1": "max_bad",
    "fineweb docs --out new --max_bad few": "--max_bad",
    "fineweb docs --out new --part 0/3": "--part 0/3",
    "fineweb docs --out new --part 4/3": "--part 4/3",
    "fineweb docs --out new --part x": "--part x",
    "fineweb docs --out new --part 2/1000": "--part 2/1000",
    "fineweb docs --out new --part 1/1 --max_tokens 200000": "--max_tokens",
    "fineweb --dataset nonsense": "--dataset",
    "fineweb --dataset stdlib --out new --part 1/2": "--part",
    "fineweb docs --out new --dataset stdlib": "--dataset",
    "fineweb docs --out new --download": "--download",
    "fineweb --dataset stdlib --download": "nobody has made tokens of stdlib",
    "fineweb --dataset shakespeare --out new": "--dataset stdlib",
    "fineweb --out new": "hf://datasets/HuggingFaceFW/fineweb-edu/",
    "fineweb hf://datasets/a/b/*.parquet --out new": "hf://datasets/a/b/*.parquet: ",
    "fineweb hf://datasets/a --out new": "hf://datasets/a",
    "fineweb hf://datasets/ --out new": "hf://datasets/",
    "fineweb hf://models/a/b --out new": "hf://models/a/b does not exist",
    "fineweb docs": "--out",
    "fineweb docs --out data": "data already holds shards",
    "fineweb docs --out docs/a.txt": "cannot write to docs/a.txt",
    f"fineweb docs --out {LONG}": LONG,
    "fineweb nowhere --out new": "nowhere does not exist",
    f"fineweb {LONG} --out new": "does not exist",
    "fineweb mine/hf --out new": "nothing to read",
    "fineweb --verify nowhere": "nowhere/ has no manifest.json",
    "fineweb --verify docs": "docs/ has no manifest.json",
    "fineweb --verify docs/a.txt": "docs/a.txt",
    "fineweb --verify data --out new": "--verify",
    "fineweb docs --verify data": "--verify",
    "fineweb --dataset stdlib --verify data": "--verify",
    "hellaswag --batch_size -1": "--batch_size",
    "hellaswag --batch_size many": "--batch_size",
    "hellaswag --limit -1": "--limit",
    "hellaswag --device tpu": "--device",
    "hellaswag --models mine": "--models",
    "hellaswag --model gpt5": "'gpt5'",
    "hellaswag --model ''": "no model ''",
    "hellaswag --model data": "data holds no GPT-2",
    f"hellaswag --model {LONG}": "no model",
    "hellaswag --file nowhere.jsonl": "nowhere.jsonl",
    "hellaswag --file data": "data",
    f"hellaswag --file {LONG}": LONG,
}  # fmt: skip


# ---- files ---------------------------------------------------------------------------------------

WITH_CHECKPOINT = [
    "train --resume mine",
    "train --init_from mine",
    "train --prompt a --init_from mine",
    f"train --export new --init_from {PT}",
    "hellaswag --model mine",
]
WITH_EXPORT = ["train --init_from mine/hf", "hellaswag --model mine/hf"]
WITH_EXPORT += ["train --export new --init_from mine/hf"]
WITH_MANIFEST = ["train", "fineweb --verify data"]
WITH_QUESTIONS = ["train --hellaswag_interval 1", "hellaswag --model mine"]

# what is done to the folder, and a part of what the line must say
CHECKPOINTS = {
    "empty": (put(PT, b""), "damaged"),
    "text": (put(PT, b"not a checkpoint"), "damaged"),
    "junk": (put(PT, JUNK), "damaged"),
    "cut": (cut(PT, 5000), "damaged"),
    "cut by a byte": (cut(PT, -1), "damaged"),
    "a bit flipped": (flip(PT, 5000), "checksum"),
    "an archive without records": (archive(), "damaged"),
    "an archive of other records": (archive(readme=b"hello"), "damaged"),
    "an archive of an empty pickle": (archive(**{"data.pkl": b""}), "damaged"),
    "an archive of junk": (archive(**{"data.pkl": JUNK}), "damaged"),
    "an archive of nested lists": (
        archive(**{"data.pkl": b"\x80\2" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."}), "damaged"),
    "an archive that lacks its data": (archive(**{"data.pkl": NO_DATA}), "damaged"),
    "TorchScript": (archive(**{"data.pkl": b"", "constants.pkl": b"\x80\2)."}), "damaged"),
    "a pickle": (put(PT, pickle.dumps({"model": {}})), "damaged"),
    "a pickle that runs a command": (put(PT, pickle.dumps(Harmful())), "damaged"),
    "an archive that runs a command": (
        saved(lambda parts: parts.update(model=Harmful())), "damaged"),
    "a folder": (lambda: (Path(PT).unlink(), Path(PT).mkdir()), PT),
    "a list": (saved(lambda parts: [*parts.values()]), "damaged"),
    "a tensor": (saved(lambda parts: torch.ones(3)), "damaged"),
    "another key": (saved(lambda parts: parts.update(epoch=1)), "another program"),
    **{f"no {key}": (lacking(key), "another program")
       for key in ("model", "optimizer", "scaler", "step", "config", "data")},
    "step as text": (saved(lambda parts: parts.update(step="2")), "another program"),
    "step as a float": (saved(lambda parts: parts.update(step=2.0)), "another program"),
    "step below 0": (saved(lambda parts: parts.update(step=-1)), "another program"),
    "weights in a list": (saved(lambda parts: parts.update(model=[])), "another program"),
    "config in a list": (saved(lambda parts: parts.update(config=["n_layer"])), "another program"),
    "optimizer as text": (saved(lambda parts: parts.update(optimizer="")), "another program"),
    "data as a number": (saved(lambda parts: parts.update(data=5)), "another program"),
    "an unknown field": (setting(n_experts=8), "n_experts"),
    "a field that is no name": (saved(lambda parts: parts["config"].update({5: 5})), "version"),
    "n_layer as text": (setting(n_layer="x"), "n_layer"),
    "n_layer below 0": (setting(n_layer=-1), "n_layer"),
    "n_layer of 10**9": (setting(n_layer=10**9), "layers"),
    "n_layer of 2": (setting(n_layer=2), "version"),
    "n_head as a float": (setting(n_head=2.0), "n_head"),
    "n_head below 0": (setting(n_head=-2), "n_head"),
    "n_embd of 10**9": (setting(n_embd=10**9), "version"),
    "n_embd of 10**30": (setting(n_embd=10**30), "n_embd"),
    "n_embd as a list": (setting(n_embd=[16]), "n_embd"),
    "vocab_size of 10**9": (setting(vocab_size=10**9), "version"),
    "vocab_size as a float": (setting(vocab_size=257.0), "vocab_size"),
    "lr as a tensor": (setting(lr=torch.ones(2, 3)), "lr"),
    "block_size as text": (setting(block_size="x\ny"), "block_size"),
    "no weights": (saved(lambda parts: parts.update(model={})), "version"),
    "a missing weight": (lacking("model", "transformer.ln_f.bias"), "ln_f.bias"),
    "an unknown weight": (saved(lambda parts: parts["model"].update(x=torch.ones(1))), "version"),
    "a weight of another shape": (
        saved(lambda parts: parts["model"].update({"transformer.ln_f.bias": torch.ones(17)})),
        "ln_f.bias"),
    "a weight that is text": (
        saved(lambda parts: parts["model"].update({"transformer.ln_f.bias": "x"})), "ln_f.bias"),
    "a weight of no name": (
        saved(lambda parts: parts["model"].update({5: torch.ones(1)})), "version"),
    "positions that are a number": (
        saved(lambda parts: parts["model"].update({"transformer.wpe.weight": 5})), "version"),
    "optimizer without state": (saved(lambda parts: parts.update(optimizer={})), "state"),
    "a missing moment": (lacking("optimizer", "state", 3, "exp_avg"), "moments"),
    "a moment that is text": (
        saved(lambda parts: parts["optimizer"]["state"][3].update(exp_avg="x")), "version"),
    "a moment of another shape": (
        saved(lambda parts: parts["optimizer"]["state"][3].update(exp_avg=torch.ones(5))),
        "moments"),
    "moments of fewer weights": (lacking("optimizer", "state", 3), "moments"),
}  # fmt: skip
EXPORTS = {
    "config.json is empty": (put(CONFIG, b""), "mine/hf"),
    "config.json is no JSON": (put(CONFIG, b"{'n_layer': 1}"), "mine/hf"),
    "config.json is junk": (put(CONFIG, JUNK), "mine/hf"),
    "config.json is a list": (put(CONFIG, b"[]"), "mine/hf"),
    "config.json is nested": (put(CONFIG, NESTED), "mine/hf"),
    "no config.json": (lambda: Path(CONFIG).unlink(), "config.json"),
    "no n_layer": (without(CONFIG, "n_layer"), "n_layer"),
    "another activation": (changed(CONFIG, activation_function="relu"), "relu"),
    "another architecture": (changed(CONFIG, model_type="llama"), "llama"),
    "n_layer as text": (changed(CONFIG, n_layer="x"), "n_layer"),
    "n_layer below 0": (changed(CONFIG, n_layer=-1), "n_layer"),
    "n_layer of 10**9": (changed(CONFIG, n_layer=10**9), "layers"),
    "n_head of 0": (changed(CONFIG, n_head=0), "n_head"),
    "n_head below 0": (changed(CONFIG, n_head=-2), "n_head"),
    "n_head as a float": (changed(CONFIG, n_head=2.0), "n_head"),
    "n_head as null": (changed(CONFIG, n_head=None), "n_head"),
    "n_embd of 10**6": (changed(CONFIG, n_embd=10**6), "mine/hf"),
    "n_positions of 10**9": (changed(CONFIG, n_positions=10**9), "mine/hf"),
    "vocab_size of 10**9": (changed(CONFIG, vocab_size=10**9), "mine/hf"),
    "vocab_size of 100": (changed(CONFIG, vocab_size=100), "mine/hf"),
    "no weights": (lambda: Path(WEIGHTS).unlink(), "model.safetensors"),
    "empty weights": (put(WEIGHTS, b""), "mine/hf"),
    "weights cut": (cut(WEIGHTS, 3000), "mine/hf"),
    "weights cut in the header": (cut(WEIGHTS, 100), "mine/hf"),
    "a header of junk": (put(WEIGHTS, b"\x10" + bytes(7) + JUNK), "mine/hf"),
    "a header without end": (put(WEIGHTS, b"\xff" * 8 + JUNK), "mine/hf"),
    "weights that are a pickle": (put(WEIGHTS, pickle.dumps(Harmful())), "mine/hf"),
    "a missing tensor": (tensors(lambda w: w.pop("transformer.ln_f.bias")), "ln_f.bias"),
    "no embedding": (tensors(lambda w: w.pop("transformer.wte.weight")), "wte"),
    "a tensor of another shape": (
        tensors(lambda w: w.update({"transformer.ln_f.bias": torch.ones(17)})), "ln_f.bias"),
    "a tensor too many": (tensors(lambda w: w.update(extra=torch.ones(1))), "extra"),
}  # fmt: skip
ENTRY = {"file": "x_train_000000.npy", "tokens": 5, "largest": 1, "sha256": "0" * 64}
MANIFESTS = {
    "empty": put(MANIFEST, b""),
    "no JSON": put(MANIFEST, b"{'encoding': 'bytes'}"),
    "junk": put(MANIFEST, JUNK),
    "a list": put(MANIFEST, b"[]"),
    "null": put(MANIFEST, b"null"),
    "nested": put(MANIFEST, NESTED),
    "cut": cut(MANIFEST, 100),
    **{f"no {key}": without(MANIFEST, key) for key in ("encoding", "vocab_size", "shards")},
    "shards as text": changed(MANIFEST, shards="x"),
    "a shard that is a number": changed(MANIFEST, shards=[5]),
    "vocab_size as text": changed(MANIFEST, vocab_size="257"),
    "a path upwards": changed(MANIFEST, shards=[ENTRY | {"file": "../x_train_000000.npy"}]),
    "an absolute path": changed(MANIFEST, shards=[ENTRY | {"file": "/x_train_000000.npy"}]),
    "tokens below 0": changed(MANIFEST, shards=[ENTRY | {"tokens": -1}]),
    "a checksum that is none": changed(MANIFEST, shards=[ENTRY | {"sha256": "x"}]),
    "a shard twice": changed(MANIFEST, shards=[ENTRY, ENTRY]),
    "a folder": lambda: (Path(MANIFEST).unlink(), Path(MANIFEST).mkdir()),
}
SHARDS = {
    "empty": put(SHARD, b""),
    "text": put(SHARD, b"some text"),
    "junk": put(SHARD, JUNK),
    "cut": cut(SHARD, -100),
    "cut in the header": cut(SHARD, 50),
    "a bit flipped": flip(SHARD, -4),
    "a bit of the header flipped": flip(SHARD, 60),
    "float": put(SHARD, npy(TOKENS.astype("f4"))),
    "int64": put(SHARD, npy(TOKENS.astype("i8"))),
    "another length": put(SHARD, npy(TOKENS)),
    "objects": put(SHARD, OBJECTS),
    "a pickle": put(SHARD, pickle.dumps(Harmful())),
    "missing": lambda: Path(SHARD).unlink(),
    "a folder": lambda: (Path(SHARD).unlink(), Path(SHARD).mkdir()),
}
NPY, BIN = "x_train_000000.npy", "x_train_000000.bin"
ALONE = {  # without a manifest
    "empty": (NPY, b""),
    "text": (NPY, b"some text"),
    "float": (NPY, npy(TOKENS.astype("f4"))),
    "int64": (NPY, npy(TOKENS.astype("i8"))),
    "big-endian": (NPY, npy(TOKENS.astype(">u2"))),
    "two dimensions": (NPY, npy(TOKENS.reshape(2, 100))),
    "no dimension": (NPY, npy(TOKENS[0])),
    "cut": (NPY, npy(TOKENS)[:-10]),
    "too long": (NPY, npy(TOKENS) + b"more"),
    "objects": (NPY, OBJECTS),
    "a header that is code": (NPY, npy(TOKENS).replace(b"(200,), }", b"exit(),}")),
    "an .npz": (NPY, npz(TOKENS)),
    "a pickle": (NPY, pickle.dumps(Harmful())),
    "a token beyond the vocabulary": (NPY, npy(TOKENS + 100)),
    "too short for a window": (NPY, npy(TOKENS[:9])),
    "an empty .bin": (BIN, b""),
    "a .bin of another magic": (BIN, llmc(200, 400, magic=20240801)),
    "a .bin of another version": (BIN, llmc(200, 400, version=7)),
    "a .bin of a negative count": (BIN, llmc(-200, 400)),
    "a .bin too short": (BIN, llmc(200, 399)),
    "a .bin too long": (BIN, llmc(200, 402)),
    "a .bin of a header only": (BIN, llmc(200, 0)[:24]),
    "a .bin beyond the vocabulary": (BIN, llmc(200, 400).replace(b"\1\1", b"\1\7")),
}


def question(**changes) -> bytes:
    return json.dumps(EXAMPLE | changes).encode()


LINES = {  # of hellaswag_val.jsonl, after one that is good
    "no JSON": b"{'ctx': 'abc'}",
    "junk": b"\xff\xfe\0\1",
    "nested": NESTED,
    "a list": b"[]",
    "a number": b"5",
    "a long number": b"5" * 5000,
    "blank": b"",
    "no label": json.dumps({"ctx": "a", "endings": ["a", "b", "c", "d"]}).encode(),
    "no endings": json.dumps({"ctx": "a", "label": 0}).encode(),
    "no context": question(ctx=""),
    "a context that is a number": question(ctx=5),
    "label 4": question(label=4),
    "label -1": question(label=-1),
    "label as text": question(label="2"),
    "label as a bool": question(label=True),
    "three endings": question(endings=["a", "b", "c"]),
    "endings that are no text": question(endings=["a", "b", "c", None]),
    "endings in a text": question(endings="abcd"),
}
LOGS = {
    "junk": JUNK + b"\n",
    "two fields": b"0 train\n",
    "four fields": b"0 train 5.5 6\n",
    "a step that is no number": b"x train 5.5\n",
    "a value that is no number": b"0 train high\n",
    "a step of 5000 digits": b"5" * 5000 + b" train 5.5\n",
    "a blank line": b"\n",
    "a zero byte": b"0 train 5.5\0\n",
}
UTF_8 = pyarrow.array([b"\xff"]).cast("string", safe=False)  # which it is not
# rows that are skipped, unless too many are: a file, its content, the row, what is wrong
ROWS = {
    "text that is not UTF-8": ("b.txt", b"abc\xff", 1, "0xff"),
    "text that is UTF-16": ("b.txt", "abc".encode("utf-16"), 1, "0xff"),
    "a broken line": ("b.jsonl", b'{"text": "fine"}\n{"text": "bro\n', 2, "JSONDecodeError"),
    "a broken last line": ("b.jsonl", b'\n\n{"text": "bro', 3, "JSONDecodeError"),
    "a line of junk": ("b.jsonl", JUNK.replace(b"\n", b""), 1, "Error"),
    "a line that is not UTF-8": ("b.jsonl", b'{"text": "\xff"}', 1, "0xff"),
    "a nested line": ("b.jsonl", NESTED, 1, "RecursionError"),
    "a line without text": ("b.jsonl", b'{"body": "abc"}\n', 1, 'no key "text"'),
    "a line that is a list": ("b.jsonl", b'["text"]\n', 1, "TypeError"),
    "a line that is a number": ("b.jsonl", b"5\n", 1, "TypeError"),
    "a line that is a long number": ("b.jsonl", b"5" * 5000 + b"\n", 1, "digits"),
    "text that is a number": ("b.jsonl", b'{"text": 5}\n', 1, "int where text should be"),
    "text that is an object": ("b.jsonl", b'{"text": {}}\n', 1, "dict where text should be"),
    "a .gz of junk": ("b.jsonl.gz", JUNK, 1, "and the rest of the file"),
    "a .gz cut": ("b.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-5], 1, "Truncated"),
    "a .zst of junk": ("b.jsonl.zst", JUNK, 1, "and the rest of the file"),
    "a parquet text that is not UTF-8": ("b.parquet", parquet("text", UTF_8), 1, "0xff"),
}  # fmt: skip
# files that end the call at once
TABLES = {
    "empty": (b"", "is damaged"),
    "cut": (parquet("text", ["a"])[:-20], "is damaged"),
    "junk": (b"PAR1" + JUNK + b"PAR1", "is damaged"),
    "of a JSON line": (b'{"text": "a"}', "is damaged"),
    "without text": (parquet("body", ["a"]), "body (string)"),
    "of numbers": (parquet("text", [5]), "text (int64)"),
    "of lists": (parquet("text", [["a"]]), "no text in a column"),
    "of records": (parquet("text", [{"text": "a"}]), "no text in a column"),
    "of nothing": (parquet("text", [None]), "text (null)"),
}
NEW = "fineweb docs --out new --shard_size 900 --val_tokens 100"
PROGRESS = "new/progress.json"


def unfinished():
    """A call that was killed after three shards."""
    shards = itertools.count(1)

    def write_file(path, content):
        if path.suffix == ".npy" and next(shards) == 4:
            raise KeyboardInterrupt
        path.write_bytes(content)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fineweb, "write_file", write_file)
        run(NEW)
    Path("new/fineweb.lock").unlink(missing_ok=True)


POSITIONS = [None, 5, "0", [], [0, 0], [0, 0, 0, 0], [0, 0, -1], [0, 0, 0.5], ["0", 0, 0], [[]]]
PROGRESSES = {
    "empty": put(PROGRESS, b""),
    "no JSON": put(PROGRESS, b"{'tokens': 0}"),
    "junk": put(PROGRESS, JUNK),
    "null": put(PROGRESS, b"null"),
    "a list": put(PROGRESS, b"[]"),
    "nested": put(PROGRESS, NESTED),
    "cut": cut(PROGRESS, 100),
    **{f"no {key}": without(PROGRESS, key)
       for key in ("encoding", "vocab_size", "tokens", "skipped", "shards", "position")},
    **{f"position {value}": changed(PROGRESS, position=value) for value in POSITIONS},
    "tokens below 0": changed(PROGRESS, tokens=-1),
    "tokens as text": changed(PROGRESS, tokens="5"),
    "documents as a float": changed(PROGRESS, documents=5.0),
    "skipped as a number": changed(PROGRESS, skipped=5),
    "made by nobody": changed(PROGRESS, made_by=None),
    "a path upwards": changed(PROGRESS, shards=[ENTRY | {"file": "../x_train_000000.npy"}]),
    "a folder": lambda: (Path(PROGRESS).unlink(), Path(PROGRESS).mkdir()),
}  # fmt: skip


def nothing():
    pass


def remove(folder: str, pattern="*"):
    def damage():
        for path in Path(folder).glob(pattern):
            path.unlink()

    return damage


def others():
    """What is in none of the tables."""
    yield "no validation shard", "train", remove("data", "*_val_*"), "data"
    yield "no documents", "fineweb docs --out new", remove("docs"), "nothing to read"
    empty = document("a.txt", b"")
    yield "empty documents", "fineweb docs --out new", empty, "--val_tokens"
    for command in WITH_QUESTIONS:
        yield "no questions", command, put(QUESTIONS, b""), f"{QUESTIONS} is empty"
    another = changed(MANIFEST, vocab_size=50257)
    yield "another vocabulary", "train", another, "--vocab_size 50257"
    few = alone(NPY, npy(TOKENS // 4))
    settings = "train --data_dir x --vocab_size 103 --sample_interval 1"
    yield "a vocabulary of no encoding", settings, few, "no encoding has 103 tokens"
    for command in ("train --prompt a --init_from small", "hellaswag --model small"):
        yield "a model of no encoding", command, small_vocabulary, "no encoding has 97 tokens"
    for suffix in (".parquet", ".jsonl"):
        content = parquet("text", ["a"]) if suffix == ".parquet" else b'{"text": "a"}'
        command = "fineweb docs --out new --text_column nonsense --max_bad 0"
        yield "no such column", command, document(f"b{suffix}", content), '"nonsense"'
    for flag in ("--shard_size 901", "--val_tokens 101", "--max_tokens 3000"):
        said = f"new already holds shards, made with another {flag[2:].split()[0]}"
        yield "unfinished with other settings", f"{NEW} {flag}", unfinished, said
    for what in ("more", "fewer", "gone"):
        said = "another source" if what != "gone" else "new_train_000001.npy is no shard"
        yield f"unfinished: {what}", NEW, functools.partial(after_unfinished, what), said
    other = NEW.replace("docs", "--dataset stdlib")
    yield "unfinished, from elsewhere", other, unfinished, "another source"
    yield "a folder for log.txt", "train --resume mine", folder_for_log, LOG
    yield "all checkpoints damaged", "train --resume mine", two_damaged, "mine/step_000001.pt"


def both(damage):
    unfinished()
    damage()


def after_unfinished(what: str):
    unfinished()
    if what == "more":
        Path("docs/b.txt").write_text("another document")
    elif what == "fewer":
        cut("docs/a.txt", -1)()
    else:
        Path("new/new_train_000001.npy").unlink()


def small_vocabulary():
    config, _ = parse_arguments(words_of("train --vocab_size 97")[1:])
    GPT(config).save_pretrained("small")


def folder_for_log():
    Path(LOG).unlink()
    Path(LOG).mkdir()


def two_damaged():
    Path(PT).write_bytes(b"damaged")
    Path("mine/step_000001.pt").write_bytes(b"damaged")


def cases():
    """(name, command, what is done before, a part of what the line must say)"""
    for command, said in FLAGS.items():
        yield "flags", command, nothing, said
    for name, (damage, said) in CHECKPOINTS.items():
        for command in WITH_CHECKPOINT:
            yield f"checkpoint: {name}", command, damage, (PT, said)
    for name, (damage, said) in EXPORTS.items():
        for command in WITH_EXPORT:
            yield f"export: {name}", command, damage, ("mine/hf", said)
    for name, damage in MANIFESTS.items():
        for command in WITH_MANIFEST:
            yield f"manifest: {name}", command, damage, f"{MANIFEST} is damaged"
    for name, damage in SHARDS.items():
        yield f"shard: {name}", "train", damage, "data_train_000001.npy"
        yield f"shard: {name}", "fineweb --verify data", damage, "1 of 3 shards of data are bad"
    for name, (file, content) in ALONE.items():
        said = "--block_size" if "window" in name else f"x/{file}"
        yield f"shard alone: {name}", "train --data_dir x", alone(file, content), said
    for name, line in LINES.items():
        damage = put(QUESTIONS, question() + b"\n" + line + b"\n")
        for command in WITH_QUESTIONS:
            yield f"question: {name}", command, damage, f"{QUESTIONS}, line 2"
    for name, content in LOGS.items():
        yield f"log: {name}", "train --resume mine", put(LOG, content), f"{LOG}, line "
    for name, (file, content, row, said) in ROWS.items():
        place, damage = f"docs/{file}, row {row}: ", document(file, content)
        yield f"row: {name}", "fineweb docs --out new --max_bad 0", damage, (place, said)
    for name, (content, said) in TABLES.items():
        damage = document("b.parquet", content)
        yield f"parquet: {name}", "fineweb docs --out new", damage, ("docs/b.parquet ", said)
    for name, damage in PROGRESSES.items():
        yield f"progress: {name}", NEW, functools.partial(both, damage), f"{PROGRESS} is damaged"
    yield from others()


CASES = [*cases()]


@pytest.mark.parametrize(
    "command, damage, said",
    [case[1:] for case in CASES],
    ids=[f"{name}: {command}"[:80] for name, command, *_ in CASES],
)
def test_malformed_input_ends_in_one_line_and_changes_no_file(command, damage, said, capfd):
    damage()
    line = error_of(command, capfd)
    for part in (said,) if isinstance(said, str) else said:
        assert part in line
    assert not Path("harm").exists()
    assert len(line) < 2000


def test_the_cases_are_many():
    assert len(CASES) >= 80


GOOD = ["train --resume mine", "train --init_from mine", "train --init_from mine/hf"]
GOOD += [f"train --init_from {PT}", f"train --export new --init_from {PT}"]
GOOD += ["train --prompt a --init_from mine", "train --hellaswag_interval 1"]
GOOD += ["hellaswag --model mine", "fineweb --verify data", "fineweb docs --out new --val_tokens 9"]
GOOD += [NEW, f"{NEW} --part 1/1", f"{NEW} --text_column nonsense --max_bad 0"]  # of a .txt file


@pytest.mark.parametrize("command", GOOD)
def test_with_nothing_damaged_the_commands_succeed(command):
    run(command)


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_skipped_and_named(name, capfd):
    file, content, row, _ = ROWS[name]
    document(file, content)()
    run("fineweb docs --out new --val_tokens 9")
    assert "1 rows were skipped" in capfd.readouterr().out
    [line] = json.loads(Path("new/manifest.json").read_text())["skipped"]
    assert line.startswith(f"docs/{file}, row {row}: ") and len(line.splitlines()) == 1


def test_a_call_that_has_no_shard_yet_leaves_the_folder_free():
    """A bad row was the first, and is mended: other documents, and yet the same --out."""
    document("a.jsonl", b"broken")()
    with pytest.raises(SystemExit):
        run(f"{NEW} --max_bad 0")
    document("a.jsonl", b'{"text": "mended"}')()
    run(f"{NEW} --max_bad 0")
    assert json.loads(Path("new/manifest.json").read_text())["documents"] == 2


def test_the_trap_is_armed():
    pickle.loads(pickle.dumps(Harmful()))
    assert Path("harm").exists()


# ---- the same, through real processes ------------------------------------------------------------

EMPTY = ["fineweb --verify ''", "fineweb '' --out new", "fineweb docs --out ''"]
KINDS = [name.split(":")[0] for name, *_ in CASES]
TWO_OF_A_KIND = {KINDS.index(kind) for kind in KINDS if KINDS.count(kind) > 5}
TWO_OF_A_KIND |= {len(KINDS) - 1 - KINDS[::-1].index(KINDS[i]) for i in TWO_OF_A_KIND}
PROCESSES = [CASES[i] for i in sorted(TWO_OF_A_KIND)]
PROCESSES += [("empty", command, nothing, "an empty argument") for command in EMPTY]
BY_NAME = {name: case for name, *case in CASES}
for name in ("a pickle that runs a command", "an archive that runs a command", "TorchScript"):
    PROCESSES += [(name, *BY_NAME[f"checkpoint: {name}"])]
PROCESSES += [("objects", *BY_NAME["shard alone: objects"])]


@pytest.mark.parametrize(
    "command, damage, said",
    [case[1:] for case in PROCESSES],
    ids=[f"{name}: {command}"[:80] for name, command, *_ in PROCESSES],
)
def test_a_process_ends_in_one_line_and_changes_no_file(command, damage, said):
    damage()
    before = contents()
    script, *arguments = words_of(command)
    line = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stdout + done.stderr
    assert contents() == before
    assert done.returncode in (1, 2)
    assert done.returncode == 2 or done.stderr.count("\n") == 1
    assert not Path("harm").exists()
    for part in (said,) if isinstance(said, str) else said:
        assert part in done.stderr


@pytest.mark.parametrize("command", ["--out new", "hf://datasets/a/b/*.parquet --out new"])
def test_a_hub_that_nobody_serves_is_given_up_at_once(monkeypatch, command):
    for name, value in {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    line = [sys.executable, str(ROOT / "fineweb.py"), *shlex.split(command)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("hf://datasets/") and "--dataset stdlib" in done.stderr


# ---- what no table has: chance -------------------------------------------------------------------


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with some bits flipped, or bytes cut off, put in or taken out."""
    kind, at, n = rng.randrange(4), rng.randrange(len(content) + 1), rng.randint(1, 20)
    if kind == 0:
        changed = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:
        return content[:at]
    if kind == 2:
        some = rng.randbytes(n) if rng.random() < 0.5 else b"9" * n  # in a number, a larger one
        return content[:at] + some + content[at:]
    return content[:at] + content[at + n :]


def read_checkpoint():
    try:
        runs.load_checkpoint(Path(PT))
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    config, _ = parse_arguments(words_of("train")[1:])
    train_gpt2.prepare(config, *runs.newest_checkpoint(Path("mine")))


def read_shards():
    for split in ("train", "val"):
        fineweb.open_shards("data", split, 257)
    fineweb.fingerprint("data")


def read_export():
    GPT.from_pretrained("mine/hf")(torch.zeros(2, 3, dtype=torch.int64))


def read_rows(suffix: str):
    for piece in sources.corpus_of([f"mixed/a.jsonl{suffix}"]).pieces():
        assert all(len(line.splitlines()) == 1 for line in fineweb.tokenize(piece, "bytes").bad)


def read_progress():
    shutil.rmtree("again", ignore_errors=True)
    shutil.copytree("new", "again")
    run(NEW.replace("--out new", "--out again"))


PACKED = {"": bytes, ".gz": gzip.compress}
PACKED[".zst"] = functools.partial(pyarrow.compress, codec="zstd", asbytes=True)

READERS = {
    PT: read_checkpoint,
    LOG: lambda: runs.read_log("mine"),
    MANIFEST: read_shards,
    "data/verified.json": read_shards,
    SHARD: read_shards,
    QUESTIONS: lambda: hellaswag.load(QUESTIONS),
    CONFIG: read_export,
    WEIGHTS: read_export,
    "mine/owner.json": lambda: runs.owner_of(Path("mine")),
    **{f"mixed/a.jsonl{suffix}": functools.partial(read_rows, suffix) for suffix in PACKED},
    PROGRESS: read_progress,
}


def outcome(read) -> str:
    try:
        read()
        return "read"
    except SystemExit as error:
        assert isinstance(error.code, str) and len(error.code.splitlines()) == 1
        return "refused"


@pytest.mark.parametrize("path", READERS)
def test_a_file_changed_by_chance_is_read_or_refused_in_one_line(path):
    Path("mixed").mkdir()
    for suffix, pack in PACKED.items():
        Path(f"mixed/a.jsonl{suffix}").write_bytes(pack(b'{"text": "a text"}\n' * 20))
    unfinished()
    rng, content = random.Random(path), Path(path).read_bytes()
    assert outcome(READERS[path]) == "read"
    for _ in range(40):
        Path(path).write_bytes(mutated(content, rng))
        outcome(READERS[path])


def test_a_pickle_changed_by_chance_under_a_right_checksum_is_read_or_refused_in_one_line():
    reader, rng = torch._C.PyTorchFileReader(PT), random.Random(0)
    records = {name: reader.get_record(name) for name in reader.get_all_records()}
    for name in ("version", ".data/serialization_id"):  # the writer adds these itself
        del records[name]
    assert outcome(read_checkpoint) == "read"
    outcomes = []
    for _ in range(100):
        archive(**records | {"data.pkl": mutated(records["data.pkl"], rng)})()
        outcomes.append(outcome(read_checkpoint))
    assert outcomes.count("refused") > 50
    archive(**records)()
    assert outcome(read_checkpoint) == "read"


# ---- what is odd, but not malformed --------------------------------------------------------------


@pytest.mark.parametrize("content", [b"5", b"null", b"[[[], 1]]", NESTED, JUNK, b""])
def test_an_odd_owner_json_names_nobody(content):
    Path("mine/owner.json").write_bytes(content)
    assert runs.owner_of(Path("mine")) == {}


def test_more_steps_than_fit_into_memory_can_be_asked_for(capfd):
    flags = "--lr 1e30 --min_lr 1e30 --warmup_steps 0 --max_bad_steps 2 --val_interval 0"
    with pytest.raises(SystemExit, match="not finite"):
        run(f"train --max_steps {10**15} {flags} --checkpoint_interval 0")


def test_tokens_beyond_the_encoding_are_left_out_of_samples():
    model = GPT(parse_arguments(words_of("train --vocab_size 1000")[1:])[0])
    encoding = fineweb.get_encoding("bytes")  # 257 tokens
    texts = train_gpt2.sample_texts(model, encoding, "a", seed=0)
    assert all(text.startswith("a") for text in texts)

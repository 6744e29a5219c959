"""The demo, smaller: from no file at all to a trained model, without network and GPU."""

import itertools
import struct
from pathlib import Path

import pytest
import torch

import sources
from runs import read_log
from train_gpt2 import main, parse_arguments

SMALLER = """
    --n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --total_batch_size 256
    --micro_batch_size 8 --max_steps 20 --val_interval 10 --val_tokens 2000
    --hellaswag_interval 20 --sample_interval 20 --device cpu --dtype float32
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder, no network, and some of the standard library only: it is faster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    torch.set_num_threads(1)
    documents = list(itertools.islice(sources.standard_library(), 60))
    monkeypatch.setattr(sources, "standard_library", lambda: iter(documents))


def demo(*flags):
    main(*parse_arguments(["demo", *SMALLER.split(), *flags]))


def test_the_demo_makes_its_data_trains_draws_and_tells(capsys):
    demo()
    log = Path("log/demo-001")
    streams = read_log(log)
    assert streams["train"][0] == list(range(20))
    assert streams["val"][0] == [0, 10, 20]
    assert streams["hella"][0] == [0, 20]  # before and after
    assert streams["val"][1][-1] < streams["val"][1][0]
    picture = (log / "curve.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">2I", picture[16:24]) == (840, 480)  # width and height, in pixels
    assert len(picture) > 10_000  # a blank one has fewer bytes

    out = capsys.readouterr().out
    assert "making demo_data/" in out
    val = streams["val"][1]
    assert f"validation loss  {val[0]:.3f} -> {val[-1]:.3f}" in out
    for words in ("What happened", "chance: 25%", "a sample", "curve.png", "fineweb.py"):
        assert words in out


def test_a_second_demo_uses_the_same_data(capsys):
    demo()
    before = {path: path.stat() for path in Path("demo_data").iterdir()}
    capsys.readouterr()
    demo()
    assert {path: path.stat() for path in Path("demo_data").iterdir()} == before
    assert "making" not in capsys.readouterr().out
    lines = [Path(f"log/demo-00{i}/log.txt").read_text() for i in (1, 2)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("name", ["val", "hellaswag", "sample"])
def test_the_demo_ends_well_with_a_part_of_it_switched_off(name, capsys):
    demo(f"--{name}_interval", "0")
    assert "What happened" in capsys.readouterr().out

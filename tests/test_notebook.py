"""Executes play.ipynb offline, in a folder with copies of the scripts, and checks what it prints.

    python tests/test_notebook.py            # execute the whole notebook, and print its output
    python tests/test_notebook.py 1 2        # sections 1 and 2 only, after the cells before them
    python tests/test_notebook.py --write    # the whole notebook; save its outputs in play.ipynb

Execution stops at the first cell that fails. `python -m pytest -m notebook` runs the tests.
"""

import argparse
import ast
import base64
import io
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tiktoken
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parent.parent / "play.ipynb"
pytestmark = pytest.mark.notebook

# Two more cells for the test. The first plots a run on GPT-2's vocabulary. The second writes a
# small GPT-2 to the hub's cache, before the cell gpt2 is executed again.
PLOT_GPT2_RUN = """
from unittest import mock

folder = Path("log/gpt2-001")
folder.mkdir()
(folder / "config.json").write_text('{"vocab_size": 50257}')
(folder / "log.txt").write_text("0 val 10.9\\n0 train 10.9\\n0 hella 0.25\\n250 val 5.9\\n")
with mock.patch.object(plt, "show"):  # keeps the figure open
    plot_runs([folder, mine])
for axes in plt.gcf().axes:
    print([(line.get_label(), float(line.get_ydata()[0])) for line in axes.lines[-3:]])
compare_with_published([folder])
"""
CACHE_GPT2 = """
import transformers

cache = Path("hub/hub/models--openai-community--gpt2")
gpt2_config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64)
model = transformers.GPT2LMHeadModel(gpt2_config)
model.save_pretrained(cache / "snapshots" / ("0" * 40))
(cache / "refs").mkdir(exist_ok=True)
(cache / "refs/main").write_text("0" * 40)
"""


def number_sections(notebook) -> list[int]:
    """The section of each cell. Cells before the heading "## 1. ..." are in section 0."""
    headings = [re.match(r"## (\d+)\. ", cell.source) for cell in notebook.cells]
    starts = [int(heading[1]) if heading else 0 for heading in headings]
    return list(itertools.accumulate(starts, max))


def code_cells(notebook) -> dict[str, nbformat.NotebookNode]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def execute(notebook, folder: Path, show: bool = False):
    """Execute the cells in a folder that gets a copy of the scripts. Raises CellExecutionError."""
    for script in NOTEBOOK.parent.glob("*.py"):
        shutil.copy(script, folder)
    start = time.time()

    def report(cell, cell_index, execute_reply):
        print(f"== {cell.id}, after {time.time() - start:.0f} s\n{printed(cell)}", flush=True)

    environment = {"https_proxy": "http://127.0.0.1:9"}  # no server, so no network
    environment |= {"HF_HOME": str(folder / "hub"), "IPYTHONDIR": str(folder / "ipython")}
    environment |= {"OMP_NUM_THREADS": "1"}  # more are very slow if other processes use the cores
    client = NotebookClient(
        notebook,
        timeout=1200,  # seconds per cell
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        on_cell_executed=report if show else None,
    )
    client.execute(env=os.environ | environment)


def reduce_colors(notebook):
    """Give all pictures a palette of 256 colors, which makes the file several times smaller."""
    for output in itertools.chain(*(cell.outputs for cell in code_cells(notebook).values())):
        if "image/png" in output.get("data", {}):
            png, file = base64.b64decode(output.data["image/png"]), io.BytesIO()
            image = Image.open(io.BytesIO(png)).convert("RGB")
            image.quantize(256).save(file, "png", optimize=True)
            output.data["image/png"] = base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder in which the notebook was executed, and what each cell has printed."""
    folder, notebook = tmp_path_factory.mktemp("notebook"), nbformat.read(NOTEBOOK, as_version=4)
    last = CACHE_GPT2 + code_cells(notebook)["gpt2"].source
    for name, source in (("plot_gpt2_run", PLOT_GPT2_RUN), ("cached_gpt2", last)):
        notebook.cells.append(nbformat.v4.new_code_cell(source, id=name))
    execute(notebook, folder)
    return folder, {name: printed(cell) for name, cell in code_cells(notebook).items()}


def numbers_in(text: str) -> list[float]:
    return [float(x.replace(",", "")) for x in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def test_curves(run):
    folder, text = run
    losses = {}
    for name in ("play-1", "play-2", "play-3", "play-mine", "play-slow"):
        lines = map(str.split, (folder / "log" / name / "log.txt").read_text().splitlines())
        losses[name] = np.array([float(value) for _, stream, value in lines if stream == "val"])
    references = np.stack([losses[f"play-{i}"] for i in (1, 2, 3)])  # (3, evaluations)
    for line in text["band"].splitlines():
        name, *words = re.split(r"\s+\d+: ", line)
        difference = (losses[name] - references.mean(axis=0)) / references.std(axis=0, ddof=1)
        expected = np.select([difference < -5, difference > 5], ["better", "worse"], "on track")
        assert [word.strip() for word in words] == expected.tolist()
    left, right, *_ = text["plot_gpt2_run"].splitlines()
    assert "('GPT-2 124M', 3.2924)" in left
    assert "('GPT-2 124M', 0.2955), ('GPT-3 124M', 0.337)" in right


def cdf(t: float, n: int) -> float:
    """The distribution function of Student's t for n values, in closed form."""
    if n == 3:
        return 0.5 + t / (2 * math.sqrt(2 + t * t))
    return 0.5 + (t / math.sqrt(3) / (1 + t * t / 3) + math.atan(t / math.sqrt(3))) / math.pi


def test_published_runs(run):
    """The printed ranges are those of the README, and 95% of a t distribution is in them."""
    _, text = run
    source = code_cells(nbformat.read(NOTEBOOK, as_version=4))["published"].source
    published = ast.literal_eval(re.search(r"PUBLISHED = (\{.*?\n\})", source, re.DOTALL)[1])
    rows = r"^\| ([\d,]+) \| (\S+) ± (\S+) \| (\S+) ± (\S+) \|$"
    rows = re.findall(rows, (NOTEBOOK.parent / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == len(published) == 6
    for i, line in enumerate(text["published"].splitlines()):
        for values, part, row in zip(published.values(), line.split(" | ")[1:], rows, strict=True):
            _, center, width = numbers_in(part)
            printed_in_readme = list(map(float, row[1 + 2 * i : 3 + 2 * i]))
            assert [center, width] == pytest.approx(printed_in_readme, abs=6e-4)
            n, values = len(values[i]), np.array(values[i])
            assert center == pytest.approx(values.mean(), abs=6e-5)
            t = width / values.std(ddof=1) / math.sqrt(1 + 1 / n)
            assert cdf(t, n) == pytest.approx(0.975, abs=0.004)  # four digits are printed
    own = re.findall(r"gpt2-001, (\w+), step (\d+): \S+ is (\w+) the range", text["plot_gpt2_run"])
    assert own == [("val", "250", "outside")]


def test_experiments(run):
    _, text = run
    assert "55 + 45 = 100 (correct)" in text["misses"]
    rows = re.findall(r"([\d ]+) -> ([\d ]+)\n", text["sorting"])
    assert len(rows) == 3 and all(sorted(row.split()) == end.split() for row, end in rows)
    assert "294,912 of 124,439,808 parameters" in text["lora"]
    # two blocks with rank 8; 320 is 257 padded to a multiple of 64
    n_params = 320 * 96 + 32 * 96 + 2 * (12 * 96**2 + 13 * 96) + 2 * 96
    assert numbers_in(text["finetune"])[:2] == [2 * 8 * (96 + 3 * 96), n_params]


def test_counts(run):
    _, text = run
    sizes = {"gpt2": (124_439_808, 12, 768), "gpt2-medium": (354_823_168, 24, 1024)}
    sizes |= {"gpt2-large": (774_030_080, 36, 1280), "gpt2-xl": (1_557_611_200, 48, 1600)}
    flops, memory = (text[cell].splitlines() for cell in ("flops", "memory"))
    for i, (name, (n, L, C)) in enumerate(sizes.items()):
        n += 47 * C  # pads the vocabulary to 50,304
        # forward and backward: 6 per element of a matrix, and 12 T C per block in attention
        gflops = (6 * (12 * L * C * C + 50_304 * C) + 12 * L * 1024 * C) / 1e9
        assert flops[i].startswith(name)
        assert numbers_in(flops[i].removeprefix(name)) == [round(n / 1e6, 1), round(gflops, 3)]
        # gradients, moments, and for B = 4 the attention weights in float32 and bfloat16
        gigabytes = [4 * n / 1e9, 8 * n / 1e9, 6 * 4 * L * (C // 64) * 1024**2 / 1e9]
        _, gradients, moments, _, _, weights, _ = numbers_in(memory[1 + i].removeprefix(name))
        assert [gradients, moments, weights] == [round(x, 1) for x in gigabytes]
    for line in text["cost"].splitlines():
        n_gpus, gpu, rest = re.fullmatch(r"(\d) x (\w+): (.*)", line).groups()
        tokens_per_sec, hours, dollars, price = numbers_in(rest)
        assert hours == pytest.approx(10e9 / tokens_per_sec / 3600, abs=0.06)
        assert dollars == pytest.approx(hours * int(n_gpus) * price, rel=0.1)


def test_samples_of_gpt2(run):
    _, text = run
    assert text["gpt2"].startswith("GPT-2 is not available: cannot load gpt2")
    try:
        tiktoken.get_encoding("gpt2")
    except OSError:
        pytest.skip("GPT-2's vocabulary is neither cached nor reachable")
    assert text["cached_gpt2"].count("The key turned in the lock") == 6


def test_answers(run):
    _, text = run
    x, y = (line.split()[1:] for line in text["pairs"].splitlines()[:2])
    assert all(target in ("-100", token) for target, token in zip(y, x[1:], strict=False))
    answer = bytes(int(token) for token in y if token not in ("-100", "256")).decode()
    assert re.fullmatch(r"\d{3}", answer) and y.count("256") == 1
    pattern = r"(\d+) (first|last) three\? +\| answers only: (.+?) +\| all tokens: (.+?) *\n"
    rows = re.findall(pattern, text["answers"])
    right = [repr(digits[:3] if end == "first" else digits[-3:]) for digits, end, *_ in rows]
    n_right = [sum(map(str.__eq__, right, column)) for column in list(zip(*rows, strict=True))[2:]]
    assert len(rows) == 6 and n_right[0] >= 5 and n_right[1] <= 2


def test_tokens(run):
    _, text = run
    lines = re.findall(r"(.+) \((\d+) tokens\): (.+)", text["pieces"])
    assert len(lines) >= 1 and len({line.replace("·", "") for *_, line in lines}) == 1
    assert all(line.count("·") + 1 == int(n_tokens) for _, n_tokens, line in lines)
    chars_per_token = numbers_in(re.search(r"held-out text: (.*) \(ours\)", text["pieces"])[1])[0]
    rows = re.search(r"BPE.*\n((?:  step.*\n)+)", text["words"])[1].splitlines()
    for _, _, per_token, per_char in map(numbers_in, rows):
        assert per_char == pytest.approx(per_token / chars_per_token, rel=0.003)


def test_saved_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert set(number_sections(notebook)) == set(range(14))
    cells = code_cells(notebook).values()
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 13
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert NOTEBOOK.stat().st_size < 500_000
    texts = [cell.source for cell in notebook.cells] + [printed(cell) for cell in cells]
    path = re.compile(r"/(tmp|home|root|work|usr|opt|mnt|private|Users)\b|\b[A-Z]:\\")
    assert [text for text in texts if path.search(text)] == []


def test_colab_cell_without_a_repository(tmp_path):
    source = code_cells(nbformat.read(NOTEBOOK, as_version=4))["colab"].source.split("    !git")[0]
    command, pipe = [sys.executable, "-c", source], subprocess.PIPE
    result = subprocess.run(command, cwd=tmp_path, stderr=pipe, text=True)
    assert result.returncode == 1 and result.stderr.startswith("train_gpt2.py not found")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Execute play.ipynb.")
    parser.add_argument("sections", nargs="*", type=int, help="default: all")
    parser.add_argument("--write", action="store_true", help="save all outputs in play.ipynb")
    args = parser.parse_args()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    wanted = {0, *args.sections} if args.sections and not args.write else range(14)
    cells = zip(notebook.cells, number_sections(notebook), strict=True)
    notebook.cells = [cell for cell, number in cells if number in wanted]
    with tempfile.TemporaryDirectory() as temp:
        execute(notebook, Path(temp), show=True)
    if args.write:
        reduce_colors(notebook)
        nbformat.write(notebook, NOTEBOOK)

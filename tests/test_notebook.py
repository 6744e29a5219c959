"""The notebook, top to bottom as in a clean clone: no run, no data, no network."""

import copy
import json
import re
import shutil
import subprocess

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from run_notebook import NOTEBOOK, number_sections, run, texts

import fineweb
from train_gpt2 import GPT, Config

ROOT = NOTEBOOK.parent
N_PICTURES = 12  # at least


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    """(type, content) of all that the cells have put out: text/plain, image/png, stdout ..."""
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        if output.output_type == "stream":
            yield output.name, output.text
        else:  # nbclient stops at an error: there is none among them
            yield from output.data.items()


def pictures(notebook):
    return [content for kind, content in outputs(notebook) if kind == "image/png"]


def said(notebook) -> str:
    return "".join(text for cell in code_cells(notebook) for text in texts(cell))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the scripts, where no command reaches the network."""
    folder = tmp_path_factory.mktemp("clone")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    environment = {
        "https_proxy": "http://127.0.0.1:9",  # nobody listens there
        "HF_HOME": str(folder / "hub"),
        "IPYTHONDIR": str(folder / "ipython"),  # not the user's own settings
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield folder


@pytest.fixture(scope="module")
def executed(folder):
    notebook = read()
    run(notebook, folder)
    return notebook


def test_it_runs_from_a_clean_clone(executed, folder):
    cells = code_cells(executed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(pictures(executed)) >= N_PICTURES
    # the curves are those of runs, not drawn by hand
    for name in ("play-1", "play-2", "play-3", "play-mine", "play-slow"):
        assert len((folder / "log" / name / "log.txt").read_text().splitlines()) > 240
    assert "without GPT-2: the hub does not give gpt2" in said(executed)


def test_it_has_the_sections_that_it_promises(executed):
    assert sorted({*number_sections(executed)}) == list(range(12))
    assert re.search(r"written out and fused differ by \d\.\de-0[6-9]", said(executed))
    assert "55 + 45 = " in said(executed)


@pytest.fixture
def gpt2(executed, folder, monkeypatch):
    """A run on GPT-2's vocabulary among the runs, and a small GPT-2 where the hub keeps its own."""
    try:
        fineweb.get_encoding("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))
    model = GPT(Config(n_layer=2, n_head=2, n_embd=32, block_size=64))
    snapshot = "models--openai-community--gpt2/snapshots/0123456789abcdef"
    model.save_pretrained(folder / "hub/hub" / snapshot)
    refs = folder / "hub/hub/models--openai-community--gpt2/refs"
    refs.mkdir()
    (refs / "main").write_text("0123456789abcdef")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    log = folder / "log/gpt2-001"
    model.save_pretrained(log / "hf")
    (log / "config.json").write_text(json.dumps({"vocab_size": 50257}))
    (log / "log.txt").write_text("0 val 10.9\n0 train 10.9\n0 hella 0.25\n250 val 5.9\n")


def test_a_run_of_ones_own_and_the_weights_of_gpt2(gpt2, folder):
    notebook = read()
    marks = """
from unittest import mock

with mock.patch.object(plt, "show"):  # which would close it
    draw([Path("log/gpt2-001"), mine])
for axes in plt.gcf().axes:
    print([(line.get_label(), float(line.get_ydata()[0])) for line in axes.lines[-3:]])
"""
    cells = notebook.cells
    cells.insert(number_sections(notebook).index(2), nbformat.v4.new_code_cell(marks))
    run(notebook, folder, [1, 2, 11])

    text = said(notebook)
    assert "the run to look at is gpt2-001" in text
    left, right = re.findall(r"^\[\(.*\]$", text, re.MULTILINE)
    assert "('GPT-2 124M', 3.2924)" in left
    assert "('GPT-2 124M', 0.2955)" in right and "('GPT-3 124M', 0.337)" in right
    assert "without GPT-2" not in text and text.count("The key turned in the lock") == 6


def test_sections_run_by_themselves_and_end_where_a_cell_fails(tmp_path):
    notebook = read()
    sources = ["## 1. One", "print('one')", "## 2. Two", "assert 1 + 1 == 3, 'a claim'", "print(3)"]
    kinds = [nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell]
    notebook.cells = [kinds[not text.startswith("#")](text) for text in sources]
    two = copy.deepcopy(notebook)
    run(notebook, tmp_path, [1])
    assert [texts(cell) for cell in code_cells(notebook)] == [["one\n"]]
    with pytest.raises(CellExecutionError, match="a claim"):
        run(two, tmp_path, [2])
    assert [texts(cell) for cell in code_cells(two)] == [[], []]
    with pytest.raises(SystemExit, match="no section 7: there are 1 to 2"):
        run(two, tmp_path, [7])


def test_colab_fetches_the_project(tmp_path, folder):
    """Colab opens the notebook alone, in a folder without the scripts."""
    notebook = read()
    notebook.cells = [code_cells(notebook)[0]]
    with pytest.raises(CellExecutionError, match="start in its folder, or fill in REPOSITORY"):
        run(notebook, tmp_path)

    origin = tmp_path / "origin"
    origin.mkdir()
    for name in ("train_gpt2.py", "requirements.txt"):
        shutil.copy(ROOT / name, origin)
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=origin, check=True)
    cell = notebook.cells[0]
    cell.source = cell.source.replace('REPOSITORY = ""', f'REPOSITORY = "{origin}"')
    notebook.cells.append(nbformat.v4.new_code_cell("print(Path('train_gpt2.py').resolve())"))
    run(notebook, tmp_path)
    assert str(tmp_path / "gpt2" / "train_gpt2.py") in said(notebook)
    wanted = (tmp_path / "gpt2" / "colab.txt").read_text().splitlines()
    assert "tyro" in wanted and not any(line.startswith("torch") for line in wanted)


def test_its_outputs_are_committed_and_small():
    notebook = read()
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(pictures(notebook)) >= N_PICTURES
    assert "stderr" not in dict(outputs(notebook))
    assert NOTEBOOK.stat().st_size < 500_000


def test_it_tells_nothing_of_the_machine_that_ran_it():
    notebook = read()
    # pictures aside: a slash is a digit of theirs
    shown = [str(content) for kind, content in outputs(notebook) if kind != "image/png"]
    shown += [cell.source for cell in notebook.cells]
    absolute = re.compile(r"/(tmp|home|root|work|usr|opt|mnt|private|Users)\b|\b[A-Z]:\\")
    assert [text for text in shown if absolute.search(text)] == []
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any("execution" in cell.metadata for cell in notebook.cells)  # when it ran

"""The notebook, top to bottom as in a clean clone: no run, no data, no network."""

import copy
import re
import shutil

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from run_notebook import NOTEBOOK, run, texts

ROOT = NOTEBOOK.parent


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


@pytest.fixture
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_runs_from_a_clean_clone(committed, tmp_path, monkeypatch):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # not the user's own settings
    run(committed, tmp_path)

    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(pictures(committed)) >= 3
    # the curves are those of a run, not drawn by hand
    assert len((tmp_path / "log/play/log.txt").read_text().splitlines()) > 100


def test_sections_run_by_themselves_and_end_where_a_cell_fails(committed, tmp_path):
    sources = ["## 1. One", "print('one')", "## 2. Two", "assert 1 + 1 == 3, 'a claim'", "print(3)"]
    kinds = [nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell]
    committed.cells = [kinds[not text.startswith("#")](text) for text in sources]
    two = copy.deepcopy(committed)
    run(committed, tmp_path, [1])
    assert [texts(cell) for cell in code_cells(committed)] == [["one\n"]]
    with pytest.raises(CellExecutionError, match="a claim"):
        run(two, tmp_path, [2])
    assert [texts(cell) for cell in code_cells(two)] == [[], []]
    with pytest.raises(SystemExit, match="no section 7: there are 1 to 2"):
        run(two, tmp_path, [7])


def test_its_outputs_are_committed_and_small(committed):
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(pictures(committed)) >= 3
    assert "stderr" not in dict(outputs(committed))
    assert NOTEBOOK.stat().st_size < 250_000


def test_it_tells_nothing_of_the_machine_that_ran_it(committed):
    # pictures aside: a slash is a digit of theirs
    texts = [str(content) for kind, content in outputs(committed) if kind != "image/png"]
    texts += [cell.source for cell in committed.cells]
    absolute = re.compile(r"/(tmp|home|root|work|usr|opt|mnt|private|Users)\b|\b[A-Z]:\\")
    assert [text for text in texts if absolute.search(text)] == []
    assert committed.metadata.kernelspec.name == "python3"
    assert not any("execution" in cell.metadata for cell in committed.cells)  # when it ran

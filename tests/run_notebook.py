"""Run play.ipynb, or some of its sections, in the repository's folder, and print what they print.

    python tests/run_notebook.py            # all of it
    python tests/run_notebook.py 1 2        # sections 1 and 2, after the cells before section 1
    python tests/run_notebook.py --write    # all of it, and keep the outputs in play.ipynb

A picture is printed as one word; the first cell that fails ends it, with exit status 1.
"""

import argparse
import re
import time
from collections.abc import Collection
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).parent.parent / "play.ipynb"


def number_sections(notebook) -> list[int]:
    """The section of each cell: those before the heading "## 1. ..." are in section 0."""
    numbers, number = [], 0
    for cell in notebook.cells:
        heading = cell.cell_type == "markdown" and re.match(r"## (\d+)\. ", cell.source)
        number = int(heading[1]) if heading else number
        numbers.append(number)
    return numbers


def texts(cell) -> list[str]:
    """What the cell has put out, a picture as one word."""
    return [
        output.text if output.output_type == "stream" else "[picture]\n"
        for output in cell.outputs
        if output.output_type == "stream" or "image/png" in output.get("data", {})
    ]


def run(notebook, folder: Path, wanted: Collection[int] = (), show: bool = False):
    """Execute the cells, those of the wanted sections alone if there are any named, in a folder.
    Raises CellExecutionError for the first cell that fails; other cells are left out."""
    numbers = number_sections(notebook)
    if unknown := {*wanted} - {*numbers}:
        raise SystemExit(f"no section {min(unknown)}: there are 1 to {max(numbers)}")
    chosen = [n == 0 or not wanted or n in wanted for n in numbers]
    numbers = [n for n, is_chosen in zip(numbers, chosen, strict=True) if is_chosen]
    notebook.cells = [c for c, is_chosen in zip(notebook.cells, chosen, strict=True) if is_chosen]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, []
            cell.metadata.pop("execution", None)
    start = time.perf_counter()

    def report(cell, cell_index, execute_reply):
        seconds = time.perf_counter() - start
        print(f"== section {numbers[cell_index]}, after {seconds:.0f} s", flush=True)
        print("".join(texts(cell)), flush=True)

    NotebookClient(
        notebook,
        timeout=600,  # a cell
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # it warns of what every kernel does
        on_cell_executed=report if show else None,
    ).execute()


def main():
    parser = argparse.ArgumentParser(description="Run play.ipynb, or some of its sections.")
    parser.add_argument("sections", nargs="*", type=int, help="numbers; none: all")
    parser.add_argument("--write", action="store_true", help="keep the outputs in play.ipynb")
    arguments = parser.parse_args()
    if arguments.write and arguments.sections:
        raise SystemExit("--write keeps the outputs of a whole run: leave the sections out")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    try:
        run(notebook, NOTEBOOK.parent, arguments.sections, show=True)
    except CellExecutionError as error:
        raise SystemExit(str(error)) from None
    if arguments.write:
        nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()

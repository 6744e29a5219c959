"""Executes play.ipynb, and shows what its cells print.

    python tests/test_notebook.py

Execution stops at the first cell that fails.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "play.ipynb"


def report(cell, cell_index, execute_reply):
    for output in cell.outputs:
        if output.output_type == "stream":
            print(output.text, end="", flush=True)


def execute(notebook):
    """Execute the cells in the repository's folder. Raises CellExecutionError."""
    NotebookClient(
        notebook,
        timeout=1200,  # seconds per cell
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        on_cell_executed=report,
    ).execute()


if __name__ == "__main__":
    execute(nbformat.read(NOTEBOOK, as_version=4))

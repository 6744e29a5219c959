"""Executes play.ipynb offline, in a folder with copies of the scripts.

    python tests/test_notebook.py            # execute the whole notebook, and print its output
    python tests/test_notebook.py 1 2        # sections 1 and 2 only, after the cells before them
    python tests/test_notebook.py --write    # the whole notebook; save its outputs in play.ipynb

Execution stops at the first cell that fails.
"""

import argparse
import base64
import io
import itertools
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parent.parent / "play.ipynb"


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

"""The real book: package, notebooks and text agree; house rules that a machine can see."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from nanolm.tangle import Book, findings

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nothing_has_drifted():
    assert findings(Book(ROOT)) == []


def test_ruff():
    run("-m", "ruff", "check", ".")
    run("-m", "ruff", "format", "--check", ".")


def test_mypy():
    run("-m", "mypy", "--cache-dir", "/dev/null")


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def faults(cells, root=ROOT):
    """What the house does not want in cells or outputs."""
    found = []
    for number, cell in enumerate(cells, 1):
        shown = str(cell.outputs)
        if cell.source.rstrip().endswith(";"):
            found.append(f"code cell {number} silences its result")
        if str(root) in shown or re.search(r"/tmp/|/home/|0x[0-9a-f]{8,}", shown):
            found.append(f"code cell {number} shows a path or an address of one machine")
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"code cell {number} stores an error")
    return found


@by_name
def test_no_cell_silences_its_result_or_shows_one_machine(path):
    assert faults(code_cells(path)) == []


def test_these_faults_are_seen():
    def cell(source, text):
        output = nbformat.v4.new_output("stream", text=text)
        return nbformat.v4.new_code_cell(source, outputs=[output])

    cells = [cell("f();", ""), cell("f()", f"{ROOT}/x"), cell("f()", "<object at 0x7f00aa00bb00>")]
    assert len(faults(cells)) == 3


@by_name
def test_the_parts_of_a_chapter(path):
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    order = ["## What nanolm gained", "## Summary", "## Exercises", "## Further reading"]
    places = [text.find(f"\n{heading}\n") for heading in order]
    assert -1 not in places and places == sorted(places), dict(zip(order, places, strict=True))
    assert re.search(r"(?m)^\(ch-[a-z-]+\)=$", text), "no label"
    assert text.count("{solution-start}") == text.count("{exercise}") >= 3


def test_importing_nanolm_is_cheap():
    heavy = ("torch", "triton", "matplotlib", "numpy", "jupytext")
    script = (
        "import sys, time; t = time.perf_counter(); import nanolm; t = time.perf_counter() - t; "
    )
    script += f"print(t, [name for name in {heavy} if name in sys.modules])"
    seconds, loaded = run("-c", script).split(" ", 1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 0.1

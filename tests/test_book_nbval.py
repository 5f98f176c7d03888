"""How much of the stored output is truly compared; and that a spoilt notebook is refused."""

import base64
import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from matplotlib.image import imsave

ROOT = Path(__file__).resolve().parent.parent


def compared(*paths):
    run = [sys.executable, ROOT / "tests/book_compared.py", *paths]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def share(cells):
    """The share of cells with outputs that are truly compared."""
    shown = [state for state, *_ in cells if state != "no output"]
    return shown.count("compared") / max(len(shown), 1)


@pytest.fixture(scope="module")
def cells():
    return compared(ROOT / "book")


def test_at_least_95_percent_of_the_outputs_are_compared(cells, record_property):
    lost = [(state, name) for state, name, *_ in cells if state not in ("compared", "no output")]
    print(f"{share(cells):.1%} of the cells with outputs are compared; not compared: {lost}")
    record_property("compared", share(cells))
    assert cells and share(cells) >= 0.95, lost
    assert all(state == "ignored" for state, _ in lost), lost


def test_only_timings_are_not_compared(cells):
    ignored = [(name, text) for state, name, _, text in cells if state == "ignored"]
    print(f"{len(ignored)} cells are not compared: {[name for name, *_ in ignored]}")
    assert len(ignored) <= 12
    for name, printed in ignored:
        assert has_timing(printed), f"{name} prints no timing: {printed}"


def has_timing(text):
    return bool(re.search(r"\d\s*(ns|us|µs|ms|s|seconds?|times|x|×)(?!\w)|/s\b|a second", text))


def test_what_is_a_timing():
    assert all(
        map(has_timing, ["took 3.2 s", "12 ms", "4.1x faster", "tok/s 3820", "7 tokens a second"])
    )
    assert not any(map(has_timing, ["loss 2.87", "3 steps", "['a', 's']", ""]))


# ---- a notebook in which every cell is wrong in its own way ------------------------------------

PLOT = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.plot([1, 2, {}])\nplt.show()"


def cell(source, *outputs, tags=(), count=1):
    made = nbformat.v4.new_code_cell(source, outputs=list(outputs), execution_count=count)
    made.metadata["tags"] = list(tags)
    return made


def printed(text):
    return nbformat.v4.new_output("stream", text=text)


def result(text):
    return nbformat.v4.new_output("execute_result", {"text/plain": text}, execution_count=1)


def picture(pixels):
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    named = {"image/png": data, "text/plain": "<Figure size 640x480 with 1 Axes>"}
    return nbformat.v4.new_output("display_data", named)


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    """The output of PLOT with its last number 3, as a kernel gives it."""
    from nanolm.tangle import Book, Chapter, run

    root = tmp_path_factory.mktemp("figure")
    notebook = nbformat.v4.new_notebook(cells=[cell(PLOT.format(3), count=None)])
    run(Book(root), Chapter(root / "x.md", "x.md", "", "", "", [], notebook), {})
    plt.close("all")
    return nbformat.read(root / "x.ipynb", 4).cells[0].outputs[0]


def changed(figure, amount):
    """A figure whose pixels have all been changed a little."""
    new = copy.deepcopy(figure)
    pixels = plt.imread(io.BytesIO(base64.b64decode(figure["data"]["image/png"])))
    size = pixels.shape[:2]
    noise = np.random.default_rng(0).normal(0, amount / 255, (*size, 1))
    pixels = np.clip(pixels[..., :3] - np.abs(noise), 0, 1)
    return nbformat.from_dict({**new, "data": {**new["data"], **picture(pixels)["data"]}})


def verdicts(folder, cells):
    path = folder / "spoilt.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    options = ["--nbval", "--nbval-current-env", "-p", "conftest", "-p", "no:cacheprovider", "-rA"]
    run = [sys.executable, "-m", "pytest", *options, "--rootdir", folder, path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, env=environment)
    found = re.findall(r"(?m)^(PASSED|FAILED) \S+::Cell (\d+)", done.stdout)
    assert len(found) == len(cells), done.stdout + done.stderr
    return [verdict == "PASSED" for verdict, _ in sorted(found, key=lambda pair: int(pair[1]))]


def test_a_good_notebook_passes_and_a_spoilt_one_fails_cell_by_cell(tmp_path, figure):
    good = [
        cell("print(1)", printed("1\n")),
        cell("1 + 1", result("2")),
        cell("1 + 1;"),
        cell("x = 1"),
        cell(PLOT.format(3), figure),
        cell(PLOT.format(3), changed(figure, 2), tags=["approx-figure"]),
        cell("print('took 3 s')", printed("took 4 s\n"), tags=["nbval-ignore-output"]),
    ]
    spoilt = [
        cell("print(1)", printed("2\n")),
        cell("1 + 1", result("3")),
        cell("1 + 1;", result("2")),
        cell("x = 1", printed("1\n")),
        cell("print(1)"),
        cell("print(1)", printed("1\n"), count=None),
        cell("print(1)", printed("1\n"), tags=["nbval-skip"]),
        cell("1 / 0"),
        cell(PLOT.format(3.01), figure),
        cell(PLOT.format(3), changed(figure, 2)),
        cell(PLOT.format(3), changed(figure, 20), tags=["approx-figure"]),
        cell(PLOT.format(3)),
    ]
    got = verdicts(tmp_path, good + spoilt)
    assert got == [True] * len(good) + [False] * len(spoilt)


def test_the_share_falls_when_outputs_are_not_compared(tmp_path):
    path = tmp_path / "x.ipynb"
    loose = cell("f()", printed("took 3 s\n"), tags=["nbval-ignore-output"])
    notebook = nbformat.v4.new_notebook(cells=[cell("print(1)", printed("1\n")), loose])
    nbformat.write(notebook, path)
    found = compared(path)
    assert [state for state, *_ in found] == ["compared", "ignored"]
    assert share(found) == 0.5

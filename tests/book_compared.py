"""How much of the stored output of notebooks does nbval truly compare?

    python tests/book_compared.py [paths]

Nothing is run. Every stored output is spoilt in turn (each number and word of a text, a patch of a
picture) and given to the comparison that `pytest --nbval` would make for that cell, with its tags
and the root's conftest.py. A cell counts as compared only if every spoilt form is refused.
"""

import base64
import contextlib
import copy
import io
import json
import re
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread, imsave
from nbval.plugin import IPyNbCell, coalesce_streams

ROOT = Path(__file__).resolve().parent.parent
TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")


def spoilt_texts(text):
    for match in TOKEN.finditer(text):
        token = match[0]
        last = "1" if token[-1] == "0" else "0" if token[-1].isdigit() else "q"
        new = token[:-1] + (last if last != token[-1] else "z")
        yield text[: match.start()] + new + text[match.end() :]
    if not TOKEN.search(text):
        yield text + "x"


def spoilt_picture(data):
    pixels = imread(io.BytesIO(base64.b64decode(data)), format="png").copy()
    rows, columns = (slice(size // 3, size // 2) for size in pixels.shape[:2])
    pixels[rows, columns, :3] = 1 - pixels[rows, columns, :3]
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    yield base64.b64encode(buffer.getvalue()).decode()


def spoilt(outputs):
    """The outputs with one thing changed, in every way."""
    for number, output in enumerate(outputs):
        data = output.get("data", {})
        for key in [key for key in ("text", "evalue") if key in output] + list(data):
            if key == "text/plain" and "image/png" in data:
                continue  # the reader is shown the picture
            value = data[key] if key in data else output[key]
            for form in spoilt_picture(value) if key == "image/png" else spoilt_texts(str(value)):
                new = copy.deepcopy(outputs)
                (new[number]["data"] if key in data else new[number])[key] = form
                yield new


def state(item):
    """What the comparison is worth for one cell."""
    stored = item.cell.outputs
    if item.cell.execution_count is None or item.options["skip"]:
        return "never run"
    if not stored:
        return "no output"
    if not item.options["check"]:
        return "ignored"
    seen = [
        not item.compare_outputs(new, coalesce_streams(copy.deepcopy(stored)))
        for new in spoilt(stored)
    ]
    return "compared" if all(seen) else "partly" if any(seen) else "blind"


class Share:
    def __init__(self):
        self.cells = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session):
        for item in session.items:
            if isinstance(item, IPyNbCell) and item.cell.source.strip():
                item.parent.setup_sanitize_files()
                printed = "".join(o.get("text", "") for o in item.cell.outputs)
                self.cells.append((state(item), item.nodeid, item.cell.source, printed))


def main(paths):
    share = Share()
    sys.path.insert(0, str(ROOT))
    options = ["--nbval", "--nbval-current-env", "--collect-only", "-qqq", "-p", "conftest"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main([*options, *map(str, paths)], plugins=[share])
    if code not in (0, 5):
        sys.exit(said.getvalue())
    print(json.dumps(share.cells))


if __name__ == "__main__":
    main(sys.argv[1:] or [ROOT / "book"])

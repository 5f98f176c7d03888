"""What the book needs beyond Jupyter Book: labels on cells, an offline MathJax, tidy pages."""

import importlib.util
import json
import shutil
from pathlib import Path

from docutils import nodes

LABELS = {
    "tag_nbval-ignore-output": "differs between machines: not compared",
    "tag_approx-figure": "drawn from trained numbers: compared loosely",
}


def label_cells(app, doctree):
    """Above each exported cell, the file it goes to; above a timing, that nobody compares it."""
    raw = app.env.metadata.get(app.env.docname, {}).get("nanolm") or "{}"
    module = (json.loads(raw) if isinstance(raw, str) else raw).get("module")
    exported = 0
    for cell in doctree.findall(nodes.container):
        classes = cell.get("classes", [])
        if "cell" not in classes:
            continue
        texts = [nodes.Text(text) for tag, text in LABELS.items() if tag in classes]
        if module and "tag_export" in classes:
            exported += 1
            cell["ids"].append(f"exported-{exported}")
            file = f"nanolm/{module}.py"
            number = nodes.Text(f", cell {exported}")
            texts = [nodes.Text("exported to "), nodes.literal("", file), number]
        if texts:
            cell.insert(0, nodes.container("", *texts, classes=["cell-label"]))


def tidy_page(app, pagename, templatename, context, doctree):
    """No thebe (its script is declared twice, an error on every page); "edit" opens the text."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in (script.filename or script.attributes.get("body", "")).lower()
    ]
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if "/edit/" in button.get("url", "") and button["url"].endswith(".ipynb"):
                button["url"] = button["url"].removesuffix("ipynb") + "md"


def copy_mathjax(app, config):
    """MathJax from the installed package to the static files, so that no page asks the network."""
    target = Path(app.confdir) / "book/_static/mathjax"
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("MathJax is missing: pip install sphinx-mathjax-offline")
    source = Path(found.submodule_search_locations[0]) / "static/mathjax"
    if not (target / "tex-mml-chtml.js").exists():
        for folder in ("output/chtml/fonts", "input/tex/extensions"):
            shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
        shutil.copy(source / "tex-mml-chtml.js", target)


def setup(app):
    app.connect("config-inited", copy_mathjax)
    app.connect("doctree-read", label_cells, priority=600)  # after the metadata are collected
    app.connect("html-page-context", tidy_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

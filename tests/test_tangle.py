"""Every fault the exporter must refuse, planted in a small book in a temporary folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest

from nanolm import tangle
from nanolm.tangle import Book, export, findings, read, update

ROOT = Path(__file__).resolve().parent.parent
FENCE = "`" * 3
FRONT = """---
kernelspec: {display_name: Python 3, language: python, name: python3}
nanolm: {module: MODULE}
---

"""
END = "\n## What nanolm gained\n\n<!-- gained -->\n<!-- /gained -->\n"


def cell(source, *tags):
    options = f":tags: [{', '.join(tags)}]\n\n" if tags else ""
    return f"{FENCE}{{code-cell}}\n{options}{textwrap.dedent(source).strip()}\n{FENCE}\n\n"


def exported(source):
    return cell(source, "export")


def chapter(module, title, *parts):
    return FRONT.replace("MODULE", module) + f"# {title}\n\n## Idea\n\n" + "".join(parts) + END


WORDS = chapter(
    "words",
    "Words",
    exported("import re\n\nPATTERN = '[a-z]+'  # letters"),
    exported("def words(text):\n    '''Words.'''\n    return re.findall(PATTERN, text)"),
    cell("import re\n\nprint(re.findall(PATTERN, 'a fox'))"),
)
RANKING = chapter(
    "ranking",
    "Ranking",
    exported(
        "from collections import Counter\n\nfrom nanolm.words import words\n\n\n"
        "def ranking(text):\n    return Counter(words(text)).most_common()"
    ),
    cell("print(ranking('a fox, a crow'))"),
)
MORE = chapter(
    "words",
    "More words",
    cell("from nanolm.words import words"),
    exported("import os\n\n\ndef longest(text):\n    return max(words(text), key=len) + os.sep"),
    cell("print(longest('a fox'))"),
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("book")
    (root / "book").mkdir()
    toc = [f"  - file: book/{name}" for name in ("index", "01-words", "02-ranking", "03-more")]
    (root / "_toc.yml").write_text("root: book/index\nchapters:\n" + "\n".join(toc) + "\n")
    for name, text in {"01-words": WORDS, "02-ranking": RANKING, "03-more": MORE}.items():
        (root / "book" / f"{name}.md").write_text(text)
    (root / "book/index.md").write_text("# A book\n")
    (root / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    tangle.tangle(Book(root), [])
    return root


@pytest.fixture
def book(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return Book(tmp_path)


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) >= 1, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new))


def page(book, name):
    return book.root / "book" / f"{name}.md"


def chapters(book):
    return [read(book, path) for path in book.chapters()]


def refused(book, *words):
    """The export is refused with a line that has all these words, and has written nothing."""
    before = tangle.on_disk(book)
    with pytest.raises(ValueError) as caught:
        export(book, chapters(book))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert tangle.on_disk(book) == before


def found(book, *words):
    """The check finds one thing with all these words."""
    all_found = findings(book)
    assert any(all(word in finding for word in words) for finding in all_found), all_found


# ---- a finished book ---------------------------------------------------------------------------


def test_a_finished_book_has_no_findings_and_nothing_to_run(book, capsys):
    assert findings(book) == []
    tangle.tangle(book, [])
    assert capsys.readouterr().out == ""


def test_the_module_of_two_chapters(book):
    text = book.module("words").read_text()
    assert '__all__ = [\n    "PATTERN",\n    "words",\n    "longest",\n]' in text
    assert text.index("import os\nimport re\n") < text.index("__all__")
    assert "- book/01-words.md: Words\n- book/03-more.md: More words\n" in text
    assert "PATTERN = '[a-z]+'  # letters" in text
    markers = re.findall(r"(?m)^# %% (.*) \(\w{8}\)$", text)
    assert markers == [
        "book/01-words.md, exported cell 1",
        "book/01-words.md, exported cell 2",
        "book/03-more.md, exported cell 1",
    ]


def test_gained_names_lines_and_places(book):
    text = page(book, "01-words").read_text()
    assert "[`nanolm/words.py`](../nanolm/words.py)" in text
    assert "| `words` | 2 | [Idea](#idea) |" in text
    assert "longest" not in text


def test_equal_runs_give_equal_bytes(book):
    paths = sorted(book.root.rglob("*.ipynb")) + sorted(book.root.rglob("*.py"))
    before = [path.read_bytes() for path in paths]
    tangle.tangle(book, book.chapters())
    assert [path.read_bytes() for path in paths] == before


def test_the_notebook_knows_what_it_ran_with_and_no_times(book):
    notebook = json.loads((book.root / "book/02-ranking.ipynb").read_text())
    assert list(notebook["metadata"]["ran_with"]) == ["words"]
    assert "iopub" not in json.dumps(notebook)
    assert notebook["cells"][-2]["outputs"][0]["text"] == ["[('a', 2), ('fox', 1), ('crow', 1)]\n"]


def test_the_front_door(book):
    script = """
        import sys, nanolm
        assert "nanolm.words" not in sys.modules and nanolm.__version__ == "1.2.3"
        import nanolm.words  # a module and a public name: the name stays the function
        assert callable(nanolm.words) and nanolm.words("a b") == ["a", "b"]
        assert "ranking" in dir(nanolm) and nanolm.ranking("a") == [("a", 1)]
        from nanolm import *
        assert longest
        try:
            nanolm.nothing
        except AttributeError as error:
            print(error)
    """
    run = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(run, cwd=book.root, capture_output=True, text=True)
    assert done.stdout == "module 'nanolm' has no attribute 'nothing'\n", done.stderr


@pytest.mark.parametrize("cuda, expected", [(False, "1"), (True, "None")])
def test_triton_is_told_to_interpret_without_a_gpu(book, cuda, expected):
    (book.root / "torch.py").write_text(
        f"class cuda:\n    is_available = staticmethod(lambda: {cuda})\n"
    )
    (book.root / "triton.py").write_text("import os\nprint(os.environ.get('TRITON_INTERPRET'))\n")
    script = "import sys, nanolm; assert 'torch' not in sys.modules; import triton"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, cwd=book.root, capture_output=True, text=True, env=environment)
    assert done.stdout == expected + "\n", done.stderr


# ---- cells that cannot be exported -------------------------------------------------------------


@pytest.mark.parametrize(
    "source, words",
    [
        ("print('hello')", ["stray", "print('hello')"]),
        ("x = {}\nx['a'] = 1", ["stray", "line 2"]),
        ("for i in range(3):\n    pass", ["stray", "for i"]),
        ("if True:\n    y = 1", ["stray", "if True"]),
        ("'''a text'''", ["stray"]),
        ("LIMIT = 1\nimport os", ["stray `import os`", "come first"]),
        ("import os  # why", ["without comments"]),
        ("def f(:", ["line 1"]),
        ("def words(text):\n    pass", ["`words` is already defined in book/01-words.md"]),
        ("from nanolm.words import words", ["nanolm.words imports itself"]),
        ("import nanolm.words", ["nanolm.words imports itself"]),
    ],
)
def test_a_bad_cell_is_refused_by_name(book, source, words):
    edit(
        page(book, "03-more"),
        END.split("\n<!--")[0],
        "\n" + exported(source) + "\n## What nanolm gained\n",
    )
    refused(book, "book/03-more.md, ", "cell", *words)


def test_type_checking_imports_are_allowed(book):
    source = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import os\n\nLIMIT = 3"
    edit(
        page(book, "02-ranking"),
        "## What nanolm gained",
        exported(source) + "## What nanolm gained",
    )
    export(book, chapters(book))
    assert "if TYPE_CHECKING:" in book.module("ranking").read_text()


def test_one_public_name_in_two_modules_is_refused(book):
    edit(page(book, "02-ranking"), "def ranking", "def words")
    edit(page(book, "02-ranking"), "from nanolm.words import words\n", "")
    refused(book, "`words` is public in both ranking.py and words.py")


def test_an_unknown_tag_is_refused(book):
    edit(page(book, "02-ranking"), ":tags: [export]", ":tags: [exprot]")
    refused(book, "book/02-ranking.md, code cell 1: unknown tag exprot")


def test_exports_need_a_module(book):
    edit(page(book, "02-ranking"), "nanolm: {module: ranking}\n", "")
    refused(book, "book/02-ranking.md", "names no module")


def test_a_cell_that_raises_is_named(book):
    edit(page(book, "02-ranking"), "'a fox, a crow'", "1 / 0")
    with pytest.raises(
        RuntimeError, match="(?s)book/02-ranking.md, code cell 2.*ZeroDivisionError"
    ):
        tangle.tangle(book, [page(book, "02-ranking")])


# ---- drift: every copy, changed on its own -----------------------------------------------------


def test_drift_in_the_package(book):
    edit(book.module("words"), "return re", "return  re")
    found(book, "nanolm/words.py", "-    return  re", "+    return re")


def test_drift_in_the_front_door(book):
    edit(book.module("__init__"), '"1.2.3"', '"1.2.4"')
    found(book, "nanolm/__init__.py", '+__version__ = "1.2.3"')


def test_drift_in_the_text(book):
    edit(page(book, "02-ranking"), "'a fox, a crow'", "'a crow'")
    found(book, "02-ranking.ipynb", "+print(ranking('a crow'))")


def test_drift_in_the_prose(book):
    edit(page(book, "02-ranking"), "## Idea", "## Thought")
    found(book, "02-ranking.ipynb", "+## Thought")


def test_drift_in_the_notebook(book):
    edit(book.root / "book/02-ranking.ipynb", "a fox, a crow", "a crow")
    found(book, "02-ranking.ipynb", "-print(ranking('a crow'))")


def test_drift_in_the_tags(book):
    edit(
        page(book, "02-ranking"),
        "```{code-cell}\nprint",
        "```{code-cell}\n:tags: [approx-figure]\n\nprint",
    )
    found(book, "02-ranking.ipynb", "approx-figure")


def test_drift_in_what_was_gained(book):
    edit(page(book, "01-words"), "| `words` | 2 |", "| `words` | 3 |")
    found(book, "01-words.md", "+| `words` | 2 |")


def test_a_chapter_without_a_place_for_what_was_gained(book):
    edit(page(book, "01-words"), "<!-- /gained -->", "")
    found(book, "book/01-words.md has no (single) place")


def test_orphan(book):
    (book.root / "nanolm/old.py").write_text("x = 1\n")
    found(book, "orphan", "nanolm/old.py")


def test_missing_module_and_missing_notebook(book):
    book.module("ranking").unlink()
    (book.root / "book/01-words.ipynb").unlink()
    found(book, "nanolm/ranking.py", "+def ranking")
    found(book, "book/01-words.md was never run")


def change_notebook(book, change):
    path = book.root / "book/02-ranking.ipynb"
    notebook = nbformat.read(path, 4)
    change(notebook.cells[-2])
    nbformat.write(notebook, path)


def test_a_cell_never_run(book):
    change_notebook(book, lambda cell: cell.update(execution_count=None))
    found(book, "02-ranking.ipynb, code cell 2 was never run")


def test_a_cell_that_complains(book):
    change_notebook(book, lambda cell: cell.outputs[0].update(name="stderr"))
    found(book, "02-ranking.ipynb, code cell 2 writes to the error stream")


def test_a_changed_module_makes_those_stale_that_rest_on_it_and_no_others(book, capsys):
    edit(page(book, "01-words"), "[a-z]+", "[a-z0-9]+")
    export(book, chapters(book))
    capsys.readouterr()
    found(book, "02-ranking.ipynb ran with another words")
    found(book, "03-more.ipynb ran with another words")
    tangle.tangle(book, [])
    ran = re.findall(r"ran (\S+) in", capsys.readouterr().out)
    assert ran == ["book/01-words.md", "book/02-ranking.md", "book/03-more.md"]
    edit(page(book, "02-ranking"), "most_common()", "most_common(9)")
    tangle.tangle(book, [])
    assert re.findall(r"ran (\S+) in", capsys.readouterr().out) == ["book/02-ranking.md"]
    assert findings(book) == []


def test_resting_on_a_module_through_another_and_through_the_front_door():
    texts = {
        "a": '__all__ = [\n    "x",\n]\nx = 1\n',
        "b": "def f():\n    from nanolm.a import x\n",
        "c": "",
    }
    assert list(tangle.rests_on("import nanolm.b", "nanolm", texts)) == ["a", "b"]
    assert list(tangle.rests_on("from nanolm import x", "nanolm", texts)) == ["a"]
    assert list(tangle.rests_on("import nanolm", "nanolm", texts)) == ["a"]
    assert list(tangle.rests_on("import torch", "nanolm", texts)) == []


# ---- the way back ------------------------------------------------------------------------------


def test_an_edit_of_the_package_is_never_overwritten(book):
    edit(book.module("words"), "max(", "min(")
    refused(book, "nanolm/words.py was edited by hand", "book/03-more.md, exported cell 1")


def without_a_cell(text):
    return re.sub(r"(?s)# %% book/01-words.md, exported cell 2 .*?(?=# %%)", "", text)


def with_two_markers_swapped(text):
    one, two = re.findall(r"(?m)^# %% book/01-words.md.*$", text)
    return text.replace(one, "@").replace(two, one).replace("@", two)


OUTSIDE = {
    "an import": lambda text: text.replace("import os\n", "import os\nimport sys\n"),
    "the docstring": lambda text: text.replace("derived in", "from"),
    "a public name": lambda text: text.replace('    "longest",\n', ""),
    "a constant": lambda text: text.replace("\n\n\n# %%", "\nLIMIT = 3\n\n\n# %%", 1),
    "a cell deleted": without_a_cell,
    "markers swapped": with_two_markers_swapped,
    "a line above the seal": lambda text: "import sys\n" + text,
    "the seal and an import": lambda text: text.partition("\n")[2].replace(
        "import os\n", "import os\nimport sys\n"
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_edit_outside_the_cells_is_refused_both_ways(book, name):
    file = book.module("words")
    whole = file.read_text()
    file.write_text(OUTSIDE[name](whole))
    assert file.read_text() != whole
    refused(book, "nanolm/words.py was edited by hand outside its cells", "git checkout")
    with pytest.raises(ValueError, match="nanolm/words.py was edited by hand outside its cells"):
        update(book)
    file.write_text(whole)
    export(book, chapters(book))
    assert file.read_text() == whole


def test_an_edit_of_the_front_door_is_refused(book):
    edit(book.module("__init__"), "import types\n", "import types\nimport json\n")
    refused(book, "nanolm/__init__.py was edited by hand")


def test_a_file_without_a_seal_that_says_what_the_chapters_say_gets_one(book):
    file = book.module("words")
    whole = file.read_text()
    file.write_text(whole.partition("\n")[2])
    export(book, chapters(book))
    assert file.read_text() == whole


@pytest.mark.parametrize("name", ["disk", "encode"])
def test_a_failed_write_leaves_nothing_behind(book, monkeypatch, name):
    before, texts = sorted(book.root.rglob("*")), {"disk": "x", "encode": "\ud800"}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises((OSError, UnicodeEncodeError)):
        tangle.write(book.module("words"), texts[name])
    assert sorted(book.root.rglob("*")) == before


def test_update_finds_the_right_chapter_of_several(book):
    edit(book.module("words"), "max(", "min(")
    edit(book.module("words"), "'''Words.'''", "'''All words.'''")
    assert update(book) == ["book/01-words.md", "book/03-more.md"]
    assert "min(words(text)" in page(book, "03-more").read_text()
    assert "All words" in page(book, "01-words").read_text()
    tangle.tangle(book, [])
    assert findings(book) == []


def test_update_finds_a_cell_that_has_moved(book):
    edit(book.module("words"), "max(", "min(")
    edit(page(book, "03-more"), "## Idea\n\n", "## Idea\n\n" + exported("LIMIT = 3"))
    assert update(book) == ["book/03-more.md"]
    assert "min(words(text)" in page(book, "03-more").read_text()


@pytest.mark.parametrize(
    "fault",
    [
        lambda book: edit(page(book, "03-more"), "key=len", "key=str.__len__"),  # both sides edited
        lambda book: edit(book.module("words"), "import os\n", "import os.path\n"),
        lambda book: edit(book.module("words"), "def words", "print(1)\n\n\ndef words"),
        lambda book: edit(book.module("words"), "def words", "def longest"),
        lambda book: book.module("words").write_text(  # a marker is lost
            re.sub(r"# %% book/03-more.*\n", "", book.module("words").read_text())
        ),
        lambda book: book.module("words").write_text(book.module("words").read_text() + "\n(\n"),
    ],
)
def test_an_unclear_update_is_refused_as_a_whole(book, fault):
    edit(book.module("words"), "max(", "min(")
    fault(book)
    texts = [path.read_text() for path in book.chapters()]
    with pytest.raises(ValueError):
        update(book)
    assert [path.read_text() for path in book.chapters()] == texts


def test_update_with_the_same_text_twice_is_unclear(book):
    edit(
        page(book, "01-words"),
        "## What nanolm gained",
        cell("PATTERN = '[a-z]+'  # letters") + "## What nanolm gained",
    )
    edit(book.module("words"), "# letters", "# small letters")
    with pytest.raises(ValueError, match="unclear"):
        update(book)


# ---- the command -------------------------------------------------------------------------------


def test_command(book, monkeypatch, capsys):
    monkeypatch.chdir(book.root)
    assert tangle.main(["--check"]) == 0
    assert "agree" in capsys.readouterr().out
    edit(book.module("words"), "max(", "min(")
    assert tangle.main(["--check"]) == 1
    assert tangle.main([]) == 2
    assert capsys.readouterr().err.startswith("tangle: error: nanolm/words.py was edited by hand")
    assert tangle.main(["--update"]) == 0
    assert "updated book/03-more.md" in capsys.readouterr().out
    assert tangle.main(["--check"]) == 0


@pytest.mark.parametrize("arguments", [[], ["--check"], ["--update"], ["book/01-words.md"]])
def test_command_in_another_folder(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert tangle.main(arguments) == 2
    said = capsys.readouterr().err
    assert (
        f"no _toc.yml in {tmp_path}: run this at the root of the book" in said
        and said.count("\n") == 1
    )


def test_command_with_files_leaves_the_rest_alone(book, monkeypatch, capsys):
    monkeypatch.chdir(book.root)
    edit(page(book, "03-more"), "def longest(", "def longest(:")
    page(book, "01-words").rename(book.root / "away")
    assert tangle.main(["book/02-ranking.md"]) == 0
    assert tangle.main([]) == 2
    assert tangle.main(["book/09-none.md"]) == 2
    assert "book/09-none.md is not a chapter" in capsys.readouterr().err


def test_a_main_is_started_when_the_module_is(book):
    edit(page(book, "02-ranking"), "def ranking", "def main():\n    print('hi')\n\n\ndef ranking")
    export(book, chapters(book))
    assert book.module("ranking").read_text().endswith("\n\n\n" + tangle.START)
    run = [sys.executable, "-m", "nanolm.ranking"]
    done = subprocess.run(run, cwd=book.root, capture_output=True, text=True)
    assert done.stdout == "hi\n", done.stderr


def test_the_package_is_as_ruff_wants_it(book):
    names = ["LONG" * 6, "Long" * 6, "long" * 6, "T", "of", "Of", "OF", "loNg" * 6]
    source = f"import numpy as np\nfrom typing import Any, cast\nfrom a import {', '.join(names)}\n"
    uses = "".join(f"    print({name})\n" for name in ["np", "Any", "cast", *names])
    source += f"\n\ndef use():\n{uses}"
    edit(
        page(book, "02-ranking"),
        "## What nanolm gained",
        exported(source) + "## What nanolm gained",
    )
    edit(page(book, "01-words"), "'", '"')
    export(book, chapters(book))
    config = ["--config", str(ROOT / "pyproject.toml")]
    for command in (["check", "--ignore", "E501"], ["format", "--diff"]):
        run = [sys.executable, "-m", "ruff", *command, *config, str(book.root / "nanolm")]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_chapter_may_list_its_public_names(book):
    edit(
        page(book, "01-words"),
        "nanolm: {module: words}",
        "nanolm: {module: words, public: [words]}",
    )
    export(book, chapters(book))
    assert '__all__ = [\n    "words",\n]' in book.module("words").read_text()
    front = book.module("__init__").read_text()
    assert '"words": "words"' in front and "PATTERN" not in front


def test_a_public_name_must_be_defined(book):
    edit(
        page(book, "01-words"),
        "nanolm: {module: words}",
        "nanolm: {module: words, public: [wrods]}",
    )
    refused(book, "01-words", "`wrods`", "public")

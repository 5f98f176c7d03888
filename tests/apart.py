"""A Python of its own for a test, which has to choose what Triton does before it is imported."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


NO_TRITON = """
    import sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Refuse())
"""  # the beginning of a script for a machine without Triton


def python(script, **environment):
    """What a script prints in a process of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    run = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def unmeasured(**more):
    """An environment in which coverage does not look: it is slow, and an interrupt may lock it."""
    return {k: v for k, v in os.environ.items() if k != "COVERAGE_PROCESS_CONFIG"} | more


def compiled_rows(gate, *lots):
    """The rows that tests/GATE.py prints of kernels compiled for cards that are not here.

    With lots of words, a process for each lot.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = unmeasured(PYTHONPATH=path, TRITON_INTERPRET="0")
    script = [sys.executable, str(ROOT / "tests" / f"{gate}.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [
        subprocess.Popen([*script, *lot], text=True, env=environment, **pipes)
        for lot in lots or [()]
    ]
    said = [run.communicate() for run in runs]
    assert not any(run.returncode for run in runs), "".join(error for _, error in said)[-3000:]
    return [row for out, _ in said for row in json.loads(out)]

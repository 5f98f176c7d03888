"""What nbval leaves out: pictures by their pixels, cells never run, results lost to a semicolon.

A figure drawn again by the same matplotlib is equal to the last bit, so the tolerance is tiny.
Cells tagged `approx-figure` draw numbers from training, which differ a little between processors.
"""

import base64
import importlib.util
import io
import os
import tempfile
import uuid

import nbval.kernel
import numpy as np
import pytest
from jupyter_client.manager import KernelManager
from matplotlib.image import imread
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell, NbCellError

os.environ.update(OMP_NUM_THREADS="2", PYTHONHASHSEED="0")  # as the notebooks were run
os.environ.pop("MPLBACKEND", None)

# Triton is to be had for Linux only
NEED_TRITON = ["book/10-honest.ipynb", "book/18-interpret.ipynb"]
collect_ignore = [] if importlib.util.find_spec("triton") else NEED_TRITON

RMS = 0.05  # root mean square difference, of 255
APPROX_RMS = 3.0


def execute_cell_input(self, source, allow_stdin=None):
    """As nbval's, but with history: without it IPython overlooks a trailing semicolon."""
    return self.kc.execute(source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)


def stop(self):
    """As nbval's, but the kernel may finish: it has a coverage report to write."""
    self.kc.stop_channels()
    self.km.shutdown_kernel(now=False)


RunningKernel.execute_cell_input, RunningKernel.stop = execute_cell_input, stop
SOCKETS = tempfile.TemporaryDirectory(prefix="nanolm-")


class Uncovered(KernelManager):
    """Starts kernels that coverage does not look at: a chapter defines again what is measured."""

    def start_kernel(self, **options):
        environment = options.pop("env", os.environ)
        names = environment.keys() - {"COVERAGE_PROCESS_CONFIG"}
        return super().start_kernel(**options, env={name: environment[name] for name in names})


def kernel_manager(**options):
    """Kernels started at the same moment may pick the same port: talk through files instead."""
    if os.name != "nt":
        options |= {
            "transport": "ipc",
            "connection_file": f"{SOCKETS.name}/{uuid.uuid4().hex}.json",
        }
    return Uncovered(**options)


nbval.kernel.KernelManager = kernel_manager


def pictures(outputs):
    for output in outputs:
        if "image/png" in output.get("data", {}):
            data = base64.b64decode(output["data"]["image/png"])
            yield imread(io.BytesIO(data), format="png") * 255


def picture_difference(stored, new, tolerance=RMS):
    """What differs between the pictures of two lists of outputs; empty if nothing does."""
    stored, new = list(pictures(stored)), list(pictures(new))
    if len(stored) != len(new):
        return f"{len(stored)} pictures became {len(new)}"
    for number, (a, b) in enumerate(zip(stored, new, strict=True), 1):
        if a.shape != b.shape:
            return f"picture {number}: {a.shape} became {b.shape}"
        rms = float(np.sqrt(np.mean((a - b) ** 2)))
        if rms > tolerance:
            return f"picture {number}: root mean square difference {rms:.2f} of 255"
    return ""


class Comparison:
    """nbval's own comparison of one cell, and then the pictures."""

    def __init__(self, item):
        self.item, self.plain = item, item.compare_outputs
        tags = item.cell.metadata.get("tags", [])
        self.tolerance = APPROX_RMS if "approx-figure" in tags else RMS

    def __call__(self, new, stored, skip_compare=None):
        if not self.plain(new, stored, skip_compare):
            return False
        why = picture_difference(stored, new, self.tolerance)
        if why:
            self.item.comparison_traceback = [why]
        return not why


def pytest_collection_modifyitems(items):
    for item in items:
        if isinstance(item, IPyNbCell):
            item.compare_outputs = Comparison(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    if not isinstance(item, IPyNbCell) or not item.cell.source.strip():
        return
    if item.cell.execution_count is None or item.options["skip"]:
        why = "this cell was never run, or is told to be skipped"
        raise NbCellError(item.cell_num, why, item.cell.source)

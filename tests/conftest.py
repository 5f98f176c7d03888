"""Settings for all tests: the same examples every time, and no clock on a busy machine."""

import signal
import sys
import threading

import pytest
from hypothesis import HealthCheck, settings

import nanolm  # noqa: F401  # before anything else imports Triton: it sees to it that kernels run

if threading.current_thread() is threading.main_thread():  # a job in the background may have been
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started deaf to Ctrl-C

settings.register_profile(
    "nanolm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("nanolm")


SEEN = set()  # tests of which a case was measured


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Let coverage see one case of each test: it slows interpreted kernels threefold."""
    function, tracer = (item.path, getattr(item, "originalname", item.name)), sys.gettrace()
    if function in SEEN:
        sys.settrace(None)
    SEEN.add(function)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)

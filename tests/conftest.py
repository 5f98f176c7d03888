"""Settings for all tests: the same examples every time, and no clock on a busy machine."""

import signal
import threading

from hypothesis import HealthCheck, settings

import nanolm  # noqa: F401  # before anything else imports Triton: it sees to it that kernels run

if threading.current_thread() is threading.main_thread():  # a job in the background may have been
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started deaf to Ctrl-C

settings.register_profile(
    "nanolm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("nanolm")

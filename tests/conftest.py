"""Settings for all tests: the same examples every time, and no clock on a busy machine."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "nanolm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("nanolm")

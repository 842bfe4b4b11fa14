"""What holds for every test: the environment, hypothesis's examples, and where the fixtures are."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray lowers its workers' priority to 15, at which they stand still beside the other tests' processes
os.environ.setdefault("RAY_worker_niceness", "0")
# models this small gain nothing from a second thread, and lose much where other processes want the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis

# in CI the same examples every time: a red run must be the change's doing; elsewhere new ones are looked for
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

pytest_plugins = ["own_time"]


def pytest_configure(config):
    """The process that only hands tests to others need not wait for PyTorch."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.import_plugin("small_things")
    else:
        gc.enable()  # which `own_time` does once tests are collected, but none are here

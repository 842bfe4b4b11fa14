"""A test that is not marked slow takes three seconds of the processor at most, or fails: `make quick` stays quick.

A run of all tests only warns of it: a processor's second is worth less on a busy machine, and slow tests run beside it.
The files that take longest start first, so that at the end no process waits for one of them.
"""

from __future__ import annotations

import gc
import os

import pytest

gc.disable()  # until everything is imported: see `pytest_collection_finish`

QUICK_SECONDS = 3.0
LONGEST = (
    "test_control.py",
    "test_terminal.py",
    "test_cluster.py",
    "test_faults.py",
    "test_end_to_end.py",
    "test_local_sweep.py",
    "test_tutorial.py",
    "test_gpu.py",
    "test_architecture.py",
    "test_how_to.py",
    "test_report.py",
    "test_benchmarks.py",
    "test_damaged_results.py",
    "test_config_fuzz.py",
)
"""Files by the processor's time that their tests take, from five minutes to twenty seconds."""

_shared_seconds = 0.0
_began = pytest.StashKey[float]()


def _own_seconds():
    """The processor's time, so that a busy machine fails no test; without that of fixtures that others use too."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system - _shared_seconds


def pytest_collection_modifyitems(items):
    """With `--no-loadscope-reorder`, the processes take up files in this order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_collection_finish():
    """What is imported stays; the garbage collector took a fifth of the tests' time to look through it."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """What is made once for many tests is not the first one's own time."""
    global _shared_seconds
    before = _own_seconds()
    try:
        return (yield)
    finally:
        if fixturedef.scope != "function":
            _shared_seconds += _own_seconds() - before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Look at the clock."""
    item.stash[_began] = _own_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Look again; tracing for coverage is not the test's doing."""
    result = yield
    seconds = _own_seconds() - item.stash[_began]
    if seconds > QUICK_SECONDS and not (item.get_closest_marker("slow") or item.config.getoption("cov_source", None)):
        told = f"{seconds:.1f} s of processor time: make it quicker, or mark it slow"
        if "not slow" in item.config.getoption("markexpr"):
            pytest.fail(told, pytrace=False)
        item.warn(pytest.PytestWarning(told))
    return result

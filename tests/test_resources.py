"""How many trials run at once, and with what: from the GPUs found, else from the cores."""

from __future__ import annotations

import pickle
import threading

import pytest
from ray import cloudpickle

from stillroom.config import Sweep
from stillroom.errors import UserError
from stillroom.experiment.ray_sweep import _watcher, told_of_memory
from stillroom.experiment.resources import process_resources, trial_resources

SEEDS = {"seeds": (0,)}


@pytest.mark.parametrize(
    ("settings", "cluster", "resources", "concurrent"),
    [
        ({}, {"CPU": 112, "GPU": 28}, {"CPU": 4, "GPU": 1}, 28),
        ({}, {"CPU": 16, "GPU": 8}, {"CPU": 2, "GPU": 1}, 8),
        ({"gpus_per_trial": 0.5}, {"CPU": 8, "GPU": 1}, {"CPU": 4, "GPU": 0.5}, 2),
        ({"max_concurrent": 3}, {"CPU": 64, "GPU": 8}, {"CPU": 4, "GPU": 1}, 3),
        ({}, {"CPU": 2}, {"CPU": 2}, 1),
        ({"cpus_per_trial": 1}, {"CPU": 2}, {"CPU": 1}, 2),
        ({"gpus_per_trial": 0, "cpus_per_trial": 2}, {"CPU": 8, "GPU": 4}, {"CPU": 2}, 4),
        ({"gpus_per_trial": 2}, {"CPU": 32, "GPU": 5}, {"CPU": 4, "GPU": 2}, 2),
        ({"gpus_per_trial": 2, "cpus_per_trial": 1}, {"CPU": 4}, {"CPU": 2}, 2),
    ],
)
def test_concurrency_follows_the_gpus_else_the_cores(settings, cluster, resources, concurrent):
    """As many trials as the GPUs allow; fewer cores than asked for do not stop a study."""
    assert trial_resources(Sweep(**SEEDS, **settings), [cluster]) == (resources, concurrent)


def test_more_gpus_than_there_are_is_said():
    """A trial that could never start would wait for ever."""
    with pytest.raises(UserError, match=r"gpus_per_trial: 4 asked for, 2 found"):
        trial_resources(Sweep(**SEEDS, gpus_per_trial=4), [{"CPU": 8, "GPU": 2}])


def test_a_trial_of_several_processes_may_use_gpus_of_several_nodes():
    """A node's own GPUs need not be enough: Ray Train places each process for itself."""
    nodes = [{"CPU": 16, "GPU": 2}] * 3
    assert process_resources(Sweep(**SEEDS, gpus_per_trial=4), nodes) == ({"CPU": 1, "GPU": 1}, 1)
    assert process_resources(Sweep(**SEEDS, gpus_per_trial=2, cpus_per_trial=8), nodes) == ({"CPU": 4, "GPU": 1}, 3)
    assert process_resources(Sweep(**SEEDS, gpus_per_trial=2), [{"CPU": 2}]) == ({"CPU": 1}, 1)
    with pytest.raises(UserError, match=r"gpus_per_trial: 8 asked for; the cluster has room for 6 processes"):
        process_resources(Sweep(**SEEDS, gpus_per_trial=8), nodes)


def test_a_machine_without_memory_is_a_message_not_a_traceback():
    """Tune's own error for a worker killed at its start names the remedy; any other error stays what it is."""
    with pytest.raises(UserError, match=r"sweep\.max_concurrent"), told_of_memory(2):
        raise RuntimeError("Caught unexpected exception: 1 worker(s) were killed due to the node running low on memory")
    with pytest.raises(RuntimeError, match="something else"), told_of_memory(2):
        raise RuntimeError("something else")


def test_a_head_that_gives_no_core_takes_none_from_the_others():
    """Kubernetes' head has a GPU for the teacher and no core: no trial fits it, and each worker's has its cores."""
    nodes = [{"GPU": 1}, *[{"CPU": 8, "GPU": 1}] * 3]
    assert trial_resources(Sweep(**SEEDS), [{"CPU": 0, "GPU": 1}, *nodes[1:]]) == ({"CPU": 4, "GPU": 1}, 3)
    assert trial_resources(Sweep(**SEEDS), nodes) == ({"CPU": 4, "GPU": 1}, 3)


def test_what_watches_a_sweep_is_not_saved_with_it():
    """Ray pickles a sweep's callbacks: a terminal's bars have locks, which nothing can pickle."""
    lock, seen = threading.RLock(), []

    def watch(event, facts):
        with lock:
            seen.append((event, facts))

    watcher = _watcher(watch)
    copy = pickle.loads(cloudpickle.dumps(watcher))
    for callback in (watcher, copy):
        callback.on_trial_start(1, [], type("Trial", (), {"config": {"trial": "one"}}))
    assert seen == [("started", {"trial": "one"})]

"""On a Ray cluster of two nodes: capture by workers, a node killed in mid-sweep, a node that sees something else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

import processes
import stillroom
from stillroom.errors import UserError
from stillroom.experiment.workspace import Workspace
from stillroom.files import read_json
from stillroom.folders import ERROR, EXPERIMENT
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.studies import load_study
from stillroom.training.checkpoints import PROGRESS, checkpoints
from studies import study_file

pytestmark = pytest.mark.slow

SOURCES = str(Path(stillroom.__file__).parents[1])
TIMES = {"train_seconds", "evaluation_seconds", "data_wait_seconds"}
QUICK = {"health_check_period_ms": 500, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 500}


@pytest.fixture(scope="module")
def cluster():
    """A head with one core. Its temporary folder is its own, so that no other Ray on this machine joins it."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: sockets lie in it
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        # a Ray that an earlier test had for this machine alone listens on 127.0.0.1, where no other node reaches it
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", True)
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": QUICK, "object_store_memory": 10**8}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def second_node(cluster):
    """Another node with one core."""
    node = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    yield node
    cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def strange_node(cluster, tmp_path):
    """A node with another stillroom, to which `results` is an empty folder."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs `unshare -m` to hide a folder from one node, and this system does not allow it")
    shutil.copytree(Path(SOURCES) / "stillroom", tmp_path / "other" / "stillroom")
    (tmp_path / "other" / "stillroom" / "__init__.py").write_text('__version__ = "0"\n')
    ray = f"{sys.executable} -m ray.scripts.scripts start --address={cluster.address} --num-cpus=1 --block"
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {tmp_path / 'results'} && exec {ray}"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "other")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert any("Ray runtime started" in line for line in process.stdout)
    yield process
    process.terminate()
    process.wait(60)


def start_sweep(log, path, cluster):
    """`stillroom sweep` in a process of its own, on the cluster."""
    of_ray = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    return processes.stillroom(log, "sweep", path, "--set", f"sweep.address={cluster.address}", environ=of_ray)


def ended(running, code=0):
    """Its output, once it ended with the exit code."""
    assert running.end(900) == code, running.output
    return running.output


def children(pid):
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def raylet(node):
    """The process that is a node: its workers are the children."""
    return node.all_processes["raylet"][0].process.pid


def unfinished_trial_on(node, results):
    """A trial of that node that has finished an epoch and has no result yet, once there is one; and its epochs so far.

    By the lock that its process holds and its own checkpoint: Ray writes down what was reported some ten seconds later.
    """
    deadline = time.monotonic() + 800
    while time.monotonic() < deadline:
        workers = children(raylet(node))
        for folder in (results / EXPERIMENT).glob("trial_*"):
            with suppress(OSError, UserError):  # a process that ends, a checkpoint that the next one replaces
                held = any(has_open(worker, folder / ".lock") for worker in workers)
                if held and (kept := checkpoints(folder)) and not (folder / "result.json").exists():
                    return folder.name, read_json(kept[-1] / PROGRESS)["epochs"]
        time.sleep(0.02)
    return pytest.fail("no trial finished an epoch on the second node")


def has_open(pid, path):
    """Whether a process has a file open."""
    return any(file.exists() and file.readlink() == path for file in Path(f"/proc/{pid}/fd").iterdir())


def kill(node):
    """End a node as a power cut does: the raylet first, then the workers it had."""
    workers = children(raylet(node))
    os.kill(raylet(node), signal.SIGKILL)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)


@contextmanager
def threads(count):
    """So many of torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def numbers(result):
    """A trial's result without its times."""
    plain = {key: value for key, value in result.items() if key not in TIMES}
    return {**plain, "epochs": [{k: v for k, v in e.items() if k not in TIMES} for e in result["epochs"]]}


@pytest.fixture
def study(tmp_path, teacher_ref, student_ref):
    """A study file: a trial for each node and one that waits, with epochs enough for one to be seen and killed."""
    training = {"epochs": 6, "precision": "float32", "gradient_interval": 2}
    sweep = {"seeds": [0, 1, 2], "cpus_per_trial": 1, "retries": 0}
    (tmp_path / "results").mkdir()
    pair = (teacher_ref.model, student_ref.model)
    return study_file(tmp_path, *pair, training=training, sweep=sweep, groups=["combined"])


def archived(path, *overrides, **capture):
    """The study's stages, its teacher's data captured, verified and archived."""
    workspace = Workspace(load_study(path, overrides))
    workspace.capture(**capture)
    workspace.verify()
    workspace.archive()
    return workspace


def test_workers_on_a_cluster_make_the_store_of_one_process(tmp_path, study, cluster, second_node):
    """The same files, byte for byte, and the same manifest; each node captured some of them."""
    with threads(1):  # as many as a worker has
        alone = archived(study, f"paths.store={tmp_path / 'alone'}", f"paths.results={tmp_path / 'results_alone'}")
    shown = []
    workspace = Workspace(load_study(study, [f"sweep.address={cluster.address}"]), lambda *facts: shown.append(facts))
    workspace.capture(workers=2)
    manifests = [dict(SignalStore.open(w.store_path).manifest) for w in (workspace, alone)]
    for manifest in manifests:
        manifest.pop("created"), manifest.pop("manifest_sha256", None)
    assert manifests[0] == manifests[1]
    locks = {path.name for path in workspace.store_path.glob(".lock*")}
    assert locks == {".lock-1-of-2", ".lock-2-of-2"}
    total = len(workspace.examples.all)
    assert ("capturing the teacher's signals, examples", total, total) in shown


def test_trials_of_a_killed_node_go_on_elsewhere_with_the_same_numbers(tmp_path, study, cluster, second_node):
    """A node dies in mid-sweep: without a retry allowed, every trial still ends, and as it does on one machine."""
    archived(study)
    sweep = start_sweep(tmp_path / "log", study, cluster)
    name, before = unfinished_trial_on(second_node, tmp_path / "results")
    kill(second_node)
    ended(sweep)
    folder = tmp_path / "results" / EXPERIMENT
    assert len(list(folder.glob("trial_*/result.json"))) == 3
    assert not list(folder.glob(f"trial_*/{ERROR}"))
    resumed = read_json(folder / name / "result.json")
    kept = [epoch["train_seconds"] for epoch in before]
    assert [epoch["train_seconds"] for epoch in resumed["epochs"]][: len(kept)] == kept  # not trained again
    alone = Workspace(load_study(study, [f"paths.results={tmp_path / 'alone'}"]))
    for trial in sorted(folder.glob("trial_*")):
        result = read_json(trial / "result.json")
        with threads(1):  # as many as a trial on the cluster had
            expected = alone.train_one(result["config"]["distill_type"], result["config"]["seed"])
        assert numbers(result) == numbers(json.loads(json.dumps(expected))), trial.name


def test_a_student_is_shared_out_over_two_nodes(tmp_path, study, cluster, second_node):
    """Each node has one core, so neither holds both processes; the losses are those of one process within rounding."""
    changes = ["groups=[combined]", "sweep.seeds=[0]", "training.epochs=2"]
    archived(study, *changes)
    workspace = Workspace(load_study(study, [*changes, "sweep.gpus_per_trial=2", f"sweep.address={cluster.address}"]))
    assert workspace.sweep() == {}
    (path,) = (tmp_path / "results" / EXPERIMENT).glob("trial_*/result.json")
    alone = Workspace(load_study(study, [*changes, f"paths.results={tmp_path / 'alone'}"]))
    expected, result = alone.train_one("combined", 0), read_json(path)
    assert path.parent.name == result["trial"] == expected["trial"], "the name says nothing of processes"
    for row, other in zip(expected["metrics"], result["metrics"], strict=True):
        assert other == {**row, "value": pytest.approx(row["value"], rel=1e-4)}


def test_a_node_that_sees_something_else_is_named_before_any_trial(tmp_path, study, cluster, strange_node):
    """Another version of the package there, and no such folder: both are said, with the node; nothing is begun."""
    archived(study)
    output = " ".join(ended(start_sweep(tmp_path / "log", study, cluster), code=2).split())
    assert re.search(
        r"error: every node must see .* node \S+ \([\d.]+\): its stillroom \(\S+\) is not the one used here", output
    )
    assert "corpus is not there" in output
    assert f"{EXPERIMENT} is not the folder of that name here" in output
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "results" / EXPERIMENT).iterdir()] == [".lock"]


def test_no_cluster_at_the_address_is_said(study, monkeypatch):
    """Of the study or of RAY_ADDRESS, which Ray's users set; a Ray client's address is told what to use instead."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"no Ray cluster can be joined at 127.0.0.1:1 .*leave both out"):
        Workspace(load_study(study)).capture(workers=1)
    with pytest.raises(UserError, match="ray://head:10001 is a Ray client's address"):
        Workspace(load_study(study, ["sweep.address=ray://head:10001"])).capture(workers=1)

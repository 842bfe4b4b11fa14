"""A sweep on this machine without Ray: the same numbers, and nothing that happens to one process harms the rest."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from processes import descendants, stillroom, wait_for
from setups import numbers
from small_things import STUDENT_SHAPE, write_model
from stillroom.config import ModelRef, Sweep
from stillroom.errors import UserError
from stillroom.experiment import local_sweep
from stillroom.experiment.local_sweep import sweep
from stillroom.experiment.local_worker import OUTPUT, Forks
from stillroom.experiment.resources import cores, slots
from stillroom.experiment.workspace import Workspace
from stillroom.files import exclusive, read_json
from stillroom.folders import ERROR, TrialFolder
from stillroom.studies import load_study
from studies import study_file

linux = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's fork, signals and /proc")


@pytest.mark.parametrize(
    ("devices", "gpus", "expected"),
    [
        (["0", "1"], 1, [["0"], ["1"]]),
        (["0", "1"], 0.5, [["0"], ["1"], ["0"], ["1"]]),
        (["0"], 0.1, [["0"]] * 10),
        (["0", "1"], 0.4, [["0"], ["1"], ["0"], ["1"]]),
        (["3", "GPU-5a", "7"], 2.0, [["3", "GPU-5a"]]),
    ],
)
def test_devices_are_shared_out(devices, gpus, expected):
    """None is given to more trials than fit it, and the first trials stand on devices of their own."""
    assert slots(devices, gpus) == expected


def test_trials_see_their_devices_alone(monkeypatch):
    """By the names that this process was given; on a CPU they see none; threads are a trial's cores."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local_sweep, "cores", lambda: 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    places, threads = local_sweep._places(Sweep(seeds=(0,), gpus_per_trial=0.5, cpus_per_trial=2, max_concurrent=3))
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["4", "6", "4"]
    assert (threads, places[0]["OMP_NUM_THREADS"]) == (2, "2")
    places, threads = local_sweep._places(Sweep(seeds=(0,), gpus_per_trial=0, cpus_per_trial=4))
    assert ([place["CUDA_VISIBLE_DEVICES"] for place in places], threads) == (["", ""], 4)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_container_has_the_cores_of_its_share(tmp_path, monkeypatch, files, expected):
    """A share of two cores of a large machine is not taken for the machine, whose memory it has not."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert cores(tmp_path) == expected


@pytest.mark.parametrize(
    ("devices", "gpus", "expected"), [(2, 0.35, 4), (2, 0.5, 4), (3, 1.0, 3), (4, 2.0, 2), (5, 2.0, 2), (1, 0.3, 3)]
)
def test_as_many_trials_are_planned_as_run(monkeypatch, devices, gpus, expected):
    """A trial has its part of one device: what is left over of two devices is no third place."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    monkeypatch.setattr(local_sweep, "cores", lambda: 16)
    settings = Sweep(seeds=(0,), gpus_per_trial=gpus)
    assert local_sweep.describe_machine(settings)["trials at once"] == expected
    assert len(local_sweep._places(settings)[0]) == expected


@pytest.mark.parametrize(
    ("settings", "environ", "system", "expected"),
    [
        ({}, {}, "posix", "local"),
        ({}, {"RAY_ADDRESS": "head:6379"}, "posix", "ray"),
        ({"address": "auto"}, {}, "posix", "ray"),
        ({"storage": "s3://bucket/ray"}, {}, "posix", "ray"),
        ({"launcher": "ray"}, {}, "posix", "ray"),
        ({"launcher": "local"}, {"RAY_ADDRESS": "head:6379"}, "posix", "local"),
        ({}, {}, "nt", "ray"),
    ],
)
def test_a_cluster_is_rays_and_one_machine_is_not(settings, environ, system, expected):
    """A study that names no launcher gets Ray just where a cluster is named, or where there are no forks."""
    assert Sweep(seeds=(0,), **settings).launched_by(environ, system) == expected


def test_a_cluster_without_ray_is_refused():
    """An address that is not used would be a cluster that stands idle."""
    with pytest.raises(ValueError, match="address is Ray's, but launcher is local"):
        Sweep(seeds=(0,), launcher="local", address="auto")


@pytest.fixture(scope="module")
def archived(tmp_path_factory, teacher_ref, sentencepiece):
    """A study of four trials, of a student with dropout, whose teacher data is archived: its file."""
    folder = tmp_path_factory.mktemp("local")
    student = write_model(folder / "student", sentencepiece, {**STUDENT_SHAPE, "attention_dropout": 0.2}, 3)
    path = study_file(
        folder,
        teacher_ref.model,
        student.model,
        training={"epochs": 3, "precision": "float32", "gradient_interval": 2},
        sweep={"seeds": [0, 1], "cpus_per_trial": 1, "retries": 1, "max_concurrent": 2, "launcher": "local"},
    )
    workspace = Workspace(load_study(path))
    workspace.capture()
    workspace.verify()
    workspace.archive()
    return folder, path


@pytest.fixture(scope="module")
def undisturbed(archived):
    """The numbers of every trial, each trained in this process, by group and seed."""
    workspace = Workspace(load_study(archived[1]))
    trials = [(group, seed) for group in ("task_only", "combined") for seed in (0, 1)]
    return {trial: numbers(workspace.train_one(*trial)) for trial in trials}


@pytest.fixture
def study(archived, tmp_path):
    """The archived study with results of its own, in which nothing is trained: its file, and a change of it."""
    path, (change,) = results_in(archived, tmp_path)
    return path, change


def results_in(archived, folder):
    """The archived study, with results in another folder, in which nothing is trained."""
    ignored = shutil.ignore_patterns("knowledge_distillation_experiment")
    shutil.copytree(archived[0] / "results", folder / "results", ignore=ignored)
    return archived[1], [f"paths.results={folder / 'results'}"]


@pytest.fixture(scope="module", autouse=True)
def pids():
    """The process of each trial that was started last, by the trial's name."""
    found, start = {}, Forks.start

    def noted(forks, job, slot):
        fork = start(forks, job, slot)
        found[job.plan.trial.name] = fork.pid
        return fork

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forks, "start", noted)
        yield found


class Watched:
    """What a sweep tells; `at` is called with each event and the pid of its trial."""

    def __init__(self, pids, at=lambda event, facts, pid: None):
        self.events, self._pids, self._at = [], pids, at

    def __call__(self, event, facts):
        """What a sweep calls."""
        self.events.append((event, facts["trial"]))
        self._at(event, facts, self._pids[facts["trial"]])

    def of(self, name):
        """The events of a trial."""
        return [event for event, trial in self.events if trial == name]


def results_of(plans):
    """The numbers of trials that are finished, by group and seed."""
    results = {(p.trial.group.name, p.trial.seed): p.folder / "result.json" for p in plans}
    return {trial: numbers(read_json(path)) for trial, path in results.items() if path.is_file()}


def parent_of(pid):
    """The process that a process is a child of."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def private(pid):
    """Bytes of a process's memory that it shares with none."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


@pytest.fixture(scope="module")
def swept(archived, tmp_path_factory, pids):
    """An undisturbed sweep, four trials by two: its plans and events, and its processes' memory as they ran."""
    folder = tmp_path_factory.mktemp("swept")
    workspace = Workspace(load_study(*results_in(archived, folder)))
    began, peaks, scores, processes = [], [], [], set()

    def at(event, facts, pid):
        processes.add(pid)
        if event == "started":
            began.append(private(pid))
        if event == "epoch" and facts["epoch"] == 1:  # after its last one it may be gone
            peaks.append(private(pid))
            who = {"trial": pid, "parent": parent_of(pid), "sweep": os.getpid()}
            scores.append({name: int(Path(f"/proc/{other}/oom_score").read_text()) for name, other in who.items()})

    watched = Watched(pids, at)
    assert sweep(workspace.plans(), workspace.study.sweep, watched) == {}
    return SimpleNamespace(
        workspace=workspace, watched=watched, began=began, peaks=peaks, scores=scores, processes=processes
    )


@linux
@pytest.mark.slow
def test_trials_have_the_numbers_of_train_one_and_run_two_at_once(swept, undisturbed):
    """To the bit, whatever runs beside them; the first two start together, and no process is left."""
    plans, watched = swept.workspace.plans(), swept.watched
    assert results_of(plans) == undisturbed
    assert [event for event, _ in watched.events][:2] == ["started", "started"]
    for plan in plans:
        assert watched.of(plan.trial.name) == ["started", "epoch", "epoch", "epoch", "finished"]
        assert not (plan.folder / OUTPUT).exists()
    assert len(swept.processes) == 4
    assert not descendants(os.getpid()) & swept.processes


@linux
@pytest.mark.slow
def test_a_finished_sweep_starts_nothing(swept, monkeypatch):
    """What has its result is not run again, and no process is made ready for it."""
    monkeypatch.setattr(local_sweep, "_processes", lambda *_: pytest.fail("a process was started"))
    assert sweep(swept.workspace.plans(), swept.workspace.study.sweep, pytest.fail) == {}


@linux
@pytest.mark.slow
def test_memory_is_given_back_between_trials(swept):
    """A trial's process begins with what is imported, and not with what the trial before it used."""
    assert max(swept.began) < 20e6 < 30e6 < min(swept.peaks)


@linux
@pytest.mark.slow
def test_where_memory_runs_out_the_kernel_takes_a_trial(swept):
    """Its score, by which the kernel chooses, is above those of the sweep and of the process that forks."""
    for score in swept.scores:
        assert score["trial"] > max(score["parent"], score["sweep"]) + 300


@linux
@pytest.mark.slow
def test_new_processes_do_what_forks_do(study, undisturbed, monkeypatch):
    """The way of GPUs: a process that no other was forked into, made ready while the trial before it runs."""
    monkeypatch.setattr(local_sweep, "_can_fork", lambda: False)
    workspace = Workspace(load_study(study[0], [study[1], "sweep.max_concurrent=1", "groups=[combined]"]))
    assert workspace.sweep() == {}
    plans = workspace.plans()
    assert results_of(plans) == {trial: undisturbed[trial] for trial in (("combined", 0), ("combined", 1))}
    assert not [pid for pid in descendants(os.getpid()) if b"local_worker" in command_of(pid)]


def command_of(pid):
    """What a process was started as."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@linux
@pytest.mark.slow
def test_a_trial_that_raises_fails_alone(study, pids, quick_sweeps):
    """It is tried again, its error.json has its words, the others finish, and the sweep says which failed and why."""
    workspace = Workspace(load_study(study[0], [study[1], "groups=[task_only]"]))
    good, bad = workspace.plans()
    bad = bad.__class__(**{**bad.__dict__, "student": ModelRef(model=str(workspace.results / "nowhere"))})
    watched = Watched(pids)
    errors = sweep([bad, good], workspace.study.sweep, watched)
    assert list(errors) == [bad.trial.name]
    assert "nowhere" in errors[bad.trial.name]
    assert watched.of(bad.trial.name) == ["started", "failed"] * 2
    assert watched.of(good.trial.name)[-1] == "finished"
    assert read_json(bad.folder / ERROR)["failures"] == 2
    assert "UserError" in (bad.folder / OUTPUT).read_text()


@linux
@pytest.mark.slow
def test_a_trial_killed_in_mid_epoch_is_tried_again_and_ends_with_the_same_numbers(
    study, undisturbed, pids, quick_sweeps
):
    """From its checkpoint; the other running trial continues, and one fewer runs at once from then on."""
    workspace = Workspace(load_study(study[0], [study[1]]))
    plans, killed = workspace.plans(), []
    victim = plans[2].trial.name

    def at(event, facts, pid):
        if event == "epoch" and facts["trial"] == victim and not killed:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    watched = Watched(pids, at)
    assert sweep(plans, workspace.study.sweep, watched) == {}
    assert watched.of(victim) == ["started", "epoch", "failed", "started", "epoch", "epoch", "finished"]
    assert results_of(plans) == undisturbed
    assert not (plans[2].folder / ERROR).exists()


@linux
@pytest.mark.slow
def test_a_trial_killed_on_every_try_is_an_error_that_names_the_signal(study, pids, quick_sweeps):
    """Two of three trials, each by a signal of its own; the next sweep tries them again."""
    changes = ["groups=[task_only]", "sweep.retries=0", "sweep.seeds=[0, 1, 2]"]
    workspace = Workspace(load_study(study[0], [study[1], *changes]))
    *victims, other = workspace.plans()
    out_of_memory, broken = (plan.trial.name for plan in victims)
    numbers = {out_of_memory: signal.SIGKILL, broken: signal.SIGSEGV}

    def at(event, facts, pid):
        if event == "started" and facts["trial"] in numbers:
            os.kill(pid, numbers[facts["trial"]])

    errors = sweep(workspace.plans(), workspace.study.sweep, Watched(pids, at))
    assert set(errors) == set(numbers)
    for name, says in (
        (out_of_memory, r"killed by signal 9 \(SIGKILL\): out of memory\? Set sweep\.max_concurrent lower"),
        (broken, r"killed by signal 11 \(SIGSEGV\); .*output\.log has what it printed"),
    ):
        assert re.search(says, errors[name])
    assert (other.folder / "result.json").is_file()
    assert workspace.sweep() == {}
    table = pd.read_csv(workspace.results / "results_summary.csv")
    assert table["status"].tolist() == ["finished"] * 3


@linux
@pytest.mark.slow
def test_the_process_that_forks_may_be_killed(study, undisturbed, pids, quick_sweeps):
    """Trials that run go on without it, and a new one takes its place."""
    workspace = Workspace(load_study(study[0], [study[1]]))
    killed = []

    def at(event, facts, pid):
        if event == "epoch" and not killed:
            killed.append(parent_of(pid))
            os.kill(killed[0], signal.SIGKILL)

    plans = workspace.plans()
    assert sweep(plans, workspace.study.sweep, Watched(pids, at)) == {}
    assert killed
    assert results_of(plans) == undisturbed


def checkpoints(tmp_path):
    """How many trials have one."""
    return len(list((tmp_path / "results").glob("knowledge*/trial_*/checkpoint_*/trainer_state.pt")))


def gone(pids, timeout=5):
    """Whether all processes end within some seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if not any(b"local_worker" in command_of(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


@linux
@pytest.mark.slow
def test_a_sweep_that_is_killed_leaves_no_process_and_is_finished_by_the_same_command(tmp_path, study, undisturbed):
    """Trials end with it within seconds, in mid-epoch; the command resumes them from their checkpoints."""
    path, here = study
    running = stillroom(tmp_path / "log", "sweep", path, "--set", here)
    assert wait_for(lambda: checkpoints(tmp_path) >= 1, running), running.output
    below = descendants(running.process.pid)
    assert len(below) >= 2
    running.signal(signal.SIGKILL)
    assert running.end() == -signal.SIGKILL
    assert gone(below)
    again = stillroom(tmp_path / "log", "sweep", path, "--set", here)
    assert again.end() == 0, again.output
    assert results_of(Workspace(load_study(path, [here])).plans()) == undisturbed


@linux
@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("moment", ["import", "training"])
def test_ctrl_c_ends_every_process_at_once(tmp_path, study, times, moment):
    """As a terminal sends it, to all of them; exit code 130, no traceback, nothing left behind."""
    path, here = study
    running = stillroom(tmp_path / "log", "sweep", path, "--set", here)
    due = {"import": lambda: bool(descendants(running.process.pid)), "training": lambda: checkpoints(tmp_path) >= 1}
    assert wait_for(due[moment], running), running.output
    below = descendants(running.process.pid)
    started = time.monotonic()
    for _ in range(times):
        for pid in (running.process.pid, *below):
            with suppress(ProcessLookupError):  # the first one has ended it
                os.kill(pid, signal.SIGINT)
        time.sleep(0.05)
    assert running.end(timeout=30) == 130, running.output
    assert time.monotonic() - started < 10
    assert gone(below)
    assert "Traceback" not in running.output
    assert running.output.lower().count("stopped") == 1


def test_a_second_sweep_is_refused(tmp_path):
    """Two would start every trial twice."""
    plan = SimpleNamespace(
        trial=SimpleNamespace(name="trial"),
        folder=tmp_path / "trial",
        files=TrialFolder(tmp_path / "trial"),
        experiment=tmp_path,
    )
    with exclusive(tmp_path, "sweep"), pytest.raises(UserError, match="another sweep is writing here"):
        sweep([plan], Sweep(seeds=(0,)), pytest.fail)

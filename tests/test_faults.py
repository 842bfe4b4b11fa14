"""What clusters do to long work, done for real: killed, stopped and starved processes, full disks, damaged files."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time

import pandas as pd
import pytest

from damage import flip_byte
from processes import command, command_with_its_tracker_elsewhere, descendants, start, stillroom, wait_for
from setups import numbers
from small_things import STUDENT_SHAPE, write_model
from stillroom.files import read_json
from stillroom.offline_teacher_data.store import SignalStore
from studies import study_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's signals, resource limits and /proc"),
]

SMALL_SHARDS = {"top_k": 64, "dtype": "float32", "shard_examples": 4, "minimum_coverage": 0.0}


def done(log, *arguments, **options):
    """Run a command to its end, which must be a good one; returns what it printed."""
    running = stillroom(log, *arguments, **options)
    assert running.end() == 0, running.output
    return running.output


def refused(log, *arguments, run=command, **options):
    """Run a command that must end with one message and exit code 2; returns the message."""
    before = len(log.read_text()) if log.exists() else 0
    running = start(log, run, *arguments, **options)
    assert running.end() == 2, running.output
    output = running.output[before:]
    assert output.count("error:") == 1, output
    assert "Traceback" not in output
    return output


def identity(path):
    """What a file that is written again cannot keep."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def shards(store):
    """The finished shards of a store and their identities."""
    return {path.name: identity(path) for path in store.glob("part-*.parquet")}


def values(store):
    """Every value of a store."""
    read = {example.example_id: example for example in SignalStore.open(store)}
    return {key: {name: array.tobytes() for name, array in example.arrays.items()} for key, example in read.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the module's studies are."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def dropout_ref(folder, sentencepiece):
    """A student with dropout, so that a lost random state would show."""
    return write_model(folder / "student", sentencepiece, {**STUDENT_SHAPE, "attention_dropout": 0.2}, 3)


@pytest.fixture(scope="module")
def whole(folder, teacher_ref, dropout_ref):
    """A study whose capture nothing disturbed: its folder and its file."""
    path = study_file(folder, teacher_ref.model, dropout_ref.model, signals=SMALL_SHARDS)
    done(folder / "log", "capture", path)
    return folder, path


def elsewhere(tmp_path, teacher_ref, student_ref, **changes):
    """The same study in another folder, nothing done."""
    return study_file(tmp_path, teacher_ref.model, student_ref.model, **{"signals": SMALL_SHARDS, **changes})


def equal_stores(one, other):
    """Value for value, and file for file."""
    digests = [[s["sha256"] for s in SignalStore.open(store).manifest["shards"]] for store in (one, other)]
    return digests[0] == digests[1] and values(one) == values(other)


def test_a_capture_killed_at_ten_moments_is_finished_by_the_same_command(tmp_path, whole, teacher_ref, dropout_ref):
    """No finished shard is computed again, no half of one is taken for whole, and the store is the undisturbed one."""
    path = elsewhere(tmp_path, teacher_ref, dropout_ref)
    store, log, chance = tmp_path / "offline_teacher_data", tmp_path / "log", random.Random(5)
    kept = {}
    for _ in range(10):
        running = stillroom(log, "capture", path)
        more, writing, pause = len(kept) + chance.randrange(2), chance.random() < 0.5, 0.03 * chance.random()

        def moment(more=more, writing=writing):
            return len(shards(store)) >= more and (not writing or any(store.glob(".part-*.tmp")))

        assert wait_for(moment, running), running.output
        time.sleep(pause)
        running.signal(signal.SIGKILL)
        assert running.end() == -signal.SIGKILL, running.output
        assert not (store / "manifest.json").exists()
        found = shards(store)
        assert {name: found[name] for name in kept} == kept
        kept = found
    assert 3 <= len(kept) < 15
    done(log, "capture", path)
    found = shards(store)
    assert {name: found[name] for name in kept} == kept
    assert equal_stores(store, whole[0] / "offline_teacher_data")
    assert not list(store.glob(".*.tmp*"))


def test_slices_that_processes_capture_at_once_are_one_store(tmp_path, whole, teacher_ref, dropout_ref):
    """`--slice 1/2` and `--slice 2/2`, at once, equal a single capture; the first says that others are missing."""
    path = elsewhere(tmp_path, teacher_ref, dropout_ref)
    alone = done(tmp_path / "log1", "capture", path, "--slice", "1/3")
    store = tmp_path / "offline_teacher_data"
    assert "finished" not in alone
    assert not (store / "manifest.json").exists()
    others = [stillroom(tmp_path / f"log{n}", "capture", path, "--slice", f"{n}/3") for n in (2, 3)]
    assert [other.end() for other in others] == [0, 0]
    done(tmp_path / "log4", "verify", path)
    assert equal_stores(whole[0] / "offline_teacher_data", store)


def test_ctrl_c_leaves_a_capture_at_once_and_says_how_to_go_on(tmp_path, whole, teacher_ref, dropout_ref):
    """Exit code 130, one line with the command, finished shards kept, no half ones; then the command finishes it."""
    path = elsewhere(tmp_path, teacher_ref, dropout_ref)
    store, log = tmp_path / "offline_teacher_data", tmp_path / "log"
    for _ in range(5):  # a capture this small can be over before the signal is there
        running = stillroom(log, "capture", path, "--set", "signals.top_k=64")
        assert wait_for(lambda: len(shards(store)) >= 2, running), running.output
        running.signal(signal.SIGINT)
        if running.end(timeout=30):
            break
        shutil.rmtree(store)
    assert running.process.exitcode == 130
    assert running.output.endswith(
        f"Stopped. Finished work is saved. To resume: stillroom capture {path} --set signals.top_k=64\n"
    )
    assert "Traceback" not in running.output
    kept = shards(store)
    assert len(kept) < 15
    assert not list(store.glob(".*.tmp*"))
    done(log, "capture", path)
    assert {name: shards(store)[name] for name in kept} == kept
    assert equal_stores(store, whole[0] / "offline_teacher_data")


TRAINING = {"epochs": 3, "precision": "float16", "gradient_interval": 2}
TRIAL = ("--group", "combined", "--seed", "0")


@pytest.fixture(scope="module")
def archived(folder, teacher_ref, dropout_ref):
    """A study whose teacher data is archived: its file. Trials of several seeds and groups are trained in it."""
    sub = folder / "archived"
    sub.mkdir()
    sweep = {"seeds": [0, 1], "cpus_per_trial": 1, "retries": 0, "launcher": "ray"}
    path = study_file(sub, teacher_ref.model, dropout_ref.model, signals=SMALL_SHARDS, training=TRAINING, sweep=sweep)
    for stage in ("capture", "verify", "archive"):
        done(sub / "log", stage, path)
    return sub, path


def copy_of(archived, tmp_path):
    """The archived study in a folder of its own, for a test that trains in it; the snapshot itself is shared."""
    sub, path = archived
    shutil.copytree(sub / "results", tmp_path / "results")
    return path, ("--set", f"paths.results={tmp_path / 'results'}")


def trial_folder(tmp_path, name="combined_seed_0"):
    """The folder of a trial, once it is there."""
    found = list((tmp_path / "results" / "knowledge_distillation_experiment").glob(f"trial_*_{name}"))
    return found[0] if found else tmp_path / "absent"


@pytest.fixture(scope="module")
def undisturbed(archived, tmp_path_factory):
    """The result of a trial that nothing disturbed."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    path, here = copy_of(archived, tmp_path)
    done(tmp_path / "log", "train", path, *TRIAL, *here)
    return read_json(trial_folder(tmp_path) / "result.json")


def test_a_trial_killed_in_mid_epoch_goes_on_from_its_checkpoint(tmp_path, archived, undisturbed):
    """Weights, optimizer, scaler, dropout, place in the data: all metrics are the undisturbed trial's, to the bit."""
    path, here = copy_of(archived, tmp_path)
    log, chance, seconds = tmp_path / "log", random.Random(3), []
    for epoch in (1, 2):
        running = stillroom(log, "train", path, *TRIAL, *here)

        def moment(epoch=epoch):
            return (trial_folder(tmp_path) / f"checkpoint_{epoch}" / "trainer_state.pt").is_file()

        assert wait_for(moment, running), running.output
        time.sleep(0.1 * chance.random())
        running.signal(signal.SIGKILL)
        assert running.end() == -signal.SIGKILL
        progress = trial_folder(tmp_path) / f"checkpoint_{epoch}" / "trainer_progress.json"
        assert not (trial_folder(tmp_path) / f"checkpoint_{epoch + 1}").exists()
        seconds = [e["train_seconds"] for e in read_json(progress)["epochs"]]
    done(log, "train", path, *TRIAL, *here)
    result = read_json(trial_folder(tmp_path) / "result.json")
    assert [e["train_seconds"] for e in result["epochs"]][:2] == seconds  # those epochs were not trained again
    assert numbers(result) == numbers(undisturbed)
    assert result["gradients"] == undisturbed["gradients"]
    assert [p.name for p in trial_folder(tmp_path).glob("*checkpoint*")] == ["checkpoint_3"]


def test_a_sweep_whose_driver_is_killed_is_finished_by_the_same_command(tmp_path, archived, undisturbed):
    """Only what is missing runs, no trial counts twice, meanwhile no second sweep starts, and orphans do no harm."""
    path, here = copy_of(archived, tmp_path)
    here = (*here, "--set", "groups=[combined]", "--set", "sweep.seeds=[0, 1, 2]")
    results, log = tmp_path / "results", tmp_path / "log"

    def finished():
        return {p.parent.name: identity(p) for p in results.glob("knowledge*/trial_*/result.json")}

    running = stillroom(log, "sweep", path, *here)
    assert wait_for(lambda: len(finished()) >= 1, running), running.output
    assert "another sweep is writing here" in refused(tmp_path / "second", "sweep", path, *here)
    workers = descendants(running.process.pid)
    running.signal(signal.SIGKILL)
    assert running.end() == -signal.SIGKILL
    table = pd.read_csv(results / "results_summary.csv")
    assert len(table) == 3
    assert set(table["status"]) <= {"finished", "missing"}
    first = finished()
    assert len(first) < 3
    done(log, "sweep", path, *here)
    assert {name: finished()[name] for name in first} == first
    table = pd.read_csv(results / "results_summary.csv")
    assert table["status"].tolist() == ["finished"] * 3
    assert table["trial"].is_unique
    assert table["validation_accuracy"].notna().all()
    result = read_json(trial_folder(tmp_path) / "result.json")
    assert numbers(result) == numbers(undisturbed)
    assert logged_trials(results) == sorted(table["trial"])
    still = descendants(1) & workers
    assert not [pid for pid in still if name_of(pid) in ("raylet", "gcs_server", "ray::ImplicitFunc")]


def name_of(pid):
    """What a process calls itself."""
    from pathlib import Path

    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().rpartition("/")[2].split(".")[0]
    except OSError:
        return ""


def logged_trials(results):
    """Names of the trials that the tracker has as finished runs."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], "tags.kind = 'trial' and attributes.status = 'FINISHED'")
    return sorted(run.data.tags["trial"] for run in runs)


def write_summary_of(results):
    """Write the summary, ending as the command line does."""
    from stillroom.analysis.frame import write_summary
    from stillroom.errors import UserError

    try:
        write_summary(results)
    except UserError as error:
        print(f"error: {error}")
        sys.exit(2)


def test_a_full_disk_leaves_no_half_shard(tmp_path, whole, teacher_ref, dropout_ref):
    """One message that names the shard and the remedy; with space freed the same command completes the store."""
    path = elsewhere(tmp_path, teacher_ref, dropout_ref)
    store, log = tmp_path / "offline_teacher_data", tmp_path / "log"
    sizes = sorted(p.stat().st_size for p in (whole[0] / "offline_teacher_data").glob("part-*.parquet"))
    room = (sizes[len(sizes) // 2] + sizes[-1]) // 2  # enough for the shorter half of the shards, and for a corpus
    message = refused(log, "capture", path, limit=room)
    assert f"cannot write {store / 'part-00000.parquet'}: File too large; free space" in message
    assert not list(store.glob("*part-*"))
    done(log, "capture", path)
    assert equal_stores(store, whole[0] / "offline_teacher_data")


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, archived, undisturbed):
    """The same for weights (safetensors), optimizer state (torch) and tokenizer, each of which fails in its own way."""
    path, here = copy_of(archived, tmp_path)
    log, trial = tmp_path / "log", lambda: trial_folder(tmp_path)
    for room in (12_000, 60_000, 200_000):
        message = refused(log, "train", path, *TRIAL, *here, limit=room, run=command_with_its_tracker_elsewhere)
        assert f"cannot write {trial() / 'checkpoint_1'}: File too large; free space" in message, room
        assert not [p.name for p in trial().iterdir() if "checkpoint" in p.name]
    assert "File too large" in read_json(trial() / "error.json")["error"]
    done(log, "train", path, *TRIAL, *here)
    assert numbers(read_json(trial() / "result.json")) == numbers(undisturbed)
    assert not (trial() / "error.json").exists()
    results = tmp_path / "results"
    before = (results / "results_summary.csv").read_bytes()
    running = start(tmp_path / "second", write_summary_of, results, limit=400)  # the message itself fits
    assert running.end() == 2
    assert "results_summary.csv: File too large; free space" in running.output
    assert (results / "results_summary.csv").read_bytes() == before
    assert not list(results.glob(".results_summary*"))


def test_a_second_capture_is_refused_and_a_dead_ones_lock_is_no_hindrance(tmp_path, whole, teacher_ref, dropout_ref):
    """Two never write one store; the lock file of a killed process stays and blocks nothing."""
    path = elsewhere(tmp_path, teacher_ref, dropout_ref)
    store, log = tmp_path / "offline_teacher_data", tmp_path / "log"
    running = stillroom(log, "capture", path)
    assert wait_for(lambda: len(shards(store)) >= 1, running), running.output
    running.signal(signal.SIGSTOP)
    found = shards(store)
    assert f"{store}: another capture is writing here" in refused(tmp_path / "second", "capture", path)
    assert shards(store) == found
    running.signal(signal.SIGKILL)
    running.end()
    assert list(store.glob(".lock*"))
    done(log, "capture", path)
    assert equal_stores(store, whole[0] / "offline_teacher_data")


def truncate(path):
    """Lose the last bytes of a file."""
    path.write_bytes(path.read_bytes()[:-100])


def edit(path):
    """Change one figure of a JSON file."""
    path.write_text(path.read_text().replace('"top_k": 64', '"top_k": 32', 1))


DAMAGE = {
    "a flipped byte": ("part-00003.parquet", flip_byte, "its bytes are not those that were written"),
    "a truncated shard": ("part-00003.parquet", truncate, "truncated"),
    "a missing shard": ("part-00003.parquet", lambda path: path.unlink(), "is missing"),
    "an edited manifest": ("manifest.json", edit, "is not as it was written"),
    "half a manifest": ("manifest.json", truncate, "is not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_a_store_is_found_named_and_refused(tmp_path, whole, damage):
    """By the gate, before anything is trained."""
    name, change, message = DAMAGE[damage]
    store = shutil.copytree(whole[0] / "offline_teacher_data", tmp_path / "data")
    change(store / name)
    said = refused(tmp_path / "log", "verify", whole[1], "--set", f"paths.store={store}")
    assert f"{store / name}" in said
    assert message in said
    assert not (store / "verified.json").exists()


def test_a_shard_of_another_capture_is_found_and_named(tmp_path, whole):
    """Same size, same examples, another teacher's values: not the shard that was written."""
    other = tmp_path / "other"
    changed = ("--set", f"paths.store={other}", "--set", "signals.batch_tokens=300")
    done(tmp_path / "log", "capture", whole[1], *changed)
    store = shutil.copytree(whole[0] / "offline_teacher_data", tmp_path / "data")
    shutil.copy(other / "part-00003.parquet", store)
    said = refused(tmp_path / "log", "verify", whole[1], "--set", f"paths.store={store}")
    assert f"{store / 'part-00003.parquet'} belongs to another capture" in said


def test_a_shard_damaged_before_its_store_was_finished_is_found(tmp_path, whole, teacher_ref, dropout_ref):
    """No manifest knows its SHA-256 yet: the shard's own checksums do."""
    path = elsewhere(tmp_path, teacher_ref, dropout_ref)
    store, log = tmp_path / "offline_teacher_data", tmp_path / "log"
    running = stillroom(log, "capture", path)
    assert wait_for(lambda: len(shards(store)) >= 2, running)
    running.signal(signal.SIGKILL)
    running.end()
    flip_byte(store / "part-00001.parquet")
    assert f"{store / 'part-00001.parquet'} is damaged" in refused(log, "capture", path)
    assert not (store / "manifest.json").exists()
    (store / "part-00001.parquet").unlink()
    done(log, "capture", path)
    assert equal_stores(store, whole[0] / "offline_teacher_data")


def test_a_snapshot_damaged_after_the_gate_is_found_where_it_is_read(tmp_path, archived):
    """Sizes agree and no one checks SHA-256 again, but a trial does not train on a flipped byte."""
    path, here = copy_of(archived, tmp_path)
    snapshot = next(archived[0].glob("offline_teacher_data_20*"))
    shutil.copytree(snapshot, tmp_path / snapshot.name)
    shard = tmp_path / snapshot.name / "part-00004.parquet"
    shard.chmod(0o644)
    flip_byte(shard)
    here = (*here, "--set", f"paths.store={tmp_path / 'offline_teacher_data'}")
    said = refused(tmp_path / "log", "train", path, *TRIAL, *here)
    assert str(shard) in said
    assert "CRC checksum verification failed" in said


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("teacher.model={student}", "teacher"),
        ("teacher.model={student}", "tokenizer"),
        ("signals.top_k=7", "top_k"),
        ("signals.dtype=float16", "dtype"),
        ("corpus.sample_seed=1", "corpus"),
        ("corpus.tasks.quiz.examples=19", "examples"),
        ("corpus.split_seed=1", "corpus"),
    ],
)
def test_a_store_of_something_else_is_refused_with_both_sides(tmp_path, whole, dropout_ref, override, field):
    """Another teacher, tokenizer, k, precision or corpus: the differing field with what is there and what is asked."""
    override = override.format(student=dropout_ref.model)
    for stage in ("capture", "verify", "archive"):
        said = refused(
            tmp_path / "log", stage, whole[1], "--set", override, "--set", f"paths.results={tmp_path / 'results'}"
        )
        assert f"{field}: store has " in said
        assert ", study asks for " in said
        assert "choose another folder with --set paths.store=DIR" in said

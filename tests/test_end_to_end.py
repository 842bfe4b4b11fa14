"""The whole way, from a study file to a report, on Ray: real tokenizers, one tokenizer, and what goes wrong."""

from __future__ import annotations

import json
import shutil
import weakref

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

import reference
from recompute_report import check_report
from setups import dense
from small_things import STUDENT_SHAPE, TEACHER_SHAPE, real_tokenizer, write_model
from stillroom.afterwards.export import export_trial
from stillroom.analysis.escaping import markdown_plain
from stillroom.analysis.results import StudyResults
from stillroom.cli.printing import print_answers
from stillroom.config import ModelRef
from stillroom.data.tasks import TASKS
from stillroom.errors import UserError
from stillroom.evaluation.metrics import by_column
from stillroom.experiment.reporting import as_planned
from stillroom.experiment.workspace import Workspace
from stillroom.files import read_json, write_json
from stillroom.models.hub import load_model
from stillroom.offline_teacher_data.shards import Slice
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.studies import load_study
from studies import reported, run, study_file

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_sweeps")]


@pytest.fixture
def tiny_mistral(tmp_path):
    """A random Mistral and a random Llama with the real, different, 32,000-entry tokenizers."""
    torch.manual_seed(0)
    shape = {k: v for k, v in TEACHER_SHAPE.items() if k != "vocab_size"}
    config = MistralConfig(
        vocab_size=32_000, sliding_window=8, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **shape
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    real_tokenizer("mistral-7b-v0.1").save_pretrained(tmp_path / "mistral")
    write_model(tmp_path / "llama", real_tokenizer("tinyllama-1.1b"), STUDENT_SHAPE, 4)
    return str(tmp_path / "mistral"), str(tmp_path / "llama")


def test_mistral_teaches_llama_through_their_real_tokenizers(tmp_path, tiny_mistral):
    """The study's own pair of tokenizers, all the way; files where the outline says; the outline's snippet works."""
    sweep = {"seeds": [0], "cpus_per_trial": 1, "retries": 0, "launcher": "ray"}
    path = study_file(tmp_path, *tiny_mistral, sweep=sweep)
    workspace, errors = run(path)
    assert errors == {}
    results = tmp_path / "results"
    frame = pd.read_csv(results / "results_summary.csv")
    table = frame.groupby("config/distill_type")["validation_accuracy"].agg(["mean", "std"])
    assert set(table.index) == {"task_only", "combined"}
    trials = sorted(p.name for p in (results / "knowledge_distillation_experiment").iterdir() if p.is_dir())
    assert [name.split("_", 2)[2] for name in trials] != []
    assert {name.split("_", 2)[2] for name in trials} == {"task_only_seed_0", "combined_seed_0"}
    for trial in trials:
        folder = results / "knowledge_distillation_experiment" / trial
        assert (folder / "checkpoint_1" / "config.json").is_file()
        assert (folder / "checkpoint_1" / "projector.safetensors").is_file() == ("combined" in trial)
        assert (folder / "predictions.parquet").is_file()
        result = read_json(folder / "result.json")
        if result["config"]["distill_type"] == "combined":
            assert all(task_coverage["token_coverage"] > 0.85 for task_coverage in result["coverage"].values())
            assert all(share > 0 for share in result["gradient_shares"].values())
    report = workspace.report().read_text()
    assert "student before training" in report
    assert "combined" in report
    assert (results / "figures" / "accuracy.svg").is_file()
    assert check_report(results) > 20
    assert list((results / "ray").rglob("events.out.tfevents.*")), "TensorBoard has nothing to show"
    snapshots = list(tmp_path.glob("offline_teacher_data_20*"))
    assert len(snapshots) == 1


def test_a_second_run_computes_nothing_again(tmp_path, teacher_ref, student_ref, monkeypatch):
    """Stages with an output of the right fingerprint are not run; a new seed adds just its trials."""
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, groups=["task_only"])
    run(path)
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "results").rglob("result.json")}
    monkeypatch.setattr("stillroom.experiment.workspace.load_model", lambda *a: pytest.fail("a model was loaded again"))
    run(path)
    _, errors = run(path, "sweep.seeds=[0, 1]")
    assert errors == {}
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "results").rglob("result.json")}
    assert {p: after[p] for p in first} == first
    assert sorted(pd.read_csv(tmp_path / "results" / "results_summary.csv")["config/seed"]) == [0, 1]


def test_the_test_splits_are_evaluated_for_trials_and_baselines(tmp_path, teacher_ref, student_ref):
    """The same examples for all three; another split is another trial, a second run computes nothing again."""
    evaluation = {"max_new_tokens": 8, "test_splits": {"quiz": {"examples": 12}, "arithmetic": {"examples": 6}}}
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, groups=["task_only"], evaluation=evaluation)
    workspace, errors = run(path)
    assert errors == {}
    ids = [e.example_id for e in workspace.examples.test]
    assert len(ids) == 18
    results, trial = tmp_path / "results", workspace.plans()[0].folder
    result = read_json(trial / "result.json")
    measured = {trial / "predictions_test.parquet": by_column(result["metrics"])}
    for name in ("teacher", "student"):
        file = results / "baselines" / f"{name}_test.parquet"
        measured[file] = by_column(read_json(file.with_suffix(".json"))["metrics"])
    for predictions, metrics in measured.items():
        table = pd.read_parquet(predictions)
        assert list(table["example_id"]) == ids
        assert metrics["test_accuracy"] == table["correct"].mean()
        assert metrics["test_accuracy_quiz"] == table[table["task"] == "quiz"]["correct"].mean()
        assert (results / "baselines" / "teacher.parquet").is_file()
    frame = pd.read_csv(results / "results_summary.csv")
    assert frame["test_accuracy"].tolist() == [by_column(result["metrics"])["test_accuracy"]]
    changed = Workspace(load_study(path, ["evaluation.test_splits.quiz.examples=11"]))
    assert changed.plans()[0].folder != trial


@pytest.mark.usefixtures("quick_pictures")
def test_no_task_name_is_forbidden(tmp_path, teacher_ref, student_ref, capsys):
    """Tasks called like a measure or a heading, from training to report: every number is that of its own rows."""
    for name, more in (("sums", 0), ("others", 10)):
        rows = [{"a": a + more, "b": b - more, "sum": a + b} for a in range(6) for b in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generation = {"prompt": "{a} and {b} make", "answer": " {sum}.", "pattern": r"(\d+)"}
    choice = {"prompt": "{a}, {b}: the sum?", "choices": [str(n) for n in range(10)], "label": "sum"}
    source = {"dataset": str(tmp_path / "sums.jsonl"), "examples": 20}
    test = {"dataset": str(tmp_path / "others.jsonl"), "examples": 4}
    tasks = {
        name: {**source, "choice": {**choice, "prompt": f"{name} {choice['prompt']}"}} for name in ("all", "macro")
    }
    tasks |= {"accuracy": {**source, "choice": {**choice, "prompt": "sum of {a}, {b}:"}}}
    tasks |= {
        name: {**source, "generation": {**generation, "prompt": f"{name}: {{a}} and {{b}} make"}}
        for name in ("x", "x_flexible")
    }
    path = study_file(
        tmp_path,
        teacher_ref.model,
        student_ref.model,
        corpus={"tasks": tasks, "max_length": 128},
        evaluation={"max_new_tokens": 8, "test_splits": dict.fromkeys(("all", "x_flexible"), test)},
        analysis={"primary": [["combined", "task_only"]], "secondary": [], "simple_tasks": ["all"], "hard_tasks": []},
    )
    page = reported(path, "task_only", "combined").folder.report
    assert check_report(page.parent, bootstrap=False)
    print_answers(page.parent)
    assert "combined" in capsys.readouterr().out
    results = StudyResults.read(page.parent)
    assert list(results.accuracy_keys) == ["all tasks", "accuracy", "all", "macro", "x", "x_flexible"]
    frame = pd.read_csv(page.parent / "results_summary.csv").set_index("config/distill_type")
    for (group, _), rows in results.predictions.items():
        by_task, row = rows.groupby("task")["correct"].mean(), frame.loc[group]
        assert row["validation_accuracy"] == pytest.approx(rows["correct"].mean())
        assert row["validation_accuracy_macro"] == pytest.approx(by_task.mean())
        assert row["validation_accuracy:macro"] == by_task["macro"]
        assert row["validation_accuracy:x_flexible"] == by_task["x_flexible"]
        for task in ("all", "accuracy", "x"):
            assert row[f"validation_accuracy_{task}"] == by_task[task]
    assert set(pd.read_csv(page.parent / "tables" / "comparisons.csv")["measure"]) == set(results.accuracy_keys)
    export_trial(results.trial_folder(results.finished[0]["trial"]), tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert all(f"\n| {markdown_plain(name)} | " in card for name in results.accuracy_keys)


def test_other_test_rows_in_the_same_file_are_another_trial(tmp_path, teacher_ref, student_ref, store):
    """A trial's name pins the examples, not just where they were read from."""
    file = tmp_path / "quiz.jsonl"
    evaluation = {"test_splits": {"quiz": {"dataset": str(file), "examples": 12}}}
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, evaluation=evaluation)
    rows, names = TASKS["quiz"].generate_rows(5, 20), []
    for some in (rows[:12], rows[8:], rows[8:]):
        file.write_text("\n".join(json.dumps(row) for row in some))
        workspace = Workspace(load_study(path))
        names.append(workspace.trial_id(workspace.study.groups[0], 0, store.path))
    assert names[0] != names[1] == names[2]


@pytest.mark.usefixtures("quick_pictures")
def test_one_failing_trial_stops_no_other_and_is_retried_alone(tmp_path, teacher_ref, student_ref):
    """It is listed with its error, the report is marked incomplete, and the same command completes it."""
    path = study_file(tmp_path, teacher_ref.model, student_ref.model)
    workspace = Workspace(load_study(path))
    workspace.capture()
    workspace.verify()
    workspace.archive()
    broken = next(p for p in workspace.plans() if p.trial.group.name == "combined").folder
    broken.mkdir(parents=True)
    (broken / "predictions_1.parquet").mkdir()  # in the way of the trial's own file
    _, errors = run(path)
    assert list(errors) == [broken.name]
    assert "predictions_1.parquet" in errors[broken.name]
    frame = pd.read_csv(tmp_path / "results" / "results_summary.csv")
    assert frame.set_index("config/distill_type")["status"].to_dict() == {"task_only": "finished", "combined": "failed"}
    assert frame["validation_accuracy"].notna().tolist() == (frame["status"] == "finished").tolist()
    assert "Incomplete: 1 of 2 trials is missing" in workspace.report().read_text()
    (broken / "predictions_1.parquet").rmdir()
    _, errors = run(path)
    assert errors == {}
    assert "Incomplete" not in workspace.report().read_text()
    assert len(pd.read_csv(tmp_path / "results" / "results_summary.csv")) == 2


def kl(p, q):
    """KL of two rows of log-probabilities."""
    return float((p.exp() * (p - q)).sum())


def test_with_one_tokenizer_the_reported_losses_are_the_textbook_ones(tmp_path, byte_level, teacher_ref):
    """From the saved checkpoint and the teacher alone, dense cross-entropy, KL and errors give the reported numbers."""
    shape = {**STUDENT_SHAPE, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3}
    student = write_model(tmp_path / "student", byte_level, shape, 5)
    signals = {"top_k": 400, "dtype": "float32", "shard_examples": 16}
    workspace, errors = run(
        study_file(tmp_path, teacher_ref.model, student.model, signals=signals, groups=["combined"])
    )
    assert errors == {}
    folder = workspace.plans()[0].folder
    result = read_json(folder / "result.json")
    trained = ModelRef(model=str(folder / "checkpoint_1"))
    projector = load_file(folder / "checkpoint_1" / "projector.safetensors")
    weight, bias = projector["hidden.weight"].numpy(), projector["hidden.bias"].numpy()
    sums = dict.fromkeys(("task", "kd", "hidden", "attention"), 0.0)
    counts = dict.fromkeys(sums, 0)
    for example in workspace.examples.validation:
        teacher, student = dense(teacher_ref, example.text), dense(trained, example.text, add_eos=True)
        answer = [t for t in range(len(student["ids"])) if student["ends"][t] > len(example.prompt)]
        logprobs = torch.from_numpy(student["logits"]).double().log_softmax(-1)
        expected = torch.from_numpy(teacher["logits"]).double().log_softmax(-1)
        text = len(teacher["ids"])
        terms = {
            "task": [-float(logprobs[t - 1, student["ids"][t]]) for t in answer],
            "kd": [
                float((expected[t - 1].exp() * (expected[t - 1] - logprobs[t - 1])).sum()) for t in answer if t < text
            ],
            "hidden": ((student["hidden"][:text] @ weight.T + bias - teacher["hidden"]) ** 2).ravel().tolist(),
            "attention": reference.attention_terms(teacher, student)[0],
        }
        for name, values in terms.items():
            sums[name] += sum(values)
            counts[name] += len(values)
    measured = by_column(result["metrics"])
    for name in sums:
        assert measured[f"validation_{name}_loss"] == pytest.approx(sums[name] / counts[name], rel=1e-4), name


def test_a_changed_study_is_not_mixed_with_the_old_one(tmp_path, teacher_ref, student_ref):
    """Other settings are other trials; another k is another store, refused until it is captured, then both are kept."""
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, groups=["task_only"])
    workspace, _ = run(path)
    old = workspace.plans()[0].folder
    changed = Workspace(load_study(path, ["training.learning_rate=0.01"]))
    assert changed.plans()[0].folder != old
    other = Workspace(load_study(path, ["signals.top_k=7"]))
    with pytest.raises(UserError, match="top_k: store has 64, study asks for 7"):
        other.sweep()
    other.capture()
    other.verify()
    other.archive()
    assert SignalStore.open(other.store_path).layout.top_k == 7
    assert len(list(tmp_path.glob("offline_teacher_data_20*"))) == 2
    assert workspace.snapshot() != other.snapshot()


def test_a_snapshot_alone_is_enough_and_stays_as_it_is(tmp_path, teacher_ref, student_ref, monkeypatch):
    """Where the working store is gone, or has become another study's, the teacher does not run again."""
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, groups=["task_only"])
    workspace = Workspace(load_study(path))
    workspace.capture()
    workspace.verify()
    snapshot = workspace.archive()
    before = {p: (p.stat().st_mode, p.stat().st_mtime_ns) for p in snapshot.iterdir()}
    other = Workspace(load_study(path, ["signals.top_k=7"]))
    other.capture()
    for module in ("jobs", "workspace"):
        monkeypatch.setattr(
            f"stillroom.experiment.{module}.load_model", lambda *a: pytest.fail("the teacher was loaded again")
        )
    for gone in (False, True):
        if gone:
            shutil.rmtree(workspace.store_path)
        assert workspace.capture().path == snapshot
        assert workspace.capture(Slice(1, 2)).path == snapshot
        checked = workspace.verify()
        assert (checked["examples"], checked["store"]) == (60, str(snapshot))
        assert workspace.archive() == snapshot == workspace.snapshot()
        assert {p: (p.stat().st_mode, p.stat().st_mtime_ns) for p in snapshot.iterdir()} == before
    (snapshot / "verified.json").chmod(0o600)
    (snapshot / "verified.json").unlink()
    with pytest.raises(UserError, match="has not been verified: run `stillroom verify`"):
        workspace.archive()
    workspace.verify()
    assert workspace.archive() == snapshot
    assert (snapshot / "verified.json").stat().st_mode & 0o777 == 0o444


def test_the_teachers_dtype_is_part_of_its_data(tmp_path, teacher_ref, student_ref):
    """Signals in bfloat16 are not those in float32: another store, other trials."""
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, groups=["task_only"])
    Workspace(load_study(path)).capture()
    with pytest.raises(UserError, match="teacher_dtype: store has 'float32', study asks for 'bfloat16'"):
        Workspace(load_study(path, ["teacher.dtype=bfloat16"])).capture()


def test_one_baseline_at_a_time_is_in_memory(tmp_path, teacher_ref, student_ref, monkeypatch):
    """A GPU that holds the teacher has no room for the student beside it; what is measured is not measured again."""
    alive, loaded = weakref.WeakSet(), []

    def load(ref, *arguments):
        assert not list(alive), "the model before is still held"
        loaded.append(ref.model)
        model = load_model(ref, *arguments)
        alive.add(model)
        return model

    monkeypatch.setattr("stillroom.experiment.workspace.load_model", load)
    path = study_file(tmp_path, teacher_ref.model, student_ref.model)
    Workspace(load_study(path)).baselines()
    assert loaded == [teacher_ref.model, student_ref.model]
    (tmp_path / "results" / "baselines" / "student.json").unlink()
    Workspace(load_study(path)).baselines()
    assert loaded[2:] == [student_ref.model]


@pytest.mark.usefixtures("quick_pictures")
def test_a_report_is_of_the_study_as_it_is_now(finished_study):
    """What a study file says of its analysis counts without another sweep."""
    study = finished_study.study
    analysis = study.analysis.model_copy(update={"alpha": 0.1})
    changed = Workspace(study.model_copy(update={"analysis": analysis}))
    try:
        assert "its 90 %" in changed.report().read_text()
    finally:
        assert "its 95 %" in finished_study.report().read_text()


def test_each_stage_leaves_its_own_time(finished_study):
    """The teacher's evaluation is no part of its capture, and a trial trained alone is on record."""
    stages = read_json(finished_study.results / "run.json")["stages"]
    assert list(stages) == ["evaluate", "capture", "verify", "archive", "train"]
    assert stages["evaluate"]["measured"] == ["teacher", "student"]
    assert stages["train"]["trial"].endswith("combined_seed_0")
    assert all(stage["seconds"] > 0 for stage in stages.values())


def test_a_fine_tuned_teacher_is_another_teacher(tmp_path, teacher_ref, student_ref):
    """Fine-tuning is part of the teacher's identity, improves it on the training split, and is done once."""
    fine_tune = {"method": "full", "training": {"epochs": 2, "learning_rate": 0.003, "precision": "float32"}}
    teacher = {"model": teacher_ref.model, "dtype": "float32", "fine_tune": fine_tune}
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, teacher=teacher)
    workspace = Workspace(load_study(path))
    tuned = workspace.fine_tune()
    assert tuned.model != teacher_ref.model
    assert workspace.fine_tune() == tuned
    plain = Workspace(load_study(path, ["teacher.fine_tune.method=none"]))
    assert plain.fine_tune() == plain.teacher_ref
    assert plain.origin()["teacher"] != workspace.origin()["teacher"]
    epochs = read_json(tmp_path / "results" / "teacher" / "adapted.json")["epochs"]
    losses = [by_column(epoch["metrics"])["train_task_loss"] for epoch in epochs]
    assert losses[1] < losses[0]
    baselines = workspace.baselines()
    assert set(by_column(baselines["teacher"]["metrics"])) == set(by_column(baselines["student"]["metrics"]))
    assert all(value > 0 for value in baselines["teacher"]["answer_nll"].values())


@pytest.mark.usefixtures("quick_pictures")
def test_a_report_plans_again_only_what_has_changed(tmp_path, finished_study, monkeypatch):
    """The study's file and its newest archive decide: a second report need not load the models' tokenizers."""
    shutil.copytree(finished_study.results, tmp_path / "results")
    paths = finished_study.study.paths.model_copy(update={"results": tmp_path / "results"})
    planned = []
    monkeypatch.setattr(Workspace, "plans", lambda self: planned.append(self.study.name))

    def again(**change):
        planned.clear()
        Workspace(finished_study.study.model_copy(update={"paths": paths, **change})).report()
        return len(planned)

    file = tmp_path / "results" / "planned.json"
    facts = read_json(file, "study", "snapshot")
    facts["study"]["paths"] = paths.model_dump(mode="json")
    write_json(file, facts)
    assert again() == 0
    for stage in ("teacher", "evaluation"):
        dtypes = {**facts["study"][stage], "dtype": "bfloat16"}
        write_json(file, {**facts, "study": {**facts["study"], stage: dtypes}})
        given = getattr(finished_study.study, stage)
        assert as_planned(finished_study.study.model_copy(update={"paths": paths})) is None
        automatic = {"paths": paths, stage: given.model_copy(update={"dtype": "auto"})}
        found = as_planned(finished_study.study.model_copy(update=automatic))  # whatever it is on this machine
        assert getattr(found, stage).dtype == "bfloat16", "a tracker is told what was used"
        dtypes["dtype"] = "float16"  # which `auto` never is
        write_json(file, {**facts, "study": {**facts["study"], stage: dtypes}})
        assert as_planned(finished_study.study.model_copy(update=automatic)) is None
    mixed = {"teacher": {**facts["study"]["teacher"], "dtype": "bfloat16"}}  # a teacher on a GPU, students on CPUs
    write_json(file, {**facts, "study": {**facts["study"], **mixed}})
    both = {stage: getattr(finished_study.study, stage) for stage in ("teacher", "evaluation")}
    automatic = {stage: given.model_copy(update={"dtype": "auto"}) for stage, given in both.items()}
    found = as_planned(finished_study.study.model_copy(update={"paths": paths, **automatic}))
    assert (found.teacher.dtype, found.evaluation.dtype) == ("bfloat16", "float32")
    write_json(file, facts)
    assert again(analysis=finished_study.study.analysis.model_copy(update={"alpha": 0.01})) == 1
    write_json(file, {**facts, "snapshot": "offline_teacher_data_earlier"})
    assert again() == 1


@pytest.mark.usefixtures("quick_pictures")
def test_a_report_without_the_teachers_data_is_of_what_was_planned_last(tmp_path, finished_study, caplog):
    """Results are carried elsewhere without the models: the page is made all the same, and says on whose word."""
    shutil.copytree(finished_study.results, tmp_path / "results")
    paths = finished_study.study.paths.model_copy(update={"results": tmp_path / "results", "store": tmp_path / "none"})
    moved = Workspace(finished_study.study.model_copy(update={"paths": paths}))
    assert moved.report().read_text() == finished_study.report().read_text()
    assert "reported as planned last, since: no archived teacher data" in caplog.text


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("teacher.dtype=bfloat16", "teacher"),
        ("signals.top_k=8", "teacher"),
        ("corpus.split_seed=5", "teacher"),
        ("training.micro_batch_size=2", "trials"),
        ("evaluation.max_new_tokens=9", "trials"),
        ("objective.kd.temperature=2.0", "trials"),
        ("sweep.seeds=[0, 1]", "none"),
        ("sweep.max_concurrent=1", "none"),
        ("signals.minimum_coverage=0.1", "none"),
        ("analysis.alpha=0.1", "none"),
    ],
)
def test_a_change_costs_what_the_page_on_resuming_says(finished_study, tmp_path, change, again):
    """Each row of its table: the teacher again, every trial again, or nothing that is finished."""
    before = {plan.trial.name for plan in finished_study.plans()}
    file = str(finished_study.results.parent / "tiny.yaml")
    changed = Workspace(load_study(file, [change, f"paths.results={tmp_path / 'results'}"]))
    assert (changed.origin() != finished_study.origin()) == (again == "teacher")
    if again != "teacher":
        assert before.isdisjoint(plan.trial.name for plan in changed.plans()) == (again == "trials")

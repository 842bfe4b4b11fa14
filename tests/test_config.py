"""Studies: what is shipped is what was specified, and every mistake is one message that names the field."""

from __future__ import annotations

import time

import pytest
import yaml

from mistakes import MISTAKES
from stillroom.config import GROUPS, Objective, fingerprint
from stillroom.errors import UserError
from stillroom.studies import load_study, shipped_studies
from stillroom.terms.distances import DISTANCES
from stillroom.terms.divergences import DIVERGENCES


def test_the_shipped_studies_load():
    """They are there and valid."""
    assert shipped_studies() == ["control", "paper", "paper-llama2", "quickstart", "signals", "small"]
    for name in shipped_studies():
        assert load_study(name).name == name


def test_paper_is_the_study_as_given():
    """Models, data, weights, hyperparameters, groups, seeds and resources, to the letter."""
    study = load_study("paper")
    assert study.teacher.model == "mistralai/Mistral-7B-v0.1"
    assert study.student.model == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert len(study.teacher.revision) == len(study.student.revision) == 40
    assert {n: t.examples for n, t in study.corpus.tasks.items()} == {"sst2": 5000, "mmlu": 1000, "gsm8k": 1000}
    assert all(len(task.revision) == 40 for task in study.corpus.tasks.values())
    weights = {term: study.objective.weights[term] for term in study.group("combined").terms}
    assert weights == {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}
    assert (study.objective.kd.temperature, study.objective.hidden.scale, study.objective.attention.scale) == (
        1,
        "none",
        "none",
    )
    assert [g.name for g in study.groups] == ["black_box", "hidden", "attention", "combined"]
    assert study.sweep.seeds == tuple(range(7))
    training = study.training
    assert (training.learning_rate, training.weight_decay, training.batch_size, training.epochs) == (1e-4, 0.01, 8, 3)
    assert (training.max_gradient_norm, training.precision) == (1.0, "float16")
    assert (study.teacher.dtype, study.corpus.max_length, study.corpus.validation_share) == ("float16", 512, 0.1)
    assert (study.sweep.gpus_per_trial, study.sweep.cpus_per_trial) == (1, 4)
    assert study.teacher.fine_tune.method == "none"
    assert study.signals.top_k == 256


def test_papers_twin_differs_by_its_teacher_alone():
    """One tokenizer in place of two: a sanity check is one only if nothing else differs."""
    paper, twin = (load_study(name).model_dump() for name in ("paper", "paper-llama2"))
    assert {key for key in paper if paper[key] != twin[key]} == {"name", "teacher", "paths"}
    assert {key for key in paper["teacher"] if paper["teacher"][key] != twin["teacher"][key]} == {"model", "revision"}
    assert (twin["teacher"]["model"], len(twin["teacher"]["revision"])) == ("meta-llama/Llama-2-7b-hf", 40)


def test_the_signals_study_has_every_option_of_the_loss_and_every_placebo():
    """It is the demonstration that all of them run: a new option belongs in it."""
    study = load_study("signals")
    objectives = [group.objective(study.objective) for group in study.groups]
    for term, field, values in (
        ("task", "targets", {"gold", "teacher"}),
        ("kd", "divergence", {*DIVERGENCES}),
        ("kd", "support", {"top_k", "full"}),
        ("hidden", "distance", {*DISTANCES}),
        ("attention", "distance", {"mse", "kl"}),
    ):
        assert {getattr(getattr(o, term), field) for o in objectives} == values
    assert {term for group in study.groups for term in group.placebo} == {"kd", "hidden", "attention", "values"}
    assert any(group.share for group in study.groups)
    assert any(len(o.hidden.layers) > 1 for o in objectives)
    named = [group.model_dump(exclude={"name"}) for group in study.groups]
    assert all(named.count(group) == 1 for group in named)


def test_the_test_splits_are_those_of_the_published_figures():
    """Whole in the paper study, on the corpus's data sets and revisions; a split from elsewhere inherits neither."""
    study = load_study("paper")
    found = {n: (d.dataset, d.subset, d.split, d.examples) for n, d in study.test_splits.items()}
    assert found == {
        "sst2": ("nyu-mll/glue", "sst2", "validation", 872),
        "mmlu": ("cais/mmlu", "all", "test", 14042),
        "gsm8k": ("openai/gsm8k", "main", "test", 1319),
    }
    assert all(data.revision == study.corpus.tasks[name].revision for name, data in study.test_splits.items())
    other = load_study("paper", ["evaluation.test_splits.sst2.dataset=other/data"]).test_splits["sst2"]
    assert (other.dataset, other.subset, other.revision, other.split) == ("other/data", None, None, "validation")
    subset = load_study("paper", ["evaluation.test_splits.sst2.subset=cola"]).test_splits["sst2"]
    assert (subset.dataset, subset.subset) == (study.corpus.tasks["sst2"].dataset, "cola")
    with pytest.raises(UserError, match=r"evaluation.test_splits names the task 'quiz', which is not in corpus.tasks"):
        load_study("paper", ["evaluation.test_splits.quiz={split: test, examples: 9}"])


def test_groups_switch_on_the_terms_of_the_table():
    """The activation table of the study."""
    active = {
        name: {t for t, w in group.objective(Objective()).weights.items() if w > 0} for name, group in GROUPS.items()
    }
    assert active == {
        "task_only": {"task"},
        "black_box": {"task", "kd"},
        "hidden": {"task", "kd", "hidden"},
        "attention": {"task", "kd", "attention"},
        "combined": {"task", "kd", "hidden", "attention"},
    }


def test_a_study_declares_its_own_groups():
    """Weights and scales of one group override the study's for it alone."""
    study = load_study("small")
    scaled = study.group("attention_scaled").objective(study.objective)
    assert scaled.attention.scale == "row_sum"
    assert scaled.weights["hidden"] == 0
    assert study.group("attention").objective(study.objective).attention.scale == "none"


def test_overrides_reach_any_field():
    """`--set a.b=value`, read as YAML."""
    study = load_study("quickstart", ["training.epochs=1", "sweep.seeds=[4, 5]", "corpus.tasks.quiz.examples=50"])
    assert (study.training.epochs, study.sweep.seeds, study.corpus.tasks["quiz"].examples) == (1, (4, 5), 50)


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_message_that_names_the_field(override, message):
    """Nothing misspelt passes in silence, and no message is a traceback."""
    with pytest.raises(UserError) as error:
        load_study("quickstart", [override])
    assert message in str(error.value)
    assert "Traceback" not in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "a mapping of sections"),
        ("prompt: {{question}}", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("name: x", "teacher: Field required"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    """A study file that is no study."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_study(str(path))


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 31))
DEEP = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than the 10,000 values"),
        (MERGED, "more than the 10,000 values"),
        (DEEP, "nested more deeply than 32"),
        ("name: x\n" * 20_000, "longer than the 100,000"),
        ("training: {k: 1, k: 2}", "k twice"),
        ("".join(f"unknown{n}: 1\n" for n in range(3000)), "and 2986 more"),
        ("%YAML 99999999999999.1\n--- a", "not valid YAML"),
        ("name: \x07", "not valid YAML"),
    ],
    ids=["laughs", "merges", "deep", "long", "twice", "unknown", "version", "bell"],
)
def test_a_file_without_bounds_is_refused_at_once(tmp_path, text, message):
    """Few lines can stand for billions of values; no file is worth more than a moment."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(UserError) as error:
        load_study(str(path))
    assert time.process_time() - began < 5  # a hang takes hours
    assert message in str(error.value)
    assert len(str(error.value)) < 5000


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """Bytes that are no text, a folder, a name no system can have."""
    (tmp_path / "mine.yaml").write_bytes(b"name: \xff")
    for name in (tmp_path / "mine.yaml", tmp_path, tmp_path / ("x" * 300), "a\0b", "\udc80"):
        with pytest.raises(UserError):
            load_study(str(name))


def test_what_an_alias_stands_for_is_a_copy(tmp_path):
    """An override of one task leaves another that was written as the same alone; what is merged can be merged again."""
    text = """
corpus:
  tasks:
    quiz: &task {dataset: builtin, examples: 9}
    sentiment: *task
    arithmetic: &own {<<: *task, examples: 8}
  max_length: 128
training: &training {epochs: 1}
teacher: {model: "builtin:teacher", revision: 2024-13-45, fine_tune: {training: {<<: *training, epochs: 2}}}
student: {model: "builtin:student"}
name: x
groups: [hidden]
sweep: {seeds: [0]}
"""
    (tmp_path / "mine.yaml").write_text(text)
    study = load_study(str(tmp_path / "mine.yaml"), ["corpus.tasks.quiz.examples=5", "analysis={}"])
    assert {name: task.examples for name, task in study.corpus.tasks.items()} == {
        "quiz": 5,
        "sentiment": 9,
        "arithmetic": 8,
    }
    assert (study.training.epochs, study.teacher.fine_tune.training.epochs) == (1, 2)
    assert study.teacher.revision == "2024-13-45"  # no date


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ("primary=[[hidden, hidden]]", "compares a group with itself"),
        ("secondary=[[black_box, hidden]]", "hidden and black_box twice|black_box and hidden twice"),
        ("primary=[[hidden, black_box], [hidden, black_box]]", "hidden and black_box twice"),
    ],
)
def test_a_pair_of_groups_is_compared_once(declared, says):
    """In two families it would have two adjusted p, and perhaps two verdicts."""
    with pytest.raises(UserError, match=says):
        load_study("quickstart", [f"analysis.{declared}"])


def test_an_absent_study_lists_those_there_are():
    """A misspelt name."""
    with pytest.raises(UserError, match="paper, paper-llama2, quickstart, signals, small"):
        load_study("quickstar")


def test_yaml_cannot_run_code(tmp_path):
    """Safe loading only."""
    path = tmp_path / "mine.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="not valid YAML"):
        load_study(str(path))


def test_sections_are_frozen_and_fingerprints_follow_values():
    """A stage cannot change its settings; the same settings have the same fingerprint, others another."""
    study = load_study("quickstart")
    with pytest.raises(ValueError, match="frozen"):
        study.training.epochs = 9
    again, other = load_study("quickstart"), load_study("quickstart", ["training.epochs=9"])
    assert fingerprint(study.training) == fingerprint(again.training) != fingerprint(other.training)
    dumped = yaml.safe_dump(study.model_dump(mode="json"))
    assert type(study).model_validate(yaml.safe_load(dumped)) == study


def test_an_option_that_a_group_leaves_alone_is_not_in_its_fingerprint():
    """Folders of trials are named by it: a new option of a term must not move the trials of those who don't use it."""
    found = {name: fingerprint(group.objective(Objective())) for name, group in GROUPS.items()}
    assert found == {
        "task_only": "e61e92f57a581071",
        "black_box": "81a47444a5061e00",
        "hidden": "8ce4272e1ea79809",
        "attention": "aeca41dc44bfe8e6",
        "combined": "7a8d1898f8c0a98d",
    }


def test_a_divergence_without_a_mixing_weight_is_given_none():
    """λ of a plain KL would be ignored."""
    for name in ("jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl"):
        assert load_study("quickstart", [f"objective.kd.divergence={name}", "objective.kd.mixing=0.3"])
    with pytest.raises(UserError, match=r"objective.kd: .*divergence total_variation has no mixing"):
        load_study("quickstart", ["objective.kd.divergence=total_variation", "objective.kd.mixing=0.3"])


FIRST = {
    "paper": ("95938d02b0972e7d", "02f65350e1fe151c", "ea7b160da4118f27", "dd23235790b1e86d", "b497ea594f5fa74d"),
    "quickstart": ("9a83fac53da43b79", "f249d8055667d273", "8113dde1b4a13257", "1bf35ae39b5cca76", "c831aba8dedb2dbf"),
    "small": ("d642886eb62e0d8d", "228e1db2260d1b4d", "90617b442e0d5de7", "ee082d770e83d67e", "b497ea594f5fa74d"),
}
"""Fingerprints of the shipped studies' sections as they were first run."""


@pytest.mark.parametrize("name", FIRST)
def test_fields_that_came_later_leave_older_studies_their_fingerprints(name):
    """Else an upgrade would capture every store, and train every trial, again."""
    study = load_study(name)
    sections = (study.training, study.corpus, study.teacher.fine_tune, study.evaluation, study.objective)
    assert tuple(fingerprint(section) for section in sections) == FIRST[name]

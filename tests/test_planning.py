"""A plan's counts follow from the study's, and those of published models are the published ones."""

from __future__ import annotations

import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from scipy.stats import norm
from typer.testing import CliRunner

from stillroom.cli import app
from stillroom.config import ModelRef
from stillroom.errors import UserError
from stillroom.models.sizes import shape_of
from stillroom.preflight import doctor
from stillroom.preflight.design import examine_design
from stillroom.preflight.planning import _out_of_reach, plan_study
from stillroom.studies import load_study


def test_steps_and_bytes_of_the_paper_follow_from_its_counts():
    """By hand: 8 examples a step, the last step's fewer; 32 heads of the triangle's cells."""
    plan = plan_study(load_study("paper", ["training.batch_size=11", "signals.attention_dtype=null"]))
    train = plan["training"]["train_examples"]
    assert train == 6300
    assert plan["training"]["steps_per_trial"] == 3 * 573
    cells = 5000 * 465.0 + 1000 * 13074.0 + 1000 * 22384.0
    assert plan["store_bytes"]["attention"] == pytest.approx(cells * 32 * 2)


def test_parameters_of_published_models_are_the_published_counts():
    """Tied embeddings count once: 134.5 million of SmolLM2, 494 of Qwen2.5's 0.5 billion; 1.1 and 7.24 billion."""
    counts = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
        "Qwen/Qwen2.5-Coder-0.5B-Instruct": 494_032_768,
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
        "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    }
    for name, count in counts.items():
        assert shape_of(ModelRef(model=name), []).parameters == pytest.approx(count, rel=1e-3), name


def test_a_plans_memory_is_more_than_the_weights_alone_and_grows_with_the_batch():
    """By hand for the study as given: 7.24e9 weights of 2 bytes; 1.1e9 of 16 and a scored copy of 2."""
    memory = plan_study(load_study("paper"))["memory_bytes"]
    assert 2 * 7.2e9 < memory["capture"] < 2 * 7.3e9 + 4e9
    assert 18 * 1.1e9 < memory["trial"] < 18 * 1.1e9 + 10e9
    smaller = plan_study(load_study("paper", ["training.micro_batch_size=1"]))["memory_bytes"]
    assert smaller["trial"] < memory["trial"]
    assert smaller["capture"] == memory["capture"]


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("corpus.tasks.sst2.dataset=nowhere.jsonl", "corpus.tasks.sst2.dataset: nowhere.jsonl is missing"),
        ("corpus.tasks.sst2.dataset=./nowhere", "corpus.tasks.sst2.dataset: "),
        ("corpus.tasks.sst2.dataset=rows.csv", "corpus.tasks.sst2.dataset: "),
        ("corpus.tasks.sst2={dataset: builtin, examples: 9}", "corpus.tasks.sst2.dataset: .*no built-in rows"),
        ("evaluation.test_splits.sst2.dataset=nowhere.jsonl", "evaluation.test_splits.sst2.dataset: nowhere.jsonl"),
        ("teacher.model=./nowhere", "teacher.model: "),
        ("student.model=nobody/nothing", "student.model: "),
    ],
)
def test_a_plan_of_what_is_not_there_is_an_error(override, field):
    """Not a bill with an assumption: a local file is there and can be read, or the study will not run."""
    with pytest.raises(UserError, match=field):
        plan_study(load_study("paper", [override]))


def test_what_the_hub_alone_has_is_assumed_without_it_and_said():
    """The paper's models and data, on a machine without network: a plan, with what could not be counted up front."""
    plan = plan_study(load_study("paper"))
    assert any("could not be counted" in warning for warning in plan["warnings"])
    assert set(plan["warnings"]) <= set(plan["assumptions"])
    told = CliRunner().invoke(app, ["plan", "paper"])
    assert told.exit_code == 0
    assert told.stderr.startswith("warning: ")
    assert not plan_study(load_study("quickstart"))["warnings"]


def test_a_hub_that_says_no_is_no_hub_out_of_reach():
    """A data set that is known not to exist is an error; one behind a login, or an answer that never came, is not."""

    def caused(kind):
        try:
            raise UserError("cannot be loaded") from kind.__new__(kind)  # the hub's own want a response of its server
        except UserError as error:
            return error

    for known in (DatasetNotFoundError, RepositoryNotFoundError, ValueError):
        assert not _out_of_reach(caused(known))
    for unknown in (GatedRepoError, ConnectionError, LocalEntryNotFoundError):
        assert _out_of_reach(caused(unknown))


def test_where_there_is_no_gpu_the_hours_of_this_cpu_are_told_by_its_own_rates(monkeypatch):
    """An emulated dtype is many times slower: the hours must say so before they are spent."""
    rates = {torch.float32: 60.0, torch.bfloat16: 1.2, torch.float16: 1.2}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("stillroom.preflight.hours.products", lambda dtype, device: rates[dtype])
    slow, quick = (
        plan_study(load_study("quickstart", [f"training.precision={dtype}"]))["cpu_hours"]
        for dtype in ("bfloat16", "float32")
    )
    assert slow["training"] == pytest.approx(50 * quick["training"], rel=0.05)
    assert slow["evaluation"] == pytest.approx(quick["evaluation"])


def test_all_of_a_tasks_rows_are_counted_by_plan_and_doctor(tmp_path, teacher_ref, student_ref):
    """What `all` stands for is what the corpus will have; plain texts are in no accuracy."""
    file = tmp_path / "notes.jsonl"
    file.write_text("".join(f'{{"text": "Day {n % 20} of many."}}\n' for n in range(30)))
    tasks = f"{{notes: {{dataset: {file}, examples: all, text: {{}}}}, quiz: {{dataset: builtin, examples: 40}}}}"
    pair = [f"teacher.model={teacher_ref.model}", f"student.model={student_ref.model}"]
    study = load_study("quickstart", [f"corpus.tasks={tasks}", "evaluation.test_splits={}", "analysis={}", *pair])
    plan = plan_study(study)
    assert plan["corpus"]["by_task"]["notes"]["examples"] == 20
    assert plan["training"]["train_examples"] == 16 + 32
    assert plan["design"]["measures"].keys() == {"all tasks", "quiz"}
    (line,) = (found for found in doctor._tokenizers(study)[0] if found.subject == "coverage")
    assert "notes" in line.says


def test_every_layer_that_is_kept_is_in_the_plan():
    """A store of three layers is three times as large, and value vectors are a signal of their own."""
    one, three = (
        plan_study(load_study("quickstart", settings))["store_bytes"]
        for settings in ([], ["signals.hidden_layers=[1, 2, last]", "signals.value_layers=[last]"])
    )
    assert three["hidden"] == pytest.approx(3 * one["hidden"])
    assert "values" not in one
    assert three["values"] == pytest.approx(one["hidden"] / 2)  # 4 of 8 heads of 16, against a state of 128


SEVEN = "sweep.seeds=[0, 1, 2, 3, 4, 5, 6]"


def test_a_plan_says_what_the_design_can_find_out():
    """By hand: of seven seeds all must agree over three contrasts, so Φ(d)⁷ is the power; two of 2⁷ signs, times 3."""
    design = examine_design(load_study("quickstart", [SEVEN, "corpus.validation_share=0.2"]))
    primary = design["families"]["primary"]
    assert (primary["contrasts"], primary["seeds_needed"]) == (3, 7)
    assert primary["smallest_adjusted_p"] == pytest.approx(3 * 2 / 2**7)
    assert norm.cdf(primary["detectable"]) ** 7 == pytest.approx(0.8, abs=0.02)
    for measure in design["measures"].values():
        by_hand = primary["detectable"] * (2 * 0.5 * 0.5 / measure["validation_examples"]) ** 0.5
        assert measure["detectable_difference"]["primary"] == pytest.approx(by_hand)
    counts = [measure["validation_examples"] for measure in design["measures"].values()]
    assert counts[0] == sum(counts[1:])


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (
            ["sweep.seeds=[0, 1, 2]"],
            "with 3 seeds the smallest p over 3 contrasts is 0.75, so no difference can be significant at 0.05",
        ),
        (["sweep.seeds=[0]"], "with 1 seed the smallest p"),
        (
            [SEVEN, "groups=[task_only, black_box]"],
            "analysis.primary: none of its comparisons has both groups in this study",
        ),
        ([SEVEN, "corpus.tasks.sentiment.examples=20"], "sentiment has 4 validation examples, of which one is more"),
        ([SEVEN, "analysis.alpha=0.01"], "it takes 10 seeds"),
    ],
)
def test_a_design_that_cannot_answer_its_questions_is_warned_of(overrides, warning):
    """Before hours are spent, with what to change."""
    found = examine_design(load_study("quickstart", overrides))["warnings"]
    assert any(warning in text for text in found), found


def test_a_design_that_can_is_not_warned_of_and_the_command_shows_either():
    """On the terminal: the smallest difference by task, and the warning where there is one."""
    able = [SEVEN, "analysis.equivalence_margin=0.05"]
    assert examine_design(load_study("quickstart", able))["warnings"] == []
    assert examine_design(load_study("quickstart", [SEVEN, "analysis.primary=[]", *able]))["families"]["primary"] == {
        "contrasts": 0,
        "seeds_needed": None,
        "smallest_adjusted_p": None,
        "detectable": None,
    }
    told = CliRunner().invoke(app, ["plan", "quickstart", "--set", "sweep.seeds=[0, 1]"])
    assert told.exit_code == 0
    assert "warning: analysis.primary: with 2 seeds" in told.stderr
    assert "What 2 seeds can find out" in told.stdout


def test_a_plan_shows_the_layers_kept_and_the_pairs_of_each_group():
    """With a projector a pair, whose weights and moments a trial's memory counts; JSON has the pairs whole."""
    layers = ["signals.hidden_layers=[2, last]", "objective.hidden.layers=[[2, 1], [last, last]]"]
    plans = [plan_study(load_study("quickstart", given)) for given in ([], layers)]
    assert plans[1]["store_layers"] == {"hidden": (2, "last"), "attention": ("last",)}
    assert plans[1]["groups"]["hidden"]["layers"] == {"hidden": ((2, 1), ("last", "last"))}
    assert plans[1]["groups"]["black_box"] == {"terms": ("task", "kd"), "layers": {}, "projectors": 0}
    grown = plans[1]["memory_bytes"]["trial"] - plans[0]["memory_bytes"]["trial"]
    assert grown == 16 * 64 * 128
    assert plans[1]["groups"]["combined"]["projectors"] == 2
    set_ = [part for override in layers for part in ("--set", override)]
    shown = CliRunner().invoke(app, ["plan", "quickstart", *set_])
    assert shown.output.count("│ hidden    │ 2 → 1, last → last │") == 2
    assert "2, last" in shown.output[shown.output.index("Teacher data") :]


def test_a_sharded_trials_processes_hold_the_student_in_the_cpus_memory_too():
    """16 bytes a weight each; a trial of one process has no such line."""
    one, two = (
        plan_study(load_study("paper", [f"sweep.gpus_per_trial={n}", "training.precision=bfloat16"])) for n in (1, 2)
    )
    assert "trial_in_cpu_memory" not in one["memory_bytes"]
    assert two["memory_bytes"]["trial_in_cpu_memory"] == 2 * 16 * two["models"]["student"]["parameters"]

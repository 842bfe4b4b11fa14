"""Shares of the gradient in place of weights: found in a trial's first steps, then fixed, and resumed exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from setups import EVALUATION, TRAINING, Setup, changed, numbers
from small_things import STUDENT_SHAPE, write_model
from stillroom.analysis.frame import summary_row
from stillroom.config import GROUPS, Group, Objective, Training
from stillroom.errors import UserError
from stillroom.studies import load_study
from stillroom.training.shares import with_found_weights
from stillroom.training.train_student import Trial, train

GROUP = Group(name="equal_say", terms=("task", "kd", "hidden", "attention"), share={"hidden": 0.2, "attention": 0.3})
FOUND = GROUP.objective(Objective())


def trial(folder, student_ref, store, few, **options):
    """A trial of the group; shares are found over 5 steps, of which an epoch has 3."""
    training = TRAINING.model_copy(update={"share_steps": 5, "gradient_interval": 1})
    settings = (student_ref, training, Objective(), EVALUATION, few, store.path, folder)
    return train(Trial("t", GROUP, 0), *settings, **options)


@pytest.fixture(scope="module")
def few(examples):
    """Three steps an epoch."""
    return examples.__class__(examples.train[:24], examples.validation[:3], examples.counts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, student_ref, store, few):
    """A finished trial."""
    return trial(tmp_path_factory.mktemp("whole"), student_ref, store, few)


@pytest.mark.parametrize("pair", ["different", "same"])
def test_found_weights_give_the_shares_of_the_terms_own_gradients(pair, tmp_path, student_ref, byte_level, store, some):
    """Each term's gradient alone, its norm by loops over every weight in float64."""
    ref = student_ref if pair == "different" else write_model(tmp_path, byte_level, STUDENT_SHAPE, 9)
    setup = Setup(ref, store, FOUND)
    measured = setup.runner.measure([setup.collate(setup.items(some))])["norms"]
    weights = with_found_weights(FOUND, [measured], 1).weights
    norms = {}
    for term in GROUP.terms:
        off = {other: {"weight": 0.0} for other in GROUP.terms if other != term}
        alone = Setup(ref, store, changed(FOUND, **off, **{term: {"weight": weights[term]}}))
        gradient = alone.step(some)[1]
        of_student = [value for name, value in gradient.items() if name.startswith("model.")]
        norms[term] = math.sqrt(sum(float((value.double().numpy() ** 2).sum()) for value in of_student))
    total = sum(norms.values())
    assert norms["hidden"] / total == pytest.approx(0.2, rel=1e-4)
    assert norms["attention"] / total == pytest.approx(0.3, rel=1e-4)
    assert (weights["task"], weights["kd"]) == (1.0, 0.5)


def test_weights_follow_from_mean_norms_and_skip_what_is_not_finite():
    """By the definition: s of the sum of the weighted mean norms, whatever the number of steps."""
    rng = np.random.default_rng(0)
    rows = [dict(zip(GROUP.terms, rng.random(4).tolist(), strict=True)) for _ in range(6)]
    found = with_found_weights(FOUND, [*rows, {**rows[0], "kd": math.inf}], 7).weights
    means = {term: np.mean([row[term] for row in rows]) for term in GROUP.terms}
    # norms are measured with the weights that terms have: 1 for those whose weight is to be found
    weighted = {term: means[term] * (found[term] if term in GROUP.share else 1) for term in GROUP.terms}
    for term, share in GROUP.share.items():
        assert weighted[term] / sum(weighted.values()) == pytest.approx(share)
    for row in ({**rows[0], "hidden": 0.0}, {**rows[0], "task": 0.0, "kd": 0.0}, {**rows[0], "task": math.nan}):
        with pytest.raises(UserError, match=r"share of hidden: no weight gives it, since over the first 1 steps"):
            with_found_weights(FOUND, [row], 1)
        assert with_found_weights(FOUND, [row], 2).weights["hidden"] == 1.0  # there is a step to come


def test_a_trial_has_its_shares_from_the_first_step_and_reports_the_weights(whole):
    """What was measured at a step while weights are found is what was asked for; then they stay."""
    first = whole["gradients"][0]["shares"]
    assert (first["hidden"], first["attention"]) == (pytest.approx(0.2, rel=1e-3), pytest.approx(0.3, rel=1e-3))
    assert len(whole["gradients"]) == 6
    objective = whole["config"]["objective"]
    assert objective["hidden"]["share"] == 0.2
    norms, terms = whole["gradients"][5]["norms"], {row["measure"]: row["value"] for row in whole["metrics"]}
    assert norms["hidden"] > 0
    found = {term: objective[term]["weight"] for term in GROUP.terms}
    assert found["hidden"] != 1.0
    row = summary_row(whole)
    assert row["weight_hidden"] == found["hidden"]
    assert "weight_task" not in row
    total = sum(found[term] * row[f"validation_{term}_loss"] for term in GROUP.terms)
    assert row["validation_loss"] == pytest.approx(total)
    assert terms


def test_a_stopped_trial_finds_the_weights_of_an_unstopped_one(tmp_path, whole, student_ref, store, few):
    """The steps they are found in go on after the restart, to the bit."""

    def stop(metrics):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        trial(tmp_path, student_ref, store, few, report=stop)
    resumed = trial(tmp_path, student_ref, store, few)
    assert numbers(resumed) == numbers(whole)
    assert resumed["config"] == whole["config"]
    assert resumed["gradients"] == whole["gradients"]


def test_a_share_stands_in_place_of_a_weight():
    """By the field: never beside one, never of all; and those without one are what they were."""
    for wrong, message in (
        ({"share": {"hidden": 0.1}, "hidden": {"weight": 0.2}}, "has a share and a weight of hidden"),
        ({"share": {"attention": 0.1}}, "has share of attention, which is not among its terms"),
        ({"share": {"kd": 0.6, "hidden": 0.4}}, "the shares of the others are under 1"),
        ({"hidden": {"share": 0.1}}, r"write share: \{hidden: 0.1\} beside terms"),
    ):
        with pytest.raises(ValueError, match=message):
            Group(name="x", terms=("task", "kd", "hidden"), **wrong)
    with pytest.raises(ValueError, match="at least one term keeps its weight"):
        Group(name="x", terms=("hidden",), share={"hidden": 0.4})
    with pytest.raises(UserError, match=r"objective.hidden.share: only a group can have it"):
        load_study("quickstart", ["objective.hidden.share=0.1"])
    assert Group.model_validate(GROUP.model_dump(mode="json")) == GROUP
    assert "share" not in GROUPS["hidden"].objective(Objective()).model_dump()["hidden"]
    assert "share_steps" not in Training().model_dump()
    assert FOUND.weights == {"task": 1.0, "kd": 0.5, "hidden": 1.0, "attention": 1.0, "values": 0.0}

"""A student sharded over processes: the numbers of one process, its checkpoints, and an end when a process ends."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pandas as pd
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from pretend_gpu import pretend_gpu
from setups import TIMES
from stillroom.config import Group, Lora
from stillroom.errors import UserError
from stillroom.experiment.jobs import run_trial
from stillroom.experiment.sharded_trial import train_sharded
from stillroom.files import read_json
from stillroom.folders import ERROR
from stillroom.models.hub import load_model
from stillroom.studies import load_study
from stillroom.training.distillation_student import DistillationStudent
from stillroom.training.sharding import ALONE, Ranks, fill, part_of, shard


@pytest.fixture(scope="module")
def plan(finished_study):
    """A trial of every term of the study; its last step has two examples."""
    combined = next(plan for plan in finished_study.plans() if plan.trial.group.name == "combined")
    training = combined.training.model_copy(update={"micro_batch_size": 3, "batch_size": 7})
    return replace(combined, training=training)


@pytest.fixture(autouse=True)
def _forked(monkeypatch):
    """Where no GPU is to be used, processes are forks."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def trained(plan, folder, count, report=lambda metrics: None):
    """Its result by so many processes, and its folder."""
    plan = replace(plan, experiment=folder)
    by = partial(train_sharded, count=count, threads=1) if count > 1 else None
    return run_trial(plan, report, by=by), plan.folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, plan):
    """What one process makes of it."""
    return trained(plan, tmp_path_factory.mktemp("alone"), 1)


def assert_alike(found, expected):
    """Losses, norms, weights and answers of two trials agree within rounding, and everything else is the same."""
    (result, folder), (other, before) = found, expected
    unlike = dict.fromkeys((*TIMES, "metrics", "weights"))
    for a, b in zip(other["epochs"], result["epochs"], strict=True):
        assert {**a, **unlike} == {**b, **unlike}
        for x, y in zip(a["metrics"], b["metrics"], strict=True):
            assert {**x, "value": 0} == {**y, "value": 0}
            assert y["value"] == pytest.approx(x["value"], rel=1e-4), x
    for a, b in zip(other["gradients"], result["gradients"], strict=True):
        assert b["norms"] == pytest.approx(a["norms"], rel=1e-3)
    for name in [path.name for path in (before / "checkpoint_2").glob("*.safetensors")]:
        weights, others = (load_file(place / "checkpoint_2" / name) for place in (folder, before))
        for key, weight in weights.items():
            torch.testing.assert_close(weight, others[key], rtol=1e-3, atol=1e-4)
    answers = [pd.read_parquet(place / "predictions.parquet") for place in (folder, before)]
    assert answers[0]["prediction"].tolist() == answers[1]["prediction"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_sharded_numbers_are_those_of_one_process(tmp_path, plan, alone, count):
    """With three processes the last step leaves one of them without an example."""
    assert_alike(trained(plan, tmp_path, count), alone)


@pytest.mark.slow
def test_every_kind_of_student_and_term_can_be_sharded(tmp_path, plan):
    """LoRA layers, layers computed again in the backward pass, a placebo, a share to be found."""
    group = Group(
        name="all", terms=("task", "kd", "hidden", "attention"), share={"hidden": 0.2}, placebo=("attention",)
    )
    training = plan.training.model_copy(update={"gradient_checkpointing": True, "share_steps": 2})
    changed = replace(plan, trial=replace(plan.trial, group=group), training=training, lora=Lora(rank=4))
    assert_alike(trained(changed, tmp_path / "sharded", 2), trained(changed, tmp_path / "alone", 1))


@pytest.mark.slow
def test_a_killed_process_ends_the_trial_and_other_numbers_of_processes_resume_it(tmp_path, plan, alone):
    """Nobody waits for the one that is gone; two processes begin, three or one finish, as if nothing had happened."""

    others = psutil.Process().children()  # of other tests

    def kill_one(metrics):
        ranks = [child for child in psutil.Process().children() if child not in others]
        assert len(ranks) == 2
        ranks[-1].kill()

    with pytest.raises(UserError, match=r"one of the trial's 2 processes was stopped .*SIGKILL.*micro_batch_size"):
        trained(plan, tmp_path, 2, kill_one)
    folder = next(tmp_path.iterdir())
    assert "SIGKILL" in read_json(folder / ERROR)["error"]
    assert psutil.Process().children() == others
    assert (folder / "checkpoint_1").is_dir()
    epochs = []
    assert_alike(trained(plan, tmp_path, 3, epochs.append), alone)
    assert [epoch["epoch"] for epoch in epochs] == [2]


@pytest.mark.slow
def test_what_stops_a_process_is_said_as_it_was_said_there(tmp_path, plan):
    """A user's mistake is one; the processes are gone."""
    bad, others = replace(plan, minimum_coverage=1.0), psutil.Process().children()
    with pytest.raises(UserError, match=r"signals\.minimum_coverage=100%"):
        trained(bad, tmp_path, 2)
    assert psutil.Process().children() == others


def _parts(rank, student_ref, meeting, said):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(rank)  # a process brings what it has itself: weights are read from one file by all
    student = DistillationStudent(load_model(student_ref))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    whole = shard(student, Ranks(rank, 2), torch.device("cpu"))
    parts = dict(student.named_parameters())
    assert all(isinstance(part, DTensor) for part in parts.values())
    held = sum(part.to_local().numel() for part in parts.values())
    moved = part_of(before["model.model.norm.weight"], parts["model.model.norm.weight"])
    assert torch.equal(moved.to_local(), parts["model.model.norm.weight"].to_local())
    with torch.no_grad():
        for tensor in whole.state_dict().values():
            tensor.zero_()
    fill(whole, student)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    said.put((held, sum(parameter.numel() for parameter in whole.parameters())))


def test_more_gpus_than_there_are_is_one_line():
    """Not what CUDA says of a device that it does not have."""
    with pretend_gpu(2), pytest.raises(UserError, match="gpus_per_trial: 3 asked for, 2 found here"):
        train_sharded(None, print, count=3, threads=1)


def test_each_process_holds_its_part_of_the_weights_alone(tmp_path, student_ref):
    """Else a student larger than a GPU would not fit; all parts together are the student that was loaded."""
    context = torch.multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    start_processes(_parts, (student_ref, str(tmp_path / "rendezvous"), said), 2, start_method="fork")
    (first, whole), (second, _) = said.get(), said.get()
    assert first + second == whole
    assert abs(first - second) < 0.02 * whole


@pytest.mark.parametrize(("field", "value"), [("precision", "float16"), ("optimizer", "adamw_8bit")])
def test_what_cannot_be_sharded_is_refused_before_hours_are_spent(field, value):
    """A scaler and an 8-bit optimizer know nothing of parts of tensors."""
    with pytest.raises(UserError, match=rf"training\.{field}: a student on several GPUs .*{value}"):
        load_study("quickstart", ["sweep.gpus_per_trial=2", f"training.{field}={value}"])


def test_a_step_is_shared_out_whole():
    """No example twice, none left out, and as many passes for every process."""
    for count in range(1, 12):
        for size in range(1, 5):
            ranks = [Ranks(rank, size) for rank in range(size)]
            parts = [rank.part(range(count)) for rank in ranks]
            assert sorted(n for part in parts for n in part) == list(range(count))
            assert {rank.largest_part(count) for rank in ranks} == {max(map(len, parts))}
    assert list(ALONE.part([3, 1, 2])) == [3, 1, 2]

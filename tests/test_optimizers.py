"""The optimizer that a study names: AdamW or, where bitsandbytes can run it, one with moments in 8 bits."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from setups import TRAINING, numbers, run
from stillroom.config import Training
from stillroom.errors import UserError
from stillroom.experiment.sources import Sources
from stillroom.preflight import doctor
from stillroom.preflight.planning import plan_study
from stillroom.studies import load_study
from stillroom.training.optimizers import optimizer_of

EIGHT = "training.optimizer=adamw_8bit"


class Stop(Exception):
    """Stands for a process that dies."""


def test_where_it_cannot_run_it_is_refused_beforehand(monkeypatch):
    """Without the library, or paged without a GPU: by the doctor, before the corpus is built, and by the trial."""
    weights = [torch.nn.Parameter(torch.ones(2))]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    study = load_study("quickstart", [EIGHT])
    (line,) = doctor._optimizers(study)
    assert not line.fine
    message = "training.optimizer=adamw_8bit: bitsandbytes is not installed: pip install bitsandbytes, or choose adamw"
    assert line.says == message
    with pytest.raises(UserError, match=message):
        Sources(study).require_supported()
    with pytest.raises(UserError, match=message):
        optimizer_of(weights, study.training)
    tuned = load_study("quickstart", ["teacher.fine_tune.training.optimizer=adamw_8bit"])
    with pytest.raises(UserError, match=r"^teacher.fine_tune.training.optimizer=adamw_8bit: bitsandbytes"):
        Sources(tuned).require_supported()
    assert list(doctor._optimizers(load_study("quickstart"))) == []

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU whose memory could be paged; choose adamw_8bit or adamw"):
            Sources(load_study("quickstart", ["training.optimizer=paged_adamw_8bit"])).require_supported()


def test_adamw_is_what_it_was():
    """Fused AdamW by default, which no fingerprint names."""
    assert "optimizer" not in Training().model_dump()
    optimizer = optimizer_of([torch.nn.Parameter(torch.ones(2))], TRAINING)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]


@pytest.mark.slow
def test_moments_in_8_bits_take_less_memory(teacher_ref, student_ref):
    """The plan counts a byte for each moment."""
    pair = [f"teacher.model={teacher_ref.model}", f"student.model={student_ref.model}"]
    studies = [load_study("quickstart", [*pair, *more]) for more in ([], [EIGHT])]
    whole, eight = (plan_study(study, guess_this_cpu=False) for study in studies)
    saved = whole["memory_bytes"]["trial"] - eight["memory_bytes"]["trial"]
    assert saved >= 6 * whole["models"]["student"]["parameters"]


@pytest.mark.slow
def test_with_the_real_library_a_stopped_trial_ends_as_an_unstopped_one(tmp_path, student_ref, store, examples):
    """Its 8-bit moments are kept with the checkpoint and read back, to the bit; the student learns as under AdamW."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    of = {"optimizer": "adamw_8bit"}

    def stop(metrics):
        raise Stop

    whole = run(tmp_path / "whole", student_ref, store, examples, **of)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", student_ref, store, examples, report=stop, **of)
    saved = torch.load(tmp_path / "stopped" / "checkpoint_1" / "trainer_state.pt", weights_only=True)
    kept = [str(found) for state in saved["optimizer"]["state"].values() for found in _dtypes(state)]
    assert "torch.uint8" in kept
    resumed = run(tmp_path / "stopped", student_ref, store, examples, **of)
    assert numbers(resumed) == numbers(whole)
    plain = numbers(run(tmp_path / "plain", student_ref, store, examples))
    assert plain != numbers(whole)


def _dtypes(state):
    """Of every tensor in one parameter's state, however deep."""
    for value in state.values():
        if isinstance(value, dict):
            yield from _dtypes(value)
        elif isinstance(value, torch.Tensor):
            yield value.dtype

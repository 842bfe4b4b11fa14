"""A batch on its way: made ahead by threads, then moved to a device."""

from __future__ import annotations

import threading
import time
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from setups import Setup
from stillroom.cli import app
from stillroom.errors import UserError
from stillroom.training.batches import (
    Prefetched,
    coverage_between,
    epoch_order,
    measure_coverage,
    prepare,
    require_coverage,
)
from studies import study_file


def devices(value):
    """The device of every tensor in a batch, by its place."""
    if isinstance(value, Tensor):
        return value.device.type
    if isinstance(value, dict):
        return {name: devices(inner) for name, inner in value.items()}
    return {f.name: devices(getattr(value, f.name)) for f in fields(value)} if is_dataclass(value) else None


def test_every_tensor_of_a_batch_moves_but_the_rows_that_the_host_cuts(student_ref, store, examples):
    """A tensor left behind would stop a GPU's first step; outcome rows on the GPU would stop every chunk of it."""
    setup = Setup(student_ref, store)
    batch = setup.collate(setup.items(examples.train[:6]))
    found = devices(batch.to(torch.device("meta")))
    assert found["head"]["outcomes"].pop("rows") == "cpu"
    assert {*devices_in(found)} == {"meta"}
    assert len([*devices_in(found)]) == 2 + 2 + 4 + 2 + 6
    assert batch.to(torch.device("cpu")) is batch


def devices_in(found):
    """Every device named at any depth."""
    for value in found.values():
        if isinstance(value, dict):
            yield from devices_in(value)
        elif value is not None:
            yield value


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_made_ahead_keep_their_order_and_are_few(workers):
    """However long each takes, they come as asked; memory holds `depth` and the one in use."""
    made = []

    def make(n):
        time.sleep(0.002 * (n % 3))
        made.append(n)
        return n

    ahead = Prefetched(range(40), make, workers, depth=4)
    for n, result in enumerate(ahead):
        assert result == n
        assert len(made) <= n + 1 + 4
    assert n == 39
    assert ahead.waited > 0


@pytest.mark.parametrize("workers", [1, 3])
def test_a_batch_that_fails_is_raised_where_it_is_due_and_nothing_goes_on_behind(workers):
    """Those before it are trained on; threads end with the epoch, also one left half-way."""
    threads = threading.active_count()
    seen = []
    with pytest.raises(ZeroDivisionError):
        seen.extend(Prefetched([4, 2, 1, 0, 3], lambda n: 4 // n, workers))
    assert threading.active_count() == threads
    left = iter(Prefetched(range(1000), str, workers))
    assert next(left) == "0"
    left.close()
    assert threading.active_count() == threads


def test_threads_read_one_store_at_once(store):
    """Each reads through handles of its own: the same bytes as one after the other, in any order."""
    ids = list(store.index) * 3
    alone = [store.read(example_id) for example_id in ids]
    together = list(Prefetched(ids, store.read, workers=4, depth=8))
    for one, other in zip(alone, together, strict=True):
        assert one.example_id == other.example_id
        assert (one["hidden"] == other["hidden"]).all()
        assert (one["attention"] == other["attention"]).all()
        assert (one["topk_ids"] == other["topk_ids"]).all()


def test_batches_of_an_epoch_do_not_come_by_length():
    """Sorting by length saves padding within a batch; between batches it would be a curriculum."""
    lengths = [(n * 37) % 200 for n in range(1003)]
    longest = [max(lengths[i] for i in batch) for batch in epoch_order(lengths, 8, 1000, seed=3, epoch=1)]
    assert longest != sorted(longest)


def test_a_shuffled_epoch_covers_all_once_and_is_seeded():
    """Order is a function of seed and epoch; every example once; batches of like lengths."""
    lengths = [(n * 37) % 200 for n in range(1003)]
    order = epoch_order(lengths, 8, 16, seed=3, epoch=1)
    assert sorted(i for batch in order for i in batch) == list(range(1003))
    assert order == epoch_order(lengths, 8, 16, seed=3, epoch=1)
    assert order != epoch_order(lengths, 8, 16, seed=3, epoch=2)
    assert order != epoch_order(lengths, 8, 16, seed=4, epoch=1)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in order)
    assert sum(lengths) / padded > 0.9


@pytest.mark.parametrize("command", ["run", "fine-tune", "evaluate", "capture", "import --requests asked.jsonl"])
def test_a_pair_that_hardly_aligns_is_refused_before_its_teacher_runs(
    command, tmp_path, teacher_ref, student_ref, monkeypatch
):
    """With the figures that each trial would give, but hours earlier."""
    monkeypatch.chdir(tmp_path)
    name, *options = command.split()
    teacher = {"model": teacher_ref.model, "fine_tune": {"method": "full" if name == "fine-tune" else "none"}}
    study = study_file(tmp_path, teacher_ref.model, student_ref.model, teacher=teacher)
    low = ["--set", "signals.minimum_coverage=0.99", "--set", "trackers=[]"]
    told = CliRunner().invoke(app, [name, study, *options, *low])
    assert isinstance(told.exception, UserError), told.output
    assert "share too few token boundaries" in str(told.exception)
    assert not (tmp_path / "offline_teacher_data").exists()
    left = {path.name for path in (tmp_path / "results").iterdir()}
    assert left <= {"corpus", "models", "run.json"}
    assert not (tmp_path / "asked.jsonl").exists()


def test_what_is_refused_early_is_what_a_trial_would_refuse(student_ref, store, examples, tokenizer):
    """The same figures of the same examples."""
    some = examples.train[:20]
    early = coverage_between(some, store.tokenizer, tokenizer)
    assert early == measure_coverage(prepare(some, tokenizer, store))
    with pytest.raises(UserError, match="share too few token boundaries"):
        require_coverage(early, 0.99)

"""One trial: a student trained with its group's loss, evaluated and saved after each epoch.

`train` reads top to bottom; nothing here knows of Ray. A trial is a function of its arguments: the same seed
gives every group the same weights, batches and dropout, and a trial run again gives the same numbers on a CPU.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from stillroom.config import Evaluation, Group, ModelRef, Objective, Retention, Training
from stillroom.data.corpus import Examples
from stillroom.data.prepared import Prepared
from stillroom.data.tasks import Example
from stillroom.errors import UserError
from stillroom.evaluation.harness_tasks import Harness
from stillroom.evaluation.metrics import Metric, accuracy_metrics, by_column, overall_metrics, save_predictions
from stillroom.evaluation.scoring import evaluate
from stillroom.files import remove_leftovers, write_json
from stillroom.folders import TrialFolder
from stillroom.models.architecture import check_capture, check_model
from stillroom.models.compiled import ROUNDED, compile_layers
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.models.precision import allow_determinism, default_device
from stillroom.models.sizes import context_length
from stillroom.models.split_products import scoring_copy
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.offline_teacher_data.verification import require_verified
from stillroom.progress import Progress, silent
from stillroom.terms import next_token_of, terms_of
from stillroom.training.batches import (
    Prefetched,
    epoch_order,
    measure_coverage,
    prepare,
    require_coverage,
    with_teacher_answers,
)
from stillroom.training.by_kind import count_kinds, losses_by_kind, merged
from stillroom.training.checkpoints import (
    RESUMING,
    TrainingState,
    drop_superseded,
    drop_unusable,
    last_checkpoint,
    restore_checkpoint,
    saving_checkpoint,
)
from stillroom.training.collation import Batch, Collator
from stillroom.training.distillation_student import DistillationStudent
from stillroom.training.optimizers import optimizer_of
from stillroom.training.schedules import learning_rate, require_room_to_fall
from stillroom.training.sharding import ALONE, Ranks, scored_by_all, shard
from stillroom.training.shares import has_shares, with_found_weights
from stillroom.training.step import Finite, StepRunner, accumulate, losses_of, mean_shares

T = TypeVar("T")

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Trial:
    """One cell of groups × seeds; `trial_id` names what it was made from."""

    trial_id: str
    group: Group
    seed: int

    @property
    def name(self) -> str:
        """Folder name."""
        return f"trial_{self.trial_id}_{self.group.name}_seed_{self.seed}"


def train(
    trial: Trial,
    student_ref: ModelRef,
    training: Training,
    objective: Objective,
    evaluation: Evaluation,
    examples: Examples,
    store_path: Path | None,
    folder: Path,
    *,
    minimum_coverage: float = 0.0,
    max_length: int | None = None,
    keep_checkpoints: Retention = "last",
    adapter: Callable[[Any], Any] | None = None,
    test: Sequence[Example] = (),
    harness: Harness | None = None,
    report: Report = lambda metrics: None,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train one student and return its result, which is also `folder/result.json`.

    `objective` is the study's; the group's own settings are applied to it. Without a store only the task loss can
    be on. `test` examples are evaluated once, after the last epoch, and so are the tasks of `harness`. Resumes from the
    last complete checkpoint in `folder`, which no other process may write.

    `ranks`: the processes of an initialised process group that train it together, each of which must call this.
    Their losses are those of one process, but for rounding and the dropout, which differs.
    """
    group_objective = trial.group.objective(objective)
    _set_determinism(training.deterministic)
    device = default_device()
    if ranks.leads:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        drop_unusable(folder, last_checkpoint(folder))
    last = _common_checkpoint(folder, ranks)
    tokenizer = load_tokenizer(student_ref)
    store = _open(store_path)
    model = _load(student_ref, trial.seed, device if ranks.size == 1 else torch.device("cpu"), adapter)
    if training.gradient_checkpointing:
        from stillroom.models.attention_capture import recompute_layers

        recompute_layers(model)
    rounded = _rounding(training, model)
    head = next_token_of(group_objective, store, tokenizer, model)
    terms = terms_of(group_objective, store, model.config)
    student = DistillationStudent(model, terms, trial.seed)
    parts = {
        n: prepare(part, tokenizer, store)
        for n, part in (("train", examples.train), ("validation", examples.validation))
    }
    collate = Collator(store, head, terms, trial.seed, rounded)
    coverage = measure_coverage([*parts["train"], *parts["validation"]]) if store else {}
    require_coverage(coverage, minimum_coverage)
    kinds = count_kinds([*parts["train"], *parts["validation"]]) if store else {}
    _check_architecture(student, parts["train"])
    if training.compile:
        compile_layers(model, student.taps, device)
    whole = shard(student, ranks, device)
    optimizer = optimizer_of(student.parameters(), training)
    scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "float16")
    state = restore_checkpoint(last, student, whole, optimizer, scaler) if last else TrainingState()
    lengths = [len(item.encoding) for item in parts["train"]]  # of the examples' own answers: one order for all groups
    answers: dict[str, Any] = {}
    if group_objective.task.targets == "teacher":
        parts["train"], answers = with_teacher_answers(parts["train"], tokenizer, store, max_length)
    steps = math.ceil(len(lengths) / training.batch_size)
    require_room_to_fall(training, steps * training.epochs)
    runner = StepRunner(student, head, terms, group_objective, training, scaler, ranks)
    score = partial(_scored, whole, training, evaluation, ranks, device)
    finding = has_shares(group_objective)
    if finding:
        runner.objective = with_found_weights(group_objective, state.share_norms, training.share_steps)
    workers = 1 if device.type == "cpu" else min(_READERS, max(1, torch.get_num_threads() - 1))

    for epoch in range(state.epoch, training.epochs):
        started, tokens = time.perf_counter(), 0
        totals: dict[str, Any] = defaultdict(float)
        unread: tuple[Finite, list[Batch]] | None = None
        order = epoch_order(lengths, training.batch_size, training.bucket_batches, trial.seed, epoch)
        batches = Prefetched(
            order,
            lambda chosen: _micro_batches(parts["train"], chosen, training, collate, ranks),
            workers,
            2 * workers + 2,
        )
        student.train()
        for number, micro in enumerate(batches):
            step = epoch * steps + number
            if finding and len(state.share_norms) < training.share_steps:
                seed_step(trial.seed, step, ranks.rank)
                state.share_norms.append(runner.measure(micro, group_objective)["norms"])
                runner.objective = with_found_weights(group_objective, state.share_norms, training.share_steps)
            seed_step(trial.seed, step, ranks.rank)
            if training.gradient_interval and step % training.gradient_interval == 0:
                state.gradients.append({"step": step, **runner.measure(micro)})
            seed_step(trial.seed, step, ranks.rank)
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(training, step, steps * training.epochs)
            sums, counts, finite = runner.update(micro, optimizer)
            if unread:  # a step late: whether this one was finite is not known before it has run
                state.count_step(*unread, training.max_skipped_steps)
            unread = finite, micro
            accumulate(totals, sums, counts)
            tokens += sum(batch.tokens for batch in micro)
            progress(step + 1, steps * training.epochs)
        if unread:
            state.count_step(*unread, training.max_skipped_steps)
        sums_and_counts = ranks.summed(totals)
        _require_every_term(group_objective, sums_and_counts)
        trained = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with saving_checkpoint(student, whole, ranks, tokenizer, optimizer, scaler, state, folder, training):
            began = time.perf_counter()
            validation_losses = _validation_losses(student, parts["validation"], runner, collate, training)
            predictions = score(lambda model: evaluate(model, tokenizer, examples.validation, evaluation))
            metrics = [
                *overall_metrics(losses_of(sums_and_counts, runner.objective), "train"),
                *validation_losses,
                *accuracy_metrics(predictions),
            ]
            facts = {
                "epoch": epoch + 1,
                "step": (epoch + 1) * steps,
                "tokens": int(ranks.summed({"tokens": tokens})["tokens"]),
                "skipped_steps": state.skipped,
                "train_seconds": trained - started,
                "data_wait_seconds": batches.waited,
                "evaluation_seconds": time.perf_counter() - began,
            }
            state.epoch, state.epochs = epoch + 1, [*state.epochs, {"metrics": metrics, **facts}]
            if ranks.leads:
                save_predictions(predictions, TrialFolder(folder).predictions_of(epoch + 1))
        if ranks.leads:
            drop_superseded(folder, keep_checkpoints, state.epochs, finished=False)
        report({**by_column(metrics), **facts})

    test_metrics, more = list[Metric](), dict[str, Any]()
    if test or harness:
        began = time.perf_counter()
        kept = folder if ranks.leads else None
        test_metrics = _evaluate_test_splits(score, tokenizer, test, harness, evaluation, kept)
        more["test_evaluation_seconds"] = time.perf_counter() - began
    more = {**more, **({"teacher_answers": answers} if answers else {})}
    if store:
        heads = Collator(store, head, (), trial.seed, rounded)
        losses = losses_by_kind(runner, parts["validation"], heads, training.micro_batch_size or training.batch_size)
        more["kinds"] = merged(kinds, losses)
    result = _result(trial, runner.objective, state, coverage, student, test_metrics, more)
    if ranks.leads:
        _keep_newest_predictions(folder, state)
        write_json(TrialFolder(folder).result, result)
        drop_superseded(folder, keep_checkpoints, state.epochs, finished=True)
    return result


_READERS = 8
"""Threads that make batches for a GPU, at most: batches wait in page-locked memory. A CPU's step takes every core."""


def _set_determinism(on: bool) -> None:
    """Refuse operations that may differ from run to run."""
    if on:
        allow_determinism()
    torch.use_deterministic_algorithms(on)


def _common_checkpoint(folder: Path, ranks: Ranks) -> Path | None:
    """What the leading process would resume from. `UserError` in one that does not see it, on a folder shared late."""
    last = last_checkpoint(folder) if ranks.leads else None
    epoch = int(ranks.summed({"epoch": int(last.name.split("_")[1]) if last else 0})["epoch"])
    if not epoch or ranks.leads:
        return last
    path = TrialFolder(folder).checkpoint(epoch)
    if not all((path / name).is_file() for name in RESUMING):
        raise UserError(f"{path} is not seen here: another node wrote it; run the same command again to resume")
    return path


def _rounding(training: Training, model: transformers.PreTrainedModel) -> int:
    """To how many tokens batches are rounded up; where positions are learnt, their number may be no multiple."""
    most = context_length(model.config)
    return ROUNDED if training.compile and (most % ROUNDED == 0 or most == sys.maxsize) else 1


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Dropout is a function of seed, step and rank, so it is the same in every group and after a restart."""
    torch.manual_seed(((seed << 32) + step) ^ (rank << 48))


def _open(store_path: Path | None) -> SignalStore | None:
    if store_path is None:
        return None
    store = SignalStore.open(store_path)
    require_verified(store)
    return store


def _load(
    ref: ModelRef, seed: int, device: torch.device, adapter: Callable[[Any], Any] | None
) -> transformers.PreTrainedModel:
    model = load_model(ref, "float32", device)
    if adapter is not None:
        torch.manual_seed(seed)  # of the adapter's first weights
        model = adapter(model)
    return model


def _check_architecture(student: DistillationStudent, items: Sequence[Prepared]) -> None:
    check = check_capture if student.taps.attention or student.taps.values else check_model
    ids = torch.from_numpy(items[0].encoding.ids.astype("int64"))[None].to(student.model.device)
    student.eval()
    check(student.model, ids)


def _micro_batches(
    items: Sequence[Prepared], chosen: Sequence[int], training: Training, collate: Collator, ranks: Ranks = ALONE
) -> list[Batch]:
    size = training.micro_batch_size or training.batch_size
    batches = collate.step([items[i] for i in chosen], size, ranks)
    return [batch.pinned() for batch in batches] if torch.cuda.is_available() else batches


def _require_every_term(objective: Objective, totals: Mapping[str, Any]) -> None:
    """Raise `UserError` if a term that is on has compared nothing in a whole epoch: its group would be another's."""
    idle = [term for term, weight in objective.weights.items() if weight > 0 and not totals.get(f"{term}_count")]
    if idle:
        raise UserError(
            f"the term {idle[0]} is on, but in a whole epoch no example had anything to compare for it; "
            "see how one is aligned with `stillroom inspect`, choose another pair, or take the term out of the group"
        )


@torch.no_grad()
def _validation_losses(
    student: DistillationStudent,
    items: Sequence[Prepared],
    runner: StepRunner,
    collate: Collator,
    training: Training,
) -> list[Metric]:
    student.eval()
    totals: dict[str, Any] = defaultdict(float)
    order = sorted(range(len(items)), key=lambda i: len(items[i].encoding))
    steps = [order[first : first + training.batch_size] for first in range(0, len(order), training.batch_size)]
    for micro in Prefetched(steps, lambda chosen: _micro_batches(items, chosen, training, collate, runner.ranks)):
        for batch in micro:
            _, sums = runner.losses(batch.to(runner.device), runner.objective.weights, batch.counts)
            accumulate(totals, sums, batch.counts)
    return overall_metrics(losses_of(runner.ranks.summed(totals), runner.objective), "validation")


def _scored(
    whole: DistillationStudent,
    training: Training,
    evaluation: Evaluation,
    ranks: Ranks,
    device: torch.device,
    of: Callable[[transformers.PreTrainedModel], T],
) -> T:
    """What is found with the student as it is saved, in the dtype that it is scored in."""
    whole.eval()
    scored = scoring_copy(whole.model, training.precision, evaluation.dtype)
    with torch.compiler.set_stance("force_eager" if training.compile else "default"):  # each text has its own lengths
        if ranks.size == 1:
            return of(scored)
        return scored_by_all(scored, scored is not whole.model, ranks, device, of)


def _evaluate_test_splits(
    score: Callable[[Callable[[transformers.PreTrainedModel], Any]], Any],
    tokenizer: Any,
    test: Sequence[Example],
    harness: Harness | None,
    evaluation: Evaluation,
    folder: Path | None,
) -> list[Metric]:
    metrics: list[Metric] = []
    if test:
        predictions = score(lambda model: evaluate(model, tokenizer, test, evaluation))
        if folder:
            save_predictions(predictions, TrialFolder(folder).test_predictions)
        metrics += accuracy_metrics(predictions, "test")
    if harness:
        metrics += score(lambda model: harness.metrics(model, tokenizer, evaluation))
    return metrics


def _result(
    trial: Trial,
    objective: Objective,
    state: TrainingState,
    coverage: dict[str, Any],
    student: DistillationStudent,
    test_metrics: Sequence[Metric],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    last = state.epochs[-1]
    return {
        "trial": trial.name,
        "config": {"distill_type": trial.group.name, "seed": trial.seed, "objective": objective.model_dump()},
        **last,
        "metrics": [*last["metrics"], *test_metrics],
        **more,
        "epochs": state.epochs,
        "gradients": state.gradients,
        "gradient_shares": mean_shares(state.gradients),
        "coverage": coverage,
        "parameters": sum(p.numel() for p in student.model.parameters()),
    }


def _keep_newest_predictions(folder: Path, state: TrainingState) -> None:
    newest = TrialFolder(folder).predictions_of(state.epochs[-1]["epoch"])
    if newest.is_file():  # else stopped right after this line
        newest.replace(TrialFolder(folder).predictions)
    for old in folder.glob("predictions_[0-9]*.parquet"):
        old.unlink()

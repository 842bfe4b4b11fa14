"""What each group's options cost in processor time: a step of it beside a step of `black_box`.

    python benchmarks/options.py signals

The store is the study's own, made first. A step reads and collates its batch, as a trial's does; all groups take the
same batches, in turn.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from inputs import open_study, study_arguments
from ratios import begin, finish, ratio, value
from stillroom.config import Group
from stillroom.experiment.workspace import Workspace
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.models.precision import default_device
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.terms import next_token_of, terms_of
from stillroom.training.batches import epoch_order, prepare, with_teacher_answers
from stillroom.training.collation import Collator
from stillroom.training.distillation_student import DistillationStudent
from stillroom.training.optimizers import optimizer_of
from stillroom.training.shares import has_shares, with_found_weights
from stillroom.training.step import StepRunner

BASELINE = "black_box"


def steps_of(workspace: Workspace, group: Group, store: SignalStore, count: int) -> Callable[[], None]:
    """So many optimizer steps of a group: the first of an epoch, again each time."""
    study = workspace.study
    ref = workspace.student_ref
    tokenizer, model = load_tokenizer(ref), load_model(ref, "float32", default_device())
    objective = group.objective(study.objective)
    head, terms = next_token_of(objective, store, tokenizer, model), terms_of(objective, store, model.config)
    student = DistillationStudent(model, terms).train()
    items = prepare(workspace.examples.train, tokenizer, store)
    training = study.training
    order = epoch_order([len(item.encoding) for item in items], training.batch_size, training.bucket_batches, 0, 0)
    if objective.task.targets == "teacher":
        items, _ = with_teacher_answers(items, tokenizer, store, study.corpus.max_length)
    collate = Collator(store, head, terms)
    optimizer = optimizer_of(student.parameters(), training)
    runner = StepRunner(student, head, terms, objective, training, torch.amp.GradScaler(enabled=False))
    size = training.micro_batch_size or training.batch_size
    chosen = [[items[i] for i in batch] for batch in order[:count]]
    if has_shares(objective):
        norms = [runner.measure(collate.step(chosen[0], size), objective)["norms"]]
        runner.objective = with_found_weights(objective, norms, 1)

    def steps() -> None:
        for batch in chosen:
            runner.update(collate.step(batch, size), optimizer)

    return steps


def in_turn(alternatives: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each alternative in each round, after one unmeasured: other programs do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(rounds + 1):
        for name, run in alternatives.items():
            started = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - started)
    return seconds


def main(given: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = study_arguments(__doc__, None)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a group in a round")
    options = parser.parse_args(given)
    begin(options)
    with tempfile.TemporaryDirectory() as folder:
        workspace = open_study(options, Path(folder))
        workspace.capture()
        workspace.verify()
        store = SignalStore.open(workspace.study.paths.store)
        groups = {group.name: group for group in workspace.study.groups}
        seconds = in_turn({n: steps_of(workspace, g, store, options.steps) for n, g in groups.items()}, options.rounds)
    baseline = seconds[BASELINE]
    rows: list[dict[str, Any]] = [
        value(f"{BASELINE}, ms of processor time a step", 1e3 * min(baseline) / options.steps)
    ]
    rows += [
        ratio(f"{name} / {BASELINE}", group_seconds, baseline)
        for name, group_seconds in seconds.items()
        if name != BASELINE
    ]
    finish(f"steps of {workspace.study.name}'s groups", rows, options)


if __name__ == "__main__":
    main()

"""A training step: `black_box` against plain fine-tuning, `combined` against `black_box`, and a teacher in the loop.

    python benchmarks/training.py small --set teacher.model=DIR --set student.model=DIR ...

Plain fine-tuning is Transformers' own loss on full logits. The teacher in the loop is TRL's `GKDTrainer` with forward
KL on the data's own answers; it needs one vocabulary, so there the student's model teaches a cut of itself of half the
depth, and ours reads that teacher's store. All take the same examples in the same batches, made within the step,
autocast, clipping and fused AdamW.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from inputs import mixed, open_study, study_arguments
from ratios import begin, finish, in_turn, ratio, value
from stillroom.config import GROUPS, Group, ModelRef, Objective, Study
from stillroom.data.tasks import Example
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.models.precision import DTYPES, default_device
from stillroom.offline_teacher_data import capture, made_from
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.terms import NextTokenTerms, Term, next_token_of, terms_of
from stillroom.training.batches import epoch_order, prepare
from stillroom.training.collation import Batch, Collator
from stillroom.training.distillation_student import DistillationStudent
from stillroom.training.step import StepRunner

FULL = Group(name="full", terms=("task", "kd"), kd={"support": "full"})
"""`black_box` over every token: its store has the teacher's output head."""
TRIED = {**GROUPS, FULL.name: FULL}


class Bench:
    """A student with its optimizer, and batches of a store by group."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, store: SignalStore, study: Study) -> None:
        self.student = DistillationStudent(model, terms_of(Objective(), store, model.config))
        self.student.train()
        self.tokenizer, self.store, self.study = tokenizer, store, study
        rate = study.training.learning_rate
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=rate, fused=True)
        self._terms: dict[str, tuple[NextTokenTerms, Sequence[Term]]] = {}

    def batches(self, group: str, examples: Sequence[Example], count: int) -> list[Callable[[], Batch]]:
        """How to make the first batches of an epoch; the same examples for every group. `task_only` reads no store."""
        objective = TRIED[group].objective(Objective())
        items = prepare(examples, self.tokenizer, None if group == "task_only" else self.store)
        head, terms = self.terms(objective)
        collate = Collator(None if group == "task_only" else self.store, head, terms)
        training = self.study.training
        order = epoch_order([len(i.encoding) for i in items], training.batch_size, training.bucket_batches, 0, 0)
        return [lambda batch_items=[items[i] for i in chosen]: collate(batch_items) for chosen in order[:count]]  # type: ignore[misc]

    def terms(self, objective: Objective) -> tuple[NextTokenTerms, Sequence[Term]]:
        """An objective's terms for this student."""
        model = self.student.model
        head = next_token_of(objective, self.store, self.tokenizer, model)
        return head, terms_of(objective, self.store, model.config)

    def runner(self, group: str) -> StepRunner:
        """What makes a group's optimizer steps; its terms are made once, as a trial makes them."""
        objective = TRIED[group].objective(Objective())
        if group not in self._terms:
            self._terms[group] = self.terms(objective)
        return StepRunner(self.student, *self._terms[group], objective, self.study.training, self.scaler())

    def scaler(self) -> torch.amp.GradScaler:
        """Of the loss, where the study trains in float16."""
        enabled = self.study.training.precision == "float16"
        return torch.amp.GradScaler(self.student.model.device.type, enabled=enabled)

    def ours(self, group: str, batches: Sequence[Callable[[], Batch]]) -> None:
        """One optimizer step a batch, read and collated first, as a trial makes it."""
        runner = self.runner(group)
        for make in batches:
            runner.update([make()], self.optimizer)

    def step(self, losses: Sequence[Callable[[], torch.Tensor]]) -> None:
        """The same step with another loss."""
        scaler = self.scaler()
        for loss in losses:
            self.optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss()).backward()
            scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.study.training.max_gradient_norm)
            scaler.step(self.optimizer)
            scaler.update()

    def plain(self, batches: Sequence[Callable[[], Batch]], masked: bool = True) -> None:
        """Fine-tuning with the model's own loss."""
        self.student.model.set_attn_implementation("sdpa")
        self.step([lambda make=make: self.own_loss(make(), masked) for make in batches])  # type: ignore[misc]

    def own_loss(self, batch: Batch, masked: bool = True) -> torch.Tensor:
        """Transformers' loss, from full logits; `masked`: with a padding mask, as its users give it one."""
        model, precision = self.student.model, self.study.training.precision
        labels, batch = labels_of(batch).to(model.device, non_blocking=True), batch.to(model.device)
        with torch.autocast(model.device.type, DTYPES[precision], enabled=precision != "float32"):
            mask = batch.mask if masked else None
            output = model(batch.ids, attention_mask=mask, labels=labels, use_cache=False)
        found: torch.Tensor = output.loss
        return found

    @torch.no_grad()
    def difference(self, batch: Batch) -> float:
        """Relative difference of Transformers' loss and our task loss on a batch."""
        runner = self.runner("task_only")
        ours = float(runner.losses(batch.to(runner.device), runner.objective.weights, batch.counts)[0])
        return abs(ours - float(self.own_loss(batch))) / ours


def labels_of(batch: Batch) -> torch.Tensor:
    """Transformers' labels: the token at each supervised place, −100 elsewhere; the model shifts them."""
    labels = torch.full((batch.ids.numel() + 1,), -100)
    supervised = batch.head.targets >= 0
    labels[batch.head.rows[supervised] + 1] = batch.head.targets[supervised]
    return labels[:-1].view_as(batch.ids)


def store_of(ref: ModelRef, study: Study, examples: Sequence[Example], folder: Path) -> SignalStore:
    """The model's signals of the examples."""
    tokenizer = load_tokenizer(ref)
    model = load_model(ref, study.teacher.dtype, default_device())
    origin = made_from("benchmark", study.teacher.dtype, tokenizer, study.signals, examples)
    return capture(model, tokenizer, examples, study.signals, folder, origin)


def cut(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy with its first layers alone."""
    model = copy.deepcopy(model)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    return model


def teacher_in_the_loop(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: Any, precision: str, folder: Path
) -> Any:
    """TRL's trainer, off-policy, forward KL at temperature 1."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    settings = GKDConfig(
        output_dir=str(folder / "trl"),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        use_cpu=default_device().type == "cpu",
        bf16=precision == "bfloat16",
        gradient_checkpointing=False,
        report_to=[],
    )
    rows = Dataset.from_list([{"input_ids": [0], "labels": [0]}])
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=settings,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=lambda features: features,
    )


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and what they were measured on."""
    workspace = open_study(options, folder)
    study, examples = workspace.study, mixed(workspace.examples.train, options.examples)
    store = store_of(workspace.teacher_ref, study, examples, folder / "store")
    model, tokenizer = load_model(workspace.student_ref, device=default_device()), workspace.tokenizers[1]
    bench = Bench(model, tokenizer, store, study)
    batches = {g: bench.batches(g, examples, options.batches) for g in ("task_only", "black_box", "combined")}
    seconds = in_turn(
        {
            "plain": lambda: bench.plain(batches["task_only"]),
            "unmasked": lambda: bench.plain(batches["task_only"], masked=False),
            "black_box": lambda: bench.ours("black_box", batches["black_box"]),
            "combined": lambda: bench.ours("combined", batches["combined"]),
        },
        options.rounds,
    )
    rows = [
        ratio("time of a black_box step / plain fine-tuning", seconds["black_box"], seconds["plain"], "≤ 1.0"),
        ratio("time of a combined step / black_box", seconds["combined"], seconds["black_box"], "≤ 1.25"),
        ratio("time of plain fine-tuning with a padding mask / without", seconds["plain"], seconds["unmasked"]),
    ]
    rows.append(
        value("relative difference of Transformers' loss and ours", bench.difference(batches["task_only"][0]()), "0")
    )
    tokens = sum(make().tokens for make in batches["black_box"])
    facts: dict[str, Any] = {"tokens": tokens, "seconds": seconds}
    if not options.without_trl:
        per_way = loop_against_store(options, workspace, examples, folder)
        facts["own_capture_seconds"] = per_way.pop("capture")[0]
        rows.append(
            ratio("speed of black_box / teacher in the loop (TRL)", per_way["trl"], per_way["black_box"], "≥ 1.5")
        )
        facts["trl_seconds"] = per_way
    return rows, facts


def loop_against_store(
    options: argparse.Namespace, workspace: Any, examples: Sequence[Example], folder: Path
) -> dict[str, list[float]]:
    """Seconds of TRL's way and ours, one tokenizer."""
    study, ref = workspace.study, workspace.student_ref
    whole, tokenizer = load_model(ref, device=default_device()), workspace.tokenizers[1]
    student = cut(whole, whole.config.num_hidden_layers // 2)
    started = time.perf_counter()
    store = store_of(ref, study, examples, folder / "own_store")
    captured = time.perf_counter() - started
    bench = Bench(student, tokenizer, store, study)
    batches = {group: bench.batches(group, examples, options.batches) for group in ("task_only", "black_box")}
    trainer = teacher_in_the_loop(
        whole.to(DTYPES[study.teacher.dtype]), student, tokenizer, study.training.precision, folder
    )
    whole.set_attn_implementation("sdpa")
    prepared = trainer.accelerator.prepare_model(student)  # as its own loop does: autocast is in it
    trainer.current_gradient_accumulation_steps = 1  # as its own loop sets it

    def trl() -> None:
        student.set_attn_implementation("sdpa")
        for make in batches["task_only"]:
            batch = make()
            bench.optimizer.zero_grad(set_to_none=True)
            inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": labels_of(batch)}
            inputs = {name: tensor.to(student.device) for name, tensor in inputs.items()}
            trainer.training_step(prepared, inputs)
            torch.nn.utils.clip_grad_norm_(bench.student.parameters(), study.training.max_gradient_norm)
            bench.optimizer.step()

    seconds = in_turn({"trl": trl, "black_box": lambda: bench.ours("black_box", batches["black_box"])}, options.rounds)
    return {**seconds, "capture": [captured]}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = study_arguments(__doc__, examples=48)
    parser.add_argument("--batches", type=int, default=4, help="optimizer steps a round")
    parser.add_argument(
        "--without-trl", action="store_true", help="leave out the comparison that needs `pip install trl`"
    )
    options = parser.parse_args(arguments)
    begin(options)
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = measure(options, Path(folder))
    finish("training", rows, options, **facts)


if __name__ == "__main__":
    main()

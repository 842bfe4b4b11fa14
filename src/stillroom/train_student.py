"""One trial: a student trained with its group's loss, evaluated and saved after each epoch.

`train` reads top to bottom; nothing here knows of Ray. A trial is a function of its arguments: the same seed
gives every group the same weights, batches and dropout, and a trial run again gives the same numbers on a CPU.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.attention_capture import check_capture
from stillroom.batches import (
    Batch,
    Collator,
    Prefetched,
    Prepared,
    epoch_order,
    measure_coverage,
    prepare,
    require_coverage,
    teacher_to_student_ids,
)
from stillroom.config import Evaluation, Group, ModelRef, Objective, Training, UserError
from stillroom.corpus import Examples
from stillroom.distillation_student import DistillationStudent, StudentOutputs, load_projector, save_student
from stillroom.evaluation import accuracy_metrics, evaluate, save_predictions
from stillroom.losses import HeadTargets, aligned_attention, attention_loss, head_losses, hidden_loss
from stillroom.models import (
    DTYPES,
    default_device,
    heads,
    load_model,
    load_tokenizer,
    logit_softcap,
    output_logits,
    tokenizer_hash,
    vocabulary_size,
    width,
    without_adapters,
)
from stillroom.offline_teacher_data import require_verified
from stillroom.provenance import write_json
from stillroom.signal_store import SignalStore

STATE = "trainer_state.pt"
RESULT = "result.json"
Report = Callable[[dict[str, Any]], None]
Progress = Callable[[int, int], None]


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
    keep_checkpoints: str = "last",
    adapter: Callable[[Any], Any] | None = None,
    report: Report = lambda metrics: None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Train one student and return its result, which is also `folder/result.json`.

    `objective` is the study's; the group's own settings are applied to it. Without a store only the task loss can
    be on. Goes on from the last whole checkpoint in `folder`.
    """
    own = trial.group.objective(objective)
    device = default_device()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(student_ref)
    store = _open(store_path)
    last = _last_checkpoint(folder)
    student = _build(student_ref, store, trial.seed, device, adapter)
    parts = {n: prepare(part, tokenizer, store, own) for n, part in (("train", examples.train), ("validation", examples.validation))}
    collate = Collator(store, own, _vocabulary_map(store, tokenizer, student), heads(student.model.config))
    coverage = measure_coverage([*parts["train"], *parts["validation"]], store) if store else {}
    require_coverage(coverage, minimum_coverage)
    _check_attention(student, parts["train"], own)
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        fused=device.type == "cuda",
    )
    scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "float16")
    state = _restore(last, student, optimizer, scaler) if last else _State()
    lengths = [len(item.encoding) for item in parts["train"]]
    steps = math.ceil(len(lengths) / training.batch_size)
    hidden_scale = store.hidden_mean_square if store and own.hidden_scale == "teacher_rms" else 1.0
    step_of = StepRunner(student, own, training, device, scaler, hidden_scale)

    for epoch in range(state.epoch, training.epochs):
        started, totals, tokens = time.perf_counter(), defaultdict(float), 0
        order = epoch_order(lengths, training.batch_size, training.bucket_batches, trial.seed, epoch)
        batches = Prefetched(order, lambda chosen: _micro_batches(parts["train"], chosen, training, collate))
        student.train()
        for number, micro in enumerate(batches):
            step = epoch * steps + number
            seed_step(trial.seed, step)
            if training.gradient_interval and step % training.gradient_interval == 0:
                state.gradients.append({"step": step, **step_of.measure(micro)})
            seed_step(trial.seed, step)
            _set_rate(optimizer, training, step)
            sums, counts, finite = step_of.update(micro, optimizer)
            state.count_step(finite, micro, training.max_skipped_steps)
            _accumulate(totals, sums, counts)
            tokens += sum(batch.tokens for batch in micro)
            progress(step + 1, steps * training.epochs)
        trained = time.perf_counter()
        metrics = {f"train_{name}": value for name, value in losses_of(totals, own, hidden_scale).items()}
        validation, predictions = _validate(student, tokenizer, parts["validation"], examples, step_of, collate, training, evaluation)
        metrics |= validation
        metrics |= {
            "epoch": epoch + 1,
            "step": (epoch + 1) * steps,
            "tokens": tokens,
            "skipped_steps": state.skipped,
            "train_seconds": trained - started,
            "data_wait_seconds": batches.waited,
            "evaluation_seconds": time.perf_counter() - trained,
        }
        state.epoch, state.epochs = epoch + 1, [*state.epochs, metrics]
        final = epoch + 1 == training.epochs
        save_predictions(predictions, folder / f"predictions_{epoch + 1}.parquet")
        _save(student, tokenizer, optimizer, scaler, state, folder, training, keep_checkpoints, final)
        report(metrics)

    return _finish(trial, own, state, coverage, folder, student)


def seed_step(seed: int, step: int) -> None:
    """Dropout is a function of seed and step, so it is the same in every group and after a restart."""
    torch.manual_seed((seed << 32) + step)


@dataclass
class _State:
    """What a trial has done so far."""

    epoch: int = 0
    skipped: int = 0
    consecutive: int = 0

    def __post_init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.gradients: list[dict[str, Any]] = []

    def count_step(self, finite: bool, micro: Sequence[Batch], limit: int) -> None:
        """Count skipped steps; stop the trial, naming the examples, when too many follow each other."""
        self.consecutive = 0 if finite else self.consecutive + 1
        self.skipped += not finite
        if self.consecutive > limit:
            ids = [example for batch in micro for example in batch.examples]
            raise UserError(f"{self.consecutive} steps in a row had non-finite gradients; the last on examples {ids}")


def _open(store_path: Path | None) -> SignalStore | None:
    if store_path is None:
        return None
    store = SignalStore.open(store_path)
    require_verified(store)
    return store


def _build(
    ref: ModelRef, store: SignalStore | None, seed: int, device: torch.device, adapter: Callable[[Any], Any] | None
) -> DistillationStudent:
    model = load_model(ref, "float32", device)
    teacher_width = store.layout.width if store else width(model.config)
    if adapter is not None:
        model = adapter(model)
    return DistillationStudent(model, teacher_width, seed)


def _vocabulary_map(store: SignalStore | None, tokenizer: Any, student: DistillationStudent) -> Any:
    if store is None:
        return None
    teacher_tokenizer = load_tokenizer(ModelRef(model=str(store.path / "tokenizer")))
    if tokenizer_hash(teacher_tokenizer) != store.manifest["made_from"]["tokenizer"]:
        raise UserError(f"{store.path / 'tokenizer'} is not the tokenizer the store was made with")
    teacher_size = store.manifest["vocabulary"]
    return teacher_to_student_ids(teacher_tokenizer, tokenizer, teacher_size, vocabulary_size(student.model))


def _check_attention(student: DistillationStudent, items: Sequence[Prepared], objective: Objective) -> None:
    if objective.weights["attention"] > 0:
        ids = torch.from_numpy(items[0].encoding.ids.astype("int64"))[None].to(student.model.device)
        student.eval()
        check_capture(student.model, ids, lambda hidden: output_logits(student.model, hidden))


def _micro_batches(items: Sequence[Prepared], chosen: Sequence[int], training: Training, collate: Collator) -> list[Batch]:
    size = training.micro_batch_size or training.batch_size
    return [collate([items[i] for i in chosen[n : n + size]]) for n in range(0, len(chosen), size)]


def _set_rate(optimizer: torch.optim.Optimizer, training: Training, step: int) -> None:
    warm = min(1.0, (step + 1) / training.warmup_steps) if training.warmup_steps else 1.0
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate * warm


class StepRunner:
    """Losses of micro-batches, the gradient of a whole step, and each term's share of it."""

    def __init__(
        self,
        student: DistillationStudent,
        objective: Objective,
        training: Training,
        device: torch.device,
        scaler: torch.amp.GradScaler,
        hidden_scale: float,
    ) -> None:
        """`hidden_scale` divides the hidden loss (1, or the teacher's mean square)."""
        self.student, self.objective, self.training = student, objective, training
        self.device, self.scaler, self.hidden_scale = device, scaler, hidden_scale

    def autocast(self) -> Any:
        """The study's precision for the forward pass; float32 needs none."""
        if self.training.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.training.precision])

    def losses(self, batch: Batch, weights: dict[str, float], counts: dict[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of one micro-batch, each term divided by the whole step's count, and the terms' sums."""
        with self.autocast():
            output = self.student(batch.ids, batch.mask, weights.get("attention", 0.0) > 0)
            flat = output.hidden.flatten(0, 1)
            head = self.student.model.get_output_embeddings()
            targets = HeadTargets(
                batch.targets,
                batch.outcomes if weights.get("kd", 0.0) > 0 else None,
                weights["task"] / counts["task"],
                weights.get("kd", 0.0) / max(counts.get("kd", 0), 1),
                self.objective.temperature,
                logit_softcap(self.student.model),
            )
            rows = flat[batch.head_rows]
            total, task, kd = head_losses(rows, head.weight, getattr(head, "bias", None), targets)
        sums = {"task": task, "kd": kd}
        for name, value in self._alignment_sums(batch, output, flat, weights).items():
            sums[name] = value.detach()
            total = total + weights[name] / max(counts[name], 1) * value
        return total, sums

    def _alignment_sums(
        self, batch: Batch, output: StudentOutputs, flat: Tensor, weights: dict[str, float]
    ) -> dict[str, Tensor]:
        sums = {}
        if weights.get("hidden", 0.0) > 0 and batch.hidden_rows is not None and batch.teacher_hidden is not None:
            projected = self.student.project(flat[batch.hidden_rows])
            sums["hidden"] = hidden_loss(projected, batch.teacher_hidden) / self.hidden_scale
        if weights.get("attention", 0.0) > 0 and output.attention is not None and batch.teacher_attention is not None:
            assert batch.segment_rows is not None
            assert batch.segment_of is not None
            assert batch.segments is not None
            attention = output.attention
            if batch.teacher_attention.shape[1] != attention.shape[1]:
                attention = attention.mean(1, keepdim=True)
            aligned = aligned_attention(attention.float(), batch.segment_rows, batch.segment_of)
            sums["attention"] = attention_loss(aligned, batch.teacher_attention, batch.segments)
        return sums

    def update(self, micro: Sequence[Batch], optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, int], bool]:
        """One optimizer step; skipped if a gradient is not finite. Returns the terms' sums, counts, and whether it stepped."""
        optimizer.zero_grad(set_to_none=True)
        sums, counts = self._backward(micro, dict(self.objective.weights), self.scaler.scale)
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.training.max_gradient_norm)
        finite = bool(torch.isfinite(norm))
        if finite or self.scaler.is_enabled():
            self.scaler.step(optimizer)
        self.scaler.update()
        return sums, counts, finite

    def measure(self, micro: Sequence[Batch]) -> dict[str, Any]:
        """Norm over the student's weights of each active term's gradient, weight included, and its share.

        Norms are of the step's gradient before clipping; shares divide by the sum of the norms.
        """
        norms = {}
        for term, weight in self.objective.weights.items():
            if weight > 0:
                self.student.zero_grad(set_to_none=True)
                self._backward(micro, {**dict.fromkeys(self.objective.weights, 0.0), term: weight}, lambda loss: loss)
                gradients = [p.grad for p in self.student.model.parameters() if p.grad is not None]
                norms[term] = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        self.student.zero_grad(set_to_none=True)
        whole = sum(norms.values())
        return {"norms": norms, "shares": {term: norm / whole if whole else 0.0 for term, norm in norms.items()}}

    def _backward(
        self, micro: Sequence[Batch], weights: dict[str, float], scale: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        counts: dict[str, int] = defaultdict(int)
        for batch in micro:
            for name, value in batch.counts.items():
                counts[name] += value
        sums: dict[str, Tensor] = {}
        for batch in micro:
            total, own = self.losses(batch.to(self.device), weights, counts)
            scale(total).backward()
            for name, value in own.items():
                sums[name] = sums[name] + value if name in sums else value
        return sums, counts


def _accumulate(totals: dict[str, Any], sums: dict[str, Tensor], counts: dict[str, int]) -> None:
    for name, value in sums.items():
        if name in counts:
            totals[f"{name}_sum"] = totals[f"{name}_sum"] + value
            totals[f"{name}_count"] += counts[name]


def losses_of(totals: dict[str, Any], objective: Objective, hidden_scale: float = 1.0) -> dict[str, float]:
    """Means of the active terms and their weighted total, from sums and counts over many batches."""
    means = {
        f"{name}_loss": float(totals[f"{name}_sum"]) / totals[f"{name}_count"]
        for name, weight in objective.weights.items()
        if weight > 0 and totals.get(f"{name}_count")
    }
    total = sum(objective.weights[name.removesuffix("_loss")] * value for name, value in means.items())  # type: ignore[index]
    return {"loss": total, **means}


@torch.no_grad()
def _validate(
    student: DistillationStudent,
    tokenizer: Any,
    items: Sequence[Prepared],
    examples: Examples,
    step_of: StepRunner,
    collate: Collator,
    training: Training,
    evaluation: Evaluation,
) -> tuple[dict[str, Any], Any]:
    student.eval()
    totals: dict[str, Any] = defaultdict(float)
    size = training.micro_batch_size or training.batch_size
    order = sorted(range(len(items)), key=lambda i: len(items[i].encoding))
    for first in range(0, len(order), size):
        batch = collate([items[i] for i in order[first : first + size]])
        _, sums = step_of.losses(batch.to(step_of.device), dict(step_of.objective.weights), batch.counts)
        _accumulate(totals, sums, batch.counts)
    metrics = {f"validation_{name}": value for name, value in losses_of(totals, step_of.objective).items()}
    scored = scoring_copy(student.model, training)
    predictions = evaluate(scored, tokenizer, examples.validation, evaluation)
    return metrics | accuracy_metrics(predictions), predictions


def scoring_copy(model: Any, training: Training) -> Any:
    """The model in the training precision: under autocast every forward pass would cast float32 weights anew."""
    model = without_adapters(model)
    if training.precision == "float32":
        return model.eval()
    return copy.deepcopy(model).to(DTYPES[training.precision]).eval()


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a trial, oldest first."""
    found = [p for p in folder.glob("checkpoint_*") if p.is_dir() and p.name.split("_")[1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("_")[1]))


def _last_checkpoint(folder: Path) -> Path | None:
    whole = [p for p in checkpoints(folder) if (p / STATE).is_file()]
    return whole[-1] if whole else None


def _save(
    student: DistillationStudent,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: _State,
    folder: Path,
    training: Training,
    keep: str,
    final: bool,
) -> None:
    """Write `checkpoint_<epoch>`, in one step; then drop what is no longer needed.

    The weights lie there in the training precision; `trainer_state.pt` holds them in float32, with the optimizer,
    until the trial is finished.
    """
    target = folder / f"checkpoint_{state.epoch}"
    building = folder / f".{target.name}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    save_student(student, tokenizer, building, DTYPES[training.precision])
    if not final:
        whole = {
            "student": student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "state": {**vars(state)},
        }
        torch.save(whole, building / STATE)
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)
    for old in checkpoints(folder):
        if old != target and keep == "last":
            shutil.rmtree(old)
        elif old != target:
            (old / STATE).unlink(missing_ok=True)


def _restore(
    checkpoint: Path, student: DistillationStudent, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> _State:
    load_projector(checkpoint)
    saved = torch.load(checkpoint / STATE, map_location=student.model.device, weights_only=True)
    student.load_state_dict(saved["student"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    state = _State()
    vars(state).update(saved["state"])
    return state


def _finish(
    trial: Trial, objective: Objective, state: _State, coverage: dict[str, Any], folder: Path, student: DistillationStudent
) -> dict[str, Any]:
    last = state.epochs[-1]
    (folder / f"predictions_{last['epoch']}.parquet").replace(folder / "predictions.parquet")
    for old in folder.glob("predictions_*.parquet"):
        old.unlink()
    result = {
        "trial": trial.name,
        "config": {"distill_type": trial.group.name, "seed": trial.seed, "objective": objective.model_dump()},
        **last,
        "epochs": state.epochs,
        "gradients": state.gradients,
        "gradient_shares": mean_shares(state.gradients),
        "coverage": coverage,
        "parameters": sum(p.numel() for p in student.model.parameters()),
    }
    write_json(folder / RESULT, result)
    return result


def mean_shares(gradients: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each term's share of the gradient, averaged over the measurements."""
    shares: dict[str, list[float]] = defaultdict(list)
    for row in gradients:
        for term, share in row["shares"].items():
            shares[term].append(share)
    return {term: sum(values) / len(values) for term, values in shares.items()}

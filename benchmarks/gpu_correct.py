"""Whether a device computes what a CPU computes in float32: each check has a figure and a bound.

On a small pair of the study's architectures with its own tokenizers, so that a CPU can follow.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_inputs import Inputs, fresh, moved, random_model, some
from stillroom import offline_teacher_data as otd
from stillroom.config import GROUPS, Evaluation, ModelRef, Objective, Precision, Signals, Training
from stillroom.data.corpus import Examples
from stillroom.data.prepared import Prepared
from stillroom.models.architecture import check_capture, relative_error
from stillroom.models.precision import DTYPES, release_memory
from stillroom.offline_teacher_data.recomputation import recompute, sample_ids
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.terms import NextTokenTerms, teacher_to_student_ids, terms_of
from stillroom.terms.output_head import HeadTargets, Outcomes, head_losses
from stillroom.terms.term import each_tensor
from stillroom.training.batches import prepare
from stillroom.training.collation import Batch, Collator
from stillroom.training.distillation_student import DistillationStudent
from stillroom.training.step import StepRunner
from stillroom.training.train_student import Trial, train

_CPU = torch.device("cpu")
_LOSS = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}
_GRADIENT = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}
"""Relative, of a small random model: rounding of the forward pass's dtype, and no more."""

Says = Iterator[tuple[str, float, float]]
"""What was measured, how far it is off, and what it may be off by."""


def correct(inputs: Inputs, figures: dict[str, Any]) -> None:
    """Every check; raises at the end, naming what missed its bound or broke off."""
    pair, wrong = Pair(inputs, fresh(inputs.work / "pair")), []
    for check in CHECKS:
        try:
            for what, found, bound in check(pair):
                figures[what] = {"found": found, "bound": bound}
                if not found <= bound:
                    wrong.append(f"{what}: {found:.3g}, at most {bound:.3g}")
        except Exception as error:  # the other checks are worth having
            wrong.append(f"{check.__name__}: {type(error).__name__}: {str(error)[:500]}")
            torch.use_deterministic_algorithms(False)
        release_memory()
    figures["waits for the device in two combined steps"] = waits(pair)
    if wrong:
        raise AssertionError("; ".join(wrong))


class Pair:
    """Small random models of both architectures, and their data."""

    def __init__(self, inputs: Inputs, folder: Path) -> None:
        self.inputs, self.folder, self.device = inputs, folder, inputs.device
        self.configs = [inputs.config(role, small=True) for role in (0, 1)]
        top_k = min(256, self.configs[0].vocab_size)
        self.signals = Signals(top_k=top_k, dtype="float32", batch_tokens=1024, shard_examples=8)
        self.examples = some(inputs.examples.train, 16)
        self.stores: dict[str, SignalStore] = {}

    def teacher(self, device: torch.device, dtype: Precision = "float32") -> Any:
        """The same weights wherever it is."""
        return moved(random_model(self.configs[0], torch.float32, _CPU), dtype, device)

    def store(self, device: torch.device) -> SignalStore:
        """The teacher's signals, float32, captured and verified on a device."""
        if device.type not in self.stores:
            tokenizer, folder = self.inputs.tokenizers[0], self.folder / f"store-{device.type}"
            origin = otd.made_from("random", "float32", tokenizer, self.signals, self.examples)
            otd.capture(self.teacher(device), tokenizer, self.examples, self.signals, folder, origin)
            otd.verify_saved_data(folder, len(self.examples))
            self.stores[device.type] = SignalStore.open(folder)
        return self.stores[device.type]

    @cached_property
    def mapped(self) -> Any:
        """Teacher ids in student ids."""
        return teacher_to_student_ids(*self.inputs.tokenizers, *(config.vocab_size for config in self.configs))

    @cached_property
    def items(self) -> list[Prepared]:
        """The examples as the student reads them."""
        return prepare(self.examples, self.inputs.tokenizers[1], self.store(_CPU))

    def runner(self, group: str, precision: Precision, device: torch.device) -> StepRunner:
        """The student with a group's loss."""
        objective, store = GROUPS[group].objective(Objective()), self.store(_CPU)
        model = random_model(self.configs[1], torch.float32, _CPU, 1).to(device)
        terms = terms_of(objective, store, model.config)
        student = DistillationStudent(model, terms, 5).train()
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        training = Training(precision=precision)
        return StepRunner(student, NextTokenTerms(objective, self.mapped), terms, objective, training, scaler)

    def collate(self, runner: StepRunner, items: list[Prepared]) -> Batch:
        """A batch for it, pinned where there is a GPU."""
        batch = Collator(self.store(_CPU), runner.head, runner.terms)(items)
        return batch.pinned() if self.inputs.cuda else batch

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Those worth trying: on a CPU, float16 takes minutes."""
        return ("float32", "bfloat16", "float16") if self.inputs.cuda else ("float32", "bfloat16")


def gradient(runner: StepRunner, micro: list[Batch]) -> tuple[dict[str, float], Tensor]:
    """Sums by term, and the whole gradient, flat, on the CPU."""
    runner.student.zero_grad(set_to_none=True)
    scale = 2.0**12 if runner.training.precision == "float16" else 1.0
    sums, _ = runner._backward(micro, runner.objective.weights, lambda loss: loss * scale)
    parts = [p.grad.flatten().float().cpu() for p in runner.student.parameters() if p.grad is not None]
    return {name: float(value) for name, value in sums.items()}, torch.cat(parts) / scale


def captures_what_a_cpu_captures(pair: Pair) -> Says:
    """Every signal of every example."""
    here, there, worst = pair.store(pair.device), pair.store(_CPU), Counter[str]()
    for example_id in there.index:
        found, expected = here.read(example_id), there.read(example_id)
        for name in ("hidden", "attention", "topk_logprobs"):
            error = relative_error(torch.tensor(found[name]), torch.tensor(expected[name]))
            worst[name] = max(worst[name], error)  # type: ignore[assignment]
    yield from ((f"captured {name} against a CPU's", error, 1e-4) for name, error in worst.items())
    again = recompute(here, pair.teacher(pair.device), sample_ids(here, 4))
    yield from ((f"captured {name} against one text alone", error, 1e-3) for name, error in again.items())


def captures_what_eager_attention_computes(pair: Pair) -> Says:
    """Two layers at the teacher's own widths, in each dtype; raises beyond what rounding explains."""
    for precision in pair.precisions:
        config = pair.inputs.config(0)
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
        model = random_model(config, DTYPES[precision], pair.device)
        check_capture(model, torch.randint(3, config.vocab_size, (1, 200), device=pair.device))
        yield f"capture against eager, {precision}, beyond its tolerance", 0.0, 0.0


def losses_and_gradients(pair: Pair) -> Says:
    """Every group in every precision, against a CPU's float32; and a step cut into micro-batches."""
    for group in pair.inputs.groups:
        reference = pair.runner(group, "float32", _CPU)
        batch = pair.collate(reference, pair.items[:8])
        sums, whole = gradient(reference, [batch])
        for precision in pair.precisions:
            runner = pair.runner(group, precision, pair.device)
            found, of_student = gradient(runner, [batch])
            error = max(abs(value - sums[name]) / max(abs(sums[name]), 1e-9) for name, value in found.items())
            yield f"{group}, {precision}: losses", error, _LOSS[precision]
            yield f"{group}, {precision}: gradient", relative_error(of_student, whole), _GRADIENT[precision]
        runner = pair.runner(group, "float32", pair.device)
        halves = [pair.collate(runner, items) for items in (pair.items[:3], pair.items[3:8])]
        yield f"{group}: gradient of two micro-batches", relative_error(gradient(runner, halves)[1], whole), 1e-3


def sparse_is_dense(pair: Pair) -> Says:
    """The KL over k + 1 outcomes and its gradients, against float64 with every logit."""
    rows, vocabulary, width, top_k = (64, 2000, 64, 32) if pair.inputs.tiny else (512, 32000, 2048, 256)
    torch.manual_seed(3)
    with torch.device(pair.device):
        hidden = torch.randn(rows, width, requires_grad=True)
        weight = (torch.randn(vocabulary, width) * 0.02).requires_grad_()
        ids = torch.rand(rows, vocabulary).topk(top_k).indices
        probs = torch.rand(rows, top_k)
        targets = torch.randint(0, vocabulary, (rows,))
    probs = 0.9 * probs / probs.sum(1, keepdim=True)
    outcomes = Outcomes(torch.arange(rows), ids, torch.ones_like(ids, dtype=torch.bool), probs, 1 - probs.sum(1))
    total, _, _ = head_losses(hidden, weight, None, HeadTargets(targets, outcomes, 1 / rows, 0.5 / rows))
    total.backward()
    exact, head = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logprobs = (exact @ head.T).log_softmax(-1)
    entries, p, rest = logprobs.gather(1, ids), probs.double(), 1 - probs.double().sum(1)
    other = logprobs.scatter(1, ids, -torch.inf).logsumexp(1)
    kd = (p * (p.log() - entries)).sum() + (rest * (rest.log() - other)).sum()
    expected = (0.5 * kd - logprobs.gather(1, targets[:, None]).sum()) / rows
    expected.backward()
    yield "sparse KL against dense float64", abs(float(total.detach() - expected.detach())), 1e-4
    for name, tensor, reference in (("hidden states", hidden, exact), ("output head", weight, head)):
        assert tensor.grad is not None
        assert reference.grad is not None
        yield f"sparse KL: gradient of the {name}", relative_error(tensor.grad, reference.grad), 1e-4


def a_batch_arrives_as_it_was(pair: Pair) -> Says:
    """Pinned, and copied without a wait."""
    runner = pair.runner("combined", "float32", pair.device)
    batch = pair.collate(runner, pair.items[:8])
    pairs = zip(_tensors(batch), _tensors(batch.to(pair.device)), strict=True)
    yield "tensors of a batch that change on their way", sum(not torch.equal(a, b.cpu()) for a, b in pairs), 0


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    each_tensor(batch, keep)
    return found


def a_step_that_overflows_is_skipped(pair: Pair) -> Says:
    """In float16 with its scaler: the weights stay, the scale falls, and the next steps move them."""
    runner = pair.runner("combined", "float16", pair.device)
    runner.scaler = torch.amp.GradScaler(pair.device.type, init_scale=2.0**60, enabled=True)
    optimizer = torch.optim.AdamW(runner.student.parameters(), lr=1e-3, fused=True)
    batch, before = pair.collate(runner, pair.items[:2]), _weights(runner)
    finite = runner.update([batch], optimizer)[2]
    yield "an overflow that is not noticed", float(bool(finite)), 0.0
    yield "weights that an overflow moves", float((_weights(runner) != before).sum()), 0.0
    runner.scaler = torch.amp.GradScaler(pair.device.type, init_scale=2.0**10, enabled=True)
    finite = any(runner.update([batch], optimizer)[2] for _ in range(8))  # the scale halves until it fits
    yield "a step in float16 that does nothing", float(not finite or bool((_weights(runner) == before).all())), 0.0


def _weights(runner: StepRunner) -> Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in runner.student.parameters()])


def a_trial_resumes(pair: Pair) -> Says:
    """Stopped after its first epoch: the numbers of one that was not, with deterministic kernels to the bit."""
    examples, store = Examples(pair.examples[:12], pair.examples[12:], {}), pair.store(_CPU)
    folder = pair.folder / "student"
    model = random_model(pair.configs[1], torch.float32, _CPU, 1)
    model.save_pretrained(folder)
    pair.inputs.tokenizers[1].save_pretrained(folder)
    for deterministic in (True, False) if pair.inputs.cuda else (False,):
        trials = (_trial(pair, store, examples, folder, deterministic, way) for way in ("whole", "again", "resumed"))
        whole, again, resumed = trials
        exact = deterministic or not pair.inputs.cuda
        named = "deterministic" if deterministic else "as it is"
        yield f"a trial run again, {named}: largest difference", _apart(whole, again), 0.0 if exact else 0.05
        yield f"a trial resumed, {named}: largest difference", _apart(whole, resumed), 0.0 if exact else 0.05
    torch.use_deterministic_algorithms(False)


def _trial(
    pair: Pair, store: SignalStore, examples: Examples, student: Path, deterministic: bool, way: str
) -> list[float]:
    folder = fresh(pair.folder / f"{way}-{deterministic}")
    precision: Precision = "float16" if pair.inputs.cuda else "float32"
    training = Training(
        learning_rate=1e-3,
        batch_size=4,
        epochs=2,
        precision=precision,
        gradient_interval=2,
        deterministic=deterministic,
    )

    def stop(metrics: dict[str, Any]) -> None:
        if way == "resumed" and metrics["epoch"] == 1:
            raise InterruptedError

    def once(report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        return train(
            Trial("t", GROUPS["combined"], 0),
            ModelRef(model=str(student)),
            training,
            Objective(),
            Evaluation(max_new_tokens=4),
            examples,
            store.path,
            folder,
            report=report,
        )

    try:
        result = once(stop)
    except InterruptedError:
        result = once(lambda metrics: None)
    return [row["value"] for epoch in result["epochs"] for row in epoch["metrics"]]


def _apart(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def waits(pair: Pair) -> dict[str, int]:
    """By precision and line of code: where the host waits for the GPU in two steps; without a GPU, nothing."""
    found: Counter[str] = Counter()
    if not pair.inputs.cuda:
        return found
    precisions: tuple[Precision, ...] = ("bfloat16", "float16")
    for precision in precisions:
        runner = pair.runner("combined", precision, pair.device)
        optimizer = torch.optim.AdamW(runner.student.parameters(), lr=1e-4, fused=True)
        batch = pair.collate(runner, pair.items[:8])
        runner.update([batch], optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            for _ in range(2):
                runner.update([batch], optimizer)
            torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchron" in str(warning.message).lower():
                found[f"{precision} {'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"] += 1
    return dict(found)


CHECKS = (
    captures_what_a_cpu_captures,
    captures_what_eager_attention_computes,
    losses_and_gradients,
    sparse_is_dense,
    a_batch_arrives_as_it_was,
    a_step_that_overflows_is_skipped,
    a_trial_resumes,
)

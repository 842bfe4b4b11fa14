"""How fast a study's stages are on a device, and how near to what the device can do."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

import capture as capture_benchmark
from gpu_inputs import Inputs, fresh, random_model, some
from ratios import PeakMemory, in_turn, synchronize
from stillroom import offline_teacher_data as otd
from stillroom.config import GROUPS, Objective
from stillroom.data.corpus import Examples
from stillroom.data.encoding import encode_many
from stillroom.data.tasks import Example
from stillroom.evaluation.generation import generate, prompts_at_once
from stillroom.evaluation.scoring import answer_scores
from stillroom.models import compiled
from stillroom.models.hub import load_model
from stillroom.models.precision import DTYPES, release_memory
from stillroom.models.split_products import scoring_copy
from stillroom.offline_teacher_data.recomputation import recompute, sample_ids
from stillroom.signals import compute_signals
from stillroom.training.batches import Prefetched
from stillroom.training.collation import Batch
from stillroom.training.train_student import Trial, train
from training import FULL, Bench

Figures = dict[str, Any]


def seconds_of(run: Callable[[], Any], rounds: int = 3, warm_up: bool = True) -> float:
    """Median seconds of a run, the device idle before and after."""
    return statistics.median(in_turn({"it": run}, rounds, warm_up)["it"])


def peak_gigabytes(run: Callable[[], Any]) -> float:
    """The most memory a run takes, beyond what is held."""
    with PeakMemory() as peak:
        run()
    return peak.bytes / 1e9


def ceilings(inputs: Inputs, figures: Figures) -> None:
    """What the device can do at most: bytes copied, matrix products in each precision, and the disk beneath."""
    size, edge = (2 * 10**9, 8192) if inputs.cuda else (2 * 10**7, 256)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=inputs.device) for _ in range(2))
    figures["GB/s read and written by a copy"] = 2e-9 * size / seconds_of(lambda: target.copy_(source))
    for name, dtype, precision in (
        ("float32", torch.float32, "highest"),
        ("TF32", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, "highest"),
        ("float16", torch.float16, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        left, right = (torch.randn(edge, edge, device=inputs.device).to(dtype) for _ in range(2))
        figures[f"{name}, TFLOP/s"] = 2e-12 * edge**3 / seconds_of(lambda a=left, b=right: a @ b)  # type: ignore[misc]
    torch.set_float32_matmul_precision("highest")
    part = source[: size // 2]
    for name, pinned in (("pageable", False), ("pinned", True)) if inputs.cuda else ():
        host = torch.empty(len(part), dtype=torch.uint8, pin_memory=pinned)
        figures[f"GB/s, device to {name} memory"] = 1e-9 * len(part) / seconds_of(lambda h=host: h.copy_(part))  # type: ignore[misc]
    figures["GB/s, disk, flushed"] = 1e-9 * size / seconds_of(lambda: _write(inputs.work / "disk", size), 1, False)


def _write(path: Path, size: int) -> None:
    block = os.urandom(min(size, 2**26))
    with path.open("wb") as handle:
        for _ in range(size // len(block)):
            handle.write(block)
        os.fsync(handle.fileno())
    path.unlink()


@torch.no_grad()
def capture(inputs: Inputs, figures: Figures) -> None:
    """The teacher at its own size: a bare pass, its signals alone, and the whole capture with its store."""
    signals, precision = inputs.study.signals, inputs.study.teacher.dtype
    config, tokenizer = inputs.config(0), inputs.tokenizers[0]
    kept = {"top_k": min(signals.top_k, config.vocab_size), "teacher_head": True}  # the head for the step of `full`
    signals = signals.model_copy(update=kept)
    model = random_model(config, DTYPES[precision], inputs.device)
    examples = inputs.examples.all
    encodings = encode_many(tokenizer, [example.text for example in examples])
    part = random.Random(1).sample(encodings, min(1200, len(encodings)))
    batches = capture_benchmark.batched(part, signals.batch_tokens)
    tokens, layout = sum(map(len, part)), capture_benchmark.layout_of(model, signals)

    def only_signals() -> None:
        for batch in batches:
            compute_signals(model, batch, layout, torch.float16)

    bare = seconds_of(lambda: capture_benchmark.bare(model, batches), 2)
    figures["tokens/s, bare sdpa pass with logits"] = tokens / bare
    products = 2 * sum(p.numel() for p in model.parameters()) * tokens / bare
    figures["TFLOP/s, bare sdpa pass"] = products * 1e-12
    figures["GB at most, bare sdpa pass"] = peak_gigabytes(lambda: capture_benchmark.bare(model, batches[:2]))
    figures["speed of signals without a store / bare"] = bare / seconds_of(only_signals, 2)
    figures["a batch of signals"] = busy(inputs, lambda: compute_signals(model, batches[0], layout, torch.float16))
    store = fresh(inputs.work / "store")
    origin = otd.made_from("random", precision, tokenizer, signals, examples)
    with PeakMemory() as peak:
        began = time.perf_counter()
        found = otd.capture(model, tokenizer, examples, signals, store, origin)
        whole = time.perf_counter() - began
    rate = sum(map(len, encodings)) / whole
    figures["seconds of the whole capture"] = whole
    figures["tokens/s, whole capture"] = rate
    figures["speed of capture / bare (target 0.9)"] = rate / (tokens / bare)
    figures["GB at most, capture, beside the weights"] = peak.bytes / 1e9
    figures["GB of the store"] = 1e-9 * sum(shard["bytes"] for shard in found.manifest["shards"])
    figures["seconds to verify"] = seconds_of(lambda: otd.verify_saved_data(store), 1, False)
    figures["recomputed, largest relative error"] = recompute(found, model, sample_ids(found, 4))


def bench_of(inputs: Inputs) -> Bench:
    """The student at its own size, with its optimizer, over the captured store."""
    model = load_model(inputs.student_ref(), "float32", inputs.device)
    return Bench(model, inputs.tokenizers[1], inputs.store(), inputs.study)


def steps(inputs: Inputs, figures: Figures) -> None:
    """Training steps of each group, against plain fine-tuning by Transformers' own loss."""
    bench, count = bench_of(inputs), 2 if inputs.tiny else 60
    examples = inputs.stored(inputs.examples.train)
    workers = max(1, min(8, (os.cpu_count() or 1) - 1))
    for group in (*inputs.groups[:-1], FULL.name, inputs.groups[-1]):
        makers = bench.batches(group, examples, count)
        began = time.perf_counter()
        batches = [batch.pinned() if inputs.cuda else batch for batch in (make() for make in makers)]
        tokens = sum(batch.tokens for batch in batches)
        figures[f"{group}: tokens/s collated by one thread"] = tokens / (time.perf_counter() - began)
        runner = bench.runner(group)
        ready = [lambda batch=batch: batch for batch in batches]  # type: ignore[misc]
        first = seconds_of(lambda: bench.ours(group, ready), 1, False)  # noqa: B023 - run at once
        figures[f"{group}: ms per step, lengths seen for the first time"] = 1000 * first / count
        figures[f"{group}: ms per step"] = 1000 * seconds_of(lambda: bench.ours(group, ready), 2, False) / count  # noqa: B023
        figures[f"{group}: GB at most, beside weights and moments"] = peak_gigabytes(
            lambda: bench.ours(group, ready[:4])  # noqa: B023
        )
        ahead = Prefetched(makers, lambda make: make().pinned() if inputs.cuda else make(), workers)
        made = seconds_of(lambda: [runner.update([batch], bench.optimizer) for batch in ahead], 1, False)  # noqa: B023
        figures[f"{group}: ms per step, batches made meanwhile by {workers} threads"] = 1000 * made / count
        figures[f"{group}: share of that spent waiting for data"] = ahead.waited / made
        figures[f"{group}: a step"] = busy(inputs, lambda: bench.ours(group, ready[:4]), 4)  # noqa: B023
        if group == "task_only":
            plain = seconds_of(lambda: bench.plain(ready), 2) / count  # noqa: B023
            figures["plain fine-tuning: ms per step"], figures["tokens per step"] = 1000 * plain, tokens / count
    figures["combined / plain fine-tuning, time (target 1.1)"] = figures["combined: ms per step"] / (1000 * plain)
    measured = seconds_of(lambda: runner.measure([batches[0]]), 2)
    figures["combined: ms per measurement of the gradient"] = 1000 * measured
    _compiled_steps(bench, ready, inputs, figures)


def _compiled_steps(bench: Bench, ready: Sequence[Callable[[], Batch]], inputs: Inputs, figures: Figures) -> None:
    """The same steps of `combined` with compiled layers, and what that changes in the loss of the first."""
    runner, batch = bench.runner("combined"), ready[0]().to(bench.student.model.device)

    def loss() -> float:
        return float(runner.losses(batch, runner.objective.weights, batch.counts)[0])

    before = loss()
    if inputs.tiny:
        compiled.BACKEND = "aot_eager"  # its graphs alone: machine code takes minutes
    compiled.compile_layers(bench.student.model, bench.student.taps, inputs.device)
    figures["combined, compiled: seconds of the first pass"] = seconds_of(loss, 1, False)
    figures["combined, compiled: relative difference of the loss"] = abs(loss() - before) / before
    seconds_of(lambda: bench.ours("combined", ready), 1, False)  # every length once
    taken = seconds_of(lambda: bench.ours("combined", ready), 2, False)
    figures["combined, compiled: ms per step"] = 1000 * taken / len(ready)


def evaluation(inputs: Inputs, figures: Figures) -> None:
    """Choices in each precision, with the predictions that change, and answers generated at several batch sizes."""
    model, tokenizer = load_model(inputs.student_ref(), "float32", inputs.device), inputs.tokenizers[1]
    settings, saved = inputs.study.evaluation, inputs.study.training.precision
    held_out = [*inputs.examples.test, *inputs.examples.validation]
    choosing = some([e for e in held_out if e.choices is not None], 400)
    tokens = sum(map(len, encode_many(tokenizer, [e.prompt for e in choosing])))
    expected: list[list[float]] = []
    for name, dtype, products in (
        ("as students are scored", settings.dtype, "highest"),
        ("TF32", "float32", "high"),
        ("bfloat16", "bfloat16", "highest"),
        ("float16", "float16", "highest"),
    ):
        if not inputs.cuda and name == "float16":
            continue  # minutes on a CPU
        torch.set_float32_matmul_precision(products)
        scored, found = scoring_copy(model, saved, dtype), list[list[float]]()  # type: ignore[arg-type]
        if name == "TF32":  # else products are of 16-bit parts
            scored = scoring_copy(model, saved, saved).float()
        seconds = seconds_of(
            lambda: found.extend(answer_scores(scored, tokenizer, choosing, settings.batch_tokens)[0]),  # noqa: B023
            1,
            False,
        )
        figures[f"choices, {name}: tokens/s"] = tokens / seconds
        expected = expected or found
        pairs = list(zip(expected, found, strict=True))
        figures[f"choices, {name}: largest difference of a log-likelihood, answers that change"] = [
            max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)),
            sum(x.index(max(x)) != y.index(max(y)) for x, y in pairs),
        ]
    torch.set_float32_matmul_precision("highest")
    scored = scoring_copy(model, saved, settings.dtype)
    prompts, texts = [e for e in held_out if e.choices is None], {}
    limit = settings.max_new_tokens if inputs.tiny else 64
    for size in (2, 4) if inputs.tiny else (32, 128, 256):
        asked = prompts[: max(size, 4)]
        one = settings.model_copy(update={"generation_batch_size": size, "max_new_tokens": limit})
        with PeakMemory() as peak:
            began = time.perf_counter()
            texts[size] = generate(scored, tokenizer, asked, one)
            taken = time.perf_counter() - began
        figures[f"generation, {size} at once: ms per decoding step, at most; GB"] = [
            1000 * taken / (math.ceil(len(asked) / size) * limit),
            peak.bytes / 1e9,
        ]
    few = min(map(len, texts.values()))
    first, *others = (generated[:few] for generated in texts.values())
    figures["texts that differ between batch sizes"] = [sum(map(str.__ne__, first, generated)) for generated in others]
    fixed = one.model_copy(update={"static_cache": True})
    began = time.perf_counter()
    replayed = generate(scored, tokenizer, asked, fixed)
    taken = time.perf_counter() - began
    figures[f"… with evaluation.static_cache, {size} at once: ms per decoding step, at most"] = (
        1000 * taken / (math.ceil(len(asked) / size) * limit)
    )
    figures["texts that differ with it"] = sum(map(str.__ne__, texts[size], replayed))


def _one_trial(inputs: Inputs, folder: Path, report: Callable[[Figures], None] = lambda metrics: None) -> Figures:
    """A trial of `combined` as the study has it, but for one epoch and the number of test examples."""
    examples = inputs.examples
    parts = (inputs.stored(part) for part in (examples.train, examples.validation))
    training = inputs.study.training.model_copy(update={"epochs": 2 if inputs.tiny else 1})
    return train(
        Trial("t", GROUPS["combined"], 0),
        inputs.student_ref(),
        training,
        Objective(),
        inputs.study.evaluation,
        Examples(*parts, {}),
        inputs.store().path,
        fresh(folder),
        test=some(examples.test, 6 if inputs.tiny else 400),
        report=report,
    )


def trial(inputs: Inputs, figures: Figures) -> None:
    """One trial by the package's own `train`."""
    inputs.student_ref()
    times = ("train_seconds", "data_wait_seconds", "evaluation_seconds")

    def report(metrics: Figures) -> None:
        figures[f"epoch {metrics['epoch']}"] = {name: metrics[name] for name in (*times, "skipped_steps", "train_loss")}

    with PeakMemory() as peak:
        began = time.perf_counter()
        result = _one_trial(inputs, inputs.work / "trial", report)
        whole = time.perf_counter() - began
    spent = {name: sum(epoch[name] for epoch in result["epochs"]) for name in times}
    known = spent["train_seconds"] + spent["evaluation_seconds"] + result.get("test_evaluation_seconds", 0.0)
    figures["seconds"] = whole
    figures["seconds by part"] = {
        **spent,
        "test": result.get("test_evaluation_seconds"),
        "everything else": whole - known,
    }
    figures["tokens/s while training"] = sum(e["tokens"] for e in result["epochs"]) / spent["train_seconds"]
    figures["GB at most"] = peak.bytes / 1e9
    figures["gradient shares"] = result["gradient_shares"]


def sharing(inputs: Inputs, figures: Figures) -> None:
    """The same trial twice at once on one device, each in a process of its own."""
    inputs.student_ref()
    release_memory()
    context, alone = multiprocessing.get_context("spawn"), replace(inputs, found={})
    folders = [inputs.work / f"shared-{number}" for number in range(2)]
    processes = [context.Process(target=_one_trial, args=(alone, folder)) for folder in folders]
    began = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    figures["seconds of two at once, each process started"] = time.perf_counter() - began
    if broken := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"a trial's process ended with exit code {broken[0]}")


def study(inputs: Inputs, figures: Figures) -> None:
    """Hours of the whole study on this device, from the parts that were measured."""
    found, settings = inputs.found, inputs.study
    captured, stepped, evaluated, tried = (found[name] for name in ("capture", "steps", "evaluation", "trial"))
    examples, training = inputs.examples, settings.training
    batches = math.ceil(len(examples.train) / training.batch_size) * training.epochs
    decoding = [v[0] / 1000 for name, v in evaluated.items() if name.startswith("generation, ")][-1]
    rate = evaluated["choices, as students are scored: tokens/s"]
    tokenizer = inputs.tokenizers[1]

    def evaluating(part: Sequence[Example]) -> float:
        read = sum(map(len, encode_many(tokenizer, [example.text for example in part])))
        written = sum(example.choices is None for example in part)
        rounds = math.ceil(written / prompts_at_once(settings.evaluation, inputs.device.type))
        return read / rate + rounds * settings.evaluation.max_new_tokens * decoding

    other = tried["seconds by part"]["everything else"]
    held_out = training.epochs * evaluating(examples.validation) + evaluating(examples.test)
    by_group = {}
    for group in settings.groups:
        step = stepped.get(f"{group.name}: ms per step", stepped["combined: ms per step"]) / 1000
        by_group[group.name] = batches * step + held_out + other
    figures["seconds of a trial, by group"] = by_group
    figures["share of evaluation in a trial (target 0.3)"] = held_out / statistics.mean(by_group.values())
    trials = len(settings.sweep.seeds) * sum(by_group.values())
    figures["hours of the study"] = (captured["seconds of the whole capture"] + trials) / 3600
    figures["left out"] = "fine-tuning the teacher, evaluating both models before training"


def busy(inputs: Inputs, run: Callable[[], Any], parts: int = 1) -> dict[str, Any]:
    """Kernels, and how much of the wall clock they fill, of one of `parts`; nothing without a GPU."""
    run()
    if not inputs.cuda:
        return {}
    wall = seconds_of(run, 1, False)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        synchronize()
    spans, named = [], Counter[str]()
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            named[event.name[:60]] += event.time_range.end - event.time_range.start
    filled, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        filled += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    longest = {name: round(spent / 1e3 / parts, 3) for name, spent in named.most_common(12)}
    shares = {"kernels": len(spans) / parts, "ms": 1000 * wall / parts, "busy": filled / 1e6 / wall}
    return {**shares, "ms by kernel": longest}

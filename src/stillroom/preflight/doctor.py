"""Checks before hours are spent: each line is fine, or says what to do."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from stillroom.config import BenchmarkSplit, ModelRef, Study
from stillroom.data.encoding import encode
from stillroom.data.vocabulary import compare_vocabularies
from stillroom.errors import UserError, first_line
from stillroom.evaluation.harness_tasks import Harness
from stillroom.experiment.resources import cores, trial_resources
from stillroom.files import shown_size
from stillroom.models.builtin_pair import materialise
from stillroom.models.hub import is_local, load_config, load_tokenizer, require_embedded, require_quantization
from stillroom.models.precision import DTYPES, default_device, products, resolve_precision
from stillroom.preflight.design import examine_design
from stillroom.preflight.lengths import Drawn, counted, draw
from stillroom.preflight.planning import plan_study
from stillroom.provenance import hardware, package_versions
from stillroom.training.optimizers import require_optimizers

SAMPLE = 50
"""Examples a task on which coverage is measured."""
_EMULATED = 3.0
"""How many times slower than float32 a dtype is that the device has no instructions for, at least."""
_KEPT_ON_CPU = 2.0
"""What a trial's process holds of what the plan estimates: a CPU's allocator keeps part of what is given back."""

T = TypeVar("T")
Lines = Iterator["Finding"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    fine: bool
    says: str
    warning: bool = False
    """The study runs all the same, but the reader should know beforehand."""


def examine(study: Study) -> list[Finding]:
    """Everything that can be known without loading weights; the tracker, and Ray if it runs the trials, are tried."""
    findings = [_packages(), *_precision(study)]
    study = resolve_precision(study)
    importlib.import_module("datasets")  # before there are two threads, which must not import it at once
    # Ray takes as long to start as models to be tried and the corpus to be drawn
    study_itself = _beside(lambda: [*_models(study), *_optimizers(study), *_planned(study)])
    services = [*_trackers(study), _launcher(study)]
    return [*findings, *study_itself(), *services]


def _beside(action: Callable[[], T]) -> Callable[[], T]:
    """Start it in a thread that Ctrl-C does not wait for; what is returned waits, and gives or raises what it does."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result


def _planned(study: Study) -> list[Finding]:
    """What the corpus and the plan show."""
    tokenizers, drawn = _tokenizers(study)
    findings = [*tokenizers, *_harness(study)]
    try:
        plan = plan_study(study, drawn=drawn)
    except UserError as error:
        findings.append(Finding("data", False, str(error)))
        if counted(study, {}) == study:  # else it depends on how many rows there are
            findings.append(_design(examine_design(study)))
    else:
        findings += [*_data(plan), *_disk(study, plan), *_memory(study, plan), *_gpu(study, plan)]
        findings.append(_design(plan["design"]))
    return findings


def _design(design: dict[str, Any]) -> Finding:
    """Whether the study's tests can give a verdict at all."""
    if design["warnings"]:
        return Finding("design", True, "; ".join(design["warnings"]), warning=True)
    found = design["measures"]["all tasks"]["detectable_difference"]
    listed = " and ".join(f"{100 * d:.1f} points ({name} contrasts)" for name, d in found.items() if d is not None)
    says = f"{design['seeds']} seeds and {design['measures']['all tasks']['validation_examples']} validation examples"
    return Finding("design", True, f"{says} detect {listed or 'no difference: the study declares no contrast'}")


def _packages() -> Finding:
    versions = package_versions()
    absent = [name for name, version in versions.items() if version == "absent"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "absent")
    return Finding("packages", not absent, f"missing: {', '.join(absent)}; run make install" if absent else listed)


def _precision(study: Study) -> Lines:
    """What `auto` stands for here, and whether a dtype that the study names is emulated by this device."""
    device = default_device()
    rates = {dtype: products(DTYPES[dtype], device) for dtype in ("float32", "bfloat16", "float16")}
    measured = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    chosen = resolve_precision(study).training.precision
    asked = {"teacher.dtype": study.teacher.dtype, "training.precision": study.training.precision}
    asked["evaluation.dtype"] = study.evaluation.dtype
    if study.teacher.fine_tune.method != "none":
        asked["teacher.fine_tune.training.precision"] = study.teacher.fine_tune.training.precision
    slow = [f"{field}={d}" for field, d in asked.items() if d != "auto" and rates[d] < rates["float32"] / _EMULATED]
    says = f"matrix products on this device, GFLOP/s: {measured}"
    if slow:
        yield Finding("precision", False, f"{says}; emulated: {', '.join(slow)}; set auto, or float32")
    else:
        yield Finding("precision", True, f"{says}; training in {chosen}")


def _models(study: Study) -> Lines:
    for role, ref in (("teacher", study.teacher), ("student", study.student)):
        if ref.model.startswith("builtin:"):
            yield Finding(role, True, f"{ref.model}, made on first use")
            continue
        try:
            config = load_config(ref)
        except UserError as error:
            yield Finding(role, False, str(error))
            continue
        where = "local directory" if is_local(ref) else f"hub id, revision {ref.revision or 'not pinned'}"
        yield Finding(role, True, f"{ref.model}: {config.model_type}, {where}")
        if role == "teacher" and study.signals.imported:
            continue  # its weights are not read here
        if role == "teacher" and study.teacher.quantization:
            yield _trial_run(
                "quantization",
                lambda: require_quantization(study.teacher.quantization),
                f"the teacher's weights in {study.teacher.quantization}, by bitsandbytes",
            )
        yield _weights(role, ref)
        yield _architecture(role, config, role == "teacher" or study.captures_student)


def _weights(role: str, ref: ModelRef) -> Finding:
    """Whether the weights are here, or the hub would give them."""
    subject = f"{role}'s weights"
    if is_local(ref):
        here = any(Path(ref.model).glob("*.safetensors"))
        return Finding(
            subject, here, "here" if here else f"{ref.model} has no .safetensors file; put the weights there"
        )
    from huggingface_hub import auth_check, snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        cached = snapshot_download(
            ref.model, revision=ref.revision, allow_patterns=["*.safetensors"], local_files_only=True
        )
        if any(Path(cached).glob("*.safetensors")):
            return Finding(subject, True, "in the hub's cache")
        auth_check(ref.model)
        return Finding(subject, True, "on the hub, and this login may read them; downloaded on first use")
    except GatedRepoError:
        return Finding(subject, False, "gated: accept the licence on the hub, then set HF_TOKEN or run `hf auth login`")
    except Exception as error:  # no network, offline mode, no such model: the hub's library has a class for each
        says = f"neither in the cache nor available from the hub here ({first_line(error)}); use a local directory"
        return Finding(subject, False, says)


def _architecture(role: str, config: Any, captured: bool) -> Finding:
    """Runs the check that stands before a capture or a trial, on a miniature of the architecture."""
    from transformers import AutoModelForCausalLM

    from stillroom.models.architecture import PROBE, check_capture, check_model, miniature

    subject = f"{role}'s architecture"
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return Finding(subject, False, f"{config.model_type} is not a causal language model; choose another model")
    try:
        model = miniature(config)
    except UserError as error:
        return Finding(subject, True, f"{error}; checked when the stage starts")
    try:
        (check_capture if captured else check_model)(model, PROBE)
    except UserError as error:
        return Finding(subject, False, f"{error}; choose another model")
    says = (
        "its attention is captured as its own code computes it" if captured else "computed as its own code computes it"
    )
    return Finding(subject, True, f"{config.model_type}: {says}")


def _optimizers(study: Study) -> Lines:
    """Whether an optimizer of another library runs here; AdamW needs none."""
    chosen = {study.training.optimizer}
    if study.teacher.fine_tune.method != "none":
        chosen.add(study.teacher.fine_tune.training.optimizer)
    if chosen != {"adamw"}:
        yield _trial_run("optimizer", lambda: require_optimizers(study), f"{', '.join(sorted(chosen))} can be used")


def _harness(study: Study) -> Lines:
    """Whether each task of lm-evaluation-harness can be loaded, its data with it."""
    for name, split in study.evaluation.harness_splits.items():
        yield _trial_run(f"test split {name}", partial(_harness_task, name, split), "")


def _harness_task(name: str, split: BenchmarkSplit) -> str:
    described = Harness.load({name: split}).described[name]
    return f"{described['task']}, {described['examples']:,} examples, by lm_eval {described['lm_eval']}"


def _tokenizers(study: Study) -> tuple[list[Finding], Drawn | None]:
    """How the two read the corpus, and the corpus if it can be drawn."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            teacher, student = (load_tokenizer(materialise(r, Path(folder))) for r in (study.teacher, study.student))
        except UserError:
            return [], None  # the models' own lines say why
    try:
        for ref, tokenizer in ((study.teacher, teacher), (study.student, student)):
            if not ref.model.startswith("builtin:"):
                require_embedded(ref, tokenizer, [*encode(tokenizer, "a").ids.tolist(), tokenizer.eos_token_id])
    except UserError as error:
        return [Finding("tokenizers", False, str(error))], None
    vocabularies = _vocabularies(teacher, student)
    try:
        drawn = draw(study, (teacher, student))
    except UserError as error:
        return [vocabularies, Finding("coverage", False, str(error))], None
    return [vocabularies, _coverage(study, drawn)], drawn


def _vocabularies(teacher: Any, student: Any) -> Finding:
    figures = compare_vocabularies(teacher, student)
    if figures["same"]:
        return Finding("tokenizers", True, "the same vocabulary: alignment is the identity")
    share = figures["mapped_ids"] / figures["teacher_size"]
    says = (
        f"different: {figures['shared_strings']:,} strings in common, {figures['same_ids']:,} ids that mean the same; "
        f"{share:.0%} of the teacher's ids have a student id of the same bytes"
    )
    return Finding("tokenizers", share > 0.2, says if share > 0.2 else f"{says}; choose a pair that shares more")


def _coverage(study: Study, drawn: Drawn) -> Finding:
    from stillroom.training.batches import coverage_between

    by_task = {name: [e for e in drawn.examples.all if e.task == name][:SAMPLE] for name in study.corpus.tasks}
    some = [example for task_examples in by_task.values() for example in task_examples]
    shares = {task: counts["token_coverage"] for task, counts in coverage_between(some, *drawn.tokenizers).items()}
    low = min(shares.values()) < study.signals.minimum_coverage
    says = ", ".join(f"{task} {share:.0%}" for task, share in shares.items())
    says += f" of the student's tokens have an aligned teacher token ({SAMPLE} examples per task at most)"
    remedy = f"; signals.minimum_coverage is {study.signals.minimum_coverage:.0%}: choose another pair or lower it"
    return Finding("coverage", not low, says + (remedy if low else ""))


def _data(plan: dict[str, Any]) -> Lines:
    assumed = [a for a in plan["assumptions"] if a.startswith("tokens per example")]
    yield Finding("data", not assumed, assumed[0] if assumed else f"{plan['corpus']['examples']:,} examples")


def _disk(study: Study, plan: dict[str, Any]) -> Lines:
    """What each folder is to hold, against the room on its device, which they may share."""
    disk, found = plan["disk_bytes"], []
    students = disk["checkpoints"] + _at_once(study) * disk["more_while_a_trial_runs"]
    for path, needed in ((study.paths.store_path, plan["store_bytes"]["total"]), (study.paths.results, students)):
        place = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
        found.append((place, place.stat().st_dev, needed))
    for subject, (place, device, needed) in zip(("teacher data", "students"), found, strict=True):
        free = shutil.disk_usage(place).free
        in_all = sum(other for _, its_device, other in found if its_device == device)
        room = f"{shown_size(in_all)} on that disk in total, {shown_size(free)} free at {place}"
        says = f"{shown_size(needed)} needed, {room}"
        fine = place.is_dir() and free > in_all and os.access(place, os.W_OK)
        says += "" if place.is_dir() else ", which is no folder"
        yield Finding(f"disk for {subject}", fine, says if fine else f"{says}; free some, or set other paths")


def _at_once(study: Study) -> int:
    """Trials that run at once, were this machine alone to run them."""
    import torch

    node = {"CPU": float(cores()), "GPU": float(torch.cuda.device_count())}
    try:
        return min(trial_resources(study.sweep, [node])[1], len(study.groups) * len(study.sweep.seeds))
    except UserError:
        return 1  # the launcher's own line says why


def _memory(study: Study, plan: dict[str, Any]) -> Lines:
    """The accelerator, and whether the teacher and a trial fit it by the plan's estimate."""
    import torch

    needs, memory = dict(plan["memory_bytes"]), hardware()["memory_bytes"] or 0
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if gpus:
        names = ", ".join(sorted({gpu.name for gpu in gpus}))
        yield Finding("accelerator", True, f"{len(gpus)} × {names}")
        share = min(1.0, study.sweep.gpus_per_trial or 1.0)
        room = {"capture": sum(gpu.total_memory for gpu in gpus), "trial": share * min(g.total_memory for g in gpus)}
    else:
        hours = sum(plan["hours"].values())
        says = "no GPU: everything runs on the CPU"
        says += f"; this study is about {hours:.1f} hours of a GPU, too much for it" if hours > 1 else ""
        yield Finding("accelerator", hours <= 1, says)
        room = {"capture": memory, "trial": memory / _at_once(study)}
        on_cpus = int(_KEPT_ON_CPU * needs["trial"]) * study.sweep.processes
        needs["trial"] = on_cpus + needs.pop("trial_in_cpu_memory", 0)
    room["trial_in_cpu_memory"] = memory / _at_once(study)
    remedies = {
        "capture": "set a smaller signals.batch_tokens or teacher.dtype=float16",
        "trial": "set training.micro_batch_size or training.gradient_checkpointing, or run fewer at once with "
        "sweep.max_concurrent",
        "trial_in_cpu_memory": "run fewer at once with sweep.max_concurrent, or use a smaller sweep.gpus_per_trial",
    }
    for stage, needed in needs.items():
        where = "of GPU memory" if gpus and stage != "trial_in_cpu_memory" else "of memory"
        says = f"about {shown_size(needed)} needed, {shown_size(room[stage])} {where}"
        fine = needed < room[stage]
        yield Finding(f"memory for a {stage.replace('_', ' ')}", fine, says if fine else f"{says}; {remedies[stage]}")


def _gpu(study: Study, plan: dict[str, Any]) -> Lines:
    """What the first GPU does when it is tried; without one, nothing."""
    device = default_device()
    if device.type == "cpu":
        return
    from stillroom.models.architecture import try_miniature
    from stillroom.preflight import accelerator

    yield _trial_run("GPU driver", lambda: accelerator.driver(device), "")
    needed = int(plan["memory_bytes"]["trial"])
    could = f"{shown_size(needed)} could be allocated"
    yield _trial_run("GPU memory", lambda: accelerator.allocate(device, needed), could)
    dtypes = sorted({study.teacher.dtype, study.training.precision, study.evaluation.dtype})
    kernels = f"products and attention, forward and backward: {', '.join(dtypes)}"
    yield _trial_run("GPU kernels", lambda: accelerator.run_kernels(device, dtypes), kernels)
    for role, ref, dtype, captured in (
        ("teacher", study.teacher, study.teacher.dtype, True),
        ("student", study.student, study.training.precision, study.captures_student),
    ):
        needed_here = study.sweep.gpus_per_trial if role == "student" else not study.signals.imported
        if needed_here and not ref.model.startswith("builtin:") and (model := try_miniature(load_config(ref))):
            says = f"two layers {'captured and ' if captured else ''}trained in {dtype}"
            yield _trial_run(f"{role} on the GPU", partial(accelerator.rehearse, model, device, dtype, captured), says)


def _trial_run(subject: str, action: Callable[[], Any], says: str) -> Finding:
    """What the action returns, or `says`, if it can be done; else why it cannot."""
    found: list[Any] = []
    fine, reason = _tried(lambda: found.append(action()))
    return Finding(subject, fine, (found[0] or says) if fine else reason)


def _trackers(study: Study) -> Lines:
    """Whether each tracker's library is here and it can be written."""
    from stillroom.experiment.tracker import Tracker

    for kept in Tracker(study, study.paths.results).kept:
        fine, says = _tried(kept.check_beforehand)
        yield Finding("tracker", fine, kept.where if fine else f"{kept.where}: {says}")


def _launcher(study: Study) -> Finding:
    """What runs the trials: the machine alone, or Ray, which is started or joined."""
    found: dict[str, float] = {}
    if study.sweep.launched_by() == "local":
        from stillroom.experiment.local_sweep import describe_machine

        fine, says = _tried(lambda: found.update(describe_machine(study.sweep)))
        subject, remedy = "local sweep", ""
    else:
        from stillroom.experiment.ray_processes import end_ray
        from stillroom.experiment.ray_sweep import describe_cluster

        fine, says = _tried(lambda: found.update(describe_cluster(study.sweep)))
        if fine:
            fine, says = _tried(end_ray)  # now, while the corpus is drawn: it takes more than a second
        subject, remedy = "ray", "; `stillroom train` runs one trial at a time without Ray"
    listed = ", ".join(f"{name} {value:g}" for name, value in found.items())
    return Finding(subject, fine, listed if fine else says + remedy)


def _tried(action: Callable[[], Any]) -> tuple[bool, str]:
    """Whether it could be done; if not, the first line of the reason."""
    try:
        action()
    except Exception as error:  # whatever a service's library raises, the user is to read it as a line
        return False, first_line(error)
    return True, ""

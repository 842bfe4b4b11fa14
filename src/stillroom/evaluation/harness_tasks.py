"""Test splits that EleutherAI's lm-evaluation-harness evaluates: its tasks, its prompts, its numbers."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from stillroom.config import BenchmarkSplit, Evaluation
from stillroom.errors import UserError
from stillroom.evaluation.metrics import Metric
from stillroom.files import file_sha256

_SEED = 1234
"""The harness's own default, of which few-shot examples are drawn."""
_TOKENS = 1024
"""Of `evaluation.batch_tokens` for each text of a batch: the harness makes the logits of every position."""


def require_harness(splits: Mapping[str, BenchmarkSplit]) -> None:
    """`UserError` where the harness is wanted and not installed, or has no task of a name."""
    for name, split in splits.items():
        _manager(name, split)


@dataclass(frozen=True)
class Harness:
    """The harness's tasks of a study, loaded."""

    splits: Mapping[str, BenchmarkSplit]
    loaded: Mapping[str, Any]
    """What its task manager gives, by split."""
    described: Mapping[str, dict[str, Any]]
    """By split: `task`, its `version`, the harness's `lm_eval`, `examples`, and a `digest` of all that is asked."""

    @classmethod
    def load(cls, splits: Mapping[str, BenchmarkSplit], known: Mapping[str, dict[str, Any]] | None = None) -> Harness:
        """Load the tasks and their data sets; `UserError` where one cannot be, or is not as it is `known`."""
        loaded = {name: _load(name, split) for name, split in splits.items()}
        described = {name: _described(name, splits[name], split_tasks) for name, split_tasks in loaded.items()}
        if known is not None and (changed := [name for name in splits if described[name] != known.get(name)]):
            raise UserError(
                f"evaluation.test_splits.{changed[0]}: the harness's task is not the one that this study was started "
                f"with ({known.get(changed[0])}, now {described[changed[0]]}): restore its files and version, or "
                "delete the folder `corpus` in the results, and every trial is a new one"
            )
        return cls(splits, loaded, described)

    def metrics(self, model: transformers.PreTrainedModel, tokenizer: Any, settings: Evaluation) -> list[Metric]:
        """Every number that the harness gives of each task, in its own name and scale; its standard errors left out."""
        found: list[Metric] = []
        for name, split in self.splits.items():
            with _quiet(), _seeded():
                try:
                    found += _measured(name, split, self.loaded[name], _wrapped(model, tokenizer, settings))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # of the harness or of code that belongs to a task
                    raise _fault(name, f"the harness cannot evaluate {split.harness}", error) from error
        return found


def _measured(name: str, split: BenchmarkSplit, loaded: Any, model: Any) -> list[Metric]:
    from lm_eval.evaluator import evaluate

    _set_up(loaded)
    results = evaluate(model, loaded, limit=_limit(split), bootstrap_iters=0, log_samples=False)["results"]
    found = []
    for key, value in results[split.harness].items():
        measure, comma, reading = key.partition(",")
        if comma and not measure.endswith("_stderr") and isinstance(value, int | float) and math.isfinite(value):
            measure = measure if reading == "none" else f"{measure}_{reading}"
            found.append(Metric(split="test", task=name, measure=measure, value=float(value)))
    if not found:
        raise ValueError(f"it gives no number: {results[split.harness]}")
    return found


def _limit(split: BenchmarkSplit) -> int | None:
    return None if split.examples == "all" else split.examples


def _wrapped(model: transformers.PreTrainedModel, tokenizer: Any, settings: Evaluation) -> Any:
    """The model as the harness calls it, in the dtype and on the device that it has."""
    from lm_eval.models.huggingface import HFLM

    # it ties the output head to the embeddings again, and gives the tokenizer a padding token: neither is ours to keep
    model.tie_weights = lambda *given, **named: None
    try:
        size = max(1, settings.batch_tokens // _TOKENS)
        return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=size)
    finally:
        del model.tie_weights


def _manager(name: str, split: BenchmarkSplit) -> Any:
    """The harness's task manager, which knows the split's task."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"evaluation.test_splits.{name}.harness: lm-evaluation-harness is not installed: "
            "pip install 'lm_eval>=0.4.13,<0.5', or leave the split out"
        )
    if split.include_path is not None and not split.include_path.is_dir():
        raise UserError(f"evaluation.test_splits.{name}.include_path: {split.include_path} is not a folder")
    with _quiet():
        from lm_eval.tasks import TaskManager

        try:
            folders = [str(split.include_path)] if split.include_path else None
            manager = TaskManager(include_path=folders, include_defaults=folders is None)
        except Exception as error:  # of YAML, or of what a definition in the folder does
            raise _fault(name, "the harness cannot read its tasks", error) from error
    where = f"tasks in {split.include_path}" if split.include_path else "harness's own tasks (`lm_eval ls tasks`)"
    if split.harness in manager.all_tags:
        raise UserError(f"evaluation.test_splits.{name}.harness: {split.harness!r} is a tag of several tasks; name one")
    if split.harness not in manager.all_tasks:
        raise UserError(f"evaluation.test_splits.{name}.harness: {split.harness!r} is none of the {where}")
    return manager


def _load(name: str, split: BenchmarkSplit) -> Any:
    manager = _manager(name, split)
    with _quiet(), _seeded():
        try:
            loaded = manager.load([split.harness])
            _set_up(loaded)
            for task in loaded["tasks"].values():
                task.build_all_requests(limit=_limit(split))
        except Exception as error:  # of the data set's library, or of code that belongs to the task
            raise _fault(name, f"the harness cannot load {split.harness}", error) from error
    _require_usable(name, split, loaded)
    return loaded


def _set_up(loaded: Any) -> None:
    """What the harness's `simple_evaluate` does before each evaluation: the same few-shot examples are drawn again."""
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)


def _require_usable(name: str, split: BenchmarkSplit, loaded: Any) -> None:
    place = f"evaluation.test_splits.{name}"
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"{place}.harness: {task_name} runs code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"{place}.harness: {task_name} is not of text alone")
    group = loaded.get("groups", {}).get(split.harness)
    if group is not None and not group.has_aggregation:
        tasks = ", ".join(list(loaded["tasks"])[:5])
        raise UserError(f"{place}.harness: {split.harness} is a group without a number of its own; name one of {tasks}")
    limit = _limit(split)
    if group is None and limit and (rows := len(loaded["tasks"][split.harness].eval_docs)) < limit:
        raise UserError(f"{place}.examples: {limit} asked for, but {split.harness} has {rows} rows")


def _described(name: str, split: BenchmarkSplit, loaded: Any) -> dict[str, Any]:
    """What pins a task: the harness's version, the files of its folder, and every request that it makes."""
    digest, documents = hashlib.sha256(), 0
    for task_name in sorted(loaded["tasks"]):
        task = loaded["tasks"][task_name]
        documents += len({instance.doc_id for instance in task.instances})
        for instance in task.instances:
            asked = [task_name, instance.request_type, instance.doc_id, instance.args]
            digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
    for path in _definitions(split.include_path):
        digest.update(file_sha256(path).encode())
    top = loaded.get("groups", {}).get(split.harness) or loaded["tasks"][split.harness]
    version = getattr(top, "version", None) or getattr(top, "VERSION", None)
    return {
        "task": split.harness,
        "version": None if version in (None, "Yaml") else str(version),  # its word for a file that gives none
        "lm_eval": importlib.metadata.version("lm_eval"),
        "examples": documents,
        "digest": digest.hexdigest()[:16],
    }


def harness_files(splits: Mapping[str, BenchmarkSplit]) -> list[Any]:
    """What says, without the harness, that nothing has changed: its version, the splits, digests of their files."""
    if not splits:
        return []
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        version = "absent"
    plain = {name: split.model_dump(mode="json", exclude={"include_path"}) for name, split in splits.items()}
    return [version, plain, [file_sha256(p) for s in splits.values() for p in _definitions(s.include_path)]]


def _definitions(folder: Path | None) -> list[Path]:
    found = folder.rglob("*") if folder else ()
    return sorted(p for p in found if p.is_file() and "__pycache__" not in p.parts)


def _fault(name: str, what: str, error: BaseException) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return UserError(f"evaluation.test_splits.{name}.harness: {what}: {reason[:300]}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's own bars and log lines; what is wrong is in its exceptions."""
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """With the seeds of the harness's own command, and afterwards with those that were there."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        random.seed(0)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

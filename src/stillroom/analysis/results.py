"""A results folder, read: what a report is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from stillroom.analysis.frame import Measured, accuracy_keys, summary_frame
from stillroom.analysis.reading import (
    harness_splits,
    read_baseline_predictions,
    read_baselines,
    read_corpus,
    read_error,
    read_examples,
    read_planned,
    read_results,
    read_run,
    read_trial_predictions,
    scored_tasks,
)
from stillroom.analysis.sameness import identical_groups
from stillroom.config import Analysis
from stillroom.data.corpus import folded
from stillroom.errors import UserError
from stillroom.evaluation.metrics import Key, Metric, agreement, by_key, column_names
from stillroom.folders import ResultsFolder, TrialFolder

T = TypeVar("T")


@dataclass(frozen=True)
class StudyResults:
    """A results folder, read: what was planned, what is there, what failed. Nothing else is needed for a report."""

    folder: Path
    study: dict[str, Any]
    trials: list[dict[str, Any]]
    """Every planned trial: name, group, seed."""
    snapshot: str
    fingerprint: str
    """The teacher data's."""
    corpus_fingerprint: str
    """That of the examples that the trials saw."""
    finished: list[dict[str, Any]]
    """`result.json` of the finished trials, in the plan's order."""

    @classmethod
    def read(cls, folder: Path | str) -> StudyResults:
        """Read what is in a results folder. `UserError` if there is nothing to report yet."""
        folder = Path(folder)
        planned = read_planned(folder)
        finished = read_results(folder, planned)
        if not finished:
            raise UserError(f"{folder}: no trial is finished yet; run `stillroom sweep`")
        described = (planned["study"], planned["trials"], planned["snapshot"], planned["fingerprint"])
        return cls(folder, *described, planned["corpus"], finished)

    def read_all(self) -> None:
        """Read every file that a report needs: what is damaged is said before anything is written."""
        for name in ("run", "examples", "predictions", "baseline_predictions", "test_metrics", "missing"):
            getattr(self, name)

    def trial_folder(self, name: str) -> Path:
        """Where a trial's files are."""
        return ResultsFolder(self.folder).trial(name).path

    @cached_property
    def analysis(self) -> Analysis:
        """What was to be compared."""
        return Analysis.model_validate(self.study["analysis"])

    @cached_property
    def groups(self) -> list[str]:
        """Names of the groups, in the study's order."""
        return [group["name"] for group in self.study["groups"]]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row a finished trial: `results_summary.csv`."""
        return summary_frame(self.finished)

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the study's order."""
        return list(self.accuracy_keys)[1:]

    @cached_property
    def overall(self) -> str:
        """What tables call all tasks together."""
        return next(iter(self.accuracy_keys))

    @cached_property
    def accuracy_keys(self) -> dict[str, Key]:
        """Where accuracy on the validation split is among a trial's numbers, by what tables call it."""
        return self._overall_first(accuracy_keys(self.measured[0].values))

    @cached_property
    def measured(self) -> list[Measured]:
        """What was measured of each finished trial after its last epoch, test splits too."""
        return [
            Measured(result["config"]["distill_type"], result["config"]["seed"], by_key(result["metrics"]))
            for result in self.finished
        ]

    @cached_property
    def accuracies(self) -> dict[str, dict[tuple[str, int], float]]:
        """Accuracy on the validation split by what tables call it, then by group and seed."""
        return {
            name: {(trial.group, trial.seed): trial.values[key] for trial in self.measured}
            for name, key in self.accuracy_keys.items()
        }

    @cached_property
    def missing(self) -> list[dict[str, Any]]:
        """Planned trials without a result, each with `error`: what stopped it, or None."""
        done = {result["trial"] for result in self.finished}
        return [
            {**trial, "error": read_error(self.trial_folder(trial["name"]))}
            for trial in self.trials
            if trial["name"] not in done
        ]

    @cached_property
    def labels(self) -> dict[str, str]:
        """What tables call the two models that no trial trains, by role; a fine-tuned teacher is called so."""
        tuned = self.study["teacher"]["fine_tune"]["method"] != "none"
        return {"teacher": "teacher (fine-tuned)" if tuned else "teacher", "student": "student before training"}

    @cached_property
    def baselines(self) -> dict[str, dict[str, Any]]:
        """Baselines by what tables call them; see `read_baselines`."""
        return {self.labels[role]: baseline for role, baseline in self._measured[""].items()}

    @cached_property
    def _measured(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By suffix of their files, by role."""
        return {suffix: read_baselines(self.folder, suffix) for suffix in ("", "_test")}

    @cached_property
    def stale(self) -> list[str]:
        """Baselines that are there but were measured for another study, by what tables call them."""
        return [
            label + where
            for suffix, where in (("", ""), ("_test", " on test splits"))
            for role, label in self.labels.items()
            if role not in self._measured[suffix] and ResultsFolder(self.folder).baseline(role, suffix).is_file()
        ]

    @cached_property
    def other_corpus(self) -> bool:
        """Whether the examples in this folder are others than the trials saw."""
        return bool(self._corpus["fingerprint"] != self.corpus_fingerprint)

    @cached_property
    def baseline_metrics(self) -> dict[str, list[Metric]]:
        """Metrics of the baselines."""
        return {label: baseline["metrics"] for label, baseline in self.baselines.items()}

    @cached_property
    def test_metrics(self) -> dict[str, list[Metric]]:
        """Metrics of the baselines on the test splits, if the study evaluates any."""
        return {self.labels[role]: baseline["metrics"] for role, baseline in self._measured["_test"].items()}

    @cached_property
    def test_keys(self) -> dict[str, Key]:
        """Where accuracy on the test splits is among a trial's numbers; empty if nothing was measured there."""
        keys = [key for key in self._measured_keys if key[1] not in harness_splits(self.study)]
        return self._overall_first(accuracy_keys(keys, "test")) if ("test", None, "accuracy") in keys else {}

    @cached_property
    def harness_keys(self) -> dict[str, Key]:
        """Where the numbers of lm-evaluation-harness are, by what tables call them: split and measure."""
        keys = [(name, key) for name in harness_splits(self.study) for key in self._measured_keys if key[1] == name]
        return {f"{name} {key[2]}": key for name, key in keys if key[0] == "test"}

    @cached_property
    def _measured_keys(self) -> list[Key]:
        return list(dict.fromkeys(key for trial in self.measured for key in trial.values))

    def _overall_first(self, keys: Mapping[str, Key]) -> dict[str, Key]:
        overall, *_ = keys
        return {overall: keys[overall], **self._in_order({k: v for k, v in keys.items() if k != overall})}

    def _in_order(self, by_task: Mapping[str, T]) -> dict[str, T]:
        """In the study's order of tasks; what this folder has of another study comes last."""
        order = {task: place for place, task in enumerate(self.study["corpus"]["tasks"])}
        return dict(sorted(by_task.items(), key=lambda item: order.get(item[0], len(order))))

    @cached_property
    def identical(self) -> dict[tuple[str, str], list[int]]:
        """Seeds at which two groups are alike to the last bit though their objectives differ; see `sameness`."""
        return identical_groups(self.finished)

    @cached_property
    def predictions(self) -> dict[tuple[str, int], pd.DataFrame]:
        """Per-example predictions of every finished trial, by group and seed; rows sorted by example."""
        found: dict[tuple[str, int], pd.DataFrame] = {}
        for result in self.finished:
            folder = self.trial_folder(result["trial"])
            predictions = read_trial_predictions(folder, result)
            self._require_same_examples(predictions, TrialFolder(folder).predictions)
            found[result["config"]["distill_type"], result["config"]["seed"]] = predictions
        return found

    @cached_property
    def baseline_predictions(self) -> dict[str, pd.DataFrame]:
        """The baselines' predictions on the same examples, by what tables call them, where they were kept."""
        found = {}
        for role, baseline in self._measured[""].items():
            path = ResultsFolder(self.folder).baseline_predictions(role)
            if path.exists():
                found[self.labels[role]] = read_baseline_predictions(self.folder, role, baseline["metrics"])
                self._require_same_examples(found[self.labels[role]], path)
        return found

    def _require_same_examples(self, predictions: pd.DataFrame, path: Path) -> None:
        if list(predictions["example_id"]) != self._validated[1]:
            raise UserError(
                f"{path} has other examples than {self._validated[0]}: one of the two is another study's; delete the "
                f"folder of the wrong one, {path.parent} or {self._validated[0].parent}, and `stillroom run STUDY` "
                "builds it again"
            )

    @cached_property
    def _validated(self) -> tuple[Path, list[str]]:
        """The ids of the validation split, sorted, and the file they are from: one of the trials' own if need be."""
        if not self.other_corpus:
            scored = self.examples["task"].isin(scored_tasks(self.study))
            rows = self.examples[(self.examples["split"] == "validation") & scored]
            return ResultsFolder(self.folder).corpus_rows, sorted(rows["example_id"])
        first = self.finished[0]
        folder = self.trial_folder(first["trial"])
        return TrialFolder(folder).predictions, list(read_trial_predictions(folder, first)["example_id"])

    @cached_property
    def measured_with_agreement(self) -> list[Measured]:
        """`measured` with the measure `agreement`: share of a choice task's examples that the teacher answers alike."""
        teacher = self.baseline_predictions.get(self.labels["teacher"])
        if teacher is None:
            return self.measured
        found = []
        for trial in self.measured:
            shares = agreement(self.predictions[trial.group, trial.seed], teacher)
            more: dict[Key, float] = {("validation", task, "agreement"): share for task, share in shares.items()}
            found.append(Measured(trial.group, trial.seed, {**trial.values, **more}))
        return found

    @cached_property
    def corpus(self) -> dict[str, dict[str, int]]:
        """By task: rows in the source, examples of either split, what was dropped and why."""
        counts: dict[str, dict[str, int]] = self._corpus["counts"]
        return self._in_order(counts)

    @cached_property
    def faults(self) -> dict[str, str]:
        """By task the first row of its source that could not be used, and why; test splits' own beside them."""
        test = {f"{task}, test split": said for task, said in self._corpus.get("test_faults", {}).items()}
        return {**self._corpus.get("faults", {}), **test}

    @cached_property
    def test_counts(self) -> dict[str, dict[str, int]]:
        """Of the test splits likewise: used, rows in the source, what was dropped and why."""
        counts: dict[str, dict[str, int]] = self._corpus["test_counts"]
        return self._in_order(counts)

    @cached_property
    def harness(self) -> dict[str, dict[str, Any]]:
        """By test split that lm-evaluation-harness evaluates: its task, their versions, how many examples."""
        found: dict[str, dict[str, Any]] = self._corpus.get("harness", {})
        return found

    @cached_property
    def _corpus(self) -> dict[str, Any]:
        return read_corpus(self.folder)

    @cached_property
    def run(self) -> dict[str, Any]:
        """`run.json`: each stage's commit, versions and hardware."""
        return read_run(self.folder)

    @cached_property
    def coverage(self) -> dict[str, Any]:
        """Alignment counts and shares by task; the same for every trial that reads the teacher's data."""
        return self._in_order(next((result["coverage"] for result in self.finished if result["coverage"]), {}))

    @cached_property
    def kinds(self) -> dict[str, dict[str, int]]:
        """Alignment counts by kind of text; the same for every trial that reads the teacher's data."""
        return next((result["kinds"] for result in self.finished if result.get("kinds")), {})

    @cached_property
    def kind_losses(self) -> dict[str, dict[str, float]]:
        """By group that has it, L_KD after the last epoch on the validation split by kind of text: mean over seeds."""
        rows = [
            {"group": result["config"]["distill_type"], "kind": kind, "loss": facts["kd_loss"]}
            for result in self.finished
            for kind, facts in result.get("kinds", {}).items()
            if facts.get("kd_loss") is not None
        ]
        found: dict[str, dict[str, float]] = {}
        for (group, kind), losses in pd.DataFrame(rows, columns=["group", "kind", "loss"]).groupby(["group", "kind"]):
            found.setdefault(str(group), {})[str(kind)] = float(losses["loss"].mean())
        return {group: found[group] for group in self.groups if group in found}

    @cached_property
    def epochs(self) -> pd.DataFrame:
        """Tidy: trial, group, seed, epoch, split, task, measure, metric, value; a row for each number of an epoch.

        `metric` is the name that a table's column has. What is no metric, such as `tokens`, has no split.
        """
        rows = []
        for result in self.finished:
            for epoch in result["epochs"]:
                about = {**_key(result), "epoch": epoch["epoch"]}
                values = by_key(epoch["metrics"])
                for key, name in column_names(values).items():
                    split, task, measure = key
                    what = {"split": split, "task": task, "measure": measure, "metric": name}
                    rows.append({**about, **what, "value": values[key]})
                facts = {k: v for k, v in epoch.items() if k != "epoch" and isinstance(v, int | float)}
                rows += [{**about, "measure": name, "metric": name, "value": value} for name, value in facts.items()]
        return pd.DataFrame(rows)

    def history(self, split: str, measure: str) -> pd.DataFrame:
        """The rows of `epochs` with one measure of all tasks together."""
        rows = self.epochs
        return rows[(rows["split"] == split) & rows["task"].isna() & (rows["measure"] == measure)]

    @cached_property
    def gradients(self) -> pd.DataFrame:
        """Tidy: trial, group, seed, step, term, norm (before clipping, weight included), share."""
        rows = [
            {**_key(result), "step": row["step"], "term": term, "norm": norm, "share": row["shares"][term]}
            for result in self.finished
            for row in result["gradients"]
            for term, norm in row["norms"].items()
        ]
        return pd.DataFrame(rows, columns=["trial", "group", "seed", "step", "term", "norm", "share"])

    @cached_property
    def costs(self) -> pd.DataFrame:
        """A row per trial: seconds of training, of evaluation (test splits too), waited for data; tokens; bytes.

        `fastest_step_seconds` is an optimizer step's mean time in the trial's fastest epoch: other work on the machine
        makes an epoch slower, never faster.
        """
        rows = []
        for result in self.finished:
            total = {
                name: sum(epoch.get(name, 0) for epoch in result["epochs"])
                for name in ("train_seconds", "evaluation_seconds", "data_wait_seconds", "tokens")
            }
            total["evaluation_seconds"] += result.get("test_evaluation_seconds", 0)
            disk = sum(path.stat().st_size for path in self.trial_folder(result["trial"]).rglob("*") if path.is_file())
            ends = [0, *(epoch["step"] for epoch in result["epochs"])]
            paces = [
                epoch.get("train_seconds", 0.0) / (end - start)
                for epoch, (start, end) in zip(result["epochs"], pairwise(ends), strict=True)
                if end > start
            ]
            fastest = min(paces, default=float("nan"))
            rows.append({**_key(result), **total, "fastest_step_seconds": fastest, "disk_bytes": disk})
        return pd.DataFrame(rows)

    @cached_property
    def examples(self) -> pd.DataFrame:
        """Every example of the study: example_id, task, split (train, validation, test), prompt, answer, …"""
        return read_examples(self.folder, self.corpus)

    @cached_property
    def shared_prompts(self) -> int:
        """Prompts found in both training and held-out data, ignoring white space and case."""
        asked = self.examples["prompt"].where(self.examples["prompt"] != "", self.examples["answer"])  # of texts: all
        prompts, trained = asked.map(folded), self.examples["split"] == "train"
        return len(set(prompts[trained]) & set(prompts[~trained]))


def _key(result: dict[str, Any]) -> dict[str, Any]:
    config = result["config"]
    return {"trial": result["trial"], "group": config["distill_type"], "seed": config["seed"]}

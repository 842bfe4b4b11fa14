"""A results folder of the shape that a study leaves, with made-up numbers: for testing reports without training."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from stillroom.analysis import evidence, report
from stillroom.analysis.figures import draw
from stillroom.analysis.frame import write_summary
from stillroom.data.corpus import Examples, save_corpus
from stillroom.data.tasks import TASKS
from stillroom.evaluation.metrics import accuracy_metrics, by_key, overall_metrics, save_predictions
from stillroom.files import read_json, write_json
from stillroom.folders import EXPERIMENT, PLANNED, RESULT
from stillroom.provenance import record_run
from stillroom.studies import load_study

CHANCES = {"task_only": 0.45, "black_box": 0.5, "hidden": 0.65, "attention": 0.52, "combined": 0.7}
SIZES = {"sentiment": 40, "quiz": 60, "arithmetic": 30}


@contextmanager
def quick_reports(whole=True):
    """Reports without rendered pictures, which take seconds; if not `whole`, nothing is drawn or resampled either."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "save_figure", lambda figure, folder: draw(figure) if whole else None)
        patch.setattr(report, "inline_panels", lambda figure: [])
        if not whole:
            unknown = (float("nan"), float("nan"))
            patch.setattr(evidence, "bootstrap_intervals", lambda differences, *a, **k: [unknown] * len(differences))
        yield


def make_identical(folder, first, second, seed, weights=None):
    """Give the trial of `second` every measured number of the one of `first`, as if its own term were never on.

    `weights`: digests that either trial has of its student after each epoch; default none.
    """
    paths = [next((folder / EXPERIMENT).glob(f"trial_*_{group}_seed_{seed}")) for group in (first, second)]
    one, other = (read_json(path / RESULT) for path in paths)
    for altered, result, digest in zip((one, other), (one, other), weights or (None, None), strict=True):
        altered["epochs"] = [
            {**after, "metrics": merged(after, before), **({"weights": digest} if digest else {})}
            for before, after in zip(one["epochs"], result["epochs"], strict=True)
        ]
        tested = [row for row in altered["metrics"] if row["split"] == "test"]
        altered |= {**altered["epochs"][-1], "metrics": [*altered["epochs"][-1]["metrics"], *tested]}
    for path, altered in zip(paths, (one, other), strict=True):
        write_json(path / RESULT, altered)
    save_predictions(pd.read_parquet(paths[0] / "predictions.parquet"), paths[1] / "predictions.parquet")
    write_summary(folder)


def merged(after, before):
    """The rows of one epoch with the values that another has of the same, and its further ones."""
    values = by_key(after["metrics"]) | by_key(before["metrics"])
    return [{"split": key[0], "task": key[1], "measure": key[2], "value": value} for key, value in values.items()]


def predictions_of(examples, chance, rng):
    """Predictions that are right with the given chance; choice tasks with scores, generation with text."""
    rows = []
    for example in examples:
        right = bool(rng.random() < chance)
        row = {"example_id": example.example_id, "task": example.task, "answer_tokens": 2, "answer_nll": 1.5}
        if example.choices is None:
            gold = example.answer.split("####")[-1].strip()
            said = gold if right else "-1"
            text = f" It is #### {said}\n"
            row |= {"prediction": said, "gold": gold, "scores": None, "generated": text}
            row |= {"correct": right, "correct_flexible": right or bool(rng.random() < 0.1)}
        else:
            chosen = example.gold if right else (example.gold + 1) % len(example.choices)
            scores = rng.normal(-3, 0.4, len(example.choices))
            scores[chosen] = scores.max() + rng.random()
            row |= {"prediction": example.choices[chosen].strip(), "gold": example.answer.strip(), "generated": None}
            row |= {"scores": [float(s) for s in scores], "correct": right, "correct_flexible": right}
        rows.append(row)
    return pd.DataFrame(rows)


def write_results(folder, seeds=(0, 1, 2), drop=(), overrides=(), rename=lambda text: text, seed=0):
    """Write a whole results folder of the quickstart's shape; `drop` names (group, seed) without a result.

    `rename` changes prompts, answers and error messages: for text that a report must not trust.
    """
    rng = np.random.default_rng(seed)
    study = load_study("quickstart", [f"sweep.seeds={list(seeds)}", *overrides])
    built = {
        name: [TASKS[name].build(row) for row in TASKS[name].generate_rows(7, size)] for name, size in SIZES.items()
    }
    examples = [e.__class__(e.task, rename(e.prompt), e.answer, e.choices, e.gold) for o in built.values() for e in o]
    counts = {
        name: {"source_rows": 900, "train": 2, "validation": size - 2, "duplicates": 3, "too_long": 1, "unusable": 0}
        for name, size in SIZES.items()
    }
    by_task = {name: [e for e in examples if e.task == name] for name in SIZES}
    train = [e for task_examples in by_task.values() for e in task_examples[:2]]
    held_out = [e for task_examples in by_task.values() for e in task_examples[2:]]
    test = {name: {"used": size, "source_rows": 500, "in_corpus": 1} for name, size in SIZES.items()}
    save_corpus(Examples(train, held_out, counts, held_out, test), folder / "corpus", "0123456789abcdef")
    for name, chance in (("teacher", 0.9), ("student", 0.3)):
        for suffix, split in (("", "validation"), ("_test", "test")):
            predictions = predictions_of(held_out, chance, rng)
            save_predictions(predictions, folder / "baselines" / f"{name}{suffix}.parquet")
            metrics = {
                "fingerprint": f"{name}{suffix}",
                "identity": name,
                "metrics": accuracy_metrics(predictions, split),
            }
            write_json(folder / "baselines" / f"{name}{suffix}.json", metrics)
    trials = []
    for group in study.groups:
        for number in seeds:
            name = f"trial_{len(trials):08d}_{group.name}_seed_{number}"
            trials.append({"name": name, "group": group.name, "seed": number})
            trial = folder / EXPERIMENT / name
            if (group.name, number) in drop:
                write_json(trial / "error.json", {"error": rename("RuntimeError: it broke"), "traceback": ""})
                continue
            validated, test = (predictions_of(held_out, CHANCES[group.name] + rng.normal(0, 0.02), rng) for _ in "ab")
            save_predictions(validated, trial / "predictions.parquet")
            save_predictions(test, trial / "predictions_test.parquet")
            result = result_of(name, group, number, study, validated, rng)
            result["metrics"] = [*result["metrics"], *accuracy_metrics(test, "test")]
            write_json(trial / "result.json", result)
    planned = {"study": study.model_dump(mode="json"), "snapshot": "offline_teacher_data_20260101T000000Z"}
    names = [f"{name}{suffix}" for name in ("teacher", "student") for suffix in ("", "_test")]
    planned |= dict.fromkeys(("fingerprint", "corpus"), "0123456789abcdef") | {"baselines": {n: n for n in names}}
    write_json(folder / PLANNED, {**planned, "trials": trials})
    write_summary(folder)
    for stage in ("capture", "verify", "archive", "sweep"):
        record_run(folder / "run.json", stage, {"fingerprint": "0123456789abcdef"} if stage != "sweep" else {}, {})
    return study


def result_of(name, group, seed, study, predictions, rng):
    """`result.json` of one trial."""
    objective = group.objective(study.objective)
    terms = [term for term, weight in objective.weights.items() if weight > 0]
    epochs = []
    for epoch in range(1, study.training.epochs + 1):
        losses = [
            row
            for split in ("train", "validation")
            for row in overall_metrics({f"{term}_loss": float(2 / epoch + rng.random()) for term in terms}, split)
        ]
        losses += [row for split in ("train", "validation") for row in overall_metrics({"loss": 3 / epoch}, split)]
        spent = {"train_seconds": 20.0 + seed, "data_wait_seconds": 0.1, "evaluation_seconds": 5.0, "tokens": 9000}
        progress = {"epoch": epoch, "step": 90 * epoch, "skipped_steps": 0}
        epochs.append({"metrics": [*losses, *accuracy_metrics(predictions)], **progress, **spent})
    norms = {"task": 1.0, "kd": 0.6, "hidden": 0.2, "attention": 0.004}
    term_norms = {term: norms[term] for term in terms}
    shares = {term: norm / sum(term_norms.values()) for term, norm in term_norms.items()}
    coverage = {
        task: {
            "tokens": 1000,
            "aligned": 900,
            "predictions": 100,
            "aligned_predictions": 98,
            "same_position": 300,
            "token_coverage": 0.9,
            "prediction_coverage": 0.98,
        }
        for task in SIZES
    }
    kinds = {
        kind: {"tokens": 10 * size, "aligned": 9 * size, "predictions": size, "aligned_predictions": size - 1}
        for kind, size in (("words", 50), ("digits", 20), ("punctuation", 5))
    }
    if objective.kd.weight:
        kinds = {kind: {**term_norms, "kd_loss": float(rng.random())} for kind, term_norms in kinds.items()}
    return {
        "trial": name,
        "config": {"distill_type": group.name, "seed": seed, "objective": objective.model_dump(mode="json")},
        **epochs[-1],
        "epochs": epochs,
        "gradients": [{"step": step, "norms": term_norms, "shares": shares} for step in (0, 50, 100)],
        "gradient_shares": shares,
        "coverage": {} if group.name == "task_only" else coverage,
        "kinds": {} if group.name == "task_only" else kinds,
        "parameters": 12345,
    }

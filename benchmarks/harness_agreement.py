"""Our evaluation against EleutherAI's lm-evaluation-harness, example by example, offline.

    python benchmarks/harness_agreement.py small results/.../checkpoint_2 --examples 100 --output agreement.json

STUDY names the tasks and their test splits, MODEL is any causal model's directory. For each task the rows drawn
and a task definition are written to a folder, from which the harness is run on the same model in the same precision;
for sst2, mmlu and gsm8k the definition includes the harness's own, so that prompts and readings are its, not ours.
Prints agreement by task and ends with exit code 1 where a task has less than 99.5 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from stillroom.config import ModelRef, Precision, Study
from stillroom.data.encoding import encode, fits
from stillroom.data.rows import load_rows
from stillroom.data.tasks import Example, get_task, task_of
from stillroom.data.tasks.gsm8k import normalise
from stillroom.errors import UserError
from stillroom.evaluation.scoring import evaluate
from stillroom.files import write_json, write_text
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.models.precision import default_device
from stillroom.models.sizes import context_length
from stillroom.provenance import package_versions
from stillroom.studies import load_study

REQUIRED = 0.995
"""Share of examples on which both must give the same answer."""

_BATCH = 8
"""The harness makes the logits of every position: for 32 prompts of 250 tokens and 50,000 entries, 1.6 GB, twice."""

_READINGS = {"strict-match": "extract_strict", "flexible-extract": "extract_flexible"}


def drawn(study: Study, count: int, tokenizer: Any, max_length: int) -> dict[str, list[tuple[dict[str, Any], Example]]]:
    """Up to `count` rows of each test split, at random but always the same, each with our example of it.

    None longer than `max_length` tokens: the harness would cut its beginning off.
    """
    found = {}
    for name, data in study.test_splits.items():
        task = get_task(name, data)
        rows = list(load_rows(task, data, study.corpus.sample_seed + 1, f"evaluation.test_splits.{name}"))
        random.Random(0).shuffle(rows)
        pairs = ((row, task.build(row)) for row in rows)
        short = ((row, example) for row, example in pairs if fits(encode(tokenizer, example.text), max_length))
        found[name] = list(islice(short, count))
    if not found:
        raise UserError(f"study {study.name!r} names no test splits: set evaluation.test_splits")
    return found


def write_harness_tasks(
    folder: Path, drawn_rows: dict[str, list[tuple[dict[str, Any], Example]]], limit: int
) -> dict[str, str]:
    """Write `<task>.parquet` and `<task>.yaml` for `lm_eval --include_path`; returns the harness's name of each task.

    `limit`: new tokens of a generated answer.
    """
    names = {}
    for name, pairs in drawn_rows.items():
        file = (folder / f"{name}.parquet").resolve()
        rows = [row if _their_own(name) else _plain(example) for row, example in pairs]
        pd.DataFrame([{**r, "example_id": e.example_id} for r, (_, e) in zip(rows, pairs, strict=True)]).to_parquet(
            file
        )
        split = "validation" if name == "sst2" else "test"
        names[name] = f"stillroom_{name}"
        data = {
            "task": names[name],
            "tag": None,
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(file)}, "cache_dir": str(folder.resolve() / "cache")},
            "training_split": None,
            "fewshot_split": None,
            f"{split}_split": split,
            "num_fewshot": 0,
        }
        write_text(folder / f"{name}.yaml", yaml.safe_dump({**_definition(name, pairs[0][1], limit), **data}))
    return names


def _their_own(name: str) -> Path | None:
    """The harness's own definition of a task that has one."""
    import lm_eval.tasks

    files = {
        "sst2": "glue/sst2/default.yaml",
        "mmlu": "mmlu/default/_default_template_yaml",
        "gsm8k": "gsm8k/gsm8k.yaml",
    }
    return Path(lm_eval.tasks.__file__).parent / files[name] if name in files else None


def _plain(example: Example) -> dict[str, Any]:
    """A row of a task that the harness does not have: its prompt as it is."""
    choices = list(example.choices) if example.choices else None
    return {"prompt": example.prompt, "answer": example.answer, "choices": choices, "gold": example.gold}


def _definition(name: str, example: Example, limit: int) -> dict[str, Any]:
    """What the harness needs to know of a task besides its data."""
    if name == "mmlu":  # its 57 files differ in the subject's name alone, which the rows have
        about = "{% if subject %} about {{subject | replace('_', ' ')}}{% endif %}"
        asked = f"The following are multiple choice questions (with answers){about}.\n\n"
        return {"include": str(_their_own("mmlu")), "description": asked}
    if name == "sst2":
        return {"include": str(_their_own("sst2"))}
    if example.choices:
        return {
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",  # the choices have their space
            "metric_list": [{"metric": "acc"}],
        }
    theirs = yaml.safe_load(_their_own("gsm8k").read_text("utf-8"))  # type: ignore[union-attr]
    generation = {**theirs["generation_kwargs"], "max_gen_toks": limit, "repetition_penalty": 1.0}
    definition: dict[str, Any] = {"include": str(_their_own("gsm8k")), "generation_kwargs": generation}
    if name != "gsm8k":
        definition |= {"doc_to_text": "{{prompt}}"}
    if example.definition:  # a task of the study file: read by its own pattern, which has no normalisation
        pattern = json.loads(example.definition)["generation"]["pattern"]
        definition["filter_list"] = [
            {"name": reading, "filter": [_regex(pattern, which), {"function": "take_first"}]}
            for reading, which in (("strict-match", 0), ("flexible-extract", -1))
        ]
    return definition


def _regex(pattern: str, which: int) -> dict[str, Any]:
    return {"function": "regex", "regex_pattern": pattern, "group_select": which}


def run_harness(model: str, folder: Path, tasks: list[str], precision: Precision) -> dict[str, list[dict[str, Any]]]:
    """The harness's logged samples by task."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    device = str(default_device())
    found = simple_evaluate(
        model=HFLM(pretrained=model, dtype=precision, device=device, batch_size=_BATCH),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    return samples


def compare(examples: list[Example], ours: pd.DataFrame, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement on one task: shares of examples, and what differs.

    `prompt`: the harness built our prompt. `answer` (choice), or `strict-match` and `flexible-extract` (generation):
    both gave the same. `right`: both call it right, or both wrong. `different answers`: how many ours are, since a
    model that always says the same agrees for nothing.
    """
    if examples[0].choices is not None:
        return _compare_choices(examples, ours, samples)
    task = task_of(examples[0])
    texts = list(ours["generated"])
    found: dict[str, Any] = {"examples": len(examples), "differ": []}
    for reading, name in _READINGS.items():
        theirs = _by_id([sample for sample in samples if sample["filter"] == reading], examples)
        read = getattr(task, name)
        pairs = [(read(text) or "[invalid]", _extracted(s)) for text, s in zip(texts, theirs, strict=True)]
        correct = ours["correct" if reading == "strict-match" else "correct_flexible"]
        found[reading] = _share(a == b for a, b in pairs)
        found[f"{reading} different answers"] = len({a for a, _ in pairs})
        found[f"{reading} right"] = _share(a == bool(s["exact_match"]) for a, s in zip(correct, theirs, strict=True))
        found[f"{reading} accuracy"] = [float(correct.mean()), _share(s["exact_match"] for s in theirs)]
        found["differ"] += [[e.example_id, reading, a, b] for e, (a, b) in zip(examples, pairs, strict=True) if a != b]
    found["prompt"] = _share(s["arguments"][0][0] == e.prompt for e, s in zip(examples, theirs, strict=True))
    found["text"] = _share(text == s["resps"][0][0] for text, s in zip(texts, theirs, strict=True))
    return found


def _compare_choices(examples: list[Example], ours: pd.DataFrame, samples: list[dict[str, Any]]) -> dict[str, Any]:
    theirs = _by_id(samples, examples)
    scores = [[response[0][0] for response in sample["resps"]] for sample in theirs]
    chosen = [e.choices[max(range(len(s)), key=s.__getitem__)].strip() for e, s in zip(examples, scores, strict=True)]
    differences = [
        abs(a - b)
        for choice_scores, s in zip(ours["scores"], scores, strict=True)
        for a, b in zip(choice_scores, s, strict=True)
    ]
    rows = list(zip(examples, ours["prediction"], chosen, strict=True))
    return {
        "examples": len(examples),
        "answer": _share(answer == their for _, answer, their in rows),
        "different answers": int(ours["prediction"].nunique()),
        "right": _share(a == bool(s["acc"]) for a, s in zip(ours["correct"], theirs, strict=True)),
        "accuracy": [float(ours["correct"].mean()), _share(s["acc"] for s in theirs)],
        "prompt": _share(s["arguments"][0][0] == e.prompt for e, s in zip(examples, theirs, strict=True)),
        "largest difference of a log-likelihood": max(differences),
        "differ": [[example.example_id, "answer", answer, their] for example, answer, their in rows if answer != their],
    }


def _by_id(samples: list[dict[str, Any]], examples: list[Example]) -> list[dict[str, Any]]:
    known = {sample["doc"]["example_id"]: sample for sample in samples}
    return [known[example.example_id] for example in examples]


def _extracted(sample: dict[str, Any]) -> str:
    """The harness's reading, normalised as its metric does before it compares."""
    return normalise(sample["filtered_resps"][0])


def _share(values: Any) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)


def measure_agreement(
    study: Study, model: str, count: int, folder: Path, precision: Precision = "float32"
) -> dict[str, dict[str, Any]]:
    """Both evaluations of the model in `folder`'s exported tasks, compared; by task."""
    ref, settings = ModelRef(model=model), study.evaluation
    loaded, tokenizer = load_model(ref, precision, default_device()), load_tokenizer(ref)
    rows = drawn(study, count, tokenizer, context_length(loaded.config) - settings.max_new_tokens)
    names = write_harness_tasks(folder, rows, settings.max_new_tokens)
    examples = [example for pairs in rows.values() for _, example in pairs]
    ours = evaluate(loaded, tokenizer, examples, settings)
    samples = run_harness(model, folder, list(names.values()), precision)
    return {
        name: compare([e for _, e in pairs], ours[ours["task"] == name], samples[names[name]])
        for name, pairs in rows.items()
    }


def disagreements(found: dict[str, dict[str, Any]]) -> list[str]:
    """One line for every share below what is required."""
    keys = ("answer", "right", "prompt", *_READINGS, *(f"{reading} right" for reading in _READINGS))
    return [
        f"{task}: {key} agrees on {100 * measures[key]:.1f} % only"
        for task, measures in found.items()
        for key in keys
        if key in measures and measures[key] < REQUIRED
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a shipped study's name or a YAML file; evaluation.test_splits names the splits")
    parser.add_argument("model", help="directory of the model and its tokenizer")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a field of the study")
    parser.add_argument("--examples", type=int, default=100, help="examples a task, at most (default 100)")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="write what is printed, and each example that differs, as JSON")
    parser.add_argument("--keep", type=Path, help="keep the harness's task files in this folder")
    given = parser.parse_args()
    try:
        study = load_study(given.study, given.set)
        with tempfile.TemporaryDirectory() as scratch:
            folder = given.keep or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            found = measure_agreement(study, given.model, given.examples, folder, given.precision)
    except UserError as error:
        sys.exit(f"error: {error}")
    for task, measures in found.items():
        print(task)
        for key, value in measures.items():
            if key != "differ":
                print(f"  {key:40}{value if isinstance(value, list | int) else f'{value:.4g}'}")
    if given.output:
        write_json(given.output, {"precision": given.precision, "versions": package_versions(), "tasks": found})
    if lines := disagreements(found):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()

"""A trained student as a folder ready for the hub: weights, tokenizer, generation config, model card; no projector."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from jinja2 import Environment, PackageLoader, StrictUndefined

from stillroom import __version__
from stillroom.analysis.escaping import control_free, fence, markdown_plain
from stillroom.analysis.frame import accuracy_keys
from stillroom.analysis.reading import read_baselines, read_planned, read_result, scored_tasks
from stillroom.config import ModelRef
from stillroom.data.chat_templates import turn_ends
from stillroom.data.corpus import load_corpus
from stillroom.data.rows import names_a_file
from stillroom.errors import UserError
from stillroom.evaluation.metrics import Key, by_key
from stillroom.files import atomic_path
from stillroom.folders import RESULT, ResultsFolder, TrialFolder
from stillroom.models.adapters import ADAPTER, write_peft_folder
from stillroom.models.hub import load_tokenizer
from stillroom.training.checkpoints import DIGESTS, RESUMING, checkpoints, require_whole
from stillroom.training.distillation_student import PROJECTOR


def export_trial(trial: Path, target: Path, as_adapter: bool = False) -> Path:
    """Write the student of a finished trial into `target`, a new folder, whole or not at all.

    It loads with `AutoModelForCausalLM` and knows nothing of this package; `as_adapter`, its LoRA layers alone, which
    peft loads beside the student before training. `UserError` if the trial is not finished, has no such layers, or
    `target` has something in it.
    """
    if not TrialFolder(trial).result.is_file():
        raise UserError(f"{trial} is not the folder of a finished trial: {RESULT} is missing; run `stillroom sweep`")
    kept = checkpoints(trial)
    if not kept:
        result = TrialFolder(trial).result
        raise UserError(f"{trial} has no checkpoint left to export; delete {result} and run the sweep again")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists; name a new folder")
    require_whole(kept[-1])
    if as_adapter and not (kept[-1] / ADAPTER).is_file():
        raise UserError(f"{trial}: its student was trained whole, without student.lora; export it without --adapter")
    card = _card(trial, kept[-1], as_adapter)
    with atomic_path(target) as building:
        if as_adapter:
            student = _planned(trial)["study"]["student"]
            building.mkdir()
            write_peft_folder(kept[-1] / ADAPTER, building, student["model"], student["revision"])
            load_tokenizer(ModelRef(model=str(kept[-1]))).save_pretrained(building)
        else:
            shutil.copytree(kept[-1], building, ignore=shutil.ignore_patterns(PROJECTOR, ADAPTER, *RESUMING, DIGESTS))
            _generation_config(trial, building).save_pretrained(building)
        (building / "README.md").write_text(card, "utf-8")
    return target


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Upload an exported folder to the hub, model card and all; returns its address.

    `UserError` if there is no login, no network, or no right to write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Student exported by stillroom")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"{repository}: cannot be written on the hub: {said}; log in with `hf auth login` as someone who may write "
            f"there, and upload {folder}, which is complete, with `hf upload {repository} {folder}`"
        ) from None
    return str(made)


def _generation_config(trial: Path, folder: Path) -> transformers.GenerationConfig:
    """Greedy, as the model was measured; it stops at EOS and, where it learnt chats, at what ends a turn."""
    tokenizer = load_tokenizer(ModelRef(model=str(folder)))
    pad = tokenizer.pad_token_id
    examples, _ = load_corpus(_results(trial).corpus)
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *turn_ends(tokenizer, examples.train)]))
    return transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=_planned(trial)["study"]["evaluation"]["max_new_tokens"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
    )


def _results(trial: Path) -> ResultsFolder:
    """The results folder that a trial is in."""
    return TrialFolder(trial.resolve()).results


def _planned(trial: Path) -> dict[str, Any]:
    return read_planned(_results(trial).path)


def _card(trial: Path, checkpoint: Path, as_adapter: bool = False) -> str:
    study, result = _planned(trial)["study"], read_result(TrialFolder(trial).result)
    epoch = int(checkpoint.name.split("_")[1])
    examples, _ = load_corpus(_results(trial).corpus)
    student, teacher, objective = study["student"], study["teacher"], result["config"]["objective"]
    facts = {
        "version": __version__,
        "trial": result["trial"],
        "study": study["name"],
        "groups": len(study["groups"]),
        "seeds": len(study["sweep"]["seeds"]),
        "student": _name(student),
        "student_revision": student["revision"],
        "base_model": None if _is_local(student) else student["model"],
        "teacher": _name(teacher),
        "teacher_revision": teacher["revision"],
        "fine_tuned": teacher["fine_tune"]["method"],
        "datasets": sorted({d["dataset"] for d in study["corpus"]["tasks"].values() if not _is_file(d["dataset"])}),
        "data": _data_rows(study, examples.counts),
        "max_length": study["corpus"]["max_length"],
        "prompt": control_free(examples.train[0].prompt, keep="\n\t"),
        "group": result["config"]["distill_type"],
        "seed": result["config"]["seed"],
        "terms": _term_rows(result),
        "distilled": any(settings["weight"] > 0 for term, settings in objective.items() if term != "task"),
        "projected": objective["hidden"]["weight"] > 0,
        "training": study["training"],
        "lora": student.get("lora"),
        "as_adapter": as_adapter,
        "epoch": epoch,
        "metrics": _metric_rows(
            trial, _of_epoch(trial, result, epoch), {task: examples.counts[task] for task in scored_tasks(study)}
        ),
        "trained_on": len(examples.train),
    }
    environment = Environment(loader=PackageLoader("stillroom.afterwards", "templates"), undefined=StrictUndefined)
    # a folder or a stranger's data set may be called anything: nothing of it is markup, nor more than one YAML text
    environment.filters |= {"plain": markdown_plain, "fence": fence, "yaml": _quoted}
    return environment.get_template("model_card.md.j2").render(**facts) + "\n"


def _quoted(text: str) -> str:
    """One line of text as YAML reads it, and JSON writes it."""
    return json.dumps(control_free(text), ensure_ascii=False)


def _of_epoch(trial: Path, result: dict[str, Any], epoch: int) -> dict[str, Any]:
    for record in result["epochs"]:
        if record["epoch"] == epoch:
            return dict(record)
    raise UserError(
        f"{TrialFolder(trial).result} has no epoch {epoch}, whose checkpoint is there; delete the folder and run the "
        "sweep again"
    )


def _is_file(name: str) -> bool:
    return name == "builtin" or names_a_file(name) or Path(name).exists()


def _is_local(ref: dict[str, Any]) -> bool:
    return ref["model"].startswith("builtin:") or Path(ref["model"]).exists()


def _name(ref: dict[str, Any]) -> str:
    """A model's name without the folders of one machine."""
    return Path(ref["model"]).name if _is_local(ref) else ref["model"]


def _data_rows(study: dict[str, Any], counts: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    rows = []
    for task, data in study["corpus"]["tasks"].items():
        name = Path(data["dataset"]).name if _is_file(data["dataset"]) else data["dataset"]
        details = [part for part in (data["subset"], data["revision"]) if part]
        noise = f"{data.get('label_noise', 0):.0%}" if data.get("label_noise") else ""
        where = {"task": task, "dataset": " ".join([name, *details]), "split": data["split"]}
        rows.append({"mislabelled": 0, **counts[task], **where, "label_noise": noise})
    return rows


def _term_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    shares = result["gradient_shares"]
    return [
        {
            "name": term,
            "weight": settings["weight"],
            "share": f"{shares[term]:.1%}" if term in shares else "not measured",
        }
        for term, settings in result["config"]["objective"].items()
        if settings["weight"] > 0
    ]


def _metric_rows(trial: Path, record: dict[str, Any], counts: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    known = read_baselines(_results(trial).path)
    columns = {"trained": by_key(record["metrics"])}
    columns |= {role: by_key(known[role]["metrics"]) if role in known else {} for role in ("student", "teacher")}
    validated = {task: count["validation"] for task, count in counts.items()}
    keys: dict[str, Key] = accuracy_keys([("validation", task, "accuracy") for task in validated])
    rows = zip(keys.items(), [sum(validated.values()), *validated.values()], strict=True)
    return [
        {"task": task, "examples": count}
        | {name: f"{metrics[key]:.1%}" if key in metrics else "not measured" for name, metrics in columns.items()}
        for (task, key), count in rows
    ]

"""A study: one frozen section for each stage, checked before anything runs. `studies.load_study` reads them.

A stage is given its own section and never the whole study, so a field that could change a stage's output
is a field that stage was given; `fingerprint` of those sections names the output.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from stillroom.config.columns import ChatColumns as ChatColumns
from stillroom.config.columns import ChoiceColumns as ChoiceColumns
from stillroom.config.columns import GenerationColumns as GenerationColumns
from stillroom.config.columns import TaskColumns as TaskColumns
from stillroom.config.columns import TextColumns as TextColumns
from stillroom.config.data import BenchmarkSplit as BenchmarkSplit
from stillroom.config.data import Corpus as Corpus
from stillroom.config.data import Evaluation as Evaluation
from stillroom.config.data import TaskData as TaskData
from stillroom.config.models import FineTuning as FineTuning
from stillroom.config.models import Lora as Lora
from stillroom.config.models import ModelRef as ModelRef
from stillroom.config.models import Precision as Precision
from stillroom.config.models import Quantization as Quantization
from stillroom.config.models import Student as Student
from stillroom.config.models import Teacher as Teacher
from stillroom.config.models import Training as Training
from stillroom.config.objective import GROUPS as GROUPS
from stillroom.config.objective import TERMS as TERMS
from stillroom.config.objective import WEAK_SIGNAL as WEAK_SIGNAL
from stillroom.config.objective import Attention as Attention
from stillroom.config.objective import Group as Group
from stillroom.config.objective import Hidden as Hidden
from stillroom.config.objective import Objective as Objective
from stillroom.config.objective import StudyGroup
from stillroom.config.objective import TermName as TermName
from stillroom.config.objective import Values as Values
from stillroom.config.section import Name, PossiblePath, Section, later
from stillroom.config.signals import Signals as Signals
from stillroom.errors import UserError

Retention = Literal["last", "best", "all"]


def default_store_path(environ: Mapping[str, str] | None = None, system: str = os.name) -> Path:
    """Where the teacher's data goes unless a study says otherwise.

    The variable `OFFLINE_DATA_PATH`; else `D:\\offline_teacher_data` on a Windows machine with that drive;
    else `./offline_teacher_data`.
    """
    chosen = (os.environ if environ is None else environ).get("OFFLINE_DATA_PATH")
    if chosen:
        return Path(chosen)
    if system == "nt" and Path("D:\\").exists():
        return Path("D:\\offline_teacher_data")
    return Path("offline_teacher_data")


OFFLINE_DATA_PATH = default_store_path()

BASELINE_LABELS = {"teacher": "teacher", "student": "student before training"}
"""The baselines by role, and what messages call them."""


class Sweep(Section):
    """Groups × seeds, and what a trial may use."""

    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(
        min_length=1,
        max_length=20,
        description="one trial per group and seed; the exact test counts 2ⁿ signs of n seeds",
    )
    gpus_per_trial: float = Field(
        1.0,
        ge=0,
        description="GPUs per trial, if the machine has any; 0.5 lets two trials share one; 0: CPU; "
        "above 1, that many processes train one student, each with a part of its weights (FSDP2), on CPUs too",
    )
    cpus_per_trial: int = Field(4, ge=1, description="CPU cores per trial, limited to those of the machine")
    max_concurrent: int | None = Field(None, ge=1, description="default: as many as the GPUs (else cores) allow")
    retries: int = Field(1, ge=0, description="number of retries for a failed trial")
    keep_checkpoints: Retention = Field(
        "last", description="`best`: the checkpoint with the highest validation accuracy (the earliest, if tied)"
    )
    launcher: Literal["local", "ray"] | None = Field(
        None,
        description="`local`: trials run on this machine, without Ray; `ray`: on Ray Tune, on a machine or a cluster; "
        "default: `ray` where address, storage or RAY_ADDRESS is given, else `local`",
    )
    address: str | None = Field(
        None,
        description="Ray cluster, HOST:PORT or `auto`; default: RAY_ADDRESS, else this machine alone",
    )
    storage: Annotated[str, PossiblePath] | None = Field(
        None, description="folder or PyArrow URI for Ray's own files, the same on every node; default: `ray` in results"
    )

    @property
    def processes(self) -> int:
        """How many train one student together."""
        return max(1, int(self.gpus_per_trial))

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        if self.gpus_per_trial > 1 and self.gpus_per_trial != self.processes:
            raise ValueError(
                f"gpus_per_trial: {self.gpus_per_trial:g} asked for; above one, a trial gets whole GPUs: "
                f"set {self.processes}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are repeated: {list(self.seeds)}")
        given = [name for name in ("address", "storage") if getattr(self, name)]
        if given and self.launcher == "local":
            raise ValueError(f"{given[0]} is Ray's, but launcher is local: remove one of them")
        return self

    def launched_by(self, environ: Mapping[str, str] = os.environ, system: str = os.name) -> Literal["local", "ray"]:
        """What runs the trials: the launcher named, else Ray where a cluster is, or where `local` cannot run."""
        if self.launcher:
            return self.launcher
        return "ray" if self.address or self.storage or environ.get("RAY_ADDRESS") or system == "nt" else "local"


class Analysis(Section):
    """What is compared, declared before anything is run."""

    primary: tuple[tuple[str, str], ...] = Field(
        (("hidden", "black_box"), ("attention", "black_box"), ("combined", "black_box")),
        description="contrasts that answer the first question; p-values are Holm-adjusted over them",
    )
    secondary: tuple[tuple[str, str], ...] = Field(
        (("hidden", "attention"), ("combined", "hidden"), ("combined", "attention")),
        description="further contrasts to report",
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="level of every test, and of the intervals 1 − alpha")
    equivalence_margin: float = Field(
        0.02, gt=0, lt=1, description="difference in accuracy within which groups count as equivalent"
    )
    simple_tasks: tuple[str, ...] = Field((), description="tasks on which the hypothesis expects no difference")
    hard_tasks: tuple[str, ...] = Field((), description="tasks on which it expects white-box groups to be better")
    incomplete: Literal["refuse", "common_seeds"] = Field(
        "refuse", description="if trials are missing: give no verdict, or use the seeds that all compared groups have"
    )


class Paths(Section):
    """Where a study writes."""

    store: Annotated[Path, PossiblePath] | None = Field(
        None, description="teacher data; default: `config.OFFLINE_DATA_PATH`"
    )
    results: Annotated[Path, PossiblePath] = Field(
        Path("results"), description="all else: corpus, baselines, trials, summary, report"
    )

    @property
    def store_path(self) -> Path:
        """The folder of the teacher's data."""
        return self.store or OFFLINE_DATA_PATH

    @model_validator(mode="after")
    def _apart(self) -> Paths:
        store, results = self.store_path.resolve(), self.results.resolve()
        if store in (results, *results.parents):
            raise ValueError(
                f"results ({self.results}) must not be in the store's folder ({self.store_path}), all of which is "
                "removed when another study's data take its place"
            )
        return self


class Study(Section):
    """Everything that a study is."""

    name: Name = Field(description="names the study in its report and tracker")
    teacher: Teacher
    student: Student
    corpus: Corpus
    signals: Signals = Signals()
    objective: Objective = Objective()
    groups: tuple[StudyGroup, ...] = Field(min_length=1, description="shipped ones by name, or declared")
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    sweep: Sweep
    analysis: Analysis = Analysis()
    paths: Paths = Paths()
    trackers: tuple[Literal["mlflow", "wandb", "tensorboard"], ...] = later(
        ("mlflow",),
        description="where results are logged, beyond the results folder; `wandb` is Weights & Biases; `[]`: nowhere",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        names = [g.name for g in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"groups are repeated: {names}")
        if self.sweep.processes > 1 and self.training.precision == "float16":
            raise ValueError("training.precision: a student on several GPUs trains in bfloat16 or float32, not float16")
        if self.sweep.processes > 1 and self.training.optimizer != "adamw":
            raise ValueError(f"training.optimizer: a student on several GPUs has adamw, not {self.training.optimizer}")
        if taken := [name for name in names if name in ("teacher", "student")]:
            raise ValueError(f"a group cannot be named {taken[0]!r}: tables have a row of that name")
        declared = [(name, pair) for name in ("primary", "secondary") for pair in getattr(self.analysis, name)]
        pairs = [frozenset(pair) for _, pair in declared]
        for family, pair in declared:
            if pair[0] == pair[1] or pairs.count(frozenset(pair)) > 1:
                said = "a group with itself" if pair[0] == pair[1] else f"{pair[0]} and {pair[1]} twice"
                raise ValueError(f"analysis.{family} compares {said}; a pair of groups belongs in one family, once")
        for family in {"primary", "secondary"} & self.analysis.model_fields_set:  # by default some may be absent
            for name in (name for pair in getattr(self.analysis, family) for name in pair):
                if name not in names:
                    raise ValueError(f"analysis.{family} names the group {name!r}, which is not in groups")
        for term in TERMS:
            if given := {"placebo", "share"} & getattr(self.objective, term).model_fields_set:
                raise ValueError(
                    f"objective.{term}.{min(given)}: only a group can have it; write it in the group, beside terms"
                )
        for group in self.groups:
            try:
                objective = group.objective(self.objective)
            except ValidationError as error:
                fault = error.errors()[0]
                raise ValueError(f"group {group.name!r}: {fault['loc'][0]}: {fault['msg']}") from None
            if objective.task.targets == "teacher":
                if group.terms != ("task",):
                    raise ValueError(
                        f"group {group.name!r} learns the teacher's answers (task.targets: teacher), whose text its "
                        "other signals were not captured on: task must be its only term"
                    )
                if not self.signals.teacher_answers:
                    raise ValueError(
                        f"group {group.name!r} learns the teacher's answers: set signals.teacher_answers: true"
                    )
            if "kd" in group.terms and objective.kd.support == "full" and not self.signals.teacher_head:
                raise ValueError(f"group {group.name!r} has kd.support full: set signals.teacher_head: true")
            if "kd" in group.terms and objective.kd.support == "top_k" and not self.signals.top_k:
                raise ValueError(
                    f"group {group.name!r} compares the top k, but signals.top_k is 0: set kd.support: full"
                )
            for term in group.layer_terms:
                field = f"{term.removesuffix('s')}_layers"
                kept = getattr(self.signals, field)
                if missing := [teacher for teacher, _ in objective.layers(term) if teacher not in kept]:
                    raise ValueError(
                        f"group {group.name!r} compares the teacher's {term} layer {missing[0]}, which is not among "
                        f"signals.{field} {list(kept)}"
                    )
        if self.signals.teacher_answers and self.has_chats:
            raise ValueError("signals.teacher_answers: the teacher's answers to chats are not kept; leave it out")
        texts = [name for name in self.corpus.tasks if name not in self.scored_tasks]
        if not self.scored_tasks:
            raise ValueError(
                "corpus.tasks has plain texts alone, which have no right answer: add a task that students can be "
                "compared on (choice, generation or chat, or a registered one)"
            )
        self._require_imported(self.signals)
        if self.signals.teacher_answers and texts:
            raise ValueError(
                f"signals.teacher_answers: {texts[0]!r} has texts, which ask nothing; leave one of them out"
            )
        named = [("analysis", name) for name in (*self.analysis.simple_tasks, *self.analysis.hard_tasks)]
        for name, split in self.evaluation.test_splits.items():
            if split.harness is None:
                named.append(("evaluation.test_splits", name))
            elif name in self.corpus.tasks:
                raise ValueError(f"evaluation.test_splits.{name}: {name!r} is a task of the corpus; name it otherwise")
        for section, task in named:
            if task not in self.corpus.tasks:
                raise ValueError(f"{section} names the task {task!r}, which is not in corpus.tasks")
            if task in texts:
                raise ValueError(
                    f"{section} names the task {task!r}, whose texts have no right answer; remove it there"
                )
        return self

    def _require_imported(self, signals: Signals) -> None:
        """ValueError where the study asks for what log-probabilities that were captured elsewhere cannot give."""
        if not signals.imported:
            return
        for field in ("teacher_head", "teacher_answers", "value_layers"):
            if getattr(signals, field):
                raise ValueError(f"signals.{field}: nothing but log-probabilities is imported; leave it out")
        if self.teacher.quantization:
            raise ValueError("teacher.quantization: the teacher's weights are elsewhere; leave it out")
        if self.teacher.fine_tune.method != "none":
            raise ValueError("teacher.fine_tune: the teacher's weights are elsewhere, and are not fine-tuned here")
        for group in self.groups:
            kd = group.objective(self.objective).kd
            if "kd" in group.terms and kd.temperature != 1:  # a tail that is 1 − Σ has few digits, and τ magnifies it
                raise ValueError(f"group {group.name!r}: kd.temperature must be 1 where signals.imported is true")

    @property
    def scored_tasks(self) -> dict[str, TaskData]:
        """The tasks whose answers can be right or wrong: all but plain texts."""
        return {name: data for name, data in self.corpus.tasks.items() if data.text is None}

    @property
    def test_splits(self) -> dict[str, TaskData]:
        """The benchmarks' own splits by task, each with its data set."""
        splits = self.evaluation.test_splits
        return {name: split.data(self.corpus.tasks[name]) for name, split in splits.items() if split.harness is None}

    @property
    def has_chats(self) -> bool:
        """Whether a task is of chats, which each model reads under its own template."""
        return any(data.chat for data in self.corpus.tasks.values())

    @property
    def captures_student(self) -> bool:
        """Whether a group reads inner values of the student's attention."""
        return any({"attention", "values"} & set(group.terms) for group in self.groups)

    def with_dtypes(self, teachers: Precision, students: Precision) -> Study:
        """The study with these dtypes in place of each `auto`: the first for the teacher, the second for students."""

        def training(given: Training, chosen: Precision) -> Training:
            return given.model_copy(update={"precision": chosen}) if given.precision == "auto" else given

        teacher, evaluation = self.teacher, self.evaluation
        fine_tune = teacher.fine_tune.model_copy(update={"training": training(teacher.fine_tune.training, teachers)})
        dtype = teachers if teacher.dtype == "auto" else teacher.dtype
        scored = students if evaluation.dtype == "auto" else evaluation.dtype
        return self.model_copy(
            update={
                "teacher": teacher.model_copy(update={"dtype": dtype, "fine_tune": fine_tune}),
                "training": training(self.training, students),
                "evaluation": evaluation.model_copy(update={"dtype": scored}),
            }
        )

    def group(self, name: str) -> Group:
        """The group of that name; `UserError` if the study has none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise UserError(f"group {name!r} is not in study {self.name!r}; it has {[g.name for g in self.groups]}")


def fingerprint(*parts: Any) -> str:
    """16 hex digits that change when any part does; parts are sections or JSON-like values."""
    plain = [p.model_dump(mode="json") if isinstance(p, BaseModel) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]

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

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from stillroom.config.columns import ChatColumns as ChatColumns
from stillroom.config.columns import ChoiceColumns as ChoiceColumns
from stillroom.config.columns import GenerationColumns as GenerationColumns
from stillroom.config.columns import TaskColumns as TaskColumns
from stillroom.config.columns import TextColumns as TextColumns
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
from stillroom.config.section import Examples, Layer, Name, PossiblePath, Section, later
from stillroom.errors import UserError

Precision = Literal["float32", "bfloat16", "float16", "auto"]
"""`auto` stands for bfloat16 where the device multiplies it natively, else for float32: `models.resolve_precision`."""
Retention = Literal["last", "best", "all"]
Quantization = Literal["8bit", "4bit"]
"""Of a teacher's weights, by bitsandbytes: LLM.int8 without outliers, or NF4."""


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

EXPERIMENT = "knowledge_distillation_experiment"
"""Folder of the trials, in the results folder."""
RESULT, ERROR = "result.json", "error.json"
"""What a trial leaves in its own: all its numbers, or what stopped it."""
BASELINES = "baselines"
"""Folder of what was measured of the baselines, in the results folder."""
BASELINE_LABELS = {"teacher": "teacher", "student": "student before training"}
"""The baselines by role, and what messages call them."""


class ModelRef(Section):
    """A causal language model: a hub id at a revision, a local directory, or a built-in one."""

    model: Annotated[str, PossiblePath] = Field(
        min_length=1, description="hub id, local directory, `builtin:teacher` or `builtin:student`"
    )
    revision: str | None = Field(None, description="commit of the hub id; ignored for a local directory")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; recorded if on")
    chat_template: Annotated[Path, PossiblePath] | None = later(
        None, description="file with a Jinja chat template, where the tokenizer has none or is to use another"
    )


class Training(Section):
    """How weights are updated; the same for every trial."""

    learning_rate: float = Field(1e-4, gt=0, description="AdamW's highest learning rate, reached after the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = later(
        "constant", description="how the learning rate falls between the warm-up and the last step"
    )
    schedule_floor: float = later(
        0.0, ge=0, le=1, description="share of learning_rate that a linear or cosine schedule falls to"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay, on every weight")
    batch_size: int = Field(8, ge=1, description="examples per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="examples per forward pass; default: the whole batch")
    epochs: int = Field(3, ge=1, description="passes over the training split")
    max_gradient_norm: float = Field(1.0, gt=0, description="L2 norm at which the gradient is clipped")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up, before the schedule begins")
    precision: Precision = Field(
        "auto",
        description="autocast dtype; weights and losses stay float32. `auto`: bfloat16 where the device multiplies it "
        "natively, else float32",
    )
    gradient_checkpointing: bool = later(
        False,
        description="keep each layer's input alone and compute the layer again in the backward pass: less memory, "
        "about a third more time, the same gradients",
    )
    gradient_interval: int = Field(50, ge=0, description="steps between measurements of each term's gradient; 0: never")
    share_steps: int = later(
        20,
        ge=1,
        description="first steps that a term's weight is found in, where a group gives its share of the gradient",
    )
    bucket_batches: int = Field(64, ge=1, description="batches that are grouped by length at a time")
    max_skipped_steps: int = Field(10, ge=0, description="consecutive non-finite steps before a trial stops")
    deterministic: bool = Field(False, description="on a GPU, use deterministic kernels only (slower)")

    @model_validator(mode="after")
    def _floor_of_a_fall(self) -> Training:
        if self.schedule == "constant" and self.schedule_floor:
            raise ValueError(
                "schedule_floor is where a schedule ends; set schedule to linear or cosine, or leave it out"
            )
        return self


class FineTuning(Section):
    """Fine-tuning of the teacher on the training split, with the task loss alone, before capture."""

    method: Literal["none", "full", "lora"] = Field("none", description="all weights, or LoRA layers merged afterwards")
    lora_rank: int = Field(16, ge=1, description="rank of LoRA's matrices, on every linear layer")
    lora_alpha: int = Field(32, ge=1, description="LoRA's updates are multiplied by alpha / rank")
    training: Training = Training()
    seed: int = Field(0, ge=0, description="order of batches, dropout and LoRA's first weights")


class Teacher(ModelRef):
    """The model that teaches."""

    dtype: Precision = Field("auto", description="dtype of the weights in the forward pass; `auto` as in training")
    quantization: Quantization | None = later(
        None, description="load its weights in 8 or 4 bits, by bitsandbytes, once it is fine-tuned; default: in dtype"
    )
    fine_tune: FineTuning = FineTuning()


class Lora(Section):
    """LoRA layers: two thin matrices beside a linear layer are trained, the layer itself is not."""

    rank: int = Field(16, ge=1, description="rank of the two matrices")
    alpha: int = Field(32, ge=1, description="updates are multiplied by alpha / rank")
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "all-linear",
        description="names of the layers that get them, such as [q_proj, v_proj]; `all-linear`: every linear layer but "
        "the output head",
    )


class Student(ModelRef):
    """The model that learns."""

    lora: Lora | None = later(None, description="train LoRA layers instead of all weights; default: all weights")


class TaskData(TaskColumns):
    """Where a task's rows come from and how many are used."""

    dataset: Annotated[str, PossiblePath] = Field(
        min_length=1,
        description="a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file (text ones may be compressed: `.gz`, "
        "`.bz2`, `.xz`, `.zst`), a folder of `<split>` files or of `datasets.save_to_disk`, a hub id, or `builtin`",
    )
    subset: str | None = Field(None, description="the hub data set's configuration")
    revision: str | None = Field(None, description="commit of the hub data set")
    split: str = Field(
        "train",
        pattern=r"^[^/\\]+$",
        max_length=64,
        description="split of the data set; ignored for a file, which has only one",
    )
    examples: Examples = Field(
        description="examples used, training and validation together; `all`: every row that can be used"
    )
    label_noise: float = later(
        0.0,
        ge=0,
        le=1,
        description="share of a choice task's training examples whose answer is wrong for students; a teacher that is "
        "fine-tuned learns the right ones",
    )


class Corpus(Section):
    """The examples of a study."""

    tasks: dict[Name, TaskData] = Field(min_length=1, description="by task's name")
    max_length: int = Field(512, ge=8, description="tokens, under either tokenizer")
    validation_share: float = Field(0.1, gt=0, lt=1, description="share of each task's examples, at least one example")
    sample_seed: int = Field(0, ge=0, description="seed for drawing the examples")
    split_seed: int = Field(0, ge=0, description="seed for the validation split")


class Signals(Section):
    """What is stored of the teacher."""

    imported: bool = later(
        False,
        description="log-probabilities captured elsewhere are all that is kept, by `stillroom import`; the teacher's "
        "weights are not needed",
    )
    teacher_head: bool = later(
        False, description="keep the teacher's output head, for the whole distribution (objective.kd.support: full)"
    )
    top_k: int = Field(
        256,
        ge=0,
        description="number of highest next-token log-probabilities kept per token; 0, with teacher_head: none",
    )
    hidden_layers: tuple[Layer, ...] = Field(("last",), description="layers whose hidden state is kept")
    attention_layers: tuple[Layer, ...] = Field(("last",), description="layers whose attention is kept")
    value_layers: tuple[Layer, ...] = Field((), description="layers whose value vectors are kept, for value relations")
    teacher_answers: bool = later(False, description="generate and keep the teacher's greedy answer to every prompt")

    @model_validator(mode="before")
    @classmethod
    def _imported_alone(cls, given: Any) -> Any:
        """Of what was captured elsewhere no layer is kept."""
        if isinstance(given, dict) and given.get("imported") is True:
            return {"hidden_layers": (), "attention_layers": (), **given}
        return given

    @field_validator("top_k")
    @classmethod
    def _has_a_distribution(cls, top_k: int, info: ValidationInfo) -> int:
        if not top_k and not info.data.get("teacher_head"):
            raise ValueError("0 keeps nothing of the next-token distribution: set signals.teacher_head: true, too")
        return top_k

    @field_validator("hidden_layers", "attention_layers")
    @classmethod
    def _has_the_last(cls, layers: tuple[Layer, ...], info: ValidationInfo) -> tuple[Layer, ...]:
        if info.data.get("imported"):
            if layers:
                raise ValueError("must be [] or left out where imported is true: log-probabilities alone are kept")
        elif "last" not in layers:
            raise ValueError("must include last: the store is checked and shown with it")
        return layers

    dtype: Literal["float16", "float32"] = Field("float16", description="dtype of every stored signal")
    attention_dtype: Literal["uint8_sqrt"] | None = Field(
        None, description="`uint8_sqrt`: attention in 8 bits, as round(255·√p); default as dtype"
    )
    batch_tokens: int = Field(4096, ge=1, description="tokens per forward pass, including padding")
    shard_examples: int = Field(256, ge=1, description="examples per file")
    minimum_coverage: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of student tokens that must have an aligned teacher token, per task",
    )


class BenchmarkSplit(Section):
    """A split that a task's published figures are on; evaluated once, when training is over."""

    dataset: Annotated[str, PossiblePath] | None = Field(
        None, description="default: the data set in corpus.tasks, with its subset and revision"
    )
    subset: str | None = Field(None, description="the hub data set's configuration")
    revision: str | None = Field(None, description="commit of the hub data set")
    split: str = Field("test", pattern=r"^[^/\\]+$", max_length=64, description="split of the data set")
    examples: Examples = Field(
        description="examples used, or `all`; fewer if some are also in the corpus or exceed a model's context"
    )

    def data(self, task: TaskData) -> TaskData:
        """Where its rows come from; `task` is the corpus's own entry."""
        given = self.model_dump()
        if self.dataset is None:  # elsewhere, the task's own subset and revision mean nothing
            given = {name: value for name, value in given.items() if value is not None}
        return task.model_copy(update=given)


class Evaluation(Section):
    """How accuracy is measured."""

    dtype: Precision = Field(
        "float32",
        description="dtype that students are scored in (the teacher: its own); "
        "in 16 bits, batch size can change answers",
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens per scoring batch, including padding")
    generation_batch_size: int = Field(32, ge=1, description="prompts per generation batch; on a GPU, 256 by default")
    max_new_tokens: int = Field(256, ge=1, description="maximum tokens in a generated answer")
    test_splits: dict[str, BenchmarkSplit] = Field({}, description="the benchmarks' own splits, by task; default none")


class Sweep(Section):
    """Groups × seeds, and what a trial may use."""

    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(
        min_length=1,
        max_length=20,
        description="one trial per group and seed; the exact test counts 2ⁿ signs of n seeds",
    )
    gpus_per_trial: float = Field(
        1.0, ge=0, description="GPUs per trial, if the machine has any; 0.5 lets two trials share one; 0: CPU"
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

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
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
        if taken := [name for name in names if name in ("teacher", "student")]:
            raise ValueError(f"a group cannot be named {taken[0]!r}: tables have a row of that name")
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
            for term in [term for term in ("hidden", "attention", "values") if term in group.terms]:
                field = f"{term.removesuffix('s')}_layers"
                kept = getattr(self.signals, field)
                if missing := [teacher for teacher, _ in getattr(objective, term).layers if teacher not in kept]:
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
        for section, task in [*named, *(("evaluation.test_splits", name) for name in self.evaluation.test_splits)]:
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
        return {name: split.data(self.corpus.tasks[name]) for name, split in self.evaluation.test_splits.items()}

    @property
    def has_chats(self) -> bool:
        """Whether a task is of chats, which each model reads under its own template."""
        return any(data.chat for data in self.corpus.tasks.values())

    @property
    def captures_student(self) -> bool:
        """Whether a group reads inner values of the student's attention."""
        return any({"attention", "values"} & set(group.terms) for group in self.groups)

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

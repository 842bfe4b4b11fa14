"""What is read: a study's examples, and what its students are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from stillroom.config.columns import TaskColumns
from stillroom.config.models import Precision
from stillroom.config.section import Examples, Name, PossiblePath, Section, later


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


class BenchmarkSplit(Section):
    """What a student is tested on once, when training is over: a task's own test split, or a task of the harness."""

    harness: str | None = later(
        None,
        min_length=1,
        description="a task or group of EleutherAI's lm-evaluation-harness, which evaluates it; the split then has a "
        "name of your own",
    )
    include_path: Annotated[Path, PossiblePath] | None = later(
        None, description="folder of your own tasks for the harness, as its `--include_path`; default: its own tasks"
    )
    dataset: Annotated[str, PossiblePath] | None = Field(
        None, description="default: the data set in corpus.tasks, with its subset and revision"
    )
    subset: str | None = Field(None, description="the hub data set's configuration")
    revision: str | None = Field(None, description="commit of the hub data set")
    split: str = Field("test", pattern=r"^[^/\\]+$", max_length=64, description="split of the data set")
    examples: Examples = Field(
        description="examples used, or `all`; fewer if some are also in the corpus or exceed a model's context; of the "
        "harness, the first of each task"
    )

    @model_validator(mode="after")
    def _of_the_harness(self) -> BenchmarkSplit:
        given = {"dataset": self.dataset, "subset": self.subset, "revision": self.revision}
        given["split"] = None if self.split == "test" else self.split
        if self.harness is not None and (named := [field for field, value in given.items() if value is not None]):
            raise ValueError(f"{named[0]}: the harness's task has data of its own; leave it out beside harness")
        if self.harness is None and self.include_path is not None:
            raise ValueError("include_path: it holds tasks of the harness; name one of them in harness")
        return self

    def with_whole_path(self) -> BenchmarkSplit:
        """The same, its folder named by its whole path."""
        folder = self.include_path and self.include_path.resolve()
        return self.model_copy(update={"include_path": folder}) if folder else self

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
    static_cache: bool = later(
        False,
        description="generate with a cache of fixed size; on a GPU, each step is then the replay of a CUDA graph",
    )
    max_new_tokens: int = Field(256, ge=1, description="maximum tokens in a generated answer")
    test_splits: dict[Name, BenchmarkSplit] = Field(
        {}, description="the benchmarks' own splits, by task, and tasks of the harness; default none"
    )

    @property
    def harness_splits(self) -> dict[str, BenchmarkSplit]:
        """Those of the test splits that lm-evaluation-harness evaluates."""
        return {name: split for name, split in self.test_splits.items() if split.harness is not None}

    def with_whole_paths(self) -> Evaluation:
        """The same for processes that start elsewhere."""
        splits = {name: split.with_whole_path() for name, split in self.test_splits.items()}
        return self.model_copy(update={"test_splits": splits})

"""What is read: a study's examples, and what its students are measured on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

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

"""What the GPU check is run on: a prepared corpus, tokenizers, and random weights at the study's own shapes."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stillroom.config import GROUPS, ModelRef, Study
from stillroom.data.corpus import Examples, load_corpus, save_corpus
from stillroom.data.tasks import Example
from stillroom.experiment.workspace import Workspace
from stillroom.models.hub import load_config, load_tokenizer
from stillroom.models.precision import DTYPES, default_device, release_memory
from stillroom.offline_teacher_data.store import SignalStore

ROLES = ("teacher", "student")


def prepare(study: Study, data: Path) -> None:
    """Write what travels to a machine without a network: the corpus, and of each model its files but the weights."""
    workspace = Workspace(study)
    examples = workspace.examples
    data.mkdir(parents=True, exist_ok=True)
    save_corpus(examples, data / "corpus", "prepared")
    for role, ref in zip(ROLES, (workspace.teacher_ref, workspace.student_ref), strict=True):
        load_config(ref).save_pretrained(data / role)
        load_tokenizer(ref).save_pretrained(data / role)


@dataclass
class Inputs:
    """A study on a device. What one stage makes and another reads lies in `work`."""

    study: Study
    data: Path
    work: Path
    tiny: bool
    """Two layers, a few dozen examples: every line runs on a CPU, and no figure means anything."""
    device: torch.device = field(default_factory=default_device)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Figures of the stages that have run, for `study`."""

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @cached_property
    def tokenizers(self) -> list[Any]:
        """The teacher's and the student's."""
        return [load_tokenizer(ModelRef(model=str(self.data / role))) for role in ROLES]

    @cached_property
    def examples(self) -> Examples:
        """The prepared corpus; of a tiny run, a few of each part."""
        whole, _ = load_corpus(self.data / "corpus")
        if not self.tiny:
            return whole
        return Examples(some(whole.train, 20), some(whole.validation, 6), {}, some(whole.test, 8))

    @property
    def groups(self) -> tuple[str, ...]:
        """Those that are tried."""
        return ("task_only", "combined") if self.tiny else tuple(GROUPS)

    def config(self, role: int, small: bool = False) -> Any:
        """A model's configuration; `small`, or in a tiny run: two layers of it, narrow."""
        config = load_config(ModelRef(model=str(self.data / ROLES[role])))
        if small or self.tiny:
            wide = (128, 64)[role]
            shape = {
                "hidden_size": wide,
                "intermediate_size": 2 * wide,
                "num_attention_heads": 8,
                "head_dim": wide // 8,
            }
            for name, value in {**shape, "num_key_value_heads": 2, "num_hidden_layers": 2}.items():
                setattr(config, name, value)
            config.initializer_range = 0.2  # so that attention is far from uniform
        return config

    def student_ref(self) -> ModelRef:
        """The student as a directory that `load_model` takes; written once."""
        folder = self.work / "student"
        if not (folder / "config.json").exists():
            model = random_model(self.config(1), torch.bfloat16, self.device, 1)
            model.save_pretrained(folder)
            self.tokenizers[1].save_pretrained(folder)
            release_memory()
        return ModelRef(model=str(folder))

    def store(self) -> SignalStore:
        """The store that the stage `capture` has left."""
        return SignalStore.open(self.work / "store")

    def stored(self, part: Sequence[Example]) -> list[Example]:
        """Those of a part that the store has."""
        known = self.store().index
        return [example for example in part if example.example_id in known]


def some(examples: Sequence[Example], count: int, seed: int = 0) -> list[Example]:
    """So many of the examples, at random but always the same."""
    return random.Random(seed).sample(list(examples), min(count, len(examples)))


def random_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """A model of random weights, made on the device itself."""
    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return model.eval()


def moved(model: PreTrainedModel, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model in a dtype on a device."""
    return model.to(DTYPES[dtype]).to(device)  # type: ignore[index,no-any-return]


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder

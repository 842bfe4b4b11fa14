"""What benchmarks are run on: a study's examples and tokenizers, its models or random ones of their shape."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ratios import arguments
from stillroom.config import ModelRef, Precision
from stillroom.data.tasks import Example
from stillroom.experiment.workspace import Workspace
from stillroom.models.hub import load_config, load_model
from stillroom.models.precision import DTYPES, default_device
from stillroom.studies import load_study


def study_arguments(description: str | None, examples: int | None, rounds: int = 5) -> argparse.ArgumentParser:
    """`ratios.arguments`, and which study's examples; with no number, all of them."""
    parser = arguments(description, rounds)
    parser.add_argument("study", help="a shipped study's name or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a field of the study")
    if examples is not None:
        parser.add_argument("--examples", type=int, default=examples, help="drawn from the study's, tasks mixed")
    return parser


def open_study(options: argparse.Namespace, folder: Path) -> Workspace:
    """The study with everything it makes in `folder`, and no test splits."""
    places = [f"paths.results={folder / 'results'}", f"paths.store={folder / 'store'}", "evaluation.test_splits={}"]
    return Workspace(load_study(options.study, [*options.set, *places]))


def mixed(examples: list[Example], count: int) -> list[Example]:
    """So many of the examples, at random but always the same: the tasks in the study's own proportions."""
    return random.Random(0).sample(examples, min(count, len(examples)))


def model_of(ref: ModelRef, dtype: Precision, layers: int | None) -> PreTrainedModel:
    """The model on the first GPU, if any; or, with `layers`, random weights in so many layers, with no checkpoint."""
    if layers is None:
        return load_model(ref, dtype, default_device())
    config = load_config(ref)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with default_device():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def no_gradients() -> None:
    """For programs that only read models."""
    torch.set_grad_enabled(False)

"""Capture against a bare forward pass over the same batches, and against the outline's way.

    python benchmarks/capture.py paper --layers 2 --set teacher.model=DIR ...   # random weights at Mistral's widths
    python benchmarks/capture.py small --set teacher.model=DIR ...              # a real model

The bare pass makes logits of every position with PyTorch's own attention (sdpa). Capture includes the store: shards
written, checksummed and read back; not the one comparison with the eager model that a capture begins with.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import outline_way
from inputs import mixed, model_of, no_gradients, open_study, study_arguments
from ratios import PeakMemory, begin, finish, in_turn, memory_ratio, ratio, value
from stillroom.config import Signals
from stillroom.data.encoding import Encoding, encode_many
from stillroom.models.architecture import relative_error
from stillroom.models.forward import padded
from stillroom.models.sizes import heads, vocabulary_size, width
from stillroom.offline_teacher_data.shards import plan_shards, token_batches
from stillroom.offline_teacher_data.store import shard_entry, shard_name, write_shard
from stillroom.signals import Layout, compute_signals, id_dtype


def batched(encodings: list[Encoding], budget: int) -> list[list[Encoding]]:
    """The forward passes a capture makes of them."""
    (order,) = plan_shards(encodings, len(encodings))
    return [[encodings[i] for i in part] for part in token_batches(order, encodings, budget)]


def layout_of(model: PreTrainedModel, signals: Signals) -> Layout:
    """What a store of this model keeps."""
    sizes = (signals.top_k, width(model.config), heads(model.config))
    return Layout(*sizes, "float16", id_dtype(vocabulary_size(model)))


def bare(model: PreTrainedModel, batches: list[list[Encoding]]) -> None:
    """A forward pass with logits, by sdpa."""
    model.set_attn_implementation("sdpa")
    for batch in batches:
        ids, mask = padded(batch, device=model.device)
        model(ids, attention_mask=mask, use_cache=False)


def ours(model: PreTrainedModel, batches: list[list[Encoding]], signals: Signals, folder: Path) -> None:
    """The same batches captured and stored."""
    model.set_attn_implementation("sdpa")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    layout = layout_of(model, signals)
    rows = (
        (f"{number}-{place}", "task", encoding, found)
        for number, batch in enumerate(batches)
        for place, (encoding, found) in enumerate(
            zip(batch, compute_signals(model, batch, layout, torch.float16), strict=True)
        )
    )
    write_shard(folder / shard_name(0), "benchmark", layout, rows)
    shard_entry(folder / shard_name(0))


def outline(model: PreTrainedModel, encodings: list[Encoding], signals: Signals, path: Path) -> None:
    """The outline's way."""
    model.set_attn_implementation("eager")
    outline_way.write(path, outline_way.forward(model, encodings, signals.top_k))


def difference(model: PreTrainedModel, encoding: Encoding, signals: Signals) -> float:
    """Of the last hidden states that either way stores of an example, over their norm."""
    model.set_attn_implementation("eager")
    theirs = next(outline_way.forward(model, [encoding], signals.top_k))["hidden"][: len(encoding)].float()
    model.set_attn_implementation("sdpa")
    ours = compute_signals(model, [encoding], layout_of(model, signals), torch.float16)[0]["hidden"].float()
    return relative_error(ours, theirs.cpu())


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and what they were measured on."""
    no_gradients()
    workspace = open_study(options, folder)
    study, tokenizer = workspace.study, workspace.tokenizers[0]
    model = model_of(workspace.teacher_ref, study.teacher.dtype, options.layers)
    texts = [example.text for example in mixed(workspace.examples.all, options.examples)]
    encodings = encode_many(tokenizer, texts)
    signals, short = study.signals, encodings[: options.outline_examples]
    batches, few = (batched(some, options.batch_tokens) for some in (encodings, short))
    ways: dict[str, Callable[[], None]] = {
        "bare": lambda: bare(model, batches),
        "ours": lambda: ours(model, batches, signals, folder / "shards"),
    }
    against: dict[str, Callable[[], None]] = {
        "ours": lambda: ours(model, few, signals, folder / "shards"),
        "outline": lambda: outline(model, short, signals, folder / "outline.parquet"),
    }
    peaks = {}
    for name, run in {"captured": ways["ours"], "bare": ways["bare"], **against}.items():
        with PeakMemory() as peaks[name]:
            run()
    seconds = in_turn(ways, options.rounds)
    slow = in_turn(against, options.outline_rounds)
    rows = [
        ratio("speed of capture / bare forward pass", seconds["bare"], seconds["ours"], options.target),
        ratio("speed of capture / outline's way", slow["outline"], slow["ours"], "≥ 1.5"),
        memory_ratio("peak memory, outline's way / capture", peaks["outline"], peaks["ours"], "> 1"),
        memory_ratio("peak memory, capture / bare forward pass", peaks["captured"], peaks["bare"]),
    ]
    rows.append(value("relative difference of the two ways' hidden states", difference(model, short[0], signals), "0"))
    tokens = sum(len(encoding) for encoding in encodings)
    facts = {
        "tokens": tokens,
        "seconds": seconds,
        "outline_seconds": slow,
        "peak_bytes": {n: p.bytes for n, p in peaks.items()},
    }
    return rows, facts


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = study_arguments(__doc__, examples=48)
    parser.add_argument("--layers", type=int, help="random weights in so many layers instead of the checkpoint")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens a forward pass, padding included")
    parser.add_argument("--outline-examples", type=int, default=8, help="examples for the outline's way, which is slow")
    parser.add_argument("--outline-rounds", type=int, default=3, help="times it is measured")
    parser.add_argument("--target", default="≥ 0.9", help="what the speed should be, of a bare pass's")
    options = parser.parse_args(arguments)
    begin(options)
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = measure(options, Path(folder))
    finish("capture", rows, options, **facts)


if __name__ == "__main__":
    main()

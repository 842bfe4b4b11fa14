"""Writing alone, signals ready in memory, against nested lists; the store's size against its payload.

    python benchmarks/writing.py paper --set teacher.model=DIR ...

It is what a teacher on a GPU waits for. Signals are random, of the study's widths and its texts' real lengths.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import outline_way
from inputs import mixed, open_study, study_arguments
from ratios import begin, finish, in_turn, ratio, value
from stillroom.data.encoding import Encoding, encode_many
from stillroom.models.hub import load_config
from stillroom.models.sizes import heads, width
from stillroom.offline_teacher_data.store import payload_bytes, write_shard
from stillroom.signals.attention_maps import AttentionMaps, triangle
from stillroom.signals.next_token import top_k
from stillroom.signals.signal import Layout, id_dtype


def layout_of(options: argparse.Namespace, folder: Path) -> tuple[Layout, list[Encoding], Any]:
    """The store's shapes, the encoded texts, and the study they are of."""
    workspace = open_study(options, folder)
    config, signals = load_config(workspace.teacher_ref), workspace.study.signals
    vocabulary = config.get_text_config().vocab_size
    layout = Layout(signals.top_k, width(config), heads(config), "float16", id_dtype(vocabulary))
    texts = [example.text for example in mixed(workspace.examples.all, options.examples)]
    return layout, encode_many(workspace.tokenizers[0], texts), workspace


def random_signals(layout: Layout, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Signals as a teacher would give them: distinct ids, log-probabilities falling, attention rows that sum to 1."""
    rng = torch.Generator().manual_seed(length)
    logits = torch.randn(length, vocabulary, generator=rng)
    ids, logprobs, tails = top_k(3 * logits, layout.top_k)
    scores = torch.randn(layout.heads, length, length, generator=rng).mul_(3)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    attention = torch.softmax(scores.masked_fill(~causal, -torch.inf), -1)
    return {
        "topk_ids": ids.int(),
        "topk_logprobs": logprobs.half(),
        "tail_logprobs": tails,
        "hidden": torch.randn(length, layout.width, generator=rng).half(),
        "attention": triangle(attention).half(),
    }


def sqrt_error(attention: torch.Tensor, layout: Layout) -> tuple[float, float]:
    """Largest and root-mean-square error of attention kept as round(255·√p)."""
    companded = Layout(**{**layout.__dict__, "attention_dtype": "uint8_sqrt"})
    (column,) = AttentionMaps(companded).columns
    kept = column.unpack(column.pack(attention).numpy())
    difference = torch.from_numpy(kept) - attention.float()
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and what they were measured on."""
    layout, encodings, workspace = layout_of(options, folder)
    vocabulary = load_config(workspace.teacher_ref).get_text_config().vocab_size
    ready = [random_signals(layout, len(encoding), vocabulary) for encoding in encodings]
    rows = [(f"{n}", "task", e, s) for n, (e, s) in enumerate(zip(encodings, ready, strict=True))]
    shard, lists = folder / "part-00000.parquet", folder / "lists.parquet"
    whole = [outline_way.whole(signals, len(encoding)) for _, _, encoding, signals in rows]
    few = range(0, len(rows), max(1, len(rows) // options.padded_examples))
    padded = [outline_way.padded(whole[n], len(encodings[n])) for n in few]
    seconds = in_turn(
        {
            "ours": lambda: write_shard(shard, "benchmark", layout, rows),
            "lists": lambda: outline_way.write(lists, iter(whole)),
            "padded lists": lambda: outline_way.write(lists, iter(padded)),
        },
        options.rounds,
    )
    each = [duration * len(rows) / len(padded) for duration in seconds["padded lists"]]
    payload = sum(payload_bytes(layout, len(encoding)) for encoding in encodings)
    small = Layout(**{**layout.__dict__, "attention_dtype": "uint8_sqrt"})
    companded = sum(payload_bytes(small, len(encoding)) for encoding in encodings)
    errors = [sqrt_error(signals["attention"], layout) for signals in ready]
    tokens = sum(len(encoding) for encoding in encodings)
    table = [
        ratio("speed of writing / nested lists at true lengths", seconds["lists"], seconds["ours"], "≥ 40"),
        ratio("speed of writing / nested lists padded to 512", each, seconds["ours"], "≥ 40"),
        value("bytes on disk / payload", shard.stat().st_size / payload, "≤ 1.02"),
        value("payload with attention in 8 bits / in float16", companded / payload),
        value("largest error of attention in 8 bits", max(error for error, _ in errors), "≤ 1/255"),
        value("root-mean-square error of attention in 8 bits", sum(e for _, e in errors) / len(errors)),
    ]
    return table, {"tokens": tokens, "payload_bytes": payload, "seconds": seconds, "layout": layout.__dict__}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = study_arguments(__doc__, examples=128)
    parser.add_argument("--padded-examples", type=int, default=4, help="of them, also written as padded lists")
    options = parser.parse_args(arguments)
    begin(options)
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = measure(options, Path(folder))
    finish("writing", rows, options, **facts)


if __name__ == "__main__":
    main()

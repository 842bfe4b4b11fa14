"""Evaluation: choices by one pass an example, and answers generated in batches, against one by one.

    python benchmarks/evaluating.py small --set student.model=CHECKPOINT ...

One by one: each choice in a full forward pass of its own, with logits at every position; each prompt continued alone,
with a cache, to where its answer ends, and, for comparison, to the limit whatever it says.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from inputs import mixed, no_gradients, open_study, study_arguments
from ratios import begin, finish, in_turn, ratio, value
from stillroom.data.encoding import encode, in_answer
from stillroom.data.tasks import Example
from stillroom.errors import UserError
from stillroom.evaluation.generation import generate
from stillroom.evaluation.scoring import answer_scores
from stillroom.models.hub import load_model
from stillroom.models.precision import default_device


def choices_one_by_one(model: Any, tokenizer: Any, examples: list[Example]) -> list[list[float]]:
    """Log-likelihood of each choice from a forward pass of its own."""
    scores = []
    for example in examples:
        choice_scores = []
        for choice in example.choices or ():
            encoding = encode(tokenizer, example.prompt + choice)
            ids = torch.from_numpy(encoding.ids.astype("int64"))[None].to(model.device)
            logprobs = torch.log_softmax(model(ids, use_cache=False).logits[0].float(), -1)
            places = in_answer(encoding, len(example.prompt)).nonzero()[0]
            choice_scores.append(float(sum(logprobs[t - 1, ids[0, t]] for t in places)))
        scores.append(choice_scores)
    return scores


def to_the_limit(model: Any, tokenizer: Any, prompts: list[Example], limit: int) -> None:
    """Each prompt continued alone by exactly so many tokens."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=limit, min_new_tokens=limit, pad_token_id=tokenizer.eos_token_id
    )
    for prompt in prompts:
        ids = torch.from_numpy(encode(tokenizer, prompt.prompt).ids.astype("int64"))[None].to(model.device)
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and what they were measured on."""
    no_gradients()
    workspace = open_study(options, folder)
    settings, tokenizer = workspace.study.evaluation, workspace.tokenizers[1]
    model = load_model(workspace.student_ref, settings.dtype, default_device())
    examples = mixed(workspace.examples.all, len(workspace.examples.all))
    choosing = [e for e in examples if e.choices is not None][: options.examples]
    prompts = [e for e in examples if e.choices is None][: options.prompts]
    if not choosing or not prompts:
        raise UserError("this benchmark needs a task of choices and one of generation")
    alone = settings.model_copy(update={"generation_batch_size": 1})
    first = settings.model_copy(update={"max_new_tokens": 1})
    texts: dict[str, Any] = {}
    seconds = in_turn(
        {
            "choices": lambda: texts.update(ours=answer_scores(model, tokenizer, choosing, settings.batch_tokens)[0]),
            "choices one by one": lambda: texts.update(alone=choices_one_by_one(model, tokenizer, choosing)),
        },
        options.rounds,
    )
    seconds |= in_turn(
        {
            "generated": lambda: texts.update(batched=generate(model, tokenizer, prompts, settings)),
            "prompts": lambda: generate(model, tokenizer, prompts, first),
            "generated one by one": lambda: texts.update(single=generate(model, tokenizer, prompts, alone)),
            "generated to the limit": lambda: to_the_limit(model, tokenizer, prompts, settings.max_new_tokens),
        },
        options.generation_rounds,
        warm_up=False,  # minutes each
    )
    best = [[max(range(len(s)), key=s.__getitem__) for s in texts[name]] for name in ("ours", "alone")]
    same = sum(a == b for a, b in zip(texts["batched"], texts["single"], strict=True)) / len(prompts)
    batched = seconds["generated"]
    rows = [
        ratio("speed of choices / each choice in its own pass", seconds["choices one by one"], seconds["choices"]),
        value("share of choices that are the same", sum(map(int.__eq__, *best)) / len(choosing), "1"),
        ratio("speed of generation / one by one, stopped", seconds["generated one by one"], batched, "≥ 10"),
        ratio("speed of generation / one by one, forced to the limit", seconds["generated to the limit"], batched),
        ratio(
            "speed of the batches' first token alone / one by one, stopped",
            seconds["generated one by one"],
            seconds["prompts"],
        ),
        value("share of generated texts that are the same", same),
    ]
    return rows, {"seconds": seconds, "prompts": len(prompts), "choice_examples": len(choosing)}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = study_arguments(__doc__, examples=48, rounds=3)
    parser.add_argument("--prompts", type=int, default=32, help="prompts whose answers are generated")
    parser.add_argument("--generation-rounds", type=int, default=2, help="times generation is measured")
    options = parser.parse_args(arguments)
    begin(options)
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = measure(options, Path(folder))
    finish("evaluation", rows, options, **facts)


if __name__ == "__main__":
    main()

"""What tests of losses, steps and trials share: a student with its step, and the same step by `reference`."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import reference
from stillroom.config import GROUPS, Evaluation, Objective, Training
from stillroom.data.encoding import encode
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.models.sizes import vocabulary_size
from stillroom.terms import NextTokenTerms, teacher_to_student_ids, terms_of
from stillroom.terms.full_support import FullSupport
from stillroom.training.batches import prepare
from stillroom.training.collation import Collator
from stillroom.training.distillation_student import DistillationStudent
from stillroom.training.step import StepRunner, losses_of
from stillroom.training.train_student import Trial, train

ALL = Objective(values={"weight": 0.0})
"""Every term of the study on, with its own weights."""
TRAINING = Training(learning_rate=3e-3, batch_size=8, epochs=2, precision="float32", gradient_interval=3)
EVALUATION = Evaluation(max_new_tokens=12)


def changed(objective=ALL, **terms):
    """The objective with some settings of some terms changed: `changed(kd={"temperature": 2.0})`."""
    new = {term: getattr(objective, term).model_copy(update=settings) for term, settings in terms.items()}
    return objective.model_copy(update=new)


@lru_cache(maxsize=8)
def _eager(model):
    return AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()


def dense(ref, text, add_eos=False, layer="last"):
    """One example through an eager, unbatched, unpadded float32 forward pass; arrays for `reference`.

    `layer`: whose hidden state and attention map.
    """
    encoding = encode(load_tokenizer(ref), text, add_eos=add_eos)
    model, found = _eager(ref.model), {}
    block = model.model.layers[-1 if layer == "last" else layer - 1]
    hook = block.self_attn.v_proj.register_forward_hook(lambda module, given, output: found.update(values=output[0]))
    with torch.no_grad():
        ids = torch.from_numpy(encoding.ids.astype("int64"))[None]
        output = model(ids, output_attentions=True, output_hidden_states=True)
    hook.remove()
    return {
        "values": found["values"].numpy(),
        "ids": encoding.ids,
        "ends": encoding.ends,
        "special": encoding.special,
        "logits": output.logits[0].numpy(),
        "hidden": output.hidden_states[-1 if layer == "last" else layer][0].numpy(),
        "attention": output.attentions[-1 if layer == "last" else layer - 1][0].numpy(),
    }


class Setup:
    """A student, a store and what is needed to take a step, float32."""

    def __init__(self, student_ref, store, objective=ALL, micro=None, precision="float32"):
        self.store, self.objective = store, objective
        self.tokenizer, model = load_tokenizer(student_ref), load_model(student_ref)
        vocabulary = store.manifest["vocabulary"]
        self.map = teacher_to_student_ids(store.tokenizer, self.tokenizer, vocabulary, vocabulary_size(model))
        full = objective.kd.support == "full"
        support = FullSupport(store.teacher_head, self.map, vocabulary_size(model)) if full else None
        self.head = NextTokenTerms(objective, self.map, support)
        self.terms = terms_of(objective, store, model.config)
        self.student = DistillationStudent(model, self.terms, seed=3).eval()
        self.collate = Collator(store, self.head, self.terms)
        self.training = Training(precision=precision, micro_batch_size=micro)
        scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16")
        self.runner = StepRunner(self.student, self.head, self.terms, objective, self.training, scaler)

    def items(self, examples):
        """The examples as the student reads them."""
        return prepare(examples, self.tokenizer, self.store)

    def step(self, examples, split=None):
        """Means of the terms and the gradient of one optimizer step over `examples`, cut into micro-batches."""
        items = self.items(examples)
        parts = [items] if split is None else [items[a:b] for a, b in itertools.pairwise(split)]
        self.student.zero_grad(set_to_none=True)
        self.differentiated = []

        def keep(total):
            self.differentiated.append(float(total.detach()))
            return total

        batches = [self.collate(p) for p in parts]
        sums, counts = self.runner._backward(batches, self.objective.weights, keep)
        totals = {f"{n}_sum": v for n, v in sums.items()} | {f"{n}_count": c for n, c in counts.items()}
        gradient = {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}
        return losses_of(totals, self.objective), gradient


def reference_means(student_ref, teacher_ref, setup, examples, top_k=32, **kd):
    """The same means by `reference`; `kd`: settings of the divergence, as `reference.kd_terms` takes them."""
    task, divergence, hidden, attention, rows = [], [], [], [], 0
    projector = setup.student.trained["hidden"]
    weight, bias = projector.weight.detach().numpy(), projector.bias.detach().numpy()
    for example in examples:
        teacher, student = dense(teacher_ref, example.text), dense(student_ref, example.text, add_eos=True)
        task += reference.task_terms(student, len(example.prompt))
        divergence += reference.kd_terms(teacher, student, len(example.prompt), setup.map, top_k, **kd)
        hidden += reference.hidden_terms(teacher, student, weight, bias)
        squares, example_rows = reference.attention_terms(teacher, student)
        attention += squares
        rows += example_rows
    return {
        "task_loss": np.mean(task),
        "kd_loss": np.mean(divergence),
        "hidden_loss": np.mean(hidden),
        "attention_loss": np.mean(attention),
        "attention_by_row": sum(attention) / rows,
    }


def run(folder, student_ref, store, examples, group="combined", seed=0, **changes):
    """Train one trial with small settings."""
    options = {
        k: changes.pop(k) for k in ("report", "keep_checkpoints", "adapter", "minimum_coverage", "test") if k in changes
    }
    training = TRAINING.model_copy(update=changes)
    trial = Trial("t", GROUPS[group], seed)
    return train(
        trial, student_ref, training, Objective(), EVALUATION, examples, store and store.path, folder, **options
    )


TIMES = ("train_seconds", "data_wait_seconds", "evaluation_seconds")


def numbers(result):
    """All metrics but the times."""
    return [{k: v for k, v in epoch.items() if k not in TIMES} for epoch in result["epochs"]]

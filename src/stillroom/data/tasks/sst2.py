"""SST-2, sentiment of a film review's sentence, in the wording of lm-evaluation-harness' `sst2`."""

from stillroom.data.tasks.example import Example, Row, Task, index_of, text_of

CHOICES = (" negative", " positive")


def build(row: Row) -> Example:
    """`sentence`, `label` (0 negative, 1 positive)."""
    gold = index_of(row, "label", 2)
    prompt = f"{text_of(row, 'sentence')}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return Example("sst2", prompt, CHOICES[gold], CHOICES, gold)


TASK = Task("sst2", "choice", ("sentence", "label"), build)

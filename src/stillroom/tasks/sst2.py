"""SST-2, sentiment of a film review's sentence, in the wording of lm-evaluation-harness' `sst2`."""

from stillroom.tasks.example import Example, Row, Task, text_of

CHOICES = (" negative", " positive")


def build(row: Row) -> Example:
    """`sentence`, `label` (0 negative, 1 positive)."""
    if row["label"] not in (0, 1):
        raise ValueError(f"label must be 0 or 1, not {row['label']!r}")
    prompt = f"{text_of(row, 'sentence')}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return Example("sst2", prompt, CHOICES[row["label"]], CHOICES, row["label"])


TASK = Task("sst2", "choice", ("sentence", "label"), build)

"""GSM8K, grade-school word problems, in the wording of lm-evaluation-harness' `gsm8k`, zero-shot.

The two readings of an answer are the harness's filters: strict takes the number after the first `####`,
flexible the last number anywhere; commas, dollar signs and a final full stop do not count.
"""

import re

from stillroom.data.tasks.example import Example, Row, Task, text_of

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def normalise(number: str) -> str:
    """A number without commas, dollar signs and a final full stop."""
    return re.sub(r"\.$", "", number.replace(",", "").replace("$", ""))


def extract_strict(text: str) -> str | None:
    """The number after the first `####`, or None."""
    found = _STRICT.search(text)
    return normalise(found.group(1)) if found else None


def extract_flexible(text: str) -> str | None:
    """The last number of the text, or None."""
    found = _NUMBER.findall(text)
    return normalise(next(part for part in found[-1] if part)) if found else None


def build(row: Row) -> Example:
    """`question`, `answer` (worked, ending in `#### n`)."""
    question, answer = text_of(row, "question"), text_of(row, "answer")
    if extract_strict(answer) is None:
        raise ValueError("answer has no `#### number`")
    return Example("gsm8k", f"Question: {question}\nAnswer:", f" {answer}")


TASK = Task("gsm8k", "generation", ("question", "answer"), build, extract_strict, extract_flexible)

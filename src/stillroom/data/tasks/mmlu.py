"""MMLU, four-way multiple choice over 57 subjects, in the wording of lm-evaluation-harness' `mmlu`, zero-shot."""

from stillroom.data.tasks.example import Example, Row, Task, index_of, text_of, texts_of

CHOICES = (" A", " B", " C", " D")


def build(row: Row) -> Example:
    """`question`, `choices` (four), `answer` (index), `subject` (may be empty)."""
    choices = texts_of(row, "choices")
    if len(choices) != 4:
        raise ValueError(f"expected 4 choices, got {len(choices)}")
    gold = index_of(row, "answer", 4)
    about = f" about {text_of(row, 'subject').replace('_', ' ')}" if row["subject"] else ""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    prompt = (
        f"The following are multiple choice questions (with answers){about}.\n\n"
        f"{text_of(row, 'question').strip()}{options}\nAnswer:"
    )
    return Example("mmlu", prompt, CHOICES[gold], CHOICES, gold)


TASK = Task("mmlu", "choice", ("question", "subject", "choices", "answer"), build)

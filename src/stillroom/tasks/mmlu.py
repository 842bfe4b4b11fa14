"""MMLU, four-way multiple choice over 57 subjects, in the wording of lm-evaluation-harness' `mmlu`, zero-shot."""

from stillroom.tasks.example import Example, Row, Task, text_of, texts_of

CHOICES = (" A", " B", " C", " D")


def build(row: Row) -> Example:
    """`question`, `choices` (four), `answer` (index), `subject` (may be empty)."""
    choices = texts_of(row, "choices")
    if len(choices) != 4 or row["answer"] not in range(4):
        raise ValueError(f"expected 4 choices and an answer in 0–3, got {len(choices)} and {row['answer']!r}")
    about = f" about {row['subject'].replace('_', ' ')}" if row["subject"] else ""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    prompt = (
        f"The following are multiple choice questions (with answers){about}.\n\n"
        f"{text_of(row, 'question').strip()}{options}\nAnswer:"
    )
    return Example("mmlu", prompt, CHOICES[row["answer"]], CHOICES, row["answer"])


TASK = Task("mmlu", "choice", ("question", "subject", "choices", "answer"), build)

"""From a task's rows to examples, their tokens, and two tokenizers' common ground."""

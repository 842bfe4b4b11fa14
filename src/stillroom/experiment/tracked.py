"""What every tracker is told of a trial, and the error that all of them raise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stillroom.errors import UserError
from stillroom.evaluation.metrics import by_column


def history(result: dict[str, Any]) -> dict[int, dict[str, float]]:
    """By step, in order: each epoch's metrics, norms of gradients, and at the end test splits and shares."""
    numbers: dict[int, dict[str, float]] = defaultdict(dict)
    for epoch in result["epochs"]:
        numbers[epoch["step"]] |= {k: float(v) for k, v in epoch.items() if isinstance(v, int | float)}
        numbers[epoch["step"]] |= by_column(epoch["metrics"])
    last = numbers[result["step"]]
    last |= by_column(row for row in result["metrics"] if row["split"] == "test")
    if "test_evaluation_seconds" in result:
        last["test_evaluation_seconds"] = result["test_evaluation_seconds"]
    last |= {f"gradient_share_{term}": share for term, share in result["gradient_shares"].items()}
    for row in result["gradients"]:
        numbers[row["step"]] |= {f"gradient_norm_{term}": value for term, value in row["norms"].items()}
    return dict(sorted(numbers.items()))


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as `a.b` keys, values short enough for a tracker."""
    found: dict[str, str] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(inner)[:500]
    return found


@contextmanager
def written(tracker: str, results: Path, remedy: str) -> Iterator[None]:
    """Whatever fails while a tracker is written is one message that says nothing is lost."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"{tracker} cannot be written ({type(error).__name__}: {reason}); all that goes there is in {results} too, "
            f"so nothing is lost: {remedy}, and run the command again"
        ) from error


def missing(library: str, requirement: str) -> UserError:
    """The error where a tracker's library is not installed."""
    return UserError(
        f"trackers: {library} is not installed: pip install '{requirement}', or remove {library} from trackers"
    )

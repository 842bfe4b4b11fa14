"""An example as the student reads it, and how it lines up with the teacher's reading."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int32
from numpy import ndarray

from stillroom.data.alignment import Alignment
from stillroom.data.encoding import Encoding
from stillroom.data.tasks import Example


@dataclass(frozen=True)
class Prepared:
    """One example, encoded for the student; aligned where there is a teacher's encoding."""

    example: Example
    encoding: Encoding
    positions: Int32[ndarray, "N"]
    """Those whose next token is supervised."""
    targets: Int32[ndarray, "N"]
    """Ids of those next tokens."""
    alignment: Alignment | None = None

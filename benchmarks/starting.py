"""How long a newcomer waits for `stillroom --help`, against Python's own start.

python benchmarks/starting.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ratios import arguments, finish, in_turn, ratio


def main(given: list[str] | None = None) -> None:
    """The command."""
    options = arguments(__doc__, rounds=10).parse_args(given)
    stillroom = str(Path(sys.executable).with_name("stillroom"))
    seconds = in_turn(
        {
            "help": lambda: subprocess.run([stillroom, "--help"], check=True, capture_output=True),
            "python": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
        },
        options.rounds,
    )
    one = [1.0] * options.rounds
    rows = [
        ratio("seconds of `stillroom --help`", seconds["help"], one, "< 1"),
        ratio("`stillroom --help` / starting Python", seconds["help"], seconds["python"]),
    ]
    finish("starting", rows, options, seconds=seconds)


if __name__ == "__main__":
    main()

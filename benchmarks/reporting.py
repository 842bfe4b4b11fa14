"""How long a report takes, against importing the libraries that it is made with.

python benchmarks/reporting.py RESULTS
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ratios import arguments, finish, in_turn, ratio

LIBRARIES = "import matplotlib.backends.backend_pdf, pandas, scipy.stats, statsmodels.stats.weightstats"


def main(given: list[str] | None = None) -> None:
    """The command."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("results", help="a results folder; its report is written anew")
    options = parser.parse_args(given)
    stillroom = str(Path(sys.executable).with_name("stillroom"))
    seconds = in_turn(
        {
            "report": lambda: subprocess.run([stillroom, "report", options.results], check=True, capture_output=True),
            "libraries": lambda: subprocess.run([sys.executable, "-c", LIBRARIES], check=True),
        },
        options.rounds,
    )
    rows = [
        ratio("seconds of `stillroom report RESULTS`", seconds["report"], [1.0] * options.rounds, "< 10"),
        ratio("`stillroom report RESULTS` / importing its libraries", seconds["report"], seconds["libraries"]),
    ]
    finish("reporting", rows, options, seconds=seconds)


if __name__ == "__main__":
    main()

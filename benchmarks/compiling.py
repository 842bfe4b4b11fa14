"""What `training.compile` gives: forward and backward passes of a student with its last map captured.

    python benchmarks/compiling.py small --set student.model=DIR ... --threads 1

Processor time, so that other programs on the machine do not count; the first pass, which compiles, by the clock.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from inputs import open_study, study_arguments
from ratios import begin, finish, ratio, value
from stillroom.models import compiled
from stillroom.models.forward import Taps, forward
from stillroom.models.hub import load_model
from stillroom.models.precision import DTYPES, default_device, resolve_precision

TAPS = Taps(attention=frozenset({"last"}))


def main(given: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = study_arguments(__doc__, None)
    parser.add_argument("--batch", type=int, default=4, help="texts in a batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each")
    parser.add_argument("--backend", default=compiled.BACKEND, help="of torch.compile")
    options = parser.parse_args(given)
    begin(options)
    device, compiled.BACKEND = default_device(), options.backend
    with tempfile.TemporaryDirectory() as folder:
        workspace = open_study(options, Path(folder))
        precision = resolve_precision(workspace.study).training.precision
        plain = load_model(workspace.student_ref, "float32", device).train()
    other = copy.deepcopy(plain)
    ids = torch.randint(0, plain.config.get_text_config().vocab_size, (options.batch, options.tokens), device=device)

    def passes(model: torch.nn.Module) -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32"):
            found = forward(model, ids, TAPS)  # type: ignore[arg-type]
            loss = found.last_hidden.float().square().mean() + found.attention["last"].square().mean()
        loss.backward()
        return float(loss.detach())

    def seconds(run: Callable[[], float]) -> float:
        started = time.process_time()
        run()
        return time.process_time() - started

    began = time.perf_counter()
    compiled.compile_layers(other, TAPS, other.device)
    found, expected = passes(other), passes(plain)
    first = time.perf_counter() - began
    rounds = [(seconds(lambda: passes(plain)), seconds(lambda: passes(other))) for _ in range(options.rounds)]
    rows = [
        ratio("without / with compiled layers, processor time", *zip(*rounds, strict=True)),
        value("seconds of the first pass, compiling", first),
        value("relative difference of the loss", abs(found - expected) / expected),
    ]
    finish(f"passes of {workspace.study.student.model}", rows, options)


if __name__ == "__main__":
    main()

"""TensorBoard: a folder of event files for each trial, in `tensorboard` in the results folder."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from pathlib import Path

from stillroom.config import Study
from stillroom.experiment.tracked import flat, history, missing, written
from stillroom.files import atomic_path, read_json
from stillroom.folders import TrialFolder


class TensorBoardFiles:
    """Writes each finished trial's numbers and settings; a trial's folder is complete or absent."""

    def __init__(self, study: Study, results: Path) -> None:
        """Nothing is written before a trial is finished."""
        self.folder = results / "tensorboard"
        self.results = results

    @property
    def where(self) -> str:
        """Which tracker it is, and where it writes."""
        return "TensorBoard in files in the results folder"

    def check(self) -> None:
        """Raise `UserError` if the library is missing or the folder cannot be made."""
        self.check_beforehand()
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)

    def check_beforehand(self) -> None:
        """Raise `UserError` if the library is missing."""
        if importlib.util.find_spec("tensorboardX") is None:
            raise missing("tensorboard", "tensorboardX")

    def log_snapshot(self, path: Path, fingerprint: str) -> None:
        """Nothing: event files are about trials."""

    def log_trial(self, folder: Path) -> None:
        """A finished trial, once: its settings as a table, its numbers by step."""
        result = read_json(TrialFolder(folder).result)
        target = self.folder / result["trial"]
        if target.exists():
            return
        with self._writing(), atomic_path(target) as path:
            from tensorboardX import SummaryWriter

            with SummaryWriter(str(path)) as writer:
                rows = [f"| {name} | {value} |" for name, value in flat(result["config"]).items()]
                writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))
                for step, numbers in history(result).items():
                    for name, value in numbers.items():
                        writer.add_scalar(name, value, step)

    def log_report(self, path: Path) -> None:
        """Nothing: TensorBoard shows no pages."""

    def _writing(self) -> AbstractContextManager[None]:
        return written(f"the tracker, {self.folder},", self.results, "fix it, or move the folder away")

"""Weights & Biases: one run per study, one per trial. Its own variables say where: WANDB_MODE, WANDB_ENTITY …"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from stillroom.config import Study, fingerprint
from stillroom.errors import UserError
from stillroom.experiment.tracked import history, missing, written
from stillroom.files import file_sha256, read_json, write_json
from stillroom.folders import ResultsFolder, TrialFolder

_SECONDS = 20
"""How long a server may take to answer: a sweep must not wait minutes for it."""

_UPLOAD_SECONDS = 120
"""How long the last of a run may take to reach it; wandb would wait without a limit."""


class WandbRuns:
    """Writes each finished trial as a run of the project that has the study's name, grouped as in the study.

    The study's own run comes with the report.
    """

    def __init__(self, study: Study, results: Path) -> None:
        """Nothing is sent before a trial is finished."""
        self.study, self.results = study, results

    @property
    def _offline(self) -> bool:
        return os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")

    @property
    def where(self) -> str:
        """Which tracker it is, and where it writes."""
        place = "in files in the results folder" if self._offline else "on its server, as logged in"
        return f"Weights & Biases {place}"

    def check(self) -> None:
        """Raise `UserError` if the library is missing or, unless it is offline, nobody is logged in; asks nothing."""
        if importlib.util.find_spec("wandb") is None:
            raise missing("wandb", "wandb>=0.31")
        os.environ.setdefault("WANDB_SILENT", "true")
        if self._offline:
            return
        with self._writing():
            import wandb

            if not wandb.login(prompt=False, verify=True, timeout=_SECONDS):
                raise UserError(
                    "trackers: nobody is logged in to Weights & Biases: run `wandb login`, or set WANDB_MODE=offline "
                    "and later run `wandb sync` on the files in the results folder"
                )

    def check_beforehand(self) -> None:
        """The same: it leaves no file behind."""
        self.check()

    def log_snapshot(self, path: Path, fingerprint: str) -> None:
        """Nothing yet: the study's run names the snapshot."""

    def log_trial(self, folder: Path) -> None:
        """A finished trial, once: its settings, its numbers by step."""
        result = read_json(TrialFolder(folder).result)
        config, group = result["config"], result["config"]["distill_type"]
        with self._run(result["trial"], group, config, result["trial"]) as run:
            if run is not None:
                for step, numbers in history(result).items():
                    run.log(numbers, step=step)

    def log_report(self, path: Path) -> None:
        """The study's run: its settings, the snapshot, and the report as an artefact; again where the report is new."""
        plan = ResultsFolder(self.results).planned
        planned = read_json(plan) if plan.is_file() else {}
        snapshot = {"name": planned.get("snapshot"), "fingerprint": planned.get("fingerprint")}
        config = {**self.study.model_dump(mode="json"), "snapshot": snapshot}
        with self._run(self.study.name, "study", config, file_sha256(path)) as run:
            if run is not None:
                import wandb

                report = wandb.Artifact(f"{self.study.name}-report", type="report")
                report.add_file(str(path))
                run.log_artifact(report)

    @contextmanager
    def _run(self, name: str, group: str, config: dict[str, Any], content: str) -> Iterator[Any]:
        """A run to write to, or None where one of this content was finished before."""
        number = fingerprint(str(self.results.resolve()), group, name)
        done = self.results / "wandb" / "logged" / f"{number}.json"
        disabled = os.environ.get("WANDB_MODE") == "disabled"
        if disabled or (done.is_file() and read_json(done)["content"] == content):
            yield None
            return
        self.check()
        with self._writing():
            import wandb

            for folder in (self.results / "wandb").glob(f"*-{number}"):  # of a killed process, or the last report's
                shutil.rmtree(folder)
            quiet = wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_meta=True,
                init_timeout=_SECONDS,
                finish_timeout=_UPLOAD_SECONDS,
                finish_timeout_raises=True,
            )
            run = wandb.init(
                project=self.study.name,
                group=group,
                name=name,
                id=number,
                config=config,
                dir=str(self.results.resolve()),
                resume=None if self._offline else "allow",
                reinit="create_new",
                settings=quiet,
            )
            try:
                yield run
            except BaseException:
                run.finish(exit_code=1)
                raise
            run.finish()
            write_json(done, {"name": name, "content": content})

    @contextmanager
    def _writing(self) -> Iterator[None]:
        remedy = "fix it, or set WANDB_MODE=offline"
        with written("the tracker, Weights & Biases,", self.results, remedy):
            try:
                yield
            except Exception:
                _end_service()
                raise


def _end_service() -> None:
    """Kills wandb's service process and forgets it, unless the caller has a run of their own.

    After a request that was given up, the service may never read that it should end, while this process waits for it
    at exit, without a limit (wandb 0.31). What a run wrote is in its files.
    """
    import wandb

    if wandb.run is not None:
        return
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                child.kill()
                child.wait(10)
    with suppress(Exception, SystemExit):  # the service is gone, and it would exit with its code
        wandb.teardown()

"""MLflow: one parent run a study, one child a trial. A local SQLite file, or the server MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from stillroom.config import Study
from stillroom.experiment.tracked import flat, history, missing, written
from stillroom.files import read_json
from stillroom.folders import TrialFolder

_LOG = logging.getLogger("stillroom")


class MLflowRuns:
    """Writes what is in the results folder to MLflow; nothing is kept there alone.

    Where MLflow is not installed nothing is tracked, and a warning says so once.
    """

    def __init__(self, study: Study, results: Path) -> None:
        """It is opened when something is first logged."""
        self.study, self.results = study, results
        self._mlflow: Any = None
        self._parent = ""
        self._installed: bool | None = None

    @property
    def where(self) -> str:
        """Which tracker it is, and where it writes."""
        server = os.environ.get("MLFLOW_TRACKING_URI")
        return f"MLflow in the server {server}" if server else "MLflow in a file in the results folder"

    def _there(self) -> bool:
        """Whether there is a tracker to write to."""
        if self._installed is None:
            self._installed = importlib.util.find_spec("mlflow") is not None
            if not self._installed:
                _LOG.warning(
                    "warning: MLflow is not installed, so nothing is tracked; all of it is in %s", self.results
                )
        return self._installed

    def _open(self) -> Any:
        if self._mlflow is None:
            server, file = os.environ.get("MLFLOW_TRACKING_URI"), self.results / "mlflow.db"
            self.results.mkdir(parents=True, exist_ok=True)
            if not server:
                _require_sound(file)  # MLflow would try for minutes
            logging.getLogger("alembic").setLevel(logging.ERROR)
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a sweep must not wait minutes for a server
            import mlflow

            logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # what goes wrong is in the exception
            mlflow.set_tracking_uri(server or _address(file))
            if not server:  # MLflow sets it for its children; another study of this process has a file of its own
                os.environ.pop("MLFLOW_TRACKING_URI", None)
            if mlflow.get_experiment_by_name(self.study.name) is None:
                artifacts = None
                if not server:
                    artifacts = (self.results / "mlartifacts").resolve().as_uri()
                mlflow.create_experiment(self.study.name, artifact_location=artifacts)
            mlflow.set_experiment(self.study.name)
            self._mlflow = mlflow
            self._parent = self._find_or_start(str(self.results.resolve()))
        return self._mlflow

    def _find_or_start(self, results: str) -> str:
        """The parent run of this results folder."""
        studies = self._mlflow.search_runs(filter_string="tags.kind = 'study'", output_format="list")
        for run in studies:  # compared here: a path may hold what no filter of MLflow's can
            if run.data.tags.get("results") == results:
                return str(run.info.run_id)
        with self._mlflow.start_run(run_name=self.study.name, tags={"results": results, "kind": "study"}) as run:
            self._mlflow.log_params(flat(self.study.model_dump(mode="json")))
            return str(run.info.run_id)

    @contextmanager
    def _running(self) -> Iterator[Any]:
        """MLflow with the study's run open; whatever fails there is one message that says nothing is lost."""
        server, file = os.environ.get("MLFLOW_TRACKING_URI"), self.results / "mlflow.db"
        remedy = "fix it, or unset MLFLOW_TRACKING_URI" if server else "fix it, or move the file away"
        with written(f"the tracker, {server or file},", self.results, remedy):
            mlflow = self._open()
            with mlflow.start_run(run_id=self._parent):
                yield mlflow

    def check(self) -> None:
        """Raise `UserError` if the tracker cannot be written: better before a sweep than after it."""
        if self._there():
            with self._running():
                pass

    def check_beforehand(self) -> None:
        """The same of a local file, without what takes seconds, importing MLflow and making its tables."""
        if os.environ.get("MLFLOW_TRACKING_URI"):  # a server gets the study's own run, which it will have anyway
            return self.check()
        if importlib.util.find_spec("mlflow") is None:
            raise missing("mlflow", "mlflow")
        _require_sound(self.results / "mlflow.db")
        return None

    def log_snapshot(self, path: Path, fingerprint: str) -> None:
        """The archived store's name and fingerprint, on the parent run."""
        if not self._there():
            return
        with self._running() as mlflow:
            mlflow.set_tags({"snapshot": path.name, "snapshot_fingerprint": fingerprint})

    def log_trial(self, folder: Path) -> None:
        """A finished trial, once: its settings, the metrics of each epoch and of the test splits, its gradients."""
        if not self._there():
            return
        result = read_json(TrialFolder(folder).result)
        with self._running() as mlflow:
            tags = {"kind": "trial", "trial": result["trial"], "study_run": self._parent}
            if self._whole_run(tags):
                return
            with mlflow.start_run(run_name=result["trial"], nested=True, tags=tags):
                mlflow.log_params(flat(result["config"]))
                for step, numbers in history(result).items():
                    mlflow.log_metrics(numbers, step=step)

    def _whole_run(self, tags: dict[str, str]) -> bool:
        """Whether a finished run has these tags; what a killed process left of one is deleted."""
        wanted = " and ".join(f"tags.{name} = '{value}'" for name, value in tags.items())
        found = self._mlflow.search_runs(filter_string=wanted, output_format="list")
        for run in found:
            if run.info.status != "FINISHED":
                self._mlflow.delete_run(run.info.run_id)
        return any(run.info.status == "FINISHED" for run in found)

    def log_report(self, path: Path) -> None:
        """The report as an artefact of the parent run."""
        if not self._there():
            return
        with self._running() as mlflow:
            mlflow.log_artifact(str(path))


def _require_sound(file: Path) -> None:
    """Raise `sqlite3.Error` unless the database, if it is there, is whole and can be written."""
    if file.exists():
        with closing(sqlite3.connect(file, timeout=30, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            database.execute("ROLLBACK")
        if found != "ok":
            raise sqlite3.DatabaseError(f"damaged: {found}")


def _address(file: Path) -> str:
    """A SQLite file as MLflow is told of it: as a URL.

    What a URL gives a meaning to, MLflow and SQLAlchemy encode and decode at different times: a folder whose name has
    any such character is reached through a link that has none.
    """
    folder = file.resolve().parent
    if re.search(r"[^\w./ -]", str(folder)):
        links = Path(tempfile.mkdtemp(prefix="stillroom-"))
        atexit.register(shutil.rmtree, links, ignore_errors=True)  # of a link, the link alone is removed
        (links / "results").symlink_to(folder, target_is_directory=True)
        folder = links / "results"
    return f"sqlite:///{folder / file.name}"

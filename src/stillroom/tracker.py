"""MLflow: one parent run a study, one child a trial. A local SQLite file, or the server MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from stillroom.config import Study
from stillroom.provenance import read_json


class Tracker:
    """Writes what is in the results folder to MLflow; nothing is kept there alone."""

    def __init__(self, study: Study, results: Path) -> None:
        """The tracker is opened when something is first logged."""
        self.study, self.results = study, results
        self._mlflow: Any = None
        self._parent = ""

    def _open(self) -> Any:
        if self._mlflow is None:
            logging.getLogger("alembic").setLevel(logging.ERROR)
            import mlflow

            logging.getLogger("mlflow").setLevel(logging.ERROR)
            self.results.mkdir(parents=True, exist_ok=True)
            default = f"sqlite:///{(self.results / 'mlflow.db').resolve()}"
            mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or default)
            if mlflow.get_experiment_by_name(self.study.name) is None:
                artifacts = None
                if not os.environ.get("MLFLOW_TRACKING_URI"):
                    artifacts = (self.results / "mlartifacts").resolve().as_uri()
                mlflow.create_experiment(self.study.name, artifact_location=artifacts)
            mlflow.set_experiment(self.study.name)
            self._mlflow = mlflow
            self._parent = self._find_or_start(str(self.results.resolve()))
        return self._mlflow

    def _find_or_start(self, results: str) -> str:
        """The parent run of this results folder."""
        quoted = results.replace("'", "")
        found = self._mlflow.search_runs(
            filter_string=f"tags.results = '{quoted}' and tags.kind = 'study'", output_format="list"
        )
        if found:
            return str(found[0].info.run_id)
        with self._mlflow.start_run(run_name=self.study.name, tags={"results": quoted, "kind": "study"}) as run:
            self._mlflow.log_params(_flat(self.study.model_dump(mode="json")))
            return str(run.info.run_id)

    def log_snapshot(self, path: Path, fingerprint: str) -> None:
        """The archived store's name and fingerprint, on the parent run."""
        mlflow = self._open()
        with mlflow.start_run(run_id=self._parent):
            mlflow.set_tags({"snapshot": path.name, "snapshot_fingerprint": fingerprint})

    def log_trial(self, folder: Path) -> None:
        """A finished trial: its settings, each epoch's metrics, each measured gradient."""
        if not (folder / "result.json").is_file():
            return
        result = read_json(folder / "result.json")
        mlflow = self._open()
        with (
            mlflow.start_run(run_id=self._parent),
            mlflow.start_run(run_name=result["trial"], nested=True, tags={"kind": "trial"}),
        ):
            mlflow.log_params(_flat(result["config"]))
            for epoch in result["epochs"]:
                numbers = {k: float(v) for k, v in epoch.items() if isinstance(v, int | float)}
                mlflow.log_metrics(numbers, step=epoch["step"])
            for row in result["gradients"]:
                norms = {f"gradient_norm_{term}": value for term, value in row["norms"].items()}
                mlflow.log_metrics(norms, step=row["step"])

    def log_report(self, path: Path) -> None:
        """The report as an artefact of the parent run."""
        mlflow = self._open()
        with mlflow.start_run(run_id=self._parent):
            mlflow.log_artifact(str(path))


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b` keys, values short enough for the tracker."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(inner)[:500]
    return flat

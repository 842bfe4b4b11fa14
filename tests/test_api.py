"""The pages that a programmer reads: the Python API and the notebook, run as they stand."""

from __future__ import annotations

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

import pages

pytestmark = pytest.mark.slow


def test_every_block_of_the_api_page_runs(tmp_path, monkeypatch, capsys):
    """In order, in one namespace; what it prints is what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stillroom.config.OFFLINE_DATA_PATH", tmp_path / "offline_teacher_data")
    namespace = {}
    for block in pages.blocks(pages.ROOT / "docs" / "api.md"):
        assert block.language == "python"
        exec(compile(block.text, "docs/api.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "{'task': 1.0, 'kd': 0.5, 'hidden': 10.0, 'attention': 0.0" in printed
    assert "read: ['topk_ids', 'topk_logprobs', 'hidden']" in printed  # what was asked for, and no more
    assert "0.015625" in printed  # seven differences of one sign: 2/2⁷
    assert "model.safetensors" in printed
    assert len(namespace["results"].frame) == 2


def test_the_notebook_redraws_a_figure_from_a_results_folder(finished_study):
    """With pandas alone; its table is the summary's."""
    notebook = nbformat.read(pages.ROOT / "docs" / "notebooks" / "results.ipynb", as_version=4)
    source = "".join(cell.source for cell in notebook.cells)
    assert "import stillroom" not in source
    folder = finished_study.results.parent
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert (folder / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    shown = [
        cell.outputs[0]["data"]["text/plain"]
        for cell in notebook.cells
        if cell.get("outputs") and "data" in cell.outputs[0]
    ]
    lines = [line.split() for line in "\n".join(text for text in shown).splitlines()]
    summary = pd.read_csv(finished_study.results / "results_summary.csv")
    for _, row in summary.iterrows():
        assert [
            row["config/distill_type"],
            "0",
            *row[["validation_accuracy", "validation_task_loss"]].astype(float).round(6),
        ] in [[*line[1:3], *map(float, line[3:])] for line in lines if len(line) == 5]

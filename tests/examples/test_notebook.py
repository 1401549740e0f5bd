# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The notebook runs in a real kernel."""

import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.main_job import HOST
from tests.helpers.patience import PATIENCE

NOTEBOOK = HOST.parent / "my_photos.ipynb"


@pytest.mark.slow
def test_the_notebook(hub, small_task, tmp_path, monkeypatch):
    """The small base model is served under the Hub id that the notebook names, and training is short."""
    hub.add("IDEA-Research/grounding-dino-tiny", HOST)
    shutil.copytree(small_task, tmp_path / "photos")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (training,) = (cell for cell in notebook.cells if "steps, batch_size = 100, 4" in cell.source)
    training.source = training.source.replace("steps, batch_size = 100, 4", "steps, batch_size = 6, 4")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": tmp_path}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "12 photos to train on, 4 to measure with" in text
    assert "step 0: loss " in text and "AP50: " in text
    images = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    true, before, after, loaded = images
    assert len({true, before, after}) == 3
    # The adapter that was loaded again is the one that was trained.
    assert loaded == after


def test_the_notebook_has_no_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]

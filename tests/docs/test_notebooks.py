"""The notebooks run, and their committed outputs are small."""

import json

import pytest

from tests.docs.test_pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 100_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_small_outputs_of_a_whole_run(path):
    assert path.stat().st_size < MOST_BYTES
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert str(ROOT) not in path.read_text("utf-8")


@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs mor-layers[docs]")
    client = pytest.importorskip("nbclient", reason="needs mor-layers[docs]")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'integrations'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=resources
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    expected = sum(len(cell["outputs"]) for cell in json.loads(path.read_text("utf-8"))["cells"]
                   if cell["cell_type"] == "code")  # fmt: skip
    assert len(outputs) == expected

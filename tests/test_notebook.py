"""The notebook: executed on the demo, and on a small copy of the data set as a notebook attaches it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT
from IPython.utils.process import system
from nbclient import NotebookClient

from captioner.bdd100k.download import IMAGE_FOLDER, LABEL_FILES

NOTEBOOK = ROOT / "notebooks" / "kaggle_colab.ipynb"
SECONDS = 1500  # that a cell may take
FEW_STEPS = "--max-steps 3 --limit 60 --val-captions 2 --wandb disabled"


def execute(folder: Path, **parameters) -> nbformat.NotebookNode:
    """The notebook with these values of its first cell, executed in `folder`; its copy is executed.ipynb there."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    assert all(f"{name} =" in cell.source for name in parameters)
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    (folder / "project").symlink_to(ROOT)
    try:
        NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        nbformat.write(notebook, folder / "executed.ipynb")
    return notebook


def list_outputs(notebook, mime: str) -> list[str]:
    """What the cells printed ("text") or showed of a MIME type."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.get("data", output)[mime] for output in outputs if mime in output.get("data", output)]


def assert_shown(notebook, folder: Path) -> None:
    """Images, curves, the report and the caption of one image are in the notebook, the adapter in its folder."""
    printed = "".join(list_outputs(notebook, "text"))
    assert "adapter saved to" in printed and "BLEU-4" in printed
    assert len(list_outputs(notebook, "image/png")) == 4  # three images and the curves
    assert ["<iframe" in page for page in list_outputs(notebook, "text/html")] == [True, True]
    assert (folder / "adapter.zip").is_file()


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """What the kernel and the scripts inherit: no hub, no wandb, no folder of the user's."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")


def list_files(root: Path) -> list[tuple]:
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*"))


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    for cell in code:
        compile(cell.source, cell.id, "exec")


@pytest.mark.parametrize(("command", "why"), [("kill -9 $$", "want of memory"), ("exit 2", "message above")])
def test_a_command_that_fails_stops_the_notebook(command, why):
    """A process that the system kills says nothing itself."""
    source = next(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if "def run(" in cell.source)
    shell = SimpleNamespace(user_ns={})
    shell.system = lambda command: shell.user_ns.update(_exit_code=system(command))  # as a kernel's
    cell = {"get_ipython": lambda: shell}
    exec(source[source.index("def run(") : source.index("\n\n\nrun(")], cell)
    cell["run"]("true")
    with pytest.raises(AssertionError, match=why):
        cell["run"](command)


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
def test_the_notebook_runs_on_the_demo(tmp_path, quiet):
    notebook = execute(tmp_path, DEMO=True, TRAIN_FLAGS=FEW_STEPS, EVAL_FLAGS="--num-samples 6")
    assert_shown(notebook, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
def test_its_cells_for_real_data_run_on_an_attached_set(tmp_path, quiet, scenes, tiny_checkpoint, monkeypatch):
    """Drawn scenes in the layout of the set, in a folder that can't be written; no network, no Kaggle."""
    attached = tmp_path / "input" / "solesensei_bdd100k"
    (attached / LABEL_FILES["val"]).parent.mkdir(parents=True)
    shutil.copy(scenes / "labels.json", attached / LABEL_FILES["val"])
    shutil.copytree(scenes / "images", attached / IMAGE_FOLDER / "val")
    before = list_files(tmp_path / "input")
    for path in [attached, *attached.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setenv("KAGGLE_CACHE_MOUNT_FOLDER", str(tmp_path / "input"))
    monkeypatch.setenv("COLAB_CACHE_MOUNT_FOLDER", str(tmp_path / "input"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "working"
    folder.mkdir()
    notebook = execute(folder, MODEL=str(tiny_checkpoint), TRAIN_FLAGS=FEW_STEPS, EVAL_FLAGS="--num-samples 2")
    assert_shown(notebook, folder)
    assert list_files(tmp_path / "input") == before
    assert not [path for path in tmp_path.glob("cache/**/*") if path.is_file()]

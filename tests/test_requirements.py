"""requirements.txt names what is imported, and no more."""

import ast
import sys

import pytest
from conftest import ROOT
from lowest_requirements import REQUIREMENTS, list_lowest

MODULES = {"pillow": "PIL"}  # imported under another name than the package's
BROUGHT_ALONG = {"kagglesdk", "requests", "safetensors", "tokenizers"}  # by kagglehub and transformers
# with torch where there is a GPU; in requirements-app.txt, for the page of demo/app.py; in requirements-dev.txt
OPTIONAL = {"triton", "gradio", "selenium"}


def list_imports() -> set[str]:
    """Top-level modules from elsewhere that the program imports."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("captioner/**/*.py"), *ROOT.glob("demo/*.py")]
    own = {file.stem for file in ROOT.glob("*.py")} | {"captioner", "demo"}
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found - own - set(sys.stdlib_module_names)


def test_requirements_are_what_is_imported():
    required = {MODULES.get(name.lower(), name) for name in list_lowest(REQUIREMENTS.read_text())}
    assert required == list_imports() - BROUGHT_ALONG - OPTIONAL
    page = [line for line in (ROOT / "requirements-app.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line.partition(">")[0] for line in page] == ["-r requirements.txt", "gradio"]


def test_lowest_versions_are_read_from_the_requirements():
    text = "# why\ntorch>=2.11,<2.14\n\nPillow>=12.0  # what for\n"
    assert list_lowest(text) == {"torch": "2.11", "Pillow": "12.0"}
    with pytest.raises(SystemExit, match="torch~=2: must be"):
        list_lowest("torch~=2")


def test_notebook_images_keep_their_torch_numpy_pandas_and_pillow():
    """The lowest versions are at or under those of Kaggle's and Colab's images of August 2026."""
    lowest = {name.lower(): version for name, version in list_lowest(REQUIREMENTS.read_text()).items()}
    images = {"torch": "2.10.0", "numpy": "2.0.2", "pandas": "2.2.2", "pillow": "11.3.0"}  # the older of the two
    for name, version in images.items():
        assert [int(part) for part in lowest[name].split(".")] <= [int(part) for part in version.split(".")], name

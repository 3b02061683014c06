"""requirements.txt names what is imported, and no more."""

import ast
import sys

import pytest
from conftest import ROOT
from lowest_requirements import REQUIREMENTS, list_lowest

MODULES = {"pillow": "PIL"}  # imported under another name than the package's
BROUGHT_ALONG = {"requests", "safetensors", "tokenizers"}  # by kagglehub and transformers
OPTIONAL = {"triton"}  # comes with torch where there is a GPU


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


def test_lowest_versions_are_read_from_the_requirements():
    text = "# why\ntorch>=2.11,<2.14\n\nPillow>=12.0  # what for\n"
    assert list_lowest(text) == {"torch": "2.11", "Pillow": "12.0"}
    with pytest.raises(SystemExit, match="torch~=2: must be"):
        list_lowest("torch~=2")

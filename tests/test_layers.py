"""Rooms of the package import only what lies below them, and who only reads captions loads no torch."""

import json
import subprocess
import sys

from conftest import ROOT
from importlinter.application.use_cases import lint_imports
from importlinter.configuration import configure

HEAVY = {"torch", "transformers", "accelerate"}
LIGHT = ("captioner/bdd100k/*.py", "captioner/scoring/*.py", "config.py")


def test_imports_keep_the_contracts_in_pyproject():
    configure()
    assert lint_imports(str(ROOT / "pyproject.toml"), cache_dir=None, no_logo=True), "see what was printed, and why"


def test_labels_scores_and_settings_need_no_torch():
    files = [file.relative_to(ROOT) for pattern in LIGHT for file in sorted(ROOT.glob(pattern))]
    modules = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert {"captioner.bdd100k.parsing", "captioner.scoring.report", "config"} <= set(modules)
    code = "import importlib, json, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    command = [sys.executable, "-c", code + "print(json.dumps(list(sys.modules)))", *modules]
    loaded = set(json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout))
    assert set(modules) <= loaded
    assert not loaded & HEAVY

"""The flags that notebooks/kaggle_colab.ipynb gives to main.py and eval.py: what is measured is what it runs."""

import json
import re
import shlex
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "kaggle_colab.ipynb"
PLACES = ("--output", "--adapter")


def read_flags(script: str, notebook: Path = NOTEBOOK) -> list[str]:
    """Those of the cell that trains, or evaluates, with the notebook's own parameters, but for model and folders."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = {"".join(cell["source"]): cell["metadata"].get("tags", ()) for cell in cells if cell["cell_type"] == "code"}
    [command] = re.findall(rf'run\((f"\{{python\}} \{{PROJECT\}}/{re.escape(script)} .*")\)', "\n".join(code))
    names = dict.fromkeys(("python", "PROJECT", "flags", "OUTPUT", "finished"), "")
    exec(next(source for source, tags in code.items() if "parameters" in tags), names)
    return [word for word in shlex.split(eval(command, names))[1:] if word not in PLACES]

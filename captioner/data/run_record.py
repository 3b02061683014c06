"""What main.py wrote about its run: run.json."""

import json
from pathlib import Path

from captioner.runtime.errors import UserError


def read_run(folder: Path) -> dict:
    """What main.py wrote about its run: settings, data, versions. Its settings name the base model at least."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
            raise ValueError("no JSON object with a config")
        if not isinstance(run["config"].get("model"), str):
            raise ValueError("it names no base model")
        return run
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'run.json'}: can't be read ({error}); train again with python main.py") from None

"""What main.py wrote about its run: run.json."""

import json
from pathlib import Path

from captioner.runtime.errors import UserError


def read_run(folder: Path) -> dict:
    """What main.py wrote about its run: configuration, images, versions."""
    try:
        run = json.loads((folder / "run.json").read_text())
        if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
            raise ValueError("no JSON object with a config")
        return run
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'run.json'}: can't be read ({error}); train again with python main.py") from None

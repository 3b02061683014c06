"""The folder that Hugging Face Spaces runs: the page of demo/app.py with an adapter.

write_space(Path("blip2-finetuned"), Path("space"))
"""

import importlib.metadata
import json
import shutil
from pathlib import Path

from captioner.data.run_record import read_run
from captioner.publishing.hub import stage_files
from captioner.publishing.records import check_adapter
from captioner.runtime.errors import UserError

ROOT = Path(__file__).parent.parent
README = """---
title: Driving scenes
emoji: 🚗
colorFrom: blue
colorTo: gray
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: mit
---

Captions of driving scenes by BLIP-2 with the adapter in `adapter/`. Make a Space with the SDK Gradio, and push this
folder to its repository; files of more than 10 MB go through Git LFS.
"""
APP = """from pathlib import Path

from demo.app import AppConfig, serve

serve(AppConfig(adapter=Path(__file__).parent / "adapter", host="0.0.0.0"))
"""


def write_space(adapter: Path, folder: Path) -> None:
    """Write `folder`, which must not be there yet. A base model that is a local folder is copied too.

    Raises UserError when `folder` is there or can't be written, when `adapter` is no folder that main.py wrote, or when
    gradio, whose version a Space must name, is not installed. Whatever fails, nothing is left behind.
    """
    if folder.exists():
        raise UserError(f"--space {folder}: is there already; move it away, or name another folder")
    check_adapter(adapter)
    readme = README.format(gradio=find_gradio())
    base = Path(read_run(adapter)["config"]["model"])
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        copy(ROOT / "captioner", temporary / "captioner")
        copy(ROOT / "demo", temporary / "demo", "base", "pretrain*", "screenshots*")
        (temporary / "adapter").mkdir()
        stage_files(adapter, temporary / "adapter", "adapter")
        shutil.copy(ROOT / "config.py", temporary)
        shutil.copy(ROOT / "requirements.txt", temporary)  # gradio comes with the Space, by sdk_version
        (temporary / "app.py").write_text(APP)
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        if base.is_dir():
            copy(base, temporary / base.name)
            run = read_run(temporary / "adapter")
            run["config"]["model"] = base.name  # beside app.py, from where Spaces start it
            (temporary / "adapter" / "run.json").write_text(json.dumps(run, indent=1))
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"--space {folder}: can't be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_gradio() -> str:
    """The version of gradio that is installed here. Raises UserError where there is none."""
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "--space: a Space must name a version of gradio, and none is installed here: "
            "pip install -r requirements-app.txt"
        ) from None


def copy(source: Path, target: Path, *left_out: str) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", *left_out))

"""benchmarks/RESULTS.md: one section a benchmark, written by the benchmark itself."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
TITLE = "# Measured\n\nEach section was written by the command in it; running that again replaces it.\n"


def record(title: str, body: str, packages: list[str], device: str | None = None, path: Path = RESULTS) -> None:
    """Put `body` (Markdown) under the heading `title`, in place of what an earlier run put there.

    Beneath it stand the command, the commit, the date, the device (none: this machine's processor) and the versions.
    """
    section = f"## {title}\n\n{body.strip()}\n\n{describe_run(packages, device)}\n"
    text = path.read_text() if path.exists() else TITLE
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if old.search(text):
        text = old.sub(lambda _: section + "\n", text)
    else:
        text = f"{text.rstrip()}\n\n{section}"
    path.write_text(text.rstrip() + "\n")


def describe_run(packages: list[str], device: str | None = None) -> str:
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    module = sys.modules["__main__"].__spec__
    program = f"python -m {module.name}" if module else f"python {Path(sys.argv[0]).name}"
    command = f"`{program} {shlex.join(sys.argv[1:])}`"
    where = f"{device or name_processor()}; Python {platform.python_version()}, {versions}"
    return f"{command}, commit {read_commit()}, {date.today()}, {where}"


def read_commit() -> str:
    """The short commit, with + where files differ from it; ? outside a repository."""
    git = ["git", "-C", str(RESULTS.parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode:
        return "?"
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno", "--", ".", f":!{RESULTS.name}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return commit.stdout.strip() + "+" * bool(changed.stdout.strip())


def name_processor() -> str:
    """Cores and processor."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{os.cpu_count()} cores of {model[1] if model else platform.processor() or platform.machine()}"

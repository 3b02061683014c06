"""benchmarks/RESULTS.md holds the newest section of each benchmark, LOG.md the sections before, newest first."""

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
LOG_TITLE = "# Log of measurements\n\nNewest first.\n"


def record(title: str, body: str, packages: list[str], device: str | None = None, path: Path = RESULTS) -> None:
    """Put `body` (Markdown) under the heading `title`; what an earlier run put there moves to LOG.md beside `path`.

    Beneath it stand the command, the commit, the date, the device (none: this machine's processor) and the versions.
    """
    section = f"## {title}\n\n{body.strip()}\n\n{describe_run(packages, device)}\n"
    text = path.read_text() if path.exists() else TITLE
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if replaced := old.search(text):
        put_first(path.with_name("LOG.md"), replaced[0])
        text = old.sub(lambda _: section + "\n", text)
    else:
        text = f"{text.rstrip()}\n\n{section}"
    path.write_text(text.rstrip() + "\n")


def put_first(log: Path, section: str) -> None:
    """Put `section` before the other sections of `log`."""
    text = log.read_text() if log.exists() else LOG_TITLE
    head, heading, rest = text.partition("\n## ")
    log.write_text(f"{head.rstrip()}\n\n{section.rstrip()}\n{heading}{rest}")


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
        [*git, "status", "--porcelain", "-uno", "--", ".", f":!{RESULTS.name}", ":!LOG.md"],
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

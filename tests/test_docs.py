"""README.md and docs/: links lead somewhere, commands exist, examples run, and what is promised short is short."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call_script

from captioner.bdd100k.facts import Facts, ObjectKind
from captioner.bdd100k.wording import STYLES, describe

PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "benchmarks" / "RESULTS.md", ROOT / "benchmarks" / "LOG.md"]
SCRIPTS = {"main.py": "TrainConfig", "eval.py": "EvalConfig", "bdd100k_data_pipeline.py": "PipelineConfig"}
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def list_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@names
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in list_anchors(target), f"{link}: no such heading"


@names
def test_files_that_are_named_exist(page):
    if page.name == "LOG.md":
        pytest.skip("history names files of then")
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`((?:captioner|demo|benchmarks|tests|notebooks|docs|logs)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name


def list_commands(page: Path) -> list[list[str]]:
    """The words of each command line that runs one of our programs, in blocks and in running text."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    lines = [*blocks, *re.findall(r"`((?:python|main\.py|eval\.py|bdd100k_data_pipeline\.py)[^`]*)`", text)]
    commands = []
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if any(word.endswith(".py") for word in words) or words[1:2] == ["-m"]:
                commands.append(words)
    return commands


@names
def test_commands_name_programs_and_flags_that_exist(page):
    if page.name == "LOG.md":
        pytest.skip("history names flags of then")
    import config

    for words in list_commands(page):
        script = next((word for word in words if word.endswith(".py")), None)
        if script in SCRIPTS:
            fields = list_flags(getattr(config, SCRIPTS[script]))
            for word in words[words.index(script) + 1 :]:
                if word.startswith("--") and word != "--help":
                    assert word.removeprefix("--").removeprefix("no-").replace("-", "_") in fields, (word, words)
        elif script is not None:
            assert (ROOT / script).is_file(), words
        elif "-m" in words:
            module = words[words.index("-m") + 1]
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or module in ("pytest", "venv", "pip", "nltk.downloader"), words


def list_flags(config_class) -> set[str]:
    """Names of all settings, those of groups too."""
    import dataclasses

    found = set()
    for field in dataclasses.fields(config_class):
        group = field.type if isinstance(field.type, type) and dataclasses.is_dataclass(field.type) else None
        found |= list_flags(group) if group else {field.name}
    return found


def test_the_readme_is_short_and_has_both_test_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for name in ("quick tests", "all tests"):
        assert re.search(rf"<!-- {name} -->\n```bash\n[^\n]*python -m pytest[^\n]*\n```", text), name


def test_each_style_is_shown_as_it_is_written():
    facts = Facts(
        "evening", "clear", "highway", "red", {ObjectKind("car"): 1, ObjectKind("pedestrian", truncated=True): 1}
    )
    table = (ROOT / "docs" / "captions.md").read_text(encoding="utf-8").split("<!-- styles -->")[1]
    shown = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    for style in STYLES:
        assert shown[style].replace("\\*", "*") == describe(facts, style)


def test_the_frame_that_is_shown_becomes_the_row_that_is_shown(tmp_path):
    text = (ROOT / "docs" / "captions.md").read_text(encoding="utf-8")
    frame, row = (re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", text, re.DOTALL)[1] for name in ("frame", "row"))
    (tmp_path / "labels.json").write_text(f"[{frame}]")
    done = call_script("bdd100k_data_pipeline.py", "--labels", "labels.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bdd100k_captions.csv").read_text().splitlines() == row.splitlines()


def test_the_examples_of_contributing_run(tmp_path):
    """Each change is applied to a copy of the code; each check fails before the change and passes after it."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "captioner", copy / "captioner", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "config.py", copy)
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    steps = re.findall(r"<!-- (change|check) ?(\S*) -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert [kind for kind, *_ in steps] == ["change", "check", "change", "change", "check"]
    for check in [body for kind, _, body in steps if kind == "check"]:
        assert run_python(check, copy) != 0
    for kind, file, body in steps:
        if kind == "change":
            apply_change(copy / file, body)
        else:
            assert run_python(body, copy) == 0


def apply_change(path: Path, diff: str) -> None:
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if not line.startswith("+"))
    new = "".join(line[1:] for line in lines if not line.startswith("-"))
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} has not once: {old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def run_python(code: str, cwd: Path) -> int:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, check=False).returncode

"""Lines of code by room, without comments, docstrings and blank lines; the longest functions and classes; imports
between rooms.

    python -m benchmarks.count_lines                                            # this tree
    python -m benchmarks.count_lines FOLDER                                     # another, as `git archive` gives it
    python -m benchmarks.count_lines FOLDER speed.py captioner/fast main.py:train    # of these alone
"""

import ast
import collections
import io
import sys
import textwrap
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
NAMED = 5  # functions, and classes, that are named
TOOLS = ("tests", "benchmarks")  # folders that are not the program


class Block(NamedTuple):
    """A function or a class."""

    lines: int
    name: str
    path: Path


def find_docstrings(tree: ast.Module) -> set[int]:
    """The lines of all docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def count_code(source: str) -> int:
    """Lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - find_docstrings(ast.parse(source)))


def list_blocks(path: Path, source: str) -> list[Block]:
    """All functions and classes of a file, decorators left out."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return [Block(node.end_lineno - node.lineno + 1, f"{type(node).__name__} {node.name}", path) for node in nodes]


def name_room(path: Path) -> str:
    """The room that a file, or an imported module as a path, belongs to; "scripts" for the files of the root."""
    parts = path.parts
    if parts[0] == "captioner" and len(parts) > 2:
        return "/".join(parts[:2])
    return parts[0] if len(parts) > 1 else "scripts"


def list_imports(source: str) -> set[Path]:
    """The modules that a file imports, as paths."""
    modules: set[Path] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules |= {Path(*node.module.split("."), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {Path(*alias.name.split(".")) for alias in node.names}
    return modules


def count_part(root: Path, part: str) -> int:
    """Lines of code of a file, of all files of a folder, or of a function or class (path:name)."""
    path, _, name = part.partition(":")
    if (root / path).is_dir():
        return sum(count_part(root, str(file.relative_to(root))) for file in (root / path).rglob("*.py"))
    source = (root / path).read_text(encoding="utf-8")
    if not name:
        return count_code(source)
    [node] = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", None) == name]
    return count_code(textwrap.dedent("\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])))


def print_parts(root: Path, parts: Sequence[str]) -> None:
    counts = {part: count_part(root, part) for part in parts}
    for part, count in counts.items():
        print(f"{count:6} {part}")
    print(f"{sum(counts.values()):6} together")


def print_rooms(root: Path) -> None:
    files = sorted(path.relative_to(root) for path in root.rglob("*.py") if not is_hidden(path.relative_to(root)))
    sources = {path: (root / path).read_text(encoding="utf-8") for path in files}
    rooms: dict[str, list[int]] = collections.defaultdict(list)
    blocks, edges, own = [], collections.Counter(), {path.with_suffix("") for path in files}
    for path, source in sources.items():
        room = name_room(path)
        rooms[room].append(count_code(source))
        if path.parts[0] in TOOLS:
            continue
        blocks += list_blocks(path, source)
        known = {module for module in list_imports(source) if {module, module.parent} & own}
        edges.update({(room, name_room(module if module in own else module.parent)) for module in known})
    for room, counts in rooms.items():
        print(f"{room:24} {len(counts):4} files {sum(counts):6} lines")
    program = [counts for room, counts in rooms.items() if room.split("/")[0] not in TOOLS]
    print(f"{'the program':24} {sum(map(len, program)):4} files {sum(map(sum, program)):6} lines")
    for kind, said in (("FunctionDef", "functions"), ("ClassDef", "classes")):
        longest = sorted((block for block in blocks if block.name.startswith(kind)), reverse=True)[:NAMED]
        named = ", ".join(f"{block.lines} {block.name.split()[1]} ({block.path})" for block in longest)
        print(f"longest {said}, comments and docstrings included: {named}")
    between = sorted(f"{one} -> {other}" for one, other in edges if one != other)
    print(f"{len(between)} rooms import others: {', '.join(between)}")


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


if __name__ == "__main__":
    tree = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
    if len(sys.argv) > 2:
        print_parts(tree, sys.argv[2:])
    else:
        print_rooms(tree)

"""Change the program in small ways, and see whether the quick tests notice: a change that none notices is untested.

    python tests/mutants.py --output /tmp/mutants.jsonl                  # 100 mutants; the same command continues
    python tests/mutants.py --count 30 --seed 1 --only "label_files.py" --list        # what would be tried, and no more

A mutant is the program with one change in one place: a sign (+ for -, * for /), a bound (< for <=; 3 for 2 in a
comparison, a slice or a range), `and` for `or`, a condition negated, a constant (another number, True for False), a
call left out, or a returned value left out. Each kind is drawn equally often, with one mutant of a kind in a line at
most. Strings and annotations stay as they are.

First the tests run once under coverage, which says what each test executes. Then a mutant runs the tests that execute
its lines, the fastest first, up to --budget seconds of tests. Lines outside of functions are executed at import, for no
test: there it is the tests of test_MODULE.py and of the room, and then those that execute anything in that file.
Outcomes:

    killed        a test fails
    timed out     the tests take too long; counts as killed
    survived      the tests pass
    not covered   no test executes the line; counts as survived. A line that only a script or a process started with
                  `spawn` executes is one of these
    needs a GPU   no test executes the line, and "cuda" stands in its statement, in a condition around it or in one
                  before it that leaves the function, or in its function if no line of that is executed; does not count

The tests run in copies of the tracked files, one for each worker, in processes forked from this one, which has torch
imported already. Tests that fail without a mutant are left out, and named. With --control no change is written:
every outcome must then be "survived", "not covered" or "needs a GPU".
"""

import argparse
import ast
import contextlib
import fnmatch
import functools
import gc
import hashlib
import importlib
import itertools
import json
import multiprocessing.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import coverage
import pytest
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
LEFT_OUT = ("tests/*", "benchmarks/*", "demo/pretrain.py")
# none of the program's own modules: these must be imported with the change in them
PRELOADED = ("torch", "transformers.models.blip_2.modeling_blip_2", "peft", "bitsandbytes", "accelerate", "hypothesis")
SIGNS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
LEAVING = (ast.Return, ast.Raise, ast.Continue)
BOUNDS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")}
START_SECONDS = 20  # for pytest to start and collect; the limit of a mutant is that and 3 times what its tests took

# --------------------------------------------------------------------------------------------------------------
# mutants


class Mutant(NamedTuple):
    file: str
    line: int
    kind: str
    before: str
    after: str
    span: tuple[int, int]  # bytes of the file that `after` replaces
    lines: tuple[int, int]  # first and last, of the statement or the condition
    in_function: bool
    cuda: tuple[int, int] | None  # these lines need a GPU if no test executes any of them

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.file}:{self.line}  {self.kind}  {before[:70]} -> {after[:70]}"

    def change(self, source: bytes) -> bytes:
        return source[: self.span[0]] + self.after.encode() + source[self.span[1] :]


def find_mutants(file: str, source: str) -> Iterator[Mutant]:
    """All mutants of a file, some of which may not compile."""
    data, tree = source.encode(), ast.parse(source)
    starts = [0, *itertools.accumulate(len(line) + 1 for line in data.split(b"\n"))]
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def span_of(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def mentions(word: bytes, node: ast.AST) -> bool:
        return word in data[slice(*span_of(node))]

    for node, parent in parents.items():
        if not (changes := list(list_changes(node, parent, data, span_of))):
            continue
        above = [node]
        while above[-1] in parents:
            above.append(parents[above[-1]])
        steps = list(itertools.pairwise(above))  # (node, its parent), up to the module
        if any(isinstance(outer, ast.JoinedStr) for outer in above):
            continue  # text for people; and Python 3.11 has no positions in it
        if any(inner in (getattr(outer, "annotation", 0), getattr(outer, "returns", 0)) for inner, outer in steps):
            continue
        if any(isinstance(outer, ast.If) and mentions(b"__name__", outer.test) for outer in above):
            continue  # what only a script does
        functions = [outer for inner, outer in steps if isinstance(outer, ast.FunctionDef) and inner in outer.body]
        statement = next(outer for outer in above if isinstance(outer, ast.stmt))
        whole = node if {"body", "cases"} & set(statement._fields) else statement  # which is executed if the node is
        conditions = [outer.test for outer in above[1:] if isinstance(outer, ast.If | ast.While | ast.IfExp)]
        conditions += [item.context_expr for outer in above if isinstance(outer, ast.With) for item in outer.items]
        earlier = [part for inner, outer in steps for part in list_earlier(inner, outer)]
        conditions += [part.test for part in earlier if isinstance(part, ast.If) and isinstance(part.body[-1], LEAVING)]
        lines, cuda = (whole.lineno, whole.end_lineno), None
        if any(mentions(b"cuda", part) for part in [whole, *conditions]):
            cuda = lines
        elif functions and mentions(b"cuda", functions[-1]):
            cuda = functions[-1].body[0].lineno, functions[-1].end_lineno
        for kind, span, after in changes:
            before, line = data[slice(*span)].decode(), data.count(b"\n", 0, span[0]) + 1
            yield Mutant(file, line, kind, before, after, span, lines, bool(functions), cuda)


def list_earlier(statement: ast.AST, outer: ast.AST) -> list[ast.stmt]:
    """The statements before this one in the same block."""
    blocks = [block for block in vars(outer).values() if isinstance(block, list) and statement in block]
    return [part for block in blocks for part in block[: block.index(statement)]]


def list_changes(node: ast.AST, parent: ast.AST, data: bytes, span_of) -> Iterator[tuple[str, tuple[int, int], str]]:
    """(kind, bytes that are replaced, what by) of one node."""

    def swap(kind: str, left: ast.AST, right: ast.AST, before: str, after: str):
        """Change the operator that stands between two nodes."""
        place = data.find(before.encode(), span_of(left)[1], span_of(right)[0])
        if place >= 0:
            yield kind, (place, place + len(before)), after

    match node:
        case ast.BinOp(left, op, right) if type(op) in SIGNS and not is_text(left) and not is_text(right):
            yield from swap("sign", left, right, *SIGNS[type(op)])
        case ast.AugAssign(target, op, value) if type(op) in SIGNS and not is_text(value):
            yield from swap("sign", target, value, *SIGNS[type(op)])
        case ast.UnaryOp(ast.USub(), operand):
            yield "sign", (span_of(node)[0], span_of(operand)[0]), ""
        case ast.Compare(left, ops, others):
            for one, op, other in zip([left, *others], ops, others, strict=False):
                if type(op) in BOUNDS:
                    yield from swap("bound", one, other, *BOUNDS[type(op)])
        case ast.BoolOp(op, values):
            for one, other in itertools.pairwise(values):
                yield from swap("and/or", one, other, *(("and", "or") if isinstance(op, ast.And) else ("or", "and")))
        case ast.Constant(bool(value)):
            yield "constant", span_of(node), str(not value)
        case ast.Constant(int(value)):
            is_range = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "range"
            is_bound = is_range or isinstance(parent, ast.Compare | ast.Slice)
            yield "bound" if is_bound else "constant", span_of(node), str(value + 1)
        case ast.Constant(float(value)):
            yield "constant", span_of(node), repr(value * 2 or 1.0)
        case ast.Expr(ast.Call()):
            yield "call", span_of(node), "pass"
        case ast.Return(ast.expr()):
            yield "return", span_of(node), "return None"
    conditions = [parent.test] if isinstance(parent, ast.If | ast.While | ast.IfExp) else getattr(parent, "ifs", [])
    if node in conditions:
        yield "condition", span_of(node), f"not ({data[slice(*span_of(node))].decode()})"


def is_text(node: ast.AST) -> bool:
    """Whether an operand is text: there, any operator but + fails at once, which says nothing about the tests."""
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def list_code(code: CodeType) -> tuple:
    """What a compiled file does, whatever its line numbers."""
    constants = [list_code(item) if isinstance(item, CodeType) else (type(item), item) for item in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, constants


def makes_a_difference(mutant: Mutant, source: bytes) -> bool:
    """Whether the mutant compiles, to another program."""
    try:
        changed = compile(mutant.change(source), mutant.file, "exec")
    except SyntaxError:
        return False
    return list_code(changed) != list_code(compile(source, mutant.file, "exec"))


def draw_mutants(sources: dict[str, str], count: int, seed: int) -> list[Mutant]:
    """Of each kind equally many while they last. With a larger `count` the first ones stay the same."""
    piles: dict[str, dict[tuple, Mutant]] = defaultdict(dict)
    found = [mutant for file, source in sorted(sources.items()) for mutant in find_mutants(file, source)]
    random.Random(seed).shuffle(found)
    for mutant in found:
        piles[mutant.kind].setdefault((mutant.file, mutant.line), mutant)
    turns = itertools.zip_longest(*(piles[kind].values() for kind in sorted(piles)))
    order = filter(None, itertools.chain.from_iterable(turns))
    return list(itertools.islice((m for m in order if makes_a_difference(m, sources[m.file].encode())), count))


# --------------------------------------------------------------------------------------------------------------
# tests


def run_pytest(tree: Path, arguments: list[str], make_plugin: Callable[[], object]) -> int:
    """Fork a process, with a group of its own, that runs pytest in `tree` and prints to a log beside it."""
    if pid := os.fork():
        return pid
    code = 3
    gc.freeze()  # a finaliser of what this process has left may wait for a thread or a process that is not the child's
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with open(os.devnull) as nothing, open(tree.with_name("log"), "w") as log:
            for file, target in ((nothing, 0), (log, 1), (log, 2)):
                os.dup2(file.fileno(), target)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = True  # a mutant may leave a file's size and second as they are
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        common = ["-q", "--tb=line", "-rfE", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
        common += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is preloaded
        places = [f"--rootdir={tree}", f"--basetemp={tree.with_name('temporary')}"]
        code = int(pytest.main([*common, *places, *arguments], [make_plugin()]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Recorder:
    """A pytest plugin: which lines each test executes, and how long it takes.

    What a fixture of several tests executes is put down to the fixture, and so to each test that uses it.
    """

    def __init__(self, tree: Path, output: Path):
        self.tree, self.output = tree, output
        self.coverage = coverage.Coverage(data_file=None, config_file=False, source=[str(tree)], omit=["*/tests/*"])
        self.context, self.since = "", time.perf_counter()  # "" is the import of the test files
        self.seconds, self.fixtures, self.failed = Counter(), {}, set()
        multiprocessing.util.register_after_fork(self, Recorder.write_at_exit)
        self.coverage.start()

    def write_at_exit(self) -> None:
        """Called in a process that multiprocessing forked: write what it executed to a file beside the output."""

        def save() -> None:
            path = self.output.with_name(f"part-{os.getpid()}")
            path.write_text(json.dumps(self.list_lines(self.context)))
            path.rename(f"{path}.json")  # it may be killed before

        multiprocessing.util.Finalize(None, save, exitpriority=0)

    @contextlib.contextmanager
    def record(self, context: str) -> Iterator[None]:
        before = self.context
        self.switch(context)
        try:
            yield
        finally:
            self.switch(before)

    def switch(self, context: str) -> None:
        now = time.perf_counter()
        self.seconds[self.context] += now - self.since
        self.context, self.since = context, now
        self.coverage.switch_context(context)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        used = [fixtures[-1] for fixtures in item._fixtureinfo.name2fixturedefs.values()]
        test = without_parameters(item.nodeid)
        self.fixtures[test] = [name_fixture(fixture) for fixture in used if fixture.scope != "function"]
        with self.record(test):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        with self.record(name_fixture(fixturedef) if fixturedef.scope != "function" else self.context):
            return (yield)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(without_parameters(report.nodeid))

    def list_lines(self, only: str | None = None) -> list[tuple[str, int, list[str]]]:
        """(file, line, tests and fixtures that execute it)."""
        data, found = self.coverage.get_data(), []
        for file in data.measured_files():
            name = os.path.relpath(file, self.tree)
            found += [(name, *item) for item in data.contexts_by_lineno(file).items() if only in (None, *item[1])]
        return found if only is None else [(name, line, [only]) for name, line, _ in found]

    def pytest_sessionfinish(self):
        self.coverage.stop()
        parts = [json.loads(path.read_text()) for path in self.output.parent.glob("part-*.json")]
        lines = list(itertools.chain(self.list_lines(), *parts))
        tests = {test: self.fixtures[test] for test in self.fixtures if test not in self.failed}
        record = {"tests": tests, "failed": sorted(self.failed), "seconds": self.seconds, "lines": lines}
        self.output.write_text(json.dumps(record))


def name_fixture(fixture) -> str:
    return f"fixture {fixture.baseid}::{fixture.argname}"


class Chooser:
    """A pytest plugin: runs the chosen tests alone, in their order, but all of a file before those of the next."""

    def __init__(self, chosen: list[str]):
        files = [file_of(test) for test in chosen]
        self.order = sorted(chosen, key=lambda test: files.index(file_of(test)))

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if without_parameters(item.nodeid) in self.order]
        items.sort(key=lambda item: self.order.index(without_parameters(item.nodeid)))


def without_parameters(test: str) -> str:
    """A test with all its parameters counts as one: a mutant may change what they are."""
    return test.partition("[")[0]


def file_of(test: str) -> str:
    return test.partition("::")[0]


class TestMap:
    """What Recorder wrote, to be asked for the tests of a mutant."""

    def __init__(self, record: dict):
        self.fixtures, self.seconds = record["tests"], Counter(record["seconds"])
        self.executed: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for file, line, contexts in record["lines"]:
            self.executed[file][line].update(contexts)

    def list_contexts(self, file: str, lines: tuple[int, int]) -> set[str]:
        return set().union(*(self.executed[file].get(line, ()) for line in range(lines[0], lines[1] + 1)))

    def choose_tests(self, mutant: Mutant, budget: float) -> tuple[list[str], float]:
        """The tests to run, in order, and their seconds."""
        contexts, own = self.list_contexts(mutant.file, mutant.lines), ()
        if not mutant.in_function or contexts == {""}:  # executed at import
            contexts = set().union(*self.executed[mutant.file].values())
            names = f"/test_{Path(mutant.file).stem}.py::", f"tests/{Path(mutant.file).parent.name}/"
            own = {test for test in self.fixtures if any(name in test for name in names)}
        able = [test for test, fixtures in self.fixtures.items() if test in own or contexts & {test, *fixtures}]
        chosen, made = [], set()  # fixtures are made once
        for test in sorted(able, key=lambda test: (test not in own, self.add_up({test, *self.fixtures[test]}))):
            needed = made | {test, *self.fixtures[test]}
            if not chosen or self.add_up(needed) <= budget:
                chosen.append(test)
                made = needed
        return chosen, self.add_up(made)

    def add_up(self, contexts: set[str]) -> float:
        return sum(self.seconds[context] for context in contexts)

    def name_uncovered(self, mutant: Mutant) -> str:
        """The outcome of a mutant whose lines no test executes."""
        needs_gpu = mutant.cuda and not self.list_contexts(mutant.file, mutant.cuda)
        return "needs a GPU" if needs_gpu else "not covered"


# --------------------------------------------------------------------------------------------------------------
# the run


def copy_tree(root: Path, files: list[str], place: Path) -> Path:
    tree = place / "tree"
    for file in files:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / file, tree / file)
    if (shared := root.parent / "shared").is_dir():  # real samples, which some tests read
        (place / "shared").symlink_to(shared)
    return tree


def measure(tree: Path, arguments: list[str]) -> dict:
    """Run the tests once, without a mutant."""
    output = tree.with_name("coverage.json")
    pid = run_pytest(tree, arguments, lambda: Recorder(tree, output))
    try:
        with tqdm(bar_format="tests under coverage: {elapsed}", mininterval=1) as bar:
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.1)
                bar.update()
    except BaseException:
        stop(pid, 0)
        raise
    if not output.is_file():
        sys.exit(f"the tests could not be run:\n{tree.with_name('log').read_text()[-3000:]}")
    return json.loads(output.read_text())


def check_mutants(mutants: list[Mutant], test_map: TestMap, trees: list[Path], args) -> Iterator[dict]:
    """The outcome of each mutant, as it comes."""
    free, running, waiting = list(trees), {}, mutants[::-1]
    try:
        while waiting or running:
            while free and waiting:
                mutant = waiting.pop()
                tests, seconds = test_map.choose_tests(mutant, args.budget)
                if not tests:
                    yield mutant._asdict() | {"outcome": test_map.name_uncovered(mutant)}
                    continue
                tree = free.pop()
                source = (tree / mutant.file).read_bytes()
                if not args.control:
                    (tree / mutant.file).write_bytes(mutant.change(source))
                arguments = ["-x", *args.marks, *dict.fromkeys(map(file_of, tests))]
                pid = run_pytest(tree, arguments, functools.partial(Chooser, tests))
                limit = min(args.time_limit, START_SECONDS + 3 * seconds)
                running[pid] = mutant, tree, source, time.monotonic(), limit
            for pid, (mutant, tree, source, began, limit) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                seconds = time.monotonic() - began
                if not ended and seconds < limit:
                    continue
                del running[pid]
                stop(pid, ended)
                (tree / mutant.file).write_bytes(source)
                free.append(tree)
                outcome = "timed out" if not ended else "killed" if status else "survived"
                failed = re.findall(r"^(?:FAILED|ERROR) .*", tree.with_name("log").read_text(errors="replace"), re.M)
                yield mutant._asdict() | {"outcome": outcome, "seconds": round(seconds, 1), "failed": failed}
            time.sleep(0.02)
    finally:
        for pid in running:
            stop(pid, 0)


def stop(pid: int, ended: int) -> None:
    """Kill a process and those that it started, of which some may live on when it has `ended`."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)


def describe(records: list[dict]) -> str:
    """The mutants that no test noticed, and the score."""
    lines = []
    for outcome in ("needs a GPU", "not covered", "survived"):
        found = [Mutant(*map(row.get, Mutant._fields)) for row in records if row["outcome"] == outcome]
        lines += [f"\n{outcome}:", *map(str, sorted(found))] if found else []
    counts = Counter(row["outcome"] for row in records)
    lines.append(f"\nkilled {counts['killed'] + counts['timed out']} of {len(records) - counts['needs a GPU']}")
    return "\n".join(lines)


def list_files(globs: list[str]) -> tuple[list[str], list[str]]:
    """The tracked files, and those of them that are changed."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [file for file in listed if (ROOT / file).is_file()]
    fits = lambda file, patterns: any(fnmatch.fnmatch(file, pattern) for pattern in patterns)  # noqa: E731
    return files, [file for file in files if file.endswith(".py") and fits(file, globs) and not fits(file, LEFT_OUT)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="files that are changed")
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="test files to run; else all")
    parser.add_argument("--slow", action="store_true", help="run the slow tests too")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests for a mutant")
    parser.add_argument("--time-limit", type=float, default=300, help="seconds for a mutant, at most")
    parser.add_argument("--output", type=Path, help="JSON lines of the outcomes; what is in it is not tried again")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--control", action="store_true", help="write no change: every test must pass")
    args = parser.parse_args()
    args.marks = ["-m", "slow or not slow" if args.slow else "not slow"]
    args.pytest = [*args.marks, *args.tests]
    return args


def main() -> None:
    args = parse_args()
    files, changed = list_files(args.only)
    mutants = draw_mutants({file: (ROOT / file).read_text(encoding="utf-8") for file in changed}, args.count, args.seed)
    if args.list:
        print(*mutants, sep="\n")
        return
    preload()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what was started and written is removed
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        trees = [copy_tree(ROOT, files, Path(folder, str(worker))) for worker in range(args.workers)]
        print(describe(run(mutants, trees, args)))


def run(mutants: list[Mutant], trees: list[Path], args: argparse.Namespace) -> list[dict]:
    """The outcomes that are not in --output yet are found out, with what the tests execute, which is kept beside it."""
    test_map = TestMap(measure_once(trees[0], args))
    lines = args.output.read_text().splitlines() if args.output and args.output.is_file() else []
    known = {(row["file"], *row["span"], row["after"]): row for row in map(json.loads, lines)}
    rows = {mutant: known.get((mutant.file, *mutant.span, mutant.after)) for mutant in mutants}
    records = [row for row in rows.values() if row]
    with (
        open(args.output or os.devnull, "a") as output,
        tqdm(total=len(mutants), initial=len(records), desc="mutants") as bar,
    ):
        for row in check_mutants([mutant for mutant in mutants if not rows[mutant]], test_map, trees, args):
            records.append(row)
            print(json.dumps(row), file=output, flush=True)
            bar.set_postfix(Counter(row["outcome"] for row in records), refresh=False)
            bar.update()
    return records


def measure_once(tree: Path, args: argparse.Namespace) -> dict:
    """What Recorder writes, from the run before if the program, the tests and the options are the same."""
    state = hashlib.sha256(repr((args.pytest, args.control)).encode())
    for file in sorted(tree.rglob("*.py")):
        state.update(file.read_bytes())
    kept = Path(f"{args.output}.coverage")
    if args.output and kept.is_file():
        record = json.loads(kept.read_text())
        if record["state"] != state.hexdigest():
            sys.exit(f"{args.output}: of another program or other options; delete it and {kept}, or name another")
    else:
        record = measure(tree, args.pytest) | {"state": state.hexdigest()}
        if args.output:
            kept.write_text(json.dumps(record))
    if record["failed"]:
        print("left out, since they fail without a mutant:", *record["failed"], sep="\n  ")
    print(f"{len(record['tests'])} tests take {sum(record['seconds'].values()):.0f} s under coverage")
    return record


def preload() -> None:
    """Import what takes long, in the environment that the tests have, and without a thread, so that forks are safe."""
    import conftest  # noqa: F401

    del sys.modules["conftest"]  # each tree has its own
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    tqdm.monitor_interval = 0
    for name in PRELOADED:
        importlib.import_module(name)
    hypothesis = sys.modules["hypothesis"]  # the same examples each time, however long they take, and not the simplest
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    settings = {"derandomize": True, "deadline": None, "database": None, "phases": phases}
    hypothesis.settings.register_profile("mutants", **settings)
    hypothesis.settings.load_profile("mutants")


if __name__ == "__main__":
    main()

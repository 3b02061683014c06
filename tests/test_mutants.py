"""The mutation check: its mutants are what they should be, and it tells what the tests notice from what they don't."""

import argparse
import gc
import os
import time

import mutants
import pytest

SAMPLE = '''"""Text of 3 lines and 4 words."""
SIZE: tuple[int, 2] = (5, 0.5)


def work(items: list, strict=False) -> "1":
    total = -1
    for item in items[:2]:
        total += item * 3
    if total < 4 and (strict or items):
        print(f"{total + 1} items")
    return "sum: " + str(total)


def record(x):
    if x.is_cuda:
        x.send(1)
    return x > 0


def measure(x):
    if not x.is_cuda:
        return 0
    return x


if __name__ == "__main__":
    work([1])
'''
EXPECTED = {
    (2, "constant", "5", "6"),
    (2, "constant", "0.5", "1.0"),
    (5, "constant", "False", "True"),
    (6, "sign", "-", ""),
    (6, "constant", "1", "2"),
    (7, "bound", "2", "3"),
    (8, "sign", "+", "-"),
    (8, "sign", "*", "/"),
    (8, "constant", "3", "4"),
    (9, "condition", "total < 4 and (strict or items)", "not (total < 4 and (strict or items))"),
    (9, "and/or", "and", "or"),
    (9, "and/or", "or", "and"),
    (9, "bound", "<", "<="),
    (9, "bound", "4", "5"),
    (10, "call", 'print(f"{total + 1} items")', "pass"),
    (11, "return", 'return "sum: " + str(total)', "return None"),
    (15, "condition", "x.is_cuda", "not (x.is_cuda)"),
    (16, "call", "x.send(1)", "pass"),
    (16, "constant", "1", "2"),
    (17, "return", "return x > 0", "return None"),
    (17, "bound", ">", ">="),
    (17, "bound", "0", "1"),
    (21, "condition", "not x.is_cuda", "not (not x.is_cuda)"),
    (22, "constant", "0", "1"),
    (22, "return", "return 0", "return None"),
    (23, "return", "return x", "return None"),
}

TINY = """LIMIT = 10


def larger(a, b):
    return a if a > b else b


def area(width, height):
    return min(width * height, LIMIT)


def count_down(n):
    while n > 0:
        n -= 1


def unused():
    return 1


def move(x):
    if x.is_cuda:
        return x.cpu()
"""
TINY_TESTS = """import multiprocessing

import pytest
import tiny


@pytest.fixture(scope="module")
def square():
    return tiny.area(2, 2)


def test_nothing(square):
    pass


def test_area(square):
    assert square == 4


def test_limit():
    assert tiny.area(10, 10) == 10


def test_larger():
    assert tiny.larger(1, 2) == tiny.larger(2, 1) == 2


def test_count_down_in_a_process():
    process = multiprocessing.get_context("fork").Process(target=tiny.count_down, args=(3,))
    process.start()
    process.join()


def test_that_fails():
    assert tiny.larger(1, 2) == 1
"""


def test_a_sample_has_these_mutants():
    found = list(mutants.find_mutants("sample.py", SAMPLE))
    assert {(mutant.line, mutant.kind, mutant.before, mutant.after) for mutant in found} == EXPECTED
    assert len(found) == len(EXPECTED)
    for mutant in found:
        assert mutants.makes_a_difference(mutant, SAMPLE.encode()), mutant
        lines = zip(SAMPLE.splitlines(), mutant.change(SAMPLE.encode()).decode().splitlines(), strict=True)
        assert [number for number, (old, new) in enumerate(lines, start=1) if old != new] == [mutant.line]
    assert {mutant.line for mutant in found if not mutant.in_function} == {2, 5}
    gpu = {mutant.line: mutant.cuda for mutant in found if mutant.cuda}
    assert gpu == {15: (15, 15), 16: (16, 16), 17: (15, 17), 21: (21, 21), 22: (22, 22), 23: (23, 23)}


def test_characters_of_several_bytes_shift_nothing():
    source = 'x = "äöü€", 1  # ß\n'
    (mutant,) = mutants.find_mutants("sample.py", source)
    assert mutant.change(source.encode()).decode() == 'x = "äöü€", 2  # ß\n'


def test_what_does_not_compile_or_changes_nothing_is_no_mutant():
    source = "def f():\n    return (1\n            # + not here\n            + 2)\n"
    signs = [mutant for mutant in mutants.find_mutants("sample.py", source) if mutant.kind == "sign"]
    assert [mutants.makes_a_difference(mutant, source.encode()) for mutant in signs] == [False]
    broken = signs[0]._replace(after=")")
    assert not mutants.makes_a_difference(broken._replace(span=(0, 3)), source.encode())


def test_draw_is_seeded_and_grows_at_its_end():
    sources = {"a.py": SAMPLE, "b.py": TINY}
    drawn = mutants.draw_mutants(sources, 12, seed=1)
    assert drawn == mutants.draw_mutants(dict(reversed(sources.items())), 20, seed=1)[:12]
    assert drawn != mutants.draw_mutants(sources, 12, seed=2)
    assert len({mutant.kind for mutant in drawn[:7]}) == 7


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take a second in each process
    return argparse.Namespace(
        pytest=["-m", "not slow"],
        marks=["-m", "not slow"],
        budget=60,
        time_limit=60,
        control=False,
        output=tmp_path / "out.jsonl",
    )


@pytest.fixture
def tree(tmp_path):
    source = tmp_path / "source"
    (source / "tests").mkdir(parents=True)
    (source / "tiny.py").write_text(TINY)
    (source / "tests" / "test_tiny.py").write_text(TINY_TESTS)
    return mutants.copy_tree(source, ["tiny.py", "tests/test_tiny.py"], tmp_path / "0")


def test_survivors_are_told_from_what_the_tests_notice(tree, args, capsys):
    found = {(mutant.line, mutant.kind, mutant.after): mutant for mutant in mutants.find_mutants("tiny.py", TINY)}
    expected = {
        (1, "constant", "11"): "killed",  # outside of functions
        (5, "bound", ">="): "survived",  # the same program
        (5, "condition", "not (a > b)"): "killed",
        (9, "sign", "/"): "killed",  # executed by a fixture, which another test shares
        (14, "sign", "+"): "timed out",  # executed in a forked process alone
        (18, "constant", "2"): "not covered",
        (23, "return", "return None"): "needs a GPU",
    }
    quick = [mutant for key, mutant in found.items() if key in expected and expected[key] != "timed out"]
    mutants.run(quick, [tree], args)
    assert "tests/test_tiny.py::test_that_fails" in capsys.readouterr().out
    assert len(args.output.read_text().splitlines()) == 6

    args.time_limit = 1
    records = mutants.run([found[key] for key in expected], [tree], args)
    outcomes = {(row["line"], row["kind"], row["after"]): row["outcome"] for row in records}
    assert outcomes == expected
    assert len(args.output.read_text().splitlines()) == 7  # the others were not tried again
    assert (tree / "tiny.py").read_text() == TINY
    text = mutants.describe(records)
    assert "tiny.py:5  bound  > -> >=" in text
    assert text.endswith("killed 4 of 6")

    (tree / "tiny.py").write_text(TINY + "\n")
    with pytest.raises(SystemExit, match=r"out\.jsonl: of another program"):
        mutants.run(quick, [tree], args)


class Leftover:
    """Garbage that waits for ever when another process collects it."""

    def __init__(self):
        self.me, self.pid = self, os.getpid()

    def __del__(self):
        while os.getpid() != self.pid:
            time.sleep(1)


def test_no_process_collects_what_another_left(tree, args):
    gc.collect()
    gc.disable()
    try:
        Leftover()
        assert mutants.measure_once(tree, args)["failed"]
    finally:
        gc.enable()
        gc.collect()


def test_control_changes_nothing(tree, args):
    args.control = True
    (mutant,) = (mutant for mutant in mutants.find_mutants("tiny.py", TINY) if mutant.after == "not (a > b)")
    assert [row["outcome"] for row in mutants.run([mutant], [tree], args)] == ["survived"]

"""benchmarks/RESULTS.md is written by the benchmarks: one section each, replaced when it is run again."""

from benchmarks.results import record


def test_a_section_replaces_its_older_self_and_leaves_the_others(tmp_path):
    path = tmp_path / "RESULTS.md"
    for title, body in (("One", "old"), ("Two", "second"), ("One", "new \\1")):
        record(title, body, packages=["msgspec"], path=path)
    text = path.read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## One", "## Two"]
    assert "old" not in text and "new \\1" in text and "second" in text
    assert "msgspec" in text and "commit" in text

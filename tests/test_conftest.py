"""What the tests share does what it says."""

import os
import sys

import pytest
from conftest import capture, skip_without


def test_a_test_is_skipped_but_fails_where_it_must_run(monkeypatch):
    monkeypatch.delenv("TESTS_MUST_RUN", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no chromium"):
        skip_without("browser", "no chromium")
    monkeypatch.setenv("TESTS_MUST_RUN", "triton browser")
    with pytest.raises(pytest.fail.Exception, match=r"no chromium.*browser must run"):
        skip_without("browser", "no chromium")
    with pytest.raises(pytest.skip.Exception):
        skip_without("root", "another user")


def test_what_a_call_prints_is_captured_and_its_surroundings_are_put_back(tmp_path):
    before = os.getcwd(), dict(os.environ)

    def call() -> None:
        os.environ["LEFT_BY_THE_CALL"] = "1"
        print(os.getcwd(), os.environ["GIVEN"])
        print("told", file=sys.stderr)
        sys.exit(3)

    done = capture(call, cwd=tmp_path, GIVEN=7)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path} 7\n", "told\n")
    assert (os.getcwd(), dict(os.environ)) == before


def test_an_exception_of_a_call_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        capture(lambda: 1 / 0)

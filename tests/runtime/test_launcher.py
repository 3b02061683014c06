"""The variables that a launcher sets for each process: all of them, or none that counts."""

import os
import sys
from unittest import mock

import pytest

from captioner.runtime import processes
from captioner.runtime.errors import UserError
from captioner.runtime.processes import PLACE, check_launcher, find_place, pick_start, share_folder
from config import PipelineConfig, parse_args

NAMES = (*PLACE, "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def launched(monkeypatch):
    """launched(NAME=value, ...): these of the variables are set."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in NAMES})
    return lambda **variables: os.environ.update(variables)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "-1"},
        {"WORLD_SIZE": ""},
        {"RANK": "3"},
        {"RANK": "", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": ""},
        {"LOCAL_WORLD_SIZE": "8"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    ],
)
def test_a_process_without_others_works_alone(launched, capsys, variables):
    launched(**variables)
    parse_args(PipelineConfig, [])
    assert not os.environ.keys() & set(PLACE)
    assert find_place() == (0, 1) and processes.count_processes() == 1
    print("is heard")
    assert capsys.readouterr().out == "is heard\n"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "x"}, "but not MASTER_PORT"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2: of mpirun or srun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a number"),
        ({"RANK": "node3"}, "RANK=node3: must be a number"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK=2 WORLD_SIZE=2: a rank is less than their number",
        ),
    ],
)
def test_processes_that_cannot_find_each_other_are_told_what_is_missing(launched, capsys, variables, said):
    launched(**variables)
    with pytest.raises(SystemExit, match="2"):
        parse_args(PipelineConfig, [])
    error = capsys.readouterr().err
    assert said in error and "use accelerate launch" in error and error.count("\n") == 1


def test_what_a_launcher_sets_stays(launched):
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    launched(**variables)
    check_launcher()
    assert variables.items() <= os.environ.items()


@pytest.mark.parametrize(("in_use", "expected"), [(False, "fork"), (True, "spawn")])
def test_no_process_is_forked_once_a_gpu_is_in_use(monkeypatch, in_use, expected):
    monkeypatch.setitem(sys.modules, "torch", mock.Mock(**{"cuda.is_initialized.return_value": in_use}))
    assert pick_start() == expected


def test_a_process_alone_shares_its_own_folder(tmp_path):
    with share_folder(tmp_path) as here:
        assert here == tmp_path


def test_an_unknown_number_is_an_error_and_no_traceback(launched):
    launched(WORLD_SIZE="1.5")
    with pytest.raises(UserError, match=r"WORLD_SIZE=1\.5"):
        check_launcher()

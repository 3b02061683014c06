"""What the machine does to a run: full disks, folders that can't be written, two runs at once; files read back."""

import errno
import fcntl
import io
import json
import mmap
import multiprocessing
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call_script, capture, start_script
from filelock import FileLock, SoftFileLock
from safetensors import SafetensorError
from training_runs import wait_for_lock

from captioner.bdd100k.label_files import read_labels
from captioner.bdd100k.label_report import LabelReport
from captioner.data import label_captions
from captioner.data.examples import Example
from captioner.data.splits import leave_out_unreadable
from captioner.runtime import cli, files, processes
from captioner.runtime.cli import report_error
from captioner.runtime.errors import UserError
from captioner.runtime.files import atomic_write, hash_file, lock_folder, measure_free, name_run
from captioner.scoring.console import print_captions, print_left_out
from captioner.scoring.predictions import Prediction
from captioner.training.checkpoints import find_damage
from captioner.training.run import prepare_output
from captioner.training.run_state import read_state
from config import PipelineConfig

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from captioner.runtime.files import lock_folder
with lock_folder(Path({folder!r}), "--output"):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(30)
"""


def test_second_run_is_refused_until_the_first_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD.format(root=str(ROOT), folder=str(tmp_path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        worker = int(first.stdout.readline())
        try:
            with (
                pytest.raises(UserError, match=r"--output .*another run is writing there"),
                lock_folder(tmp_path, "--output"),
            ):
                pass
            first.kill()
            first.wait()
            os.kill(worker, 0)  # a worker of the killed run lives on, and does not hold the folder
            wait_for_lock(tmp_path)
        finally:
            first.kill()
            os.kill(worker, signal.SIGKILL)


def test_a_folder_of_a_run_that_is_just_ending_is_not_refused(tmp_path, monkeypatch):
    """That run removes the file between our opening and our locking it."""
    flock = fcntl.flock

    def flock_once_removed(number, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".lock").unlink()
        flock(number, operation)

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", flock_once_removed)
    with lock_folder(tmp_path, "--output"):
        assert fcntl.flock is flock and (tmp_path / ".lock").exists()


@pytest.mark.parametrize(("script", "flag"), [("main.py", "--output"), ("bdd100k_data_pipeline.py", "--run-name")])
def test_scripts_lock_their_folder(tmp_path, drawn, script, flag):
    held = tmp_path / "logs" / "run"
    flags = ["--labels", drawn / "labels.json", "--run-name", "run"]
    flags += ["--images", drawn / "images", "--output", held] if script == "main.py" else []
    with lock_folder(held, "--output"):
        done = call_script(script, *flags, cwd=tmp_path)
    assert done.returncode == 2 and "another run is writing there" in done.stderr and flag in done.stderr, done.stderr


def test_other_processes_of_a_run_do_not_lock(tmp_path, monkeypatch):
    with lock_folder(tmp_path, "--output"):
        monkeypatch.setenv("RANK", "1")
        with lock_folder(tmp_path, "--output"):
            pass


@pytest.fixture
def small_disk(tmp_path, mount):
    return mount(tmp_path / "disk", "64k")


def test_full_disk_keeps_the_file_before(small_disk):
    path = small_disk / "captions.csv"
    path.write_text("before")
    with (
        pytest.raises(UserError, match=r"captions.csv: can't be written .No space left.*see to the folder"),
        atomic_write(path) as file,
    ):
        file.write("x" * 2**20)
    assert [file.name for file in small_disk.iterdir()] == ["captions.csv"] and path.read_text() == "before"


def test_a_read_only_disk_is_named(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"Read-only file system"), atomic_write(small_disk / "a.csv"):
        pass
    with pytest.raises(UserError, match=r"--output .*Read-only file system"), lock_folder(small_disk / "a", "--output"):
        pass


def try_as_nobody(folder: Path, answers) -> None:
    os.setuid(65534)
    try:
        with lock_folder(folder, "--output"):
            answers.put("locked")
    except UserError as error:
        answers.put(str(error))


def test_a_folder_without_permission_is_named(tmp_path, root):
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    tmp_path.chmod(0o755)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=try_as_nobody, args=(tmp_path, answers))
    child.start()
    assert "Permission denied" in answers.get(timeout=30)
    child.join()


@pytest.mark.parametrize("content", ["2.5", "[]", '{"config": "x"}', "[" * 100_000])
def test_a_damaged_state_is_named(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state.json: not readable"):
        read_state(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"config": 3}', "[" * 100_000])
def test_a_damaged_run_record_is_named(tmp_path, content):
    from captioner.data.run_record import read_run

    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run.json: can't be read"):
        read_run(tmp_path)


def test_scores_whose_config_is_no_object(tmp_path):
    from captioner.publishing.records import read_scores

    (tmp_path / "scores.json").write_text('{"config": []}')
    with pytest.raises(UserError, match=r"scores.json: its config"):
        read_scores(tmp_path)


@pytest.mark.parametrize(
    "state",
    [[], {"best_model_checkpoint": None}, {"best_model_checkpoint": "", "global_step": 2, "max_steps": 4}],
)
def test_checkpoint_with_a_sealed_state_of_another_form(tmp_path, state):
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps(state))
    (tmp_path / "manifest.json").write_text(json.dumps({file.name: hash_file(file)}))
    assert "not readable" in find_damage(tmp_path)


def test_archive_with_a_damaged_name(tmp_path):
    path = tmp_path / "labels.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("\u00e4.json", "[]")
    path.write_bytes(path.read_bytes().replace("\u00e4".encode(), b"\xa9\xa9"))
    with pytest.raises(UserError, match=r"labels.zip: not readable as a zip archive"):
        list(read_labels([path], LabelReport()))


# --------------------------------------------------------------------------------------------------------------
# what a machine may lack


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, 524])
def test_a_folder_that_cannot_be_locked_is_used_and_that_is_said_once(tmp_path, monkeypatch, capsys, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    files._tell_unlocked.cache_clear()
    for _ in range(2):
        with lock_folder(tmp_path / "run", "--output"):
            (tmp_path / "run" / "a.txt").touch()
    assert capsys.readouterr().out == (
        f"note: {tmp_path / 'run'} can't be locked ({os.strerror(number)}): see that no other run writes there\n"
    )
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["a.txt"]


def test_a_folder_is_held_where_there_is_no_flock_at_all(tmp_path, monkeypatch):
    """FileLock is SoftFileLock then."""
    monkeypatch.setattr(files, "FileLock", SoftFileLock)
    with (
        lock_folder(tmp_path, "--output"),
        pytest.raises(UserError, match="another run is writing there"),
        lock_folder(tmp_path, "--output"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_is_removed_where_no_open_file_can_be(tmp_path, monkeypatch):
    """As on Windows, where the lock itself removes its file once that is closed."""
    remove = Path.unlink

    class WindowsLock(FileLock):
        def _release(self):
            super()._release()
            os.unlink(self.lock_file)

    def unlink(path):
        if any(os.path.realpath(f"/proc/self/fd/{number}") == str(path) for number in os.listdir("/proc/self/fd")):
            raise PermissionError(13, "is open")
        remove(path)

    monkeypatch.setattr(files, "FileLock", WindowsLock)
    monkeypatch.setattr(Path, "unlink", unlink)
    with lock_folder(tmp_path / "run", "--output"):
        (tmp_path / "run" / "a.txt").touch()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["a.txt"]


class NotebookStream(io.TextIOBase):
    """As of ipykernel: without reconfigure() and fileno()."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


def test_a_script_runs_in_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "stdout", NotebookStream())
    monkeypatch.setattr(sys, "stderr", NotebookStream())
    cli.run_script(print, "done")
    assert sys.stdout.text == "done\n"

    def fail(_):
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError):
        cli.run_script(fail, None)


def test_a_script_runs_without_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    cli.run_script(lambda _: None, None)


def test_a_broken_pipe_is_told_where_there_is_no_poll(monkeypatch):
    def fail(_):
        raise BrokenPipeError("of a worker")

    monkeypatch.delattr(cli.select, "poll")
    with pytest.raises(BrokenPipeError):
        cli.run_script(fail, None)


def refuse(*args):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("lacking", [True, False])
def test_processes_read_where_cores_and_niceness_cannot_be_had(monkeypatch, lacking):
    for name in ("nice", "sched_getaffinity"):
        monkeypatch.delattr(os, name) if lacking else monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    processes.step_back()
    assert processes.count_cores() == os.cpu_count()


def test_free_space_that_cannot_be_found_out_is_none(tmp_path, monkeypatch):
    assert measure_free(tmp_path) == shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(shutil, "disk_usage", refuse)
    assert measure_free(tmp_path) is None


@pytest.mark.parametrize("script", ["main.py", "eval.py", "bdd100k_data_pipeline.py"])
def test_scripts_find_their_modules_with_a_safe_path(tmp_path, script):
    with start_script(script, "--help", cwd=tmp_path, PYTHONSAFEPATH=1) as helped:
        out, err = helped.communicate()
    assert helped.returncode == 0 and "--run-name" in out, err


def test_the_demo_is_drawn_with_a_safe_path(folder, monkeypatch):
    """By a process that finds the renderer in the folder where it is started."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setattr(label_captions, "DEMO_SCENES", 2)
    assert label_captions.find_labels(PipelineConfig(demo=True))[0].is_file()


def test_a_user_without_a_home_has_the_folder_where_the_run_is(folder, monkeypatch, capsys):
    def fail(*args):
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", fail)
    cli.find_home()
    assert Path.home() == folder
    assert capsys.readouterr().out == f"note: HOME is not set, and this user has no home: caches are kept in {folder}\n"
    cli.find_home()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("starts", "found"), [("", "True"), ("start_imports(); ", "False")])
def test_a_torchvision_of_another_torch_is_not_looked_at(tmp_path, starts, found):
    """By a script: who imports a part of the package may need it."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('no operator torchvision::nms')")
    look = "import importlib.util, sys; sys.path[:0] = sys.argv[1:]; from captioner.runtime.cli import start_imports\n"
    look += f"{starts}print(importlib.util.find_spec('torchvision') is not None)"
    command = [sys.executable, "-c", look, str(tmp_path), str(ROOT)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{found}\n"


# --------------------------------------------------------------------------------------------------------------
# the folder of a run


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = name_run(None, "-eval")
    assert run_dir.is_dir()
    with lock_folder(run_dir, "--run-name"):
        pass
    assert not list(tmp_path.iterdir())


def test_another_process_of_a_run_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert not name_run(None).exists()


def test_a_logs_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").touch()
    with pytest.raises(UserError, match=r"logs/.*: can't be written .* start from a folder of your own"):
        name_run(None)


# --------------------------------------------------------------------------------------------------------------
# names from anywhere


def test_no_control_character_of_a_name_reaches_the_terminal(capsys):
    name = "a\x1b]0;title\x07\x9b2J\u202egpj.jpg"
    report_error(UserError(f"{name}:\n\tnot readable"))
    print_left_out({name: f"{name}: not readable"})
    print_captions([Prediction(name, name, [name])], 1)
    out, err = capsys.readouterr()
    assert not set("\x1b\x07\x9b\u202e") & set(out + err)
    assert err.startswith("error: a\\x1b]0;title\\x07\\x9b2J\\u202egpj.jpg:\n\tnot") and "reference:  a\\x1b" in out


def test_a_link_to_nowhere_in_the_place_of_logs_is_an_error(folder):
    Path("logs").symlink_to(folder / "nowhere")
    with pytest.raises(UserError, match=r"logs/.*can't be written"):
        name_run(None)


def test_no_control_character_of_the_labels_or_images_reaches_the_terminal(capsys):
    name = "a\x1b]0;title\x07.jpg"
    report = LabelReport()
    report.skip("its name is not a plain file name", name)
    print(report)
    example = Example("a.jpg", Path(name), "x")
    leave_out_unreadable(
        {"train": [example] + [example._replace(image=Path("b.jpg"))] * 30}, {Path(name): f"{name}: cut"}
    )
    out = capsys.readouterr().out
    assert not set("\x1b\x07") & set(out) and out.count("a\\x1b]0;title\\x07.jpg") == 2


def serialize(config) -> None:
    raise SafetensorError("Error while serializing: I/O error: Cannot allocate memory (os error 12)")


@pytest.mark.parametrize(
    "take",
    [
        lambda config: bytearray(2**50),
        lambda config: mmap.mmap(-1, 2**50),
        lambda config: torch.empty(2**50, dtype=torch.uint8),
        serialize,
    ],
    ids=["Python", "system", "torch", "safetensors"],
)
def test_want_of_memory_is_named(take):
    done = capture(lambda: cli.run_script(take, None))
    assert done.returncode == 2 and re.match(r"error: out of memory \(.+\): .*--batch-size", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            "ImportError('libtorch_cpu.so: failed to map segment from shared object')",
            2,
            "^error: out of memory .*segment",
        ),
        ("MemoryError", 2, r"^error: out of memory \(MemoryError\)"),
        ("ImportError('no such module')", 1, "Traceback(?s:.*)no such module"),
    ],
)
def test_want_of_memory_is_named_while_libraries_are_imported(error, code, said):
    script = f"from captioner.runtime.cli import start_imports; start_imports(); raise {error}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code and re.search(said, done.stderr), done.stderr


def test_how_a_library_shows_errors_stays(monkeypatch):
    hook = lambda *_: None  # noqa: E731
    monkeypatch.setattr(sys, "excepthook", hook)
    cli.run_script(lambda config: None, None)
    assert sys.excepthook is hook


@pytest.mark.parametrize("error", [RuntimeError("could not create a primitive descriptor"), OSError("no such thing")])
def test_other_errors_keep_their_traceback(error):
    def fail(config):
        raise error

    with pytest.raises(type(error), match=str(error)):
        cli.run_script(fail, None)


def test_processes_of_a_run_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (processes.count_cores(), processes.count_all_cores()) == (2, 8)


def test_no_run_is_put_among_files_of_somebody_else(folder):
    """As the project's own README.md, which a model card would replace."""
    output = folder / "docs"
    (output / "pages").mkdir(parents=True)
    (output / ".hidden").touch()
    prepare_output(output)  # nothing there that a run would replace
    (output / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"docs: holds files that no run has written, README\.md for one"):
        prepare_output(output)
    (output / "run.json").touch()
    prepare_output(output)

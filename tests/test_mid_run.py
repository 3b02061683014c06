"""What befalls a run in its midst: the disk fills up, files vanish, rights are lost, workers die, the clock is set."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, call_script
from ranks import LAUNCH
from training_runs import hash_adapter, stop_at, train, wait_for_lock

import eval as evaluation
import main
from captioner.bdd100k import label_files, label_report
from captioner.blip2 import caption_folder, captioner
from captioner.data import image_files
from captioner.data.examples import Example
from captioner.runtime.errors import UserError
from captioner.runtime.files import lock_folder, name_run
from captioner.training import checkpoints, dashboard, stopping, trainer
from captioner.training import run as training_run
from captioner.training.checkpoints import find_checkpoint
from captioner.training.run_state import fingerprint_data
from config import EvalConfig, make_config

OUTPUT = Path("blip2-finetuned")
CHECKPOINTS = OUTPUT / "checkpoints"
REFUSED = "another run is writing there"


def fill(folder: Path) -> Path:
    """Take all the room that is left where `folder` is. Returns the file that takes it."""
    path = folder / "filler"
    with pytest.raises(OSError, match="No space left"), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


def call_flags(settings) -> list[str]:
    """The settings as flags of main.py."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def start(settings: dict, script: str = "main.py", *before: str, **changes) -> subprocess.Popen:
    command = [sys.executable, *before, str(ROOT / script), *call_flags(settings | changes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --------------------------------------------------------------------------------------------------------------
# disk full


@pytest.mark.slow
def test_disk_of_the_checkpoints_has_too_little_room(folder, settings, undisturbed, mount, capsys):
    """Seen before the first step, and the run goes on once there is room."""
    mount(OUTPUT, "8m")
    filler = OUTPUT / ".filler"
    filler.write_bytes(bytes(6 << 20))
    with pytest.raises(UserError, match=r"MB free, a checkpoint needs .*--resume"):
        train(settings)
    assert "loss" not in capsys.readouterr().out
    filler.unlink()
    assert train(settings, resume=True) == undisturbed[0]


@pytest.mark.parametrize(
    "file",
    [
        "optimizer.pt",
        pytest.param("adapter_model.safetensors", marks=pytest.mark.slow),
        pytest.param("manifest.json", marks=pytest.mark.slow),
    ],
)
def test_disk_fills_up_while_a_checkpoint_is_written(folder, settings, undisturbed, mount, capsys, file):
    """By another program, after the look at the free room. The checkpoint before it is what the run goes on from."""
    mount(OUTPUT, "32m")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as stopped:
        fill_before(patch, file, step=2)
        train(settings, save_minutes=0.0)
    assert f"{CHECKPOINTS}" in str(stopped.value) and "can't be written" in str(stopped.value)
    assert "No space left" in str(stopped.value) or "0 MB are free" in str(stopped.value)
    assert not (CHECKPOINTS / "checkpoint-2" / "manifest.json").exists()
    (OUTPUT / "filler").unlink()
    assert train(settings, save_minutes=0.0, resume=True) == undisturbed[0]
    said = capsys.readouterr().out
    assert "checkpoint-2 is damaged" in said and "goes on after step 1 of 6" in said


def fill_before(patch, file: str, step: int) -> None:
    """Fill the disk just before `file` of the checkpoint of `step` is written."""
    owner, name, place = {
        "adapter_model.safetensors": (trainer.CaptionTrainer, "_save", 1),
        "optimizer.pt": (torch, "save", 1),
        "manifest.json": (checkpoints, "seal_checkpoint", 0),
    }[file]  # of whose arguments one is the folder, or the file
    real = getattr(owner, name)

    def filled(*args, **kwargs):
        if (CHECKPOINTS / f"checkpoint-{step}" / file).is_relative_to(args[place]):
            fill(OUTPUT)
        return real(*args, **kwargs)

    patch.setattr(owner, name, filled)


@pytest.mark.slow
def test_a_write_that_fails_leaves_the_checkpoints_before(folder, settings, undisturbed, capsys):
    """Of step 6, the best from there on: what the ones before need must be there until it is sealed."""
    real = trainer.CaptionTrainer._save

    def save(self, output_dir, *args, **kwargs):
        if Path(output_dir).name == "checkpoint-6":
            raise OSError("a fault")
        real(self, output_dir, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"checkpoint of step 6 .*a fault"):
        patch.setattr(trainer.CaptionTrainer, "_save", save)
        train(settings, save_minutes=0.0)
    assert sorted(path.name for path in CHECKPOINTS.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (3, 4, 5)]
    assert train(settings, save_minutes=0.0, resume=True) == undisturbed[0]
    assert "goes on after step 5 of 6" in capsys.readouterr().out


def test_a_second_signal_ends_the_writing(folder, settings, undisturbed, capsys):
    """At once: what is not sealed does not count."""
    real = trainer.CaptionTrainer._save
    writing = threading.Event()

    def save(self, *args, **kwargs):
        real(self, *args, **kwargs)
        writing.set()
        time.sleep(1)

    def send() -> None:
        assert writing.wait(60)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.CaptionTrainer, "_save", save)
        stop_at(patch, 2)
        thread = threading.Thread(target=send)
        thread.start()
        train(settings)
    thread.join()
    assert not (CHECKPOINTS / "checkpoint-2" / "manifest.json").exists()
    assert train(settings) == undisturbed[0]
    assert "checkpoint-2 is damaged" in capsys.readouterr().out


def test_disk_fills_up_while_the_adapter_is_saved(folder, settings, undisturbed, mount, capsys):
    """At the very end: nothing is trained again."""
    mount(OUTPUT, "32m")
    real = training_run.save_run

    def save_run(*args):
        fill(OUTPUT)
        real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"adapter can't be saved .*--resume"):
        patch.setattr(main, "save_run", save_run)
        train(settings)
    assert sorted(path.name for path in OUTPUT.iterdir()) == ["checkpoints", "filler"]
    (OUTPUT / "filler").unlink()
    assert train(settings, resume=True) == undisturbed[0]
    assert "goes on after step 6 of 6" in capsys.readouterr().out


@pytest.mark.slow
def test_disk_of_the_logs_fills_up(folder, settings, undisturbed, mount):
    """With captions of the validation images, which leave no trace in the adapter."""
    mount(folder / "logs", "64k")
    real = dashboard.RunLog.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and not Path("logs/filler").exists():
            fill(Path("logs"))
        return real(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"logs/run/.*No space left.*--resume"):
        patch.setattr(dashboard.RunLog, "on_step_end", on_step_end)
        train(settings, save_minutes=0.0, val_captions=2)
    Path("logs/filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", folder / "logs"], check=True)
    assert train(settings, save_minutes=0.0, val_captions=2, resume=True) == undisturbed[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("file", ["metrics.jsonl", "captions.md", "dashboard.png"])
def test_full_disk_names_the_log(tmp_path, file):
    log = dashboard.RunLog(tmp_path)
    log.path.unlink(missing_ok=True)
    for name in ("metrics.jsonl", "captions.md", "dashboard.tmp.png"):
        (tmp_path / name).symlink_to("/dev/full")
    writers = {
        "metrics.jsonl": lambda: log.add({"step": 1}),
        "captions.md": lambda: dashboard.ValidationCaptions(log, [], 0, None).write(1, [], [], True),
        "dashboard.png": lambda: dashboard.plot_dashboard([], tmp_path / "dashboard.png"),
    }
    with pytest.raises(UserError, match=rf"{file}: can't be written .No space left.*--resume"):
        writers[file]()


@pytest.fixture(scope="module")
def images(tmp_path_factory, scenes) -> Path:
    """20 images that other tests of this file may not change."""
    return Path(shutil.copytree(scenes / "images", tmp_path_factory.mktemp("own") / "images"))


def caption_own(undisturbed, images, **changes) -> Path:
    """What eval.py --images does with the adapter; the folder that it writes."""
    options = {"images": (images,), "adapter": undisturbed[1] / OUTPUT, "run_name": "own", "max_new_tokens": 8}
    config = make_config(EvalConfig, **options | {"batch_size": 4} | changes)
    evaluation.main(config)
    return name_run(config.run_name)


def test_disk_fills_up_while_images_are_captioned(folder, undisturbed, images, mount, monkeypatch, capsys):
    """The captions before are kept, and the same command goes on behind them."""
    whole = caption_own(undisturbed, images, run_name="whole")
    mount(folder / "logs/own", "2m")
    real, batches = captioner.Captioner.caption, []

    def caption(self, names, pixels):
        batches.append(names)
        if len(batches) == 3:
            fill(Path("logs/own"))
        return real(self, names, pixels)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"captions.jsonl: can't be .*No space"):
        patch.setattr(captioner.Captioner, "caption", caption)
        # the first two batches leave a page of the disk that the third has to begin another of
        patch.setattr(caption_folder, "format_row", format_long)
        caption_own(undisturbed, images)
    assert not Path("logs/own/captions.csv").exists()
    Path("logs/own/filler").unlink()
    capsys.readouterr()
    caption_own(undisturbed, images)
    assert "of 20 images were captioned before" in capsys.readouterr().out
    assert Path("logs/own/captions.csv").read_bytes() == (whole / "captions.csv").read_bytes()


def format_long(name: str, caption: str) -> str:
    return json.dumps({"name": name, "prediction": caption, "references": [], "padding": "x" * 999}) + "\n"


@pytest.mark.parametrize("file", ["predictions.jsonl", "scores.json", "report.html"])
def test_disk_fills_up_while_eval_writes(folder, undisturbed, mount, file):
    """Nothing half written has a final name; the adapter's folder stays as it was."""
    mount(folder / "logs/run", "2m")
    before = {path.name: path.read_bytes() for path in (undisturbed[1] / OUTPUT).iterdir()}
    writer = {"predictions.jsonl": "write_predictions", "scores.json": "score_predictions", "report.html": "make_rows"}
    real = getattr(evaluation, writer[file])

    def filled(*args):
        fill(Path("logs/run"))
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=rf"{file}: can't be .*No space left"):
        patch.setattr(evaluation, writer[file], filled)
        evaluation.main(make_config(EvalConfig, adapter=undisturbed[1] / OUTPUT, run_name="run", max_new_tokens=8))
    order = ["predictions.jsonl", "scores.json", "report.html"]
    assert {path.name for path in Path("logs/run").iterdir()} == {"filler", *order[: order.index(file)]}
    assert {path.name: path.read_bytes() for path in (undisturbed[1] / OUTPUT).iterdir()} == before


@pytest.mark.parametrize("what", ["replaced", "held"])
def test_an_adapter_that_comes_while_eval_captions_gets_no_scores(folder, undisturbed, monkeypatch, capsys, what):
    """Of a run that has saved its own there since, or is about to."""
    adapter = Path(shutil.copytree(undisturbed[1] / OUTPUT, "adapter"))
    before = {path.name for path in adapter.iterdir()}
    real, weights = evaluation.write_predictions, adapter / "adapter_model.safetensors"

    def write_predictions(*args):
        real(*args)
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")

    config = make_config(EvalConfig, adapter=adapter, run_name="run", max_new_tokens=8, num_samples=1)
    if what == "held":
        with lock_folder(adapter, "--output"):
            evaluation.main(config)
    else:
        monkeypatch.setattr(evaluation, "write_predictions", write_predictions)
        evaluation.main(config)
    told = {"replaced": "another adapter is there than was captioned with", "held": "another run is writing there"}
    assert f"{told[what]}; " in capsys.readouterr().out.partition("note: not kept beside the adapter: ")[2]
    assert {path.name for path in adapter.iterdir()} == before and Path("logs/run/scores.json").is_file()


# --------------------------------------------------------------------------------------------------------------
# memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, where the limit holds")
def test_memory_runs_out_in_training(folder, settings, undisturbed):
    """As under `ulimit -d`: one message, and the run goes on where there is more."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    real = stopping.Pace.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            memory = re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())
            resource.setrlimit(resource.RLIMIT_DATA, (int(memory[1]) * 1024 + 2**26, before[1]))
            torch.ones(2**27)
        real(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping.Pace, "on_step_end", on_step_end)
        try:
            done = call_script("main.py", *call_flags(settings | {"save_minutes": 0.0}))
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)
    assert done.returncode == 2 and "error: out of memory (" in done.stderr, done.stderr
    assert find_checkpoint(CHECKPOINTS).name == "checkpoint-1"
    assert train(settings, save_minutes=0.0, resume=True) == undisturbed[0]


def test_want_of_memory_is_not_the_disks_fault(folder):
    with pytest.raises(RuntimeError, match="memory"), checkpoints.explain_checkpoint(CHECKPOINTS / "checkpoint-1"):
        torch.empty(2**50)


# --------------------------------------------------------------------------------------------------------------
# files that vanish, rights that are lost


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_vanishes_in_training(folder, settings, undisturbed, images, workers):
    """The image is named; once it is back the run goes on."""
    options = {"images": Path("images"), "dataloader_workers": workers}
    shutil.copytree(images, "images")
    real = main.train_lora

    def train_lora(*args):
        for path in Path("images").iterdir():
            path.rename(folder / path.name)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"\.jpg: not readable .*No such file"):
        patch.setattr(main, "train_lora", train_lora)
        train(settings, **options)
    for path in folder.glob("*.jpg"):
        path.rename(folder / "images" / path.name)
    assert train(settings, resume=True, **options) == undisturbed[0]


def test_an_image_vanishes_before_the_fingerprint(tmp_path):
    with pytest.raises(UserError, match=r"a\.jpg: can't be read any more \(No such file"):
        fingerprint_data({"train": [Example("a.jpg", tmp_path / "a.jpg", "")]})


def test_an_image_vanishes_while_others_are_captioned(folder, undisturbed, images, capsys):
    """Counted and named; the others get their captions."""
    shutil.copytree(images, "images")
    real = image_files.find_images

    def find_images(paths):
        found = real(paths)
        found[3][1].unlink()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_folder, "find_images", find_images)
        caption_own(undisturbed, Path("images"))
    said = capsys.readouterr().out
    assert "1 image can't be read" in said and "No such file" in said and "19 captions in" in said


@pytest.mark.parametrize("size", [2**23, 64])
@pytest.mark.parametrize("moment", ["plan_jobs", "_run_jobs"])
def test_a_label_file_vanishes(folder, scenes, monkeypatch, moment, size):
    """Between its finding, its measuring and its reading, as a whole or in pieces by processes."""
    path = Path(shutil.copy(scenes / "labels.json", "labels.json"))
    monkeypatch.setattr(label_files, "PIECE", size)
    real = getattr(label_files, moment)

    def vanish(*args):
        path.unlink()
        return real(*args)

    monkeypatch.setattr(label_files, moment, vanish)
    with pytest.raises(UserError, match=r"labels.json: can't be read.*No such file"):
        list(label_files.read_labels([path], label_report.LabelReport()))


def test_permission_is_lost_in_training(folder, settings, undisturbed, scenes, root):
    """From step 2 on the run may write nothing; what it had saved is kept."""
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    images = Path(shutil.copytree(scenes / "images", "images"))
    real = stopping.Pace.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.seteuid(65534)
        real(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"Permission denied.*--resume"):
        patch.setattr(stopping.Pace, "on_step_end", on_step_end)
        try:
            train(settings, save_minutes=0.0, images=images)
        finally:
            os.seteuid(0)
    assert find_checkpoint(CHECKPOINTS).name == "checkpoint-1"
    assert train(settings, save_minutes=0.0, images=images, resume=True) == undisturbed[0]


@pytest.mark.slow
def test_disk_becomes_read_only_in_training(folder, settings, undisturbed, mount):
    """As Linux makes it when the disk has errors: here a read-only one is put in its place for a while."""
    real = stopping.Pace.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            mount(CHECKPOINTS, "32m,ro")
        real(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"Read-only file system.*--resume"):
        patch.setattr(stopping.Pace, "on_step_end", on_step_end)
        train(settings, save_minutes=0.0)
    subprocess.run(["umount", CHECKPOINTS], check=True)
    assert train(settings, save_minutes=0.0, resume=True) == undisturbed[0]


# --------------------------------------------------------------------------------------------------------------
# clock


@pytest.mark.slow
def test_the_clock_goes_backwards_in_training(folder, settings, undisturbed, monkeypatch):
    """By an hour at each look at it, and by a day between a run and the one that goes on."""
    real, back = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * next(back))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 4)
        train(settings, save_minutes=0.0)
    assert find_checkpoint(CHECKPOINTS).name == "checkpoint-4"  # by its number, not by the clock
    now = real()
    for age, checkpoint in enumerate(sorted(CHECKPOINTS.glob("checkpoint-*"), reverse=True)):
        os.utime(checkpoint, (now + 86400 * age,) * 2)  # the newest is the oldest by its date
    assert train(settings, save_minutes=0.0, resume=True) == undisturbed[0]
    assert not CHECKPOINTS.exists()


def test_no_run_writes_over_one_of_the_same_second(folder, monkeypatch):
    """The second time that a second comes, since the clock was set back, is another folder."""
    from captioner.runtime import files as runtime_files

    moment = runtime_files.datetime(2026, 10, 25, 2, 30, 0)
    monkeypatch.setattr(runtime_files, "datetime", type("Clock", (), {"now": staticmethod(lambda: moment)}))
    for expected in ("2026-10-25_02-30-00-eval", "2026-10-25_02-30-00-2-eval", "2026-10-25_02-30-00-3-eval"):
        run_dir = name_run(None, "-eval")
        assert run_dir == Path("logs") / expected and run_dir.is_dir()


# --------------------------------------------------------------------------------------------------------------
# two runs at once


@pytest.mark.slow
def test_two_runs_start_at_once_in_one_folder(folder, settings, undisturbed):
    """One is refused, the other trains as if it were alone."""
    runs = [start(settings) for _ in range(2)]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], errors
    [refused] = [error for run, error in zip(runs, errors, strict=True) if run.returncode]
    assert f"--output blip2-finetuned: {REFUSED}" in refused
    assert hash_adapter(folder) == undisturbed[0]


@pytest.mark.slow
def test_two_evaluations_start_at_once_under_one_name(folder):
    path = folder / "predictions.jsonl"
    row = {"prediction": "There is one car.", "references": ["There is one car."]}
    path.write_text("".join(json.dumps({"name": f"{n}.jpg"} | row) + "\n" for n in range(6000)))
    runs = [start({"predictions": path, "run_name": "run"}, "eval.py") for _ in range(2)]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], errors
    assert any(f"--run-name logs/run: {REFUSED}" in error for error in errors)
    assert json.loads(Path("logs/run/scores.json").read_text())["n"] == 6000


@pytest.mark.slow
@pytest.mark.parametrize("script", ["main.py", "eval.py"])
def test_launched_processes_are_refused_a_folder_that_is_held(folder, settings, undisturbed, images, script):
    """Both of them end, and one tells why."""
    held = {"main.py": OUTPUT, "eval.py": Path("logs/run")}[script]
    own = {"images": (images,), "adapter": undisturbed[1] / OUTPUT, "run_name": "run"}
    with lock_folder(held, "--output"):
        run = start(settings if script == "main.py" else own, script, *map(str, LAUNCH))
        _, error = run.communicate(timeout=300)
    assert run.returncode and error.count(REFUSED) == 1, error


def test_launched_processes_train_and_hold_their_folder(folder, settings):
    """`accelerate launch main.py`. A second run is refused while two processes train, and not after."""
    run = start(settings, "main.py", *map(str, LAUNCH), dataloader_workers=0)
    try:
        while not (CHECKPOINTS / "state.json").exists():
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.05)
        with pytest.raises(UserError, match=REFUSED), lock_folder(OUTPUT, "--output"):
            pass
    finally:
        said, error = run.communicate(timeout=300)
    assert run.returncode == 0, error
    wait_for_lock(OUTPUT)
    assert said.count("adapter saved to") == 1
    assert json.loads((OUTPUT / "run.json").read_text())["world"]["processes"] == 2


# --------------------------------------------------------------------------------------------------------------
# workers that die


@pytest.mark.slow
def test_a_killed_worker_of_the_training_data_is_noticed(folder, settings, undisturbed, capsys):
    """kill -9 whatever process decodes, once there is a checkpoint: exit code 2, and the run goes on with --resume."""
    options = {"save_minutes": 0.0}
    run = start(settings, **options)
    killed = set()
    while run.poll() is None:
        if (CHECKPOINTS / "checkpoint-1/manifest.json").exists():
            killed |= kill_workers(run.pid)
        time.sleep(0.01)
    _, error = run.communicate()
    assert killed and run.returncode == 2, error
    assert "error: a process that reads images was killed" in error and "--dataloader-workers" in error
    assert "Traceback" not in error
    assert find_checkpoint(CHECKPOINTS) is not None
    assert train(settings, **options, resume=True) == undisturbed[0]
    assert "goes on after step" in capsys.readouterr().out


def kill_workers(parent: int) -> set[int]:
    """Kill the processes that `parent` forked. Returns their ids."""
    killed = set()
    for child in psutil.Process(parent).children():
        try:
            if "main.py" in " ".join(child.cmdline()):
                child.send_signal(signal.SIGKILL)
                killed.add(child.pid)
        except psutil.NoSuchProcess:
            pass
    return killed


def test_a_worker_dies_while_a_checkpoint_is_written(folder, settings, monkeypatch):
    """torch raises in whatever the process does at that moment; it is not the disk that is blamed."""

    def save(*args):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(checkpoints.Trainer, "_save_checkpoint", save)
    with pytest.raises(UserError, match="a process that reads images was killed"):
        train(settings)


READ = """
import os, sys, time
sys.path.insert(0, {root!r})
from captioner.bdd100k import label_files as labels
labels.PIECE = 64
os.sched_getaffinity = lambda pid: {{0, 1}}

def wait(frame):
    print("waits", flush=True)
    time.sleep(600)

list(labels.read_labels([labels.Path({path!r})], labels.LabelReport(), convert=wait))
"""


def test_workers_of_the_labels_end_with_a_run_that_is_killed(scenes):
    command = [sys.executable, "-c", READ.format(root=str(ROOT), path=str(scenes / "labels.json"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "waits\n"
        workers = psutil.Process(run.pid).children()
        run.kill()
    assert workers
    end = time.monotonic() + 20
    while not all(map(has_ended, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    alive = [worker for worker in workers if not has_ended(worker)]
    for worker in alive:
        worker.kill()
    assert not alive


def has_ended(process: psutil.Process) -> bool:
    """Also when nobody has asked for its exit code since the process that had started it was killed."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill_yourself(frame):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_of_the_labels_is_noticed(scenes, monkeypatch):
    """multiprocessing.Pool would wait for its answer for ever."""
    monkeypatch.setattr(label_files, "PIECE", 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(UserError, match="a process that reads labels was killed"):
        list(label_files.read_labels([scenes / "labels.json"], label_report.LabelReport(), convert=kill_yourself))

"""The command line of the three scripts: defaults, wrong flags, and how fast --help answers."""

import ast
import dataclasses
import inspect
import itertools
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT, call_script, start_script

from captioner.runtime.errors import UserError
from captioner.runtime.settings import flatten, name_fields
from config import DEMO, EvalConfig, PipelineConfig, TrainConfig, make_config, parse_args

SCRIPTS = ["main.py", "eval.py", "bdd100k_data_pipeline.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once(script):
    """In seconds of processor time, which is about what a quiet machine takes, whatever runs beside the test."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with start_script(script, "--help") as process:
        out, err = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, err
    assert "--demo" in out
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def read_comments(group: type) -> dict[str, str]:
    """{field: its comment, which stands behind it or on the line before}."""
    lines = textwrap.dedent(inspect.getsource(group)).splitlines()
    comments = {}
    for statement in ast.parse("\n".join(lines)).body[0].body:
        if isinstance(statement, ast.AnnAssign):
            before, own = lines[statement.lineno - 2].strip(), lines[statement.end_lineno - 1].partition("  # ")[2]
            comments[statement.target.id] = own or before.removeprefix("# ") * before.startswith("#")
    return comments


@pytest.mark.parametrize("config", [PipelineConfig, TrainConfig, EvalConfig])
def test_help_has_all_of_each_fields_comment(config, monkeypatch, capsys):
    groups = [config, *(known.type for known in dataclasses.fields(config) if dataclasses.is_dataclass(known.type))]
    written = [parent for group in groups for parent in group.__mro__ if dataclasses.is_dataclass(parent)]
    documented = dict(itertools.chain.from_iterable(read_comments(group).items() for group in written))
    documented = {name: comment for name, comment in documented.items() if name in flatten(config())}
    assert documented.keys() == flatten(config()).keys()
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit):
        parse_args(config)
    shown = " ".join(capsys.readouterr().out.split())
    for name, comment in documented.items():
        assert comment and comment in shown, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_misspelt_flag_is_refused_with_a_suggestion(script):
    wrong, right = {
        "main.py": ("--learning-rat", "--learning-rate"),
        "eval.py": ("--num-sample", "--num-samples"),
        "bdd100k_data_pipeline.py": ("--ouput", "--output"),
    }[script]
    refused = call_script(script, wrong, "3")
    assert refused.returncode == 2
    assert right in refused.stderr + refused.stdout
    assert "Traceback" not in refused.stderr


def test_defaults_are_those_of_the_reference():
    config = parse_args(TrainConfig, [])
    assert re.fullmatch("Salesforce/blip2-opt-2.7b@[0-9a-f]{40}", config.base.model)
    assert config.source.kaggle_dataset == "solesensei/solesensei_bdd100k/versions/2"
    assert (config.run.output, config.data.captions) == (Path("blip2-finetuned"), None)
    training = config.training
    assert (training.num_train_epochs, training.learning_rate, training.weight_decay) == (5, 5e-5, 0.01)
    assert training.warmup_ratio == 0.1
    assert (training.per_device_train_batch_size, training.train_batch_size) == (None, 16)
    assert (config.lora.lora_target, config.lora.lora_rank, config.lora.lora_alpha) == ("both", 16, 32)
    assert (config.data.train_share, config.data.val_share) == (0.6, 0.28)
    evaluation = parse_args(EvalConfig, [])
    generation = evaluation.generation
    assert (evaluation.num_samples, generation.temperature, generation.top_p) == (20, 0.7, 0.9)


@pytest.mark.parametrize("words", [["--labels", ""], ["--labels", "a.json", ""], ["--labels="], ["--output", ""]])
def test_an_empty_path_is_not_the_current_folder(words):
    run = call_script("bdd100k_data_pipeline.py", *words)
    assert run.returncode == 2 and f"{words[0].rstrip('=')}: is given an empty path" in run.stderr


def test_flags_come_on_top_of_the_demo():
    config = parse_args(TrainConfig, ["--demo", "--learning-rate", "1e-4"])
    assert config.demo
    assert config.training.learning_rate == 1e-4
    assert config.run.output == DEMO[TrainConfig]["output"]


@pytest.mark.parametrize(
    ("config_class", "args"),
    [
        (TrainConfig, ["--lora-rank", "0"]),
        (TrainConfig, ["--learning-rate", "-1"]),
        (TrainConfig, ["--learning-rate", "nan"]),
        (TrainConfig, ["--train-share", "0.8", "--val-share", "0.2"]),
        (TrainConfig, ["--limit", "2"]),
        (TrainConfig, ["--held-out", "val"]),
        (EvalConfig, ["--top-p", "1.1"]),
        (EvalConfig, ["--temperature", "0"]),
        (EvalConfig, ["--num-samples", "0"]),
        (EvalConfig, ["--num-samples", "some"]),
    ],
)
def test_impossible_values_are_refused(config_class, args, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(config_class, args)
    assert stopped.value.code == 2
    assert args[0].lstrip("-") in capsys.readouterr().err.replace("_", "-").lower()


@pytest.mark.parametrize(
    ("flags", "lanes"),
    [("--lanes", True), ("--no-lanes", False), ("--lanes False", False), ("--lanes None", None), ("", None)],
)
def test_what_is_on_off_or_as_in_training_has_the_flags_of_main(flags, lanes):
    args = ["--labels", "labels.json", *flags.split(), "--no-merge-duplicates"]
    reading = parse_args(EvalConfig, args).reading
    assert (reading.lanes, reading.merge_duplicates) == (lanes, False)
    assert parse_args(EvalConfig, [*args[2:], "--labels", "a", "b"]).labels == (Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("flags", "greedy"),
    [
        ("", False),
        ("--images a", True),
        ("--images a --no-greedy", False),
        ("--images a --temperature 0.7", False),
        ("--images a --top_p=0.9", False),
        ("--images a --predictions b", False),
        ("--demo", True),
        ("--demo --temperature 0.9 --seed 1", False),
    ],
)
def test_images_are_captioned_by_the_likeliest_tokens_unless_sampling_is_asked_for(flags, greedy):
    assert parse_args(EvalConfig, flags.split()).generation.greedy == greedy


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("--compare a b", ["--base", "--split val", "--num-samples 5", "--show 1", "--adapter x", "--labels x"]),
        ("--compare a b", ["--predictions x", "--images x", "--seed 1", "--fast off", "--images-root x"]),
        ("--predictions a", ["--base", "--blank", "--model-floors", "--greedy", "--max-new-tokens 5", "--split val"]),
        ("--predictions a --images b", ["--num-samples 5", "--images-root x", "--batch-size 2", "--features x"]),
        ("--images a", ["--num-samples 5", "--split val", "--labels x", "--model-floors", "--seed 1"]),
        ("--images a", ["--greedy --temperature 0.9", "--greedy --top-p 0.5"]),
        ("--demo --predictions a", ["--num-samples 20", "--batch-size 16", "--no-greedy"]),
    ],
)
def test_flags_without_effect_are_refused(mode, flags, capsys):
    parse_args(EvalConfig, mode.split())
    for flag in flags:
        with pytest.raises(SystemExit) as stopped:
            parse_args(EvalConfig, [*mode.split(), *flag.split()])
        assert stopped.value.code == 2
        last = flag.rpartition("--")[2].split()[0].removeprefix("no-")
        assert f"--{last}" in capsys.readouterr().err, flag


@pytest.mark.parametrize(
    "flags",
    [
        "--predictions a --images b --labels c --references d --adapter e --show 0 --num-samples all",
        "--images a --base --blank --adapter b --show 0 --num-samples all --batch-size 2 --features off",
        "--images a --no-greedy --seed 1",
        "--compare a b --references c --run-name d",
        "--demo --compare a b",
        "--demo --images a",
    ],
)
def test_flags_with_an_effect_are_taken(flags):
    parse_args(EvalConfig, flags.split())


BOUNDS = [  # the last value that is taken, and the first that is refused
    (TrainConfig, "lora_rank", 1, 0),
    (TrainConfig, "lora_alpha", 1, 0),
    (TrainConfig, "learning_rate", 1e-9, 0),
    (TrainConfig, "train_batch_size", 1, 0),
    (TrainConfig, "per_device_train_batch_size", 16, 17),
    (TrainConfig, "per_device_train_batch_size", 1, 0),
    (TrainConfig, "per_device_eval_batch_size", 1, 0),
    (TrainConfig, "logging_steps", 1, 0),
    (TrainConfig, "save_minutes", 0, -1e-9),
    (TrainConfig, "val_captions", 0, -1),
    (TrainConfig, "max_caption_tokens", 1, 0),
    (TrainConfig, "num_train_epochs", 1e-9, 0),
    (TrainConfig, "max_steps", 1, 0),
    (TrainConfig, "max_steps", -1, -2),
    (TrainConfig, "seed", 0, -1),
    (TrainConfig, "seed", 2**32 - 1, 2**32),
    (TrainConfig, "weight_decay", 0, -1e-9),
    (TrainConfig, "dataloader_workers", 0, -1),
    (TrainConfig, "length_window", 0, -1),
    (TrainConfig, "features_disk_gib", 0, -1e-9),
    (TrainConfig, "min_box_size", 0, -1e-9),
    (TrainConfig, "warmup_ratio", 0, -1e-9),
    (TrainConfig, "warmup_ratio", 1 - 1e-9, 1),
    (TrainConfig, "lora_dropout", 0, -1e-9),
    (TrainConfig, "lora_dropout", 1 - 1e-9, 1),
    (TrainConfig, "limit", 3, 2),
    (TrainConfig, "train_share", 0.72 - 1e-9, 0.72),
    (TrainConfig, "train_share", 1e-9, 0),
    (TrainConfig, "val_share", 0.4 - 1e-9, 0.4),
    (TrainConfig, "val_share", 1e-9, 0),
    (PipelineConfig, "min_box_size", 0, -1e-9),
    (EvalConfig, "temperature", 1e-9, 0),
    (EvalConfig, "batch_size", 1, 0),
    (EvalConfig, "seed", 0, -1),
    (EvalConfig, "seed", 2**32 - 1, 2**32),
    (EvalConfig, "top_p", 1, 1 + 1e-9),
    (EvalConfig, "top_p", 1e-9, 0),
    (EvalConfig, "num_samples", 1, 0),
    (EvalConfig, "show", 0, -1),
    (EvalConfig, "max_new_tokens", 1, 0),
]


@pytest.mark.parametrize(("config_class", "name", "last", "beyond"), BOUNDS)
def test_each_bound_is_where_the_message_says(config_class, name, last, beyond):
    assert flatten(make_config(config_class, **{name: last}))[name] == last
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
        make_config(config_class, **{name: beyond})


def test_flatten_has_json_types_only():
    assert flatten(make_config(TrainConfig, labels=(Path("a"), Path("b"))))["labels"] == ["a", "b"]


ENDING = """
import atexit, sys, threading, time
from captioner.runtime.errors import UserError
from captioner.runtime.cli import run_script

def main(config):
    atexit.register(print, "registered later", end="")
    threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
    print("written", end=" ")
    print("told", file=sys.stderr)
    {what}

run_script(main, None)
"""


@pytest.mark.parametrize(
    ("what", "code", "told"),
    [
        ("pass", 0, ""),
        ("sys.exit(0)", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("raise UserError('labels.json: missing')", 2, "labels.json: missing"),
        ("raise KeyboardInterrupt", 130, "stopped by Ctrl-C"),
        ("raise ValueError('a fault')", 1, "a fault"),
        ("raise BrokenPipeError('of a worker')", 1, "of a worker"),
    ],
)
def test_all_that_is_due_at_exit_is_done(what, code, told):
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(what=what)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr.startswith("told") and told in done.stderr
    assert done.stdout.startswith("written a thread\nregistered later")


@pytest.mark.slow
def test_a_message_stands_alone(tmp_path):
    """Libraries that are written in C++ would tell at the end of what the search for garbage has left out."""
    with start_script("eval.py", "--adapter", tmp_path / "none", cwd=tmp_path) as process:
        err = process.communicate()[1]
    assert process.returncode == 2 and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("flush", [True, False])
def test_a_log_on_a_full_disk_is_told(flush):
    script = "from captioner.runtime.cli import run_script\n"
    script += f"run_script(lambda _: print('line', flush={flush}), None)"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    said = "error: what is written, or what is printed: a disk is full (No space left on device): free some space\n"
    assert done.stderr == said
    assert done.returncode == 2


def test_what_runs_a_script_ends_as_it_says(tmp_path):
    """And not with the script's exit code."""
    script = "from captioner.runtime.cli import run_script\ndef main(config): print('ran')\nrun_script(main, None)"
    (tmp_path / "script.py").write_text(script)
    caller = f"import runpy, sys; runpy.run_path({str(tmp_path / 'script.py')!r}, run_name='__main__'); sys.exit(3)"
    done = subprocess.run([sys.executable, "-c", caller], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "ran\n")


IMPORTING = """
import gc, signal, sys, time
from captioner.runtime.cli import run_script, start_imports

if sys.argv[1] == "nohup":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
start_imports()
if sys.argv[1] == "late":
    run_script(lambda _: [print(gc.isenabled(), gc.get_freeze_count() > 1000, flush=True), time.sleep(60)], None)
print(gc.isenabled(), gc.get_freeze_count() > 1000, flush=True)
time.sleep(60 if sys.argv[1] == "early" else 1)
"""


@pytest.mark.parametrize(
    ("when", "code", "told"),
    [("early", -signal.SIGINT, ""), ("late", 130, "\nstopped by Ctrl-C\n"), ("nohup", 0, "")],
)
def test_ctrl_c_ends_a_script_without_a_traceback(when, code, told):
    """While it imports, and later; and not at all where it is ignored, as by nohup."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", IMPORTING, when], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == f"{when == 'late'} {when == 'late'}\n"  # garbage of imports is left alone
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == told
    assert process.returncode == code


@pytest.mark.parametrize("lines", [1, 20_000])
def test_output_that_nobody_reads_ends_a_script_quietly(lines):
    """As after `| head`, be it found out while it runs or at its end."""
    script = "from captioner.runtime.cli import run_script\n"
    script += f"run_script(lambda _: [print('line') for _ in range({lines})], None)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, **pipes) as process:
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 141 and told == "nobody reads what is printed any more: ended\n"


def test_what_a_run_that_goes_on_may_have_otherwise():
    """What does not change what is learnt; all else is refused."""
    assert name_fields(TrainConfig, "free") == {
        *("labels", "images", "captions", "output", "features", "features_disk_gib"),  # where things lie
        *("resume", "overwrite", "check", "save_minutes", "dataloader_workers"),
        *("merge", "push_to_hub", "push_captions", "logging_steps", "val_captions", "run_name", "wandb"),
    }

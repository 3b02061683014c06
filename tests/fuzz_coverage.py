"""Coverage-guided fuzzing of what reads files and text from outside: whatever the bytes, there is an answer.

    pip install atheris    # CPython 3.11 to 3.13 on Linux; not in requirements-dev.txt, since no test needs it
    python tests/fuzz_coverage.py captions --seconds 900 --corpus /tmp/corpus

Targets: captions (the caption parser), labels (label files: JSON, .gz and .zip), predictions (predictions, references
and captions files), config (command lines, and run.json, scores.json, state.json, split.csv, checkpoints and unfinished
captions that are read back). Inputs that reach new code are kept in CORPUS/TARGET and are where a later run begins;
the first ones are made here. An exception that is no UserError, or a broken promise, is a finding: the input and the
traceback are written to CORPUS/TARGET-findings, the run goes on, and the exit code is 1 at its end.
"""

import argparse
import contextlib
import gzip
import importlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TQDM_DISABLE="1")

MODULES = (
    *("captioner.bdd100k.facts", "captioner.bdd100k.parsing", "captioner.bdd100k.frames"),
    *(
        "captioner.bdd100k.label_files",
        "captioner.data.caption_files",
        "captioner.data.splits",
        "captioner.blip2.loading",
    ),
    *(
        "captioner.scoring.predictions",
        "captioner.training.checkpoints",
        "captioner.training.run_state",
        "captioner.publishing.model_card",
    ),
    *("config", "eval", "main"),
)
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None  # files in memory: a disk would take most of the time
LONGEST = 4096  # bytes of an input
SLOW = 20  # seconds for one input, beyond which it is a finding

Check = Callable[[bytes], None]  # raises for a finding


# --------------------------------------------------------------------------------------------------------------
# targets: the inputs to begin with, and what must hold


def captions_target(folder: Path) -> tuple[list[bytes], Check]:
    from captioner.bdd100k import parsing, wording
    from captioner.bdd100k.frames import read_frame
    from captioner.bdd100k.label_report import LabelReport
    from demo.draw import draw_scene

    facts = [read_frame(draw_scene(seed)[1], LabelReport()).facts for seed in range(8)]
    seeds = [wording.describe(item, style).encode() for item in facts for style in wording.STYLES]

    def check(data: bytes) -> None:
        text = data.decode("utf-8", errors="surrogateescape")
        reading = parsing.read_caption(text)
        for style in wording.STYLES:
            assert parsing.parse_caption(wording.describe(reading.facts, style)) == reading.facts, style
        for absent in ("invented", "missing"):
            pieces = parsing.mark_caption(text, facts[0], absent)
            assert "".join(piece for piece, _ in pieces) == text, pieces

    return seeds, check


def labels_target(folder: Path) -> tuple[list[bytes], Check]:
    import fuzz_labels

    from captioner.bdd100k import label_files, label_report
    from demo.draw import draw_scene

    label_files._run_jobs = lambda run, jobs: map(run, jobs)  # in this process
    scenes = [draw_scene(seed)[1] for seed in range(3)]
    plain = [json.dumps(value).encode() for value in (scenes[:2], scenes[0], {"frames": scenes[:1]}, [])]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", plain[0])
        archive.writestr("b.json", plain[2])
    seeds = [b"\0" + data for data in plain] + [b"\1" + data for data in plain]
    seeds += [b"\2" + gzip.compress(plain[0], mtime=0), b"\3" + packed.getvalue()]

    def check(data: bytes) -> None:
        kind = data[0] % 4 if data else 0
        if kind < 2:  # as a whole, or cut into pieces
            path = folder / "labels.json"
            path.write_bytes(data[1:])
            fuzz_labels.check_file(path, (2**22, 2**7)[kind])
            return
        path = folder / ("labels.json.gz", "labels.zip")[kind - 2]
        path.write_bytes(data[1:])
        report = label_report.LabelReport()
        with expect_user_error(path):
            used = sum(1 for _ in label_files.read_labels([path], report))
            assert used == report.frames, (used, report.frames)

    return seeds, check


def predictions_target(folder: Path) -> tuple[list[bytes], Check]:
    from captioner.data.caption_files import read_captions
    from captioner.scoring import predictions

    rows = [
        predictions.Prediction("a-1.jpg", "There is one car.", ["There is one car.", "Ein Auto, \u00e4hm."]),
        predictions.Prediction("b-2.jpg", "", ["It is a night scene."], {"floor": "There are 2 cars."}),
    ]
    lines = "".join(map(predictions.format_prediction, rows)).encode()
    table = b'name,prediction,reference,reference2\na-1.jpg,"There is one car.","x","y"\nb-2.jpg,"",z,\n'
    captions = b'name,raw_caption\na-1.jpg,"There is one car."\nb-2.jpg,"It is, a night\nscene."\n'
    seeds = [b"\0" + lines, b"\0\xef\xbb\xbf" + lines, b"\1" + table, b"\1" + captions, b"\2" + captions]

    def check(data: bytes) -> None:
        kind = data[0] % 3 if data else 0
        path = folder / ("rows.jsonl", "rows.csv", "captions.csv")[kind]
        path.write_bytes(data[1:])
        if kind == 2:
            with expect_user_error(path):
                read_captions(path)
            return
        with expect_user_error(path):
            predictions.read_references(path)
        with expect_user_error(path):
            read, _ = predictions.read_predictions(path)
            again = folder / "again.jsonl"
            predictions.write_predictions(again, read)
            assert predictions.read_predictions(again)[0] == read

    return seeds, check


def config_target(folder: Path) -> tuple[list[bytes], Check]:
    import config
    from captioner.blip2.caption_folder import describe_settings, read_earlier
    from captioner.data import splits
    from captioner.publishing import model_card, records
    from captioner.runtime.settings import flatten
    from captioner.training import checkpoints, run_state
    from captioner.training.run import is_finished

    output = folder / "adapter"
    checkpoint = output / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    state = {"config": {"seed": 42}, "data": {}, "world": {"processes": 1}, "micro_batch": 4, "run_dir": "logs/run"}
    run = {"run_name": "run", **state, "results": {"best_eval_loss": 0.5}, "versions": {}, "git_commit": None}
    scores = {"schema": records.SCHEMA_VERSION, "config": {"base": False, "predictions": None}, "n": 4, "scores": {}}
    trainer = {"global_step": 2, "max_steps": 4, "best_model_checkpoint": "checkpoint-2"}
    options = [b"--limit 60 --max-steps 4 --style natural", b"--demo --output a --no-lanes --seed 7", b"--help",
               b"--labels a b --images c --train-share 0.5 --val-share 0.4 --learning-rate 1e-4",
               b"--adapter a --compare a b --num-samples all --top-p 0.5 --greedy --images a b",
               b"--census --min-box-size 3.5 --class-names 2018"]  # fmt: skip
    seeds = [bytes([kind]) + line.replace(b" ", b"\n") for kind in range(3) for line in options]
    seeds += [bytes([kind]) + json.dumps(value).encode() for kind, value in enumerate((run, scores, state, trainer), 3)]
    seeds += [b"\7name,split,image,raw_caption\na.jpg,test,a.jpg,x\n", b'\x08{"name": "a.jpg", "caption": "x"}\n']
    settings, eval_settings = (
        config.make_config(config.TrainConfig, output=output),
        config.make_config(config.EvalConfig, adapter=output),
    )

    def check_arguments(class_, data: bytes) -> None:
        args = data.decode("utf-8", errors="surrogateescape").replace("\0", "").split("\n")
        try:
            parsed = config.parse_args(class_, args)
        except SystemExit as stop:
            assert stop.code in (0, 2), stop.code
            return
        json.dumps(flatten(parsed), allow_nan=False)  # a run saves its settings

    def check(data: bytes) -> None:
        kind, data = data[0] % 9 if data else 0, data[1:]
        for left in (output / "run.json", output / "scores.json", output / "checkpoints" / "state.json"):
            left.unlink(missing_ok=True)
        match kind:
            case 0 | 1 | 2:
                check_arguments((config.PipelineConfig, config.TrainConfig, config.EvalConfig)[kind], data)
            case 3:
                (output / "run.json").write_bytes(data)
                with expect_user_error(output):
                    is_finished(settings)
                with expect_user_error(output):
                    model_card.write_model_card(output)
            case 4:
                (output / "run.json").write_text(json.dumps(run))
                (output / "scores.json").write_bytes(data)
                with expect_user_error(output):
                    records.read_scores(output)
            case 5:
                (output / "checkpoints" / "state.json").write_bytes(data)
                with expect_user_error(output):
                    run_state.find_unfinished(output, state, resume=True, overwrite=False)
            case 6:
                (checkpoint / "trainer_state.json").write_bytes(data)
                (checkpoint / "manifest.json").unlink(missing_ok=True)
                checkpoints.seal_checkpoint(checkpoint)
                if checkpoints.find_damage(checkpoint) is None:
                    checkpoints.read_step(checkpoint)
                (checkpoint / "manifest.json").write_bytes(data)
                checkpoints.find_damage(checkpoint)
            case 7:
                (output / "split.csv").write_bytes(data)
                with expect_user_error(output):
                    splits.read_split(output, "test")
            case 8:
                (output / "run.json").write_text(json.dumps(run))
                captions = folder / "unfinished" / "captions.jsonl"
                captions.unlink(missing_ok=True)
                captions.parent.mkdir(exist_ok=True)
                found = describe_settings(eval_settings) | {"way": {"batch": "4", "by": "generate"}}
                (captions.parent / "settings.json").write_text(json.dumps(found))
                captions.write_bytes(data)
                with expect_user_error(captions.parent):
                    read_earlier(captions, describe_settings(eval_settings))

    return seeds, check


TARGETS = {
    "captions": captions_target,
    "labels": labels_target,
    "predictions": predictions_target,
    "config": config_target,
}


@contextlib.contextmanager
def expect_user_error(path: Path):
    """A UserError is an answer, if it names the file."""
    from captioner.runtime.errors import UserError

    try:
        yield
    except UserError as error:
        assert str(path) in str(error), error


# --------------------------------------------------------------------------------------------------------------
# fuzzing


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Bytes changed by libFuzzer or, when there is JSON after the first byte, at times as a value."""
    import atheris
    import fuzz_labels

    rng = random.Random(seed)
    if rng.random() < 0.5 and data[1:2] in (b"{", b"["):
        with contextlib.suppress(ValueError, RecursionError):
            changed = data[:1] + json.dumps(fuzz_labels.damage_value(json.loads(data[1:]), rng)).encode()
            if len(changed) <= max_size:
                return changed
    return atheris.Mutate(data, max_size)


def fuzz(target: str, corpus: Path, findings: Path, flags: list[str]) -> None:
    """Fuzz in this process, which libFuzzer ends."""
    import atheris

    atheris.enabled_hooks.add("str")
    with atheris.instrument_imports(include=list(MODULES), enable_loader_override=False):
        for module in MODULES:
            importlib.import_module(module)
    known = set()

    def test_one_input(data: bytes) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                check(data)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__}-{Path(last.filename).stem}-{last.lineno}"
            if place not in known:
                known.add(place)
                (findings / place).write_bytes(data)
                (findings / f"{place}.txt").write_text(traceback.format_exc(), errors="backslashreplace")
                print(f"FINDING {place}: {str(error)[:200]!r}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        os.chdir(folder)
        seeds, check = TARGETS[target](Path(folder))
        for number, seed in enumerate(seeds):
            (corpus / f"seed-{number:02}").write_bytes(seed)
        atheris.Setup([sys.argv[0], *flags, str(corpus)], test_one_input, custom_mutator=mutate)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process that libFuzzer ends
    args = parser.parse_args()
    corpus = args.corpus.resolve() / args.target
    findings = corpus.with_name(f"{args.target}-findings")
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(exist_ok=True)
    if args.inside:
        flags = [f"-max_total_time={args.seconds}", f"-max_len={LONGEST}", f"-timeout={SLOW}", "-rss_limit_mb=4096"]
        fuzz(args.target, corpus, findings, [*flags, f"-artifact_prefix={findings}/", "-print_final_stats=1"])
    log = findings.with_name(f"{args.target}.log")
    with open(log, "w") as file:
        command = [sys.executable, __file__, args.target, "--seconds", str(args.seconds), "--corpus", args.corpus]
        code = subprocess.run([*command, "--inside"], stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text(errors="replace")
    done = re.search(r"Done (\d+) runs in (\d+) second", text)
    if code or not done:
        sys.exit(f"the fuzzer ended with {code}, see {log}:\n{text[-3000:]}")
    covered = re.findall(r"cov: (\d+)", text)[-1]
    found = sorted(path.stem for path in findings.glob("*.txt"))
    print(f"{args.target}: {done[2]} s, {int(done[1]):,} executions, {covered} branches, "
          f"{len(list(corpus.iterdir()))} inputs in the corpus, {len(found)} findings {' '.join(found)}")  # fmt: skip
    sys.exit(len(found) > 0)


if __name__ == "__main__":
    main()

"""Labels -> the captions CSV."""

import csv
import functools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from captioner.bdd100k.frames import LabelOptions
from captioner.bdd100k.label_files import read_labels
from captioner.bdd100k.label_report import LabelReport
from captioner.bdd100k.parsing import is_readable
from captioner.bdd100k.wording import describe
from captioner.runtime.errors import UserError
from captioner.runtime.files import atomic_write, is_replaceable, write_json
from config import DEMO_DATA, DEMO_SCENES, PipelineConfig, SourceSettings, TrainConfig

CSV_HEADER = ["name", "raw_caption"]


def write_captions(path: Path, rows: Iterable[tuple[str, str]]) -> int:
    """Write (name, caption) rows as CSV, the caption always in quotes. Returns how many."""
    count = 0
    with atomic_write(path) as file:
        file.write(",".join(CSV_HEADER) + "\n")
        for name, caption in rows:
            file.write(f'{name},"{caption}"\n')  # neither can hold a quote: NAME and the caption grammar see to it
            count += 1
    return count


def check_replaceable(path: Path, flag: str) -> None:
    """Raise UserError if `path` is there and is no file that write_captions has written, which it would replace.

    `flag` is what led to the path.
    """
    if path.exists() and not (is_replaceable(path) and (not path.stat().st_size or _is_written(path))):
        raise UserError(f"{flag} {path}: is there, and is no file of captions made from labels; take another {flag}")


def _is_written(path: Path) -> bool:
    """Whether write_captions may have written all rows of a file: one that was edited is its editor's."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            return next(rows, None) == CSV_HEADER and all(len(row) == 2 and is_readable(row[1]) for row in rows)
    except (OSError, ValueError, csv.Error):
        return False


def find_labels(config: PipelineConfig | TrainConfig) -> Sequence[Path]:
    """The label files to read: those given, the drawn ones, or those of the Kaggle data set."""
    if config.source.labels:
        return config.source.labels
    if config.demo:
        # a process of its own: those that it starts in turn then import the renderer alone
        draw = [sys.executable, "-m", "demo.draw", "--count", str(DEMO_SCENES), "--out", DEMO_DATA.resolve()]
        how = {"cwd": Path(__file__).parents[2], "env": os.environ | {"PYTHONSAFEPATH": ""}}  # where demo/ is found
        if code := subprocess.run(draw, **how, check=False, stdout=subprocess.DEVNULL).returncode:
            why = "see above" if code > 0 else "killed, mostly for want of memory"
            raise UserError(f"{DEMO_DATA}: no scenes were drawn ({why}); start again, or from a folder of your own")
        return [DEMO_DATA / "labels.json"]
    from captioner.bdd100k.download import fetch_labels  # here: kagglehub takes a while to import

    return fetch_labels(config.source.kaggle_dataset, config.source.subset)


def caption_labels(source: SourceSettings, labels: Sequence[Path], output: Path, run_dir: Path) -> LabelReport:
    """Write the captions of all frames in `labels` to the CSV `output`, and print what was read.

    What the labels hold goes to `run_dir`/census.json.
    """
    options = LabelOptions(
        source.class_names, source.lanes, source.merge_duplicates, source.min_box_size, source.without_scene
    )
    report = LabelReport()
    write_captions(output, _caption_rows(source, labels, options, report))
    write_json(run_dir / "census.json", report.to_json())
    print(report)
    print(f"captions written to {output}, what the labels hold to {run_dir / 'census.json'}")
    return report


def _caption_rows(
    source: SourceSettings, labels, options: LabelOptions, report: LabelReport
) -> Iterator[tuple[str, str]]:
    for name, caption in read_labels(labels, report, options, convert=functools.partial(describe, style=source.style)):
        report.caption_words[caption.count(" ") + 1] += 1  # words are one space apart
        yield name, caption
    if source.strict and (report.skipped or report.remarks):
        raise UserError(
            f"--strict: {report.skipped.total():,} frames can't be used, {report.remarks.total():,} values are "
            f"unknown, nothing is written\n{report}"
        )

"""Labels -> the captions CSV, and the CSV read back."""

import csv
import functools
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from captioner.bdd100k.frames import NAME, LabelOptions
from captioner.bdd100k.label_files import read_labels
from captioner.bdd100k.label_report import LabelReport
from captioner.bdd100k.wording import describe
from captioner.runtime.errors import UserError
from captioner.runtime.files import atomic_write
from config import DEMO_DATA, DEMO_SCENES, PipelineConfig, SourceSettings, TrainConfig

CSV_HEADER = ["name", "raw_caption"]


class Example(NamedTuple):
    """An image and its caption."""

    name: str
    image: Path
    caption: str


def write_captions(path: Path, rows: Iterable[tuple[str, str]]) -> int:
    """Write (name, caption) rows as CSV, the caption always in quotes. Returns how many."""
    count = 0
    with atomic_write(path) as file:
        file.write(",".join(CSV_HEADER) + "\n")
        for name, caption in rows:
            file.write(f'{name},"{caption}"\n')  # neither can hold a quote: NAME and the caption grammar see to it
            count += 1
    return count


def read_captions(path: Path) -> dict[str, str]:
    """Read a captions CSV as {name: caption}."""
    if not path.is_file():
        raise UserError(f"{path}: no such captions file; write it with python bdd100k_data_pipeline.py --output {path}")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            if (header := next(reader, None)) != CSV_HEADER:
                raise UserError(f"{path}: its first line must be {','.join(CSV_HEADER)}, not {header}")
            captions = {}
            for row in reader:
                if len(row) != 2 or not NAME.fullmatch(row[0]) or row[0] in captions:
                    raise UserError(f"{path}, line {reader.line_num}: must be a new image name and a caption")
                captions[row[0]] = row[1]
            return captions
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV ({error})") from None


def find_labels(config: PipelineConfig | TrainConfig) -> Sequence[Path]:
    """The label files to read: those given, the drawn ones, or those of the Kaggle data set."""
    if config.source.labels:
        return config.source.labels
    if config.demo:
        # a process of its own: those that it starts in turn then import the renderer alone
        draw = [sys.executable, "-m", "demo.draw", "--count", str(DEMO_SCENES), "--out", DEMO_DATA.resolve()]
        if subprocess.run(draw, cwd=Path(__file__).parents[2], check=False, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"{DEMO_DATA}: the scenes can't be drawn there, see above; start from a folder of your own")
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
    with atomic_write(run_dir / "census.json") as file:
        json.dump(report.to_json(), file, indent=1)
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

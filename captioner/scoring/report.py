"""report.html: the scores, their intervals, and every image with its captions, in one file that loads nothing.

    write_report(Path("logs/run/report.html"), "200 test images", rows, images, scores)

report_template.html is the page. This module fills in what it shows, as JSON that the page's script puts on the screen
as text and never as HTML, and a policy under which the browser neither runs any other script nor asks for anything.
"""

import base64
import hashlib
import io
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps
from tqdm.contrib.concurrent import thread_map

from captioner.bdd100k.facts import Facts
from captioner.bdd100k.parsing import mark_caption, read_caption
from captioner.data.image_decoding import FORMATS, MAX_PIXELS
from captioner.runtime.errors import go_on_without
from captioner.runtime.files import atomic_write
from captioner.runtime.processes import count_all_cores
from captioner.scoring.fact_metrics import count_right
from captioner.scoring.grammar import find_facts
from captioner.scoring.headlines import HEADLINES, MORE, RANKED_BY, TEXT_HEADLINES
from captioner.scoring.predictions import Prediction
from captioner.scoring.scores import slice_names
from captioner.scoring.text_metrics import score_each_by_cider

TEMPLATE = Path(__file__).with_name("report_template.html")
JUDGED = (RANKED_BY, "time_of_day", "weather", "scene", "traffic_light", "objects_f1")  # what the verdict is about
VERDICTS = ("", "right", "wrong", "invented", "missing", "unread")
MAX_BYTES = 50_000_000  # of the whole file; the thumbnails take what the text leaves

# Longest side in pixels and JPEG quality of the thumbnails: the first of these that fits is taken.
SIDES = (480, 400, 320, 288, 256, 232, 208, 192, 176, 160, 144, 128, 112, 80)
QUALITIES = (80, 76, 72, 70, 68, 66, 64, 62, 60, 57, 54, 51, 48, 40)
THUMBNAILS = tuple(zip(SIDES, QUALITIES, strict=True))
SAMPLE = 48  # images by whose size it is judged whether all will fit

Pieces = list[tuple[str, str]]  # (text, verdict), one of VERDICTS; the texts together are the caption


class ReportRow(NamedTuple):
    """An image's captions, cut into pieces with verdicts. "invented" is for predictions, "missing" for references."""

    name: str
    prediction: Pieces
    references: list[Pieces]
    slices: dict[str, str]  # facts of the reference to filter by, such as {"weather": "rainy"}
    score: float | None  # F1 of the image's facts, 0 to 1, or its CIDEr-D, 0 to 10; None without a reference


class Thumbnails(NamedTuple):
    """Images in the order of the rows: base64 of a JPEG, or None."""

    images: list[str | None]
    side: int  # pixels of the longest side, at most
    quality: int  # JPEG's, 1 to 95
    no_room: int  # images left out because even the smallest thumbnails don't fit


def write_report(
    path: Path,
    title: str,
    rows: Sequence[ReportRow],
    images: Mapping[str, Path],
    scores: dict | None,
) -> int:
    """Write the page to `path` and return its size in bytes, which is MAX_BYTES at most unless the text alone is more.

    `images` is {row name: image file}; a row without one, or with one that can't be read, gets no image.
    `scores` is what eval.py writes to scores.json; None: a gallery of captions alone. Raises UserError when `path`
    can't be written, ValueError for a verdict that is not in VERDICTS and for NaN, which JSON has no word for.
    """
    paths = [images.get(row.name) for row in rows]
    report = {"title": title, "rows": [row_to_json(row) for row in rows], "scores": scores}
    report["headlines"] = [{"name": name, **headline._asdict()} for name, headline in (HEADLINES | MORE).items()]
    as_text = scores is not None and "facts" not in scores["scores"]
    report["judged"] = list(TEXT_HEADLINES) if as_text else JUDGED
    template = TEMPLATE.read_text(encoding="utf-8")
    values = {"POLICY": write_policy(template), "REPORT": to_script_json(report)}
    room = MAX_BYTES - len(template.encode()) - len(values["REPORT"]) - 6 * len(rows) - 2000  # 6: null, comma, space
    thumbnails = Thumbnails([None] * len(paths), 0, 0, no_room=0)
    with go_on_without(f"thumbnails in {path}"):
        thumbnails = make_thumbnails(paths, room)
    values["IMAGES"] = json.dumps(thumbnails.images)
    values["FILE"] = to_script_json(count_images(paths, thumbnails))
    size = len(fill_template(template, {**values, "BYTES": " " * 12}).encode())
    page = fill_template(template, {**values, "BYTES": f"{size:12}"})
    with atomic_write(path) as file:
        file.write(page)
    return size


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """`template` with each %%NAME%% replaced by its value. In one pass: a value that looks like a name stays."""
    return re.sub(r"%%([A-Z]+)%%", lambda match: values[match[1]], template)


def write_policy(template: str) -> str:
    """The Content-Security-Policy of the page: its own style and script by their hashes, images in it, no more."""
    [style] = re.findall(r"<style>(.*?)</style>", template, re.DOTALL)
    [script] = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


# --------------------------------------------------------------------------------------------------------------
# text


def row_to_json(row: ReportRow) -> dict:
    prediction, references = pieces_to_json(row.prediction), [pieces_to_json(pieces) for pieces in row.references]
    return row._replace(prediction=prediction, references=references)._asdict()


def pieces_to_json(pieces: Pieces) -> list:
    """[text, verdict] of each piece; of a plain piece the text alone, as most pieces are plain."""
    if unknown := {verdict for _, verdict in pieces}.difference(VERDICTS):
        raise ValueError(f"{sorted(unknown)}: a verdict is one of {VERDICTS}")
    return [[text, verdict] if verdict else text for text, verdict in pieces]


def to_script_json(value) -> str:
    """JSON that can stand in a <script> element whatever its strings hold; pure ASCII, so lone surrogates are fine."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # U+2028 and U+2029 are escaped like all non-ASCII
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# --------------------------------------------------------------------------------------------------------------
# images


def make_thumbnails(paths: Sequence[Path | None], room: int) -> Thumbnails:
    """Thumbnails of the images, as large as go into `room` bytes together. An image that can't be read is None."""
    found = [path for path in paths if path is not None]
    sample = random.Random(0).sample(found, min(SAMPLE, len(found)))
    for side, quality in THUMBNAILS:
        sizes = [len(make_thumbnail(path, side, quality) or "") for path in sample]
        expected = sum(sizes) / max(len(sizes), 1) * len(found)
        if expected > 0.97 * room and (side, quality) != THUMBNAILS[-1]:
            continue
        made = make_all_thumbnails(paths, side, quality)
        if sum(len(image or "") for image in made) <= room:
            break
    images = keep_first(made, room)
    return Thumbnails(images, side, quality, no_room=images.count(None) - made.count(None))


def make_all_thumbnails(paths: Sequence[Path | None], side: int, quality: int) -> list[str | None]:
    def make(path: Path | None) -> str | None:
        return None if path is None else make_thumbnail(path, side, quality)

    # threads are enough: Pillow releases Python's lock while it decodes
    return thread_map(make, paths, max_workers=count_all_cores(), desc="thumbnails", unit="image")


def make_thumbnail(path: Path, side: int, quality: int) -> str | None:
    """Base64 of a JPEG with no side longer than `side`, upright, without metadata; None when it can't be read."""
    buffer = io.BytesIO()
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            scale = min(1, side / max(image.size))
            image.draft("RGB", [math.ceil(scale * length) for length in image.size])  # decoded at 1/8 to 1/2, if enough
            image.load()
        small = image if image.mode == "RGB" else image.convert("RGB")  # convert() copies in any case
        small.thumbnail((side, side))
        ImageOps.exif_transpose(small, in_place=True)
        small.info = {}  # a comment would be copied
        small.save(buffer, "JPEG", quality=quality, optimize=True)
    except Exception:  # Pillow raises all sorts for broken files, and no image is worth the report
        return None
    return base64.b64encode(buffer.getvalue()).decode()


def keep_first(images: list[str | None], room: int) -> list[str | None]:
    """The images up to where `room` bytes are full, None for the others."""
    kept = []
    for image in images:
        room -= len(image or "")
        kept.append(image if room >= 0 else None)
    return kept


def count_images(paths: Sequence[Path | None], thumbnails: Thumbnails) -> dict[str, int]:
    """What the page's last lines tell of its images."""
    missing, no_file = thumbnails.images.count(None), paths.count(None)
    return {
        "shown": len(paths) - missing,
        "no_file": no_file,
        "no_room": thumbnails.no_room,
        "unreadable": missing - no_file - thumbnails.no_room,
        "side": thumbnails.side,
        "quality": thumbnails.quality,
    }


def make_rows(predictions: Sequence[Prediction], facts: Sequence[Facts] | None) -> list[ReportRow]:
    """The report's cards; without facts the captions are plain text, scored by CIDEr-D."""
    if facts is None:
        return make_text_rows(predictions)
    rows = []
    for prediction, expected in zip(predictions, facts, strict=True):
        reading = read_caption(prediction.prediction)
        marked = mark_caption(prediction.prediction, expected, "invented")
        references = [mark_caption(text, reading.facts, "missing") for text in prediction.references]
        right, said, there = count_right(reading, expected)
        score = 2 * right / (said + there) if there else None
        rows.append(ReportRow(prediction.name, marked, references, slice_names(expected), score))
    return rows


def make_text_rows(predictions: Sequence[Prediction]) -> list[ReportRow]:
    scores = score_each_by_cider([row.prediction for row in predictions], [row.references for row in predictions])
    return [
        ReportRow(row.name, [(row.prediction, "")], [[(text, "")] for text in row.references], {}, score)
        for row, score in zip(predictions, scores, strict=True)
    ]


def make_gallery(captions: Mapping[str, str]) -> list[ReportRow]:
    """The cards of captions that have no reference."""
    if find_facts(list(captions.values())) is None:
        return [ReportRow(name, [(text, "")], [], {}, None) for name, text in captions.items()]
    return [ReportRow(name, mark_caption(text, Facts(), ""), [], {}, None) for name, text in captions.items()]

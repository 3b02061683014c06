"""The images that README.md and docs/ show, made of a run."""

import shutil
from pathlib import Path

import pytest
from conftest import skip_without
from PIL import Image

from captioner.bdd100k.parsing import parse_caption
from captioner.runtime.errors import UserError
from captioner.scoring.predictions import Prediction
from captioner.scoring.report import make_rows, write_report
from captioner.scoring.scores import score_predictions
from demo import screenshots
from demo.screenshots import EXAMPLES, HEIGHT, SCALE, SHOWN, WIDTH, Runs

SAID = "It is a night scene in clear weather on a highway road. There are 3 cars."


def test_images_of_the_page_are_made_of_a_run(folder, monkeypatch):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        skip_without("browser", "no chromium or no chromedriver on this machine")
    runs, names = Runs(Path("logs/a"), Path("logs/b")), [*SHOWN, *(f"{n}.jpg" for n in range(20))]
    made = folder / "examples"
    monkeypatch.setattr(screenshots, "EXAMPLES", made)
    made.mkdir()
    with pytest.raises(UserError, match=r"logs/a/dashboard\.png: is missing"):
        screenshots.main(runs)
    for run in (runs.training, runs.evaluation):
        run.mkdir(parents=True)
    (runs.training / "dashboard.png").write_bytes(b"curves")
    rows = [Prediction(name, SAID, [SAID]) for name in names]
    scores = score_predictions(rows, {}, resamples=5)
    images = {name: EXAMPLES / name for name in SHOWN}
    shown = make_rows(rows, [parse_caption(SAID)] * len(rows))
    write_report(runs.evaluation / "report.html", "title", shown, images, scores)
    screenshots.main(runs)
    assert (made / "dashboard.png").read_bytes() == b"curves"
    with Image.open(made / "report.jpg") as report, Image.open(made / "captions.jpg") as captions:
        assert report.size == (WIDTH * SCALE, HEIGHT * SCALE)
        assert 0.8 * report.width < captions.width <= report.width and captions.height < report.height

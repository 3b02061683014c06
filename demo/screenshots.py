"""Make what README.md and docs/ show of the demo anew: report.jpg, captions.jpg and dashboard.png of demo/examples.

    python main.py --demo --run-name demo
    python eval.py --demo --num-samples all --run-name demo-eval
    python -m demo.screenshots

It needs chromium, chromedriver and selenium (requirements-dev.txt). Look at the images before they are committed.
"""

import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

from captioner.runtime.errors import UserError

EXAMPLES = Path(__file__).parent / "examples"
SHOWN = ("f5f5b54b-6db44caa.jpg", "9e657e17-79d6eaa2.jpg", "4699a1b9-788181d3.jpg")  # in captions.jpg
WIDTH, HEIGHT, SCALE = 1300, 1120, 1.25  # of the view in CSS pixels, and image pixels for each of them
QUALITY = 82  # of JPEG
# Leaves of the page the cards of some images, without their heads, and the legend.
SHOW_CARDS = """
const picks = make("div", "picks", ...arguments[0].map((name) => makePick(rows.findIndex((row) => row.name === name))));
for (const head of picks.querySelectorAll(".head")) head.remove();
byId("legend").before(picks);
for (const part of document.querySelectorAll("header, footer, section")) part.remove();
document.querySelector("main").style.padding = "0.3rem 0.6rem";
document.querySelector(".page").style.padding = 0;
document.body.style.background = "white";
"""


@dataclass(frozen=True)
class Runs:
    """The folders in logs/ that the images are made of."""

    training: Path = Path("logs/demo")  # of main.py --demo
    evaluation: Path = Path("logs/demo-eval")  # of eval.py --demo --num-samples all


def open_browser(*flags: str, **capabilities):
    """A headless Chromium, driven by selenium."""
    from selenium import webdriver  # here: of requirements-dev.txt

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *flags):
        options.add_argument(flag)
    for name, value in capabilities.items():
        options.set_capability(name, value)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def save_jpeg(png: bytes, path: Path) -> None:
    Image.open(io.BytesIO(png)).convert("RGB").save(path, quality=QUALITY, optimize=True)


def main(runs: Runs) -> None:
    dashboard, report = runs.training / "dashboard.png", runs.evaluation / "report.html"
    for file in (dashboard, report):
        if not file.is_file():
            raise UserError(f"{file}: is missing; run what python -m demo.screenshots --help says first")
    shutil.copyfile(dashboard, EXAMPLES / dashboard.name)
    browser = open_browser("--hide-scrollbars")
    try:
        view = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": SCALE, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
        browser.get(report.resolve().as_uri())
        save_jpeg(browser.get_screenshot_as_png(), EXAMPLES / "report.jpg")
        browser.execute_script(SHOW_CARDS, SHOWN)
        save_jpeg(browser.find_element("tag name", "main").screenshot_as_png, EXAMPLES / "captions.jpg")
    finally:
        browser.quit()


if __name__ == "__main__":
    from captioner.runtime.cli import run_script

    run_script(main, tyro.cli(Runs, description=__doc__))

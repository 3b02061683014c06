"""The page on which a model is tried: what it shows, and the whole of it in a real browser."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import ROOT

from captioner.runtime.errors import UserError
from demo.app import MAX_IMAGES, Page, show_description
from demo.space import write_space

HAS_GRADIO = importlib.util.find_spec("gradio") is not None
PORT = 17860


class FakeCaptioner:
    """Stands in for what load_captioner gives: the same caption for each image."""

    seed = 42

    def describe(self, images, greedy=True, finetuned=True, temperature=0.7):
        parts = [SimpleNamespace(text="There is <b>one</b> car.", certainty=0.8 if finetuned else 0.2)]
        one = SimpleNamespace(text=parts[0].text, sentences=parts)
        return [one] * len(images) if isinstance(images, list) else one


def test_sentences_are_coloured_by_their_certainty_and_escaped():
    after, before = (show_description(FakeCaptioner().describe("a", finetuned=tuned)) for tuned in (True, False))
    assert "--sure: 60%" in after and "0.80" in after and "--sure: 0%" in before
    assert "&lt;b&gt;" in after and "<b>" not in after


def test_a_file_that_is_no_image_gets_an_error_without_folders(drawn, tmp_path):
    hostile = tmp_path / "scene.jpg"
    hostile.write_bytes(b"GIF89a" + bytes(100))
    image, after, before = Page(FakeCaptioner()).try_image(str(hostile), "greedy", 0.7, 1)
    assert image is None and before == "" and "scene.jpg: not readable" in after and str(tmp_path) not in after
    good = str(sorted((drawn / "images").iterdir())[0])
    image, after, before = Page(FakeCaptioner()).try_image(good, "sampled", 0.7, 1)
    assert image.size and "0.80" in after and "0.20" in before


def test_a_folder_becomes_a_table_and_its_bad_files_are_listed(drawn, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    paths = [str(path) for path in sorted((drawn / "images").iterdir())[:3]] + [str(tmp_path / "notes.txt")]
    told, rows, table = Page(FakeCaptioner()).try_folder(paths, "greedy", 0.7, 1)
    assert "3 captions" in told and told.count('role="alert"') == 1 and "notes.txt" in told
    assert [row[2] for row in rows] == ["0.80"] * 3
    assert len(Path(table).read_text().splitlines()) == 4
    assert Page(FakeCaptioner()).try_folder(None, "greedy", 0.7, 1)[1:] == ([], None)
    many = Page(FakeCaptioner()).try_folder(paths[:1] * (MAX_IMAGES + 1), "greedy", 0.7, 1)
    assert len(many[1]) == MAX_IMAGES and f"the first {MAX_IMAGES}" in many[0]


def test_a_folder_is_sampled_as_the_fields_say(drawn):
    """With the seed of the page, not with the one that an image before had; an emptied field is 0."""
    path, asked = str(sorted((drawn / "images").iterdir())[0]), []

    class Captioner(FakeCaptioner):
        def describe(self, images, **options):
            asked.append((self.seed, options["greedy"], options["temperature"]))
            return super().describe(images, **options)

    page = Page(Captioner())
    page.try_folder([path], "sampled", 0.3, 7)
    page.try_image(path, "sampled", 0.4, None)
    assert asked == [(7, False, 0.3), (0, False, 0.4), (0, False, 0.4)]


def test_a_space_holds_all_that_it_needs_and_no_path_of_this_machine(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "6.31.0")
    folder = undisturbed[1]
    adapter = folder / "blip2-finetuned"
    write_space(adapter, tmp_path / "space")
    files = {str(path.relative_to(tmp_path / "space")) for path in (tmp_path / "space").rglob("*") if path.is_file()}
    assert {"app.py", "README.md", "requirements.txt", "config.py", "demo/app.py", "adapter/run.json"} <= files
    assert not any("__pycache__" in name or "split.csv" in name for name in files)
    base = json.loads((tmp_path / "space/adapter/run.json").read_text())["config"]["model"]
    assert (tmp_path / "space" / base / "config.json").is_file()
    head = (tmp_path / "space" / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in head and "sdk_version: 6.31.0" in head and "app_file: app.py" in head
    texts = [path.read_text() for path in (tmp_path / "space/adapter").glob("*.json")]
    assert not any(str(folder) in text for text in texts)
    with pytest.raises(UserError, match="is there already"):
        write_space(adapter, tmp_path / "space")
    with pytest.raises(UserError, match="no fine-tuned model"):
        write_space(tmp_path, tmp_path / "other")


def test_a_space_that_fails_leaves_nothing_behind(undisturbed, tmp_path, monkeypatch):
    """Without gradio, with a record that can't be read, on a full disk, by Ctrl-C."""
    adapter, space = tmp_path / "adapter", tmp_path / "spaces/mine"
    shutil.copytree(undisturbed[1] / "blip2-finetuned", adapter)
    space.parent.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.distribution", hide_package)
        with pytest.raises(UserError, match=r"--space: .* gradio, .*: pip install -r requirements-app\.txt"):
            write_space(adapter, space)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "6.31.0")
    (adapter / "scores.json").write_text("{")
    with pytest.raises(UserError, match=r"scores\.json: can't be read"):
        write_space(adapter, space)
    (adapter / "scores.json").unlink()
    for failure, told in ((OSError("full"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):
        monkeypatch.setattr("demo.space.stage_files", Mock(side_effect=failure))
        with pytest.raises(told):
            write_space(adapter, space)
    assert not list(space.parent.iterdir())


def hide_package(name):
    raise PackageNotFoundError(name)


def test_without_gradio_the_remedy_is_told(tmp_path):
    code = "import sys; sys.modules['gradio'] = None; from demo.app import *; serve(AppConfig())"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "UserError: the page needs gradio: pip install -r requirements-app.txt" in ended.stderr


# --------------------------------------------------------------------------------------------------------------
# in a browser


@pytest.fixture(scope="module")
def page(undisturbed, browser):
    """Address of the page, served by a process of its own with the tests' tiny adapter."""
    if not HAS_GRADIO:
        pytest.skip("gradio is not installed: pip install -r requirements-app.txt")
    adapter = undisturbed[1] / "blip2-finetuned"
    command = [sys.executable, "-m", "demo.app", "--adapter", str(adapter), "--port", str(PORT)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--max-upload-mb", "1"], cwd=undisturbed[1], env=environment, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "Running on local URL" in line:
            break
    yield f"http://127.0.0.1:{PORT}"
    process.terminate()
    process.wait(30)
    process.stdout.close()


def wait_for(browser, selector: str, text: str, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while True:
        found = browser.execute_script(
            "return document.querySelector(arguments[0])?.textContent.toWellFormed() ?? ''", selector
        )
        if text in found:
            return found
        assert time.monotonic() < end, f"{selector}: {found[:300]!r}"
        time.sleep(0.2)


def upload(browser, path: Path) -> None:
    from selenium.webdriver.common.by import By

    end = time.monotonic() + 30
    while not (inputs := browser.find_elements(By.CSS_SELECTOR, "#upload input[type=file]")):
        for button in browser.find_elements(
            By.CSS_SELECTOR, "#upload button[aria-label*=lear], #upload button[title*=lear]"
        ):
            button.click()
        assert time.monotonic() < end, "no place to upload to"
        time.sleep(0.2)
    inputs[0].send_keys(str(path))


def test_an_upload_is_captioned_and_a_hostile_file_gets_a_clear_error(browser, page, drawn, tmp_path):
    hostile, large = tmp_path / "hostile.jpg", tmp_path / "large.jpg"
    hostile.write_bytes(b"<svg onload='window.broken = 1'>" + bytes(1000))
    large.write_bytes(bytes(2 * 2**20))
    browser.get(page)
    wait_for(browser, "body", "drop or pick an image")
    upload(browser, sorted((drawn / "images").iterdir())[0])
    wait_for(browser, "#after .said", "0.")
    wait_for(browser, "#before .said", "0.")
    browser.execute_script("document.querySelector('#examples button img').click()")
    end = time.monotonic() + 60
    while "4699a1b9" not in browser.execute_script("return document.querySelector('#upload').textContent"):
        assert time.monotonic() < end, "an example is picked"
        time.sleep(0.2)
    upload(browser, hostile)
    assert "hostile.jpg: not readable as an image" in wait_for(browser, "#after", "hostile.jpg")
    assert browser.execute_script("return window.broken ?? 0") == 0
    upload(browser, large)
    wait_for(browser, "#upload", "Error")
    assert "at most 1 MB" in wait_for(browser, "#upload", "drop or pick")

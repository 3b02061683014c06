"""The report: what is in the file, and the page in a real browser."""

import base64
import io
import json
import re
import time
from collections.abc import Callable

import pytest
from PIL import Image

from captioner.runtime.errors import UserError
from captioner.scoring import report
from captioner.scoring.predictions import Prediction
from captioner.scoring.report import (
    MAX_BYTES,
    ReportRow,
    make_gallery,
    make_rows,
    make_thumbnail,
    make_thumbnails,
    to_script_json,
    write_report,
)
from captioner.scoring.scores import score_predictions

SCRIPT = "<script>window.broken = 1</script>"
IMAGE_TAG = '"><img src=x onerror="window.broken = 1">'


def make_row(number: int, verdict: str = "right", score: float | None = None, **slices: str) -> ReportRow:
    prediction = [("It is a ", ""), ("night", verdict if verdict != "missing" else "right"), (" scene.", "")]
    reference = [("It is a ", ""), ("night", verdict if verdict in ("wrong", "missing") else "right"), (" scene.", "")]
    return ReportRow(f"{number:05d}.jpg", prediction, [reference], slices, score)


def make_free_prediction(number: int) -> Prediction:
    """A caption in words of its own, which is like a reference of each image but the first four."""
    references = [f"A red car number {number} waits at the lights.", f"One car stands still, the number {number}."]
    return Prediction(f"{number:05d}.jpg", "No idea." if number < 4 else references[number % 2], references)


def read_block(page: str, name: str):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)[1])


def figure(value: float | None, half_width: float = 0.01) -> dict:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - half_width, "high": value + half_width}


def make_scores() -> dict:
    tree = {
        "facts": {"facts_f1": figure(0.8123), "weather": figure(0.8123, 0.06), "whole_caption": figure(None)},
        "cider_d": {"CIDEr-D": figure(6.5)},
        "classes": {"car": {"exact": figure(0.5), "bias": figure(-0.25)}, "bus": {}},
    }
    return {
        "n": 6,
        "resamples": 1000,
        "bootstrap_seed": 12345,
        "distinct_predictions": 2,
        "notes": [SCRIPT],
        "scores": tree,
        "floors": {"most frequent caption": {"facts": {"facts_f1": figure(0.4)}}, "best constant caption": {}},
        "published": [{"what": "weather", "value": 0.82, "text": "82 %: a classifier", "source": "somebody"}],
        "confusion": {"weather": {"labels": ["clear", "rainy"], "counts": [[3, 1], [0, 0]]}},
        "slices": [{"by": "weather", "value": "rainy", "n": 2, "scores": {"facts_f1": figure(0.5)}}],
        "signatures": {"corpus_bleu": "level:corpus|tok:coco"},
        "left_out": {"no image": 1},
    }


# --------------------------------------------------------------------------------------------------------------
# the file


def test_script_json_holds_nothing_that_html_or_json_may_stumble_over():
    text = to_script_json([f"</script>{SCRIPT}<!-- & \u2028\u2029 é", "\ud800"])
    assert text.isascii() and not set(text) & set("<>&")
    assert json.loads(text) == [f"</script>{SCRIPT}<!-- & \u2028\u2029 é", "\ud800"]
    with pytest.raises(ValueError):
        to_script_json(float("nan"))


def test_text_from_outside_is_only_in_the_json(tmp_path):
    row = ReportRow(SCRIPT, [(IMAGE_TAG, ""), ("%%IMAGES%%", "wrong")], [[(SCRIPT, "")]], {SCRIPT: IMAGE_TAG}, 0.5)
    size = write_report(tmp_path / "report.html", SCRIPT, [row], {}, None)
    page = (tmp_path / "report.html").read_bytes().decode()
    assert size == len(page.encode()) == read_block(page, "size-data")
    assert SCRIPT not in page and IMAGE_TAG not in page
    data = read_block(page, "report-data")
    assert data["title"] == SCRIPT and data["rows"][0]["prediction"] == [IMAGE_TAG, ["%%IMAGES%%", "wrong"]]
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)


def test_lone_surrogates_are_written(tmp_path):
    row = ReportRow("\udcff.jpg", [("a \ud83d car", "wrong")], [], {"weather": "\udfff"}, None)
    write_report(tmp_path / "report.html", "\ud800", [row], {}, None)
    rows = read_block((tmp_path / "report.html").read_text(encoding="utf-8"), "report-data")["rows"]
    assert rows[0]["name"] == "\udcff.jpg" and rows[0]["prediction"] == [["a \ud83d car", "wrong"]]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="rihgt"):
        write_report(tmp_path / "report.html", "", [make_row(0, "rihgt")], {}, None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        write_report(tmp_path / "file" / "report.html", "", [], {}, None)
    assert not (tmp_path / "report.html").exists()


def test_images_that_are_not_there_or_broken_are_counted(drawn, tmp_path):
    good = sorted((drawn / "images").iterdir())
    (tmp_path / "broken.jpg").write_bytes(good[0].read_bytes()[:400])
    (tmp_path / "text.jpg").write_text("no image")
    images = dict(zip([f"{n:05d}.jpg" for n in range(5)], [*good[:2], tmp_path / "broken.jpg", tmp_path], strict=False))
    images |= {"00004.jpg": tmp_path / "text.jpg", "00005.jpg": tmp_path / "nowhere.jpg", "of no row": good[0]}
    write_report(tmp_path / "report.html", "", [make_row(n) for n in range(8)], images, None)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    counts = read_block(page, "file-data")
    assert [counts[key] for key in ("shown", "no_file", "unreadable", "no_room")] == [2, 2, 4, 0]
    assert [image is not None for image in read_block(page, "image-data")] == [True] * 2 + [False] * 6


def test_a_report_is_written_without_thumbnails_that_fail(drawn, tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(report, "make_thumbnails", fail)
    image = next((drawn / "images").iterdir())
    path = tmp_path / "report.html"
    report.write_report(path, "t", [ReportRow("a", [("A car.", "")], [], {}, None)], {"a": image}, None)
    assert "A car." in path.read_text()
    assert capsys.readouterr().out == f"note: no thumbnails in {path} (can't start new thread)\n"


def test_thumbnails_are_upright_and_bare(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated by 90 degrees
    Image.new("RGB", (1280, 720), "red").save(tmp_path / "turned.jpg", exif=exif, comment=b"secret")
    Image.new("RGBA", (90, 40), "red").save(tmp_path / "small.png")
    turned = base64.b64decode(make_thumbnail(tmp_path / "turned.jpg", 320, 80))
    with Image.open(io.BytesIO(turned)) as image:
        assert image.size == (180, 320) and not image.getexif() and b"secret" not in turned
    with Image.open(io.BytesIO(base64.b64decode(make_thumbnail(tmp_path / "small.png", 320, 80)))) as image:
        assert image.size == (90, 40), "never enlarged"


def test_thumbnails_shrink_until_they_fit(drawn):
    paths = sorted((drawn / "images").iterdir())
    large = make_thumbnails(paths, 10**9)
    assert (large.side, large.quality) == report.THUMBNAILS[0] and None not in large.images
    half = sum(map(len, large.images)) // 2
    small = make_thumbnails(paths, half)
    assert small.side < large.side and None not in small.images and sum(map(len, small.images)) <= half
    some = make_thumbnails([*paths, None], 5000)
    assert some.side == report.THUMBNAILS[-1][0] and 0 < some.no_room < len(paths)
    assert sum(len(image or "") for image in some.images) <= 5000


def test_the_whole_file_keeps_to_its_budget(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_BYTES", 400_000)
    paths = sorted((drawn / "images").iterdir())
    rows = [make_row(n) for n in range(200)]
    images = {row.name: paths[n % len(paths)] for n, row in enumerate(rows)}
    size = write_report(tmp_path / "report.html", "", rows, images, None)
    assert 200_000 < size == (tmp_path / "report.html").stat().st_size <= 400_000 < MAX_BYTES
    assert read_block((tmp_path / "report.html").read_text(encoding="utf-8"), "file-data")["shown"] == 200


# --------------------------------------------------------------------------------------------------------------
# the page


@pytest.fixture(scope="module")
def pages(drawn, tmp_path_factory):
    """Folder with small.html, of six rows and scores, own.html, without references, and many.html, of 10,000 rows."""
    folder = tmp_path_factory.mktemp("pages")
    rows = [
        make_row(0, "right", 1.0, weather="clear", objects="10-19"),
        make_row(1, "wrong", 0.2, weather="clear", objects="5-9"),
        make_row(2, "invented", 0.5, weather="rainy", objects="5-9"),
        make_row(3, "missing", 0.4, weather="rainy", objects="0-4"),
        make_row(4, "unread", None, weather="", objects="0-4"),
        ReportRow(
            SCRIPT, [(IMAGE_TAG, "invented"), (" \ud800", "")], [[(SCRIPT, "missing")]] * 2, {"scene": SCRIPT}, 0.3
        ),
    ]
    paths = sorted((drawn / "images").iterdir())
    images = {row.name: path for row, path in zip(rows[:5], paths, strict=False)}
    write_report(folder / "small.html", IMAGE_TAG, rows, images, make_scores())
    own = [ReportRow(row.name, row.prediction, [], {}, None) for row in rows[4:]]
    write_report(folder / "own.html", "own images", own, images, None)
    scores = make_scores()
    scores["scores"]["facts"]["traffic_light"] = figure(0.5)
    scores["floors"]["most frequent caption"]["facts"]["traffic_light"] = figure(0.6)
    write_report(folder / "whole.html", "whole", [make_row(n, "right", n / 20) for n in range(20)], {}, scores)
    free = [make_free_prediction(n) for n in range(24)]
    write_report(folder / "free.html", "free", make_rows(free, None), {}, score_predictions(free, {}, resamples=50))
    many = [make_row(n, "wrong" if n % 2 else "right", n / 10_000, weather="clear") for n in range(10_000)]
    write_report(folder / "many.html", "many", many, {}, None)
    return folder


def open_page(browser, path, width: int = 1200) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())
    script = "return document.readyState === 'complete' && document.getElementById('footer')?.textContent !== ''"
    WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(script))


def read_texts(browser, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return browser.execute_script(script, selector)


def read_names(browser) -> list[str]:
    return read_texts(browser, ".card .name")


def list_sections(browser) -> list[str]:
    """The sections that are shown."""
    script = "return [...document.querySelectorAll('main > section:not([hidden])')].map((e) => e.id)"
    return browser.execute_script(script)


def set_value(browser, selector: str, value: str) -> None:
    """Choose the option, or type the text, as the user would."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    element = browser.find_element(By.CSS_SELECTOR, selector)
    if element.tag_name == "select":
        Select(element).select_by_value(value)
    else:
        element.clear()
        element.send_keys(value)


def press(browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser, duration=0).send_keys(*keys).perform()


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 5) -> None:
    """Browsers tell a page of a closed dialog a moment after they closed it."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def focused_name(browser) -> str | None:
    return browser.execute_script("return document.activeElement.querySelector('.name')?.textContent")


def test_nothing_from_outside_runs_and_nothing_is_fetched(browser, pages):
    open_page(browser, pages / "small.html")
    press(browser, "/", "<script>")
    assert read_names(browser) == [SCRIPT]
    assert read_texts(browser, ".card .fact") == [IMAGE_TAG, SCRIPT, SCRIPT]
    assert [browser.title] == read_texts(browser, "h1") == [IMAGE_TAG]
    assert SCRIPT in read_texts(browser, "#notes")[0]
    broken = "return [window.broken ?? 0, document.querySelectorAll('img[src=x]').length]"
    assert browser.execute_script(broken) == [0, 0]

    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith(("file:", "data:")) for url in asked), asked


def test_the_policy_stops_requests_and_other_scripts(browser, pages):
    open_page(browser, pages / "small.html")
    browser.execute_script(
        """window.blocked = [];
        document.addEventListener("securitypolicyviolation", (event) => window.blocked.push(event.effectiveDirective));
        fetch("http://127.0.0.1:9/").catch(() => null);
        document.body.append(Object.assign(new Image(), {src: "http://127.0.0.1:9/x.png"}));
        document.body.append(Object.assign(document.createElement("script"), {textContent: "window.broken = 1"}));"""
    )
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(lambda driver: len(driver.execute_script("return window.blocked")) >= 3)
    blocked = browser.execute_script("return window.blocked.sort()")
    assert blocked == ["connect-src", "img-src", "script-src-elem"]
    assert browser.execute_script("return window.broken ?? 0") == 0


def test_filters_search_and_order_work(browser, pages):
    open_page(browser, pages / "small.html")
    assert read_texts(browser, ".tally") == [
        "1 wrong",
        "1 invented · 1 missing",
        "1 missing",
        "1 invented",
        "all right",
        "1 unread",
    ]
    numbers = [name if name == SCRIPT else name.removesuffix(".jpg").lstrip("0") or "0" for name in read_names(browser)]
    assert numbers == ["1", SCRIPT, "3", "2", "0", "4"], "worst first, those without a score last"
    for selector, value, count in [
        ("[data-facet=weather]", "=clear", 2),
        ("[data-facet=objects]", "=5-9", 1),
        ("#error", "wrong", 1),
        ("#error", "all right", 0),
    ]:
        set_value(browser, selector, value)
        assert len(read_names(browser)) == count, (selector, value)
    assert browser.execute_script("return document.getElementById('empty').hidden") is False
    browser.execute_script("document.getElementById('reset').click()")
    errors = {"wrong": 1, "invented": 2, "missing": 2, "unread": 1, "all right": 1, "": 6}
    for error, count in errors.items():
        set_value(browser, "#error", error)
        assert len(read_names(browser)) == count, error
    set_value(browser, "[data-facet=weather]", "=")
    assert read_names(browser) == ["00004.jpg"], "an empty value is a value"
    browser.execute_script("document.getElementById('reset').click()")
    set_value(browser, "#order", "best first")
    assert read_names(browser)[0] == "00000.jpg" and read_names(browser)[-1] == "00004.jpg"
    set_value(browser, "#order", "by name")
    assert read_names(browser)[-1] == "00004.jpg"
    set_value(browser, "#search", "NIGHT 00003")
    assert read_names(browser) == ["00003.jpg"]
    browser.execute_script("document.querySelector('#slice-plot button').click()")
    assert sorted(read_names(browser)) == ["00002.jpg", "00003.jpg"], "a slice's name shows its images"


def test_the_keyboard_is_enough(browser, pages):
    open_page(browser, pages / "small.html")
    set_value(browser, "#order", "by name")
    press(browser, "\ue00c", "\ue004", "\ue004")  # Escape, then Tab to the button and on to the feed
    order = read_names(browser)
    assert focused_name(browser) == order[0]
    for key, position in [("j", 1), ("\ue014", 2), ("k", 1), ("\ue012", 0), ("k", 0), ("\ue010", 5), ("\ue011", 0)]:
        press(browser, key)
        assert focused_name(browser) == order[position], (key, position)
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"

    dialog = "const d = document.getElementById('dialog'); return [d.open, d.querySelector('.name')?.textContent]"
    press(browser, "j", "\ue007")
    assert browser.execute_script(dialog) == [True, order[1]]
    press(browser, "j")
    assert browser.execute_script(dialog) == [True, order[2]]
    press(browser, "\ue00c")
    assert browser.execute_script(dialog)[0] is False
    wait_until(lambda: focused_name(browser) == order[2], "the focus is on the card that was last shown")
    assert browser.get_log("browser") == []


def test_scores_are_shown_as_precisely_as_they_are_known(browser, pages):
    open_page(browser, pages / "small.html")
    values = read_texts(browser, "#headline tbody td")
    assert values[:3] == ["0.812[0.802, 0.822]", "0.400", "–"]
    assert values[3] == "0.81[0.75, 0.87]" and values[6] == "–"
    assert "−0.250[−0.260, −0.240]" in read_texts(browser, "#class-table td")
    assert read_texts(browser, "#matrices tbody td") == ["3", "1", "4", "0", "0", "0"]
    assert "somebody" in read_texts(browser, "#published-table td")
    assert len(read_texts(browser, "#headline-plot .dot")) == 3 + 1  # and the key
    assert read_texts(browser, "#notes li")[1:] == ["left out, no image: 1"]
    [footer] = read_texts(browser, "#footer")
    assert "6 images, 5 shown" in footer and "this file: " in footer


def test_the_page_begins_with_a_verdict_in_words(browser, pages):
    open_page(browser, pages / "whole.html")
    assert read_texts(browser, "#verdict") == [
        "Facts F1 is 0.81 (95 % interval 0.80 to 0.82); a caption written without seeing the image reaches 0.40 at "
        "best (most frequent caption). The captions are better than every floor. Not clearly above the best floor: "
        "traffic light."
    ]
    open_page(browser, pages / "many.html")
    assert browser.execute_script("return document.getElementById('verdict').hidden"), "no scores, no verdict"


def test_free_captions_are_judged_by_their_text_alone(browser, pages):
    open_page(browser, pages / "free.html")
    [verdict] = read_texts(browser, "#verdict")
    figure = r"CIDEr-D is \d\.\d\d \(95 % interval \d\.\d\d to \d\.\d\d\); a caption written without seeing the image "
    assert re.fullmatch(
        figure + r"reaches \d\.\d\d at best \(.*\)\. The captions are better than every floor\. "
        r"Not clearly above the best floor: ROUGE-L.*\.",
        verdict,
    )
    assert list_sections(browser) == ["worst", "random", "scores", "how", "images"]
    assert read_texts(browser, "#worst-lead") == ["Those least like their references, going by CIDEr-D."]
    assert read_texts(browser, "#worst .name")[:4] == [f"{n:05d}.jpg" for n in range(4)]
    assert read_texts(browser, "#worst .score")[0] == "CIDEr-D 0.00"
    assert read_texts(browser, "#headline tbody th")[:3] == [
        "BLEU-4words in sequence",
        "CIDEr-Drare words in sequence; 0 to 10",
        "ROUGE-Llongest common subsequence",
    ]
    assert not read_texts(browser, ".fact, .tally, #legend li, #tools [data-facet]")
    assert browser.execute_script("return document.getElementById('error-label').hidden")
    assert read_texts(browser, ".card .role")[:3] == ["prediction", "reference 1", "reference 2"]
    text = browser.execute_script("return document.body.innerText.toLowerCase()")
    assert not any(word in text for word in ("fact", "all right", "weather", "slice", "confusion"))
    assert browser.get_log("browser") == []


def test_a_gallery_of_free_captions_is_plain_text():
    [free] = make_gallery({"a.jpg": "A car waits."})
    assert free.prediction == [("A car waits.", "")]
    rows = make_gallery({"a.jpg": "There is one car.", "b.jpg": "There are cars."})
    assert rows[1].prediction == [("There are cars.", "unread")]


def test_the_worst_images_and_some_at_random_come_before_the_scores(browser, pages):
    open_page(browser, pages / "whole.html")
    sections = list_sections(browser)
    assert sections[:3] == ["worst", "random", "scores"] and sections[-1] == "images"
    assert read_texts(browser, "#worst .name") == [f"{n:05d}.jpg" for n in range(6)]
    drawn = read_texts(browser, "#random .name")
    assert len(set(drawn)) == 6 and drawn != sorted(drawn)
    browser.refresh()
    assert read_texts(browser, "#random .name") == drawn
    open_page(browser, pages / "small.html")
    assert not read_texts(browser, ".pick"), "six images are in one look"


def test_a_link_leads_to_its_image(browser, pages):
    open_page(browser, pages / "whole.html")
    browser.execute_script("document.querySelectorAll('#worst .pick')[2].click()")
    shown = "return [document.getElementById('dialog').open, document.querySelector('#dialog-name')?.textContent]"
    wait_until(lambda: browser.execute_script(shown) == [True, "00002.jpg"], "a pick opens its image")
    browser.execute_script("document.getElementById('next').click(); document.getElementById('copy').click()")
    link = browser.current_url
    assert link.endswith("whole.html#image=00003.jpg")
    browser.get("about:blank")
    browser.get(link)
    wait_until(lambda: browser.execute_script(shown) == [True, "00003.jpg"], "the link opens the image")
    browser.execute_script("document.getElementById('close').click()")
    wait_until(lambda: "#" not in browser.current_url, "the address names no image that is closed")
    assert browser.get_log("browser") == []


def test_the_axis_of_slices_starts_where_the_data_are(browser, pages):
    open_page(browser, pages / "whole.html")
    assert read_texts(browser, "#slice-plot .axis text") == ["0.4", "0.5", "0.6", "0.7", "0.8", "0.9"]
    assert read_texts(browser, "#headline-plot .axis text") == ["0", "0.25", "0.5", "0.75", "1"]
    fit = "return fitAxis(arguments[0]).ticks.map((tick) => Number(tick.toFixed(2)))"
    assert browser.execute_script(fit, [0.82, 0.97]) == [0.8, 0.85, 0.9, 0.95, 1]
    assert browser.execute_script(fit, [0.9]) == [0.9, 0.91]
    assert browser.execute_script(fit, [0.0, 1.0]) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert browser.execute_script(fit, []) == [0, 0.25, 0.5, 0.75, 1]


def test_paper_gets_all_but_the_controls(browser, pages):
    open_page(browser, pages / "whole.html")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    seen = "return getComputedStyle(document.querySelector(arguments[0])).display !== 'none'"
    assert [browser.execute_script(seen, name) for name in ("#verdict", "#worst", "#scores", "#images")] == [True] * 4
    assert [browser.execute_script(seen, name) for name in ("#tools", "#contents", ".bar")] == [False] * 3
    assert len(read_names(browser)) == 20
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_images_are_decoded_and_missing_ones_said(browser, pages):
    open_page(browser, pages / "small.html")
    assert browser.execute_script("return document.querySelectorAll('.card img').length") == 5
    loaded = """const image = document.querySelector('.card img'), done = arguments[0];
        image.decode().then(() => done(image.naturalWidth), () => done(0));"""
    assert browser.execute_async_script(loaded) > 100
    assert "no image" in browser.execute_script("return document.getElementById('feed').textContent.toWellFormed()")


def test_own_images_are_a_gallery_alone(browser, pages):
    open_page(browser, pages / "own.html")
    assert len(list_sections(browser)) == 1
    assert read_names(browser) == [SCRIPT, "00004.jpg"]
    assert browser.execute_script("return [...document.getElementById('order').options].map((e) => e.value)") == [
        "by name"
    ]
    assert "reference" not in browser.execute_script(
        "return document.getElementById('feed').textContent.toWellFormed()"
    )
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 390, 768])
def test_no_width_scrolls_sideways(browser, pages, width):
    open_page(browser, pages / "small.html", width)
    browser.execute_script("document.querySelectorAll('details').forEach((element) => { element.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_script("document.querySelector('.card').click()")
    assert (
        browser.execute_script("const d = document.getElementById('dialog'); return d.scrollWidth - d.clientWidth") <= 0
    )


def test_ten_thousand_rows_keep_few_cards_in_the_page(browser, pages):
    open_page(browser, pages / "many.html")
    cards = "return document.querySelectorAll('.card').length"
    assert 12 <= browser.execute_script(cards) <= 120
    for share in (0.3, 0.6, 1):
        scroll = """window.scrollTo(0, document.documentElement.scrollHeight * arguments[0]);
            setTimeout(arguments[1], 200);"""
        browser.execute_async_script(scroll, share)
        visible = "return document.elementFromPoint(300, 450).closest('.batch')?.children.length"
        assert browser.execute_script(visible) or share == 1  # the end of the page may be its footer
        assert 12 <= browser.execute_script(cards) <= 120
    assert "09999.jpg" in read_names(browser)
    set_value(browser, "#error", "wrong")
    assert browser.execute_script("return document.getElementById('count').textContent") == "5,000 of 10,000 images"
    browser.execute_script("document.querySelector('.card').focus()")
    press(browser, "\ue010")
    assert focused_name(browser) == "09999.jpg"
    assert browser.execute_script(cards) <= 120
    assert browser.get_log("browser") == []

"""scores.json: its schema, maxima and floors, speed of nothing, predictions from anywhere, comparisons."""

import csv
import json
import os
import random
import re
import threading
from pathlib import Path

import fastjsonschema
import numpy as np
import pytest
from caption_facts import all_facts
from conftest import ROOT, call_script
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.bdd100k.frames import LabelOptions
from captioner.bdd100k.label_files import read_labels
from captioner.bdd100k.label_report import LabelReport
from captioner.bdd100k.parsing import parse_caption, read_caption
from captioner.bdd100k.wording import describe
from captioner.runtime.errors import UserError
from captioner.scoring import fact_metrics, text_metrics
from captioner.scoring.comparison import compare_files, compare_predictions
from captioner.scoring.console import print_left_out, print_scores
from captioner.scoring.grammar import find_facts
from captioner.scoring.origin import find_origin, read_origin_split
from captioner.scoring.predictions import Prediction, add_rides, read_predictions, read_references, write_predictions
from captioner.scoring.reference_facts import read_facts
from captioner.scoring.report import make_rows
from captioner.scoring.scores import count_things, score_predictions
from captioner.scoring.text_metrics import measure_mean

validate = fastjsonschema.compile(json.loads((ROOT / "tests/scores.schema.json").read_text()))


@pytest.fixture(scope="module")
def references(drawn):
    """Captions of drawn scenes, six times over with other names and some other facts."""
    frames = list(read_labels([drawn / "labels.json"], LabelReport()))
    return {f"{copy}-{frame.name}": describe(frame.facts) for copy in range(6) for frame in frames}


def predict(references, change=lambda name, text: text):
    return [Prediction(name, change(name, text), [text]) for name, text in references.items()]


def score_file(folder: Path, name: str, *flags) -> tuple[dict, str]:
    """What eval.py writes to logs/r/scores.json of a predictions file in `folder`, and what it prints."""
    finished = call_script("eval.py", "--predictions", name, *flags, "--run-name", "r", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    scores = json.loads((folder / "logs/r/scores.json").read_text())
    validate(scores)
    return scores, finished.stdout


def test_perfect_predictions_reach_the_maximum(references):
    scores = score_predictions(predict(references), {}, resamples=50)["scores"]
    for group, names in {"corpus_bleu": None, "rouge_l": None, "facts": None, "weather": None, "scene": None}.items():
        for name, figure in scores[group].items():
            assert figure["value"] == pytest.approx(1, abs=1e-6), (group, name, names)
    assert scores["cider_d"]["CIDEr-D"]["value"] == pytest.approx(10, abs=1e-6)
    assert {figure["value"] for figure in scores["hallucination"].values()} == {0}
    assert {figure["value"] for figure in scores["form"].values()} == {0}
    for figures in scores["classes"].values():
        assert figures["presence_f1"]["value"] == figures["exact"]["value"] == 1
        assert figures["bias"]["value"] == figures["mean_absolute_error"]["value"] == 0


def test_shuffled_predictions_fall_to_the_floor(references):
    """Each image with another's caption scores what the floor of other images' captions scores."""
    shuffled = random.Random(3).sample(list(references.values()), len(references))
    texts = dict(zip(references, shuffled, strict=True))
    scored = score_predictions(predict(references, lambda name, _: texts[name]), {}, resamples=200)
    floor = scored["floors"]["another image's caption"]
    groups = {"facts_f1": "facts", "objects_f1": "facts", "weather": "facts", "BLEU-4": "corpus_bleu"}
    for name, group in groups.items():
        own, other = scored["scores"][group][name], floor[group][name]
        assert own["low"] <= other["high"] and other["low"] <= own["high"], name
        assert own["value"] < 0.75
    assert scored["slices"][0]["scores"]["facts_f1"]["value"] <= scored["slices"][-1]["scores"]["facts_f1"]["value"]


@pytest.mark.parametrize(
    ("count", "note"),
    [
        (1, "1 image: too few"),
        (19, "19 images: too few"),
        (20, r"20 images: the widest 95 % interval, of .*, is \d\.\d\d to \d\.\d\d, too wide"),
    ],
)
def test_a_note_says_how_far_the_figures_can_be_trusted(references, count, note):
    few = dict(list(references.items())[:count])
    scores = score_predictions(predict(few, lambda name, text: text.replace("car", "bus")), {}, resamples=50)
    assert re.match(note, scores["notes"][0]), scores["notes"]


def test_the_command_writes_what_the_schema_says(references, tmp_path):
    write_predictions(tmp_path / "p.jsonl", predict(references, lambda name, text: text.replace("car", "bus")))
    scores, printed = score_file(tmp_path, "p.jsonl")
    assert scores["n"] == len(references)
    assert (tmp_path / "logs/r/report.html").stat().st_size > 10_000
    lines = printed.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "BLEU-4" in line and "facts F1" in line) :][:6]
    assert len({len(line) for line in table if line.strip()}) == 1  # aligned
    assert f"{scores['scores']['corpus_bleu']['BLEU-1']['value']:.3f}" in printed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("text", ['[{"name": "a.jpg", "caption": "A car."}]', "image,caption\na.jpg,A car.\n"])
def test_references_may_come_through_a_pipe(tmp_path, text):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,))
    writer.start()
    assert read_references(tmp_path / "pipe") == {"a.jpg": ["A car."]}
    writer.join()


def test_a_csv_and_references_apart_score_the_same(references, tmp_path):
    """Other people's file: CSV, in another order, with a name we don't know, and one of ours missing."""
    captions = list(references.items())
    rows = [f'{name},"{text}"' for name, text in captions[:-1]]
    (tmp_path / "theirs.csv").write_text("\n".join(["name,prediction", *reversed(rows), 'unknown.jpg,"A car."']) + "\n")
    (tmp_path / "captions.csv").write_text(
        "\n".join(["name,raw_caption", *(f'{name},"{text}"' for name, text in captions)]) + "\n"
    )
    scores, printed = score_file(tmp_path, "theirs.csv", "--references", "captions.csv")
    assert scores["n"] == len(captions) - 1
    assert scores["left_out"] == {"references without a prediction": 1, "predictions without a reference": 1}
    assert scores["scores"]["facts"]["whole_caption"]["value"] == 1
    assert "left out, predictions without a reference: 1" in printed


def test_facts_come_from_labels_where_they_are_given(drawn, tmp_path):
    """References in somebody else's words hold no fact that we can read; the labels do."""
    frames = list(read_labels([drawn / "labels.json"], LabelReport()))
    rows = [Prediction(frame.name, describe(frame.facts), ["Cars on a road at night."]) for frame in frames[:-1]]
    write_predictions(tmp_path / "p.jsonl", [*rows, Prediction("unknown.jpg", "x", ["y"])])
    scores, _ = score_file(tmp_path, "p.jsonl", "--labels", drawn / "labels.json")
    assert scores["facts_from"] == "labels"
    assert scores["scores"]["facts"]["whole_caption"]["value"] == 1
    assert scores["left_out"] == {"predictions without labels": 1}


def test_comparison_on_the_command_line(references, tmp_path):
    write_predictions(tmp_path / "a.jsonl", predict(references, lambda name, text: text.replace("car", "bus")))
    write_predictions(tmp_path / "b.jsonl", predict(references)[:-1])
    finished = call_script("eval.py", "--compare", "a.jsonl", "b.jsonl", "--run-name", "r", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    compared = json.loads((tmp_path / "logs/r/comparison.json").read_text())
    assert (compared["n"], compared["only_in_one"], compared["only_in_other"]) == (len(references) - 1, 1, 0)
    row = compared["scores"]["facts_f1"]
    assert row["difference"] == pytest.approx(row["other"] - row["one"]) and row["p"] < 0.05
    assert "left out, images that only A captioned: 1" in finished.stdout


def test_comparison_of_files_that_share_no_image():
    with pytest.raises(ValueError, match="share no image"):
        compare_predictions([[Prediction("a", "x", ["y"])]], [[Prediction("b", "x", ["y"])]])


def test_floors_in_the_file_are_scored_again(references, tmp_path):
    rows = [row._replace(floors={"the untuned model": "A road."}) for row in predict(references)]
    write_predictions(tmp_path / "p.jsonl", rows)
    read, _ = read_predictions(tmp_path / "p.jsonl")
    assert read == rows
    floor = score_predictions(read, {}, resamples=20)["floors"]["the untuned model"]
    assert floor["facts"]["facts_f1"]["value"] == 0


@given(st.lists(st.tuples(st.text(max_size=80), all_facts), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_any_prediction_is_scored(rows):
    """Whatever the text, and whatever few captions there are: figures or null, never an exception."""
    predictions = [Prediction(f"{i}.jpg", text, [describe(facts)]) for i, (text, facts) in enumerate(rows)]
    scores = score_predictions(predictions, {}, resamples=5)
    json.dumps(scores, allow_nan=False)


@pytest.mark.slow
def test_ten_thousand_arbitrary_strings():
    rng = random.Random(0)
    ranges = ((32, 126), (0x80, 0x24F), (0x4E00, 0x9FFF), (0, 31), (0x1F300, 0x1FAFF), (0xD800, 0xDFFF))
    strings = ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 30))) for _ in range(10_000)]
    reference = ["It is a night scene in clear weather on a highway road. There is one car."]
    scores = score_predictions(
        [Prediction(str(i), text, reference) for i, text in enumerate(strings)], {}, resamples=10
    )
    assert scores["n"] == 10_000
    assert scores["scores"]["facts"]["facts_f1"]["value"] == 0
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "image,caption\na.jpg,x\n", "columns must be name"),
        ("p.csv", "name,prediction,reference\na.jpg,x\n", "3 fields"),
        ("p.csv", "name,prediction\na.jpg,x\n", "--references"),
        ("p.csv", "name,prediction,reference,reference\na.jpg,x,y,z\n", "same title"),
        ("p.csv", "name,prediction,reference,reference_length\na.jpg,x,y,1\n", "column reference_length: columns of"),
        ("p.csv", "name,raw_caption\na.jpg,x\n", "no column prediction"),
        ("p.jsonl", '{"name": "a.jpg", "prediction": "x"}\n', "--references"),
        ("p.jsonl", '{"name": "a.jpg", "prediction": "x", "references": ["y"], "floors": {"z": 1}}\n', "line 1"),
        ("p.jsonl", "[1]\n", "line 1"),
        ("p.json", '{"images": [], "annotations": []}', "give them with --references"),
        ("p.jsonl", b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_bad_predictions_file_is_one_message(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read_predictions(path)
    assert str(path) in str(error.value)


TWO = ["It is a night scene. There's one car.", 'It is "dark". There is a car.']


@pytest.mark.parametrize("write", [str, json.dumps, lambda texts: str(tuple(texts)), lambda texts: f" {texts} "])
@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.json"])
def test_references_in_a_list_that_was_written_as_text_are_read(tmp_path, write, name):
    path = tmp_path / name
    row = {"name": "a.jpg", "prediction": "A car.", "references": write(TWO)}
    with open(path, "w", newline="") as file:
        if name == "p.csv":
            csv.writer(file).writerows([row, row.values()])
        else:
            json.dump([row] if name == "p.json" else row, file)
    assert read_predictions(path)[0][0].references == TWO
    assert read_references(path) == {"a.jpg": TWO}


@pytest.mark.parametrize(
    "text",
    [
        *(
            "['A car.' 'A bus.']",
            "['A car.', nan]",
            "[{'caption': 'A car.'}]",
            '{"caption": "A car."}',
            "['A car.' ... 'A bus.']",
        ),
        *("array(['A car.'], dtype=object)", "b'A car.'", '"A car."', "nan", "None", "[1, 2]", "{'A car.'}"),
    ],
)
@pytest.mark.parametrize("read", [read_predictions, read_references])
def test_a_value_written_as_text_is_not_scored_as_a_reference(tmp_path, text, read):
    path = tmp_path / "p.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["name", "prediction", "references"], ["a.jpg", "A car.", text]])
    with pytest.raises(UserError, match=r"p.csv, line 2: the references column holds .* column of its own"):
        read(path)


@pytest.mark.parametrize("text", ["(night) a car (parked)", '"Stop" says the sign, not "go"', "A car [sic]", "3 cars"])
def test_captions_with_brackets_and_quotes_are_captions(tmp_path, text):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"name": "a.jpg", "prediction": text, "references": [text]}))
    assert read_predictions(path)[0] == [Prediction("a.jpg", text, [text])]


def test_predictions_that_are_lists_written_as_text_are_refused(tmp_path):
    (tmp_path / "p.csv").write_text("name,prediction,reference\na.jpg,['A car.'],A car.\nb.jpg,['A' 'bus'],A bus.\n")
    with pytest.raises(UserError, match=r"p.csv: its predictions are lists"):
        read_predictions(tmp_path / "p.csv")


COCO_RESULTS = [{"image_id": 7, "caption": "A bus."}, {"image_id": 5, "caption": "A car."}]
COCO_CAPTIONS = {
    "images": [{"id": 5, "file_name": "a.jpg"}, {"id": 7, "file_name": "b.jpg"}],
    "annotations": [{"image_id": id, "caption": text} for id, text in [(5, "A car."), (7, "A bus."), (5, "One car.")]],
}


@pytest.mark.parametrize("indent", [None, 2])
def test_results_and_captions_of_coco_are_read(tmp_path, indent):
    (tmp_path / "r.json").write_text(json.dumps(COCO_RESULTS, indent=indent))
    (tmp_path / "c.json").write_text(json.dumps(COCO_CAPTIONS, indent=indent))
    references = read_references(tmp_path / "c.json")
    assert references == {"a.jpg": ["A car.", "One car."], "b.jpg": ["A bus."]}
    predictions, left_out = read_predictions(tmp_path / "r.json", references)
    assert [(row.name, row.prediction) for row in predictions] == [("b.jpg", "A bus."), ("a.jpg", "A car.")]
    assert not left_out


def test_results_of_coco_need_the_names_of_their_images(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(COCO_RESULTS))
    (tmp_path / "c.csv").write_text("name,raw_caption\na.jpg,A car.\n")
    for references in (None, read_references(tmp_path / "c.csv")):
        with pytest.raises(UserError, match=r"r.json, row 1: COCO's results, image_id 7: .* --references"):
            read_predictions(tmp_path / "r.json", references)


@pytest.mark.parametrize("change", [{"images": []}, {"annotations": [{"image_id": 5, "bbox": []}]}, {"images": None}])
def test_a_file_of_coco_without_captions_is_named(tmp_path, change):
    (tmp_path / "c.json").write_text(json.dumps(COCO_CAPTIONS | change))
    with pytest.raises(UserError, match=r"c.json: (COCO's captions must have|its annotations have no caption)"):
        read_references(tmp_path / "c.json")


CAPTIONS = [("a.jpg", "A car."), ("b.jpg", "A bus."), ("a.jpg", "One car.")]
OWN_CAPTIONS = {  # the forms of docs/own_captions.md, by file
    "c.csv": "image,caption\na.jpg,A car.\nb.jpg,A bus.\na.jpg,One car.\n",
    "semicolons.csv": "\ufeffname;raw_caption\r\na.jpg;A car.\r\n.\\b.jpg;A bus.\r\na.jpg;One car.\r\n",
    "c.tsv": "file_name\ttext\na.jpg\tA car.\nb.jpg\tA bus.\na.jpg\tOne car.\n",
    "lists.csv": "name,raw_caption\na.jpg,\"['A car.', 'One car.']\"\nb.jpg,['A bus.']\n",  # as pandas writes them
    "c.jsonl": '{"image": "a.jpg", "caption": ["A car.", "One car."]}\n{"image": "b.jpg", "caption": "A bus."}\n',
    "c.json": json.dumps([{"name": name, "text": text} for name, text in CAPTIONS]),
    "coco.json": json.dumps(COCO_CAPTIONS),
    "token.txt": "".join(f"{name}#{number}\t{text}\n" for number, (name, text) in enumerate(CAPTIONS)),
    "metadata.csv": "file_name,text\na.jpg,A car.\nb.jpg,A bus.\na.jpg,One car.\n",
}


@pytest.mark.parametrize("name", OWN_CAPTIONS)
def test_own_captions_of_every_form_are_references(tmp_path, name):
    path = tmp_path / name
    path.write_text(OWN_CAPTIONS[name], newline="")
    wanted = {"a.jpg": ["A car.", "One car."], "b.jpg": ["A bus."]}
    references = read_references(tmp_path if name == "metadata.csv" else path)
    assert references == wanted
    (tmp_path / "q.csv").write_text("name,prediction\nb.jpg,A bus.\na.jpg,A car.\n.\\b.jpg,A bus.\n")
    predictions, left_out = read_predictions(tmp_path / "q.csv", references)
    assert [row.references for row in predictions] == [wanted["b.jpg"], wanted["a.jpg"], wanted["b.jpg"]]
    assert not left_out


def test_results_of_coco_are_held_against_captions_by_number(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(COCO_RESULTS))
    (tmp_path / "c.csv").write_text("image_id,caption\n7,A bus.\n5,A car.\n")
    rows, _ = read_predictions(tmp_path / "r.json", read_references(tmp_path / "c.csv"))
    assert [(row.name, row.references) for row in rows] == [("7", ["A bus."]), ("5", ["A car."])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "id,words\na.jpg,x\n", "line 1: found id, words; wanted the titles of an image column"),
        ("c.json", '{"labels": []}', "these are BDD100K's labels.* with --labels in place of --references"),
        ("c.csv", "name,caption\na.jpg,\n", "no captions in it; --references takes"),
        ("gone.csv", None, "can't be read"),
    ],
)
def test_references_that_are_none_are_one_message(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        read_references(tmp_path / name)


def test_an_array_of_rows_is_read_and_a_bad_row_is_named(tmp_path):
    row = {"name": "a.jpg", "prediction": "A car.", "references": ["A car."]}
    (tmp_path / "p.json").write_text(json.dumps([row, {**row, "name": "b.jpg"}], indent=1))
    assert [found.name for found in read_predictions(tmp_path / "p.json")[0]] == ["a.jpg", "b.jpg"]
    (tmp_path / "p.json").write_text(json.dumps([row, {**row, "name": 3}]))
    with pytest.raises(UserError, match=r"p.json, row 2: must be"):
        read_predictions(tmp_path / "p.json")


def test_references_that_come_twice_are_refused(tmp_path):
    """In a predictions file, whose rows have all that there are; in captions each has a row of its own."""
    (tmp_path / "r.csv").write_text("name,prediction,reference\na.jpg,z,x\na.jpg,z,y\n")
    with pytest.raises(UserError, match=r"r\.csv, line 3: a\.jpg came before"):
        read_references(tmp_path / "r.csv")


def test_references_without_a_fact_are_not_scored_on_facts(tmp_path):
    """Somebody's free text: its likeness alone, and no score, slice or confusion of facts. Odd characters print."""
    rows = [Prediction(f"{i}.jpg", "There is one car. \ud800", ["Cars drive along a street."]) for i in range(12)]
    write_predictions(tmp_path / "p.jsonl", rows)
    scores, printed = score_file(tmp_path, "p.jsonl")
    assert scores["facts_from"] is None and "facts" not in printed.lower()
    table = [line.split() for line in printed.splitlines() if "CIDEr-D" in line]
    assert table[0][:3] == ["CIDEr-D", "BLEU-4", "ROUGE-L"]
    page = (tmp_path / "logs/r/report.html").read_text()
    row = json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)[1])["rows"][0]
    assert row["prediction"] == ["There is one car. \ud800"] and row["slices"] == {} and row["score"] == 0


RIGHT = "It is a night scene in clear weather on a highway road. There are 3 cars."
FREE = ["A red car waits at the lights.", "Two people cross in the rain.", "The street is empty at night."]


@pytest.mark.parametrize(
    ("worded", "free", "scored", "told"),
    [
        (10, 0, True, ""),
        (6, 6, True, "6 of 12 references are in this project's wording: facts are scored\n"),
        (5, 6, False, "5 of 11 references are in this project's wording: too few for scores of facts\n"),
        (0, 4, False, ""),
    ],
)
def test_facts_are_scored_where_half_of_the_references_are_of_the_grammar(worded, free, scored, told, capsys):
    texts = [RIGHT] * worded + [FREE[n % 3] for n in range(free)]
    rows = [Prediction(f"{n}.jpg", RIGHT, [text]) for n, text in enumerate(texts)]
    _, facts, _ = read_facts(rows)
    assert capsys.readouterr().out == told
    scores = score_predictions(rows, {}, facts, of_bdd100k=True, resamples=5)
    groups = {"facts", "time_of_day", "weather", "scene", "traffic_light", "hallucination", "form", "classes"}
    for found in (scores["scores"], *scores["floors"].values()):
        assert groups & found.keys() == (groups if scored else set())
    assert {"slices", "confusion"} & scores.keys() == ({"slices", "confusion"} if scored else set())
    assert bool(scores["published"]) == scored == ("facts" in scores["signatures"])
    compared = compare_predictions([rows], [rows], resamples=5)["scores"]
    assert ("facts_f1" in compared) == ("CHAIRs" in compared) == scored and "CIDEr-D" in compared


@pytest.mark.parametrize("text", ["", "Two cars.", f"{RIGHT} A man waves.", "It is nearly night."])
def test_a_caption_with_a_sentence_of_its_own_is_free(text):
    assert find_facts([text]) is None
    assert find_facts([text, RIGHT]) == [parse_caption(text), parse_caption(RIGHT)]


def test_free_captions_are_held_against_all_their_references(capsys):
    """As the text metrics do it, each by itself; the report ranks images by what CIDEr-D says of each."""
    references = [[text, FREE[(n + 1) % 3]] for n, text in enumerate(FREE)] * 8
    rows = [Prediction(f"{n}.jpg", FREE[(n + n // 8) % 3], texts) for n, texts in enumerate(references)]
    scores = score_predictions(rows, {}, resamples=20)
    texts = [row.prediction for row in rows]
    for group, metric in text_metrics.measure_texts(references, {"said": texts})["said"].items():
        for name, value in text_metrics.score(metric).items():
            assert scores["scores"][group][name]["value"] == pytest.approx(value)
    shown = [row.score for row in make_rows(rows, None)]
    assert min(shown[:16]) > max(shown[16:]), "like the first reference, like the second, like neither"
    assert np.mean(shown) == pytest.approx(scores["scores"]["cider_d"]["CIDEr-D"]["value"])
    assert "the widest 95 % interval, of BLEU-4, is" in scores["notes"][0]
    print_scores(scores)
    printed = capsys.readouterr().out
    assert f"{scores['scores']['cider_d']['CIDEr-D']['value']:.2f}" in printed
    assert "fact" not in printed.lower() and "slices" not in printed


def test_few_images_are_said_to_be_few():
    one = [Prediction("a.jpg", "There is one car.", ["There are 2 cars."])]
    assert "too few" in score_predictions(one, {}, resamples=5)["notes"][0]
    assert "too few" in compare_predictions([one], [one], resamples=5)["notes"][0]


@pytest.mark.parametrize("floors", [{"predictions": "x"}, {"most frequent caption": "x"}])
def test_a_floor_can_not_take_the_place_of_another_set(floors):
    with pytest.raises(ValueError, match="floor"):
        score_predictions([Prediction("a.jpg", "x", ["y"], floors)], {}, resamples=5)


def test_long_blanks_are_read_in_no_time():
    assert read_caption("a." + " " * 1_000_000).unread == ["a."]


def test_predictions_are_read_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    row = json.dumps({"name": "a.jpg", "prediction": "There is one car.", "references": ["There is one car."]}) + "\n"
    writer = threading.Thread(target=lambda: (tmp_path / "p.jsonl").write_text(row + row.replace("a.jpg", "b.jpg")))
    writer.start()
    predictions, _ = read_predictions(tmp_path / "p.jsonl")
    writer.join()
    assert [prediction.name for prediction in predictions] == ["a.jpg", "b.jpg"]


# --------------------------------------------------------------------------------------------------------------
# what a figure must not hide


def score_texts(texts, references=(RIGHT,), names="{:08x}-00000000.jpg", **options) -> dict:
    """Scores of captions, each of an image and a ride of its own, against the references in turn."""
    rows = [
        Prediction(names.format(place), text, [references[place % len(references)]]) for place, text in enumerate(texts)
    ]
    return score_predictions(rows, {}, resamples=20, **options)


def take_values(scores: dict, *names: str) -> list[float]:
    figures = scores["scores"]["facts"] | scores["scores"]["hallucination"]
    return [figures[name]["value"] for name in names]


@pytest.mark.parametrize(
    ("nonsense", "precision", "chair"),
    [
        ("There are 3 elephants.", 4 / 5, 1 / 2),
        ("A crash ahead.", 4 / 5, 1 / 2),
        ("There are 7 cars.", 4 / 5, 1 / 2),  # after 3 cars
        ("The traffic light is red. The traffic light is green.", 4 / 6, 0),
        ("There are 3 elephants. There are 7 cars. A crash ahead.", 4 / 7, 3 / 4),
        ("There are 3 cars.", 1, 0),  # said again, which is not wrong
    ],
)
def test_nonsense_beside_right_facts_is_not_free(nonsense, precision, chair):
    scores = score_texts([f"{RIGHT} {nonsense}"] * 3)
    found = take_values(scores, "facts_precision", "CHAIRi", "CHAIRs", "whole_caption")
    assert found == pytest.approx([precision, chair, int(chair > 0), int(precision == 1)])
    if "light" not in nonsense:  # what could be read is right
        assert take_values(scores, "facts_precision_read", "CHAIRi_read", "CHAIRs_read") == [1, 0, 0]
    assert take_values(scores, "facts_recall") == [1]


def test_the_report_scores_an_image_as_the_scores_do():
    said = f"{RIGHT} There are 3 elephants. There are 3 pedestrians."
    expected = f"{RIGHT} There are 3 persons."
    [row] = make_rows([Prediction("a", said, [expected])], [parse_caption(expected)])
    assert row.score == pytest.approx(2 * 5 / (6 + 5))
    assert [verdict for text, verdict in row.prediction if "pedestrians" in text] == ["right"]
    assert [verdict for text, verdict in row.references[0] if "persons" in text] == ["right"]


@pytest.mark.parametrize(
    ("one", "other"), [("persons", "pedestrians"), ("bikes", "bicycles"), ("motors", "motorcycles")]
)
def test_two_names_of_a_class_are_one(one, other):
    said, expected = (
        f"It is a night scene in clear weather on a highway road. There are 2 {noun}." for noun in (one, other)
    )
    scores = score_texts([said] * 2, [expected])
    assert take_values(scores, "CHAIRs", "CHAIRi", "whole_caption", "objects_f1", "boxed_f1") == [0, 0, 1, 1, 1]
    assert len(scores["scores"]["classes"]) == 1


def test_a_rider_is_no_person():
    scores = score_texts(["There are 2 riders."] * 2, ["There are 2 persons."])
    assert take_values(scores, "CHAIRs", "objects_f1") == [1, 0]


def test_lanes_and_areas_do_not_dilute_what_is_said_of_objects():
    areas = "There are 4 lanes. There is one drivable area."
    scores = score_texts([f"There are 2 buses. {areas}"] * 2, [f"There is one car. {areas}"])
    assert take_values(scores, "CHAIRi", "CHAIRi_boxed") == [pytest.approx(1 / 3), 1]
    assert take_values(scores, "objects_f1", "boxed_f1") == [pytest.approx(2 / 3), 0]


def test_constant_floors_are_chosen_on_training_captions():
    """The test split's most frequent caption is another; scored on the test split all the same."""
    training = [RIGHT] * 3 + ["There is one bus."] * 2
    scores = score_texts([RIGHT] * 4, ["There is one bus.", "There is one bus.", RIGHT], training=training)
    assert scores["floors_from"] == "training captions"
    floor = scores["floors"]["most frequent caption"]["facts"]
    assert floor["whole_caption"]["value"] == 0.25
    assert not any("floors" in note for note in scores["notes"])
    alone = score_texts([RIGHT] * 4, ["There is one bus.", "There is one bus.", RIGHT])
    assert alone["floors"]["most frequent caption"]["facts"]["whole_caption"]["value"] == 0.75
    assert alone["floors_from"] == "scored references"
    assert any("chosen on the very references" in note for note in alone["notes"])


def test_slices_are_large_enough_and_hold_at_once():
    """Of 20 slices that are alike the intervals all hold, and none has fewer rides than intervals bear."""
    rng = random.Random(1)
    captions = [
        f"It is a {time} scene in {weather} weather on a {scene} road. There are {count} cars."
        for time in ("night", "daytime", "dawn/dusk")
        for weather in ("clear", "rainy", "snowy", "overcast")
        for scene in ("highway", "city street", "residential")
        for count in (2, 7, 12)
        for _ in range(5)
    ]
    captions += [RIGHT.replace("highway", "tunnel")] * 19
    texts = [text if rng.random() < 0.5 else text.replace("cars", "buses") for text in captions]
    scores = score_texts(texts, captions)
    slices = scores["slices"]
    assert min(item["n"] for item in slices) >= 20 and "tunnel" not in {item["value"] for item in slices}
    assert len({item["level"] for item in slices}) == 1
    assert slices[0]["level"] == pytest.approx(1 - 0.05 / len(slices))
    overall = scores["scores"]["facts"]["objects_f1"]["value"]
    for item in slices:
        figure = item["scores"]["objects_f1"]
        assert figure["low"] <= overall <= figure["high"], item
    assert any(f"worst of {len(slices)} slices may be low by chance" in note for note in scores["notes"])


def test_frames_of_a_ride_make_wider_intervals():
    """By the names of BDD100K, by a ride in the rows, and noted where neither tells."""
    texts = [text for place in range(30) for text in [RIGHT if place % 3 else "There is one bus."] * 4]
    apart = score_texts(texts)
    rows = [Prediction(f"{place}.jpg", text, [RIGHT]) for place, text in enumerate(texts)]
    in_rows = [row._replace(ride=str(place // 4)) for place, row in enumerate(rows)]
    in_names = [row._replace(name=f"{place // 4:08x}-{place:08x}.jpg") for place, row in enumerate(rows)]
    by_rows, by_names, unknown = (score_predictions(each, {}, resamples=20) for each in (in_rows, in_names, rows))
    assert by_rows["rides"] == by_names["rides"] == 30 and apart["rides"] == unknown["rides"] == 120
    widths = {}
    for name, scores in {"apart": apart, "rows": by_rows, "names": by_names}.items():
        figure = scores["scores"]["facts"]["whole_caption"]
        widths[name] = figure["high"] - figure["low"]
    assert widths["rows"] == widths["names"] > 1.5 * widths["apart"]
    assert any("don't tell the ride" in note for note in unknown["notes"])
    assert not any("don't tell the ride" in note for note in by_rows["notes"] + by_names["notes"])


def test_all_right_is_shown_with_the_lower_end(capsys):
    scores = score_texts([RIGHT] * 20)
    assert scores["scores"]["facts"]["weather"]["low"] == pytest.approx(0.025 ** (1 / 20))
    print_scores(scores)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  from") and "0.83" in line for line in lines), lines


def test_one_of_a_kind_is_told_in_the_singular(capsys):
    scores = score_texts(["There is one car."] * 20, ["There is one car."], names="{}.jpg")
    assert any(note.startswith("names don't tell the ride of 20 images, 0.jpg for one:") for note in scores["notes"])
    print_scores(scores | {"slices": scores["slices"][:1], "n": 1, "rides": 1, "left_out": {"unreadable images": 1}})
    print_left_out({"a.jpg": "a.jpg: empty"})
    said = capsys.readouterr().out
    for text in ("\n1 image. Shares", "\nthe only slice, facts F1: ", "\nleft out, unreadable images: 1\n"):
        assert text in said
    assert "\n1 image can't be read and is left out:\n" in said
    assert count_things(2000, "ride") == "2,000 rides"
    rows = [Prediction(f"{n}.jpg", RIGHT, [text]) for n, text in enumerate([RIGHT, *FREE, *FREE])]
    read_facts(rows)
    assert capsys.readouterr().out.startswith("1 of 7 references is in this project's wording")


def test_published_figures_stand_beside_bdd100k_alone():
    assert score_texts([RIGHT])["published"] == []
    assert [item["what"] for item in score_texts([RIGHT], of_bdd100k=True)["published"]] == ["weather", "scene"]


def test_signatures_say_whose_meteor_and_which_intervals(monkeypatch):
    monkeypatch.setattr(
        text_metrics, "measure_meteor", lambda known, texts: measure_mean(("METEOR",), np.ones((len(texts), 1)))
    )
    signatures = score_texts([RIGHT] * 20)["signatures"]
    assert "of:nltk-not-coco-1.5|alpha:0.9|beta:3.0|gamma:0.5" in signatures["meteor"]
    assert "|n:20|rides:20|interval:clopper-pearson-effective-rides|" in signatures["facts"]
    assert "interval:bca-rides-20-seed12345" in signatures["corpus_bleu"]


def test_macro_f1_is_over_the_same_labels_in_every_resample():
    """One of 40 images is foggy, and its prediction right: a sample without it does not count as well for that."""
    weathers = ["clear", "rainy"] * 20 + ["foggy"]
    texts = [RIGHT.replace("clear", weather) for weather in weathers]
    metric = fact_metrics.measure_facts(
        [read_caption(text) for text in texts], [parse_caption(text) for text in texts]
    )["weather"]
    without = metric.statistics[:-1].sum(axis=0)
    assert metric.score(without)[1] == pytest.approx(2 / 3)
    assert metric.score(metric.statistics.sum(axis=0))[1] == 1


def test_files_with_other_references_are_not_compared():
    one = [Prediction("a", "x", ["y"]), Prediction("b", "x", ["y"])]
    with pytest.raises(ValueError, match="1 of 2 images, b for one, have other references"):
        compare_predictions([one], [[one[0], one[1]._replace(references=["z"])]])


def test_rides_are_known_if_one_of_the_files_tells_them():
    """Somebody else's file, first on the command line, has none; that of eval.py has."""
    rows = [Prediction(f"{place}.jpg", RIGHT, [RIGHT], ride=str(place // 4)) for place in range(40)]
    theirs = [row._replace(ride=None) for row in rows]
    for one, other in ((theirs, rows), (rows, theirs)):
        assert compare_predictions([one], [other], resamples=5)["rides"] == 10


def test_what_is_left_out_of_a_comparison_is_told(references, tmp_path, capsys):
    rows = predict(references)
    for name, part in (("a", rows), ("b", [*rows, Prediction("unknown.jpg", "x", [])])):
        write_predictions(tmp_path / name, part)
    assert compare_files([tmp_path / "a"], [tmp_path / "b"])["n"] == len(rows)
    assert capsys.readouterr().out == f"left out of {tmp_path / 'b'}, predictions without a reference: 1\n"


def test_several_files_a_side_tell_the_chance_of_training():
    """Two seeds of one system a tenth apart, two of the other alike: the spread, and an interval over seeds beside."""
    rows = [Prediction(f"{place:08x}-00000000.jpg", RIGHT, [RIGHT]) for place in range(40)]
    wrong = RIGHT.replace("night", "daytime")
    worse = [row._replace(prediction=wrong) if place < 4 else row for place, row in enumerate(rows)]
    compared = compare_predictions([rows, worse], [worse, worse], resamples=50)["scores"]["time_of_day"]
    assert (compared["one"], compared["other"]) == (pytest.approx(0.95), pytest.approx(0.9))
    assert compared["files"] == {"one": [1.0, 0.9], "other": [0.9, 0.9]}
    assert compared["spread"] == {"one": pytest.approx(0.1 / 2**0.5), "other": 0}
    assert compared["seeds"]["low"] == pytest.approx(-0.05 - 12.706 * 0.05, abs=1e-3)
    assert compared["p"] == 2 / 2**4  # four rides differ
    assert "spread" not in compare_predictions([rows], [worse], resamples=5)["scores"]["time_of_day"]


def test_one_odd_caption_does_not_refuse_the_file(tmp_path):
    """In quotes, in brackets, or missing as pandas writes it: among captions it is one, or left out and counted."""
    texts = ["A car.", "A bus.", '"A quoted car."', "[sic]", "nan", "A truck."]
    with open(tmp_path / "p.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["name", "prediction", "reference"], *((f"{n}.jpg", "A car.", text) for n, text in enumerate(texts))]
        )
    rows, left_out = read_predictions(tmp_path / "p.csv")
    assert [row.references[0] for row in rows] == [text for text in texts if text != "nan"]
    assert left_out == {"predictions without a reference": 1}


# --------------------------------------------------------------------------------------------------------------
# where predictions come from


@pytest.fixture
def without_lanes(drawn, tmp_path):
    """A folder with predictions that say all that labels hold but lanes and areas, and the record of such a run."""
    options = LabelOptions(lanes=False, class_names="det20")
    frames = list(read_labels([drawn / "labels.json"], LabelReport(), options))
    captions = {frame.name: describe(frame.facts) for frame in frames}
    write_predictions(tmp_path / "p.jsonl", predict(captions))
    settings = {"model": "base", "lanes": False, "class_names": "det20", "min_box_size": 0, "demo": False}
    (tmp_path / "run.json").write_text(json.dumps({"config": settings}))
    return tmp_path


def score_labels(folder, drawn, *args) -> tuple[dict, str]:
    return score_file(folder, "p.jsonl", "--labels", drawn / "labels.json", "--show", 0, *args)


def test_labels_are_read_as_the_run_read_them(without_lanes, drawn):
    scores, said = score_labels(without_lanes, drawn)
    assert scores["scores"]["facts"]["whole_caption"]["value"] == 1
    assert "labels are read as run.json says: class names det20, lanes False" in said
    assert re.search(r"^12 frames used, 0 left out", said, re.MULTILINE)
    assert scores["trained_with"] == {
        "record": "run.json", "adapter": ".", "demo": False, "class_names": "det20", "lanes": False, "min_box_size": 0,
    }  # fmt: skip
    assert [item["what"] for item in scores["published"]] == ["weather", "scene"]  # no demo, and BDD100K's names
    overridden, said = score_labels(without_lanes, drawn, "--lanes", "True")
    assert overridden["scores"]["facts"]["whole_caption"]["value"] < 1
    assert "labels are read as run.json says, but for flags: class names det20, lanes True" in said


def test_the_record_may_lie_beside_the_adapter_or_in_earlier_scores(without_lanes, drawn):
    (without_lanes / "adapter").mkdir()
    (without_lanes / "run.json").rename(without_lanes / "adapter/run.json")
    scores, said = score_labels(without_lanes, drawn, "--adapter", "adapter")
    assert scores["scores"]["facts"]["whole_caption"]["value"] == 1 and "as adapter/run.json says" in said
    (without_lanes / "logs/r/scores.json").rename(without_lanes / "scores.json")
    (without_lanes / "adapter/run.json").unlink()
    scores, said = score_labels(without_lanes, drawn)
    assert scores["scores"]["facts"]["whole_caption"]["value"] == 1 and "as scores.json says" in said
    (without_lanes / "scores.json").unlink()
    scores, said = score_labels(without_lanes, drawn)
    assert scores["trained_with"] is None and "no record of a run lies beside them" in said
    assert scores["scores"]["facts"]["whole_caption"]["value"] < 1 and scores["published"] == []


def test_an_adapter_that_happens_to_be_there_is_not_taken_for_the_origin(without_lanes, drawn):
    """Unless it is named, or its split has all the images, of whichever split they are."""
    (without_lanes / "elsewhere").mkdir()
    (without_lanes / "run.json").rename(without_lanes / "elsewhere/run.json")
    (without_lanes / "elsewhere").rename(without_lanes / "blip2-finetuned")
    names = [row.name for row in read_predictions(without_lanes / "p.jsonl")[0]]
    for known, adapter in ((names[1:], None), (names, "blip2-finetuned")):
        with open(without_lanes / "blip2-finetuned/split.csv", "w", newline="") as file:
            rows = [[name, "train", name, RIGHT, name] for name in known]
            csv.writer(file).writerows([["name", "split", "image", "raw_caption", "group"], *rows])
        scores, _ = score_labels(without_lanes, drawn)
        assert (scores["trained_with"] or {}).get("adapter") == adapter
    (without_lanes / "blip2-finetuned").rename(without_lanes / "mine")
    (without_lanes / "mine/split.csv").unlink()
    assert score_labels(without_lanes, drawn, "--adapter", "mine")[0]["trained_with"]["adapter"] == "mine"


def test_a_record_that_is_none_is_named(without_lanes, drawn):
    (without_lanes / "run.json").write_text(json.dumps({"config": {"model": "base", "lanes": "perhaps"}}))
    finished = call_script(
        "eval.py", "--predictions", "p.jsonl", "--labels", drawn / "labels.json", "--run-name", "r", cwd=without_lanes
    )
    assert finished.returncode == 2 and "run.json: not a record of how labels were read" in finished.stderr


def test_floors_are_those_of_the_training_split_where_the_images_are_of_another(without_lanes):
    rows = read_predictions(without_lanes / "p.jsonl")[0]
    split = [[row.name, "test", row.name, row.references[0]] for row in rows]
    split += [["a.jpg", "train", "a.jpg", RIGHT]]
    for train, found in (([], [RIGHT]), ([[rows[0].name, "train", "", ""]], None)):
        with open(without_lanes / "split.csv", "w", newline="") as file:
            csv.writer(file).writerows([["name", "split", "image", "raw_caption"], *split[len(train) :], *train])
        origin = find_origin(without_lanes, without_lanes / "p.jsonl")
        assert read_origin_split(origin, [row.name for row in rows])[0] == found
    assert read_origin_split(None, []) == (None, {})


def test_scores_of_scores_tell_of_the_same_adapter(without_lanes, drawn):
    """Scored again under the run's own name, without --adapter: the record must not come to name another adapter."""
    (without_lanes / "adapter").mkdir()
    (without_lanes / "run.json").rename(without_lanes / "adapter/run.json")
    score_labels(without_lanes, drawn, "--adapter", "adapter")
    (without_lanes / "logs/r/scores.json").rename(without_lanes / "scores.json")
    for _ in range(2):
        scores, _ = score_labels(without_lanes, drawn)
        assert scores["trained_with"]["adapter"] == "adapter"
        (without_lanes / "logs/r/scores.json").rename(without_lanes / "scores.json")
    assert find_origin(without_lanes / "another", without_lanes / "p.jsonl").adapter == Path("adapter")


def test_rides_are_those_of_the_split_where_names_tell_none(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"model": "base"}}))
    split = [["1.jpg", "film"], ["2.jpg", "2.jpg"], ["3.jpg", "3"], ["0a1b2c3d-00000000.jpg", "film"]]
    split += [["4.jpg", "film"]]
    with open(tmp_path / "split.csv", "w", newline="") as file:
        rows = [[name, "test", name, RIGHT, group] for name, group in split]
        csv.writer(file).writerows([["name", "split", "image", "raw_caption", "group"], *rows])
    predictions = [Prediction(name, "x", [RIGHT], ride="mine" if name == "4.jpg" else None) for name, _ in split]
    names = [row.name for row in predictions]
    training, groups = read_origin_split(find_origin(tmp_path), names)
    assert training == []
    assert [row.ride for row in add_rides(predictions, groups)] == ["film", None, None, None, "mine"]
    assert read_origin_split(find_origin(tmp_path), [*names, "5.jpg"]) == (None, {})


def test_several_files_a_side_on_the_command_line(references, tmp_path):
    rows = predict(references, lambda name, text: text.replace("car", "bus") if name.startswith("0-") else text)
    for name in ("a1", "a2", "b1", "b2"):
        write_predictions(tmp_path / name, rows)
    one, two = ["--compare", "a1", "a2", "--against", "b1", "b2"], ["--compare", "a1", "a2", "b1"]
    finished = call_script("eval.py", *one, "--run-name", "r", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    compared = json.loads((tmp_path / "logs/r/comparison.json").read_text())
    assert compared["files"] == {"one": ["a1", "a2"], "other": ["b1", "b2"]}
    assert compared["scores"]["facts_f1"]["spread"] == {"one": 0, "other": 0}
    assert "A a1, a2\nB b1, b2\n" in finished.stdout and "over seeds" in finished.stdout
    refused = call_script("eval.py", *two, cwd=tmp_path)
    assert refused.returncode == 2 and "--against" in refused.stderr

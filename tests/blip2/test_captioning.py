"""Captions of any image from Python: what a user writes in three lines."""

import json

import numpy as np
import pytest
import torch
from conftest import call_script
from PIL import Image

from captioner.bdd100k.parsing import parse_caption
from captioner.blip2.captioning import load_captioner
from captioner.runtime.errors import UserError


@pytest.fixture(scope="module")
def adapter(undisturbed):
    return undisturbed[1] / "blip2-finetuned"


@pytest.fixture(scope="module")
def caption(adapter):
    return load_captioner(str(adapter))


@pytest.fixture(scope="module")
def images(scenes):
    return sorted((scenes / "images").iterdir())


def test_an_image_is_captioned_whatever_it_is_given_as(caption, images):
    image = Image.open(images[0])
    expected = caption(images[0])
    assert expected and isinstance(expected, str)
    for given in (str(images[0]), image, np.asarray(image), np.asarray(image.convert("RGBA"))):
        assert caption(given) == expected
    assert isinstance(caption(np.asarray(image)[:, :, 0]), str)  # grey
    assert caption([images[0], image]) == [expected, expected]
    assert caption([]) == []


def test_an_image_lies_upright_and_stays_as_it_was(caption, images):
    image = Image.open(images[0])
    turned = image.rotate(-90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 8  # shown rotated by 90 degrees to the left
    turned.info["exif"] = exif.tobytes()
    size = turned.size
    assert caption(turned) == caption(image)
    assert turned.size == size and turned.info["exif"] == exif.tobytes()


def test_captions_are_those_of_eval(caption, adapter, scenes, images, tmp_path):
    """Greedy and drawn, by name; more images than are captioned at once."""
    for number, flags in enumerate(([], ["--temperature", "0.9", "--top-p", "0.8"])):
        flags = ["--images", scenes / "images", "--adapter", adapter, *flags, "--run-name", str(number)]
        done = call_script("eval.py", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / f"logs/{number}/captions.jsonl").read_text().splitlines()
        expected = {row["name"]: row["prediction"] for row in map(json.loads, lines)}
        how = {} if number == 0 else {"greedy": False, "temperature": 0.9, "top_p": 0.8}
        assert len(images) > 16
        assert dict(zip((image.name for image in images), caption(images, **how), strict=True)) == expected


def test_a_draw_depends_on_seed_and_name_alone(adapter, images):
    caption, other = load_captioner(adapter), load_captioner(adapter, seed=7)
    drawn = caption(images[:3], greedy=False)
    assert caption([images[2], images[0]], greedy=False) == [drawn[2], drawn[0]]
    assert other(images[:3], greedy=False) != drawn
    caption.seed = 7
    assert caption(images[:3], greedy=False) == other(images[:3], greedy=False)


def test_before_and_after_fine_tuning(caption, adapter, images, tmp_path):
    before = caption(images[:4], finetuned=False)
    assert before != caption(images[:4])
    flags = ["--images", *images[:4], "--adapter", adapter, "--greedy", "--base", "--run-name", "base"]
    assert call_script("eval.py", *flags, cwd=tmp_path).returncode == 0
    lines = (tmp_path / "logs/base/captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == before


@pytest.mark.parametrize("how", [{}, {"finetuned": False}, {"greedy": False, "temperature": 1.3}])
def test_facts_and_certainty_of_each_sentence(caption, images, how):
    described = caption.describe(images[:3], **how)
    assert [description.text for description in described] == caption(images[:3], **how)
    for description in described:
        assert description.facts == parse_caption(description.text)
        assert "".join("".join(s.text for s in description.sentences).split()) == "".join(description.text.split())
        assert all(0 < sentence.certainty <= 1 for sentence in description.sentences)
        assert all(sentence.text.count(".") <= 1 for sentence in description.sentences[:-1])
    assert caption.describe(images[0], **how).text == described[0].text


def test_certainty_is_the_mean_probability_of_the_tokens(caption, images, monkeypatch):
    """Against transformers' own record of what it generated."""
    [(pixels, tokens)] = caption._generate(images[0], True, None)
    from captioner.blip2.batches import prefix_ids

    prefix = torch.tensor([prefix_ids(caption.model.config)])
    record = caption.model.generate(
        pixel_values=pixels, input_ids=prefix, attention_mask=torch.ones_like(prefix),
        generation_config=caption.generation, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = [step.softmax(-1)[0, token].item() for step, token in zip(record.logits, tokens[0], strict=True)]
    assert caption._measure(pixels, tokens, True)[0].tolist() == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr(caption.processor, "decode", lambda ids: {5: " car", 6: "."}[ids[0]])
    monkeypatch.setattr(
        caption.processor, "batch_decode", lambda rows, **_: ["".join({5: " car", 6: "."}[i] for i in r) for r in rows]
    )
    end = caption.generation.eos_token_id
    split = caption._split([5, 6, 5, 5, end, 5], [0.5, 1.0, 0.2, 0.4, 0.9, 0.9])
    assert split == [("car.", 0.75), ("car car", pytest.approx(0.3))]


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4, 2), dtype=np.uint8),
        np.zeros((2, 4, 4, 3), dtype=np.uint8),
        Image.new("L", (10_000, 10_000)),
        3,
        "nothing.jpg",
        __file__,
    ],
)
def test_what_is_no_image_is_one_message(caption, given):
    with pytest.raises(UserError, match="image"):
        caption(given)


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(UserError, match="no fine-tuned model"):
        load_captioner(tmp_path)

"""Images of another size than the checkpoint's, through training, captions and the merged model."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import call_script
from PIL import Image
from training_runs import train
from transformers import Blip2ForConditionalGeneration

from captioner.blip2.loading import load_model, load_processor
from captioner.publishing.merge import merge_adapter
from captioner.runtime.errors import UserError
from captioner.runtime.files import hash_file

CPU = torch.device("cpu")


@pytest.fixture
def size(tiny_checkpoint) -> int:
    """Two patches a side more than the checkpoint has."""
    vision = json.loads((tiny_checkpoint / "config.json").read_text())["vision_config"]
    return vision["image_size"] + 2 * vision["patch_size"]


def test_positions_are_those_that_transformers_interpolates(tiny_checkpoint, size):
    pixels = torch.randn(2, 3, size, size)
    whole = Blip2ForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    plain = whole.vision_model.eval()
    ours = load_model(tiny_checkpoint, False, CPU, size).vision_model.eval()
    expected = plain(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(ours(pixels).last_hidden_state, expected)
    with pytest.raises(RuntimeError):
        plain(pixels)


def test_images_are_made_that_large(tiny_checkpoint, size, drawn, tmp_path):
    processor = load_processor(tiny_checkpoint, size)
    processor.save_pretrained(tmp_path)
    image = Image.open(next((drawn / "images").iterdir()))
    for known in (processor, load_processor(tmp_path)):
        assert known(images=image, return_tensors="pt")["pixel_values"].shape == (1, 3, size, size)


def test_a_size_that_is_no_multiple_of_the_patches_is_refused(folder, settings, size):
    with pytest.raises(UserError, match=rf"--image-size {size - 1}: must be a multiple of "):
        train(settings, image_size=size - 1)


def test_a_model_of_another_size_captions_in_every_way(folder, settings, size, tiny_checkpoint, capsys):
    """By eval.py, by the lines of its card, and merged."""
    kept = train(settings, image_size=size)
    adapter = Path("blip2-finetuned")
    assert json.loads((adapter / "run.json").read_text())["config"]["image_size"] == size
    flags = ["--split", "train", "--num-samples", 1, "--greedy", "--run-name", "eval", "--max-new-tokens", 8]
    assert call_script("eval.py", *flags).returncode == 0
    row = json.loads(Path("logs/eval/predictions.jsonl").read_text())
    image = settings["images"] / row["name"]
    [lines] = re.findall("```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
    names = {tiny_checkpoint.name: tiny_checkpoint, adapter.name: adapter.absolute(), "scene.jpg": image}
    for name, path in names.items():
        lines = lines.replace(f'"{name}"', repr(str(path)))
    capsys.readouterr()
    exec(lines.replace("interpolate_pos_encoding=True, ", "interpolate_pos_encoding=True, max_new_tokens=8, "), {})
    said = capsys.readouterr().out.strip()
    merge_adapter(adapter, Path("merged"))
    merged = Blip2ForConditionalGeneration.from_pretrained("merged")
    processor = load_processor("merged")
    inputs = processor(images=Image.open(image).convert("RGB"), return_tensors="pt")
    tokens = merged.generate(**inputs, generation_config=merged.generation_config, max_new_tokens=8)
    assert processor.decode(tokens[0], skip_special_tokens=True).strip() == said
    assert merged.config.vision_config.image_size == size
    train(settings, image_size=size, features=Path("features"), output=Path("again"), run_name="again")
    assert hash_file(Path("again") / "adapter_model.safetensors") == kept and list(Path("features").rglob("*.features"))

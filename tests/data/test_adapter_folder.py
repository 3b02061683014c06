"""What a folder is that eval.py is to read an adapter from: a message for each thing for what it may be instead."""

import json

import pytest
from conftest import call_script

CONFIG = {"adapter_config.json": "{}"}
RUN = CONFIG | {"run.json": json.dumps({"config": {}})}


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("adapter", CONFIG, "an adapter that main.py did not write: run.json"),
        ("someone/blip2-bdd100k", None, "fetch it with hf download someone/blip2-bdd100k --local-dir FOLDER first"),
        (
            "adapter",
            None,
            "no such folder; train one with python main.py --output adapter (the demo's: python main.py --demo)",
        ),
        ("adapter", {"checkpoints": ""}, "its run is unfinished; go on with it by the command that began it"),
        ("adapter", {}, "no fine-tuned model in it; name the folder that main.py wrote, or train one"),
        ("adapter", RUN, "has no split.csv, which --push-to-hub does not upload: caption images with --images FOLDER"),
    ],
)
def test_what_is_no_adapter_of_main_py_is_told_apart(folder, drawn, name, files, said, images):
    if files is not None:
        (folder / name).mkdir(parents=True)
        for file, content in files.items():
            (folder / name / file).write_text(content)
    if files == RUN and images:
        return  # that is captioned
    run = call_script("eval.py", "--adapter", name, *(["--images", drawn / "images"] if images else []))
    assert run.returncode == 2 and run.stderr.startswith(f"error: {name}: ") and said in run.stderr
    assert run.stderr.count("\n") == 1

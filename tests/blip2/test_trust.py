"""Files from outside: none runs code, leaves its folder, exhausts the machine or corrupts a result."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from pickles import Planted
from training_runs import train, train_until

from captioner.blip2 import generation, lora
from captioner.blip2 import loading as blip2
from captioner.blip2.trust import check_adapter_folder, check_model_folder
from captioner.runtime.errors import UserError
from captioner.training.checkpoints import seal_checkpoint

CPU = torch.device("cpu")


def plant(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Planted(mark)))


@pytest.fixture
def copy(tiny_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture
def adapter(tiny_checkpoint, tmp_path) -> Path:
    folder = tmp_path / "adapter"
    lora.add_lora(blip2.load_model(tiny_checkpoint, False, CPU), "lm", 4, 8, 0.0).save_pretrained(folder)
    blip2.load_processor(tiny_checkpoint).save_pretrained(folder)
    generation.make_generation_config(blip2.AutoConfig.from_pretrained(tiny_checkpoint), 20).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"config": {"model": str(tiny_checkpoint), "load_in_4bit": False}}))
    return folder


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_planted_pickle_is_a_pickle(tmp_path):
    plant(tmp_path / "a.bin", tmp_path / "ran")
    pickle.loads((tmp_path / "a.bin").read_bytes())
    assert (tmp_path / "ran").exists()


def test_a_model_of_pickles_is_not_opened(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    plant(copy / "pytorch_model.bin", tmp_path / "ran")
    with pytest.raises(UserError, match=r"copy: the model can't be loaded .*safetensors"):
        blip2.load_model(copy, False, CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_of_a_model_is_refused(copy, tmp_path, name):
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit(copy / name, auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})
    for load in (lambda: blip2.load_processor(copy), lambda: blip2.load_model(copy, False, CPU)):
        with pytest.raises(UserError, match=rf"{name}: auto_map .*evil\.Evil"):
            load()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_in_the_place_of_a_file_is_named(copy, name):
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer, .* git lfs pull"):
        blip2.load_model(copy, False, CPU)


def test_links_that_leave_a_model_are_refused_but_those_of_the_hubs_cache_work(copy, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(copy.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert blip2.load_model(snapshot, False, CPU) is not None
    (snapshot / "extra.txt").symlink_to("/etc/passwd")
    (copy / "extra.txt").symlink_to("../models--a--b/blobs/0")
    for folder in (snapshot, copy):
        with pytest.raises(UserError, match=r"extra\.txt: a link to .*outside"):
            check_model_folder(folder)


def test_an_honest_adapter_loads(adapter):
    assert blip2.load_finetuned(adapter, CPU)[0].peft_config


def test_an_adapter_of_pickles_is_not_opened(adapter, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    plant(adapter / "adapter_model.bin", tmp_path / "ran")
    with pytest.raises(UserError, match=r"adapter_model\.bin: a pickle.*adapter_model\.safetensors"):
        blip2.load_finetuned(adapter, CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"no_such_key": 1},
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},
        {"target_modules": "(a+)+$"},
        {"modules_to_save": ["lm_head"]},
        {"peft_type": "XLORA"},
        {"base_model_name_or_path": "somebody/else"},
    ],
)
def test_settings_that_main_py_never_writes_are_refused(adapter, tiny_checkpoint, change):
    edit(adapter / "adapter_config.json", **change)
    with pytest.raises(UserError, match=r"adapter_config\.json: "):
        check_adapter_folder(adapter, lora.LORA_TARGETS.values(), str(tiny_checkpoint))


def test_an_adapter_of_another_model_is_refused(adapter):
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "lora_A" in name)
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, path)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: .*lora_A.* has shape .*another base model"):
        blip2.load_finetuned(adapter, CPU)


def test_an_adapter_of_another_vocabulary_is_refused(adapter, copy):
    edit(adapter / "run.json", config={"model": str(copy), "load_in_4bit": False})
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(copy))
    edit(copy / "config.json", image_token_index=5)
    with pytest.raises(UserError, match=r"<image> as \d+, the model \d+ and 5"):
        blip2.load_finetuned(adapter, CPU)


def test_a_model_without_its_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").unlink()
    config = blip2.load_config(copy)
    with pytest.raises(UserError, match=r"its tokenizer has 3 tokens .* a file is missing, such as tokenizer\.json"):
        blip2.load_processor(copy, model_config=config)


def test_an_adapter_without_its_settings_of_generation_is_refused(adapter):
    (adapter / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"generation_config\.json: can't be read"):
        blip2.load_finetuned(adapter, CPU)


def test_an_adapter_finds_a_model_that_was_moved(adapter, copy, tiny_checkpoint, tmp_path):
    edit(adapter / "run.json", config={"model": str(copy), "load_in_4bit": False})
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(copy))
    copy.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no model folder .* --model takes a folder"):
        blip2.load_finetuned(adapter, CPU)
    assert blip2.load_finetuned(adapter, CPU, model=str(tmp_path / "elsewhere"))[0].peft_config


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, settings) -> Path:
    """A folder with a run that was stopped after its second step."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_until(settings, 2)
    return folder


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin", "optimizer.bin"]
)
def test_a_pickle_in_a_checkpoint_does_not_run(folder, settings, stopped, tmp_path, name):
    """Planted with a manifest that vouches for it."""
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    checkpoint = folder / "blip2-finetuned/checkpoints/checkpoint-2"
    if name == "adapter_model.bin":
        (checkpoint / "adapter_model.safetensors").unlink()
    torch.save(Planted(tmp_path / "ran"), checkpoint / name)
    (checkpoint / "manifest.json").unlink()
    seal_checkpoint(checkpoint)
    with pytest.raises(UserError, match=rf"{name}.*--overwrite"):
        train(settings, resume=True)
    assert not (tmp_path / "ran").exists()


def test_no_link_leads_out_of_a_folder(tmp_path, drawn):
    from captioner.bdd100k.label_files import find_label_files
    from captioner.data.image_files import find_images, index_images

    (tmp_path / "data").mkdir()
    secret = shutil.copy(next((drawn / "images").iterdir()), tmp_path / "secret.jpg")
    shutil.copy(secret, tmp_path / "data/mine.jpg")
    (tmp_path / "data/link.jpg").symlink_to(secret)
    (tmp_path / "data/inner.jpg").symlink_to("mine.jpg")
    (tmp_path / "data/a.json").write_text("[]")
    (tmp_path / "data/b.json").symlink_to("/etc/passwd")
    assert sorted(index_images(tmp_path / "data")) == ["inner.jpg", "mine.jpg"]
    assert sorted(name for name, _ in find_images([tmp_path / "data"])) == ["inner.jpg", "mine.jpg"]
    assert [file.name for file in find_label_files([tmp_path / "data"])] == ["a.json"]


@pytest.mark.parametrize("row", ["../a.jpg,test,/etc/passwd,x", "a.jpg,test,/etc/passwd,x", "a,test,/etc/a,x"])
def test_a_split_of_somebody_else_names_no_other_file(tmp_path, row):
    from captioner.data.splits import read_split

    (tmp_path / "split.csv").write_text(f"name,split,image,raw_caption\n{row}\n")
    with pytest.raises(UserError, match=r"split\.csv: .*is no frame's"):
        read_split(tmp_path, "test")


def test_a_bomb_of_labels_is_not_unpacked(tmp_path, monkeypatch):
    import gzip

    from captioner.bdd100k import label_files, label_report

    monkeypatch.setattr(label_files, "GZIP_LIMIT", 10_000)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b" " * 20_000 + b"]"))
    with pytest.raises(UserError, match=r"a\.json\.gz: .*more than 10,000 bytes"):
        list(label_files.read_labels([tmp_path / "a.json.gz"], label_report.LabelReport()))


@pytest.mark.slow
def test_hostile_images_take_little_time_and_memory(tmp_path):
    import hostile_images as hostile

    found = {path.name: hostile.measure(path) for path in hostile.make_images(tmp_path)}
    assert all(one["seconds"] < hostile.LIMIT_SECONDS and one["mb"] < hostile.LIMIT_MB for one in found.values()), found
    assert found["65500-wide.jpg"]["mb"] > 40, "the meter sees an image of 46 million pixels"
    read = {name for name, one in found.items() if one["outcome"].startswith("read")}
    assert {"whole.jpg", "png-named.jpg", "animated.png", "65500-wide.jpg"} == read
    refused = {name for name, one in found.items() if one["outcome"] == "refused"}
    assert refused == found.keys() - read
    shown = {name for name, one in found.items() if one["shown"]}
    assert shown == read

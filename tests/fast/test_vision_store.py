"""Stored outputs of the ViT: the same captions, loss and adapter with them as without; nothing damaged is trusted."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_runs import hash_adapter, stop_at, train

import eval
from captioner.blip2.batches import load_pixels
from captioner.blip2.loading import load_model, load_processor
from captioner.blip2.vision import run_vision
from captioner.data import reading, splits
from captioner.fast import vision_store
from captioner.fast.vision_store import HEADER, VisionStore, compute_outputs, describe_outputs, open_store
from captioner.runtime.errors import UserError
from config import EvalConfig, TrainConfig, make_config

CPU = torch.device("cpu")
STORED = {"vision_store_gib": 1.0, "vision_store": Path("store"), "num_train_epochs": 1}


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return load_processor(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint, True, CPU)


@pytest.fixture(scope="module")
def images(scenes):
    return sorted((scenes / "images").iterdir())


def open_here(model, processor, gib=1.0, **about):
    """The store in the folder `store`; `about` changes what outputs are said to depend on."""
    described = describe_outputs(model.vision_model, model.config.vision_config, processor.image_processor) | about
    shape = vision_store.shape_outputs(model.config.vision_config)
    return VisionStore(Path("store"), described, shape, torch.float32, CPU, gib)


def compute(model, processor, images, store, **options):
    return compute_outputs(model.vision_model, model.config.vision_config, processor, images, store, **options)


def fill(model, processor, images, **options):
    """(outputs, the store, closed) of the images."""
    store = open_here(model, processor, **options)
    outputs, unreadable = compute(model, processor, images, store)
    assert not unreadable
    store.close()
    return outputs, store


def count_computed(monkeypatch):
    """A list that gets the number of images each time that the ViT runs."""
    counts, real = [], run_vision

    def run(vision, pixels):
        counts.append(len(pixels))
        return real(vision, pixels)

    monkeypatch.setattr(vision_store, "run_vision", run)
    return counts


def list_files():
    return sorted(Path("store").glob("*/*.bin"))


# --------------------------------------------------------------------------------------------------------------
# the same results


def test_a_recorded_vit_gives_the_same(folder, tiny_checkpoint, processor, images, monkeypatch):
    """With a stand-in for CUDA's graph, which does the work again and writes over what it gave before."""

    def record_graph(work):
        outputs = work()
        return SimpleNamespace(replay=lambda: outputs.copy_(work())), outputs

    monkeypatch.setattr(vision_store, "record_graph", record_graph)
    model = load_model(tiny_checkpoint, True, CPU)
    vision, settings = model.vision_model, model.config.vision_config
    expected, _ = compute(model, processor, images, None)
    assert vision_store.record_vision(vision) is vision  # a CPU waits for no launches
    monkeypatch.setattr(vision_store, "has_room_to_unpack", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**40, 2**40))
    monkeypatch.setattr("captioner.blip2.vision.BATCH", 4)
    monkeypatch.setattr(reading, "BATCH", 4)  # five passes of one recording
    store, write = open_here(model, processor), VisionStore._write
    monkeypatch.setattr(VisionStore, "_write", lambda *args: time.sleep(0.02) or write(*args))
    recorded = vision_store.record_vision(vision)
    assert isinstance(recorded, vision_store.RecordedVision) and recorded.recording is None
    outputs, _ = compute_outputs(recorded, settings, processor, images, store, kept=6)
    store.close()
    assert torch.equal(outputs, expected[:6])
    found = [store.look_up(image)[1] for image in images]
    assert torch.equal(torch.stack(found), expected)  # what was written while later passes ran


def test_outputs_beyond_those_kept_are_only_stored(folder, model, processor, images, monkeypatch):
    store = open_here(model, processor)
    monkeypatch.setattr(vision_store, "PART", 3)
    outputs, _ = compute(model, processor, images, store, kept=7)
    store.close()
    assert len(outputs) == 7 and len(list_files()) == 20
    again, store = fill(model, processor, images)
    assert store.found == 20 and torch.equal(again[:7], outputs)
    assert torch.equal(again, compute(model, processor, images, None)[0])


def test_outputs_are_those_of_the_vit_and_read_back_the_same(folder, model, processor, images, monkeypatch):
    pixels = torch.stack([load_pixels(image, processor) for image in images])
    with torch.inference_mode():
        expected = model.vision_model(pixels).last_hidden_state
    counts = count_computed(monkeypatch)
    assert torch.equal(compute(model, processor, images, None)[0], expected)
    first, _ = fill(model, processor, images[:7])
    again, store = fill(model, processor, images)  # seven are there, the rest is computed
    assert torch.equal(first, expected[:7]) and torch.equal(again, expected)
    assert counts == [20, 7, 13] and not store.damaged
    assert len(list_files()) == 20
    counts.clear()
    assert torch.equal(fill(model, processor, images[::-1])[0], expected.flip(0)) and counts == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory, settings):
    """A folder in which main.py has run for an epoch, without the store."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(settings, num_train_epochs=1)
    return folder


def test_training_gives_the_same_adapter(folder, settings, trained, capsys):
    without = hash_adapter(trained)
    assert train(settings, **STORED) == without
    assert "store had the frozen ViT's outputs of 0 of 20 images" in capsys.readouterr().out
    assert train(settings, **STORED, logging_steps=2) == without
    said = capsys.readouterr().out
    assert "store had the frozen ViT's outputs of 20 of 20 images" in said
    assert said.count(" test images") == 1


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_unreadable_images_are_left_out_as_without(folder, settings, scenes, trained, capsys, split):
    shutil.copytree(scenes / "images", "images")
    rows = (line.split(",") for line in (trained / "blip2-finetuned/split.csv").read_text().splitlines())
    bad = next(Path("images", row[0]) for row in rows if row[1] == split)
    bad.write_bytes(bad.read_bytes()[:400])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "MAX_UNREADABLE", 0.06)
        results = []
        for changes in ({"num_train_epochs": 1}, STORED, STORED):
            capsys.readouterr()
            adapter = train(settings, images=Path("images"), **changes)
            said = capsys.readouterr().out
            told = said.partition("1 of 20 images can't be read")[2].partition(" test images")[0]
            assert bad.name in told and bad.name not in Path("blip2-finetuned/split.csv").read_text()
            results.append((adapter, told))
        assert results[0] == results[1] == results[2]
        patch.setattr(splits, "MAX_UNREADABLE", 0.04)
        with pytest.raises(UserError, match=r"1 of 20 images can't be read, more than 4%.*" + bad.name):
            train(settings, images=Path("images"), **STORED)


def test_other_settings_are_refused_before_images_are_encoded(folder, settings, capsys):
    labels = Path("labels.json")
    frames = json.loads(settings["labels"][0].read_text())
    labels.write_text(json.dumps(frames))
    settings = settings | {"labels": (labels,)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 1)
        train(settings, **STORED)
    assert "encoding images" in capsys.readouterr().err
    with pytest.raises(UserError, match="--lora-rank: was 16, is 8"):
        train(settings, **STORED, lora_rank=8)
    assert "encoding images" not in capsys.readouterr().err
    rows = (line.split(",") for line in Path("logs/run/captions.csv").read_text().splitlines())
    last = [row[0] for row in rows][-1]
    labels.write_text(json.dumps([frame for frame in frames if frame["name"] != last]))
    with pytest.raises(UserError, match=r"data f.*: was .*, is "):
        train(settings, **STORED)


def test_a_stopped_run_closes_its_store(folder, settings, monkeypatch):
    """Its threads end without what is left to write; a run that ends by itself writes it."""
    closed, real = [], VisionStore.close

    def close(self, finish=True):
        closed.append(finish)
        real(self, finish)

    monkeypatch.setattr(VisionStore, "close", close)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 1)
        train(settings, **STORED)
    assert closed == [False]
    train(settings, **STORED)
    assert closed[1] is True


@pytest.mark.slow
def test_a_run_goes_on_with_stored_outputs_to_the_same_adapter(folder, settings, trained):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 2)
        train(settings, **STORED)
    for path in list_files()[:3]:
        path.write_bytes(b"damaged")
    assert train(settings, **STORED, resume=True) == hash_adapter(trained)


@pytest.mark.parametrize("fast", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_captions_are_the_same(folder, trained, monkeypatch, capsys, fast):
    monkeypatch.chdir(trained)
    shutil.rmtree("store", ignore_errors=True)

    def caption(name, **changes):
        options = {"split": "train", "num_samples": 9, "batch_size": 4, "max_new_tokens": 12, "fast": fast}
        eval.main(make_config(EvalConfig, **options | {"run_name": name, "seed": 3} | changes))
        said = capsys.readouterr().out
        return (Path("logs") / name / "predictions.jsonl").read_bytes(), said

    live, said = caption(f"live-{fast}")
    assert "outputs of" not in said and not Path("store").exists()
    store = {"vision_store": Path("store")}
    said = caption(f"few-{fast}", **store, num_samples=5)[1]
    assert "outputs of 0 of 5 images" in said
    mixed, said = caption(f"mixed-{fast}", **store)
    assert mixed == live and "outputs of 0 of 9" not in said and "outputs of 9 of 9" not in said
    stored, said = caption(f"stored-{fast}", **store)
    assert stored == live and "outputs of 9 of 9 images" in said
    blank, said = caption(f"blank-{fast}", **store, blank=True)
    assert blank != live and "outputs of" not in said
    assert caption(f"blank-off-{fast}", blank=True)[0] == blank


def test_captioning_reads_what_training_wrote(folder, settings, capsys):
    """Processor and model of the adapter's folder give the same key as those of the checkpoint."""
    train(settings, **STORED)
    for split in ("val", "test"):
        capsys.readouterr()
        options = {"split": split, "num_samples": "all", "greedy": True, "max_new_tokens": 5}
        eval.main(make_config(EvalConfig, **options, vision_store=Path("store")))
        found, asked = capsys.readouterr().out.partition("outputs of ")[2].split(" images")[0].split(" of ")
        assert found == asked != "0"


# --------------------------------------------------------------------------------------------------------------
# what is not trusted


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[HEADER + len(content) // 2] ^= 1
    elif how == "flipped header":
        content[HEADER - 1] ^= 1
    elif how == "truncated":
        content = content[:-1]
    elif how == "longer":
        content += b"x"
    elif how == "empty":
        content = b""
    elif how == "another image's":
        content = next(other for other in list_files() if other != path).read_bytes()
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "flipped header", "truncated", "longer", "empty", "another image's"])
def test_a_damaged_file_is_computed_anew(folder, model, processor, images, monkeypatch, how):
    expected, _ = fill(model, processor, images[:4])
    path = list_files()[2]
    before = path.read_bytes()
    damage(path, how)
    counts = count_computed(monkeypatch)
    outputs, store = fill(model, processor, images[:4])
    assert torch.equal(outputs, expected) and counts == [1] and store.damaged == [path]
    assert path.read_bytes() == before
    assert "3 of 4 images; 1 were damaged, and are computed anew" in store.describe()


def test_a_file_of_another_model_is_not_read(folder, model, processor, images):
    expected, store = fill(model, processor, images[:2])
    other = open_here(model, processor, weights="another's")
    assert other.folder != store.folder
    for path in list_files():
        shutil.copy(path, other.folder)
    assert [other.look_up(image)[1] for image in images[:2]] == [None, None]
    assert not list(other.folder.glob("*.bin"))  # deleted
    assert torch.equal(fill(model, processor, images[:2])[0], expected)


def test_weights_precision_and_preparation_have_a_folder_each(folder, tiny_checkpoint, model, processor):
    def key(model, processor=processor):
        return open_here(model, processor).key

    plain = load_model(tiny_checkpoint, False, CPU)
    keys = [key(model), key(plain), key(load_model(tiny_checkpoint, False, CPU).bfloat16())]
    with torch.no_grad():
        plain.vision_model.encoder.layers[1].mlp.fc2.weight[3, 5] += 1e-4
    keys.append(key(plain))
    scaled = load_model(tiny_checkpoint, True, CPU)
    scaled.vision_model.encoder.layers[0].mlp.fc1.weight.quant_state.absmax[0] += 1
    keys.append(key(scaled))
    other = load_processor(tiny_checkpoint)
    other.image_processor.resample = 2
    keys.append(key(model, other))
    assert len(set(keys)) == len(keys)
    assert key(load_model(tiny_checkpoint, True, CPU), load_processor(tiny_checkpoint)) == keys[0]


def test_an_image_is_known_by_its_content(folder, model, processor, images, monkeypatch):
    fill(model, processor, images[:2])
    shutil.copy(images[0], "renamed.jpg")
    shutil.copy(images[1], images[2].name)  # another image under a name that was there before
    counts = count_computed(monkeypatch)
    fill(model, processor, [Path("renamed.jpg"), Path(images[2].name)])
    assert counts == []
    shutil.copy(images[3], "renamed.jpg")
    outputs, _ = fill(model, processor, [Path("renamed.jpg")])
    assert counts == [1] and torch.equal(
        outputs, run_vision(model.vision_model, load_pixels(images[3], processor)[None])
    )


def test_unreadable_images_are_left_out_of_the_outputs(folder, model, processor, images, scenes, monkeypatch):
    shutil.copytree(scenes / "images", "images")
    paths = sorted(Path("images").iterdir())[:6]
    paths[2].write_bytes(b"no image")
    paths[4].unlink()
    store, slow = open_here(model, processor), VisionStore._write
    monkeypatch.setattr(VisionStore, "_write", lambda *args: time.sleep(0.05) or slow(*args))
    outputs, unreadable = compute(model, processor, paths, store)
    assert list(unreadable) == [paths[2], paths[4]]
    assert all(f"{path}: not readable as an image" in reason for path, reason in unreadable.items())
    expected = compute(model, processor, [images[row] for row in (0, 1, 3, 5)], None)[0]
    assert torch.equal(outputs, expected)
    store.close()
    assert torch.equal(compute(model, processor, paths, store)[0], expected)  # what was written is right too


# --------------------------------------------------------------------------------------------------------------
# disks and processes


def test_no_more_is_written_than_the_bound(folder, model, processor, images, capsys):
    size = HEADER + 4 * vision_store.shape_outputs(model.config.vision_config)[0] * 64
    outputs, _ = fill(model, processor, images, gib=(3.5 * size + 2000) / 2**30)
    assert len(list_files()) == 3
    assert capsys.readouterr().out.count("no room is left") == 1
    assert torch.equal(outputs, compute(model, processor, images, None)[0])
    fill(model, processor, images[5:9], gib=3 * size / 2**30, weights="another's")  # the bound is for all models
    assert len(list_files()) == 3
    fill(model, processor, images, gib=0)
    assert len(list_files()) == 3


def test_a_folder_that_cant_be_made_is_no_obstacle(folder, model, processor, images, capsys):
    Path("store").write_text("a file")
    outputs, _ = fill(model, processor, images[:2])
    assert torch.equal(outputs, compute(model, processor, images[:2], None)[0])
    said = capsys.readouterr().out
    assert said.count("are kept there no more") == 1 and "store" in said


def test_a_folder_that_becomes_unwritable_is_no_obstacle(folder, model, processor, images, capsys, monkeypatch):
    store = open_here(model, processor)
    shutil.rmtree(store.folder)
    outputs, _ = compute(model, processor, images[:2], store)
    store.close()
    assert torch.equal(outputs, compute(model, processor, images[:2], None)[0])
    assert capsys.readouterr().out.count("are kept there no more") == 1


def write_and_die() -> None:
    """As a run that is killed between writing a stored output and giving the file its name."""
    store = VisionStore(Path("store"), {}, (4, 8), torch.float32, CPU, 1.0)
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    store.save(["ab" * 32], [torch.ones(4, 8)])
    store.close()


def test_a_kill_in_writing_leaves_no_file_under_its_name(folder):
    killed = multiprocessing.get_context("fork").Process(target=write_and_die)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    [left] = Path("store").glob("*/.*.tmp")
    assert list_files() == [] and left.stat().st_size == HEADER + 4 * 8 * 4
    options = ({}, (4, 8), torch.float32, CPU, 1.0)
    VisionStore(Path("store"), *options)
    assert left.exists()  # it may be another run's, that is writing it
    os.utime(left, (0, 0))
    VisionStore(Path("store"), *options)
    assert not left.exists()


def test_the_header_holds_the_sum_of_what_follows(folder, model, processor, images):
    _, store = fill(model, processor, images[:1])
    [path] = list_files()
    content = path.read_bytes()
    assert path.stem == hashlib.sha256(images[0].read_bytes()).hexdigest()
    assert content[HEADER - 32 : HEADER] == hashlib.sha256(content[HEADER:]).digest()
    about = json.loads((store.folder / "settings.json").read_text())
    assert about["machine"]["torch"] == torch.__version__ and about["weights"]


def test_it_is_for_gpus_unless_asked_for(folder, model, processor):
    parts = (model.vision_model, model.config.vision_config, processor)
    assert open_store(make_config(TrainConfig), *parts) is None
    assert open_store(make_config(TrainConfig, vision_store="off"), *parts) is None
    assert open_store(make_config(EvalConfig, vision_store=Path("store")), *parts).root == Path("store")
    with pytest.raises(UserError, match="--vision-store-disk-gib -1"):
        make_config(TrainConfig, vision_store_disk_gib=-1)
    with pytest.raises(UserError, match="--vision-store-disk-gib -1"):
        make_config(EvalConfig, vision_store_disk_gib=-1)


def test_more_than_memory_allows_is_computed_in_training(folder, settings, trained, capsys):
    """Then nothing is read from disk either, and all images are checked first."""
    adapter = train(settings, **(STORED | {"vision_store_gib": 0.0}))
    assert not Path("store").exists() and "checking images" in capsys.readouterr().err
    assert adapter == hash_adapter(trained) == hash_adapter(Path())

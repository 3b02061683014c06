"""Kept outputs of the ViT: the same captions, loss and adapter with them as without; nothing damaged is trusted."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from training_runs import hash_adapter, stop_at, train

import eval
from captioner.blip2.loading import load_model, load_processor
from captioner.blip2.pixels import load_pixels
from captioner.blip2.vit import run_vision
from captioner.data import splits
from captioner.fast import captioning, features
from captioner.fast.features import SUM, FeatureFile, choose_place, keep_features, measure_limit
from captioner.fast.speed import unpack_nf4
from captioner.runtime.errors import UserError
from captioner.runtime.files import lock_folder
from config import EvalConfig, TrainConfig, make_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
STORE = Path("store")
STORED = {"features": STORE, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return load_processor(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint, True, CPU)


@pytest.fixture(scope="module")
def images(scenes):
    return sorted((scenes / "images").iterdir())


@pytest.fixture(scope="module")
def expected(model, processor, images):
    """The ViT's outputs (N, P, D) of all images."""
    pixels = torch.stack([load_pixels(image, processor) for image in images])
    with torch.inference_mode():
        return model.vision_model(pixels).last_hidden_state


def open_file(model, processor) -> FeatureFile:
    return FeatureFile(STORE, model.vision_model, model.config.vision_config, processor)


def keep(model, processor, images, limit_gib=1.0) -> torch.Tensor:
    """The kept outputs (N, P, D) of images that can all be read."""
    kept, unreadable = keep_features(open_file(model, processor), limit_gib, images)
    assert not unreadable
    return torch.stack([kept[image] for image in images])


def open_rows(model, processor) -> torch.Tensor:
    """The rows (N, P, D) of the file, as a run reads them."""
    file = open_file(model, processor)
    return file.view_rows(file.map_records())


def find_file() -> Path:
    """The one file that is kept."""
    [path] = STORE.iterdir()
    return path


def count_records(file: FeatureFile) -> float:
    return os.path.getsize(find_file()) / file.record.itemsize


@pytest.fixture
def counts(monkeypatch):
    """A list that gets the number of images each time that the ViT runs."""
    counts, real = [], run_vision

    def run(vision, pixels):
        counts.append(len(pixels))
        return real(vision, pixels)

    monkeypatch.setattr(features, "run_vision", run)
    return counts


# --------------------------------------------------------------------------------------------------------------
# the same results


def test_kept_outputs_are_those_of_the_vit(folder, model, processor, images, expected, counts, capsys):
    assert torch.equal(keep(model, processor, images[:7]), expected[:7])
    assert torch.equal(keep(model, processor, images), expected)  # seven are there, the rest is computed
    assert torch.equal(keep(model, processor, images[::-1]), expected.flip(0))
    assert counts == [7, 13]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" had ")[1] for line in said] == ["0 of 7", "7 of 20", "20 of 20"]
    file = open_file(model, processor)
    assert find_file() == file.path and count_records(file) == 20
    assert torch.equal(open_rows(model, processor), expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, settings):
    """A folder in which main.py has run for an epoch, without kept outputs."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(settings, num_train_epochs=1)
    return folder


def test_training_gives_the_same_adapter(folder, settings, trained, capsys):
    without = hash_adapter(trained)
    assert train(settings, **STORED) == without
    assert "store had 0 of 20" in capsys.readouterr().out
    assert train(settings, **STORED, logging_steps=2) == without
    said = capsys.readouterr().out
    assert "store had 20 of 20" in said and said.count(" test images") == 1


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


@pytest.mark.slow
def test_a_run_goes_on_with_damaged_outputs_to_the_same_adapter(folder, settings, trained, capsys):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 2)
        train(settings, **STORED)
    damage("flipped", 3, 20)
    assert train(settings, **STORED, resume=True) == hash_adapter(trained)
    assert "store had 19 of 20, and 1 damaged ones computed anew" in capsys.readouterr().out


@pytest.mark.parametrize("fast", ["on", pytest.param("auto", marks=pytest.mark.slow)])
def test_captions_are_the_same(folder, trained, model, processor, images, monkeypatch, capsys, fast):
    """With some of the images' outputs kept, with all, and with none; with the ViT's NF4 values unpacked too."""
    monkeypatch.chdir(trained)
    shutil.rmtree(STORE, ignore_errors=True)

    def caption(name, **changes):
        options = {"split": "train", "num_samples": 9, "batch_size": 4, "max_new_tokens": 12, "fast": fast}
        eval.main(make_config(EvalConfig, **options | {"run_name": f"{name}-{fast}", "seed": 3} | changes))
        said = capsys.readouterr().out
        return (Path("logs") / f"{name}-{fast}" / "predictions.jsonl").read_bytes(), said

    live, said = caption("live")
    assert "outputs of" not in said
    empty, said = caption("empty", features=STORE)
    assert empty == live and "outputs of" not in said
    keep(model, processor, images[::2])
    mixed, said = caption("mixed", features=STORE)
    assert mixed == live and 0 < int(said.partition("outputs of ")[2].split()[0]) < 9
    keep(model, processor, images)
    stored, said = caption("stored", features=STORE)
    assert stored == live and "outputs of 9 of 9 images" in said
    blank, said = caption("blank", features=STORE, blank=True)
    assert blank != live and "outputs of" not in said
    assert caption("blank-off", blank=True)[0] == blank
    said = caption("off", features=STORE, fast="off")[1]
    assert "outputs of" not in said

    unpacked = []
    monkeypatch.setattr(captioning, "has_room_to_unpack", lambda model, device, times: times == captioning.AMPLE_ROOM)
    monkeypatch.setattr(captioning, "unpack_nf4", lambda model: unpacked.append(unpack_nf4(model)))
    assert caption("unpacked", fast="on")[0] == live
    assert len(unpacked) == 1 and unpacked[0] > 5  # layers of the ViT


def test_more_tokens_than_the_model_has_positions_are_refused(trained, monkeypatch):
    monkeypatch.chdir(trained)
    with pytest.raises(UserError, match=r"--max-new-tokens 9999: the model has room for \d+"):
        eval.main(make_config(EvalConfig, num_samples=1, max_new_tokens=9999, fast="on", run_name="long"))


def test_captioning_finds_what_training_kept(folder, settings, capsys, monkeypatch):
    """Processor and model of the adapter's folder give the same key as those of the checkpoint."""
    monkeypatch.setattr(features, "list_folders", lambda setting, output, device: [Path(f"{output}-features")])
    train(settings, num_train_epochs=1)
    for split in ("val", "test"):
        capsys.readouterr()
        options = {"split": split, "num_samples": "all", "greedy": True, "max_new_tokens": 5}
        eval.main(make_config(EvalConfig, **options))
        found, asked = capsys.readouterr().out.partition("outputs of ")[2].split(" images")[0].split(" of ")
        assert found == asked != "0"


# --------------------------------------------------------------------------------------------------------------
# what is not trusted


def damage(how: str, number: int, count: int) -> None:
    """Of the file, which has `count` records, mostly the record of that number."""
    content = bytearray(find_file().read_bytes())
    size, head = len(content) // count, 2 * SUM
    place = number * size
    if how == "flipped":
        content[place + size // 2] ^= 1
    elif how == "flipped image sum":
        content[place] ^= 1
    elif how == "flipped sum":
        content[place + head - 1] ^= 1
    elif how == "cut":
        del content[place + size // 2 :]
    elif how == "cut sums":  # as if the disk had not got what follows, nor the next record's
        for start, end in ((place + SUM + 8, place + head), (place + size, place + size + head)):
            content[start:end] = bytes(end - start)
    elif how == "no sums":
        for start in range(0, len(content), size):
            content[start : start + head] = bytes(head)
    elif how == "empty":
        content.clear()
    elif how == "rows exchanged":
        one, other = slice(head, size), slice(place + head, place + size)
        content[one], content[other] = content[other], content[one]
    elif how == "another image's":
        content[place : place + SUM] = content[:SUM]
    find_file().write_bytes(content)


@pytest.mark.parametrize(
    ("how", "computed", "told"),
    [
        ("flipped", 1, 1),
        ("flipped image sum", 1, 0),  # as if there were no row
        ("flipped sum", 1, 1),
        ("cut", 2, 0),  # what the file has lost it never had
        ("cut sums", 2, 1),
        ("no sums", 4, 0),
        ("empty", 4, 0),
        ("rows exchanged", 2, 2),
        ("another image's", 2, 1),
    ],
)
def test_damaged_rows_are_computed_anew(
    folder, model, processor, images, expected, counts, capsys, how, computed, told
):
    keep(model, processor, images[:4])
    damage(how, 2, 4)
    counts.clear()
    capsys.readouterr()
    assert torch.equal(keep(model, processor, images[:4]), expected[:4]) and counts == [computed]
    said = capsys.readouterr().out
    assert f"had {4 - computed} of 4" in said and (f"{told} damaged" in said if told else "damaged" not in said)
    keep(model, processor, images[:4])
    assert counts == [computed]
    kept = open_file(model, processor).read(images[:5])
    assert list(kept) == images[:4] and torch.equal(torch.stack(list(kept.values())), expected[:4])


def test_rows_of_another_model_are_not_read(folder, tiny_checkpoint, model, processor, images, expected, counts):
    keep(model, processor, images[:4])
    reader, path = open_rows(model, processor), find_file()
    content = path.read_bytes()
    other = load_model(tiny_checkpoint, False, CPU)
    assert open_file(other, processor).read(images) == {}
    assert not torch.equal(keep(other, processor, images[:2]), expected[:2])
    assert counts == [4, 2] and find_file() != path and count_records(open_file(other, processor)) == 2
    assert torch.equal(reader, expected[:4])  # a run that reads them goes on with them
    path.write_bytes(content)
    assert len(open_file(model, processor).read(images)) == 4
    open_file(other, processor).path.replace(path)  # as if they were this model's
    assert open_file(model, processor).read(images) == {}


def replace_file(model, processor, images) -> None:
    """What another run does that has room for the rows of these images alone."""
    keep(model, processor, images, len(images) * open_file(model, processor).record.itemsize / 2**30)


def test_a_run_has_its_rows_whatever_comes_when_they_are_written(
    folder, model, processor, images, expected, monkeypatch
):
    """Another run puts its own file in the place as soon as the lock is free."""

    @contextmanager
    def lock(*args):
        with lock_folder(*args):
            yield
        monkeypatch.setattr(features, "lock_folder", lock_folder)
        replace_file(model, processor, images[10:])

    monkeypatch.setattr(features, "lock_folder", lock)
    assert torch.equal(keep(model, processor, images[:10]), expected[:10])


def test_no_row_is_read_by_the_sums_of_another_file(folder, model, processor, images, expected, monkeypatch):
    """A run that has room for no more puts another file in the place while one reads."""
    keep(model, processor, images)
    real = FeatureFile.map_records

    def map_records(self):
        records = real(self)
        monkeypatch.setattr(FeatureFile, "map_records", real)
        replace_file(model, processor, images[::-2])
        return records

    monkeypatch.setattr(FeatureFile, "map_records", map_records)
    kept = open_file(model, processor).read(images)
    assert all(torch.equal(kept[image], expected[images.index(image)]) for image in kept)


def test_rows_of_an_image_that_is_there_twice_stay(folder, model, processor, images, expected):
    """Another run adds rows while one has both in use."""
    shutil.copy(images[0], "copy.jpg")
    rows, _ = keep_features(open_file(model, processor), 1.0, [images[0], Path("copy.jpg"), images[1]])
    assert torch.equal(keep(model, processor, images[2:6]), expected[2:6])
    assert torch.equal(torch.stack([*rows.values()]), expected[[0, 0, 1]])


def test_what_is_no_file_of_features_stays(folder, model, processor, images):
    names = ["features.bin", "index.bin", "about.json", "vit.features", "vit-1.txt"]
    STORE.mkdir()
    for name in [*names, "vit-0123456789abcdef.features"]:
        (STORE / name).write_text(name)
    keep(model, processor, images[:2])
    assert {path.name for path in STORE.iterdir()} == {*names, open_file(model, processor).path.name}
    assert all((STORE / name).read_text() == name for name in names)


def test_weights_precision_and_preparation_have_a_key_each(folder, tiny_checkpoint, model, processor):
    def key(model, processor=processor):
        return open_file(model, processor).key

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


def test_an_image_is_known_by_its_content(folder, model, processor, images, expected, counts):
    keep(model, processor, images[:2])
    shutil.copy(images[0], "renamed.jpg")
    shutil.copy(images[1], images[2].name)  # another image under a name that was there before
    keep(model, processor, [Path("renamed.jpg"), Path(images[2].name)])
    assert counts == [2]
    shutil.copy(images[3], "renamed.jpg")
    assert torch.equal(keep(model, processor, [Path("renamed.jpg")])[0], expected[3]) and counts == [2, 1]


def test_unreadable_images_get_no_row(folder, model, processor, images, expected):
    shutil.copytree(images[0].parent, "images")
    paths = sorted(Path("images").iterdir())[:6]
    paths[2].write_bytes(b"no image")
    paths[4].unlink()
    for _ in range(2):
        kept, unreadable = keep_features(open_file(model, processor), 1.0, paths)
        assert list(unreadable) == [paths[2], paths[4]]
        assert all(f"{path}: not readable as an image" in reason for path, reason in unreadable.items())
        assert torch.equal(torch.stack(list(kept.values())), expected[[0, 1, 3, 5]])
    shutil.copy(images[4], paths[4])
    assert keep_features(open_file(model, processor), 1.0, paths)[0].keys() == {*paths} - {paths[2]}
    assert count_records(open_file(model, processor)) == 6


# --------------------------------------------------------------------------------------------------------------
# processes that are killed, or share the work


def fork(work, *args) -> int:
    """The exit code of a process that does the work."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    process.join()
    return process.exitcode


def test_a_killed_run_keeps_what_it_has_written(folder, model, processor, images, expected, counts, monkeypatch):
    """The kill comes between a row and its sums."""
    monkeypatch.setattr(features, "WRITERS", 1)
    real, sums = FeatureFile.sum_row, []

    def sum_row(self, *args):
        sums.append(args)
        if len(sums) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args)

    def keep_and_die():
        FeatureFile.sum_row = sum_row
        keep(model, processor, images)

    assert fork(keep_and_die) == -signal.SIGKILL
    assert len(open_file(model, processor).read(images)) == 5
    assert torch.equal(keep(model, processor, images), expected) and counts == [15]
    assert count_records(open_file(model, processor)) == 20


def test_two_processes_write_a_share_each(folder, model, processor, images, expected):
    file = open_file(model, processor)
    STORE.mkdir()
    numbers, missing, _ = file.prepare(images, 1.0)
    assert missing == images
    shares = [{image: numbers[image] for image in images[place::2]} for place in range(2)]
    pixels = [torch.stack([load_pixels(image, processor) for image in share]) for share in shares]

    def write(place):
        file.write(shares[place], [(pixels[place], [None] * len(pixels[place]))])

    writers = [multiprocessing.get_context("fork").Process(target=write, args=(place,)) for place in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert torch.equal(torch.stack(list(file.read(images).values())), expected)


def test_processes_of_several_machines_keep_none(folder, monkeypatch, capsys):
    monkeypatch.setattr(features, "find_place", lambda: (0, 4))
    assert choose_place(make_config(TrainConfig, features=STORE), 1, CPU) is None
    assert "computed in each pass (the processes run on several machines)" in capsys.readouterr().out


def test_a_folder_that_another_run_fills_is_refused(folder, model, processor, images):
    with lock_folder(STORE, "--features"), pytest.raises(UserError, match="--features store: another run is writing"):
        keep(model, processor, images[:2])


# --------------------------------------------------------------------------------------------------------------
# disk and memory


@pytest.fixture
def disks(folder, monkeypatch):
    """{folder: bytes that are free on its disk}, of the folder of the output and the temporary one."""
    disks = {Path.cwd(): 1000, Path.cwd() / "tmp": 1000}
    (folder / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(folder / "tmp"))

    def measure_free(place: Path) -> int:
        return next(disks[parent] for parent in (place / "x").absolute().parents if parent in disks)

    monkeypatch.setattr(features, "measure_free", measure_free)
    return disks


def choose(need=100, device=GPU, **settings) -> Path | None:
    return choose_place(make_config(TrainConfig, output=Path("out"), **settings), need, device)


def test_the_roomiest_disk_is_taken_and_half_of_it(disks, capsys):
    near, far = list(disks)
    disks[near] = 1002
    assert choose(501) == Path.cwd() / "out-features"
    assert measure_limit(Path.cwd() / "out-features", None) == 501
    disks[far] = 1004
    place = choose(502)
    assert place.parent == far and measure_limit(place, None) == 502
    assert capsys.readouterr().out == ""
    assert choose(503) is None
    told = f"the frozen ViT's outputs are not kept, but computed in each pass ({place} may take "
    assert capsys.readouterr().out.startswith(told)
    disks[near] = 2000
    place.mkdir()
    assert choose() != place
    (place / "vit-0123456789abcdef.features").touch()
    assert choose() != place  # an earlier run had no room there
    (place / "vit-0123456789abcdef.features").write_bytes(b"rows")
    assert choose() == place  # which holds some already
    assert features.find_folder("auto", Path("out"), GPU) == place
    assert features.find_folder("auto", Path("other"), GPU) is None


def test_the_user_says_where_and_how_much(disks, capsys):
    def find_most(limit, **settings):
        """So many bytes may be kept, and no more."""
        assert choose(int(limit), **settings) == STORE and capsys.readouterr().out == ""
        assert choose(int(limit) + 1, **settings) is None
        assert f"(store may take {limit / 1e9:.1f} GB" in capsys.readouterr().out

    gib = 2**30
    disks[Path.cwd()] = 3 * gib
    for device in (GPU, CPU):
        find_most(1.5 * gib, features=STORE, device=device)
        find_most(2.5 * gib, features=STORE, device=device, features_disk_gib=2.5)
        find_most(3 * gib, features=STORE, device=device, features_disk_gib=5)
    STORE.mkdir()
    with open(STORE / "vit-0123456789abcdef.features", "wb") as file:
        file.truncate(gib)
    (STORE / "features.bin").write_bytes(bytes(1000))  # no file of features
    find_most(2 * gib, features=STORE)  # what they take is theirs
    assert capsys.readouterr().out == ""
    for settings, reason in (({"features": "off"}, "off"), ({"device": CPU}, "auto keeps them where there is a GPU")):
        assert choose(**settings) is None
        assert f"not kept, but computed in each pass (--features {reason})" in capsys.readouterr().out
    assert choose(gib, features=STORE, features_disk_gib=0.5) is None
    assert "(store may take 0.5 GB (--features-disk-gib), they take 1.1)" in capsys.readouterr().out


def test_rows_of_other_images_go_where_there_is_no_room_for_both(folder, model, processor, images, expected, counts):
    file = open_file(model, processor)
    size_gib = file.record.itemsize / 2**30
    keep(model, processor, images[:6])
    assert torch.equal(keep(model, processor, images[4:12], 12 * size_gib), expected[4:12])
    assert count_records(file) == 12 and counts == [6, 6]
    reader = open_rows(model, processor)
    assert torch.equal(keep(model, processor, images[12:], 8 * size_gib), expected[12:])
    assert count_records(file) == 8 and counts == [6, 6, 8]
    assert len(reader) == 12 and torch.equal(reader[:6], expected[:6])


def test_a_run_without_room_trains_without(folder, settings, trained, capsys):
    adapter = train(settings, **STORED, features_disk_gib=0)
    said = capsys.readouterr()
    assert said.out.count("the frozen ViT's outputs are not kept") == 1 and "checking images" in said.err
    assert not STORE.exists() and adapter == hash_adapter(trained)


def test_a_folder_that_cant_be_written_is_named(folder, model, processor, images, monkeypatch):
    STORE.write_text("a file")
    with pytest.raises(UserError, match="--features store: can't be written"):
        keep(model, processor, images[:2])
    STORE.unlink()
    STORE.mkdir()
    open_file(model, processor).path.mkdir()
    with pytest.raises(UserError, match=r"store: can't be written .*--features off"):
        keep(model, processor, images[:2])


def test_the_disk_space_is_taken_before_images_are_encoded(folder, model, processor, images, counts, mount):
    mount(STORE, "64k")  # of 89,600 bytes
    with pytest.raises(UserError, match=r"store: can't be written \(No space left on device\); free some space"):
        keep(model, processor, images)
    assert counts == []


def test_a_disk_that_is_too_small_is_given_back(folder, model, processor, images, expected, monkeypatch):
    """ext4 gives a file all that it has before it says that this is not enough."""
    keep(model, processor, images[:4])
    size = find_file().stat().st_size

    def take_all(file, start, length):
        os.ftruncate(file, length - 1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", take_all, raising=False)
    with pytest.raises(UserError, match=r"store: can't be written \(No space left on device\)"):
        keep(model, processor, images)
    assert find_file().stat().st_size == size
    assert torch.equal(torch.stack([*open_file(model, processor).read(images).values()]), expected[:4])


def test_a_row_that_the_disk_takes_in_part_is_named(folder, model, processor, images, mount, monkeypatch):
    """Where space can't be taken beforehand."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(features, "WRITERS", 1)
    mount(STORE, "64k")  # the last of 15 rows, of 4,480 bytes with their sums, finds room for half of it
    with pytest.raises(UserError, match=r"store: can't be written \(No space left on device\); free some space"):
        keep(model, processor, images[:15])
    assert len(open_file(model, processor).read(images)) == 14


class LargeVision(torch.nn.Module):
    """Outputs (B, 257, 704) in fp32, 0.7 MB for each image."""

    def __init__(self):
        super().__init__()
        self.post_layernorm = torch.nn.LayerNorm(704)

    def forward(self, pixel_values):
        return SimpleNamespace(last_hidden_state=pixel_values[:, :1, :1, :1].reshape(-1, 1, 1).expand(-1, 257, 704) + 1)


def test_neither_writing_nor_reading_holds_all_rows_in_memory(folder, processor):
    count, size = 800, 257 * 704 * 4
    sizes = {"image_size": 224, "patch_size": 14, "hidden_size": 704, "num_attention_heads": 1}
    vision_config = SimpleNamespace(**sizes, hidden_act="gelu", layer_norm_eps=1e-6)
    images = [Path(f"{number}.jpg") for number in range(count)]
    for number, image in enumerate(images):
        image.write_bytes(number.to_bytes(2))
    pixels = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).float()
    file = FeatureFile(STORE, LargeVision(), vision_config, processor)
    process, peak, done = psutil.Process(), [0], threading.Event()

    def measure():
        memory = process.memory_info()
        return memory.rss - memory.shared  # the page cache is the system's

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], measure())

    before, watcher = measure(), threading.Thread(target=watch)
    watcher.start()
    reading = ((part, [None] * len(part)) for part in pixels.split(32))
    kept, _ = keep_features(file, 1.0, images, reading)
    assert kept[images[7]].mean() == 8
    assert torch.equal(torch.stack([kept[image][3, 5] for image in images]), torch.arange(count) + 1.0)
    assert sum(output.sum(dtype=torch.float64).item() for output in kept.values()) > 0  # all is read
    done.set()
    watcher.join()
    assert os.path.getsize(find_file()) == count * (2 * SUM + size)
    assert peak[0] - before < count * size / 2

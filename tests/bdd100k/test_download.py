"""Kaggle: the real kagglehub client against a server on this machine that speaks the few calls it makes."""

import errno
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from loopback import DATASET, IMAGES, KaggleServer, draw_dataset_files, zip_files

from captioner.bdd100k import download
from captioner.bdd100k.download import IMAGE_FOLDER, LABEL_FILES, fetch_images, fetch_labels
from captioner.bdd100k.label_files import read_labels
from captioner.bdd100k.label_report import LabelReport
from captioner.data.image_files import index_images
from captioner.runtime.errors import UserError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def dataset_files() -> dict[str, bytes]:
    return draw_dataset_files()


@pytest.fixture
def server(dataset_files, tmp_path, monkeypatch) -> Iterator[KaggleServer]:
    """A loopback Kaggle that this process's kagglehub is pointed at, and a disk with room."""
    with KaggleServer(dataset_files, tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: Usage(0, 0, 1 << 40))
        yield server


def version_folder(server: KaggleServer) -> Path:
    return server.cache / "datasets" / DATASET


def assert_whole(server: KaggleServer, images: Path) -> None:
    root = version_folder(server)
    assert images == root / IMAGE_FOLDER
    for path, content in server.files.items():
        assert (root / path).read_bytes() == content, path
    assert sorted(index_images(images)) == sorted(IMAGES)
    assert not list(server.cache.rglob("*.archive"))


def assert_user_error(call, *parts: str) -> UserError:
    """`call` must raise UserError with all `parts` in its one line."""
    with pytest.raises(UserError) as caught:
        call()
    for part in (DATASET, *parts):
        assert part in str(caught.value), (part, str(caught.value))
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value


# --------------------------------------------------------------------------------------------------------------
# what is fetched


@pytest.mark.parametrize("zip_single", [True, False])
@pytest.mark.parametrize("subset", ["val", "train", "both"])
def test_labels_are_fetched_alone(server, subset, zip_single):
    server.zip_single = zip_single
    subsets = ["val", "train"] if subset == "both" else [subset]
    files = fetch_labels(DATASET, subset)
    assert files == [version_folder(server) / LABEL_FILES[subset] for subset in subsets]
    assert [file.read_bytes() for file in files] == [server.files[LABEL_FILES[subset]] for subset in subsets]
    assert server.calls == [LABEL_FILES[subset] for subset in subsets]
    assert [file for file, _, _ in server.served] == server.calls


def test_the_whole_set_is_fetched(server):
    assert_whole(server, fetch_images(DATASET))
    assert server.calls == [""]


def test_set_of_another_layout_is_its_own_folder(server):
    server.archive = zip_files({"images/a.jpg": b"x"})
    assert fetch_images(DATASET) == version_folder(server)


def test_labels_come_from_the_whole_set_if_it_is_there(server):
    fetch_images(DATASET)
    server.stop()
    assert [file.read_bytes() for file in fetch_labels(DATASET, "val")] == [server.files[LABEL_FILES["val"]]]


def test_cached_needs_no_network_and_no_room(server, monkeypatch):
    labels, images = fetch_labels(DATASET, "both"), fetch_images(DATASET)
    server.stop()
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: Usage(0, 0, 0))
    assert fetch_labels(DATASET, "both") == labels
    assert fetch_images(DATASET) == images
    # kagglehub by itself neither: a handle with its version is looked up in the cache before anything is asked
    assert download.kagglehub.dataset_download(DATASET) == str(version_folder(server))
    assert server.calls == [*LABEL_FILES.values(), ""]


def test_labels_of_a_cached_set_are_not_the_whole_set(server):
    labels = fetch_labels(DATASET, "val")
    assert_whole(server, fetch_images(DATASET))
    shutil.rmtree(version_folder(server))  # frees the disk, and leaves kagglehub's mark of completeness
    assert fetch_labels(DATASET, "val") == labels
    assert_whole(server, fetch_images(DATASET))


def test_another_process_needs_the_environment_alone(server):
    """The environment is all that another process needs."""
    code = f"from captioner.bdd100k.download import fetch_labels; print('got', *fetch_labels('{DATASET}', 'val'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"got {version_folder(server) / LABEL_FILES['val']}" in run.stdout
    assert "100%" in run.stderr  # kagglehub's progress bar


# --------------------------------------------------------------------------------------------------------------
# sets of another layout


@pytest.mark.parametrize(
    ("layout", "labels", "images"),
    [
        (["b/100k/val.zip", "x/bdd100k_labels_images_val.json", "x/images/100k/val/a.jpg"], 1, "x/images/100k"),
        (["labels/det_20/det_val.json", "labels/pan_val.json", "images/100k/val/a.jpg"], 0, "images/100k"),
        (["labels/100k/val/a.json", "labels/100k/train/b.json", "val/a.jpg"], "labels/100k/val", ""),
        (["old/det_val.json", "new/bdd100k_labels_images_val.json", "a.jpg"], 1, ""),
    ],
)
def test_labels_and_images_of_another_layout_are_found_by_looking(server, layout, labels, images):
    server.files = dict.fromkeys(layout, b"[]")
    server.archive = zip_files(server.files)
    root = version_folder(server)
    assert fetch_labels(DATASET, "val") == [root / (layout[labels] if isinstance(labels, int) else labels)]
    assert fetch_images(DATASET) == root / images


def test_a_set_is_as_large_as_kaggle_says(server, monkeypatch):
    server.total_bytes = 1 << 30
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: Usage(0, 0, (2 << 30) - 1))
    assert_user_error(lambda: fetch_images(DATASET), "2.0 GiB free", "needs 2.0 GiB")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: Usage(0, 0, 2 << 30))
    assert_whole(server, fetch_images(DATASET))


# --------------------------------------------------------------------------------------------------------------
# attached to a notebook

MOUNTED = ("solesensei_bdd100k", "datasets/solesensei/solesensei_bdd100k")


def lay_out(files: dict[str, bytes], root: Path) -> None:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def list_state(root: Path) -> list[tuple]:
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*"))


@pytest.fixture
def no_room(server, monkeypatch) -> KaggleServer:
    """A notebook's disk, on which no download has room."""
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: Usage(0, 0, 0))
    return server


@pytest.mark.parametrize("slug", MOUNTED)
@pytest.mark.parametrize("kind", ["kaggle", "colab"])
def test_a_notebook_attaches_the_set(no_room, monkeypatch, kind, slug):
    """The real client in its notebook mode: one call, nothing downloaded, nothing written."""
    server = no_room
    for name, value in server.notebook_environment(kind).items():
        monkeypatch.setenv(name, value)
    server.slug = f"attached/{slug}"  # not where it is found unasked
    root = server.mount / server.slug
    lay_out(server.files, root)
    before = list_state(server.mount)
    assert fetch_labels(DATASET, "both") == [root / path for path in LABEL_FILES.values()]
    assert fetch_images(DATASET) == root / IMAGE_FOLDER
    version = {"datasetRef": {"OwnerSlug": "solesensei", "DatasetSlug": "solesensei_bdd100k", "VersionNumber": "2"}}
    if kind == "colab":
        version = {"owner": "solesensei", "dataset": "solesensei_bdd100k", "version": 2}
    assert version in server.attached
    assert server.calls == server.served == []
    assert list_state(server.mount) == before
    assert not server.cache.exists()


@pytest.mark.parametrize("slug", MOUNTED)
@pytest.mark.parametrize("kind", ["kaggle", "colab"])
def test_an_attached_set_needs_no_network(no_room, monkeypatch, kind, slug):
    server, root = no_room, no_room.mount / slug
    for name, value in server.notebook_environment(kind).items():
        monkeypatch.setenv(name, value)
    lay_out(server.files, root)
    server.stop()
    assert fetch_labels(DATASET, "val") == [root / LABEL_FILES["val"]]
    assert fetch_images(DATASET) == root / IMAGE_FOLDER


def test_colab_downloads_what_it_does_not_attach(server, monkeypatch):
    for name, value in server.notebook_environment("colab").items():
        monkeypatch.setenv(name, value)
    assert_whole(server, fetch_images(DATASET))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: Usage(0, 0, 0))
    shutil.rmtree(version_folder(server))
    assert_user_error(lambda: fetch_images(DATASET), "GiB free")


def test_a_notebook_that_cannot_attach_says_so(server, monkeypatch):
    for name, value in server.notebook_environment("kaggle").items():
        monkeypatch.setenv(name, value)
    assert_user_error(lambda: fetch_labels(DATASET, "val"), "POST failed", "attach it as an input")
    server.stop()
    assert_user_error(lambda: fetch_images(DATASET), "network", "attach it as an input")


def test_a_cut_label_file_of_an_attached_set_is_not_fetched_over_it(no_room):
    """It is the reading of the labels that tells."""
    server, root = no_room, no_room.mount / MOUNTED[0]
    lay_out(server.files | {LABEL_FILES["val"]: b"[{"}, root)
    assert fetch_labels(DATASET, "val") == [root / LABEL_FILES["val"]]
    assert (root / LABEL_FILES["val"]).read_bytes() == b"[{"


# --------------------------------------------------------------------------------------------------------------
# interrupted


@pytest.mark.parametrize("md5", [True, False])
def test_interrupted_archive_is_resumed(server, md5):
    server.md5 = md5
    server.cut_after = 5 << 19  # 2.5 MiB of 3: kagglehub has written two pieces of 1 MiB
    assert_user_error(lambda: fetch_images(DATASET), "run the same command again", "--images", "--demo")
    assert_whole(server, fetch_images(DATASET))
    assert ("", 2 << 20, len(server.archive) - (2 << 20)) in server.served


def test_interrupted_labels_are_fetched_whole(server):
    server.zip_single = False
    server.cut_after = 20
    assert_user_error(lambda: fetch_labels(DATASET, "val"), LABEL_FILES["val"], "run the same command again")
    assert fetch_labels(DATASET, "val")[0].read_bytes() == server.files[LABEL_FILES["val"]]


def test_interrupted_unpacking_is_done_again_without_another_download(server, monkeypatch):
    def unpack_some(archive, folder):
        archive.extract(LABEL_FILES["val"], folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", unpack_some)
        assert_user_error(lambda: fetch_images(DATASET), "full", "KAGGLEHUB_CACHE", "--images")
    assert (version_folder(server) / LABEL_FILES["val"]).exists()
    monkeypatch.delattr("kagglehub.clients._download_file")  # what writes the body of an answer
    assert_whole(server, fetch_images(DATASET))


@pytest.mark.parametrize("md5", [True, False])
@pytest.mark.parametrize("zip_single", [True, False])
@pytest.mark.parametrize("state", ["cut by unpacking", "zip not unpacked", "zip half unpacked", "unpacked, unmarked"])
def test_no_half_label_file_passes_for_whole(server, state, zip_single, md5):
    """What kagglehub would take for complete, or resume a zip on top of, after a kill in the wrong moment."""
    server.zip_single, server.md5 = zip_single, md5
    path = LABEL_FILES["val"]
    whole, file = server.files[path], version_folder(server) / path
    zipped = zip_files({file.name: whole})
    fetch_labels(DATASET, "val")
    marks = version_folder(server).parents[1] / ".complete"
    assert marks.is_dir()
    if state == "cut by unpacking":  # of the whole set, on top of the file that was fetched alone and is marked
        file.write_bytes(whole[:40])
    else:
        shutil.rmtree(marks)
    if state == "zip not unpacked":
        file.write_bytes(zipped)
    if state == "zip half unpacked":
        file.with_name(f"{file.name}.zip").write_bytes(zipped)
        file.write_bytes(whole[:40])
    assert [file.read_bytes() for file in fetch_labels(DATASET, "val")] == [whole]
    assert len(server.calls) <= 3


# --------------------------------------------------------------------------------------------------------------
# failures


def flip_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize("md5", [True, False])
@pytest.mark.parametrize("spoil", [lambda content: content[:-5000], flip_byte, lambda content: b"<html>log in</html>"])
def test_broken_archive_is_deleted_and_fetched_anew(server, spoil, md5):
    server.spoil, server.md5 = spoil, md5
    assert_user_error(lambda: fetch_images(DATASET), "broken", "deleted", "run the same command again", "--images")
    assert not list(server.cache.rglob("*.archive"))
    server.spoil = None
    assert_whole(server, fetch_images(DATASET))


@pytest.mark.parametrize("md5", [True, False])
@pytest.mark.parametrize("zip_single", [True, False])
@pytest.mark.parametrize("spoil", [lambda content: content[:-30], flip_byte, lambda content: b"<html>log in</html>"])
def test_broken_labels_are_deleted_and_fetched_anew(server, spoil, zip_single, md5):
    if spoil is flip_byte and not (zip_single or md5):
        pytest.skip("a wrong byte within a file that has neither sum can't be seen")
    server.spoil, server.zip_single, server.md5 = spoil, zip_single, md5
    assert_user_error(lambda: fetch_labels(DATASET, "val"), LABEL_FILES["val"], "broken", "deleted", "--labels")
    assert server.calls == [LABEL_FILES["val"]] * 2  # it is tried anew once
    server.spoil = None
    assert fetch_labels(DATASET, "val")[0].read_bytes() == server.files[LABEL_FILES["val"]]


@pytest.mark.parametrize("fetch", [fetch_images, lambda dataset: fetch_labels(dataset, "both")])
@pytest.mark.parametrize(
    ("status", "parts"),
    [
        (401, ["HTTP 401", "KAGGLE_KEY"]),
        (403, ["HTTP 403", "KAGGLE_USERNAME", "private"]),
        (404, ["HTTP 404", "--kaggle-dataset"]),
        (429, ["HTTP 429", "later"]),
        (503, ["HTTP 503", "later"]),
    ],
)
def test_a_refusal_is_one_message(server, fetch, status, parts):
    server.status = status
    assert_user_error(lambda: fetch(DATASET), *parts, "--labels", "--images", "--demo")
    server.status = None
    fetch(DATASET)


def test_unknown_version_and_missing_file(server):
    with pytest.raises(UserError, match=r"versions/9: .*HTTP 404"):
        fetch_images("solesensei/solesensei_bdd100k/versions/9")
    del server.files[LABEL_FILES["train"]]
    server.archive = zip_files(server.files)
    with pytest.raises(UserError, match=rf"no labels of train .*{Path(LABEL_FILES['val']).name}.* --labels"):
        fetch_labels(DATASET, "train")
    assert server.calls[-2:] == [LABEL_FILES["train"], ""]  # no such file: the whole set is searched


@pytest.mark.parametrize("fetch", [fetch_images, lambda dataset: fetch_labels(dataset, "val")])
def test_without_a_network_the_flags_for_own_files_are_named(server, fetch):
    server.stop()
    assert_user_error(lambda: fetch(DATASET), "network", "--labels", "--images", "--demo")


def test_too_little_disk_is_told_before_the_download(server, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: Usage(0, 0, 14 << 30))
    error = assert_user_error(lambda: fetch_images(DATASET), str(server.cache), "KAGGLEHUB_CACHE", "--images")
    assert "14.0 GiB free" in str(error)
    assert "needs 14.2 GiB" in str(error)
    assert server.calls == []
    assert fetch_labels(DATASET, "val")  # which are small


def test_what_an_interrupted_fetch_left_counts_as_room(server, monkeypatch):
    server.cut_after = 5 << 19
    assert_user_error(lambda: fetch_images(DATASET))
    room = 2 * server.total_bytes - (2 << 20)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: Usage(0, 0, room - 1))
    assert_user_error(lambda: fetch_images(DATASET), "GiB free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: Usage(0, 0, room))
    assert_whole(server, fetch_images(DATASET))


def test_disk_fills_up_in_the_download(server, monkeypatch):
    def write_nothing(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kagglehub.clients._download_file", write_nothing)
        parts = str(server.cache), "full", "KAGGLEHUB_CACHE"
        assert_user_error(lambda: fetch_images(DATASET), *parts)
        assert_user_error(lambda: fetch_labels(DATASET, "val"), LABEL_FILES["val"], *parts)
    assert_whole(server, fetch_images(DATASET))


def test_an_unwritable_cache_is_named(server):
    server.cache.write_text("a file where the folder is to be")
    assert_user_error(lambda: fetch_images(DATASET), str(server.cache), "KAGGLEHUB_CACHE")


def test_an_unreadable_account_file_is_named(server, tmp_path):
    folder = tmp_path / "no-account"
    folder.mkdir()
    (folder / "kaggle.json").write_text("{")
    assert_user_error(lambda: fetch_images(DATASET), str(folder / "kaggle.json"))


@pytest.mark.parametrize("fetch", [fetch_images, lambda dataset: fetch_labels(dataset, "val")])
def test_version_must_be_pinned(server, fetch):
    with pytest.raises(UserError, match=r"pin the version.*solesensei/solesensei_bdd100k/versions/2"):
        fetch("solesensei/solesensei_bdd100k")
    for handle in ("", "bdd100k", "a/b/versions/0", "a/b/versions/x", "a/b/c/2", "../b/versions/2", f"{DATASET}/"):
        with pytest.raises(UserError, match="owner/name/versions/number"):
            fetch(handle)
    assert server.calls == []


# --------------------------------------------------------------------------------------------------------------
# archives of somebody who means harm


def make_link(name: str) -> zipfile.ZipInfo:
    """A member that is a symbolic link, whose content is where it leads."""
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, 0o120777 << 16
    return member


def list_outside(folder: Path, cache: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_relative_to(cache) and path.is_file())


def test_members_of_an_archive_stay_in_its_folder(server, tmp_path):
    """Names that climb or are absolute, and a link: what comes of them lies in the set's folder, none of it a link."""
    image = server.files[f"{IMAGE_FOLDER}/val/b1c66a42-6f7d68ca.jpg"]
    (tmp_path / "secret.jpg").write_bytes(image)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("../../../../../climbed.jpg", f"{tmp_path}/absolute.jpg", f"{IMAGE_FOLDER}/a.jpg"):
            archive.writestr(name, image)
        archive.writestr(make_link(f"{IMAGE_FOLDER}/link.jpg"), f"{tmp_path}/secret.jpg")
        archive.writestr(make_link(f"{IMAGE_FOLDER}/folder"), f"{tmp_path}")
        archive.writestr(f"{IMAGE_FOLDER}/val/b.jpg", image)
    server.archive = buffer.getvalue()
    images = fetch_images(DATASET)
    assert list_outside(tmp_path, server.cache) == [tmp_path / "secret.jpg"]
    root = version_folder(server)
    assert (root / "climbed.jpg").exists() and not [path for path in root.rglob("*") if path.is_symlink()]
    assert (images / "link.jpg").read_bytes() == f"{tmp_path}/secret.jpg".encode()


@pytest.mark.parametrize("harm", ["climb", "absolute", "link", "link and through it"])
def test_members_of_a_tar_stay_in_its_folder(server, tmp_path, harm):
    """kagglehub takes one too. Refused and deleted, or unpacked within the folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo({"climb": "../../../../../x.jpg", "absolute": f"{tmp_path}/x.jpg"}.get(harm, "link"))
        if harm.startswith("link"):
            member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(member)
        if harm == "link and through it":
            archive.addfile(tarfile.TarInfo("link/x.jpg"))
    server.archive = buffer.getvalue()
    if harm == "absolute":  # the leading slash is taken away
        fetch_images(DATASET)
    else:
        assert_user_error(lambda: fetch_images(DATASET), "broken", "deleted")
    assert list_outside(tmp_path, server.cache) == []


def test_a_link_for_the_label_file_is_no_label_file(server, tmp_path, monkeypatch):
    path = LABEL_FILES["val"]
    (tmp_path / "secret.json").write_text("[]")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(make_link(Path(path).name), f"{tmp_path}/secret.json")
    monkeypatch.setattr(server, "content", lambda file: (f"{Path(path).name}.zip", buffer.getvalue()))
    assert_user_error(lambda: fetch_labels(DATASET, "val"), path, "broken", "deleted")


def test_members_of_a_label_archive_are_read_and_not_unpacked(tmp_path, monkeypatch):
    """Whatever they are called; a link's content is a path, which is no JSON."""
    monkeypatch.chdir(tmp_path)
    labels = draw_dataset_files()[LABEL_FILES["val"]]
    for name in ("../../climbed.json", f"{tmp_path}/absolute.json"):
        with zipfile.ZipFile("labels.zip", "w") as archive:
            archive.writestr(name, labels)
        frames = list(read_labels([Path("labels.zip")], LabelReport()))
        assert len(frames) == 1
        assert [path.name for path in tmp_path.rglob("*")] == ["labels.zip"]
    (tmp_path / "secret.json").write_bytes(labels)
    with zipfile.ZipFile("labels.zip", "w") as archive:
        archive.writestr(make_link("a.json"), f"{tmp_path}/secret.json")
    with pytest.raises(UserError, match=r"labels.zip: not readable as JSON"):
        list(read_labels([Path("labels.zip")], LabelReport()))

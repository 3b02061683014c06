"""Kaggle: the real kagglehub client against a server on this machine that speaks the few calls it makes."""

import base64
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest
from PIL import Image

import acquisition
from acquisition import IMAGE_FOLDER, LABEL_FILES, fetch_images, fetch_labels
from config import UserError
from data import index_images

ROOT = Path(__file__).parent.parent
DATASET = "solesensei/solesensei_bdd100k/versions/2"
PADDING = "bdd100k/padding.bin"  # makes the archive larger than the pieces of 1 MiB that kagglehub writes
PICTURES = {
    "b1c66a42-6f7d68ca.jpg": "val",
    "0000f77c-6257be58.jpg": "train/trainA",
    "0000f77c-62c2a288.jpg": "train/trainB",
    "0000f77c-62c2a288 (Somebody's conflicted copy) [conflicted].jpg": "train/trainB",
    "cabc30fc-e7726578.jpg": "test/testA",
}

Usage = namedtuple("Usage", "total used free")


class KaggleServer:
    """A loopback Kaggle that holds one version of one data set; use it as a context manager.

        with KaggleServer(files, folder) as server:
            subprocess.run([...], env=os.environ | server.environment)

    `files` maps paths in the data set to their bytes; `folder` is an empty one for the client's cache. `environment`
    is all that a client needs, in this process or another: kagglehub has no setting for a host and port, but it has
    http://localhost for Kaggle's developers, and requests sends that through the proxy that is named, which is us.

    Like Kaggle it answers DownloadDataset with a redirect to a storage address, and that with Range and an MD5 sum; a
    single file comes as a zip of it unless `zip_single` is off. To make it fail: `status` (HTTP status of the API),
    `cut_after` (bytes after which the next download breaks off), `spoil` (bytes -> bytes, what storage sends instead),
    `md5` off, `stop()`. `calls` lists the files asked of the API ("" is the archive), `served` the (file, first byte,
    number of bytes) that storage set out to send. Other versions and paths are 404.
    """

    def __init__(self, files: Mapping[str, bytes], folder: Path, dataset: str = DATASET):
        self.files, self.dataset = dict(files), dataset
        self.status, self.cut_after, self.spoil, self.md5, self.zip_single = None, None, None, True, True
        self.calls: list[str] = []
        self.served: list[tuple[str, int, int]] = []
        self.archive = zip_files(self.files)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (KaggleHandler,), {"kaggle": self}))
        self._http.daemon_threads = True
        self.cache = folder / "kagglehub"
        proxy = f"http://127.0.0.1:{self._http.server_port}"
        self.environment = {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "http_proxy": proxy,
            "HTTP_PROXY": proxy,
            "no_proxy": "",
            "NO_PROXY": "",
            "KAGGLEHUB_CACHE": str(self.cache),
            "KAGGLE_CONFIG_DIR": str(folder / "no-account"),
            "KAGGLE_USERNAME": "",
            "KAGGLE_KEY": "",
            "KAGGLE_API_TOKEN": "",
        }

    def __enter__(self) -> "KaggleServer":
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """Go off the network: connections are refused from now on. Once stopped it stays so."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def content(self, file: str) -> tuple[str, bytes]:
        """(name, bytes) of what storage sends for `file`."""
        if not file:
            return "archive.zip", self.archive
        name = file.rsplit("/", 1)[-1]
        return (f"{name}.zip", zip_files({name: self.files[file]})) if self.zip_single else (name, self.files[file])


class KaggleHandler(BaseHTTPRequestHandler):
    kaggle: KaggleServer

    def do_POST(self):
        """The API: DownloadDataset, answered with a redirect."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        file = asked.get("fileName") or ""
        self.kaggle.calls.append(file)
        handle = f"{asked['ownerSlug']}/{asked['datasetSlug']}/versions/{asked['datasetVersionNumber']}"
        known = handle == self.kaggle.dataset and (not file or file in self.kaggle.files)
        status = self.kaggle.status or (302 if known else 404)
        if not urlsplit(self.path).path.endswith("/v1/datasets.DatasetApiService/DownloadDataset"):
            status = 501
        body = b"" if status == 302 else json.dumps({"code": status, "message": "Permission was denied"}).encode()
        self.send_response(status)
        if status == 302:
            name = self.kaggle.content(file)[0]
            self.send_header("Location", f"http://localhost/storage/{quote(file, safe='') or '-'}/{quote(name)}")
        else:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        """Storage: the bytes of the archive or of one file, from the first byte that is asked for."""
        file = unquote(urlsplit(self.path).path.split("/")[2]).removeprefix("-")
        whole = self.kaggle.content(file)[1]
        md5 = base64.b64encode(hashlib.md5(whole).digest()).decode()
        whole = self.kaggle.spoil(whole) if self.kaggle.spoil else whole
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        body = whole[start:] if start < len(whole) else b"<Error>InvalidRange</Error>"
        self.send_response(200 if not start else 206 if start < len(whole) else 416)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if self.kaggle.md5:
            self.send_header("x-goog-hash", f"crc32c=n03x6A==,md5={md5}")
        self.end_headers()
        cut, self.kaggle.cut_after = self.kaggle.cut_after, None
        self.kaggle.served.append((file, start, len(body[:cut])))
        # before it resumes, kagglehub reads the headers of an answer from the first byte on, and hangs up
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, *_):
        pass


def zip_files(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content, zipfile.ZIP_STORED if path == PADDING else zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def draw_dataset_files() -> dict[str, bytes]:
    """A few pictures and labels in the layout of the Kaggle data set: {path: bytes}."""
    picture = io.BytesIO()
    Image.new("RGB", (32, 18), "grey").save(picture, "JPEG")
    files = {f"{IMAGE_FOLDER}/{folder}/{name}": picture.getvalue() for name, folder in PICTURES.items()}
    attributes = {"weather": "clear", "scene": "highway", "timeofday": "night"}
    for subset, path in LABEL_FILES.items():
        frames = [
            {"name": name, "attributes": attributes, "timestamp": 10000, "labels": []}
            for name, folder in PICTURES.items()
            if folder.startswith(subset) and "conflicted" not in name
        ]
        files[path] = json.dumps(frames, indent=4).encode()
    return files | {PADDING: os.urandom(3 << 20)}


@pytest.fixture(scope="module")
def dataset_files() -> dict[str, bytes]:
    return draw_dataset_files()


@pytest.fixture
def server(dataset_files, tmp_path, monkeypatch) -> Iterator[KaggleServer]:
    """A loopback Kaggle that this process's kagglehub is pointed at, and a disk with room."""
    with KaggleServer(dataset_files, tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(acquisition.shutil, "disk_usage", lambda folder: Usage(0, 0, 1 << 40))
        yield server


def version_folder(server: KaggleServer) -> Path:
    return server.cache / "datasets" / DATASET


def assert_whole(server: KaggleServer, images: Path) -> None:
    root = version_folder(server)
    assert images == root / IMAGE_FOLDER
    for path, content in server.files.items():
        assert (root / path).read_bytes() == content, path
    assert sorted(index_images(images)) == sorted(PICTURES)
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
def test_labels_alone(server, subset, zip_single):
    server.zip_single = zip_single
    subsets = ["val", "train"] if subset == "both" else [subset]
    files = fetch_labels(DATASET, subset)
    assert files == [version_folder(server) / LABEL_FILES[subset] for subset in subsets]
    assert [file.read_bytes() for file in files] == [server.files[LABEL_FILES[subset]] for subset in subsets]
    assert server.calls == [LABEL_FILES[subset] for subset in subsets]
    assert [file for file, _, _ in server.served] == server.calls


def test_whole_set(server):
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
    monkeypatch.setattr(acquisition.shutil, "disk_usage", lambda folder: Usage(0, 0, 0))
    assert fetch_labels(DATASET, "both") == labels
    assert fetch_images(DATASET) == images
    # kagglehub by itself neither: a handle with its version is looked up in the cache before anything is asked
    assert acquisition.kagglehub.dataset_download(DATASET) == str(version_folder(server))
    assert server.calls == [*LABEL_FILES.values(), ""]


def test_labels_of_a_cached_set_are_not_the_whole_set(server):
    labels = fetch_labels(DATASET, "val")
    assert_whole(server, fetch_images(DATASET))
    shutil.rmtree(version_folder(server))  # frees the disk, and leaves kagglehub's mark of completeness
    assert fetch_labels(DATASET, "val") == labels
    assert_whole(server, fetch_images(DATASET))


def test_another_process(server):
    """The environment is all that another process needs."""
    code = f"from acquisition import fetch_labels; print('got', *fetch_labels('{DATASET}', 'val'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"got {version_folder(server) / LABEL_FILES['val']}" in run.stdout
    assert "100%" in run.stderr  # kagglehub's progress bar


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
def test_refusals(server, fetch, status, parts):
    server.status = status
    assert_user_error(lambda: fetch(DATASET), *parts, "--labels", "--images", "--demo")
    server.status = None
    fetch(DATASET)


def test_unknown_version_and_missing_file(server):
    with pytest.raises(UserError, match=r"versions/9: .*HTTP 404"):
        fetch_images("solesensei/solesensei_bdd100k/versions/9")
    del server.files[LABEL_FILES["train"]]
    assert_user_error(lambda: fetch_labels(DATASET, "train"), LABEL_FILES["train"], "HTTP 404")


@pytest.mark.parametrize("fetch", [fetch_images, lambda dataset: fetch_labels(dataset, "val")])
def test_no_network(server, fetch):
    server.stop()
    assert_user_error(lambda: fetch(DATASET), "network", "--labels", "--images", "--demo")


def test_too_little_disk(server, monkeypatch):
    monkeypatch.setattr(acquisition.shutil, "disk_usage", lambda folder: Usage(0, 0, 14 << 30))
    error = assert_user_error(lambda: fetch_images(DATASET), str(server.cache), "KAGGLEHUB_CACHE", "--images")
    assert "14.0 GiB free" in str(error)
    assert "needs 14.2 GiB" in str(error)
    assert server.calls == []
    assert fetch_labels(DATASET, "val")  # which are small


def test_what_an_interrupted_fetch_left_counts_as_room(server, monkeypatch):
    server.cut_after = 5 << 19
    assert_user_error(lambda: fetch_images(DATASET))
    room = acquisition.NEEDED_BYTES - (2 << 20)
    monkeypatch.setattr(acquisition.shutil, "disk_usage", lambda folder: Usage(0, 0, room - 1))
    assert_user_error(lambda: fetch_images(DATASET), "GiB free")
    monkeypatch.setattr(acquisition.shutil, "disk_usage", lambda folder: Usage(0, 0, room))
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


def test_unwritable_cache(server):
    server.cache.write_text("a file where the folder is to be")
    assert_user_error(lambda: fetch_images(DATASET), str(server.cache), "KAGGLEHUB_CACHE")


def test_unreadable_account_file(server, tmp_path):
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

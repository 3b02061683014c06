"""Kaggle and the Hugging Face hub on this machine: threads that answer the few calls the real clients make."""

import base64
import hashlib
import io
import json
import os
import socket
import struct
import threading
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from PIL import Image

from captioner.bdd100k.download import IMAGE_FOLDER, LABEL_FILES
from config import BASE_MODEL

DATASET = "solesensei/solesensei_bdd100k/versions/2"
PADDING = "bdd100k/padding.bin"  # makes the archive larger than the pieces of 1 MiB that kagglehub writes
MODEL, COMMIT = BASE_MODEL.split("@")


class LoopbackServer:
    """An HTTP server on a free port of 127.0.0.1 while it is used as a context manager."""

    def __init__(self, handler: type["LoopbackHandler"]):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"loopback": self}))
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
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


class LoopbackHandler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


# --------------------------------------------------------------------------------------------------------------
# Kaggle


class KaggleServer(LoopbackServer):
    """A loopback Kaggle that holds one version of one data set; use it as a context manager.

        with KaggleServer(files, folder) as server:
            subprocess.run([...], env=os.environ | server.environment)

    `files` maps paths in the data set to their bytes; `folder` is an empty one for the client's cache. `environment`
    is all that a client needs, in this process or another: kagglehub has no setting for a host and port, but it has
    http://localhost for Kaggle's developers, and requests sends that through the proxy that is named, which is us.

    Like Kaggle it answers DownloadDataset with a redirect to a storage address, and that with Range and an MD5 sum; a
    single file comes as a zip of it unless `zip_single` is off. To make it fail: `status` (HTTP status of the API),
    `cut_after` (bytes after which the next download of more breaks off), `spoil` (bytes -> bytes, what storage sends
    instead), `md5` off, `stop()`. `calls` lists the files asked of the API ("" is the archive), `served` the (file,
    first byte, number of bytes) that storage set out to send. Other versions and paths are 404.

    With the variables of `notebook_environment` too, kagglehub takes itself for one in a Kaggle or Colab notebook and
    asks us to attach the set: `attached` lists those calls. What we answer is `slug`, the folder below `mount`.
    """

    def __init__(self, files: Mapping[str, bytes], folder: Path, dataset: str = DATASET):
        self.files, self.dataset = dict(files), dataset
        self.status, self.cut_after, self.spoil, self.md5, self.zip_single = None, None, None, True, True
        self.calls: list[str] = []
        self.served: list[tuple[str, int, int]] = []
        self.attached: list[dict] = []
        self.total_bytes = 7_600_000_000  # which Kaggle's page gives for version 2
        self.slug: str | None = None
        self.archive = zip_files(self.files)
        super().__init__(KaggleHandler)
        self.mount = folder / "kaggle-input"
        self.cache = folder / "kagglehub"
        self.environment = {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "http_proxy": self.address,
            "HTTP_PROXY": self.address,
            "no_proxy": "",
            "NO_PROXY": "",
            "KAGGLEHUB_CACHE": str(self.cache),
            "KAGGLE_CONFIG_DIR": str(folder / "no-account"),
            "KAGGLE_USERNAME": "",
            "KAGGLE_KEY": "",
            "KAGGLE_API_TOKEN": "",
            "KAGGLE_CACHE_MOUNT_FOLDER": str(self.mount),
            "COLAB_CACHE_MOUNT_FOLDER": str(self.mount),
        }

    def notebook_environment(self, kind: str) -> dict[str, str]:
        """What the notebooks of Kaggle and Colab set."""
        if kind == "colab":
            return {"TBE_RUNTIME_ADDR": self.address.removeprefix("http://"), "no_proxy": "127.0.0.1"}
        return {
            "KAGGLE_KERNEL_RUN_TYPE": "Interactive",
            "KAGGLE_DATA_PROXY_URL": self.address,
            "KAGGLE_USER_SECRETS_TOKEN": "jwt",
            "KAGGLE_DATA_PROXY_TOKEN": "proxy",
            "no_proxy": "127.0.0.1",
        }

    def content(self, file: str) -> tuple[str, bytes]:
        """(name, bytes) of what storage sends for `file`."""
        if not file:
            return "archive.zip", self.archive
        name = file.rsplit("/", 1)[-1]
        return (f"{name}.zip", zip_files({name: self.files[file]})) if self.zip_single else (name, self.files[file])


class KaggleHandler(LoopbackHandler):
    loopback: KaggleServer

    def do_POST(self):
        """The API: DownloadDataset, answered with a redirect, GetDataset, and ListTreeDatasetFiles of a folder.

        The latter is asked for by kagglehub from 1.0.3 on after a 404: what is no file may be a folder.
        """
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = urlsplit(self.path).path.rsplit("/v1/datasets.DatasetApiService/", 1)[-1]
        if call.startswith(("/kaggle-jwt-handler/", "/kagglehub/")):
            return self.attach(asked, kaggle=call.startswith("/kaggle-"))
        if call == "GetDataset":
            return self.send_json(self.loopback.status or 200, {"totalBytes": self.loopback.total_bytes})
        handle = f"{asked['ownerSlug']}/{asked['datasetSlug']}/versions/{asked['datasetVersionNumber']}"
        if call == "ListTreeDatasetFiles":
            return self.send_folder(asked.get("path") or "", handle)
        file = asked.get("fileName") or ""
        self.loopback.calls.append(file)
        known = handle == self.loopback.dataset and (not file or file in self.loopback.files)
        status = self.loopback.status or (302 if known else 404)
        if call != "DownloadDataset":
            status = 501
        body = b"" if status == 302 else json.dumps({"code": status, "message": "Permission was denied"}).encode()
        self.send_response(status)
        if status == 302:
            name = self.loopback.content(file)[0]
            self.send_header("Location", f"http://localhost/storage/{quote(file, safe='') or '-'}/{quote(name)}")
        else:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_folder(self, folder: str, handle: str) -> None:
        """What is directly in a folder: nothing, as with Kaggle, if there is no such folder."""
        status = self.loopback.status or (200 if handle == self.loopback.dataset else 404)
        inside = [file for file in self.loopback.files if file.startswith(f"{folder}/")]
        below = {file.removeprefix(f"{folder}/").split("/")[0] for file in inside}
        paths = sorted(f"{folder}/{name}" for name in below)
        content = {
            "files": [{"relativeUrl": path} for path in paths if path in self.loopback.files],
            "directories": [{"relativeUrl": path} for path in paths if path not in self.loopback.files],
        }
        self.send_json(status, content)

    def attach(self, asked: dict, kaggle: bool) -> None:
        """The answer to a notebook of Kaggle's or Colab's: the folder in which the set is mounted, or that it isn't."""
        slug = self.loopback.slug
        if slug is None:
            return self.send_json(self.loopback.status or (200 if kaggle else 404), {"wasSuccessful": False})
        self.loopback.attached.append(asked)
        self.send_json(200, {"wasSuccessful": True, "result": {"mountSlug": slug}} if kaggle else {"slug": slug})

    def send_json(self, status: int, content: dict) -> None:
        body = json.dumps(content if status == 200 else {"code": status, "message": "Permission was denied"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        """Storage: the bytes of the archive or of one file, from the first byte that is asked for."""
        file = unquote(urlsplit(self.path).path.split("/")[2]).removeprefix("-")
        whole = self.loopback.content(file)[1]
        md5 = base64.b64encode(hashlib.md5(whole).digest()).decode()
        whole = self.loopback.spoil(whole) if self.loopback.spoil else whole
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        body = whole[start:] if start < len(whole) else b"<Error>InvalidRange</Error>"
        self.send_response(200 if not start else 206 if start < len(whole) else 416)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if self.loopback.md5:
            self.send_header("x-goog-hash", f"crc32c=n03x6A==,md5={md5}")
        self.end_headers()
        cut = self.loopback.cut_after
        if cut is not None and cut < len(body):
            self.loopback.cut_after = None
        self.loopback.served.append((file, start, len(body[:cut])))
        # before it resumes, kagglehub reads the headers of an answer from the first byte on, and hangs up
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body[:cut])
        self.close_connection = True


def zip_files(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content, zipfile.ZIP_STORED if path == PADDING else zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------------
# the Hugging Face hub


class HubServer(LoopbackServer):
    """A loopback Hugging Face hub that holds one commit of one model; use it as a context manager.

        with HubServer(files, folder) as server:
            subprocess.run([...], env=os.environ | server.environment)

    `files` maps names in the repository to their bytes; `folder` is an empty one for the client's cache. Like the hub
    it answers for files of `large` bytes or more with a redirect to a storage address, which takes Range; all others
    come with the answer. Another model is 401, another file 404.

    To make it fail: `cut_at`, a byte of the large files at which connections break off, `cuts` of them (math.inf: each
    time), in the midst of a packet with `reset`; `stop()`. `calls` lists what was asked, method and path, `served` the
    (file, first byte, number of bytes) that it set out to send.
    """

    def __init__(
        self, files: Mapping[str, bytes], folder: Path, model: str = MODEL, large: int = 1 << 20, kind: str = "models"
    ):
        """`kind`: "datasets" for a data set of that name in place of a model."""
        super().__init__(HubHandler)
        self.files, self.model, self.large, self.kind = dict(files), model, large, kind
        self.cut_at, self.cuts, self.reset = None, 1, False
        self.calls: list[str] = []
        self.served: list[tuple[str, int, int]] = []
        self.sums = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
        self.commit = COMMIT
        self.home = folder / "hf"
        self.environment = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "",
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
        }

    def list_files(self, folder: str) -> list[dict]:
        """The entries of the tree API below `folder`."""
        entries = []
        for name, content in self.files.items():
            if name.startswith(folder):
                entry = {"type": "file", "path": name, "size": len(content), "oid": self.sums[name][:40]}
                if len(content) >= self.large:
                    entry["lfs"] = {"oid": self.sums[name], "size": len(content), "pointerSize": 135}
                entries.append(entry)
        folders = {str(parent) for entry in entries for parent in PurePosixPath(entry["path"]).parents} - {".", folder}
        return entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]


class HubHandler(LoopbackHandler):
    loopback: HubServer

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self) -> None:
        hub, path = self.loopback, unquote(urlsplit(self.path).path)
        hub.calls.append(f"{self.command} {path}")
        root = "" if hub.kind == "models" else f"/{hub.kind}"
        api, files, storage = f"/api/{hub.kind}/{hub.model}", f"{root}/{hub.model}/resolve/", "/storage/"
        if path.startswith(storage):
            self.send_part(path.removeprefix(storage))
        elif path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            self.send_file(revision, name)
        elif path == api or path.startswith(f"{api}/"):
            self.send_api(path.removeprefix(api).strip("/").split("/", 2))
        else:
            self.send_failure(401, "RepoNotFound")

    def send_file(self, revision: str, name: str) -> None:
        hub = self.loopback
        if revision not in ("main", hub.commit):
            self.send_failure(404, "RevisionNotFound")
        elif name not in hub.files:
            self.send_failure(404, "EntryNotFound")
        elif len(hub.files[name]) < hub.large:
            self.send(200, hub.files[name], {"ETag": f'"{hub.sums[name][:40]}"'}, name)
        else:
            linked = {"X-Linked-Etag": f'"{hub.sums[name]}"', "X-Linked-Size": str(len(hub.files[name]))}
            self.send(302, b"", linked | {"Location": f"{hub.address}/storage/{quote(name)}"})

    def send_part(self, name: str) -> None:
        """Storage: the bytes of a large file, from the first byte that is asked for."""
        hub, whole = self.loopback, self.loopback.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{hub.sums[name]}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        cut = None
        if hub.cut_at is not None and hub.cut_at < len(whole) and hub.cuts > 0 and self.command == "GET":
            hub.cuts -= 1
            cut = max(0, hub.cut_at - start)
        self.send(206 if start else 200, whole[start:], headers, name, start, cut)

    def send_api(self, parts: list[str]) -> None:
        """What the hub tells of the model (parts: none, or "revision" and which), or of its files ("tree")."""
        hub = self.loopback
        kind, revision, folder = (*parts, "", "", "")[:3]
        if revision not in ("", "main", hub.commit):
            self.send_failure(404, "RevisionNotFound")
        elif kind == "tree" and not (entries := hub.list_files(folder)):
            self.send_failure(404, "EntryNotFound")
        elif kind == "tree":
            self.send_json(entries)
        else:
            siblings = [{"rfilename": name} for name in hub.files]
            self.send_json({"id": hub.model, "sha": hub.commit, "private": False, "tags": [], "siblings": siblings})

    def send_json(self, value) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_failure(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def send(
        self, status: int, body: bytes, headers: dict[str, str], file: str = "", start: int = 0, cut: int | None = None
    ) -> None:
        """Answer with `body`, its part from byte `start` of `file` on if it is one, and break off at its byte `cut`."""
        hub = self.loopback
        self.send_response(status)
        for name, value in {"X-Repo-Commit": hub.commit, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if file:
            hub.served.append((file, start, len(body[:cut])))
        self.wfile.write(body[:cut])
        if cut is not None and hub.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # at once, with a reset, where a server would take its leave


IMAGES = {
    "b1c66a42-6f7d68ca.jpg": "val",
    "0000f77c-6257be58.jpg": "train/trainA",
    "0000f77c-62c2a288.jpg": "train/trainB",
    "0000f77c-62c2a288 (Somebody's conflicted copy) [conflicted].jpg": "train/trainB",
    "cabc30fc-e7726578.jpg": "test/testA",
}


def draw_dataset_files() -> dict[str, bytes]:
    """A few images and labels in the layout of the Kaggle data set: {path: bytes}."""
    image = io.BytesIO()
    Image.new("RGB", (32, 18), "grey").save(image, "JPEG")
    files = {f"{IMAGE_FOLDER}/{folder}/{name}": image.getvalue() for name, folder in IMAGES.items()}
    attributes = {"weather": "clear", "scene": "highway", "timeofday": "night"}
    for subset, path in LABEL_FILES.items():
        frames = [
            {"name": name, "attributes": attributes, "timestamp": 10000, "labels": []}
            for name, folder in IMAGES.items()
            if folder.startswith(subset) and "conflicted" not in name
        ]
        files[path] = json.dumps(frames, indent=4).encode()
    return files | {PADDING: os.urandom(3 << 20)}
